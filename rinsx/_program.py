"""The program of a recursion: which block is visited when, as static data.

A program is a tree of visits, sequences and rounds. It holds no arrays: blocks and loops are numbered, and `Env` carries
them. A recursion that is itself a block of another is spliced in, so that nesting costs nothing: one program, one
tape of saved states at any degree.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from ._cache import Layout
from ._loop import check_limit, Loop
from ._tree import Block, Node, Power


Count = int | Int[Array, ""]


@dataclass(frozen=True)
class Visit:
    """One application of a block; without a block, only what a round does to the state before its first visit."""

    block: int | None


@dataclass(frozen=True)
class Seq:
    """One part after the other."""

    parts: tuple["Program", ...]


@dataclass(frozen=True)
class Rounds:
    """The rounds `first, first + 1, ...` of `body`: a fixed number of them, or as many as loop number `loop` says."""

    body: "Program"
    fixed: int | None
    loop: int | None
    first: int = 0


Program = Visit | Seq | Rounds


class Env(eqx.Module):
    """What the visits of a program work with: all arrays and callables, and nothing of the program's shape."""

    blocks: tuple[Callable | None, ...]
    loops: tuple[Loop | None, ...]
    args: tuple[PyTree, ...]
    kwargs: dict[str, PyTree]
    key: PyTree
    names: tuple[str, ...] = eqx.field(static=True)
    # Of the cache that rides in the state, if there is one.
    layout: Layout | None = eqx.field(static=True, default=None)


class Lines(NamedTuple):
    """The first slot of each block's next visit in a cache; that of the round before, and whether this round writes."""

    first: tuple[Count, ...]
    before: tuple[Count, ...] | None = None
    writes: Any = True


class Place(eqx.Module):
    """Where a visit stands: how often each block was visited before and each loop entered, its slot on the tape, and
    where it finds its keys and values in a cache.

    The first three are affine in the rounds of the loops around, so nothing has to be counted while running.
    """

    visits: tuple[Count, ...]
    entries: tuple[Count, ...]
    slot: Count = 0
    lines: Lines | None = None

    def after(self, tally: "Tally", times: Count = 1, slots: Count = 0) -> "Place":
        """The place once `tally` has happened `times` times and `slots` slots of the tape have been used."""
        never = lambda count: isinstance(count, int) and count == 0
        add = lambda old, new: tuple(a if never(b) else a + times * b for a, b in zip(old, new))
        visits, entries = add(self.visits, tally.visits), add(self.entries, tally.entries)
        return Place(visits, entries, self.slot + slots, self.lines)

    def entered(self, loop: int | None) -> "Place":
        """The place once loop number `loop` has been entered."""
        if loop is None:
            return self
        entries = tuple(count + (i == loop) for i, count in enumerate(self.entries))
        return Place(self.visits, entries, self.slot, self.lines)


@dataclass(frozen=True)
class Tally:
    """How often a program visits each block and enters each loop."""

    visits: tuple[Count, ...]
    entries: tuple[Count, ...]


def number_of_rounds(node: Rounds, env: Env) -> Count:
    """How many rounds the loop has in all, the `node.first` ones that ran elsewhere included."""
    if node.fixed is not None:
        return node.fixed
    rounds = loop_of(node, env).rounds  # pyright: ignore[reportOptionalMemberAccess]
    return rounds  # pyright: ignore[reportReturnType]


def loop_of(node: Rounds, env: Env) -> Loop | None:
    """The options of these rounds, `None` for a fixed exponent."""
    return None if node.loop is None else env.loops[node.loop]


def opens(loop: Loop | None) -> bool:
    """Whether something happens to the state at the beginning of each round."""
    return loop is not None and (loop.adapter is not None or loop.inject is not None)


def last_of(node: Rounds, env: Env) -> int | None:
    """How many rounds, from the end, are differentiated; `None` is all."""
    loop = loop_of(node, env)
    return None if loop is None or loop.gradient is None else loop.gradient.last


def tally(node: Program, env: Env) -> Tally:
    """Counts the visits and entries of one run of `node`; an integer where every loop inside is static."""
    zeros = [0] * len(env.blocks)
    if isinstance(node, Visit):
        if node.block is not None:
            zeros[node.block] = 1
        return Tally(tuple(zeros), (0,) * len(env.loops))
    place = Place(tuple(zeros), (0,) * len(env.loops))
    if isinstance(node, Seq):
        for part in node.parts:
            place = place.after(tally(part, env))
    else:
        place = place.entered(node.loop).after(tally(node.body, env), number_of_rounds(node, env) - node.first)
    return Tally(place.visits, place.entries)


def origin(env: Env) -> Place:
    """The place of the first visit."""
    lines = None if env.layout is None else Lines((0,) * len(env.blocks))
    return Place((0,) * len(env.blocks), (0,) * len(env.loops), 0, lines)


def is_static(node: Program, env: Env) -> bool:
    """Whether every number of rounds in `node` is a Python integer."""
    if isinstance(node, Visit):
        return True
    if isinstance(node, Seq):
        return all(is_static(part, env) for part in node.parts)
    return isinstance(number_of_rounds(node, env), int) and is_static(node.body, env)


def loops_in(node: Program) -> list[Rounds]:
    """All loops of a program, inner before outer."""
    if isinstance(node, Visit):
        return []
    if isinstance(node, Seq):
        return [loop for part in node.parts for loop in loops_in(part)]
    return [*loops_in(node.body), node]


def used(node: Program) -> tuple[set[int], set[int]]:
    """The numbers of the blocks and the loops in `node`."""
    if isinstance(node, Visit):
        return (set() if node.block is None else {node.block}), set()
    if isinstance(node, Seq):
        parts = [used(part) for part in node.parts]
        return set().union(*(b for b, _ in parts)), set().union(*(l for _, l in parts))
    blocks, loops = used(node.body)
    return blocks, loops | (set() if node.loop is None else {node.loop})


def restrict(node: Program, env: Env) -> Env:
    """`env` with only what `node` uses, so that nothing else is differentiated with it."""
    blocks, loops = used(node)
    keep = lambda values, numbers: tuple(v if i in numbers else None for i, v in enumerate(values))
    return dataclasses.replace(env, blocks=keep(env.blocks, blocks), loops=keep(env.loops, loops))


def sequence(parts: list[Program]) -> Program:
    """The parts in order, nested sequences spliced in."""
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, Seq) else (part,))]
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


class Builder:
    """Numbers the blocks and loops of (nested) recursions in the order of their first visit."""

    def __init__(self):
        self.blocks: list[Callable] = []
        self.names: list[str] = []
        self.loops: list[Loop] = []

    def block(self, block: Callable, name: str) -> Program:
        self.blocks.append(block)
        self.names.append(name)
        return Visit(len(self.blocks) - 1)

    def loop(self, loop: Loop) -> int:
        self.loops.append(loop)
        return len(self.loops) - 1

    def rounds(self, body: Program, loop: int) -> Rounds:
        """The rounds of `body`, which begins with a visit where a round opens with an adapter or an injection."""
        head = body.parts[0] if isinstance(body, Seq) else body
        if opens(self.loops[loop]) and isinstance(head, Rounds):
            body = sequence([Visit(None), body])
        return Rounds(body, None, loop)

    def add(
        self,
        tree: Node,
        loops: Mapping[str, Loop],
        leaf: Callable[[str], Program],
    ) -> Program:
        """The program of a signature's tree; `leaf` gives that of a block by its name, asked once for each name."""
        leaves: dict[str, Program] = {}
        numbers: dict[str, int] = {}

        def walk(node: Node) -> Program:
            if isinstance(node, Block):
                if node.name not in leaves:
                    leaves[node.name] = leaf(node.name)
                return leaves[node.name]
            if isinstance(node, Power):
                body = walk(node.body)
                if isinstance(node.exponent, int):
                    return Rounds(body, node.exponent, None)
                if node.exponent not in numbers:
                    numbers[node.exponent] = self.loop(loops[node.exponent])
                return self.rounds(body, numbers[node.exponent])
            return sequence([walk(part) for part in node.parts])

        return walk(tree)

    def env(self, args: tuple[PyTree, ...], kwargs: dict[str, Any], layout: Layout | None = None) -> Env:
        key = kwargs.get("key")
        if key is not None:
            kwargs = {name: value for name, value in kwargs.items() if name != "key"}
        loops = tuple(_as_count(loop) for loop in self.loops)
        return Env(tuple(self.blocks), loops, args, kwargs, key, tuple(self.names), layout)


def _as_count(loop: Loop) -> Loop:
    """The loop with a number of rounds to count with. A Python integer is checked now, a traced one by `_tape.py`."""
    if isinstance(loop.rounds, int):
        check_limit(loop)
        return loop
    rounds: Any = loop.rounds
    if jnp.iinfo(rounds.dtype).max > 2**31 - 1:
        rounds = eqx.error_if(rounds, rounds > 2**31 - 1, f"{loop.name} is more than 2**31 - 1 rounds")
    return eqx.tree_at(lambda loop: loop.rounds, loop, jnp.asarray(rounds, jnp.int32))
