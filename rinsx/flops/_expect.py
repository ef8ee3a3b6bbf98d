"""Costs that depend on random depths: what to expect, and what was spent."""

import itertools as it
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from ._cost import Amount, Cost


def expected(cost: Callable[..., Cost | Amount], /, **laws: Any) -> Cost | Fraction:
    """The expectation of a cost whose arguments are drawn independently.

    !!! example

        ```python
        import rinsx as rx

        cost = lambda r: 100 * r + 7
        rx.flops.expected(cost, r=rx.depth.Binomial(3, skip="4/5"))  # 147
        ```

    **Arguments:**

    - `cost`: called with one value of each law, by keyword. It returns a
        [`rinsx.flops.Cost`][] or an exact number.
    - `**laws`: the law of each argument: any law of `rinsx.depth`, any other object
        whose `.pmf()` is a mapping from integers to their exact probabilities, or such
        a mapping itself. Probabilities are `Fraction`s, integers or texts such as
        `"1/3"`, and sum to one.

    **Returns:**

    The sum of probability times cost over all values, without rounding: a
    [`rinsx.flops.Cost`][] if `cost` returns those, and a `Fraction` otherwise.
    """
    tables = [_table(name, law) for name, law in laws.items()]
    parts = []
    for outcome in it.product(*(table.items() for table in tables)):
        probability = Fraction(1)
        for _, p in outcome:
            probability *= p
        value = cost(**{name: n for name, (n, _) in zip(laws, outcome)})
        parts.append(probability * value)
    return sum(parts[1:], parts[0])


def spent(cost: Callable[..., Cost | Amount], /, **draws: Any) -> Cost | Amount:
    """The cost of a run, given what was drawn at each of its steps.

    !!! example

        ```python
        import rinsx as rx

        cost = lambda r: 100 * r + 7
        rx.flops.spent(cost, r=[1, 3, 1])  # 521
        ```

    **Arguments:**

    - `cost`: the cost of a step, called with what was drawn, by keyword. It is called
        once for each distinct draw. It returns a [`rinsx.flops.Cost`][] or an exact
        number.
    - `**draws`: for each argument, the integers drawn, one a step: sequences or arrays
        of equal length.

    **Returns:**

    The sum over all steps, without rounding. It is `0` for a run of no steps.
    """
    columns = {name: np.asarray(column) for name, column in draws.items()}
    for name, column in columns.items():
        if column.ndim != 1 or (column.size > 0 and column.dtype.kind not in "iu"):
            raise ValueError(
                f"`{name}` must be a sequence of integers, one a step; got shape {column.shape} of {column.dtype}."
            )
    if len({column.size for column in columns.values()}) != 1:
        sizes = {name: column.size for name, column in columns.items()}
        raise ValueError(f"Draws must be as many for each argument; got {sizes}.")
    steps = Counter(zip(*(column.tolist() for column in columns.values())))
    return sum(n * cost(**dict(zip(columns, draw))) for draw, n in steps.items())


def _table(name: str, law: Any) -> dict[int, Fraction]:
    table = law if isinstance(law, Mapping) else law.pmf()
    for value, p in table.items():
        if isinstance(p, float):
            raise TypeError(f"The probabilities of `{name}` must be exact, such as '1/3'; got {p!r} for {value}.")
    table = {value: Fraction(p) for value, p in table.items()}
    if min(table.values(), default=Fraction(0)) < 0 or sum(table.values()) != 1:
        listed = ", ".join(f"{value}: {p}" for value, p in table.items())
        raise ValueError(f"The probabilities of `{name}` must not be negative and must sum to one; got {{{listed}}}.")
    return {value: p for value, p in table.items() if p != 0}
