"""What a comparison over seeds can say: paired differences, their intervals, and the smallest that could be seen."""

import dataclasses
import math

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Difference:
    """The loss of one arm less that of the baseline.

    **Attributes:**

    - `mean`: over seeds.
    - `half`: of the 95% interval over seeds; `nan` with a single seed.
    - `windows`: the standard error over what was evaluated on of the difference that is averaged over seeds. It says how well the
        text that was evaluated on stands for more of its kind, and is no part of the interval. `nan` with a single document.
    """

    mean: float
    half: float
    windows: float

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `not decided` where the interval holds zero."""
        if not abs(self.mean) > self.half:
            return "not decided"
        return "better" if self.mean < 0 else "worse"

    def show(self, form: str, sign: int = 1) -> str:
        """The mean, times `sign`, and the half width where it is known, both in the format `form`."""
        half = "" if math.isnan(self.half) else f" ± {self.half:{form}}"
        return f"{sign * self.mean:+{form}}{half}"


def residual(losses: np.ndarray) -> tuple[float, int]:
    """The standard deviation of what neither arm nor seed explains, pooled over arms, and its degrees of freedom.

    `losses` has the shape `[arms, seeds]`. The layout is the two-way one without interaction, so that what a seed does to all arms
    alike (its initial weights, its order of the data) cancels.
    """
    arms, seeds = losses.shape
    freedom = (arms - 1) * (seeds - 1)
    if freedom == 0:
        return math.nan, 0
    rest = losses - losses.mean(0, keepdims=True) - losses.mean(1, keepdims=True) + losses.mean()
    return math.sqrt(float(np.sum(rest**2)) / freedom), freedom


def smallest_visible(losses: np.ndarray) -> float:
    """The half width of the 95% interval of a difference of two arms: what is smaller is not decided."""
    deviation, freedom = residual(losses)
    if freedom == 0:
        return math.nan
    return float(stats.t.ppf(0.975, freedom)) * deviation * math.sqrt(2 / losses.shape[1])


def said(losses: np.ndarray, form: str, unit: str) -> list[str]:
    """In two lines, what differences over seeds can say; in one where they can say nothing."""
    deviation, freedom = residual(losses)
    if freedom == 0:
        arms, seeds = losses.shape
        return [f"{arms} arms, {seeds} seeds: no deviation is known, so nothing is decided; two of each are needed."]
    return [
        "Differences are paired over seeds; ± is the half width of a 95% interval for one difference "
        f"(t, {freedom} degrees of freedom), with the deviation pooled over arms: {deviation:{form}} {unit}.",
        f"The smallest difference that this run could have seen is {smallest_visible(losses):{form}} {unit}; below it "
        "nothing is decided.",
    ]


def differences(
    losses: np.ndarray, windows: np.ndarray, sizes: np.ndarray, baseline: int, documents: np.ndarray | None = None
) -> list[Difference]:
    """The difference of each arm to the baseline.

    `losses` is `[arms, seeds]`. `windows` is `[arms, seeds, windows]`, the total of each window, and `sizes` is `[windows]`, what it
    is divided by: the loss of an arm and a seed is the ratio of their sums. `documents` is `[windows]`, the number of the document
    that each is of. Without it windows are taken as independent, which those of one document are not: the standard error is
    then too small.
    """
    half = smallest_visible(losses)
    group = np.arange(len(sizes)) if documents is None else np.unique(documents, return_inverse=True)[1]
    found = []
    for arm in range(len(losses)):
        apart = (windows[arm] - windows[baseline]).mean(0)
        mean = float((losses[arm] - losses[baseline]).mean())
        # Of a ratio of sums: the deviation of what each window adds beyond its share.
        beyond = apart - sizes * apart.sum() / sizes.sum()
        # Windows of one document lie to one side together, so what counts as one draw is a document.
        beyond = np.bincount(group, beyond)
        number = len(beyond)
        spread = number / (number - 1) * float(np.sum(beyond**2)) if number > 1 else math.nan
        error = math.sqrt(spread) / float(sizes.sum())
        found.append(Difference(mean, half, error))
    return found
