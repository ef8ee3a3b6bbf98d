"""The text that names a recursion: read, counted, simplified, compared by meaning."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce


# With these caps no text can hang anything or exhaust the memory. A normal form keeps
# to them too, so that it can always be read again.
MAX_CHARACTERS = 32_768
"""The longest text."""
MAX_TERMS = 256
"""The most blocks and groups that a text may write down."""
MAX_NESTING = 16
"""How deeply parentheses may nest."""
MAX_EXPONENT_DIGITS = 18
"""The most digits of an exponent."""
MAX_BLOCK_DIGITS = 8
"""The most digits of a block's name."""
MAX_VISITS = 1_000_000
"""The most visits that `Signature.visits` spells out."""

_END = 10**MAX_EXPONENT_DIGITS  # exponents stay below
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹"


@dataclass(frozen=True)
class Block:
    """One visit of the block called `name`."""

    name: str


@dataclass(frozen=True)
class Power:
    """`exponent` rounds of `body`; a name stands for a number that is bound later."""

    body: "Node"
    exponent: int | str


@dataclass(frozen=True)
class Sequence:
    """One part after the other; at least two, and none of them a sequence itself."""

    parts: tuple["Node", ...]


Node = Block | Power | Sequence


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Signature:
    """Which block is visited when: `A^3 B` visits A three times and then B.

    A block is a capital letter, digits may follow. An exponent is a number of rounds:
    an integer, or a small letter that is bound to one later. Parentheses group. White
    space is free, `A³` reads like `A^3`, and `AAB` like `A^2 B`.

    Two signatures are equal if they denote the same visits for every value of their
    names. What is compared is a fingerprint, 2558 bits of a fixed hash: unless a text
    is built to deceive it, it errs far less often than the machine does. It says
    nothing of where loops begin: `A^r A` and `A A^r` are equal.

    !!! example

        ```python
        import rinsx as rx

        signature = rx.Signature("(A^r B)^2 A^r B")
        str(signature)  # '(A^r B)^3'
        signature.bind(r=2).counts  # {'A': 6, 'B': 3}
        rx.Signature("A (B A)^r") == rx.Signature("(A B)^r A")  # True
        ```
    """

    tree: Node
    """What was written, and what the operators run: a tree of `Block`, `Power` and
    `Sequence`. Only parentheses without an exponent and exponents of 1 are gone."""

    def __init__(self, text: "str | Signature"):
        """**Arguments:**

        - `text`: the signature as text. (A signature is taken as it is.)

        **Raises:**

        `ValueError` if the text is malformed or too large; it points at the place.
        """
        if not isinstance(text, str | Signature):
            raise TypeError(
                f"a signature is written as a str, such as 'A^3 B'; got an object of type {type(text).__name__}"
            )
        tree = text.tree if isinstance(text, Signature) else _parse(text)
        object.__setattr__(self, "tree", tree)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks, in the order of their first visits."""
        names = (node.name for node in _walk(self.tree) if isinstance(node, Block))
        return tuple(dict.fromkeys(names))

    @cached_property
    def exponents(self) -> tuple[str, ...]:
        """The names among the exponents, in the order in which they are written."""
        powers = (node for node in _walk(self.tree) if isinstance(node, Power))
        names = (node.exponent for node in powers if isinstance(node.exponent, str))
        return tuple(dict.fromkeys(names))

    @property
    def degree(self) -> int:
        """How deeply exponents nest in the normal form: `A B` has degree 0, `A^3 B` 1,
        and `(A^2 B)^2` 2."""
        return _degree(self._normal)

    @property
    def counts(self) -> dict[str, int]:
        """How often each block is visited. Exact, however large. A `ValueError` if a
        named exponent is not bound."""
        self._check_bound("counts")
        return dict(_count(self.tree))

    @property
    def visits(self) -> tuple[str, ...]:
        """The name of the block at each visit. A `ValueError` if a named exponent is
        not bound, or if there are more than a million visits."""
        self._check_bound("visits")
        number = sum(self.counts.values())
        if number > MAX_VISITS:
            raise ValueError(
                f"signature {_shorten(str(self))!r} makes {_show(number)} visits, of "
                f"which .visits spells out at most {MAX_VISITS}; see .counts"
            )
        return _spell(self.tree)

    def bind(self, **values: int) -> "Signature":
        """Puts integers in the place of names.

        !!! example

            ```python
            import rinsx as rx

            rx.Signature("(A^r B)^s").bind(r=3)  # Signature('(A^3 B)^s')
            ```

        **Arguments:**

        - `values`: integers of at least 1, for all the names or for some.

        **Returns:**

        A new signature.

        **Raises:**

        `ValueError` for a name that is not there or an integer out of range, and
        `TypeError` for what is not an integer.
        """
        names = f"signature {_shorten(str(self))!r} has " + (
            f"the named exponents {', '.join(self.exponents)}" if self.exponents else "no named exponents"
        )
        for name, value in values.items():
            given = f"{name}={_show(value)}"
            if name not in self.exponents:
                raise ValueError(f"{given} binds nothing: {names}")
            if isinstance(value, bool) or not isinstance(value, int):
                kind = type(value).__name__
                raise TypeError(f"{given} is not an int but a {kind}; {names}")
            if not 1 <= value < _END:
                raise ValueError(
                    f"{given} is out of range: an exponent is at least 1 and has "
                    f"at most {MAX_EXPONENT_DIGITS} digits; {names}"
                )
        return Signature(_render(_replace(self.tree, values)))

    def __str__(self) -> str:
        """The normal form: the same visits, written by fixed rules.

        From the inside out, until none applies: `(X^2)^3` becomes `X^6`; `X^2 X^3` and
        `X X` become powers of X; repeats of several parts, `X Y X Y` or `(X Y)^2 X Y`,
        become powers too, those of the fewest parts first, then the leftmost. Names
        stay where they are. What is past a cap is left as it is.
        """
        return self._text

    def __repr__(self) -> str:
        return f"Signature({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Signature):
            return NotImplemented
        return self.tree == other.tree or self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    @cached_property
    def _normal(self) -> Node:
        return _normal_form(self.tree)

    @cached_property
    def _text(self) -> str:
        return _render(self._normal)

    @cached_property
    def _fingerprint(self) -> tuple[int, int]:
        return _fingerprint(self.tree)

    def _check_bound(self, what: str) -> None:
        if names := self.exponents:
            values = ", ".join(f"{name}=..." for name in names)
            raise ValueError(
                f".{what} needs a number for each exponent; bind {', '.join(names)} "
                f"first: Signature({_shorten(str(self))!r}).bind({values})"
            )


#
# Reading and writing
#


_TOKEN = re.compile(
    r"(?P<block>[A-Z](?P<digits>[0-9]*))"
    rf"|(?P<power>\^\s*(?:(?P<number>-?[0-9]+)|(?P<name>[a-z]))|(?P<raised>[{_RAISED}]+))"
    r"|(?P<open>\()|(?P<close>\))|\s+"
)
_HAT = re.compile(r"\^\s*")


def _parse(text: str) -> Node:
    if len(text) > MAX_CHARACTERS:
        why = f"at most {MAX_CHARACTERS} characters are allowed, got {len(text)}"
        raise _malformed(why, text, MAX_CHARACTERS)
    groups: list[list[Node]] = [[]]  # the parts so far of each group that is open
    opened: list[int] = []  # where these groups begin, but for the outermost
    begin, raised = 0, False  # where the last term begins; whether it has an exponent
    terms = at = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise _unreadable(text, at)
        parts = groups[-1]
        if token["block"] or token["open"]:
            terms += 1
            if terms > MAX_TERMS:
                why = f"at most {MAX_TERMS} blocks and groups are allowed"
                raise _malformed(why, text, at)
        if token["block"]:
            if len(token["digits"]) > MAX_BLOCK_DIGITS:
                why = f"the name of a block has at most {MAX_BLOCK_DIGITS} digits"
                raise _malformed(why, text, at)
            parts.append(Block(token["block"]))
            begin, raised = at, False
        elif token["open"]:
            if len(opened) == MAX_NESTING:
                why = f"parentheses nest at most {MAX_NESTING} deep"
                raise _malformed(why, text, at)
            groups.append([])
            opened.append(at)
        elif token["close"]:
            if not opened:
                raise _malformed("no group is open here", text, at)
            begin, raised = opened.pop(), False
            if not groups.pop():
                raise _malformed("this group is empty", text, begin)
            groups[-1].append(_sequence(parts))
        elif token["power"]:
            exponent = _exponent(token)
            if not parts:
                raise _malformed("an exponent follows a block or a group", text, at)
            if raised:
                term = _shorten(" ".join(text[begin:at].split()))
                why = f"a second exponent; write ({term})^{exponent}"
                raise _malformed(why, text, at)
            if exponent != 1:
                parts[-1] = Power(parts[-1], exponent)
            raised = True
        at = token.end()
    if opened:
        raise _malformed("this group is never closed", text, opened[-1])
    if not groups[0]:
        why = "there is no block in it; write one such as A^3 B"
        raise _malformed(why, text, len(text))
    return _sequence(groups[0])


def _exponent(token: re.Match[str]) -> int | str:
    if token["name"]:
        return token["name"]
    which = "number" if token["number"] else "raised"
    digits = token[which].translate(str.maketrans(_RAISED, "0123456789"))
    number = len(digits.lstrip("-"))
    if number > MAX_EXPONENT_DIGITS:
        why = f"an exponent has at most {MAX_EXPONENT_DIGITS} digits, got {number}"
        raise _malformed(why, token.string, token.start(which))
    if int(digits) < 1:
        why = f"exponent must be at least 1, got {int(digits)}"
        raise _malformed(why, token.string, token.start(which))
    return int(digits)


def _sequence(parts: list[Node]) -> Node:
    """The parts in order, with those that are sequences spliced in."""
    flat: list[Node] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Sequence) else (part,))
    return flat[0] if len(flat) == 1 else Sequence(tuple(flat))


def _render(node: Node) -> str:
    match node:
        case Block(name):
            return name
        case Power(Block(name), exponent):
            return f"{name}^{exponent}"
        case Power(body, exponent):
            return f"({_render(body)})^{exponent}"
        case Sequence(parts):
            return " ".join(map(_render, parts))


def _unreadable(text: str, at: int) -> ValueError:
    """The error for a place where no token begins."""
    if hat := _HAT.match(text, at):
        at = hat.end()
        got = repr(text[at]) if at < len(text) else "nothing"
        why = f"^ takes a positive integer or a small letter, got {got}"
    elif text[at] in "0123456789":
        why = "a digit belongs to a block, as in A1, or to an exponent, as in A^2"
    elif "a" <= text[at] <= "z":
        why = f"a small letter is an exponent, write ^{text[at]}"
    else:
        why = f"unexpected character {text[at]!r}"
    return _malformed(why, text, at)


def _malformed(why: str, text: str, at: int) -> ValueError:
    """An error that quotes the text around a place and points at it."""
    low, high = max(0, at - 40), at + 30
    clean = lambda c: c if c.isprintable() else " " if c.isspace() else "\ufffd"
    before = ("..." if low else "") + "".join(map(clean, text[low:at]))
    after = "".join(map(clean, text[at:high])) + ("..." if high < len(text) else "")
    pointer = " " * len(before) + "^"
    return ValueError(f"malformed signature: {why}\n    {before}{after}\n    {pointer}")


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _show(value: object) -> str:
    # Python refuses to print integers of many thousand digits.
    if isinstance(value, int) and value.bit_length() > 190:
        return f"<an integer of {value.bit_length()} bits>"
    return _shorten(repr(value))


#
# What a signature denotes
#


def _walk(node: Node) -> Iterator[Node]:
    """All nodes, in the order in which blocks and exponents are written."""
    match node:
        case Power(body, _):
            yield from _walk(body)
        case Sequence(parts):
            for part in parts:
                yield from _walk(part)
    yield node


def _replace(node: Node, values: dict[str, int]) -> Node:
    match node:
        case Power(body, exponent):
            if isinstance(exponent, str):
                exponent = values.get(exponent, exponent)
            return Power(_replace(body, values), exponent)
        case Sequence(parts):
            return Sequence(tuple(_replace(part, values) for part in parts))
    return node


def _count(node: Node) -> Counter[str]:
    match node:
        case Block(name):
            return Counter({name: 1})
        case Power(body, int(exponent)):
            return Counter({k: n * exponent for k, n in _count(body).items()})
        case Sequence(parts):
            return sum(map(_count, parts), Counter())
    raise AssertionError


def _spell(node: Node) -> tuple[str, ...]:
    match node:
        case Block(name):
            return (name,)
        case Power(body, int(exponent)):
            return _spell(body) * exponent
        case Sequence(parts):
            return tuple(name for part in parts for name in _spell(part))
    raise AssertionError


#
# The normal form
#


def _normal_form(node: Node) -> Node:
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
                if inner * exponent < _END:
                    return Power(base, inner * exponent)
            return Power(body, exponent)
        case Sequence(parts):
            return _sequence(_fold([_simplify(part, room) for part in parts], room))
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
            if total + number >= _END:
                break
            copies, total, stop = copies + 1, total + number, stop + width
        power = Power(body, total)
        if copies > 1 and _height(power) <= room:
            return power, stop
    return None


def _split(node: Node) -> tuple[Node, int]:
    """What is repeated, and how often."""
    if isinstance(node, Power) and isinstance(node.exponent, int):
        return node.body, node.exponent
    return node, 1


def _is_group(node: Node, size: int) -> bool:
    return isinstance(node, Sequence) and len(node.parts) == size


def _height(node: Node) -> int:
    """How deeply parentheses nest."""
    match node:
        case Power(Sequence() | Power() as body, _):
            return 1 + _height(body)
        case Sequence(parts):
            return max(map(_height, parts))
    return 0


def _degree(node: Node) -> int:
    match node:
        case Power(body, _):
            return 1 + _degree(body)
        case Sequence(parts):
            return max(map(_degree, parts))
    return 0


#
# Equality
#


# A visit is an affine map x -> a x + b modulo a prime, with one a for all blocks and
# one b for each; maps compose by fast powering. Several visits then make (a^length, the
# sum of a^position b): unlike visits, unlike polynomials in a and the b, of a degree at
# most one above the larger length. A polynomial vanishes at no more than degree /
# modulus of all points (Schwartz and Zippel), and hash values stand for random ones.
# Integers never wrap around: 256 terms, each in 16 groups, with exponents of 18 digits
# on all of these, make less than 256 * 10^(18 * 17) < 2^1025 visits, so the probability
# is below 2^-254. Names are numbers, drawn likewise. Those of nested names multiply and
# can wrap around: by chance that hurts no more than any other hash does, but collisions
# can be built.
_MODULUS = 2**1279 - 1  # a prime of Mersenne


def _point(what: str, bits: int) -> int:
    digest = hashlib.shake_256(f"rinsx signature: {what}".encode()).digest(bits // 8)
    return int.from_bytes(digest, "big")


# 65 bits more than the modulus, so that remainders are as good as uniform.
_letter = lambda what: _point(what, 1344) % _MODULUS
_BASE = _letter("base")


def _fingerprint(node: Node) -> tuple[int, int]:
    match node:
        case Block(name):
            return _BASE, _letter(f"block {name}")
        case Power(body, exponent):
            if isinstance(exponent, str):
                # Above every integer that can be written, and 160 bits to choose from.
                exponent = 2**160 + _point(f"exponent {exponent}", 160)
            return _power(_fingerprint(body), exponent)
        case Sequence(parts):
            return reduce(_compose, map(_fingerprint, parts))


def _compose(f: tuple[int, int], g: tuple[int, int]) -> tuple[int, int]:
    return _reduce(f[0] * g[0]), _reduce(f[0] * g[1] + f[1])


def _reduce(x: int) -> int:
    # The remainder of a product without a division: modulo itself, 2^1279 is 1.
    x = (x & _MODULUS) + (x >> 1279)
    return x - _MODULUS if x >= _MODULUS else x


def _power(f: tuple[int, int], exponent: int) -> tuple[int, int]:
    power = (1, 0)
    while exponent:
        if exponent & 1:
            power = _compose(power, f)
        f = _compose(f, f)
        exponent >>= 1
    return power
