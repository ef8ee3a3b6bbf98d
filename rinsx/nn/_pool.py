"""One vector for a sequence, by attention."""

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._attend import attention
from .._check import at_least
from ._linear import LayerNorm, Linear, normal
from ._transformer import Kind, MLP


class AttentionPool(eqx.Module):
    """A learned query that attends to all positions, and an MLP behind a norm: the head "MAP" of SigLIP.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        pool = rx.nn.AttentionPool(32, heads=4, hidden=128, key=jr.key(0))
        pool(jnp.ones((2, 9, 32))).shape  # (2, 32)
        ```

    ??? cite "Reference"

        Zhai et al., "Scaling Vision Transformers", arXiv 2106.04560; Lee et al., "Set Transformer", arXiv 1810.00825.
    """

    query: Float[Array, " width"]
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    norm: LayerNorm
    mlp: MLP
    heads: int = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        hidden: int,
        mlp: Kind = "gelu",
        epsilon: float = 1e-6,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: the size of the last axis, a multiple of `heads`.
        - `heads`: how many.
        - `hidden`, `mlp`: size and kind of the MLP, see [`rinsx.nn.MLP`][].
        - `epsilon`: of the norm.
        - `key`: for the weights.
        """
        at_least(1, width=width, heads=heads)
        if width % heads != 0:
            raise ValueError(f"`width` must be a multiple of `heads`; got width={width} and heads={heads}.")
        keys = jr.split(key, 6)
        self.query = normal(keys[0], (width,), width**-0.5)
        self.q, self.k, self.v, self.out = (Linear(width, width, bias=True, key=key) for key in keys[1:5])
        self.norm = LayerNorm(width, epsilon=epsilon)
        self.mlp = MLP(width, hidden, kind=mlp, bias=True, key=keys[5])
        self.heads = heads

    def __call__(self, x: Float[Array, "batch t width"]) -> Float[Array, "batch width"]:
        """The vector of each sequence, in the dtype of `x`."""
        batch, _, width = x.shape
        heads = lambda y: y.reshape(batch, -1, self.heads, width // self.heads).swapaxes(1, 2)
        # The query is the same for all sequences: it is mapped once.
        q = self.q(self.query.astype(x.dtype)).reshape(1, 1, self.heads, -1).swapaxes(1, 2)
        q = q.repeat(batch, axis=0)
        out = attention(q, heads(self.k(x)), heads(self.v(x)), causal=False)
        out = self.out(out.reshape(batch, width))
        return out + self.mlp(self.norm(out))
