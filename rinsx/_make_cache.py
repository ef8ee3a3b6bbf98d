"""Makes a cache for a recursion."""

from typing import Any

from jaxtyping import PyTree

from ._cache import Cache
from ._new_cache import new_cache
from ._program import Builder
from ._recur import Recursion, splice


def make(
    recursion: Any,
    x: PyTree,
    capacity: int | None,
    *args: Any,
    chunk: int | None = None,
    piece: int = 128,
    aligned: bool = False,
    separate: bool = False,
    unfilled: str = "fill",
    trusted: bool = False,
    stops: bool = False,
    **kwargs: Any,
) -> Cache:
    """An empty cache for a recursion whose blocks attend by the handle of [`rinsx.cache.open`][].

    Under `jax.eval_shape` it allocates nothing, and [`rinsx.flops.nbytes`][] of the result is what it would take.

    !!! example

        ```python
        import equinox as eqx
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        make = lambda key: rx.nn.TransformerLayer(16, heads=2, hidden=32, key=key)
        early, late = (rx.nn.Stack.make(make, 2, key=key) for key in jr.split(jr.key(0)))
        body = rx.compose("A^r B", {"A": early, "B": late}, r=rx.Loop(2, cache=rx.cache.First()))
        x = jnp.ones((1, 5, 16))
        cache = rx.cache.make(body, x[:, :1], 32)
        state = body(rx.cache.Stream(x, cache.begin(5)))
        cache = state.cache.advance(5)
        shapes = eqx.filter_eval_shape(rx.cache.make, body, x[:, :1], 32)
        rx.flops.nbytes(shapes.keys)  # 4 slots x 32 positions x 16 numbers x 4 bytes = 8192
        ```

    **Arguments:**

    - `recursion`: of [`rinsx.compose`][]. Its loops' `cache=` policies and maxima decide how many slots there are.
    - `x`: a state of one position for every sequence, arrays or `jax.ShapeDtypeStruct`s with the batch first: `[batch, 1, width]`.
    - `capacity`: how many positions there is room for. `None` where every block that attends has a window.
    - `args`, `kwargs`: side inputs for one position, as the recursion takes them.
    - `chunk`: how many positions are read at once; by default 128 on CPU and 1024 elsewhere. A capacity of more than one chunk is
        rounded up to whole chunks. Reverse mode needs a chunk of at least the capacity.
    - `piece`: how many new positions a forward pass may have at most, where a block has a window.
    - `aligned`: promise that all sequences have the same length at any time: then writing is cheaper.
    - `separate`: one array for each slot of visits that are known when the program is compiled, which are then unrolled; blocks in
        loops whose rounds are run-time values keep one array. Fastest on CPU.
    - `unfilled`: what tokens leave in the slots of rounds that they were not run for: `"fill"`, the keys and values of their
        last round; `"mask"`, nothing, so that later tokens that run deeper do not see them there.
    - `trusted`: promise that the capacity is never passed, that `advance` is given at most the positions of the pass, and `rewind`
        at most what is filled: then none of it is checked when the program runs, which takes time.
    - `stops`: for [`rinsx.generate.Until`][]: sequences may stop before the last round.

    **Returns:**

    A cache. `rx.cache.Stream(x, cache.begin(t))` is the state for the recursion, `state.cache.advance(t)` the cache behind it.

    **Raises:**

    `ValueError` if no block attends, if one attends more than once a visit, and if a loop has no maximum.
    """
    if not isinstance(recursion, Recursion):
        raise TypeError(
            f"a cache is made for what rx.compose, rx.recur or rx.chain have made; got a {type(recursion).__name__}"
        )
    builder = Builder()
    program = splice(recursion, builder)
    return new_cache(
        builder,
        program,
        x,
        capacity,
        args,
        kwargs,
        chunk=chunk,
        piece=piece,
        aligned=aligned,
        separate=separate,
        unfilled=unfilled,
        trusted=trusted,
        stops=stops,
    )
