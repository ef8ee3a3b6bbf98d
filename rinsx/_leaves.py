"""The leaves of a state that adapters, injections and starts act on: its floating arrays."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree


_State = TypeVar("_State", bound=PyTree)


def is_floating(leaf: object) -> bool:
    """Whether `leaf` is of the kind that adapters, injections and starts act on."""
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    return is_array and jnp.issubdtype(leaf.dtype, jnp.floating)


def map_floating(fn: Callable[..., Array], who: str, dim: int | None, state: _State, *rest: PyTree) -> _State:
    """Maps `fn` over the floating arrays in `state`, together with what stands at the
    same places in `rest`. All else is kept, and so are shapes, dtypes and shardings."""

    def map_leaf(path, leaf, *others):
        if not is_floating(leaf):
            return leaf
        x = jnp.asarray(leaf)
        what = f"{who} acts on every floating array, but `state{jtu.keystr(path)}` is"
        if dim is not None and x.shape[-1:] != (dim,):
            raise ValueError(
                f"{what} {eqx.tree_pformat(x)}, not of shape (..., {dim}). "
                "`rx.Loop(..., on=lambda state: state.x)` selects the part of the "
                "state to act on."
            )
        for other in others:
            if not is_floating(other) or other.shape != x.shape:
                raise ValueError(
                    f"{what} {eqx.tree_pformat(x)} and the input there is "
                    f"{eqx.tree_pformat(other)}, not floating of the same shape."
                )
        out = fn(x, *(jnp.asarray(y, x.dtype) for y in others)).astype(x.dtype)
        # Under an explicit mesh `out` may have come to be sharded as the weights are.
        sharding = jax.typeof(x).sharding
        same = jax.typeof(out).sharding == sharding
        return out if same else jax.reshard(out, sharding)

    return jtu.tree_map_with_path(map_leaf, state, *rest)
