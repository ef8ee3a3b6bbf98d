"""Runs a program whose numbers of rounds are Python integers; JAX differentiates it in every mode.

A loop is rolled into a `lax.scan`, with the input of each visit stored and the rest computed again when its
gradient is due, or unrolled. A loop whose number of rounds is traced is handed to `_tape.py`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from . import _observe, _tape
from ._declare import loops
from ._lines import behind, finish, in_round, taken
from ._program import (
    Env,
    is_static,
    last_of,
    loop_of,
    loops_in,
    number_of_rounds,
    opens,
    Place,
    Program,
    Rounds,
    Seq,
    tally,
    Visit,
)
from ._stack import Stack
from ._unroll import unrolls
from ._visit import apply, begin, Opening, stop_gradient, without_cache
from .gradient import AbstractStorage, Full, Remat


class Form(NamedTuple):
    """What the loops around have settled: what is stored of each visit, and whether the program is rolled."""

    storage: AbstractStorage | None = None
    rolled: bool = False


_UNSETTLED = Form()


def run(
    node: Program,
    state: PyTree,
    place: Place,
    env: Env,
    form: Form = _UNSETTLED,
    opening: Opening | None = None,
) -> PyTree:
    """The state after `node`."""
    if isinstance(node, Visit):
        storage = form.storage or (Remat() if form.rolled else Full())
        return storage.wrap(lambda state: apply(node, state, place, env, opening), form.rolled)(state)
    if isinstance(node, Seq):
        for part in node.parts:
            state = run(part, state, place, env, form, opening)
            place = behind(place.after(tally(part, env)), part, env)
            opening = None
        return state
    if not is_static(node, env):
        _observe.refuse(node, env)
        with loops(_traced(node, env)):
            return _tape.run(node, state, place, env)
    return _run_rounds(node, state, place, env, form)


def _traced(node: Program, env: Env) -> list[str]:
    """The names of the loops in `node` whose number of rounds is a run-time value."""
    found = (loop_of(part, env) for part in loops_in(node))
    return [loop.name or "rounds" for loop in found if loop is not None and not loop.static]


def _run_rounds(node: Rounds, state: PyTree, place: Place, env: Env, form: Form) -> PyTree:
    loop = loop_of(node, env)
    total: int = number_of_rounds(node, env)  # pyright: ignore[reportAssignmentType]
    if loop is not None and loop.gradient is not None and loop.gradient.storage is not None:
        form = form._replace(storage=loop.gradient.storage)
    each = tally(node.body, env)
    entry = without_cache(state)
    inside = place.entered(node.loop)
    if node.first == 0:
        state = begin(node.loop, state, place, env)

    def one(env, entry, form, state, i):
        opening = Opening(node.loop, i, entry) if opens(loop) else None  # pyright: ignore[reportArgumentType]
        at = in_round(inside.after(each, i - node.first), node, env, i)
        return run(node.body, state, at, env, form, opening)

    def between(low, high, env, entry, state):
        if _observe.active():
            state, seen = _observe.named(state)
            for i in range(low, high):
                state, seen = _observe.round_ends(node, env, i, seen, one(env, entry, form, state, i))
            return state
        unroll = high - low <= 1 or _unrolls(node, high - low, state, env, form)
        inner = form._replace(rolled=form.rolled or not unroll)
        if unroll:
            for i in range(low, high):
                state = one(env, entry, inner, state, i)
            return state
        step = lambda state, i: (one(env, entry, inner, state, i), None)
        return lax.scan(step, state, jnp.arange(low, high, dtype=jnp.int32))[0]

    last = last_of(node, env)
    if last is None or total <= last:
        return finish(between(node.first, total, env, entry, state), place, node, env, total)
    # What comes before the last rounds is made of constants, so that nothing of it is stored; stopping the gradient
    # of its result alone would still store it.
    start = max(total - last, node.first)
    state = between(node.first, start, stop_gradient(env), stop_gradient(entry), stop_gradient(state))
    return finish(between(start, total, env, entry, stop_gradient(state)), place, node, env, total)


def _unrolls(node: Rounds, rounds: int, state: PyTree, env: Env, form: Form) -> bool:
    """Whether rounds of a loop are unrolled: as its cache demands, as its options say, or as measures best."""
    loop = loop_of(node, env)
    shelves = () if env.layout is None or env.layout.whole else env.layout.shelves
    if shelves and any(s is not None and s.separate and n for s, n in zip(shelves, taken(node.body, env))):
        return True
    if loop is not None and loop.unroll is not None:
        return loop.unroll
    if shelves:
        return False
    depths = [block.depth if isinstance(block, Stack) else 1 for block in env.blocks]
    visits = rounds * sum(depth * visits for depth, visits in zip(depths, tally(node.body, env).visits))
    return not form.rolled and unrolls(visits, state)  # pyright: ignore[reportArgumentType]
