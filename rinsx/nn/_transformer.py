"""The layer of a pre-norm transformer."""

from collections.abc import Callable
from typing import Any, get_args, Literal

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._handle import open
from ._attention import Attention
from ._linear import LayerNorm, Linear, RMSNorm


Kind = Literal["swiglu", "gelu", "gelu_exact"]


class MLP(eqx.Module):
    """Widens each vector, bends it, and narrows it again.

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
    kind: str = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        kind: Kind = "swiglu",
        bias: bool = False,
        scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: the size of the last axis.
        - `hidden`: the size that it is widened to.
        - `kind`: `"swiglu"` (three matrices: `silu(gate(x)) * up(x)`) or `"gelu"` (two: `gelu(up(x))`, by the formula with `tanh`;
            `"gelu_exact"` is that with `erf`).
        - `bias`: of these maps.
        - `scale`: of the weights of the last map, see [`rinsx.nn.Linear`][].
        - `key`: for the weights.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"`kind` must be one of {', '.join(get_args(Kind))}; got {kind!r}.")
        keys = jr.split(key, 3)
        self.up = Linear(width, hidden, bias=bias, key=keys[0])
        self.gate = Linear(width, hidden, bias=bias, key=keys[1]) if kind == "swiglu" else None
        self.down = Linear(hidden, width, bias=bias, scale=scale, key=keys[2])
        self.kind = kind

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """An array like `x`."""
        if self.gate is None:
            return self.down(jax.nn.gelu(self.up(x), approximate=self.kind == "gelu"))
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

    attention_norm: RMSNorm | LayerNorm
    attention: Attention
    mlp_norm: RMSNorm | LayerNorm
    mlp: MLP

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        causal: bool = True,
        window: int | None = None,
        hidden: int,
        mlp: Kind = "swiglu",
        norm: Callable[[int], RMSNorm | LayerNorm] = RMSNorm,
        bias: bool = False,
        scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`, `heads`, `kv_heads`, `causal`, `window`: see [`rinsx.nn.Attention`][].
        - `hidden`, `mlp`: size and kind, see [`rinsx.nn.MLP`][].
        - `norm`: makes a norm of a width: [`rinsx.nn.RMSNorm`][] or [`rinsx.nn.LayerNorm`][].
        - `bias`: of all maps.
        - `scale`: of the weights of the two maps that write to the state.
        - `key`: for the weights.
        """
        keys = jr.split(key)
        self.attention_norm = norm(width)
        self.attention = Attention(
            width, heads=heads, kv_heads=kv_heads, causal=causal, window=window, bias=bias, scale=scale, key=keys[0]
        )
        self.mlp_norm = norm(width)
        self.mlp = MLP(width, hidden, kind=mlp, bias=bias, scale=scale, key=keys[1])

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
