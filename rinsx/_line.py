"""The handle of a cache at one visit: it knows where in the cache the visit writes and reads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, PyTree

from ._attend import attention, visible
from ._cache import Cache, cut, cut_marks, read, replaced, scalar, Shelf, start_of, write
from ._handle import AbstractHandle, only_causal, Plain, Stream


# An array of a slot that is filled by more than a third is read whole, for a few tokens: to copy a chunk takes about three times
# as long as to read it (see the results on decoding). For a prompt the copy is little beside the products.
_FULL, _FEW = 3, 8


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
    plain: Plain | None = None

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
        return dataclasses.replace(self, appended=False, plain=None)

    def all_done(self) -> "Line":
        """The handle of a stack whose layers are all done."""
        return dataclasses.replace(self, appended=True)

    def attend(self, q, k, v, *, segments=None, causal=True, window=None):
        layout = self.cache.layout
        if self.width == 0:
            return attention(q, k, v, segments, causal=causal, window=window), self
        only_causal(causal)
        if segments is not None and not layout.whole:
            raise ValueError("a cache holds one document for each sequence: leave out segments=")
        line = self.append(k, v, window=window)
        if layout.whole:
            keys, values = (line._slot(b[self.block]) for b in (line.cache.keys, line.cache.values))
            return attention(q, keys, values, segments, window=window), line
        return line._attend(q, window), line

    def _slot(self, buffers):
        """All positions of this slot."""
        shelf: Any = self.cache.layout.shelves[self.block]
        if shelf.separate:
            return buffers[self.slot]
        return lax.dynamic_index_in_dim(buffers, scalar(self.slot), -4, keepdims=False)

    def append(self, k, v, *, window=None):
        if self.width == 0:
            # A block that shares nothing, in a forward pass of all positions.
            return dataclasses.replace(self, plain=Plain(k, v))
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
                new.append(replaced(buffers, self.slot, put))
            keys, values = new
        else:
            slot = scalar(self.slot)
            keys, values = (
                self._put(b, x, slot, lambda before, b=b: (b, scalar(before))) for b, x in ((keys, k), (values, v))
            )
        if old is not None:
            # A round that only reads leaves the mark of the one that has written.
            on = self._alive() | read(old[self.block], scalar(self.slot), 1, self.cache, self.block, t, -1)
            put = write(old[self.block], on, scalar(self.slot), self.cache, self.block, -1)
            old = replaced(old, self.block, put)
        put_in = lambda buffers, x: replaced(buffers, self.block, x)
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
            past = read(of_before, slot_before, 1, self.cache, self.block, t)
            x = jnp.where(over(self.cache.active), x, past)
        if self.writes is not True:
            x = jnp.where(over(self.writes), x, read(buffer, slot, 1, self.cache, self.block, t))
        return write(buffer, x, slot, self.cache, self.block, -2)

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
        if self.plain is not None:
            return self.plain.fold(step, carry, window=window)
        shelf, cache, layout = self._shelf(window), self.cache, self.cache.layout
        at = start_of(cache)[..., None] + jnp.arange(cache.tokens(), dtype=jnp.int32)
        size = min(layout.chunk, shelf.positions)
        keys, values = cache.keys[self.block], cache.values[self.block]
        slot = None
        if shelf.separate:
            keys, values = keys[self.slot], values[self.slot]
        else:
            slot = scalar(self.slot)

        def one(i, carry, size=size):
            first = i * size
            part = lambda b: cut(b, slot, first, size)
            index = first + jnp.arange(size, dtype=jnp.int32)
            if shelf.window is not None:
                last = at[..., -1:]
                index = last - (last - index) % shelf.positions
            seen = visible(at, index, window) & (index >= 0)[..., None, :]
            if cache.written is not None:
                marks = cut_marks(cache.written[self.block], scalar(self.slot), first, size)
                own = at[..., :, None] == index[..., None, :]
                seen = seen & (marks[..., None, :] | own)
            return step(carry, part(keys), part(values), seen)

        if shelf.positions == size:
            return _apart(lambda carry: one(0, carry), carry, start_of(cache))
        filled = jnp.max(cache.length) + cache.tokens()
        if shelf.window is not None:
            filled = jnp.minimum(filled, shelf.positions)
        chunks = lambda carry: lax.fori_loop(0, -(-filled // size), one, carry)
        if not self._stands_alone():
            return chunks(carry)
        return lax.cond(_FULL * filled > shelf.positions, lambda carry: one(0, carry, shelf.positions), chunks, carry)

    def _stands_alone(self):
        """Whether this slot is an array that XLA on CPU reads where it stands, while it would copy a chunk of it."""
        # A choice for each sequence, as under `vmap`, would compute both.
        batched, few = self.cache.length.ndim > 0, self.cache.tokens() <= _FEW
        return jax.default_backend() == "cpu" and self.separate and batched and few

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


def _apart(fn: Callable, carry: Any, start: Any) -> Any:
    """`fn(carry)`, in a computation that XLA on CPU does not fuse with what is around it."""
    # What writes into the buffer would be fused with what reads it, and once more with what goes on to the next token. Of two
    # such writes one cannot be in place: XLA copies the whole buffer up to three times for each token. A branch is not fused;
    # a barrier is taken away too early in some versions. On other backends a branch may wait for the host, and where nothing
    # is compiled it would be compiled at each call.
    if jax.default_backend() != "cpu" or not isinstance(start, Tracer):
        return fn(carry)
    never = lambda carry: jax.tree.map(jnp.zeros_like, jax.eval_shape(fn, carry))
    # That no position is below 0 is what XLA does not know.
    return lax.cond(jnp.min(start) >= 0, fn, never, carry)


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


def _known(x: Known | Array) -> Any:
    return x.value if isinstance(x, Known) else x
