"""Adapters: small per-round modules that let rounds of shared weights differ.

Every adapter is the identity at initialisation: a model with adapters starts out as the
model without.

!!! example

    ```python
    import jax.random as jr
    import rinsx as rx

    adapter = rx.adapters.LowRank(64, rank=4, rounds=3, key=jr.key(0))
    loop = rx.Loop(3, adapter=adapter)
    ```

**The state.** An adapter acts on every floating array in the state, along its last
axis, which must have size `dim`; each keeps its shape and dtype. All else (integers,
keys, ...) passes through. Where only a part of the state has that size,
`rx.Loop(..., on=lambda state: state.x)` selects it.

**The weights.** They are float32, and cast to the dtype of what they act on. Every
constructor takes:

- `rounds`: how many sets of weights to hold, one for each round. By default `None`: a
    single set, shared by every round.
- `past`: what happens in a round past the last set. `"error"` refuses it, `"last"`
    reuses the last set, `"identity"` leaves the state as it is. By default `"error"`;
    with a single shared set no round is past it, and `"last"` is all there is.
"""

import abc
import functools as ft
import math
import operator
from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ._leaves import map_floating


__all__ = [
    "AbstractAdapter",
    "FiLM",
    "Linear",
    "LowRank",
    "NormLinear",
    "RoundEmbedding",
]


_Past = Literal["error", "last", "identity"]
_State = TypeVar("_State", bound=PyTree)


class AbstractAdapter(eqx.Module):
    """What is done to the state at the start of each round, depending on the round."""

    @property
    @abc.abstractmethod
    def limit(self) -> int | None:
        """How many rounds the adapter can serve; `None` for any number."""

    @abc.abstractmethod
    def __call__(self, state: _State, round: Int[Array, ""] | int) -> _State:
        """**Arguments:**

        - `state`: any pytree.
        - `round`: the round, counted from 0: a Python int or a traced integer, with the
            same result. A Python int of `limit` or more is a `ValueError`. A traced
            integer is not checked here, since the loop around has done so; it reads the
            last set of weights.

        **Returns:**

        A pytree of the same structure, shapes and dtypes.
        """


class _Table(eqx.Module):
    """How many sets of weights there are, for which size, and which of them a round
    reads."""

    dim: int = eqx.field(static=True)
    rounds: int | None = eqx.field(static=True)
    past: _Past = eqx.field(static=True)

    def __init__(self, dim: int, rounds: int | None, past: _Past | None):
        if past is None:
            past = "last" if rounds is None else "error"
        if dim < 1:
            raise ValueError(f"`dim` must be at least 1; got {dim}.")
        if rounds is not None and rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, or None; got {rounds}.")
        if past not in ("error", "last", "identity"):
            raise ValueError(f"`past` must be 'error', 'last' or 'identity'; got {past!r}.")
        if rounds is None and past != "last":
            raise ValueError(
                "Without `rounds`, one set of weights is shared by every round and no "
                f"round is past it: give `rounds`, or leave out `past`; got {past!r}."
            )
        self.dim, self.rounds, self.past = dim, rounds, past

    @property
    def limit(self) -> int | None:
        return self.rounds if self.past == "error" else None

    def stack(self, *shape: int) -> tuple[int, ...]:
        """The shape of all sets of weights together, given that of one."""
        return shape if self.rounds is None else (self.rounds, *shape)

    def read(self, weights: PyTree, round: Int[Array, ""] | int) -> PyTree:
        """One set out of all."""
        if self.rounds is None:
            return weights
        if not isinstance(round, jax.Array):
            index = min(round, self.rounds - 1)
            return jtu.tree_map(lambda w: w[index], weights)
        # A dynamic slice clamps its index.
        row = ft.partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
        return jtu.tree_map(lambda w: row(w, round), weights)

    def skips(self, round: Int[Array, ""] | int) -> Bool[Array, ""] | bool:
        """Whether `past` turns the adapter off in this round."""
        if self.rounds is None or self.past != "identity":
            return False
        return round >= self.rounds


class _AbstractTabled(AbstractAdapter):
    """An adapter with all of its arrays stacked as `table` says."""

    table: eqx.AbstractVar[_Table]

    @abc.abstractmethod
    def _adapt(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Adapts one array, with `self` holding one set of weights, in its dtype."""

    @property
    def limit(self) -> int | None:
        return self.table.limit

    def __call__(self, state: _State, round: Int[Array, ""] | int) -> _State:
        name = type(self).__name__
        if not isinstance(round, jax.Array):
            round = operator.index(round)
            if round < 0:
                raise ValueError(f"Rounds are counted from 0; got {round}.")
            if self.limit is not None and round >= self.limit:
                raise ValueError(
                    f"{name} has weights for {self.limit} rounds, and round {round} "
                    "(counted from 0) is past them. Give it more `rounds`, or "
                    "`past='last'` or `past='identity'`."
                )
        skips = self.table.skips(round)
        one_set = self.table.read(self, round)

        def adapt(x):
            if skips is True:
                return x
            out = jtu.tree_map(lambda w: w.astype(x.dtype), one_set)._adapt(x)
            return out if skips is False else jnp.where(skips, x, out)

        return map_floating(adapt, name, self.table.dim, state)


class Linear(_AbstractTabled):
    """A linear map beside the state: `x + W x`, with `W` zero at initialisation.

    !!! example

        ```python
        import rinsx as rx

        loop = rx.Loop(3, adapter=rx.adapters.Linear(64, rounds=3))
        ```
    """

    weight: Float[Array, "*rounds dim dim"]
    table: _Table

    def __init__(
        self,
        dim: int,
        *,
        rounds: int | None = None,
        past: Literal["error", "last", "identity"] | None = None,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `dim`: the size of the last axis of the state.
        - `rounds`, `past`: as for [every adapter][rinsx.adapters].
        - `key`: not needed, since nothing is random.
        """
        del key
        self.table = _Table(dim, rounds, past)
        self.weight = jnp.zeros(self.table.stack(dim, dim), jnp.float32)

    def _adapt(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return x + x @ self.weight.T


class LowRank(_AbstractTabled):
    """A linear map of low rank beside the state: `x + B (A x)`, with `A` normal of
    variance `1 / dim` and `B` zero at initialisation.

    !!! example

        ```python
        import jax.random as jr
        import rinsx as rx

        adapter = rx.adapters.LowRank(64, rank=4, rounds=3, key=jr.key(0))
        ```

    ??? cite "Reference"

        The factors and their initialisation are those of LoRA, Section 4.1,
        arXiv 2106.09685, where they stand beside a weight and not beside the state.
    """

    a: Float[Array, "*rounds rank dim"]
    b: Float[Array, "*rounds dim rank"]
    table: _Table

    def __init__(
        self,
        dim: int,
        rank: int,
        *,
        rounds: int | None = None,
        past: Literal["error", "last", "identity"] | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `dim`: the size of the last axis of the state.
        - `rank`: the rank, at least 1.
        - `rounds`, `past`: as for [every adapter][rinsx.adapters].
        - `key`: a `jax.random.key`, for `A`.
        """
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1; got {rank}.")
        self.table = _Table(dim, rounds, past)
        a = jr.normal(key, self.table.stack(rank, dim), jnp.float32)
        self.a = a / math.sqrt(dim)
        self.b = jnp.zeros(self.table.stack(dim, rank), jnp.float32)

    def _adapt(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return x + (x @ self.a.T) @ self.b.T


class NormLinear(_AbstractTabled):
    """A norm and a linear map beside the state: `x + W rmsnorm(x)`, with `W` zero at
    initialisation. The norm has a learned scale, and is computed in float32 at least.

    !!! example

        ```python
        import jax.random as jr
        import rinsx as rx

        adapter = rx.adapters.NormLinear(64, rounds=3, past="last", key=jr.key(0))
        loop = rx.Loop(3, max=8, adapter=adapter)
        ```

    ??? cite "Reference"

        RINS (arXiv 2502.07503) has "light linear adapters, under 1% of the parameters".
        Their form, place and initialisation there are not known to us. This is a
        reading of it that fits the size.
    """

    scale: Float[Array, "*rounds dim"]
    weight: Float[Array, "*rounds dim dim"]
    table: _Table
    eps: float = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        *,
        rounds: int | None = None,
        past: Literal["error", "last", "identity"] | None = None,
        eps: float = 1e-6,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `dim`: the size of the last axis of the state.
        - `rounds`, `past`: as for [every adapter][rinsx.adapters].
        - `eps`: added to the mean square in the norm.
        - `key`: not needed, since nothing is random.
        """
        del key
        self.table = _Table(dim, rounds, past)
        self.scale = jnp.ones(self.table.stack(dim), jnp.float32)
        self.weight = jnp.zeros(self.table.stack(dim, dim), jnp.float32)
        self.eps = eps

    def _adapt(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        return x + (self.scale * normed) @ self.weight.T


class FiLM(_AbstractTabled):
    """A scale and a shift of each channel: `x (1 + gamma) + beta`, with `gamma` and
    `beta` zero at initialisation.

    !!! example

        ```python
        import rinsx as rx

        loop = rx.Loop(3, adapter=rx.adapters.FiLM(64, rounds=3))
        ```

    ??? cite "Reference"

        FiLM, Section 2.1, arXiv 1709.07871, conditioned on the round alone.
    """

    gamma: Float[Array, "*rounds dim"]
    beta: Float[Array, "*rounds dim"]
    table: _Table

    def __init__(
        self,
        dim: int,
        *,
        rounds: int | None = None,
        past: Literal["error", "last", "identity"] | None = None,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `dim`: the size of the last axis of the state.
        - `rounds`, `past`: as for [every adapter][rinsx.adapters].
        - `key`: not needed, since nothing is random.
        """
        del key
        self.table = _Table(dim, rounds, past)
        self.gamma = jnp.zeros(self.table.stack(dim), jnp.float32)
        self.beta = jnp.zeros(self.table.stack(dim), jnp.float32)

    def _adapt(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return x * (1 + self.gamma) + self.beta


class RoundEmbedding(_AbstractTabled):
    """A learned vector added to the state: `x + e`, with `e` zero at initialisation.

    !!! example

        ```python
        import rinsx as rx

        loop = rx.Loop(3, adapter=rx.adapters.RoundEmbedding(64, rounds=3))
        ```

    ??? cite "Reference"

        The Universal Transformer (arXiv 1807.03819, Section 2.1) tells its rounds apart
        so, there with sinusoids that are not learned.
    """

    embedding: Float[Array, "*rounds dim"]
    table: _Table

    def __init__(
        self,
        dim: int,
        *,
        rounds: int | None = None,
        past: Literal["error", "last", "identity"] | None = None,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `dim`: the size of the last axis of the state.
        - `rounds`, `past`: as for [every adapter][rinsx.adapters].
        - `key`: not needed, since nothing is random.
        """
        del key
        self.table = _Table(dim, rounds, past)
        self.embedding = jnp.zeros(self.table.stack(dim), jnp.float32)

    def _adapt(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return x + self.embedding
