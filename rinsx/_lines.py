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
    first = tuple(a + b for a, b in zip(place.lines.first, taken(node, env)))
    return dataclasses.replace(place, lines=place.lines._replace(first=first))


def in_round(place: Place, node: Rounds, env: Env, i: Count) -> Place:
    """The place, of the loop's entry, with the slots of round `i`."""
    if place.lines is None:
        return place
    policy, each = policy_of(node, env), taken(node.body, env)
    first, _, writes = place.lines
    at = lambda slot: tuple(a + slot * n if n else a for a, n in zip(first, each))
    here = policy.writes(i)
    both = here if writes is True else writes if here is True else False if here is False else writes & here
    before = at(policy.slot(i - 1)) if env.layout.stops else None  # pyright: ignore[reportOptionalMemberAccess]
    return dataclasses.replace(place, lines=Lines(at(policy.slot(i)), before, both))


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
    """Refuses rounds that the cache has no slots for, where they are known."""
    if env.layout is None or isinstance(node, Visit):
        return
    if isinstance(node, Seq):
        for part in node.parts:
            check_layout(part, env)
        return
    rounds, most = number_of_rounds(node, env), most_of(node, env)
    if isinstance(rounds, int) and most is not None and rounds > most:
        loop: Any = loop_of(node, env)
        raise ValueError(
            f"{loop.name} of {rounds} rounds runs past its cache, which has slots for {most}: bind "
            f"{loop.name}=rx.Loop(..., max={rounds}) before the cache is made"
        )
    check_layout(node.body, env)
