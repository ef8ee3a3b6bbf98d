"""What the encoders of images and of text share: layers that see all positions, a norm, one vector at the end."""

import functools as ft
from collections.abc import Mapping, Sequence
from typing import Any, get_args, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import at_least
from .._loop import Loop, Rounds
from .._recur import Recursion
from .._signature import Signature
from ..gradient import AbstractStorage
from ..nn import AttentionPool, LayerNorm, TransformerLayer
from ._body import check_dtype, computing_in, make_body


Pool = Literal["map", "mean", "first", "last"]


class Encoder(eqx.Module):
    """Layers in the order of a signature, without a causal mask; a norm; and a pool that makes one vector of all positions."""

    body: Recursion
    norm: LayerNorm
    attention_pool: AttentionPool | None
    pool: str = eqx.field(static=True)
    dtype: str = eqx.field(static=True)

    def __init__(
        self,
        config: Any,
        signature: str | Signature,
        *,
        split: Sequence[int] | None,
        gradient: AbstractStorage | None,
        unroll: bool | None,
        key: PRNGKeyArray,
        loops: Mapping[str, Loop | Rounds],
    ):
        norm = ft.partial(LayerNorm, epsilon=config.epsilon)
        shape = {"heads": config.heads, "hidden": config.hidden, "mlp": config.mlp}

        def layer(_, key):
            # Each layer adds twice to the state.
            scale = (2 * config.layers) ** -0.5
            return TransformerLayer(config.width, **shape, causal=False, norm=norm, bias=True, scale=scale, key=key)

        key_layers, key_pool = jr.split(key)
        self.body = make_body(
            Signature(signature),
            config.layers,
            layer,
            split=split,
            gradient=gradient,
            unroll=unroll,
            key=key_layers,
            loops=loops,
        )
        self.norm = norm(config.width)
        self.attention_pool = None
        if config.pool == "map":
            self.attention_pool = AttentionPool(config.width, **shape, epsilon=config.epsilon, key=key_pool)
        self.pool = config.pool
        self.dtype = config.dtype

    def hidden(self, state: Float[Array, "batch t width"], key: PRNGKeyArray | None) -> Float[Array, "batch t width"]:
        """The normalised states of all positions."""
        dtype = jnp.dtype(self.dtype)
        context = {} if key is None else {"key": key}
        state = computing_in(dtype, self.body)(state.astype(dtype), **context)
        with jax.named_scope("norm"):
            return self.norm(state)

    def __call__(self, state: Float[Array, "batch t width"], key: PRNGKeyArray | None) -> Float[Array, "batch width"]:
        """One vector for each row, in float32."""
        hidden = self.hidden(state, key)
        with jax.named_scope("pool"):
            if self.attention_pool is not None:
                pooled = self.attention_pool(hidden)
            elif self.pool == "mean":
                pooled = jnp.mean(hidden.astype(jnp.float32), axis=1)
            else:
                pooled = hidden[:, 0 if self.pool == "first" else -1]
            return pooled.astype(jnp.float32)


def check_shape(config: Any, *names: str) -> None:
    """Refuses what no encoder has, and fills in the size inside an MLP."""
    at_least(1, **{name: getattr(config, name) for name in ("width", "layers", "heads", "hidden", *names)})
    check_dtype(config.dtype)
    if config.pool not in get_args(Pool):
        raise ValueError(f"`pool` must be one of {', '.join(get_args(Pool))}; got {config.pool!r}.")
    if config.hidden is None:
        object.__setattr__(config, "hidden", 4 * config.width)
