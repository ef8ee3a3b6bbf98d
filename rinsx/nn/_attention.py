"""Causal self-attention with grouped queries, rotary positions and documents that do not see each other."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._linear import Linear
from ._rotary import Rotary, rotate


Segments = Int[Array, "batch t"]


def causal_attention(
    q: Float[Array, "batch heads t dim"],
    k: Float[Array, "batch groups t dim"],
    v: Float[Array, "batch groups t dim"],
    segments: Segments | None = None,
) -> Float[Array, "batch heads t dim"]:
    """Attention of every position to itself and to earlier ones of the same segment.

    On a GPU, in bfloat16 or float16, this is the flash kernel of `jax.nn.dot_product_attention`. Elsewhere it is written out,
    with scores in float32, the form that measures fastest on CPU (see the results on training speed).

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        q = jnp.ones((1, 4, 6, 8))  # 4 heads
        k = v = jnp.ones((1, 2, 6, 8))  # 2 heads of keys and values, each for 2 heads of queries
        rx.nn.causal_attention(q, k, v).shape  # (1, 4, 6, 8)
        ```

    **Arguments:**

    - `q`: queries.
    - `k`, `v`: keys and values; `heads` is a multiple of `groups`, and heads `i * heads / groups, ...` use group `i`.
    - `segments`: the document that each position belongs to. By default all is one.

    **Returns:**

    An array like `q`.
    """
    batch, heads, t, dim = q.shape
    groups = k.shape[1]
    if heads % groups != 0:
        raise ValueError(f"{heads} heads of queries cannot share {groups} heads of keys and values evenly.")
    same = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        swap = lambda x: x.swapaxes(1, 2)
        out = jax.nn.dot_product_attention(swap(q), swap(k), swap(v), mask=same, is_causal=True, implementation="cudnn")
        return swap(out)

    grouped = (q * dim**-0.5).reshape(batch, groups, heads // groups * t, dim)
    scores = jnp.einsum("bgtd,bgsd->bgts", grouped, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    scores = scores.reshape(batch, groups, heads // groups, t, t)
    mask = jnp.tri(t, dtype=bool)
    if same is not None:
        mask = mask & same[:, :, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    # Divided by its sum after the product with the values, not before: one pass less over all pairs.
    weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    whole = jnp.sum(weights, axis=-1).reshape(batch, heads, t, 1)
    weights = weights.reshape(batch, groups, heads // groups * t, t).astype(v.dtype)
    out = jnp.einsum("bgts,bgsd->bgtd", weights, v, preferred_element_type=whole.dtype).reshape(batch, heads, t, dim)
    return (out / whole).astype(q.dtype)


class Attention(eqx.Module):
    """Causal self-attention, without biases.

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

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`: the size of the state's last axis, a multiple of `heads`.
        - `heads`: how many heads of queries.
        - `kv_heads`: how many heads of keys and values, a divisor of `heads`; by default `heads`.
        - `scale`: of the weights of the last map, see [`rinsx.nn.Linear`][].
        - `key`: for the weights.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or width % heads != 0:
            raise ValueError(f"`width` must be a multiple of `heads`; got width={width} and heads={heads}.")
        if kv_heads < 1 or heads % kv_heads != 0:
            raise ValueError(f"`kv_heads` must divide `heads`; got kv_heads={kv_heads} and heads={heads}.")
        keys = jr.split(key, 4)
        self.head_dim = width // heads
        self.q = Linear(width, width, key=keys[0])
        self.k = Linear(width, kv_heads * self.head_dim, key=keys[1])
        self.v = Linear(width, kv_heads * self.head_dim, key=keys[2])
        self.out = Linear(width, width, scale=scale, key=keys[3])
        self.heads = heads
        self.kv_heads = kv_heads

    def __call__(
        self,
        x: Float[Array, "batch t width"],
        *,
        rotary: Rotary | None = None,
        segments: Segments | None = None,
    ) -> Float[Array, "batch t width"]:
        """**Arguments:**

        - `x`: one vector for each position.
        - `rotary`: of [`rinsx.nn.rotary`][], for heads of size `head_dim`. By default positions are not encoded.
        - `segments`: the document of each position; attention stays within it.

        **Returns:**

        An array like `x`.
        """
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim).swapaxes(1, 2)
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        if rotary is not None:
            turns = Rotary(*(jnp.expand_dims(a, -3) for a in rotary))
            q, k = rotate(q, turns), rotate(k, turns)
        out = causal_attention(q, k, v, segments)
        return self.out(out.swapaxes(1, 2).reshape(x.shape))
