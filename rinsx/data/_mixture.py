"""Mixtures of windows, or of pairs, with weights."""

import operator
from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import Any, final, SupportsIndex

import numpy as np

from .._check import rational
from ._pairs import Pairs
from ._windows import Windows


def mix(parts: Sequence["Windows | Pairs | Mixture"], weights: Sequence[Fraction | int | float | str]) -> "Mixture":
    """Mixes corpora: windows of each, in proportion to its weight.

    The order is fixed: among the first `n` windows of a mixture of two, each has its share of `n`, rounded; with more
    parts it is off by less than their number. A part that is used up begins again, and is then shuffled anew, while others go on.

    !!! example

        ```python
        import rinsx as rx

        code = rx.data.tokenize(rx.data.stdlib(), rx.data.Bytes())
        prose = rx.data.tokenize(rx.data.documents(["It was a dark and stormy night. " * 50]), rx.data.Bytes())
        windows = rx.data.mix([rx.data.Windows(code, 64), rx.data.Windows(prose, 64)], weights=["9/10", "1/10"])
        batch = next(iter(rx.data.batches(windows, 10)))  # nine rows of code, one of prose
        ```

    **Arguments:**

    - `parts`: [`rinsx.data.Windows`][] of one length and one vocabulary, or other mixtures of these. Or
        [`rinsx.data.Pairs`][] with images of one size, captions of one length and vocabulary, and the same classes if they have
        labels (`labels=False` leaves labels out), or other mixtures of these.
    - `weights`: for each part its share of the windows, and so of the tokens, or of the pairs: positive, with any sum.

    **Returns:**

    A mixture, for [`rinsx.data.batches`][]. Its length is one epoch: how many windows there are before some
    part begins again.

    **Raises:**

    `ValueError` if the parts do not fit together, or a weight is not positive.
    """
    parts = tuple(parts)
    shares = [rational("weights", weight) for weight in weights]
    if not parts or len(parts) != len(shares):
        raise ValueError(
            f"there must be a weight for each part, and at least one part; got {len(parts)} parts, weights {weights}"
        )
    if min(shares) <= 0:
        raise ValueError(f"`weights` must be positive; got {list(weights)}. Leave out a part that is not wanted.")
    first = _layout(parts[0])
    for part in parts:
        layout = _layout(part)
        if layout.keys() != first.keys():
            raise ValueError(f"windows and pairs cannot be mixed with each other; got {parts[0]} and {part}")
        for what, want in first.items():
            if want != layout[what]:
                raise ValueError(
                    f"the parts of a mixture must have {what}; got {want} and {layout[what]}: {parts[0]} and {part}"
                )
    scale = lcm(*(share.denominator for share in shares))
    whole = [int(share * scale) for share in shares]
    divisor = int(np.gcd.reduce(np.array(whole, object)))
    return Mixture(parts, tuple(weight // divisor for weight in whole))


def _layout(part: "Windows | Pairs | Mixture") -> dict[str, Any]:
    """What the parts of a mixture must agree in, by what it is called."""
    if isinstance(part, Mixture):
        return _layout(part.parts[0])
    if isinstance(part, Pairs):
        return part.layout
    return {"windows of one length": part.length, "one vocabulary": part.vocab_size, "one `end`": part.end}


@final
class Mixture:
    """The result of [`rinsx.data.mix`][]. `weights` are integers without a common divisor."""

    def __init__(self, parts: tuple["Windows | Pairs | Mixture", ...], weights: tuple[int, ...]):
        self.parts = parts
        self.weights = weights
        # The first window that would need a part again, by bisection: what a part has given never falls.
        low, high = (
            0,
            min(len(part) * sum(weights) // weight for part, weight in zip(parts, weights)) + sum(weights) + 1,
        )
        while low + 1 < high:
            middle = (low + high) // 2
            fits = all(given <= len(part) for given, part in zip(self.given(middle), parts))
            low, high = (middle, high) if fits else (low, middle)
        self._epoch = low

    def __len__(self) -> int:
        return self._epoch

    def __repr__(self) -> str:
        return f"mix([{', '.join(map(repr, self.parts))}], {list(self.weights)})"

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Window or pair `index` of the unshuffled mixture."""
        part, inner = self.locate(operator.index(index))
        return self.parts[part][inner % len(self.parts[part])]

    def given(self, n: int) -> list[int]:
        """How many of the first `n` windows each part gives."""
        counts = []
        rest = sum(self.weights)
        for weight in self.weights:
            # Rounded, of what the parts before it have left over. Exact integers: nothing drifts over a long run.
            count = (2 * n * weight + rest) // (2 * rest)
            counts.append(count)
            n, rest = n - count, rest - weight
        return counts

    def locate(self, index: int) -> tuple[int, int]:
        """The part that window `index` is of, and how many of that part came before it."""
        before, after = self.given(index), self.given(index + 1)
        part = next(i for i, (a, b) in enumerate(zip(before, after)) if a != b)
        return part, before[part]
