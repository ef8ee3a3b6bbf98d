"""Self-attention with grouped queries, rotary positions and documents that do not see each other."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from .._attend import Segments
from .._check import at_least
from .._handle import open
from ._linear import Linear
from ._rotary import Rotary, rotate


class Attention(eqx.Module):
    """Self-attention, causal or not.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        attention = rx.nn.Attention(32, heads=4, kv_heads=2, key=jr.key(0))
        turns = rx.nn.rotary(jnp.arange(6), attention.head_dim)
        attention(jnp.ones((1, 6, 32)), rotary=turns).shape  # (1, 6, 32)
        ```

    ??? cite "Reference"

        Grouped queries: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", arXiv 2305.13245.
    """

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    heads: int = eqx.field(static=True)
    kv_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    causal: bool = eqx.field(static=True)
    window: int | None = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        causal: bool = True,
        window: int | None = None,
        bias: bool = False,
        scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: the size of the state's last axis, a multiple of `heads`.
        - `heads`: how many heads of queries.
        - `kv_heads`: how many heads of keys and values, a divisor of `heads`; by default `heads`.
        - `causal`: whether a position attends to itself and earlier ones only; otherwise to all, as in an encoder.
        - `window`: attend to the last `window` positions only, oneself included; by default to all.
        - `bias`: of the four maps.
        - `scale`: of the weights of the last map, see [`rinsx.nn.Linear`][].
        - `key`: for the weights.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or width % heads != 0:
            raise ValueError(f"`width` must be a multiple of `heads`; got width={width} and heads={heads}.")
        if kv_heads < 1 or heads % kv_heads != 0:
            raise ValueError(f"`kv_heads` must divide `heads`; got kv_heads={kv_heads} and heads={heads}.")
        at_least(1, window=window)
        keys = jr.split(key, 4)
        self.head_dim = width // heads
        self.q = Linear(width, width, bias=bias, key=keys[0])
        self.k = Linear(width, kv_heads * self.head_dim, bias=bias, key=keys[1])
        self.v = Linear(width, kv_heads * self.head_dim, bias=bias, key=keys[2])
        self.out = Linear(width, width, bias=bias, scale=scale, key=keys[3])
        self.heads = heads
        self.kv_heads = kv_heads
        self.causal = causal
        self.window = window

    def __call__(self, state: Any, *, rotary: Rotary | None = None, segments: Segments | None = None) -> Any:
        """**Arguments:**

        - `state`: one vector for each position, `[batch, t, width]`; with a cache, those of the next `t` positions.
        - `rotary`: of [`rinsx.nn.rotary`][], for heads of size `head_dim`. By default positions are not encoded.
        - `segments`: the document of each position; attention stays within it.

        **Returns:**

        A state like `state`.
        """
        x, cache = open(state)
        heads = lambda y: y.reshape(*y.shape[:-1], -1, self.head_dim).swapaxes(-3, -2)
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        if rotary is not None:
            turns = Rotary(*(jnp.expand_dims(a, -3) for a in rotary))
            q, k = rotate(q, turns), rotate(k, turns)
        out, cache = cache.attend(q, k, v, segments=segments, causal=self.causal, window=self.window)
        return cache.close(self.out(out.swapaxes(-3, -2).reshape(x.shape)))
