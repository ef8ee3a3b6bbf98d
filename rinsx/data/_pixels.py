"""Pixels: an image decoded, cropped, resized and normalised."""

import math
import operator
from collections.abc import Sequence
from typing import Any, final, Literal, SupportsIndex

import numpy as np

from ._decode import decode, pillow


@final
class Pixels:
    """Makes arrays of one size from images of any kind.

    **Decoding.** Every image becomes 8-bit RGB before anything else:

    | image | rule |
    |---|---|
    | palette, 1-bit, grey, CMYK, YCbCr, HSV | Pillow's conversion |
    | transparent (RGBA, grey with alpha, a palette or a colour that is transparent) | laid on white |
    | 16-bit grey | divided by 257 and rounded; not clipped |
    | 16-bit colour | Pillow reads the upper 8 bits of each channel |
    | 32-bit integers, floats | as 16-bit grey, or times 255, if all values are from 0 to 65535, or from 0 to 1; otherwise broken |
    | an orientation in EXIF | applied |
    | animated | the first frame |
    | more pixels than `PIL.Image.MAX_IMAGE_PIXELS` | broken |
    | cut off, no image, no bytes, a mode not named here that Pillow cannot convert | broken |

    Arrays are images too: `[H, W]` or `[H, W, channels]` with 1, 3 or 4 channels, uint8, uint16, or float from 0 to 1.

    **Training.** With `crop`, a rectangle is drawn whose area is a uniform fraction of the image's, and whose aspect, width by
    height, is log-uniform from 3/4 to 4/3; after ten that do not fit it is the middle of the image. It is resized to
    `size`. This is torchvision's `RandomResizedCrop`. With `flip`, an image is mirrored with
    probability 1/2.

    **Evaluation**, and training without `crop`: the image is resized until it just covers `size`, and its middle is cut out.
    In a square that is a resize of the shorter side.

    At last values are `(x / 255 - mean) / std`, float32.

    !!! example

        ```python
        import numpy as np
        import rinsx as rx

        pixels = rx.data.Pixels(32, crop=(0.3, 1), flip=True)
        image = np.zeros((48, 64, 3), np.uint8)
        pixels(image).shape  # (32, 32, 3): for evaluation
        pixels(image, np.random.default_rng(0)).min()  # -1.0: for training
        ```

    **Attributes:**

    - `size`: `(height, width)`.
    - `crop`, `flip`, `mean`, `std`, `resample`: as given.
    """

    def __init__(
        self,
        size: SupportsIndex | Sequence[SupportsIndex],
        *,
        crop: Sequence[float | int] | None = None,
        flip: bool = False,
        mean: float | int | Sequence[float | int] = 0.5,
        std: float | int | Sequence[float | int] = 0.5,
        resample: Literal["bicubic", "bilinear"] = "bicubic",
    ):
        """**Arguments:**

        - `size`: height and width, or one integer for both.
        - `crop`: the least and the largest fraction of the area that a random crop has, such as `(0.08, 1)`; `None` is none.
        - `flip`: whether images are mirrored at random, left and right, with probability 1/2.
        - `mean`, `std`: for all channels, or one for each of the three.
        - `resample`: `"bicubic"` or `"bilinear"`, both with antialiasing, as Pillow does it.

        **Raises:**

        `ValueError` if a number is out of range, `TypeError` if `size` is not of integers.
        """
        try:
            sides = tuple(map(operator.index, size)) if isinstance(size, Sequence) else (operator.index(size),) * 2
        except TypeError:
            raise TypeError(f"`size` must be an integer, or (height, width); got {size!r}") from None
        height, width = sides if len(sides) == 2 else (0, 0)
        if min(height, width) < 1:
            raise ValueError(f"`size` must be at least 1, or (height, width); got {size}")
        if crop is not None and not (len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1):
            raise ValueError(f"`crop` must be (least, largest) with 0 < least <= largest <= 1; got {crop}")
        if resample not in ("bicubic", "bilinear"):
            raise ValueError(f"`resample` must be 'bicubic' or 'bilinear'; got {resample!r}")
        scale, shift = (np.asarray(value, np.float64) for value in (std, mean))
        for name, value in (("mean", shift), ("std", scale)):
            if value.shape not in ((), (3,)) or not np.isfinite(value).all():
                raise ValueError(f"`{name}` must be a number or three; got {mean if name == 'mean' else std}")
        if (scale <= 0).any():
            raise ValueError(f"`std` must be positive; got {std}")
        self.size = (height, width)
        self.crop = crop
        self.flip = flip
        self.mean = mean
        self.std = std
        self.resample = resample
        self._factor = (1 / (255 * scale)).astype(np.float32)
        self._offset = (-shift / scale).astype(np.float32)

    def __repr__(self) -> str:
        return f"Pixels({self.size}, crop={self.crop}, flip={self.flip})"

    def __call__(self, image: bytes | np.ndarray, random: np.random.Generator | None = None) -> np.ndarray:
        """One image.

        **Arguments:**

        - `image`: the bytes of a file, or an array.
        - `random`: what crop and flip are drawn from; `None` is for evaluation.

        **Returns:**

        float32 `[height, width, 3]`.

        **Raises:**

        `ValueError` if the image is broken.
        """
        return self.normalise(self.read(image, random)[0])

    def read(
        self, image: bytes | np.ndarray, random: np.random.Generator | None = None
    ) -> tuple[np.ndarray, list[str]]:
        """One image before it is normalised, uint8, and what was met, as kinds to count."""
        picture, found = decode(image)
        # Always drawn first, so that it does not depend on the image.
        mirrored = self.flip and random is not None and random.random() < 0.5
        array = np.asarray(self._resized(picture, random))
        return array[:, ::-1] if mirrored else array, found

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """uint8 `[..., 3]` as float32, normalised."""
        found = images.astype(np.float32)
        found *= self._factor
        found += self._offset
        return found

    def _resized(self, picture: Any, random: np.random.Generator | None) -> Any:
        library = pillow()
        method = {"bicubic": library.Resampling.BICUBIC, "bilinear": library.Resampling.BILINEAR}[self.resample]
        (height, width), (wide, high) = self.size, picture.size
        if random is not None and self.crop is not None:
            picture = picture.crop(_random_box(wide, high, self.crop, random))
            return picture.resize((width, height), method)
        # The size at which the image just covers the rectangle, one side exact and the other cut down to an integer.
        if wide * height <= high * width:
            covering = width, max(height, width * high // wide)
        else:
            covering = max(width, height * wide // high), height
        left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
        x, y = wide / covering[0], high / covering[1]
        # One step: an image of one pixel by ten thousand would be huge between two.
        box = (left * x, top * y, min((left + width) * x, wide), min((top + height) * y, high))
        return picture.resize((width, height), method, box=box)


def _random_box(
    wide: int, high: int, crop: Sequence[float | int], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop."""
    least, most = 3 / 4, 4 / 3
    for _ in range(10):
        area = wide * high * random.uniform(crop[0], crop[1])
        aspect = math.exp(random.uniform(math.log(least), math.log(most)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= wide and 0 < h <= high:
            left, top = int(random.integers(wide - w + 1)), int(random.integers(high - h + 1))
            return left, top, left + w, top + h
    w, h = wide, high
    if wide / high < least:
        h = round(wide / least)
    elif wide / high > most:
        w = round(high * most)
    left, top = (wide - w) // 2, (high - h) // 2
    return left, top, left + w, top + h
