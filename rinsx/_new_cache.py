"""Makes a cache for a recursion: asks each block what it keeps, and lays out a slot for every visit."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ._cache import Cache, Layout, Shelf
from ._check import at_least
from ._handle import AbstractHandle, only_causal, Stream
from ._line import handed_back
from ._lines import policy_of, taken
from ._policy import PerVisit
from ._program import Builder, loops_in, Program, Rounds, Seq, used, Visit


# Positions that are read at once. Small on CPU, where a chunk costs what is in it; large elsewhere, where each costs a launch.
_CHUNK = {"cpu": 128}
_ELSEWHERE = 1024


def new_cache(
    builder: Builder,
    program: Program,
    x: PyTree,
    capacity: int | None,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    chunk: int | None = None,
    piece: int = 128,
    aligned: bool = False,
    separate: bool = False,
    unfilled: str = "fill",
    trusted: bool = False,
    stops: bool = False,
    whole: bool = False,
) -> Cache:
    """An empty cache for a program; see `_make_cache.py`. `whole` is for one forward pass of all positions of `x`, as in
    training: it is as long as `x`, and only blocks in loops that share slots keep anything."""
    at_least(1, capacity=capacity, chunk=chunk, piece=piece)
    if unfilled not in ("fill", "mask"):
        raise ValueError(f"`unfilled` must be 'fill' or 'mask'; got {unfilled!r}.")
    shared = _shared(program, builder)
    kept = [
        None if whole and i not in shared else _ask(block, name, x, args, kwargs)
        for i, (block, name) in enumerate(zip(builder.blocks, builder.names))
    ]
    if whole:
        capacity = chunk = next((k.t for k in kept if k is not None), None)
    if not any(kept):
        raise ValueError(
            f"no block attends to a cache ({', '.join(builder.names)}): a block takes x, cache = rx.cache.open(state), and "
            "calls cache.attend or cache.append"
        )
    if capacity is None and any(k is not None and k.window is None for k in kept):
        open_ended = ", ".join(name for name, k in zip(builder.names, kept) if k is not None and k.window is None)
        raise ValueError(f"`capacity` is needed, since {open_ended} attends to all positions; got None")

    chunk = chunk or _CHUNK.get(jax.default_backend(), _ELSEWHERE)
    most = tuple(_most(loop) for loop in builder.loops)
    moving = _moving(program, builder)
    shells = tuple(
        None if k is None else Shelf(n, k.width, 0, 0, None if whole else k.window, separate and i not in moving)
        for i, (n, k) in enumerate(zip(builder.names, kept))
    )
    all_windows = not whole and all(k is None or k.window is not None for k in kept)
    layout = Layout(
        shells, most, None if all_windows else capacity, chunk, piece, aligned, unfilled, stops, trusted, whole
    )
    env = builder.env(args, kwargs, layout)
    for node in loops_in(program):
        if policy_of(node, env).slots(None if node.fixed is None and most[_number(node)] is None else 1) is None:
            name = builder.loops[_number(node)].name
            raise ValueError(
                f"{name} is a run-time number of rounds without a maximum, so its slots cannot be counted: bind "
                f"{name}=rx.Loop(..., max=...), or share slots with cache=rx.cache.First()"
            )
    slots = taken(program, env)
    # A block may map over its batch, and does not see it then; the state has it first always.
    lead = jtu.tree_leaves(x)[0].shape[:1]
    shelves, keys, values, written = [], [], [], []
    for shell, k, n in zip(shells, kept, slots):
        if k is None or shell is None:
            for buffers in (shelves, keys, values, written):
                buffers.append(None)
            continue
        room = capacity if k.window is None or whole else k.window + piece - 1
        assert room is not None
        if room > chunk:
            room = -(-room // chunk) * chunk
        shelves.append(Shelf(shell.name, k.width, n, room, shell.window, shell.separate))
        apart = shell.separate
        zeros = lambda slots, dim, k=k, room=room: _empty((*lead, *slots, k.groups, room, dim), k, whole)
        buffers = lambda dim: tuple(zeros((), dim) for _ in range(n)) if apart else zeros((n,), dim)
        keys.append(buffers(k.key_dim))
        values.append(buffers(k.value_dim))
        written.append(jnp.zeros((*lead, n, room), bool) if unfilled == "mask" else None)
    layout = dataclasses.replace(layout, shelves=tuple(shelves))
    return Cache(
        tuple(keys),
        tuple(values),
        jnp.zeros(lead, jnp.int32),
        tuple(written) if unfilled == "mask" else None,
        jnp.ones(lead, bool) if stops else None,
        jnp.ones(lead, jnp.int32) if stops else None,
        layout,
    )


class _Kept(eqx.Module):
    """What one layer of a block keeps, and how many layers there are."""

    width: int = eqx.field(static=True)
    batch: tuple[int, ...] = eqx.field(static=True)
    t: int = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    key_dim: int = eqx.field(static=True)
    value_dim: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    sharding: Any = eqx.field(static=True)


def _empty(shape: tuple[int, ...], kept: _Kept, whole: bool) -> Array:
    """Room for keys or values, in all of a pass shared out over devices as the keys are, where their types say how."""
    if not whole or not any(kept.sharding.spec):
        return jnp.zeros(shape, kept.dtype)
    batch, rest = kept.sharding.spec[:-3], kept.sharding.spec[-3:]
    spec = PartitionSpec(*batch, *(None,) * (len(shape) - len(kept.sharding.spec)), *rest)
    return lax.full(shape, 0, kept.dtype, sharding=NamedSharding(kept.sharding.mesh, spec))


class _Notes:
    """What a block was heard to append, while it was traced once."""

    def __init__(self):
        self.heard: list[_Kept] = []


class _Listener(AbstractHandle):
    """A handle that computes nothing and notes what is appended."""

    notes: _Notes = eqx.field(static=True)
    times: int = eqx.field(static=True, default=1)
    counts: bool = eqx.field(static=True, default=True)

    separate = False
    whole = False

    def inside(self, i, depth):
        # Layers of a stack are alike; the first one is heard, for all.
        return _Listener(self.notes, self.times * depth, self.counts and not (isinstance(i, int) and i > 0))

    def outside(self, base):
        return base

    def done(self, what):
        return self

    def all_done(self):
        return self

    def append(self, k, v, *, window=None):
        *batch, groups, t, key_dim = k.shape
        if self.counts:
            kept = _Kept(
                self.times, tuple(batch), t, groups, key_dim, v.shape[-1], k.dtype, window, jax.typeof(k).sharding
            )
            self.notes.heard.append(kept)
        return self

    def attend(self, q, k, v, *, segments=None, causal=True, window=None):
        only_causal(causal)
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype), self.append(k, v, window=window)

    def fold(self, step, carry, *, window=None):
        if not self.notes.heard:
            raise ValueError("nothing to go through: call append(k, v) first, and fold on the handle that it returns")
        k = self.notes.heard[-1]
        part = lambda dim: jnp.zeros((*k.batch, k.groups, 1, dim), k.dtype)
        return step(carry, part(k.key_dim), part(k.value_dim), jnp.ones((*k.batch, 1, 1), bool))

    def positions(self, t):
        return jnp.zeros((1, t), jnp.int32)

    def close(self, x):
        return Stream(x, self)


def _ask(block: Any, name: str, x: PyTree, args: tuple, kwargs: dict[str, Any]) -> _Kept | None:
    """What a block keeps at each visit, from tracing it once."""
    notes = _Notes()

    def listen(block, x, args, kwargs):
        return handed_back(block(Stream(x, _Listener(notes)), *args, **kwargs), f"block {name}").x

    try:
        eqx.filter_eval_shape(listen, block, x, args, kwargs)
    except Exception as error:
        error.add_note(
            f"block {name} was given a state with a cache: it takes x, cache = rx.cache.open(state), and returns "
            "cache.close(x). A function that acts on each position alone, such as an MLP, becomes such a block by rx.lift"
        )
        raise
    heard = set(notes.heard)
    if len(notes.heard) > 1 and len(heard) > 1 or len(notes.heard) > len(heard):
        raise ValueError(
            f"block {name} attends {len(notes.heard)} times a visit, and a visit of one layer has one slot: put its layers into an "
            "rx.nn.Stack, or make a recursion of them"
        )
    return notes.heard[0] if notes.heard else None


def _most(loop: Any) -> int | None:
    known = loop.rounds if isinstance(loop.rounds, int) else None
    return max((n for n in (known, loop.max) if n is not None), default=None)


def _shared(node: Program, builder: Builder) -> set[int]:
    """The blocks in loops whose rounds share slots."""
    if isinstance(node, Visit):
        return set()
    if isinstance(node, Seq):
        return set().union(*(_shared(part, builder) for part in node.parts))
    policy = None if node.loop is None else builder.loops[node.loop].cache
    return _shared(node.body, builder) if policy is None or isinstance(policy, PerVisit) else used(node)[0]


def _moving(node: Program, builder: Builder) -> set[int]:
    """The blocks in loops whose number of rounds is a run-time value, or that of a loop inside: they all run on the tape."""
    if isinstance(node, Visit):
        return set()
    if isinstance(node, Seq):
        return set().union(*(_moving(part, builder) for part in node.parts))
    known = node.loop is None or builder.loops[node.loop].static
    inside = _moving(node.body, builder)
    return inside if known and not inside else used(node)[0]


def _number(node: Rounds) -> int:
    assert node.loop is not None
    return node.loop
