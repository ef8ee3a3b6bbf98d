"""The normal form of a signature: the same visits, written by fixed rules."""

from ._tree import END, MAX_NESTING, Node, Power, Sequence, sequence


def normal_form(node: Node) -> Node:
    # Each change leaves fewer blocks, or as many and fewer exponents, so this ends. At
    # a fixpoint, to bring the result to normal form again changes nothing.
    while (normal := _simplify(node, MAX_NESTING)) != node:
        node = normal
    return node


def _simplify(node: Node, room: int) -> Node:
    """One pass of the rules, from the inside out, over what may take up `room` more
    levels of parentheses."""
    match node:
        case Power(body, exponent):
            body = _simplify(body, room - 1)
            if isinstance(exponent, int):
                base, inner = _split(body)
                if inner * exponent < END:
                    return Power(base, inner * exponent)
            return Power(body, exponent)
        case Sequence(parts):
            return sequence(_fold([_simplify(part, room) for part in parts], room))
    return node


def _fold(parts: list[Node], room: int) -> list[Node]:
    """Writes copies that stand side by side as a power: those of the fewest parts
    first, then the leftmost."""
    period = 1
    while period < len(parts):
        for start in range(len(parts) - period):
            folded = _copies(parts, start, period, room)
            if folded is not None:
                power, stop = folded
                parts = parts[:start] + [power] + parts[stop:]
                # A fold of p parts removes p of them, so that looking for shorter ones
                # again costs no more than quadratic time in all.
                period = 0
                break
        period += 1
    return parts


def _copies(parts: list[Node], start: int, period: int, room: int) -> tuple[Power, int] | None:
    """The power of a body of `period` parts that the parts from `start` on can be
    written as, and where these stop."""
    base, _ = _split(parts[start])
    bodies = [base] if period == 1 or _is_group(base, period) else []
    after = parts[start + period]
    # Building no body that the next part rules out is most of the speed.
    if period > 1 and (after == parts[start] or _is_group(_split(after)[0], period)):
        bodies.append(Sequence(tuple(parts[start : start + period])))
    for body in bodies:
        copies = total = 0
        stop = start
        while stop < len(parts):
            base, number = _split(parts[stop])
            width = 1
            if base != body:
                if Sequence(tuple(parts[stop : stop + period])) != body:
                    break
                number, width = 1, period
            if total + number >= END:
                break
            copies, total, stop = copies + 1, total + number, stop + width
        power = Power(body, total)
        if copies > 1 and height(power) <= room:
            return power, stop
    return None


def _split(node: Node) -> tuple[Node, int]:
    """What is repeated, and how often."""
    if isinstance(node, Power) and isinstance(node.exponent, int):
        return node.body, node.exponent
    return node, 1


def _is_group(node: Node, size: int) -> bool:
    return isinstance(node, Sequence) and len(node.parts) == size


def height(node: Node) -> int:
    """How deeply parentheses nest."""
    match node:
        case Power(Sequence() | Power() as body, _):
            return 1 + height(body)
        case Sequence(parts):
            return max(map(height, parts))
    return 0


def degree(node: Node) -> int:
    match node:
        case Power(body, _):
            return 1 + degree(body)
        case Sequence(parts):
            return max(map(degree, parts))
    return 0
