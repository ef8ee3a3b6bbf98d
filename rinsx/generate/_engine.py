"""What all ways to generate share: a model made ready, the prompt run, one token drawn."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, Key, PyTree

from .._loop import forward_only, loops_of, with_room, with_rounds
from ._sampler import Sampler
from ._until import Until


# How many tokens of a prompt run at once where a block has a window, whose room is larger by as many.
_WINDOW_PIECE = 128
# Above so many slots a program that has each visit by itself takes long to compile.
_FEW_SLOTS = 128

# Integers `[batch, p]`, of JAX, NumPy or lists.
Prompts = Any
Rounds = Mapping[str, Any] | Until | None


class Plan(NamedTuple):
    """What a call asks for, known before anything is compiled; equal plans share a program. `more` is room for drafts."""

    steps: int
    capacity: int | None
    sequential: bool
    aligned: bool
    sampler: Sampler
    stop: tuple[int, ...]
    until: Until | None
    more: int


class Drawn(NamedTuple):
    """Where generation stands: the last token of each sequence, and what is needed for the next."""

    cache: Any
    token: Int[Array, " batch"]
    log_prob: Any
    rounds: Int[Array, " batch"] | None
    done: Bool[Array, " batch"]
    seen: Bool[Array, "batch vocab"] | None


def plan(
    model: PyTree,
    prompts: Prompts,
    *,
    steps: int,
    sampler: Sampler | None,
    key: Any,
    lengths: Any,
    stop: Any,
    capacity: int | None,
    rounds: Rounds,
    prefill: Literal["parallel", "sequential"] | None,
    more: int = 0,
) -> tuple[PyTree, Array, Array, Array, Plan]:
    """Checks the arguments; returns the model at its rounds, prompts, lengths, keys and the plan. `more` is room for drafts."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be an integer of at least 1; got {steps!r}.")
    prompts = jnp.asarray(prompts)
    if prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer) or prompts.shape[1] == 0:
        raise ValueError(
            f"prompts are integers [batch, p], with at least one token each; got {prompts.dtype}{list(prompts.shape)}"
        )
    batch, p = prompts.shape
    until = rounds if isinstance(rounds, Until) else None
    if until is not None:
        model = with_rounds(model, **{until.loop: jnp.int32(until.most)})
        model = with_room(model, **{until.loop: until.most})
    elif rounds is not None:
        model = with_rounds(model, **dict(rounds))  # pyright: ignore[reportCallIssue, reportArgumentType]
    if not all(loop.static for loop in loops_of(model)):
        model = forward_only(model)
    aligned = lengths is None
    lengths = jnp.full(batch, p, jnp.int32) if lengths is None else _lengths(lengths, batch, p)
    if prefill not in (None, "parallel", "sequential"):
        raise ValueError(f"`prefill` is 'parallel' or 'sequential'; got {prefill!r}")
    one_by_one = prefill == "sequential" or (prefill is None and has_sequential(model))
    if capacity is not None and capacity < p + steps + more:
        extra = f" and drafts of {more}" if more else ""
        raise ValueError(
            f"`capacity` is {capacity} positions, but a prompt of {p}, {steps} steps{extra} need {p + steps + more}"
        )
    sampler = Sampler() if sampler is None else sampler
    if not isinstance(sampler, Sampler):
        raise TypeError(f"`sampler` is an rx.generate.Sampler; got {sampler!r}")
    # What has ended stands still where that saves rounds.
    aligned = aligned and not more and not (len(stop) > 0 and until is not None)
    settled = Plan(steps, capacity, one_by_one, aligned, sampler, tuple(stop), until, more)
    return model, prompts, lengths, _keys(key, batch, sampler), settled


def _lengths(lengths: Any, batch: int, p: int) -> Int[Array, " batch"]:
    """The length of each prompt, checked."""
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"`lengths` has one number for each of {batch} prompts; got shape {list(lengths.shape)}")
    known = not isinstance(lengths, Tracer)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        told = f": {lengths.tolist()}" if known else ""
        raise TypeError(f"`lengths` are integers from 1 to {p}; got {lengths.dtype}{told}")
    if known and not bool(jnp.all((lengths >= 1) & (lengths <= p))):
        raise ValueError(f"`lengths` are from 1 to {p}, the length of the longest prompt; got {lengths.tolist()}")
    return lengths.astype(jnp.int32)


def _keys(key: Any, batch: int, sampler: Sampler) -> Key[Array, " batch"]:
    """A key for each sequence."""
    if key is None:
        if sampler.temperature != 0:
            raise ValueError("sampling draws random numbers: give key=, or Sampler(temperature=0)")
        key = jr.key(0)
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        key = jr.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jr.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"`key` is one key, or one for each of {batch} sequences; got shape {list(key.shape)}")
    return key


def begin(model: PyTree, prompts: Array, lengths: Array, keys: Array, plan: Plan) -> tuple[PyTree, Drawn]:
    """Makes the model ready to be called many times, where it knows how; runs the prompts and draws the first tokens."""
    batch, p = prompts.shape
    real = jnp.arange(p) < lengths[:, None]
    # Padding may be any number: one that no token has would be embedded as NaN, which no weight of attention takes away.
    prompts = jnp.where(real, prompts, 0)
    stops = plan.until is not None
    shapes = eqx.filter_eval_shape(lambda: model.cache(batch, p + plan.steps, stops=stops))
    kept = [shelf for shelf in shapes.layout.shelves if shelf is not None]
    # Each visit has a program by itself.
    separate = sum(shelf.slots for shelf in kept) <= _FEW_SLOTS
    if separate and hasattr(model, "apart"):
        model = model.apart()
    piece = 1 if plan.sequential else p
    if any(shelf.window is not None for shelf in kept):
        piece = min(piece, _WINDOW_PIECE)
    # A prompt that has ended goes on to write padding, up to the end of the longest.
    capacity = max(-(-p // piece) * piece, p + plan.steps + plan.more, plan.capacity or 0)
    cache = model.cache(
        batch,
        capacity,
        aligned=plan.aligned,
        separate=separate,
        trusted=True,
        stops=stops,
        piece=max(piece, plan.more),
    )
    n = -(-p // piece)
    padded = jnp.pad(prompts, ((0, 0), (0, n * piece - p)))
    pieces = padded.reshape(batch, n, piece).swapaxes(0, 1)

    def one(carry, x):
        cache, last = carry
        tokens, number = x
        behind = lengths - number * piece
        # All sequences are as long as the prompt where they are aligned; then what is padding is not kept by any.
        counts = jnp.clip(behind, 0, piece)
        hidden, cache = model.decode(tokens, cache, counts=counts, key=model_key(keys, number))
        here = jnp.take_along_axis(hidden, jnp.clip(behind - 1, 0, piece - 1)[:, None, None], axis=1)[:, 0]
        mine = (behind >= 1) & (behind <= piece)
        return (cache, jnp.where(mine[:, None], here, last)), None

    like = jax.eval_shape(lambda: model.decode(pieces[0], cache, key=model_key(keys, 0))[0])
    carry = (cache, jnp.zeros((batch, like.shape[-1]), like.dtype))
    numbers = jnp.arange(n, dtype=jnp.int32)
    if n == 1:
        carry, _ = one(carry, (pieces[0], numbers[0]))
    else:
        carry, _ = lax.scan(one, carry, (pieces, numbers))
    cache, last = carry
    logits = model.logits(last)
    seen = None
    if plan.sampler.repetition_penalty is not None:
        seen = mark(jnp.zeros(logits.shape, bool), prompts, real)
    rounds = None if plan.until is None else jnp.full(batch, plan.until.most, jnp.int32)
    return model, _draw(logits, cache, jnp.zeros(batch, bool), seen, rounds, keys, 0, plan)


def after(model: PyTree, drawn: Drawn, keys: Array, i: Any, plan: Plan) -> Drawn:
    """Runs the last tokens and draws token `i` of each sequence; sequences that are done stand still."""
    # Sequences that are aligned stay so: what has ended goes on, unseen.
    counts = None if plan.aligned or not plan.stop else 1 - drawn.done.astype(jnp.int32)
    options = {} if plan.until is None else {"until": plan.until}
    key = model_key(keys, i + 2**30)
    hidden, cache = model.decode(drawn.token[:, None], drawn.cache, counts=counts, key=key, **options)
    rounds = None if plan.until is None else cache.used
    return _draw(model.logits(hidden[:, 0]), cache, drawn.done, drawn.seen, rounds, keys, i, plan)


def _draw(logits, cache, done, seen, rounds, keys, i, plan: Plan) -> Drawn:
    log_probs = plan.sampler.log_probs(logits, seen)
    token = plan.sampler.draw(log_probs, jax.vmap(jr.fold_in, (0, None))(keys, i))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], -1)[:, 0]
    token, chosen = jnp.where(done, 0, token), jnp.where(done, 0, chosen)
    seen = mark(seen, token[:, None], ~done[:, None])
    if plan.stop:
        done = done | jnp.isin(token, jnp.asarray(plan.stop))
    return Drawn(cache, token, chosen, rounds, done, seen)


def mark(seen: Array | None, tokens: Array, real: Array) -> Array | None:
    """What has been seen of the vocabulary, `[batch, vocab]`, with those of the `tokens`, `[batch, n]`, that are real."""
    return None if seen is None else seen.at[jnp.arange(len(tokens))[:, None], tokens].max(real)


def has_sequential(model: PyTree) -> bool:
    """Whether a loop has a policy that is defined token by token."""
    return any(loop.cache is not None and not loop.cache.parallel for loop in loops_of(model))


def model_key(keys: Array, i: Any) -> Array:
    """For starts that draw; of the first sequence, since one draw serves the whole batch."""
    return jr.fold_in(jr.fold_in(keys[0], 2**31 - 1), i)
