"""Names the states around each round, so that `rx.trace` finds them in the program of any model.

Arrays are named with `checkpoint_name`, which computes nothing and shows in the jaxpr, also under `jit` and `vmap`.
"""

import contextlib
import contextvars
import itertools as it
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.tree_util as jtu
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import PyTree

from ._handle import Stream
from ._program import Env, loop_of, Program, Rounds, used


class Seen(NamedTuple):
    """A state that was named: its structure, and the rank of each of its arrays for a single example."""

    number: int
    structure: PyTree
    ranks: tuple[int, ...]


class Mark(NamedTuple):
    """One round: its label, and the states before and after it."""

    label: str
    before: Seen
    after: Seen


@dataclass
class Notes:
    """What was named so far."""

    states: int = 0
    marks: list[Mark] = field(default_factory=list)
    heads: list[tuple[str, Seen]] = field(default_factory=list)

    def name(self, state: PyTree) -> tuple[PyTree, Seen]:
        if isinstance(state, Stream):
            # Keys and values are no part of what a round hands on.
            x, seen = self.name(state.x)
            return Stream(x, state.cache), seen
        leaves, structure = jtu.tree_flatten(state)
        leaves = [_name(leaf, tag(self.states, i)) for i, leaf in enumerate(leaves)]
        seen = Seen(self.states, structure, tuple(leaf.ndim for leaf in leaves))
        self.states += 1
        return jtu.tree_unflatten(structure, leaves), seen


_calls = it.count()
_notes: contextvars.ContextVar[Notes | None] = contextvars.ContextVar("notes", default=None)


@contextlib.contextmanager
def observing():
    """Within, recursions are unrolled and name their states; gives the list of marks."""
    notes = Notes()
    token = _notes.set(notes)
    try:
        # A function that was jitted before is not traced again unless something in its context is new.
        with set_xla_metadata(rinsx_trace=str(next(_calls))):
            yield notes.marks
    finally:
        _notes.reset(token)


def active() -> bool:
    """Whether somebody is looking."""
    return _notes.get() is not None


def refuse(node: Program, env: Env) -> None:
    """Refuses traced numbers of rounds while somebody is looking."""
    if active():
        _, loops = used(node)
        names = [loop.name for i in sorted(loops) if (loop := env.loops[i]) is not None and not loop.static]
        raise ValueError(
            f"rx.trace needs a Python integer for the rounds of {', '.join(map(str, names))}, since it returns one state a "
            f"round: use rx.with_rounds(model, {names[0]}=...)"
        )


def named(state: PyTree) -> tuple[PyTree, Seen]:
    """`state` with a name for each of its arrays, as the state before a round."""
    return _current().name(state)


def round_ends(node: Rounds, env: Env, i: int, before: Seen, state: PyTree) -> tuple[PyTree, Seen]:
    """`state` with names, as the state after round `i`, and before the next."""
    state, after = named(state)
    _current().marks.append(Mark(f"{_label(node, env)}={i + 1}", before, after))
    return state, after


def _label(node: Rounds, env: Env) -> str:
    loop = loop_of(node, env)
    return f"^{node.fixed}" if loop is None else str(loop.name)


def enter(node: Rounds, env: Env, state: PyTree) -> PyTree:
    """`state` with names, as the state before a round that is left elsewhere, by `leave`."""
    state, seen = named(state)
    _current().heads.append((_label(node, env), seen))
    return state


def leave(node: Rounds, env: Env, state: PyTree) -> PyTree:
    """`state` with names, as the state after the first round of the loop that was entered last."""
    label, before = _current().heads.pop() if _current().heads else (None, None)
    if before is None or label != _label(node, env):
        raise ValueError(
            f"rx.trace met the end of the first round of loop {_label(node, env)} without its beginning: the layers of a "
            "rewired model must all run, in order"
        )
    return round_ends(node, env, 0, before, state)[0]


def _current() -> Notes:
    notes = _notes.get()
    assert notes is not None
    return notes


def tag(number: int, leaf: int) -> str:
    """The name of one array of a state."""
    return f"rx.trace[{number},{leaf}]"


def _name(x: jax.Array, tag: str) -> jax.Array:
    @custom_vmap
    def named(x):
        return checkpoint_name(x, tag)

    # A batch axis can stand anywhere in the array that `vmap` computes with; naming it here puts it in front.
    @named.def_vmap
    def _(axis_size, in_batched, x):
        del axis_size
        return named(x), in_batched[0]

    return named(x)
