"""The tree of a signature, and what it denotes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


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

END = 10**MAX_EXPONENT_DIGITS  # exponents stay below


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


def sequence(parts: list[Node]) -> Node:
    """The parts in order, with those that are sequences spliced in."""
    flat: list[Node] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Sequence) else (part,))
    return flat[0] if len(flat) == 1 else Sequence(tuple(flat))


def render(node: Node) -> str:
    match node:
        case Block(name):
            return name
        case Power(Block(name), exponent):
            return f"{name}^{exponent}"
        case Power(body, exponent):
            return f"({render(body)})^{exponent}"
        case Sequence(parts):
            return " ".join(map(render, parts))


def walk(node: Node) -> Iterator[Node]:
    """All nodes, in the order in which blocks and exponents are written."""
    match node:
        case Power(body, _):
            yield from walk(body)
        case Sequence(parts):
            for part in parts:
                yield from walk(part)
    yield node


def replace(node: Node, values: dict[str, int]) -> Node:
    match node:
        case Power(body, exponent):
            if isinstance(exponent, str):
                exponent = values.get(exponent, exponent)
            return Power(replace(body, values), exponent)
        case Sequence(parts):
            return Sequence(tuple(replace(part, values) for part in parts))
    return node


def count(node: Node) -> Counter[str]:
    match node:
        case Block(name):
            return Counter({name: 1})
        case Power(body, int(exponent)):
            return Counter({k: n * exponent for k, n in count(body).items()})
        case Sequence(parts):
            return sum(map(count, parts), Counter())
    raise AssertionError


def spell(node: Node) -> tuple[str, ...]:
    match node:
        case Block(name):
            return (name,)
        case Power(body, int(exponent)):
            return spell(body) * exponent
        case Sequence(parts):
            return tuple(name for part in parts for name in spell(part))
    raise AssertionError
