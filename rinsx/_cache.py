"""The cache of keys and values that rides in the state, and the handle that knows where in it a visit writes and reads.

All keys of one block stand in one buffer, `[batch, slots, groups, positions, dim]`, or in one array a slot where every slot is
known when the program is compiled. It is carried through all loops and written in place: a buffer that went
through a scan as its inputs and outputs would be copied whole for every token.

A position is written before it is read, so that a token attends to itself like to those before it. Reading goes through
the filled part in chunks, so that its time does not depend on the capacity.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from ._causal import causal_attention, visible
from ._handle import AbstractHandle, Stream


Slot = int | Int[Array, "*batch"]


@dataclasses.dataclass(frozen=True)
class Shelf:
    """What one block keeps: how many slots a visit takes, and all its visits, and how many positions a slot has room for.

    `window` is that of the block's attention; then the positions are a ring, in which the newest take the place of the oldest.
    """

    name: str
    width: int
    slots: int
    positions: int
    window: int | None
    separate: bool


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything stands, known when the program is compiled.

    `most` has for each loop the number of rounds that there are slots for, `None` for any number.
    """

    shelves: tuple[Shelf | None, ...]
    most: tuple[int | None, ...]
    capacity: int | None
    chunk: int
    piece: int
    aligned: bool
    unfilled: str
    stops: bool = False
    trusted: bool = False
    whole: bool = False


class Cache(eqx.Module):
    """Keys and values of all visits of a recursion, for a batch of sequences. Made by [`rinsx.cache.make`][].

    **Attributes:**

    - `length`: int32 `[batch]`, how many positions of each sequence are filled.
    - `used`: int32 `[batch]`, how many rounds the last token took, in a cache made with `stops=True`; else `None`.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    length: Int[Array, "*batch"]
    written: tuple[Any, ...] | None
    active: Bool[Array, "*batch"] | None
    used: Int[Array, "*batch"] | None
    layout: Layout = eqx.field(static=True)
    t: int | None = eqx.field(static=True, default=None)

    @property
    def capacity(self) -> int | None:
        """How many positions there is room for; `None` where all attention is in windows."""
        return self.layout.capacity

    def begin(self, t: int) -> "Cache":
        """The cache for a forward pass of the next `t` positions.

        **Raises:**

        An error if they do not fit, now or when the program runs.
        """
        layout = self.layout
        if t > layout.piece and any(shelf is not None and shelf.window is not None for shelf in layout.shelves):
            raise ValueError(
                f"this cache has windows, which have room for {layout.piece} new positions at a time; got {t}: give fewer "
                f"at a time, or make it with piece={t}"
            )
        cache = dataclasses.replace(self, t=t)
        if layout.capacity is not None:
            if t > layout.capacity:
                raise ValueError(f"this cache has a capacity of {layout.capacity} positions, and {t} do not fit")
            if not layout.trusted:
                message = (
                    f"a sequence has no room for {t} more in this cache: its capacity is {layout.capacity} positions"
                )
                length = eqx.error_if(self.length, self.length > layout.capacity - t, message)
                cache = dataclasses.replace(cache, length=length)
        if self.written is None:
            return cache
        # What a position was written for before it was given back stands no more.
        clear = lambda w, block: _write(w, jnp.zeros((*w.shape[:-1], t), bool), 0, self, block, -1)
        written = tuple(None if w is None else clear(w, block) for block, w in enumerate(self.written))
        return dataclasses.replace(cache, written=written)

    def advance(self, counts: int | Int[Array, "*batch"]) -> "Cache":
        """The cache once `counts` more positions of each sequence are filled, at most as many as this forward pass has."""
        t = self.tokens()
        if isinstance(counts, int):
            if not 0 <= counts <= t:
                raise ValueError(f"`counts` are from 0 to {t}, the positions of this forward pass; got {counts}")
        elif not self.layout.trusted:
            message = f"`counts` are from 0 to {t}, the positions of this forward pass"
            counts = eqx.error_if(counts, (counts < 0) | (counts > t), message)
        return dataclasses.replace(self, length=self.length + jnp.asarray(counts, jnp.int32), t=None)

    def rewind(self, length: Int[Array, "*batch"]) -> "Cache":
        """The cache with only the first `length` positions of each sequence.

        Behind a window, of what is given back at most `piece` positions may be written since.
        """
        length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), self.length.shape)
        if not self.layout.trusted:
            message = "a cache is rewound to at most what is filled"
            length = eqx.error_if(length, (length < 0) | (length > self.length), message)
        return dataclasses.replace(self, length=length)

    def positions(self, t: int) -> Int[Array, "*batch t"]:
        """The positions of the next `t` tokens of each sequence."""
        return self.length[..., None] + jnp.arange(t, dtype=jnp.int32)

    def tokens(self) -> int:
        """How many positions this forward pass has."""
        if self.t is None:
            raise ValueError(
                "a forward pass with a cache begins with cache = cache.begin(t), and ends with cache.advance(t)"
            )
        return self.t

    def copy(self, block: int, source: Slot, targets: tuple[Slot, Slot], count: int) -> "Cache":
        """The positions of this forward pass in `count` slots from `source`, copied into those from `low`, `low + count`, ...,
        below `high`."""
        low, high = targets
        t = self.tokens()

        def copied(buffer):
            if isinstance(buffer, tuple):
                new = list(buffer)
                for slot in range(low, high):  # pyright: ignore[reportArgumentType]
                    given = buffer[source + (slot - low) % count]  # pyright: ignore[reportCallIssue, reportArgumentType]
                    new[slot] = _write(buffer[slot], _read(given, None, 1, self, block, t), None, self, block, -2)
                return tuple(new)
            part = _read(buffer, source, count, self, block, t)
            put = lambda i, buffer: _write(buffer, part, low + i * count, self, block, -2)
            return lax.fori_loop(0, (high - low) // count, put, buffer)

        swap = lambda buffers: (*buffers[:block], copied(buffers[block]), *buffers[block + 1 :])
        return dataclasses.replace(self, keys=swap(self.keys), values=swap(self.values))


class Known(eqx.Module):
    """A number that is known when the program is compiled, in a place where it may also be an array."""

    value: Any = eqx.field(static=True)


class Line(AbstractHandle):
    """A cache at one visit: the slot that it writes and reads."""

    cache: Cache
    known: tuple[Known | Array, Known | Array, Known | Array]
    block: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    appended: bool = eqx.field(static=True, default=False)

    @staticmethod
    def of(cache: Cache, block: int, width: int, slot: Any, before: Any, writes: Any) -> "Line":
        """The line of a slot, of that of the round before, for sequences that have stopped, and whether it is written."""
        # Every array of a handle has the batch first, so that a block may map over it.
        wide = lambda x: jnp.broadcast_to(x, cache.length.shape) if eqx.is_array(x) else Known(x)
        return Line(cache, (wide(slot), wide(before), wide(writes)), block, width)

    @property
    def slot(self) -> Any:
        return _known(self.known[0])

    @property
    def before(self) -> Any:
        return _known(self.known[1])

    @property
    def writes(self) -> Any:
        return _known(self.known[2])

    @property
    def separate(self) -> bool:
        """Whether slots must be known when the program is compiled."""
        shelf = self.cache.layout.shelves[self.block]
        return shelf is not None and shelf.separate

    @property
    def whole(self) -> bool:
        """Whether this is a forward pass of all positions, as in training."""
        return self.cache.layout.whole

    def inside(self, i: Any, depth: int) -> "Line":
        """The handle of layer `i` of `depth` equal ones."""
        if self.width == 0:
            return self
        if self.width % depth != 0:
            raise ValueError(f"this visit has {self.width} slots of the cache, which {depth} layers cannot share")
        width = self.width // depth
        on = lambda slot: None if slot is None else slot + i * width
        return Line.of(self.cache, self.block, width, on(self.slot), on(self.before), self.writes)

    def outside(self, base: "Line") -> "Line":
        """The handle that `base` stands for, once a layer inside has returned this one."""
        return dataclasses.replace(base, cache=self.cache)

    def done(self, what: str) -> "Line":
        """The handle as it was given, once a layer has returned it; an error if that layer has lost what it appended."""
        if self.width and not self.appended:
            raise ValueError(
                f"{what} attends, and returned its state with a handle from before that: return cache.close(x), with "
                "the `cache` that attend or append has returned"
            )
        return dataclasses.replace(self, appended=False)

    def all_done(self) -> "Line":
        """The handle of a stack whose layers are all done."""
        return dataclasses.replace(self, appended=True)

    def attend(self, q, k, v, *, segments=None, window=None):
        layout = self.cache.layout
        if self.width == 0:
            # A block that shares nothing, in a forward pass of all positions.
            return causal_attention(q, k, v, segments, window=window), self
        if segments is not None and not layout.whole:
            raise ValueError("a cache holds one document for each sequence: leave out segments=")
        line = self.append(k, v, window=window)
        if layout.whole:
            keys, values = (line._slot(b[self.block]) for b in (line.cache.keys, line.cache.values))
            return causal_attention(q, keys, values, segments, window=window), line
        return line._attend(q, window), line

    def _slot(self, buffers):
        """All positions of this slot."""
        shelf: Any = self.cache.layout.shelves[self.block]
        if shelf.separate:
            return buffers[self.slot]
        return lax.dynamic_index_in_dim(buffers, _scalar(self.slot), -4, keepdims=False)

    def append(self, k, v, *, window=None):
        shelf = self._shelf(window)
        if self.width != 1:
            raise ValueError(
                f"this visit has {self.width} slots of the cache, and attends without saying to which layer it belongs: "
                "put layers into an rx.nn.Stack"
            )
        t = self.cache.tokens()
        if k.shape[-2] != t:
            raise ValueError(f"this forward pass has {t} positions, and a block appends keys of {k.shape[-2]}")
        line = dataclasses.replace(self, appended=True)
        if self.writes is False:
            return line
        keys, values = self.cache.keys[self.block], self.cache.values[self.block]
        old = self.cache.written
        if shelf.separate:
            if not isinstance(self.slot, int):
                raise ValueError(
                    "this cache has one array for each slot, so its slots must be known when the program is compiled: give "
                    "the rounds as Python integers, or make the cache with separate=False"
                )
            new = []
            for buffers, x in ((keys, k), (values, v)):
                put = self._put(buffers[self.slot], x, None, lambda before, b=buffers: (b[before], None))
                new.append((*buffers[: self.slot], put, *buffers[self.slot + 1 :]))
            keys, values = new
        else:
            slot = _scalar(self.slot)
            keys, values = (
                self._put(b, x, slot, lambda before, b=b: (b, _scalar(before))) for b, x in ((keys, k), (values, v))
            )
        if old is not None:
            # A round that only reads leaves the mark of the one that has written.
            on = self._alive() | _read(old[self.block], _scalar(self.slot), 1, self.cache, self.block, t, -1)
            put = _write(old[self.block], on, _scalar(self.slot), self.cache, self.block, -1)
            old = (*old[: self.block], put, *old[self.block + 1 :])
        put_in = lambda buffers, x: (*buffers[: self.block], x, *buffers[self.block + 1 :])
        cache = dataclasses.replace(
            self.cache, keys=put_in(self.cache.keys, keys), values=put_in(self.cache.values, values), written=old
        )
        return dataclasses.replace(line, cache=cache)

    def _alive(self):
        """Whether each sequence writes here, `[*batch, 1, 1]`."""
        alive = jnp.asarray(self.writes) & (True if self.cache.active is None else self.cache.active)
        return alive[..., None, None]

    def _put(self, buffer, x, slot, of: Callable):
        """`x` written, or what stands in its place for sequences that do not write."""
        x = (x if slot is None else x[..., None, :, :, :]).astype(buffer.dtype)
        t = x.shape[-2]
        over = lambda mask: mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        if self.cache.active is not None and self.before is not None:
            # A sequence that has stopped keeps what its last round has written.
            of_before, slot_before = of(self.before)
            past = _read(of_before, slot_before, 1, self.cache, self.block, t)
            x = jnp.where(over(self.cache.active), x, past)
        if self.writes is not True:
            x = jnp.where(over(self.writes), x, _read(buffer, slot, 1, self.cache, self.block, t))
        return _write(buffer, x, slot, self.cache, self.block, -2)

    def _shelf(self, window: int | None) -> Shelf:
        shelf = self.cache.layout.shelves[self.block]
        assert shelf is not None
        if self.cache.layout.whole:
            return shelf
        if shelf.window != window:
            raise ValueError(
                f"block {shelf.name} attends with window={window}, but its cache was made for window={shelf.window}"
            )
        return shelf

    def fold(self, step, carry, *, window=None):
        shelf, cache, layout = self._shelf(window), self.cache, self.cache.layout
        at = _start(cache)[..., None] + jnp.arange(cache.tokens(), dtype=jnp.int32)
        size = min(layout.chunk, shelf.positions)
        keys, values = cache.keys[self.block], cache.values[self.block]
        slot = None
        if shelf.separate:
            keys, values = keys[self.slot], values[self.slot]
        else:
            slot = _scalar(self.slot)

        def one(i, carry):
            first = i * size
            part = lambda b: _cut(b, slot, first, size)
            index = first + jnp.arange(size, dtype=jnp.int32)
            if shelf.window is not None:
                last = at[..., -1:]
                index = last - (last - index) % shelf.positions
            seen = visible(at, index, window) & (index >= 0)[..., None, :]
            if cache.written is not None:
                marks = _cut_marks(cache.written[self.block], _scalar(self.slot), first, size)
                own = at[..., :, None] == index[..., None, :]
                seen = seen & (marks[..., None, :] | own)
            return step(carry, part(keys), part(values), seen)

        if shelf.positions == size:
            return one(0, carry)
        filled = jnp.max(cache.length) + cache.tokens()
        if shelf.window is not None:
            filled = jnp.minimum(filled, shelf.positions)
        return lax.fori_loop(0, -(-filled // size), one, carry)

    def _attend(self, q, window):
        """Attention to the slot, by the softmax that is kept up to date from chunk to chunk."""
        shelf = self._shelf(window)
        *lead, heads, t, dim = q.shape
        buffer = self.cache.keys[self.block]
        groups = (buffer[0] if isinstance(buffer, tuple) else buffer).shape[-3]
        wide = jnp.promote_types(q.dtype, jnp.float32)
        grouped = (q * dim**-0.5).reshape(*lead, groups, heads // groups * t, dim)

        def scores_of(k, seen):
            scores = jnp.einsum("...td,...sd->...ts", grouped, k.astype(q.dtype), preferred_element_type=wide)
            scores = scores.reshape(*lead, groups, heads // groups, t, -1)
            seen = seen if seen.ndim == 2 else seen[..., None, None, :, :]
            return jnp.where(seen, scores, -jnp.inf).reshape(*lead, groups, heads // groups * t, -1)

        def weigh(weights, v):
            return jnp.einsum(
                "...ts,...sd->...td", weights.astype(q.dtype), v.astype(q.dtype), preferred_element_type=wide
            )

        def once(carry, k, v, seen):
            scores = scores_of(k, seen)
            weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, -1, keepdims=True)))
            return weigh(weights, v) / jnp.sum(weights, -1, keepdims=True)

        def step(carry, k, v, seen):
            most, whole, out = carry
            scores = scores_of(k, seen)
            new = jnp.maximum(most, jnp.max(scores, -1, keepdims=True))
            # A chunk may have nothing to see, as windows leave old positions behind.
            safe = jnp.where(new == -jnp.inf, 0, new)
            weights, fade = jnp.exp(scores - safe), jnp.exp(most - safe)
            return new, fade * whole + jnp.sum(weights, -1, keepdims=True), fade * out + weigh(weights, v)

        if shelf.positions <= self.cache.layout.chunk:
            out = self.fold(once, None, window=window)
        else:
            none = jnp.zeros((*grouped.shape[:-1], 1), wide)
            carry = (none - jnp.inf, none, jnp.zeros(grouped.shape, wide))
            _, whole, out = self.fold(step, carry, window=window)
            out = out / whole
        return out.reshape(q.shape).astype(q.dtype)

    def positions(self, t):
        return self.cache.positions(t)

    def close(self, x):
        return Stream(x, self)


def at_visit(state: PyTree, block: int, slot: Any, before: Any, writes: Any) -> PyTree:
    """The state as a visit of a block sees it."""
    shelf = state.cache.layout.shelves[block]
    if shelf is None:
        return Stream(state.x, Line.of(state.cache, block, 0, 0, None, False))
    return Stream(state.x, Line.of(state.cache, block, shelf.width, slot, before, writes))


def handed_back(state: PyTree, what: str) -> PyTree:
    """The state that a block or a layer has returned, as it was given; an error if it has lost the cache."""
    if not isinstance(state, Stream):
        raise ValueError(
            f"{what} was given a state with a cache and returned one without: return cache.close(x), with the `cache` "
            "that attend has returned"
        )
    return Stream(state.x, state.cache.done(what))


def after_visit(state: Stream) -> Stream:
    """The state as loops carry it."""
    return Stream(state.x, state.cache.cache)


#
# Arrays: the axes `[*batch, slots, groups, positions, dim]`, without slots where there is one array for each
#


def _known(x: Known | Array) -> Any:
    return x.value if isinstance(x, Known) else x


def _scalar(slot: Slot) -> Any:
    """The slot, which is the same for the whole batch."""
    return slot if isinstance(slot, int) or slot.ndim == 0 else slot[0]


def _start(cache: Cache) -> Array:
    """Where the next position is written: a scalar where that is the same for all sequences."""
    return cache.length[0] if cache.layout.aligned and cache.length.ndim else cache.length


def _ring(cache: Cache, block: int) -> int | None:
    """How many positions a ring has, for a block with a window."""
    shelf = cache.layout.shelves[block]
    return None if shelf is None or shelf.window is None else shelf.positions


def _rank(axis: int, slot: Any) -> int:
    """The axes of a buffer of one sequence: slots (if `slot` is one), groups and positions and dim, or positions alone."""
    return (3 if axis == -2 else 1) + (slot is not None)


def _write(buffer: Array, x: Array, slot: Any, cache: Cache, block: int, axis: int) -> Array:
    """`x` written at `slot` and the next positions of each sequence; positions are axis `axis`. No slot, no axis for it."""
    ring, start = _ring(cache, block), _start(cache)
    t, batched = x.shape[axis], buffer.ndim > _rank(axis, slot)
    if ring is not None and t > 1:
        write = lambda buffer, x, start: _write_ring(buffer, x, slot, start, ring, axis)
        return (
            jax.vmap(write, in_axes=(0, 0, 0 if start.ndim else None))(buffer, x, start)
            if batched
            else write(buffer, x, start)
        )
    if ring is not None:
        start = start % ring
    # `vmap` of this would be a scatter, even at equal positions, and XLA copies the buffer for that.
    if not batched:
        return lax.dynamic_update_slice(buffer, x, _corner(buffer, {axis: start}, slot, 0))
    if start.ndim == 0:
        return lax.dynamic_update_slice(buffer, x, _corner(buffer, {axis: start}, slot, 1))
    if jax.default_backend() != "cpu":
        write = lambda buffer, x, start: lax.dynamic_update_slice(buffer, x, _corner(buffer, {axis: start}, slot, 0))
        return jax.vmap(write)(buffer, x, start)

    def row(b, buffer):
        part = lax.dynamic_slice_in_dim(x, b, 1, 0)
        return lax.dynamic_update_slice(buffer, part, _corner(buffer, {0: b, axis: start[b]}, slot, 1))

    return lax.fori_loop(0, buffer.shape[0], row, buffer)


def _write_ring(buffer: Array, x: Array, slot: Any, start: Array, ring: int, axis: int) -> Array:
    """Several positions of one sequence, which may go past the end of the ring."""
    index = (start + jnp.arange(x.shape[axis])) % ring
    part = buffer if slot is None else lax.dynamic_slice_in_dim(buffer, slot, x.shape[0], 0)
    part = jnp.moveaxis(jnp.moveaxis(part, axis, 0).at[index].set(jnp.moveaxis(x, axis, 0)), 0, axis)
    return part if slot is None else lax.dynamic_update_slice_in_dim(buffer, part, slot, 0)


def _read(buffer: Array, slot: Any, count: int, cache: Cache, block: int, t: int, axis: int = -2) -> Array:
    """What stands at the next `t` positions of each sequence, in `count` slots."""
    ring, start = _ring(cache, block), _start(cache)
    batched = buffer.ndim > _rank(axis, slot)

    def one(buffer, start):
        slots = buffer.ndim - _rank(axis, slot)
        if ring is not None:
            part = buffer if slot is None else lax.dynamic_slice_in_dim(buffer, slot, count, slots)
            return jnp.take(part, (start + jnp.arange(t)) % ring, axis=axis)
        sizes = list(buffer.shape)
        sizes[axis] = t
        if slot is not None:
            sizes[slots] = count
        return lax.dynamic_slice(buffer, _corner(buffer, {axis: start}, slot, slots), sizes)

    return jax.vmap(one)(buffer, start) if batched and start.ndim else one(buffer, start)


def _corner(buffer: Array, at: dict[int, Any], slot: Any, axis: int) -> list[Any]:
    """Where a slice begins: as `at` says by axes, at the slot along `axis` where there is one, and at 0 along the others."""
    corner: list[Any] = [jnp.zeros((), jnp.int32)] * buffer.ndim
    for i, index in (at if slot is None else {axis: slot, **at}).items():
        corner[i] = jnp.asarray(index, jnp.int32)
    return corner


def _cut(buffer: Array, slot: Any, first: Any, size: int) -> Array:
    """`size` positions of a slot: `[*batch, groups, size, dim]`."""
    if slot is None:
        return buffer if size == buffer.shape[-2] else lax.dynamic_slice_in_dim(buffer, first, size, -2)
    sizes = list(buffer.shape)
    sizes[-4], sizes[-2] = 1, size
    part = lax.dynamic_slice(buffer, _corner(buffer, {-2: first}, slot, -4), sizes)
    return lax.squeeze(part, (buffer.ndim - 4,))


def _cut_marks(marks: Array, slot: Any, first: Any, size: int) -> Array:
    """Which of `size` positions of a slot are written: `[*batch, size]`."""
    return lax.dynamic_slice_in_dim(lax.dynamic_index_in_dim(marks, slot, -2, keepdims=False), first, size, -1)
