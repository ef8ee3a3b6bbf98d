"""Which slots of a cache the parts of a program take: strides come from the most rounds of each loop, so that no slot moves."""

import dataclasses
from typing import Any

from jaxtyping import PyTree

from ._cache import Cache
from ._handle import Stream
from ._policy import AbstractPolicy, PerVisit
from ._program import Count, Env, Lines, loop_of, number_of_rounds, Place, Program, Rounds, Seq, Visit


_PER_VISIT = PerVisit()


def policy_of(node: Rounds, env: Env) -> AbstractPolicy:
    """Which slots the rounds of a loop write and read."""
    loop = loop_of(node, env)
    return _PER_VISIT if loop is None or loop.cache is None else loop.cache


def most_of(node: Rounds, env: Env) -> int | None:
    """How many rounds of a loop there are slots for; `None` is any number."""
    if node.fixed is not None:
        return node.fixed
    assert env.layout is not None and node.loop is not None
    return env.layout.most[node.loop]


def taken(node: Program, env: Env) -> tuple[int, ...]:
    """How many slots of each block `node` takes."""
    shelves = env.layout.shelves  # pyright: ignore[reportOptionalMemberAccess]
    if isinstance(node, Visit):
        return tuple(s.width if s is not None and i == node.block else 0 for i, s in enumerate(shelves))
    if isinstance(node, Seq):
        return tuple(map(sum, zip(*(taken(part, env) for part in node.parts))))
    slots = policy_of(node, env).slots(most_of(node, env))
    return tuple(slots * n for n in taken(node.body, env))


def behind(place: Place, node: Program, env: Env) -> Place:
    """The place with the slots of what comes behind `node`."""
    if place.lines is None:
        return place
    first, before, writes = place.lines
    step = lambda slots: None if slots is None else tuple(a + b for a, b in zip(slots, taken(node, env)))
    return dataclasses.replace(place, lines=Lines(step(first), step(before), writes))  # pyright: ignore[reportArgumentType]


def in_round(place: Place, node: Rounds, env: Env, i: Count, stops: bool = False) -> Place:
    """The place, of the loop's entry, with the slots of round `i`. If sequences may stop before a round of this loop, also with
    those that they keep; loops inside move both alike."""
    if place.lines is None:
        return place
    policy, each = policy_of(node, env), taken(node.body, env)
    first, before, writes = place.lines
    at = lambda slots, slot: tuple(a + slot * n if n else a for a, n in zip(slots, each))
    here = policy.writes(i)
    both = here if writes is True else writes if here is True else False if here is False else writes & here
    if stops:
        before = at(first, policy.kept(i))
    elif before is not None:
        before = at(before, policy.slot(i))
    return dataclasses.replace(place, lines=Lines(at(first, policy.slot(i)), before, both))


def finish(state: PyTree, place: Place, node: Rounds, env: Env, total: Count) -> PyTree:
    """The state after a loop of `total` rounds: slots of rounds that were not run hold what the last one has written."""
    if place.lines is None or place.lines.writes is False or env.layout.unfilled != "fill":  # pyright: ignore
        return state
    policy, most = policy_of(node, env), most_of(node, env)
    used, slots = policy.slots(total), policy.slots(most)
    if isinstance(used, int) and used >= slots:
        return state
    cache: Cache = state.cache
    for block, n in enumerate(taken(node.body, env)):
        if n:
            base = place.lines.first[block]
            cache = cache.copy(block, base + (used - 1) * n, (base + used * n, base + slots * n), n)
    return Stream(state.x, cache)


def check_layout(node: Program, env: Env) -> None:
    """Refuses a cache that was made for other blocks or policies, and rounds that it has no slots for, where they are known."""
    if env.layout is None:
        return
    shelves = env.layout.shelves
    has = {s.name: s.slots for s in shelves if s is not None}
    names = {name for name, s in zip(env.names, shelves) if s is not None}
    if len(shelves) == len(env.names) and names == set(has):
        wants = {name: n for name, s, n in zip(env.names, shelves, taken(node, env)) if s is not None}
        if wants == has:
            return _check_rounds(node, env)
        problem = f"takes {wants} slots with its policies"
    else:
        problem = f"has the blocks {', '.join(env.names)}"
    raise ValueError(
        f"this cache was not made for this recursion: it has {has} slots by blocks, and the recursion {problem}. Make a "
        "cache from the model that decodes, and set policies (rx.cache.with_policy) before that"
    )


def _check_rounds(node: Program, env: Env) -> None:
    if isinstance(node, Visit):
        return
    if isinstance(node, Seq):
        for part in node.parts:
            _check_rounds(part, env)
        return
    rounds, most = number_of_rounds(node, env), most_of(node, env)
    if isinstance(rounds, int) and most is not None and rounds > most:
        loop: Any = loop_of(node, env)
        raise ValueError(
            f"{loop.name} of {rounds} rounds runs past its cache, which has slots for {most}: bind "
            f"{loop.name}=rx.Loop(..., max={rounds}) before the cache is made"
        )
    _check_rounds(node.body, env)
