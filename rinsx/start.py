"""Starts: the state that the first round of a loop starts from.

A start replaces the floating arrays of the loop's input, each by one of the same shape,
dtype and sharding, and keeps everything else (integers, keys, ...).

!!! example

    ```python
    import rinsx as rx

    loop = rx.Loop(8, inject=rx.injection.Add(), start=rx.start.Normal(scale=0.4))
    ```
"""

import abc
import math
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray, PyTree

from ._leaves import is_floating, map_floating


__all__ = ["AbstractStart", "Input", "Normal", "Zeros"]


_State = TypeVar("_State", bound=PyTree)


class AbstractStart(eqx.Module):
    """Where the first round starts from."""

    @property
    @abc.abstractmethod
    def needs_key(self) -> bool:
        """Whether the start draws from the key of the call."""

    @abc.abstractmethod
    def __call__(self, input: _State, key: PRNGKeyArray | None) -> _State:
        """**Arguments:**

        - `input`: what the loop was called with, any pytree.
        - `key`: the key of the call. `None` is a `ValueError` where `needs_key`.

        **Returns:**

        A pytree of the same structure, shapes, dtypes and shardings.
        """


class Input(AbstractStart):
    """The input itself, as in `A^r B`.

    !!! example

        ```python
        import rinsx as rx

        loop = rx.Loop(3, start=rx.start.Input())
        ```
    """

    @property
    def needs_key(self) -> bool:
        return False

    def __call__(self, input: _State, key: PRNGKeyArray | None) -> _State:
        del key
        return input


class Zeros(AbstractStart):
    """Zeros. Whatever the rounds are to know of the input, an
    [injection][rinsx.injection] must tell them.

    !!! example

        ```python
        import rinsx as rx

        loop = rx.Loop(8, inject=rx.injection.Add(), start=rx.start.Zeros())
        ```
    """

    @property
    def needs_key(self) -> bool:
        return False

    def __call__(self, input: _State, key: PRNGKeyArray | None) -> _State:
        del key
        return map_floating(jnp.zeros_like, "Zeros", None, input)


class Normal(AbstractStart):
    """Noise from `Normal(0, scale^2)`, independent for each array.

    With a `seed` the noise is the same in every call, and under `jax.vmap` for every
    example. Without, it comes from the key of the call.

    !!! example

        ```python
        import rinsx as rx

        loop = rx.Loop(8, inject=rx.injection.Add(), start=rx.start.Normal(seed=0))
        ```

    ??? cite "Reference"

        The start of latent recurrent thinking: Geiping et al., "Scaling up Test-Time
        Compute with Latent Reasoning", arXiv 2502.05171, Section 3.1.
    """

    scale: float = eqx.field(default=1.0, static=True, converter=float)
    seed: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"`scale` must be finite and not negative; got {self.scale}.")

    @property
    def needs_key(self) -> bool:
        return self.seed is None

    def __call__(self, input: _State, key: PRNGKeyArray | None) -> _State:
        if self.seed is not None:
            key = jr.key(self.seed)
        elif key is None:
            raise ValueError(
                "start.Normal() draws from the call's key: call the model with key=..., or give Normal(seed=...)."
            )
        leaves, treedef = jtu.tree_flatten(input)
        leaves = [self._noise(leaf, jr.fold_in(key, i)) if is_floating(leaf) else leaf for i, leaf in enumerate(leaves)]
        return jtu.tree_unflatten(treedef, leaves)

    def _noise(self, leaf, key):
        zeros = jnp.zeros_like(leaf)
        # Drawn in the sharding it is wanted in, so that no device makes all of it. The
        # zeros carry over what else the type says (such as varying over a `shard_map`).
        sharding = jax.typeof(zeros).sharding
        noise = jr.normal(key, zeros.shape, zeros.dtype, out_sharding=sharding)
        return zeros + self.scale * noise


Normal.__init__.__doc__ = """**Arguments:**

- `scale`: the standard deviation.
- `seed`: makes the noise once and for all. By default it is drawn from the key of the
    call.
"""
