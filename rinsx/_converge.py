"""Runs a recursion with as many rounds of one loop as it takes every sequence to converge."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from ._handle import Stream
from ._lines import behind, check_layout, finish, in_round, most_of
from ._loop import limit
from ._program import Builder, loops_in, opens, origin, Rounds, Seq, sequence, tally
from ._recur import Recursion, splice
from ._run import run
from ._visit import as_state, begin, Opening, without_cache


def converge(
    recursion: Recursion,
    state: Stream,
    until: Any,
    predict: Callable[[PyTree], Array],
    idle: Array | None,
    *args: Any,
    **kwargs: Any,
) -> Stream:
    """The state after the recursion, with its cache, in which `used` has the rounds of each sequence.

    **Arguments:**

    - `until`: a [`rinsx.generate.Until`][].
    - `idle`: bool `[batch]`, sequences that no round has to wait for.
    - `predict`: from the state after the recursion to logits `[batch, vocab]`, for criteria that compare predictions.
    """
    builder = Builder()
    program = splice(recursion, builder)
    parts = program.parts if isinstance(program, Seq) else (program,)
    numbers = [i for i, p in enumerate(parts) if isinstance(p, Rounds) and _name(p, builder) == until.loop]
    often = sum(_name(p, builder) == until.loop for p in loops_in(program))
    if len(numbers) != 1 or often != 1:
        raise ValueError(
            f"rounds can be run until they converge in a loop that stands once in the signature, with no loop around it; "
            f"{recursion.signature} has {often} loops named {until.loop}, {len(numbers)} of them with no loop around"
        )
    if not state.cache.layout.stops:
        raise ValueError("sequences stop at different rounds: make the cache with stops=True")
    number = numbers[0]
    node: Any = parts[number]
    rest = sequence(list(parts[number + 1 :])) if parts[number + 1 :] else None
    env = builder.env(args, kwargs, state.cache.layout)
    check_layout(program, env)

    loop: Any = env.loops[node.loop]
    for what, most in (
        ("cache, which has slots for", most_of(node, env)),
        ("adapter, which has weights for", limit(loop)),
    ):
        if most is not None and until.most > most:
            raise ValueError(
                f"{loop.name} may run {until.most} rounds, past its {what} {most}: give Until a smaller most="
            )

    place = origin(env)
    state = as_state(state)
    for part in parts[:number]:
        state = run(part, state, place, env)
        place = behind(place.after(tally(part, env)), part, env)
    entry = without_cache(state)
    state = begin(node.loop, state, place, env)
    inside, each = place.entered(node.loop), tally(node.body, env)
    beyond = behind(place.after(tally(node, env)), node, env)

    def round_(state, i):
        opening = Opening(node.loop, i, entry) if opens(loop) else None
        return run(node.body, state, in_round(inside.after(each, i), node, env, i, stops=True), env, opening=opening)

    def after_loop(state):
        return state if rest is None else run(rest, state, beyond, env)

    predicts = until.criterion.predicts

    def seen(state):
        """What the criterion compares, and the cache after it."""
        if not predicts:
            return state.x, state.cache
        out = after_loop(state)
        return predict(out.x), out.cache

    batch = state.cache.length.shape
    active = lambda state, on: Stream(state.x, dataclasses.replace(state.cache, active=on))
    state = round_(active(state, jnp.ones(batch, bool)), jnp.int32(0))
    last, cache = seen(state)
    state = Stream(state.x, cache)

    def one(carry):
        i, state, last, done, used = carry
        new = round_(active(state, ~done), i)
        hold = lambda old, new: jax.tree.map(lambda a, b: jnp.where(_over(done, a), a, b), old, new)
        new = Stream(hold(state.x, new.x), new.cache)
        now, cache = seen(new)
        now = hold(last, now)
        used = jnp.where(done, used, i + 1)
        done = done | (until.criterion(last, now) & (i + 1 >= until.least))
        return i + 1, Stream(new.x, cache), now, done, used

    go_on = lambda carry: (carry[0] < until.most) & ~jnp.all(carry[3])
    done = jnp.zeros(batch, bool) if idle is None else idle
    carry = (jnp.int32(1), state, last, done, jnp.ones(batch, jnp.int32))
    i, state, _, _, used = lax.while_loop(go_on, one, carry)
    state = finish(active(state, jnp.ones(batch, bool)), place, node, env, i)
    state = after_loop(state)
    return Stream(state.x, dataclasses.replace(state.cache, used=used))


def _name(node: Rounds, builder: Builder) -> str | None:
    return None if node.loop is None else builder.loops[node.loop].name


def _over(done: Array, x: Array) -> Array:
    """`done`, shaped to choose between arrays like `x`."""
    return done.reshape(done.shape + (1,) * (x.ndim - done.ndim))
