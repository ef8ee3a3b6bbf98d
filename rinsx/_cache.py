"""The cache of keys and values that rides in the state, and how its buffers are written and read.

All keys of one block stand in one buffer, `[batch, slots, groups, positions, dim]`, or in one array a slot where every slot is
known when the program is compiled. It is carried through all loops and written in place: a buffer that went
through a scan as its inputs and outputs would be copied whole for every token.

A position is written before it is read, so that a token attends to itself like to those before it. Reading goes through
the filled part in chunks, so that its time does not depend on the capacity, unless a good part of that is filled and can be
read where it stands.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


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
    - `used`: int32 `[batch]`, in a cache made with `stops=True`, else `None`: how many rounds the last token took that ran until it
        converged (see [`rinsx.generate.Until`][]). Other passes leave it as it is; at first it is 1.
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
        clear = lambda w, block: write(w, jnp.zeros((*w.shape[:-1], t), bool), 0, self, block, -1)
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
                    new[slot] = write(buffer[slot], read(given, None, 1, self, block, t), None, self, block, -2)
                return tuple(new)
            part = read(buffer, source, count, self, block, t)
            put = lambda i, buffer: write(buffer, part, low + i * count, self, block, -2)
            return lax.fori_loop(0, (high - low) // count, put, buffer)

        swap = lambda buffers: replaced(buffers, block, copied(buffers[block]))
        return dataclasses.replace(self, keys=swap(self.keys), values=swap(self.values))


#
# Arrays: the axes `[*batch, slots, groups, positions, dim]`, without slots where there is one array for each
#


def replaced(items: tuple, i: int, item: Any) -> tuple:
    """The tuple with another item at `i`."""
    return (*items[:i], item, *items[i + 1 :])


def scalar(slot: Slot) -> Any:
    """The slot, which is the same for the whole batch."""
    return slot if isinstance(slot, int) or slot.ndim == 0 else slot[0]


def start_of(cache: Cache) -> Array:
    """Where the next position is written: a scalar where that is the same for all sequences."""
    return cache.length[0] if cache.layout.aligned and cache.length.ndim else cache.length


def _ring(cache: Cache, block: int) -> int | None:
    """How many positions a ring has, for a block with a window."""
    shelf = cache.layout.shelves[block]
    return None if shelf is None or shelf.window is None else shelf.positions


def _rank(axis: int, slot: Any) -> int:
    """The axes of a buffer of one sequence: slots (if `slot` is one), groups and positions and dim, or positions alone."""
    return (3 if axis == -2 else 1) + (slot is not None)


def write(buffer: Array, x: Array, slot: Any, cache: Cache, block: int, axis: int) -> Array:
    """`x` written at `slot` and the next positions of each sequence; positions are axis `axis`. No slot, no axis for it."""
    ring, start = _ring(cache, block), start_of(cache)
    t, batched = x.shape[axis], buffer.ndim > _rank(axis, slot)
    if ring is not None and t > 1:
        each = lambda buffer, x, start: _write_ring(buffer, x, slot, start, ring, axis)
        return (
            jax.vmap(each, in_axes=(0, 0, 0 if start.ndim else None))(buffer, x, start)
            if batched
            else each(buffer, x, start)
        )
    if ring is not None:
        start = start % ring
    # `vmap` of this would be a scatter, even at equal positions, and XLA copies the buffer for that.
    if not batched:
        return lax.dynamic_update_slice(buffer, x, _corner(buffer, {axis: start}, slot, 0))
    if start.ndim == 0:
        return lax.dynamic_update_slice(buffer, x, _corner(buffer, {axis: start}, slot, 1))
    if jax.default_backend() != "cpu":
        each = lambda buffer, x, start: lax.dynamic_update_slice(buffer, x, _corner(buffer, {axis: start}, slot, 0))
        return jax.vmap(each)(buffer, x, start)

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


def read(buffer: Array, slot: Any, count: int, cache: Cache, block: int, t: int, axis: int = -2) -> Array:
    """What stands at the next `t` positions of each sequence, in `count` slots."""
    ring, start = _ring(cache, block), start_of(cache)
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


def cut(buffer: Array, slot: Any, first: Any, size: int) -> Array:
    """`size` positions of a slot: `[*batch, groups, size, dim]`."""
    if slot is None:
        return buffer if size == buffer.shape[-2] else lax.dynamic_slice_in_dim(buffer, first, size, -2)
    sizes = list(buffer.shape)
    sizes[-4], sizes[-2] = 1, size
    part = lax.dynamic_slice(buffer, _corner(buffer, {-2: first}, slot, -4), sizes)
    return lax.squeeze(part, (buffer.ndim - 4,))


def cut_marks(marks: Array, slot: Any, first: Any, size: int) -> Array:
    """Which of `size` positions of a slot are written: `[*batch, size]`."""
    return lax.dynamic_slice_in_dim(lax.dynamic_index_in_dim(marks, slot, -2, keepdims=False), first, size, -1)
