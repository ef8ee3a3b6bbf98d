"""The result of counting: a table of exact amounts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import final


Amount = int | Fraction
# Scope, phase, primitive, kind.
Key = tuple[str, str, str, str]

PHASES = ("forward", "backward", "remat")
# A table with more scopes than fit on a screen shows the largest.
_ROWS = 24


def exact(amount: Amount) -> Amount:
    """The same number, as an `int` where it is one."""
    whole = Fraction(amount)
    return whole.numerator if whole.denominator == 1 else whole


def total(cost: "Cost | Amount") -> Amount:
    return cost.total if isinstance(cost, Cost) else exact(cost)


def text(amount: Amount) -> str:
    amount = exact(amount)
    return f"{amount:,}" if isinstance(amount, int) else f"{float(amount):,.2f}"


def tabulate(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = []
    for first, *rest in [header, ["-" * w for w in widths], *rows]:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(rest, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@final
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Cost:
    """An exact number of FLOPs, and where they are spent.

    Costs add (`a + b`, `sum(costs)`) and scale by exact numbers (`3 * a`,
    `Fraction(1, 2) * a`). They are equal when every entry of their tables is. Printed,
    a cost is a table of scopes and phases.

    **Attributes:**

    - `rows`: the sorted entries of the table, `((scope, phase, primitive, kind),
        amount)`, none of them zero. `scope` is a path of `jax.named_scope`s. `phase` is
        `"forward"`, `"backward"` or `"remat"` (forward work done again during the
        backward pass). `kind` is `"matmul"` (contractions: matrix products and
        convolutions) or `"elementwise"` (everything else). `amount` is an `int`, or a
        `Fraction` where probabilities have entered.
    """

    rows: tuple[tuple[Key, Amount], ...]

    def __init__(self, table: Mapping[Key, Amount] | None = None):
        """**Arguments:**

        - `table`: a mapping from `(scope, phase, primitive, kind)` to an exact number.
        """
        items = sorted(({} if table is None else table).items())
        rows = tuple((key, exact(amount)) for key, amount in items if amount != 0)
        object.__setattr__(self, "rows", rows)

    @property
    def total(self) -> Amount:
        """All FLOPs."""
        return exact(sum(amount for _, amount in self.rows))

    @property
    def matmul(self) -> Amount:
        """The FLOPs of contractions: matrix products and convolutions."""
        return _group(self, lambda key: key[3]).get("matmul", 0)

    @property
    def elementwise(self) -> Amount:
        """The FLOPs of everything that is not a contraction."""
        return _group(self, lambda key: key[3]).get("elementwise", 0)

    def by_scope(self, depth: int | None = None) -> dict[str, Amount]:
        """FLOPs by the path of `jax.named_scope`s that they stand in. They add up to
        `.total`.

        **Arguments:**

        - `depth`: how many components of each path to keep. By default, all.

        **Returns:**

        A dict. What stands in no scope has the key `""`.
        """
        return _group(self, lambda key: "/".join(key[0].split("/")[:depth]))

    def by_phase(self) -> dict[str, Amount]:
        """FLOPs by phase: `"forward"`, `"backward"` and `"remat"`. They add up to
        `.total`."""
        return dict.fromkeys(PHASES, 0) | _group(self, lambda key: key[1])

    def by_primitive(self) -> dict[str, Amount]:
        """FLOPs by JAX primitive, the largest first. They add up to `.total`."""
        amounts = _group(self, lambda key: key[2])
        return dict(sorted(amounts.items(), key=lambda item: -item[1]))

    def __add__(self, other: "Cost | int") -> "Cost":
        if isinstance(other, int) and other == 0:
            return self
        if not isinstance(other, Cost):
            return NotImplemented
        table = dict(self.rows)
        for key, amount in other.rows:
            table[key] = table.get(key, 0) + amount
        return Cost(table)

    __radd__ = __add__

    def __mul__(self, factor: Amount) -> "Cost":
        if not isinstance(factor, (int, Fraction)):
            return NotImplemented
        return Cost({key: amount * factor for key, amount in self.rows})

    __rmul__ = __mul__

    def __repr__(self) -> str:
        amounts = f"matmul={self.matmul}, elementwise={self.elementwise}"
        return f"Cost(total={self.total}, {amounts})"

    def __str__(self) -> str:
        phases = [phase for phase, amount in self.by_phase().items() if amount != 0]
        by_scope = self.by_scope()
        shown = sorted(by_scope)
        if len(shown) > _ROWS:
            shown = sorted(sorted(by_scope, key=lambda s: -by_scope[s])[: _ROWS - 1])
        cells = _group(self, lambda key: (key[0], key[1]))
        rows = [
            [scope or "(no scope)"] + [text(cells.get((scope, phase), 0)) for phase in phases] + [text(by_scope[scope])]
            for scope in shown
        ]
        if len(shown) < len(by_scope):
            rest = [key for key in cells if key[0] not in shown]
            per_phase = [sum(cells[k] for k in rest if k[1] == p) for p in phases]
            name = f"({len(by_scope) - len(shown)} smaller)"
            rows.append([name, *map(text, per_phase), text(sum(per_phase))])
        by_phase = self.by_phase()
        totals = [text(by_phase[phase]) for phase in phases] + [text(self.total)]
        rows.append(["total", *totals])
        kinds = _group(self, lambda key: (key[2], key[3]))
        top = sorted(kinds.items(), key=lambda item: -item[1])[:8]
        share = lambda amount: f"{float(100 * Fraction(amount) / (self.total or 1)):.2f}%"
        primitives = [[p, kind, text(n), share(n)] for (p, kind), n in top]
        tables = [tabulate(["scope", *phases, "FLOPs"], rows)]
        if primitives:
            tables.append(tabulate(["primitive", "kind", "FLOPs", "share"], primitives))
        return "\n\n".join(tables)


def _group(cost: Cost, by: Callable[[Key], object]) -> dict:
    amounts = {}
    for key, amount in cost.rows:
        amounts[by(key)] = amounts.get(by(key), 0) + amount
    return {key: exact(amount) for key, amount in amounts.items()}
