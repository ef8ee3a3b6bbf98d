"""Injections: how the input of a loop comes back in later rounds.

As with [adapters][rinsx.adapters], an injection acts on every floating array in the
state, each keeps its shape and dtype, and all else in the state passes through. The
input must have the structure and shapes of the state; it is cast to the dtype of the
state, and so are the weights, which are float32.

!!! example

    ```python
    import jax.random as jr
    import rinsx as rx

    inject = rx.injection.Concat(64, key=jr.key(0))
    loop = rx.Loop(8, inject=inject, start=rx.start.Normal())
    ```
"""

import abc
import math
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._leaves import map_floating


__all__ = ["AbstractInjection", "Add", "Concat", "GatedAdd"]


_State = TypeVar("_State", bound=PyTree)


class AbstractInjection(eqx.Module):
    """How a round takes in the input of its loop."""

    @abc.abstractmethod
    def __call__(self, state: _State, input: PyTree, round: Int[Array, ""] | int) -> _State:
        """**Arguments:**

        - `state`: the state at the start of the round, any pytree.
        - `input`: what the loop was called with, of the same structure and shapes.
        - `round`: the round, counted from 0. The injections here are the same in every
            round; one of your own need not be.

        **Returns:**

        The new state, of the same structure, shapes and dtypes.
        """


class Add(AbstractInjection):
    """`state + input`.

    !!! example

        ```python
        import rinsx as rx

        loop = rx.Loop(8, inject=rx.injection.Add(), start=rx.start.Zeros())
        ```
    """

    def __call__(self, state: _State, input: PyTree, round: Int[Array, ""] | int) -> _State:
        del round
        return map_floating(lambda x, i: x + i, "Add", None, state, input)


class GatedAdd(AbstractInjection):
    """`state + gate * input`, with a learned gate for each channel.

    !!! example

        ```python
        import rinsx as rx

        loop = rx.Loop(8, inject=rx.injection.GatedAdd(64, init=0.1))
        ```
    """

    gate: Float[Array, " dim"]

    def __init__(self, dim: int, init: float = 1.0):
        """**Arguments:**

        - `dim`: the size of the last axis of the state.
        - `init`: the gate at initialisation, the same for each channel.
        """
        if dim < 1:
            raise ValueError(f"`dim` must be at least 1; got {dim}.")
        self.gate = jnp.full(dim, init, jnp.float32)

    def __call__(self, state: _State, input: PyTree, round: Int[Array, ""] | int) -> _State:
        del round
        add = lambda x, i: x + self.gate.astype(x.dtype) * i
        return map_floating(add, "GatedAdd", self.gate.shape[0], state, input)


class Concat(AbstractInjection):
    """`W [state, input]`: a linear map without bias from both, concatenated, to the
    state. `W` is normal of variance `1 / (2 dim)` at initialisation.

    !!! example

        ```python
        import jax.random as jr
        import rinsx as rx

        inject = rx.injection.Concat(64, key=jr.key(0))
        loop = rx.Loop(8, inject=inject, start=rx.start.Normal())
        ```

    ??? cite "Reference"

        The adapter of latent recurrent thinking: Geiping et al., "Scaling up Test-Time
        Compute with Latent Reasoning", arXiv 2502.05171, Section 3.2.
    """

    weight: Float[Array, "dim 2*dim"]

    def __init__(self, dim: int, *, key: PRNGKeyArray):
        """**Arguments:**

        - `dim`: the size of the last axis of the state.
        - `key`: a `jax.random.key`, for the weight.
        """
        if dim < 1:
            raise ValueError(f"`dim` must be at least 1; got {dim}.")
        self.weight = jr.normal(key, (dim, 2 * dim), jnp.float32) / math.sqrt(2 * dim)

    def __call__(self, state: _State, input: PyTree, round: Int[Array, ""] | int) -> _State:
        del round

        def concat(x, i):
            return jnp.concatenate([x, i], axis=-1) @ self.weight.astype(x.dtype).T

        return map_floating(concat, "Concat", self.weight.shape[0], state, input)
