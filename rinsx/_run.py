"""Runs a program whose numbers of rounds are Python integers; JAX differentiates it in every mode.

A loop is unrolled, with everything stored; or rolled into a `lax.scan`, with the input of each visit stored and the rest
computed again when its gradient is due, and its last rounds behind the scan, with everything stored. The way back begins
with these, so that what they store is gone before the first round is computed again. A loop whose number of rounds is
traced is handed to `_tape.py`.
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
from ._unroll import kept, unrolls
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

    def between(low, high, env, entry, state, differentiated=True):
        if _observe.active():
            state, seen = _observe.named(state)
            for i in range(low, high):
                state, seen = _observe.round_ends(node, env, i, seen, one(env, entry, form, state, i))
            return state
        if high - low > 1 and not _unrolls(node, high - low, state, env, form):
            start, low = low, high - (_kept(node, high - low, env, form) if differentiated else 0)
            if low - start == 1:
                # XLA inlines a loop of one round, and would store everything of it.
                state = one(env, entry, form._replace(storage=Remat()), state, start)
            else:
                inner = form._replace(rolled=True)
                step = lambda state, i: (one(env, entry, inner, state, i), None)
                state = lax.scan(step, state, jnp.arange(start, low, dtype=jnp.int32))[0]
        for i in range(low, high):
            state = one(env, entry, form, state, i)
        return state

    last = last_of(node, env)
    if last is None or total <= last:
        return finish(between(node.first, total, env, entry, state), place, node, env, total)
    # What comes before the last rounds is made of constants, so that nothing of it is stored; stopping the gradient
    # of its result alone would still store it.
    start = max(total - last, node.first)
    state = between(node.first, start, stop_gradient(env), stop_gradient(entry), stop_gradient(state), False)
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
    return not form.rolled and unrolls(rounds * _visits(node, env), state)


def _kept(node: Rounds, rounds: int, env: Env, form: Form) -> int:
    """How many of the last rounds of a rolled loop stand behind it, unless its options or a cache say how it is run."""
    loop = loop_of(node, env)
    chosen = form.rolled or form.storage is not None or (loop is not None and loop.unroll is not None)
    if chosen or not (env.layout is None or env.layout.whole):
        return 0
    return kept(rounds, _visits(node, env))


def _visits(node: Rounds, env: Env) -> int:
    """The number of layers that a round visits."""
    depths = [block.depth if isinstance(block, Stack) else 1 for block in env.blocks]
    return sum(depth * visits for depth, visits in zip(depths, tally(node.body, env).visits))  # pyright: ignore[reportReturnType]
