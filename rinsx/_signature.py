"""The text that names a recursion: read, counted, simplified, compared by meaning."""

from dataclasses import dataclass
from functools import cached_property

from ._fingerprint import fingerprint
from ._normal import degree, normal_form
from ._parse import parse, shorten, show
from ._tree import Block, count, END, MAX_EXPONENT_DIGITS, Node, Power, render, replace, spell, walk


MAX_VISITS = 1_000_000
"""The most visits that `Signature.visits` spells out."""


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
        tree = text.tree if isinstance(text, Signature) else parse(text)
        object.__setattr__(self, "tree", tree)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks, in the order of their first visits."""
        names = (node.name for node in walk(self.tree) if isinstance(node, Block))
        return tuple(dict.fromkeys(names))

    @cached_property
    def exponents(self) -> tuple[str, ...]:
        """The names among the exponents, in the order in which they are written."""
        powers = (node for node in walk(self.tree) if isinstance(node, Power))
        names = (node.exponent for node in powers if isinstance(node.exponent, str))
        return tuple(dict.fromkeys(names))

    @property
    def degree(self) -> int:
        """How deeply exponents nest in the normal form: `A B` has degree 0, `A^3 B` 1,
        and `(A^2 B)^2` 2."""
        return degree(self._normal)

    @property
    def counts(self) -> dict[str, int]:
        """How often each block is visited. Exact, however large. A `ValueError` if a
        named exponent is not bound."""
        self._check_bound("counts")
        return dict(count(self.tree))

    @property
    def visits(self) -> tuple[str, ...]:
        """The name of the block at each visit. A `ValueError` if a named exponent is
        not bound, or if there are more than a million visits."""
        self._check_bound("visits")
        number = sum(self.counts.values())
        if number > MAX_VISITS:
            raise ValueError(
                f"signature {shorten(str(self))!r} makes {show(number)} visits, of "
                f"which .visits spells out at most {MAX_VISITS}; see .counts"
            )
        return spell(self.tree)

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
        names = f"signature {shorten(str(self))!r} has " + (
            f"the named exponents {', '.join(self.exponents)}" if self.exponents else "no named exponents"
        )
        for name, value in values.items():
            given = f"{name}={show(value)}"
            if name not in self.exponents:
                raise ValueError(f"{given} binds nothing: {names}")
            if isinstance(value, bool) or not isinstance(value, int):
                kind = type(value).__name__
                raise TypeError(f"{given} is not an int but a {kind}; {names}")
            if not 1 <= value < END:
                raise ValueError(
                    f"{given} is out of range: an exponent is at least 1 and has "
                    f"at most {MAX_EXPONENT_DIGITS} digits; {names}"
                )
        return Signature(render(replace(self.tree, values)))

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
        return normal_form(self.tree)

    @cached_property
    def _text(self) -> str:
        return render(self._normal)

    @cached_property
    def _fingerprint(self) -> tuple[int, int]:
        return fingerprint(self.tree)

    def _check_bound(self, what: str) -> None:
        if names := self.exponents:
            values = ", ".join(f"{name}=..." for name in names)
            raise ValueError(
                f".{what} needs a number for each exponent; bind {', '.join(names)} "
                f"first: Signature({shorten(str(self))!r}).bind({values})"
            )
