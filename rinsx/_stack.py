"""A stack of equal layers, each with its own weights, compiled once."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from ._handle import Stream
from ._line import handed_back
from ._unroll import unrolls
from ._visit import as_state, checked
from .gradient import AbstractStorage, Full


class Stack(eqx.Module):
    """Applies layers of equal structure one after the other, their parameters stacked along a new first axis.

    A stack is a block. However many layers it has, one of them is compiled, and scanned over the stacked
    parameters; a few layers are unrolled where that is faster.

    !!! example

        ```python
        import equinox as eqx
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        keys = jr.split(jr.key(0), 6)
        block = rx.nn.Stack([eqx.nn.MLP(8, 8, 16, 1, key=key) for key in keys])
        block(jnp.ones(8))
        ```
    """

    layers: PyTree
    """One layer whose arrays have a first axis of length `depth`; or a tuple of layers, once `apart` has been called."""
    depth: int = eqx.field(static=True)
    """How many layers there are."""
    gradient: AbstractStorage | None
    unroll: bool | None = eqx.field(static=True)

    def __init__(
        self,
        layers: Sequence[Callable],
        *,
        gradient: AbstractStorage | None = None,
        unroll: bool | None = None,
    ):
        """**Arguments:**

        - `layers`: at least one block; all of one structure, with arrays of the same shapes and dtypes.
        - `gradient`: what is stored of each layer for the backward pass, [`rinsx.gradient.Full`][] (the default) or
            [`rinsx.gradient.Remat`][]. A stack inside a rolled loop is rematerialised as a whole already.
        - `unroll`: `True` repeats the program for every layer, `False` scans. By default chosen by backend and size.
        """
        if not layers:
            raise ValueError("Stack needs at least one layer")
        arrays, rest = zip(*(eqx.partition(layer, eqx.is_array) for layer in layers))
        for i, layer in enumerate(layers[1:], 1):
            if not eqx.tree_equal(_structure(layers[0]), _structure(layer)):
                show = lambda layer: eqx.tree_pformat(layer, short_arrays=True)
                raise ValueError(
                    f"Stack needs layers of one structure, but layer {i} is {show(layer)} and layer 0 is {show(layers[0])}"
                    " (functions in them must be the same object)"
                )
        stacked = jtu.tree_map(lambda *leaves: jnp.stack(leaves), *arrays)
        self.layers = eqx.combine(stacked, rest[0])
        self.depth = len(layers)
        self.gradient = gradient
        self.unroll = unroll

    def __call__(self, state: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        """Applies the layers in order.

        **Arguments:**

        - `state`: any pytree of arrays, whose structure, shapes and dtypes every layer keeps.
        - `args`, `kwargs`: side inputs, passed to every layer as they are. A `key=` is folded with the layer's number.

        **Returns:**

        The state after the last layer.
        """
        storage = Full() if self.gradient is None else self.gradient
        state = as_state(state)
        unroll = unrolls(self.depth, state) if self.unroll is None else self.unroll
        cached = isinstance(state, Stream)
        if cached and not state.cache.whole:
            unroll = state.cache.separate or bool(self.unroll)
        # What has no axis is not stacked: a number of rounds that was set for all layers at once.
        arrays, rest = eqx.partition(self.layers, lambda x: eqx.is_array(x) and x.ndim > 0)
        key = kwargs.get("key")

        def layer(state, i, arrays, rest):
            module: Any = eqx.combine(arrays, rest)
            more = kwargs if key is None else {**kwargs, "key": jr.fold_in(key, i)}
            what = f"layer {type(module).__name__} of a stack"
            if not cached:
                return checked(state, module(state, *args, **more), what)
            given = Stream(state.x, state.cache.inside(i, self.depth))
            after = checked(given, handed_back(module(given, *args, **more), what), what)
            return Stream(after.x, after.cache.outside(state.cache))

        def out(state):
            return Stream(state.x, state.cache.all_done()) if cached else state

        if isinstance(self.layers, tuple):
            apply = storage.wrap(layer, rolled=False)
            for i in range(self.depth):
                state = apply(state, i, arrays[i], rest[i])
            return out(state)
        apply = storage.wrap(lambda state, i, arrays: layer(state, i, arrays, rest), rolled=not unroll)
        if unroll:
            for i in range(self.depth):
                state = apply(state, i, jtu.tree_map(lambda x: x[i], arrays))
            return out(state)
        step = lambda state, x: (apply(state, *x), None)
        return out(lax.scan(step, state, (jnp.arange(self.depth, dtype=jnp.int32), arrays))[0])

    def apart(self) -> "Stack":
        """The stack with each layer's arrays by themselves, unrolled: decoding reads them without cutting them out each time."""
        if isinstance(self.layers, tuple):
            return self
        arrays, rest = eqx.partition(self.layers, lambda x: eqx.is_array(x) and x.ndim > 0)
        layers = tuple(eqx.combine(jtu.tree_map(lambda x: x[i], arrays), rest) for i in range(self.depth))
        return eqx.tree_at(lambda stack: stack.layers, self, layers)

    @staticmethod
    def make(
        layer: Callable[[PRNGKeyArray], Callable],
        depth: int,
        *,
        key: PRNGKeyArray | Key[Array, "depth"],
        **options: Any,
    ) -> "Stack":
        """Makes the layers all at once: the same as `Stack([layer(k) for k in jr.split(key, depth)])`, and faster.

        **Arguments:**

        - `layer`: a function from a key to a layer.
        - `depth`: how many layers.
        - `key`: split into one for each layer; or an array of `depth` keys, one for each.
        - `options`: `gradient` and `unroll`, as above.

        **Returns:**

        A stack.
        """
        if depth < 1:
            raise ValueError(f"Stack needs at least one layer, got depth={depth}")
        # A raw key, such as that of `jr.PRNGKey`, has a shape of its own.
        many = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == (depth,)
        keys = key if many else jr.split(key, depth)
        shell = eqx.filter_eval_shape(lambda: Stack([layer(keys[0])] * depth, **options))
        return eqx.tree_at(lambda stack: stack.layers, shell, eqx.filter_vmap(layer)(keys))


def _structure(layer: PyTree) -> PyTree:
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x, layer)
