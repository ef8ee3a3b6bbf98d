"""Finds a width, a depth, or any other integer, from what it should cost."""

import dataclasses
from collections.abc import Callable
from typing import final

from ._cost import Amount, Cost, exact, text, total


@final
@dataclasses.dataclass(frozen=True)
class Solution:
    """What [`rinsx.flops.solve`][] returns.

    **Attributes:**

    - `value`: the integer found.
    - `measured`: what `measure` gives for it.
    - `residual`: `measured` less the target.
    """

    value: int
    measured: Amount
    residual: Amount


def solve(
    measure: Callable[[int], Cost | Amount],
    target: Cost | Amount,
    *,
    low: int,
    high: int,
    multiple_of: int = 1,
) -> Solution:
    """Finds the integer whose measure is nearest to a target, by bisection. Of two that
    are equally near, it takes the one with the smaller measure.

    This is how to size a control of equal parameters or equal cost.

    !!! example

        ```python
        import rinsx as rx

        size = lambda width: 12 * width**2
        width = rx.flops.solve(size, 10**6, low=64, high=1024, multiple_of=8)
        width.value  # 288
        width.residual  # -4672
        ```

    **Arguments:**

    - `measure`: a non-decreasing function of an integer, such as a count of FLOPs or
        parameters. It is evaluated about `log2(high - low)` times. With
        `eqx.filter_eval_shape` it can build models of any size.
    - `target`: the measure to come near to.
    - `low`, `high`: the smallest and the largest value to consider.
    - `multiple_of`: consider multiples of this only.

    **Returns:**

    A [`rinsx.flops.Solution`][]. If the target is out of reach, a `ValueError` says
    what the ends give; if `measure` is found to decrease, where.
    """
    if multiple_of < 1:
        raise ValueError(f"`multiple_of` must be at least 1; got {multiple_of}.")
    below, above = -(-low // multiple_of), high // multiple_of
    if below > above:
        raise ValueError(f"There is no multiple of {multiple_of} in [{low}, {high}].")
    goal = total(target)
    seen: dict[int, Amount] = {}

    def at(index: int) -> Amount:
        if index not in seen:
            seen[index] = total(measure(index * multiple_of))
            known = sorted(seen)
            for i, j in zip(known, known[1:]):
                if seen[i] > seen[j]:
                    raise ValueError(
                        "`measure` must not decrease; got "
                        f"{text(seen[i])} at {i * multiple_of} and "
                        f"{text(seen[j])} at {j * multiple_of}."
                    )
        return seen[index]

    if not at(below) <= goal <= at(above):
        raise ValueError(
            f"The target {text(goal)} is out of reach: `measure` gives "
            f"{text(at(below))} at {below * multiple_of} and "
            f"{text(at(above))} at {above * multiple_of}."
        )
    # The measure is below the target at `below`, and not at `above`.
    if at(below) == goal:
        above = below
    while above - below > 1:
        middle = (below + above) // 2
        if at(middle) < goal:
            below = middle
        else:
            above = middle
    nearer = below if goal - at(below) <= at(above) - goal else above
    return Solution(nearer * multiple_of, at(nearer), exact(at(nearer) - goal))
