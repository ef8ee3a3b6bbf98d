"""Plans at matched compute: how many steps each candidate runs at one budget."""

import dataclasses
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import final

from ._cost import Amount, Cost, exact, tabulate, text, total


@final
@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One candidate of a [`rinsx.flops.Plan`][].

    **Attributes:**

    - `name`: its name.
    - `cost_per_step`: the FLOPs of one training step.
    - `steps`: how many steps it runs.
    - `tokens`: how many tokens that is, if the plan was told.
    - `total`: `steps * cost_per_step`.
    - `residual`: `total` less the budget, at most half of `cost_per_step` either way.
    - `relative`: `residual` as a fraction of the budget.
    """

    name: str
    cost_per_step: Amount
    steps: int
    tokens: int | None
    total: Amount
    residual: Amount
    relative: Fraction


@final
@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, PlanRow]):
    """How many steps each candidate runs at one budget: a mapping from the name of each
    candidate to its [`rinsx.flops.PlanRow`][]. Printed, it is a table.

    **Attributes:**

    - `budget`: the number of FLOPs that each candidate is to spend.
    - `rows`: a [`rinsx.flops.PlanRow`][] for each candidate, in the order given.
    """

    budget: Amount
    rows: tuple[PlanRow, ...]

    def __getitem__(self, name: str) -> PlanRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (row.name for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        header = [
            "",
            "FLOPs a step",
            "steps",
            "tokens",
            "FLOPs",
            "residual",
            "relative",
        ]
        rows = [
            [
                row.name,
                text(row.cost_per_step),
                text(row.steps),
                "" if row.tokens is None else text(row.tokens),
                text(row.total),
                text(row.residual),
                f"{float(row.relative):+.2e}",
            ]
            for row in self.rows
        ]
        if all(row.tokens is None for row in self.rows):
            header, *rows = ([*row[:3], *row[4:]] for row in [header, *rows])
        return f"budget: {text(self.budget)} FLOPs\n\n{tabulate(header, rows)}"


def match(
    candidates: Mapping[str, Cost | Amount],
    *,
    budget: Cost | Amount | float | None = None,
    reference: str | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    tokens_per_step: int | Mapping[str, int] | None = None,
) -> Plan:
    """Plans a comparison at matched compute: each candidate runs the number of steps
    that comes nearest to one budget.

    So every total is within half a step of the budget, and any two totals are within
    one step of each other (of the candidate whose steps cost more).

    !!! example

        ```python
        import rinsx as rx

        costs = {"plain": 300, "rins": 420}
        plan = rx.flops.match(costs, reference="plain", steps=1000)
        plan["rins"].steps  # 714
        plan["rins"].residual  # -120
        ```

    **Arguments:**

    - `candidates`: the cost of one training step of each candidate.
    - `budget`: the number of FLOPs, a float only if it is whole. Or else:
    - `reference`: the candidate that sets the budget, with
    - `steps`: how many steps it runs, or
    - `tokens`: how many tokens it sees.
    - `tokens_per_step`: how many tokens one step sees: a number, or one for each
        candidate. Required with `tokens`; otherwise it only fills in the plan.

    **Returns:**

    A [`rinsx.flops.Plan`][]. A `ValueError` names each candidate that cannot be
    matched, and says why.
    """
    costs = {name: total(cost) for name, cost in candidates.items()}
    per_step = dict(tokens_per_step if isinstance(tokens_per_step, Mapping) else dict.fromkeys(costs, tokens_per_step))
    wrong = {name: f"costs {text(n)} FLOPs a step" for name, n in costs.items() if n <= 0}
    for name in costs:
        if name not in per_step:
            wrong.setdefault(name, "is missing from `tokens_per_step`")
        elif (n := per_step[name]) is not None and n < 1:
            wrong.setdefault(name, f"sees {n} tokens a step")
    for name in per_step.keys() - costs.keys():
        wrong[name] = "is in `tokens_per_step` and is no candidate"
    _refuse(wrong)
    if reference is None:
        if budget is None or steps is not None or tokens is not None:
            raise ValueError("Give either `budget`, or a `reference` with `steps` or `tokens`.")
        if isinstance(budget, float) and not budget.is_integer():
            raise ValueError(f"A budget of floating point must be a whole number; got {budget}.")
        flops = exact(Fraction(budget.total if isinstance(budget, Cost) else budget))
    else:
        if budget is not None or (steps is None) == (tokens is None):
            raise ValueError("With a `reference`, give `steps` or `tokens`, one of them, and no `budget`.")
        if reference not in costs:
            raise ValueError(f"`reference` must be one of {', '.join(costs)}; got {reference!r}.")
        if steps is None:
            steps = _steps(reference, tokens, per_step[reference])
        flops = exact(costs[reference] * steps)
    if flops <= 0:
        raise ValueError(f"The budget must be positive; got {text(flops)} FLOPs.")
    _refuse(
        {
            name: f"costs {text(n)} FLOPs a step, more than the budget of {text(flops)}"
            for name, n in costs.items()
            if n > flops
        }
    )
    rows = []
    for name, n in costs.items():
        count, seen = round(Fraction(flops) / n), per_step[name]
        residual = exact(count * n - flops)
        rows.append(
            PlanRow(
                name=name,
                cost_per_step=n,
                steps=count,
                tokens=None if seen is None else count * seen,
                total=exact(count * n),
                residual=residual,
                relative=Fraction(residual) / flops,
            )
        )
    return Plan(flops, tuple(rows))


def _steps(reference: str, tokens: int | None, per_step: int | None) -> int:
    if per_step is None:
        raise ValueError("`tokens` requires `tokens_per_step`.")
    if tokens is None or tokens % per_step != 0:
        raise ValueError(
            f"`tokens` must be a whole number of steps of `{reference}`, of {per_step} tokens each; got {tokens}."
        )
    return tokens // per_step


def _refuse(reasons: Mapping[str, str]) -> None:
    if len(reasons) > 0:
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"These candidates cannot be matched:\n  {listed}")
