"""The images that are on every machine with scikit-learn: handwritten digits."""

import functools
from dataclasses import dataclass
from typing import final

import numpy as np

from ._images import AbstractImages, Example, hash_examples


_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits() -> AbstractImages:
    """Handwritten digits of scikit-learn: 1797 real grey images of 8 by 8 pixels, which need no download.

    Their 17 levels of grey, 0 to 16, are scaled to uint8, 0 to 255, and rounded. Labels are 0 to 9, the names `"zero"` to
    `"nine"`. Needs `pip install 'rinsx[vision]'`.

    !!! example

        ```python
        import rinsx as rx

        source = rx.data.digits()
        example = source.example(5)
        len(source), example.image.shape, source.names[example.label]  # (1797, (8, 8), "five")
        ```

    **Returns:**

    A [`rinsx.data.AbstractImages`][].
    """
    return _Digits(*_load(), _NAMES)


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("rx.data.digits needs the `scikit-learn` library: pip install 'rinsx[vision]'") from error
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(np.asarray(pixels).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    # One copy serves all sources.
    images.flags.writeable = False
    return images, np.asarray(labels).astype(np.int32)


@final
@dataclass(frozen=True, eq=False, repr=False)
class _Digits(AbstractImages):
    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...] | None

    def __repr__(self) -> str:
        return "digits()"

    def __len__(self) -> int:
        return len(self.images)

    def example(self, index: int) -> Example:
        return Example(self.images[index], label=int(self.labels[index]))

    def fingerprint(self) -> str:
        return hash_examples("digits", map(self.example, range(len(self))), self.names)

    def place(self, index: int) -> str:
        return f"{self!r}, row {index}"
