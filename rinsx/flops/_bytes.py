"""Sizes in memory."""

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree


def nbytes(tree: PyTree) -> int:
    """The bytes that the arrays of a state or a cache hold, from shapes and dtypes.

    !!! example

        ```python
        import jax
        import jax.numpy as jnp
        import rinsx as rx

        cache = jax.ShapeDtypeStruct((8, 2, 4096, 16, 128), jnp.bfloat16)
        rx.flops.nbytes(cache)  # 268435456
        ```

    **Arguments:**

    - `tree`: a pytree. Its JAX arrays, NumPy arrays and `jax.ShapeDtypeStruct`s are
        counted, a typed PRNG key as the key data that it holds. Other leaves are not
        in device memory and count nothing.

    **Returns:**

    An `int`: what `.nbytes` of each array adds up to. An array that appears twice is
    counted twice.
    """
    return sum(
        int(leaf.size) * int(leaf.dtype.itemsize)
        for leaf in jtu.tree_leaves(tree)
        if eqx.is_array(leaf) or isinstance(leaf, (np.ndarray, np.generic, jax.ShapeDtypeStruct))
    )
