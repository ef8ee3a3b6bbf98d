"""The layer of a pre-norm transformer."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._handle import open
from ._attention import Attention
from ._linear import Linear, RMSNorm


class MLP(eqx.Module):
    """Widens each vector, bends it, and narrows it again, without biases.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        rx.nn.MLP(32, 96, key=jr.key(0))(jnp.ones((1, 6, 32))).shape  # (1, 6, 32)
        ```

    ??? cite "Reference"

        SwiGLU: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """

    up: Linear
    gate: Linear | None
    down: Linear

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        kind: Literal["swiglu", "gelu"] = "swiglu",
        scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: the size of the last axis.
        - `hidden`: the size that it is widened to.
        - `kind`: `"swiglu"` (three matrices: `silu(gate(x)) * up(x)`) or `"gelu"` (two: `gelu(up(x))`).
        - `scale`: of the weights of the last map, see [`rinsx.nn.Linear`][].
        - `key`: for the weights.
        """
        if kind not in ("swiglu", "gelu"):
            raise ValueError(f"`kind` must be 'swiglu' or 'gelu'; got {kind!r}.")
        keys = jr.split(key, 3)
        self.up = Linear(width, hidden, key=keys[0])
        self.gate = Linear(width, hidden, key=keys[1]) if kind == "swiglu" else None
        self.down = Linear(hidden, width, scale=scale, key=keys[2])

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """An array like `x`."""
        if self.gate is None:
            return self.down(jax.nn.gelu(self.up(x)))
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class TransformerLayer(eqx.Module):
    """Attention and an MLP, each behind a norm and added to its input. A block: state `[batch, t, width]`.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        make = lambda key: rx.nn.TransformerLayer(32, heads=4, hidden=96, key=key)
        early, late = (rx.nn.Stack.make(make, 2, key=key) for key in jr.split(jr.key(0)))
        model = rx.compose("A^r B", {"A": early, "B": late}, r=3)
        model(jnp.ones((1, 6, 32)), rotary=rx.nn.rotary(jnp.arange(6), 8)).shape  # (1, 6, 32)
        ```
    """

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: MLP

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        window: int | None = None,
        hidden: int,
        mlp: Literal["swiglu", "gelu"] = "swiglu",
        scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`, `heads`, `kv_heads`, `window`: see [`rinsx.nn.Attention`][].
        - `hidden`, `mlp`: size and kind, see [`rinsx.nn.MLP`][].
        - `scale`: of the weights of the two maps that write to the state.
        - `key`: for the weights.
        """
        keys = jr.split(key)
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads=heads, kv_heads=kv_heads, window=window, scale=scale, key=keys[0])
        self.mlp_norm = RMSNorm(width)
        self.mlp = MLP(width, hidden, kind=mlp, scale=scale, key=keys[1])

    def __call__(self, state: Any, *, key: PRNGKeyArray | None = None, **context: Any) -> Any:
        """**Arguments:**

        - `state`: of shape `[batch, t, width]`, or such a state with a cache.
        - `key`: accepted, as of every block, and not used.
        - `context`: `rotary` and `segments`, see [`rinsx.nn.Attention`][].

        **Returns:**

        A state like `state`.
        """
        del key
        x, cache = open(state)
        with jax.named_scope("attention"):
            added, cache = open(self.attention(cache.close(self.attention_norm(x)), **context))
            x = x + added
        with jax.named_scope("mlp"):
            return cache.close(x + self.mlp(self.mlp_norm(x)))
