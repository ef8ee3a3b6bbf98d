"""What happens at one visit: the round opens, the block is applied, the state is checked."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import PyTree

from . import start as starts
from ._handle import Stream
from ._line import after_visit, at_visit, handed_back
from ._program import Count, Env, Place, Visit


class Opening(NamedTuple):
    """The beginning of a round: of which loop, which round, and the state that the loop was entered with."""

    loop: int
    round: Count
    entry: PyTree


def as_state(state: PyTree) -> PyTree:
    """The state with arrays for leaves, none of them weakly typed, so that it keeps its types from round to round."""

    def strong(path, leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        if not eqx.is_array_like(leaf):
            where = jtu.keystr(path) or "itself"
            raise TypeError(f"a state holds arrays only, but its leaf {where} is {leaf!r}: pass it as a side input")
        return lax.convert_element_type(leaf, jnp.result_type(leaf))

    return jtu.tree_map_with_path(strong, state)


def checked(before: PyTree, after: PyTree, what: str) -> PyTree:
    """`after` as a state; an error that prints both unless its structure, shapes and dtypes are those of `before`."""
    abstract = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) if eqx.is_array_like(x) else x
    given, returned = jtu.tree_map(abstract, before), jtu.tree_map(abstract, after)
    if jtu.tree_structure(given) != jtu.tree_structure(returned) or not eqx.tree_equal(given, returned):
        show = lambda struct: eqx.tree_pformat(struct, struct_as_array=True)
        raise ValueError(
            f"{what} must keep the structure, shapes and dtypes of its state: it was given {show(given)} and returned "
            f"{show(returned)}"
        )
    return as_state(after)


def inexact(tree: PyTree) -> PyTree:
    """The differentiable part of a tree."""
    return eqx.filter(tree, eqx.is_inexact_array)


def stop_gradient(tree: PyTree) -> PyTree:
    """`tree` as a constant."""
    return jtu.tree_map(lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def _on(loop, state: PyTree) -> PyTree:
    if isinstance(state, Stream):
        state = state.x
    return state if loop.on is None else loop.on(state)


def _put(loop, state: PyTree, part: PyTree) -> PyTree:
    if isinstance(state, Stream):
        return Stream(_put(loop, state.x, part), state.cache)
    return part if loop.on is None else eqx.tree_at(loop.on, state, part)


def without_cache(state: PyTree) -> PyTree:
    """The state as it is kept while rounds run: an old cache that is kept could not be written in place."""
    return Stream(state.x, None) if isinstance(state, Stream) else state


def begin(loop_number: int | None, state: PyTree, place: Place, env: Env) -> PyTree:
    """The state that the first round of a loop starts from, given the state that the loop is entered with."""
    loop: Any = None if loop_number is None else env.loops[loop_number]
    if loop_number is None or not has_start(loop):
        return state
    start = starts.Zeros() if loop.start is None else loop.start
    key = None
    if env.key is not None:
        # Counted down from the top, apart from the blocks, which are counted up.
        key = jr.fold_in(jr.fold_in(env.key, 2**32 - 1 - loop_number), place.entries[loop_number])
    given = _on(loop, state)
    with jax.named_scope(f"{loop.name}.start"):
        return _put(loop, state, checked(given, start(given, key), f"the start of loop {loop.name}"))


def has_start(loop) -> bool:
    """Whether a loop starts from something else than its input. Where an injection brings the input in, it starts from zeros."""
    return loop is not None and (loop.start is not None or loop.inject is not None)


def apply(node: Visit, state: PyTree, place: Place, env: Env, opening: Opening | None) -> PyTree:
    """The state after one visit, `opening` the round first where the visit is its first."""
    if opening is not None:
        state = _open(state, opening, env)
    if node.block is None:
        return state
    block: Any = env.blocks[node.block]
    kwargs = env.kwargs
    if env.key is not None:
        kwargs = {**kwargs, "key": jr.fold_in(jr.fold_in(env.key, node.block), place.visits[node.block])}
    name = env.names[node.block]
    with jax.named_scope(name):
        if place.lines is None:
            return checked(state, block(state, *env.args, **kwargs), f"block {name}")
        first, before, writes = place.lines
        before = None if before is None else before[node.block]
        state = at_visit(state, node.block, first[node.block], before, writes)
        after = handed_back(block(state, *env.args, **kwargs), f"block {name}")
        return after_visit(checked(state, after, f"block {name}"))


def _open(state: PyTree, opening: Opening, env: Env) -> PyTree:
    loop: Any = env.loops[opening.loop]
    part = _on(loop, state)
    if loop.inject is not None:
        with jax.named_scope(f"{loop.name}.inject"):
            new = loop.inject(part, _on(loop, opening.entry), opening.round)
            part = checked(part, new, f"the injection of loop {loop.name}")
    if loop.adapter is not None:
        with jax.named_scope(f"{loop.name}.adapter"):
            part = checked(part, loop.adapter(part, opening.round), f"the adapter of loop {loop.name}")
    return _put(loop, state, part)
