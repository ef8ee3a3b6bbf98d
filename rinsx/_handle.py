"""What a block attends with: the same code trains, prefills and decodes."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._attend import attention, Segments, visible


Heads = Float[Array, "*batch heads t dim"]
Groups = Float[Array, "*batch groups t dim"]
Chunk = Callable[[PyTree, Array, Array, Bool[Array, "*#batch t s"]], PyTree]


class AbstractHandle(eqx.Module):
    """How a block reaches the keys and values of earlier tokens at this visit.

    In training it is [`rinsx.cache.Plain`][]: all tokens are there, and nothing is kept. In decoding it writes into the slot
    of the visit, and reads from it. A block gets it from [`rinsx.cache.open`][], and never asks which it is.
    """

    @abc.abstractmethod
    def attend(
        self,
        q: Heads,
        k: Groups,
        v: Groups,
        *,
        segments: Segments | None = None,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Heads, "AbstractHandle"]:
        """Appends keys and values, and attends to all of this visit, each position to itself and earlier ones.

        Without `causal` each position attends to all, as in an encoder: nothing is kept then, and there is no decoding.

        **Arguments:**

        - `q`: `[*batch, heads, t, dim]`, of the next `t` positions.
        - `k`, `v`: `[*batch, groups, t, dim]`; `heads` is a multiple of `groups`.
        - `segments`: the document of each position, in training; attention stays within it.
        - `causal`: whether a position attends to itself and earlier ones only.
        - `window`: attend to the last `window` positions only, oneself included.

        **Returns:**

        An array like `q`, and the handle to go on with.
        """

    @abc.abstractmethod
    def append(self, k: Groups, v: Groups, *, window: int | None = None) -> "AbstractHandle":
        """The handle with keys and values of the next `t` positions: for blocks that do their own attention maths, with `fold`."""

    @abc.abstractmethod
    def fold(self, step: Chunk, carry: PyTree, *, window: int | None = None) -> PyTree:
        """Goes through all keys and values of this visit in chunks.

        **Arguments:**

        - `step`: `(carry, k, v, visible) -> carry`, with `k` and `v` of shape `[*batch, groups, s, dim]`, and `visible`: whether each
            of the `t` positions appended last may see each of the `s` of this chunk. It broadcasts against `[*batch, t, s]`, and is
            `[t, s]` where that is the same for all sequences, as in training: for heads, write `visible[..., None, :, :]`.
        - `carry`: what to begin with.
        - `window`: as given to `append`.
        """

    @abc.abstractmethod
    def positions(self, t: int) -> Int[Array, "*batch t"]:
        """The positions of the next `t` tokens, counted from 0; for `Plain` of shape `[t]`."""

    @abc.abstractmethod
    def close(self, x: PyTree) -> PyTree:
        """The state with `x` in place of what [`rinsx.cache.open`][] gave."""


class Plain(AbstractHandle):
    """Attention over the tokens that are given, as in training: nothing is kept from call to call.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        q = k = v = jnp.ones((1, 2, 6, 8))
        out, _ = rx.cache.Plain().attend(q, k, v)
        ```
    """

    keys: Any = None
    values: Any = None

    def attend(self, q, k, v, *, segments=None, causal=True, window=None):
        return attention(q, k, v, segments, causal=causal, window=window), self

    def append(self, k, v, *, window=None):
        return Plain(k, v)

    def fold(self, step, carry, *, window=None):
        if self.keys is None:
            raise ValueError("nothing to go through: call append(k, v) first, and fold on the handle that it returns")
        at = jnp.arange(self.keys.shape[-2])
        return step(carry, self.keys, self.values, visible(at, at, window))

    def positions(self, t):
        return jnp.arange(t)

    def close(self, x):
        return x


def only_causal(causal: bool) -> None:
    """Refuses to keep what encoders attend to."""
    if not causal:
        raise ValueError(
            "only causal attention keeps keys and values, for later tokens or rounds: a block that attends with causal=False "
            "takes no cache, and its loop no policy."
        )


class Stream(eqx.Module):
    """A state with a cache riding in it. Adapters, injections and starts act on `x`.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        body = rx.recur(rx.nn.Attention(8, heads=2, key=jr.key(0)), 2)
        x = jnp.ones((1, 3, 8))
        cache = rx.cache.make(body, x[:, :1], 16)
        state = body(rx.cache.Stream(x, cache.begin(3)))
        state.x, state.cache.advance(3)
        ```

    **Arguments:**

    - `x`: what blocks compute on.
    - `cache`: a [`rinsx.cache.Cache`][] that has begun a forward pass.
    """

    x: PyTree
    cache: Any


def open(state: PyTree) -> tuple[PyTree, AbstractHandle]:
    """What a block computes on, and the handle that it attends with.

    !!! example

        ```python
        import equinox as eqx
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        class OneHead(eqx.Module):
            project: rx.nn.Linear

            def __call__(self, state, *, key=None):
                x, cache = rx.cache.open(state)
                q, k, v = jnp.split(self.project(x)[:, None], 3, axis=-1)
                out, cache = cache.attend(q, k, v)
                return cache.close(x + out[:, 0])

        block = OneHead(rx.nn.Linear(8, 24, key=jr.key(0)))
        rx.recur(block, 2)(jnp.ones((1, 5, 8))).shape  # (1, 5, 8)
        ```

    **Arguments:**

    - `state`: what the block was given: an array or any pytree without a cache, as in training, or a state with a cache.

    **Returns:**

    The state without its cache, and a handle. `handle.close(x)` is the state to return.
    """
    if isinstance(state, Stream):
        if not isinstance(state.cache, AbstractHandle):
            raise ValueError("this state has a cache, but no visit: call the recursion that the cache was made for")
        return state.x, state.cache
    return state, Plain()
