"""Self-speculation: the model drafts at few rounds what it then verifies at many, in one pass."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._cache import Cache
from .._check import at_least
from .._loop import with_rounds
from ._accept import accept
from ._engine import begin, has_sequential, mark, model_key, Plan, plan, Prompts
from ._sampler import Sampler
from ._until import Until


class Speculation(NamedTuple):
    """What was generated, and what it took. Behind the end of a sequence, all is 0.

    **Attributes:**

    - `tokens`, `lengths`, `log_probs`: as of [`rinsx.generate.Generation`][].
    - `passes`: int32, how many times the deep model has run over drafts.
    - `drafted`, `accepted`: int32 `[batch]`, how many tokens were drafted for each sequence, and how many of them stood.
    """

    tokens: Int[Array, "batch steps"]
    lengths: Int[Array, " batch"]
    log_probs: Float[Array, "batch steps"]
    passes: Int[Array, ""]
    drafted: Int[Array, " batch"]
    accepted: Int[Array, " batch"]


def speculate(
    model: PyTree,
    prompts: Prompts,
    *,
    draft: Mapping[str, int],
    ahead: int = 4,
    steps: int,
    sampler: Sampler | None = None,
    key: Any = None,
    lengths: Any = None,
    stop: Sequence[int] = (),
    capacity: int | None = None,
    rounds: Mapping[str, Any] | None = None,
) -> Speculation:
    """Continues prompts as the deep model would, with drafts by the same model at fewer rounds.

    `ahead` tokens are drafted at `draft` rounds, then all are run at once at the model's own rounds, and a beginning of them is
    accepted by the rule of speculative sampling. What comes out has exactly the distribution of the deep model, a repetition
    penalty included: each draft is penalised, and verified, by what stands before it. With temperature 0 it is what
    [`rinsx.generate.tokens`][] gives, up to ties. Whether it is faster depends on how often drafts stand: the result says.

    Starts and blocks that draw random numbers from their key draw anew in each pass: then the text has the distribution of what
    [`rinsx.generate.tokens`][] draws, but greedy text is not the same.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        model = rx.models.DecoderLM(rx.models.presets["nano"], "A^r B", r=3, key=jr.key(0))
        out = rx.generate.speculate(model, jnp.array([[72, 105]]), draft={"r": 1}, ahead=2, steps=4, key=jr.key(1))
        out.accepted, out.drafted
        ```

    ??? cite "Reference"

        Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192.

    **Arguments:**

    - `draft`: numbers of rounds of the drafts, Python integers, by the names of loops.
    - `ahead`: how many tokens are drafted at a time.
    - The others are those of [`rinsx.generate.tokens`][]; `rounds` are those of the deep model.

    **Returns:**

    A [`rinsx.generate.Speculation`][].

    **Raises:**

    `ValueError` for loops with a sequential policy, whose deep pass over several tokens would not be what it is token by
    token, and for a [`rinsx.generate.Until`][] as `rounds`.
    """
    at_least(1, ahead=ahead)
    if isinstance(rounds, Until):
        raise ValueError(
            f"`rounds` are numbers of rounds by the names of loops, the same for all tokens; got {rounds!r}"
        )
    model, prompts, lengths, keys, settled = plan(
        model,
        prompts,
        steps=steps,
        sampler=sampler,
        key=key,
        lengths=lengths,
        stop=stop,
        capacity=capacity,
        rounds=rounds,
        prefill=None,
        more=ahead + 1,
    )
    if has_sequential(model):
        raise ValueError("a loop has a sequential cache policy, which several tokens at once do not follow")
    draft = {name: operator.index(r) for name, r in draft.items()}
    return _speculate(model, draft, prompts, lengths, keys, settled, ahead)


@eqx.filter_jit
def _speculate(model, draft, prompts, lengths, keys, plan: Plan, ahead: int) -> Speculation:
    model, first = begin(model, prompts, lengths, keys, plan)
    # One set of matrices for both.
    shallow = with_rounds(model, **draft)
    batch = prompts.shape[0]
    row = jnp.arange(batch)
    # Room behind the end, for what is accepted beyond it.
    out = jnp.zeros((batch, plan.steps + ahead + 1), jnp.int32).at[:, 0].set(first.token)
    log_probs = jnp.zeros(out.shape, jnp.float32).at[:, 0].set(first.log_prob)  # pyright: ignore[reportArgumentType]
    zeros = jnp.zeros(batch, jnp.int32)

    def one(carry):
        cache, token, seen, out, log_probs, counts, done, passes, drafted, accepted = carry
        # A key for each position, whatever was accepted before.
        here = jax.vmap(jr.fold_in)(keys, counts)
        # And one for each run of the model, behind those of the prompt.
        run = 2**30 + passes * (ahead + 1)
        before = cache.length

        def guess(carry, j):
            cache, token, seen = carry
            hidden, cache = shallow.decode(token[:, None], cache, key=model_key(keys, run + j))
            probs = plan.sampler.log_probs(shallow.logits(hidden[:, 0]), seen)
            token = plan.sampler.draw(probs, jax.vmap(jr.fold_in, (0, None))(here, j))
            return (cache, token, mark(seen, token[:, None], jnp.ones((batch, 1), bool))), (token, probs, seen)

        drafts = (_with_rule(cache, "leave"), token, seen)
        (cache, _, last), found = lax.scan(guess, drafts, jnp.arange(ahead))
        guesses, probs, ahead_of = jax.tree.map(lambda x: x.swapaxes(0, 1), found)
        cache = _with_rule(cache, "fill").rewind(before)
        key = model_key(keys, run + ahead)
        hidden, cache = model.decode(jnp.concatenate([token[:, None], guesses], 1), cache, key=key)
        logits = model.logits(hidden)
        if seen is not None:
            ahead_of = jnp.concatenate([ahead_of, last[:, None]], 1)  # pyright: ignore[reportOptionalSubscript]
        target = plan.sampler.log_probs(logits, ahead_of)
        stands, tokens = accept(guesses, probs, target, jax.vmap(jr.fold_in, (0, None))(here, ahead))
        # Up to the end, a stop token, or what is asked for.
        order = jnp.arange(ahead + 1)
        ends = jnp.isin(tokens, jnp.asarray(plan.stop)) if plan.stop else jnp.zeros(tokens.shape, bool)
        ended = jnp.cumsum(ends, 1) - ends
        valid = (order <= stands[:, None]) & (ended == 0) & (counts[:, None] + order < plan.steps) & ~done[:, None]
        new = jnp.sum(valid, 1, dtype=jnp.int32)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
        at = counts[:, None] + order
        out = out.at[row[:, None], at].set(jnp.where(valid, tokens, out[row[:, None], at]))
        log_probs = log_probs.at[row[:, None], at].set(jnp.where(valid, chosen, log_probs[row[:, None], at]))
        # The last new token is not in the cache yet.
        cache = cache.rewind(jnp.where(done, before, before + new))
        token = jnp.where(done, token, tokens[row, jnp.maximum(new - 1, 0)])
        seen = mark(seen, tokens, valid)
        alive = (~done).astype(jnp.int32)
        counts = counts + new
        done = done | jnp.any(ends & valid, 1) | (counts >= plan.steps)
        return (
            cache,
            token,
            seen,
            out,
            log_probs,
            counts,
            done,
            passes + 1,
            drafted + alive * ahead,
            accepted + alive * stands,
        )

    done = first.done | (plan.steps <= 1)
    carry = (first.cache, first.token, first.seen, out, log_probs, zeros + 1, done, jnp.int32(0), zeros, zeros)
    carry = lax.while_loop(lambda carry: ~jnp.all(carry[6]), one, carry)
    *_, out, log_probs, counts, _, passes, drafted, accepted = carry
    return Speculation(out[:, : plan.steps], counts, log_probs[:, : plan.steps], passes, drafted, accepted)


def _with_rule(cache: Cache, unfilled: str) -> Cache:
    """The cache by another rule for rounds that are not run: what drafts leave unfilled is written again by the deep pass."""
    return dataclasses.replace(cache, layout=dataclasses.replace(cache.layout, unfilled=unfilled))
