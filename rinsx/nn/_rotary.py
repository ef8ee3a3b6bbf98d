"""Rotary positions: queries and keys are turned by angles that grow with the position."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Rotary(NamedTuple):
    """The turns of all positions, made once by [`rinsx.nn.rotary`][] and passed to every visit.

    **Attributes:**

    - `cos`, `sin`: float32 arrays of shape `[..., T, dim / 2]`.
    """

    cos: Float[Array, "*batch t half"]
    sin: Float[Array, "*batch t half"]


def rotary(positions: Int[Array, "*batch t"], dim: int, *, base: float = 10_000.0) -> Rotary:
    """The turns for heads of size `dim` at the given positions.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        turns = rx.nn.rotary(jnp.arange(5), 8)
        rx.nn.rotate(jnp.ones((2, 5, 8)), turns).shape  # (2, 5, 8)
        ```

    ??? cite "Reference"

        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864.

    **Arguments:**

    - `positions`: counted from the start of each document.
    - `dim`: the size of a head, even.
    - `base`: the longest wavelength is `2 * pi * base` positions, nearly.

    **Returns:**

    A [`rinsx.nn.Rotary`][], in float32.
    """
    if dim % 2 != 0:
        raise ValueError(f"rotary positions turn pairs of numbers, so a head must have an even size; got {dim}.")
    rates = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles = positions[..., None].astype(jnp.float32) * rates
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "*batch t dim"], turns: Rotary) -> Float[Array, "*batch t dim"]:
    """Turns each pair `(x[i], x[i + dim / 2])` by the angle of its position.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        rx.nn.rotate(jnp.ones((3, 8)), rx.nn.rotary(jnp.arange(3), 8))[0]  # ones: position 0 is not turned
        ```

    **Arguments:**

    - `x`: queries or keys.
    - `turns`: of [`rinsx.nn.rotary`][], with axes that broadcast against those of `x`.

    **Returns:**

    An array like `x`; the product is taken in float32.
    """
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate(
        [first * turns.cos - second * turns.sin, second * turns.cos + first * turns.sin],
        axis=-1,
    )
    return turned.astype(x.dtype)
