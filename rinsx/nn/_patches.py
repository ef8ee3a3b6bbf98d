"""Images as sequences: patches, and where each of them is."""

import numpy as np
from jaxtyping import Array, Float

from .._check import at_least


def patches(images: Float[Array, "batch height width channels"], size: int) -> Float[Array, "batch n inputs"]:
    """Cuts images into squares, row by row, each flattened in the order of its axes.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        rx.nn.patches(jnp.ones((2, 32, 48, 3)), 16).shape  # (2, 6, 768): 2 rows of 3 patches
        ```

    **Arguments:**

    - `images`: of any size that `size` divides.
    - `size`: of a patch, in pixels.

    **Returns:**

    An array `[batch, n, size * size * channels]`.

    **Raises:**

    `ValueError` if `size` does not divide height and width.
    """
    batch, height, width, channels = images.shape
    rows, columns = grid_of((height, width), size)
    cut = images.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
    return cut.reshape(batch, rows * columns, size * size * channels)


def grid_of(image: tuple[int, int], size: int) -> tuple[int, int]:
    """How many rows and columns of patches an image has."""
    at_least(1, height=image[0], width=image[1], patch=size)
    if image[0] % size or image[1] % size:
        down, up = (tuple(max((n + more) // size, 1) * size for n in image) for more in (0, size - 1))
        raise ValueError(
            f"an image of {image[0]} x {image[1]} pixels cannot be cut into patches of {size} x {size}; "
            f"{down[0]} x {down[1]} or {up[0]} x {up[1]} could."
        )
    return image[0] // size, image[1] // size


def sincos(grid: tuple[int, int], width: int, *, base: float = 10_000.0) -> Float[np.ndarray, "n width"]:
    """Fixed positions of a grid: sines and cosines of column and row, at wavelengths from `2 pi` to `2 pi * base`.

    !!! example

        ```python
        import rinsx as rx

        rx.nn.sincos((2, 3), 64).shape  # (6, 64)
        ```

    ??? cite "Reference"

        Beyer, Zhai and Kolesnikov, "Better plain ViT baselines for ImageNet-1k", arXiv 2205.01580.

    **Arguments:**

    - `grid`: rows and columns.
    - `width`: the size of a vector, a multiple of 4 from 8 on. Its quarters are the sine and cosine of the column, then of the row.
    - `base`: the longest wavelength over the shortest.

    **Returns:**

    A float32 NumPy array, row by row.
    """
    if width < 8 or width % 4:
        raise ValueError(f"`width` must be a multiple of 4, and 8 at least; got {width}.")
    rates = base ** -np.linspace(0, 1, width // 4)
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = [at[:, None] * rates for at in (column, row)]
    return np.concatenate([f(x) for x in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)
