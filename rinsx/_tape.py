"""Runs a loop whose number of rounds is a traced integer: in one executable, doing only the work of the rounds asked for.

Forward, it is a `while` loop. In reverse mode, one `custom_vjp` stands around the whole loop with everything nested in
it. Its forward pass writes the state before each visit to a tape, one slot a visit; its backward pass walks the same
program from the end, reads the state, and computes the visit again with its pullback. The last visit stands behind the
`while` loop, and keeps its pullback: the way back begins with it, so nothing is gained by computing it again. So a gradient
costs what the static rematerialised form costs less one visit forwards, at any degree of nesting, and its memory is that
of the saved states and of what one visit stores.

A slot is the place of a visit in the program: strides come from the maxima, so that no slot moves with the rounds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from ._declare import trips
from ._handle import Stream
from ._lines import behind, finish, in_round
from ._loop import limit
from ._program import (
    Count,
    Env,
    last_of,
    loop_of,
    number_of_rounds,
    opens,
    Place,
    Program,
    restrict,
    Rounds,
    Seq,
    tally,
    Visit,
)
from ._visit import apply, begin, has_start, inexact, Opening, without_cache
from .gradient import Full


def run(node: Rounds, state: PyTree, place: Place, env: Env) -> PyTree:
    """The state after `node`."""
    _check(node, env)
    return _taped((restrict(node, env), state), node, place)


@eqx.filter_custom_vjp
def _taped(diff, node, place):
    env, state = diff
    env, _ = _in_range(env, taped=False)
    (state, _), _ = _forward(node, (state, None), place, env)
    return state


@_taped.def_fwd
def _taped_fwd(perturbed, diff, node, place):
    env, state = diff
    env, wrong = _in_range(env, taped=True)
    start = dataclasses.replace(place, slot=0)
    # One slot at least, since a loop of no rounds is traced all the same. Broadcast, not zeros: it keeps the
    # sharding of the state, and works for PRNG keys.
    slots = max(_slots(node, env), 1)
    tape = jtu.tree_map(lambda x: jnp.broadcast_to(x, (slots, *x.shape)), state)
    (state, tape), pull = _forward(node, (state, tape), start, env, keep=_Halves(*eqx.partition(env, perturbed[0])))
    return _spoil(state, wrong), (tape, pull, wrong)


@_taped.def_bwd
def _taped_bwd(residuals, grad, perturbed, diff, node, place):
    tape, pull, wrong = residuals
    env, state = diff
    halves = _Halves(*eqx.partition(env, perturbed[0]))
    zero = lambda x, g: jnp.zeros_like(x) if g is None and x is not None else g
    grad = _spoil(jtu.tree_map(zero, inexact(state), grad, is_leaf=lambda x: x is None), wrong)
    start = dataclasses.replace(place, slot=0)
    zeros = jtu.tree_map(jnp.zeros_like, halves.diff)
    grad, grads, _ = _backward(node, grad, zeros, start, _Walk(halves, tape), None, pull)
    return grads, grad


class _Halves(eqx.Module):
    """The differentiated and the other half of the environment."""

    diff: Env
    rest: Env


#
# Forwards
#


def _forward(
    node: Program,
    carry: tuple[PyTree, PyTree],
    place: Place,
    env: Env,
    opening: Opening | None = None,
    keep: _Halves | None = None,
):
    """The state after `node`, and the tape with the states before each of its visits, if there is a tape.

    With `keep`, the last visit is not recorded: its pullback is returned too, unless `node` may be of no visits.
    """
    if isinstance(node, Visit):
        state, tape = carry
        if keep is None:
            return (apply(node, state, place, env, opening), _write(tape, place.slot, state)), None
        state, pull = _visit(node, state, place, keep, opening)
        return (state, tape), pull
    if isinstance(node, Seq):
        pull = None
        for i, part in enumerate(node.parts, start=1):
            carry, pull = _forward(part, carry, place, env, opening, keep if i == len(node.parts) else None)
            place = _after(part, place, env, carry[1] is not None)
            opening = None
        return carry, pull

    state, tape = carry
    loop = loop_of(node, env)
    total, kept = _kept(node, env)
    each = tally(node.body, env)
    inside = place.entered(node.loop)
    entry = without_cache(state) if _keeps_entry(node, env) else None
    if tape is None:
        kept, slots = total - node.first, 0
    else:
        slots = _slots(node.body, env)
        if entry is not None:
            tape = _write(tape, place.slot, state)
            inside = _skip(inside, 1)
    if node.first == 0:
        state = begin(node.loop, state, place, env)

    def one(carry, i, keep=None):
        opening = Opening(node.loop, i, entry) if opens(loop) else None  # pyright: ignore[reportArgumentType]
        at = in_round(inside.after(each, i - node.first, (i - (total - kept)) * slots), node, env, i)
        return _forward(node.body, carry, at, env, opening, keep)

    # Of rounds of which the host model runs the first, there may be none.
    apart = keep is not None and (total > node.first if isinstance(total, int) else node.first == 0)
    low, last = node.first, last_of(node, env)
    if tape is not None and last is not None:
        # Early rounds leave no trace: they run without the tape.
        low = total - kept
        early = trips_of(node, env, minus=last)
        state, _ = _repeat(node, env, node.first, low, lambda *at: one(*at)[0], (state, None), early)
    carry = state, tape
    if tape is None or _most_recorded(node, env) > apart:
        declared = trips_of(node, env) if tape is None else _recorded(node, env, apart)
        carry = _repeat(node, env, low, total - apart, lambda *at: one(*at)[0], carry, declared)
    (state, tape), pull = one(carry, total - 1, keep) if apart else (carry, None)
    return (finish(state, place, node, env, total), tape), pull


#
# Backwards
#


class _Walk(eqx.Module):
    """What the way back works with: the environment and the tape."""

    halves: _Halves
    tape: PyTree

    def env(self) -> Env:
        return eqx.combine(self.halves.diff, self.halves.rest)


def _backward(node: Program, grad, grads: Env, place: Place, walk: _Walk, opening: Opening | None, pull: Any = None):
    """Undoes `node`: the gradient of its input state, of the environment, and of the loop input that `opening` injects.

    The last visit's pullback is `pull`, if it was kept.
    """
    if isinstance(node, Visit):
        return _backward_visit(node, grad, grads, place, walk, opening, pull)
    if isinstance(node, Seq):
        places = [place]
        for part in node.parts[:-1]:
            places.append(_after(part, places[-1], walk.env(), True))
        for part, at in zip(node.parts[:0:-1], places[:0:-1]):
            grad, grads, _ = _backward(part, grad, grads, at, walk, None, pull)
            pull = None
        return _backward(node.parts[0], grad, grads, place, walk, opening)

    env = walk.env()
    loop: Any = loop_of(node, env)
    total, kept = _kept(node, env)
    each, slots = tally(node.body, env), _slots(node.body, env)
    inside = place.entered(node.loop)
    entered = entry = None
    if _keeps_entry(node, env):
        entered = _read(walk.tape, place.slot)
        entry = without_cache(entered)
        inside = _skip(inside, 1)

    def one(carry, j, pull=None):
        grad, grads, grad_entry = carry
        i = total - 1 - j
        at = in_round(inside.after(each, i - node.first, (kept - 1 - j) * slots), node, env, i)
        opening = Opening(node.loop, i, entry) if opens(loop) else None  # pyright: ignore[reportArgumentType]
        grad, grads, more = _backward(node.body, grad, grads, at, walk, opening, pull)
        return grad, grads, _add(grad_entry, more)

    last = last_of(node, env)
    grad_entry = None if entry is None else jtu.tree_map(jnp.zeros_like, inexact(entry))
    carry = grad, grads, grad_entry
    apart = pull is not None
    if apart:
        carry = one(carry, 0, pull)
    if _most_recorded(node, env) > apart:
        carry = _repeat(node, env, int(apart), kept, one, carry, _recorded(node, env, apart))
    grad, grads, grad_entry = carry
    if last is not None:
        cut = total > last
        grad = jtu.tree_map(lambda g: jnp.where(cut, jnp.zeros_like(g), g), grad)
    number = node.loop
    if number is not None and node.first == 0 and has_start(loop):
        halves = walk.halves
        given, kept_as = eqx.partition(entered, eqx.is_inexact_array)

        def start(part, given):
            env = _with_loop(halves.rest, number, eqx.combine(part, halves.rest.loops[number]))
            return inexact(begin(number, eqx.combine(given, kept_as), place, env))

        _, pull = jax.vjp(start, halves.diff.loops[number], given)
        part, grad = pull(grad)
        grads = _with_loop(grads, number, _add(grads.loops[number], part))
    if isinstance(grad, Stream) and grad_entry is not None:
        # What a loop is entered with is kept without its cache.
        grad_entry = Stream(grad_entry.x, jtu.tree_map(jnp.zeros_like, grad.cache))
    return _add(grad, grad_entry), grads, None


def _backward_visit(node: Visit, grad, grads: Env, place: Place, walk: _Walk, opening: Opening | None, pull: Any):
    if pull is None:
        with jax.named_scope("rematted_computation"):
            _, pull = _visit(node, _read(walk.tape, place.slot), place, walk.halves, opening)
    (of_block, of_loop, of_side), grad, grad_entry = pull(grad)
    if node.block is not None:
        grads = _with_block(grads, node.block, _add(grads.blocks[node.block], of_block))
    if opening is not None:
        grads = _with_loop(grads, opening.loop, _add(grads.loops[opening.loop], of_loop))
    args, kwargs = _add((grads.args, grads.kwargs), of_side)
    return grad, dataclasses.replace(grads, args=args, kwargs=kwargs), grad_entry


def _visit(node: Visit, state: PyTree, place: Place, halves: _Halves, opening: Opening | None):
    """The state after a visit, and its pullback: to what it uses of the environment, its state, and the loop's input."""
    given, kept_as = eqx.partition(state, eqx.is_inexact_array)
    entry = entry_kept = None
    if opening is not None:
        entry, entry_kept = eqx.partition(opening.entry, eqx.is_inexact_array)
    block, loop = node.block, None if opening is None else opening.loop
    diff, rest = halves.diff, halves.rest
    # Only what this visit uses is differentiated with it.
    parts = (
        None if block is None else diff.blocks[block],
        None if loop is None else diff.loops[loop],
        (diff.args, diff.kwargs),
    )

    def visit(parts, given, entry):
        env = rest
        if block is not None:
            env = _with_block(env, block, eqx.combine(parts[0], env.blocks[block]))
        if loop is not None:
            env = _with_loop(env, loop, eqx.combine(parts[1], env.loops[loop]))
        args, kwargs = eqx.combine(parts[2], (env.args, env.kwargs))
        env = dataclasses.replace(env, args=args, kwargs=kwargs)
        again = None if opening is None else opening._replace(entry=eqx.combine(entry, entry_kept))
        return eqx.partition(apply(node, eqx.combine(given, kept_as), place, env, again), eqx.is_inexact_array)

    after, pull, others = jax.vjp(visit, parts, given, entry, has_aux=True)
    return eqx.combine(after, others), pull


def _with_block(env: Env, number: int, value: Any) -> Env:
    blocks = (*env.blocks[:number], value, *env.blocks[number + 1 :])
    return dataclasses.replace(env, blocks=blocks)


def _with_loop(env: Env, number: Any, value: Any) -> Env:
    loops = (*env.loops[:number], value, *env.loops[number + 1 :])
    return dataclasses.replace(env, loops=loops)


def _add(a: PyTree, b: PyTree) -> PyTree:
    return a if b is None else jtu.tree_map(jnp.add, a, b)


#
# Loops and the tape
#


def trips_of(node: Rounds, env: Env, minus: int = 0, most: int | None = None):
    """Declares to the accounting how often the loop runs: its rounds less `minus`, at most `most`."""
    loop = loop_of(node, env)
    name = None if loop is None else loop.name
    return trips(name or "rounds", minus=node.first + minus, most=most)


def _recorded(node: Rounds, env: Env, apart: bool):
    """Declares the rounds that are recorded on the tape: without the last, if it stands `apart`."""
    last = last_of(node, env)
    return trips_of(node, env, minus=int(apart), most=None if last is None else last - apart)


def _repeat(node: Rounds, env: Env, low: Count, high: Count, one: Callable, carry: PyTree, declared) -> PyTree:
    """`carry = one(carry, i)` for `low <= i < high`, as a `scan` where both are known and as a `while` where not."""
    loop = loop_of(node, env)
    if isinstance(low, int) and isinstance(high, int):
        if high <= low:
            return carry
        if loop is not None and loop.unroll:
            for i in range(low, high):
                carry = one(carry, i)
            return carry
        return lax.scan(lambda c, i: (one(c, i), None), carry, jnp.arange(low, high, dtype=jnp.int32))[0]
    with declared:
        return lax.fori_loop(low, high, lambda i, c: one(c, i), carry)


def _kept(node: Rounds, env: Env) -> tuple[Count, Count]:
    """The number of rounds, and how many of those that run here are recorded."""
    total = number_of_rounds(node, env)
    last = last_of(node, env)
    run = total - node.first
    if last is None:
        return total, run
    return total, min(run, last) if isinstance(run, int) else jnp.minimum(run, last)


def _keeps_entry(node: Rounds, env: Env) -> bool:
    """Whether rounds, and the way back, need the state that the loop was entered with."""
    loop = loop_of(node, env)
    return loop is not None and node.first == 0 and has_start(loop)


def _slots(node: Program, env: Env) -> int:
    """How many states `node` records at most."""
    if isinstance(node, Visit):
        return 1
    if isinstance(node, Seq):
        return sum(_slots(part, env) for part in node.parts)
    return _most_recorded(node, env) * _slots(node.body, env) + _keeps_entry(node, env)


def _most_recorded(node: Rounds, env: Env) -> int:
    """How many rounds of a loop are recorded at most."""
    rounds = number_of_rounds(node, env)
    if not isinstance(rounds, int):
        loop: Any = loop_of(node, env)
        if loop.max is None:
            raise ValueError(
                f"reverse mode through a traced number of rounds needs a static maximum, the size of its tape: bind "
                f"{loop.name}=rx.Loop(..., max=...), or give {loop.name} as a Python integer"
            )
        rounds = loop.max
    last = last_of(node, env)
    run = max(rounds - node.first, 0)
    return run if last is None else min(run, last)


def _after(node: Program, place: Place, env: Env, recorded: bool) -> Place:
    return behind(place.after(tally(node, env), slots=_slots(node, env) if recorded else 0), node, env)


def _skip(place: Place, slots: int) -> Place:
    return dataclasses.replace(place, slot=place.slot + slots)


def _write(tape: PyTree, slot: Count, state: PyTree) -> PyTree:
    if tape is None:
        return None
    return jtu.tree_map(lambda t, x: lax.dynamic_update_index_in_dim(t, x, slot, 0), tape, state)


def _read(tape: PyTree, slot: Count) -> PyTree:
    return jtu.tree_map(lambda t: lax.dynamic_index_in_dim(t, slot, 0, keepdims=False), tape)


#
# Checks
#


def _check(node: Program, env: Env) -> None:
    """Refuses options that a traced number of rounds cannot honour."""
    if isinstance(node, Seq):
        for part in node.parts:
            _check(part, env)
    elif isinstance(node, Rounds):
        loop: Any = loop_of(node, env)
        if loop is not None:
            if loop.unroll and not loop.static:
                raise ValueError(
                    f"loop {loop.name} is traced and cannot be unrolled: give its rounds as a Python integer"
                )
            storage = None if loop.gradient is None else loop.gradient.storage
            if isinstance(storage, Full) or getattr(storage, "policy", None) is not None:
                raise ValueError(
                    f"loop {loop.name} cannot store {storage!r}: around a traced number of rounds only the inputs of "
                    "visits are stored. Leave gradient= out, give rx.gradient.Remat(), or give the rounds as a Python integer"
                )
        _check(node.body, env)


def _in_range(env: Env, taped: bool) -> tuple[Env, Array | None]:
    """The environment, with every traced number of rounds checked when the program runs.

    In one check, since each is a call back to the host that holds up the program. Loops wait for it, since their bounds
    come out of it. Where no loop is left, whether a number is wrong is returned: what is computed has to wait for that.
    """
    traced = [loop for loop in env.loops if loop is not None and not loop.static]
    wrong, messages = [], []
    for i, loop in enumerate(env.loops):
        if loop is None or loop.static:
            continue
        rounds: Any = loop.rounds
        most = limit(loop)
        wrong.append(rounds < 1)
        messages.append(f"{loop.name} must be at least 1 round")
        if most is not None:
            wrong.append(rounds > most)
            messages.append(f"{loop.name} runs past its adapter, which has weights for {most} rounds")
        if taped and loop.max is not None:
            wrong.append(rounds > loop.max)
            messages.append(f"{loop.name} is more rounds than its max={loop.max}, for which its tape has room")
        slots = None if env.layout is None else env.layout.most[i]
        if slots is not None:
            wrong.append(rounds > slots)
            messages.append(f"{loop.name} runs past its cache, which has slots for {slots} rounds")
    every = jnp.stack(wrong)
    unlooped = taped and all(loop.max == 1 for loop in traced)
    checked = [loop.rounds for loop in traced], jnp.any(every) if unlooped else None
    rounds, held = eqx.branched_error_if(checked, jnp.any(every), jnp.argmax(every), messages)
    rounds = iter(rounds)
    put = lambda loop: eqx.tree_at(lambda loop: loop.rounds, loop, next(rounds))
    loops = tuple(loop if loop is None or loop.static else put(loop) for loop in env.loops)
    return dataclasses.replace(env, loops=loops), held


def _spoil(tree: PyTree, wrong: Array | None) -> PyTree:
    """`tree`, not a number where `wrong`: it waits for the check, and element-wise work of what comes next hides that."""
    if wrong is None:
        return tree
    return jtu.tree_map(lambda x: jnp.where(wrong, jnp.nan, x) if eqx.is_inexact_array(x) else x, tree)
