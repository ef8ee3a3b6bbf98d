"""Attention over keys and values that are all there."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._check import at_least


Segments = Int[Array, "*batch t"]


def visible(
    queries: Int[Array, "... t"], keys: Int[Array, "... s"], window: int | None = None
) -> Bool[Array, "... t s"]:
    """Which positions of keys each position of queries attends to: itself and earlier ones, at most `window` of them."""
    queries, keys = queries[..., :, None], keys[..., None, :]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def attention(
    q: Float[Array, "*batch heads t dim"],
    k: Float[Array, "*batch groups s dim"],
    v: Float[Array, "*batch groups s dim"],
    segments: Segments | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> Float[Array, "*batch heads t dim"]:
    """Attention of every position to itself and to earlier ones, or to all, of the same segment.

    On a GPU, in bfloat16 or float16, this is the flash kernel of `jax.nn.dot_product_attention`, for more than one query and
    heads of a size that it takes (a multiple of 8, at most 128). Elsewhere it is written out, with scores in float32, the form
    that measures fastest on CPU (see the results on training speed).

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        q = jnp.ones((1, 4, 6, 8))  # 4 heads
        k = v = jnp.ones((1, 2, 6, 8))  # 2 heads of keys and values, each for 2 heads of queries
        rx.nn.attention(q, k, v).shape  # (1, 4, 6, 8)
        rx.nn.attention(q[:, :, :1], k, v, causal=False).shape  # (1, 4, 1, 8): one query looks at all positions
        ```

    **Arguments:**

    - `q`: queries.
    - `k`, `v`: keys and values; `heads` is a multiple of `groups`, and heads `i * heads / groups, ...` use group `i`.
    - `segments`: the document that each position belongs to. By default all is one.
    - `causal`: whether a position attends to itself and earlier ones only. Otherwise `s` may differ from `t`, without `segments`.
    - `window`: where it is causal, attend to the last `window` positions only, oneself included.

    **Returns:**

    An array like `q`.
    """
    *lead, heads, t, dim = q.shape
    groups, s = k.shape[-3:-1]
    if heads % groups != 0:
        raise ValueError(f"{heads} heads of queries cannot share {groups} heads of keys and values evenly.")
    if s != t and (causal or segments is not None):
        raise ValueError(f"causal attention, and `segments`, need as many queries as keys; got {t} and {s}.")
    if window is not None:
        at_least(1, window=window)
        if not causal:
            raise ValueError(f"a window reaches back from a position: it needs causal=True; got window={window}.")
    if len(lead) != 1:
        # A block may map over its batch.
        one = lambda x: None if x is None else x.reshape(-1, *x.shape[len(lead) :])
        return attention(*map(one, (q, k, v, segments)), causal=causal, window=window).reshape(q.shape)  # pyright: ignore
    (batch,) = lead
    # The kernel gains nothing for a single query, and wants it sharded as the keys are.
    flash = t > 1 and dim % 8 == 0 and dim <= 128
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and flash:
        return _kernel(q, k, v, segments, causal, window)

    same = None if segments is None else _same(segments, segments)
    grouped = (q * dim**-0.5).reshape(batch, groups, heads // groups * t, dim)
    scores = jnp.einsum("bgtd,bgsd->bgts", grouped, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    mask = same if same is None else same[:, :, None]
    if causal:
        at = jnp.arange(t)
        earlier = visible(at, at, window)
        mask = earlier if mask is None else mask & earlier
    if mask is not None:
        scores = scores.reshape(batch, groups, heads // groups, t, s)
        scores = jnp.where(mask, scores, -jnp.inf).reshape(batch, groups, heads // groups * t, s)
    # Divided by its sum after the product with the values, not before: one pass less over all pairs.
    weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    whole = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bgts,bgsd->bgtd", weights.astype(v.dtype), v, preferred_element_type=whole.dtype)
    return (out / whole).reshape(batch, heads, t, dim).astype(q.dtype)


def _same(queries: Segments, keys: Segments) -> Bool[Array, "batch 1 t s"]:
    """Which keys are of the document of a query."""
    return queries[:, None, :, None] == keys[:, None, None, :]


def _kernel(q, k, v, segments, causal: bool, window: int | None, implementation: Any = "cudnn"):
    """The same by the flash kernel. Its gradient wants an even number of positions: an odd one is filled up by one that
    nobody sees."""
    t, s = q.shape[2], k.shape[2]
    fill = lambda x, axis, value=0: jnp.pad(
        x, [(0, x.shape[i] % 2 if i == axis else 0) for i in range(x.ndim)], constant_values=value
    )
    mask = None
    if segments is not None:
        segments = fill(segments, 1, -1)
        mask = _same(segments, segments)
    elif s % 2 and not causal:
        mask = jnp.broadcast_to(jnp.arange(s + 1) < s, (1, 1, t + t % 2, s + 1))
    swap = lambda x: fill(x, 2).swapaxes(1, 2)
    out = jax.nn.dot_product_attention(
        swap(q),
        swap(k),
        swap(v),
        mask=mask,
        is_causal=causal,
        # The window of JAX does not count oneself.
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out.swapaxes(1, 2)[:, :, :t]
