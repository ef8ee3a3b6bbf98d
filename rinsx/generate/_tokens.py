"""Text from a model: a whole batch in one compiled program, or token by token."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._cache import Cache
from ._engine import after, begin, Drawn, Plan, plan, Prompts, Rounds
from ._sampler import Sampler


class Generation(NamedTuple):
    """What was generated. Behind the end of a sequence, all is 0.

    **Attributes:**

    - `tokens`: int32 `[batch, steps]`.
    - `lengths`: int32 `[batch]`, how many tokens each sequence has, a stop token included.
    - `log_probs`: float32 `[batch, steps]`, of each token by the model itself: at temperature 1, nothing filtered.
    - `rounds`: int32 `[batch, steps]`, how many rounds each token took, with [`rinsx.generate.Until`][]; else `None`. The first
        token comes from the prompt, which runs the most rounds.
    """

    tokens: Int[Array, "batch steps"]
    lengths: Int[Array, " batch"]
    log_probs: Float[Array, "batch steps"]
    rounds: Int[Array, "batch steps"] | None


class Token(NamedTuple):
    """One token of each sequence, as it comes from a stream.

    **Attributes:**

    - `tokens`: int32 `[batch]`.
    - `log_probs`: float32 `[batch]`.
    - `rounds`: int32 `[batch]`, or `None`.
    - `done`: bool `[batch]`, whether the sequence has ended, with this token or before.
    """

    tokens: Int[Array, " batch"]
    log_probs: Float[Array, " batch"]
    rounds: Int[Array, " batch"] | None
    done: Any


def tokens(
    model: PyTree,
    prompts: Prompts,
    *,
    steps: int,
    sampler: Sampler | None = None,
    key: Any = None,
    lengths: Any = None,
    stop: Sequence[int] = (),
    capacity: int | None = None,
    rounds: Rounds = None,
    prefill: Literal["parallel", "sequential"] | None = None,
) -> Generation:
    """Continues prompts, in one compiled program.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        model = rx.models.DecoderLM(rx.models.presets["nano"], "A^r B", r=3, key=jr.key(0))
        prompts = jnp.array([[72, 101, 108], [72, 105, 0]])
        out = rx.generate.tokens(model, prompts, lengths=[3, 2], steps=5, key=jr.key(1), rounds={"r": 2})
        out.tokens.shape  # (2, 5)
        ```

    **Arguments:**

    - `model`: a [`rinsx.models.DecoderLM`][], or any model with its methods `cache`, `decode` and `logits`.
    - `prompts`: integers `[batch, p]`, padded on the right with any; [`rinsx.generate.to_right`][] turns padding on the left.
    - `steps`: how many tokens to generate at most.
    - `sampler`: how tokens are drawn; by default as the model says, `Sampler()`.
    - `key`: one key, which is folded with the number of each sequence; or an array with a key for each, so that what
        a sequence draws depends on nothing else in the batch.
    - `lengths`: how many tokens each prompt has; by default all `p`.
    - `stop`: tokens that end a sequence.
    - `capacity`: positions in the cache, at least `p + steps`, which is the default.
    - `rounds`: numbers of rounds by the names of loops, or a [`rinsx.generate.Until`][]. By default those of the model.
    - `prefill`: `"parallel"` runs all of a prompt at once, `"sequential"` token by token. By default parallel, unless
        a loop has a sequential policy, which only the second follows.

    **Returns:**

    A [`rinsx.generate.Generation`][].

    **Raises:**

    `ValueError` for prompts, lengths, steps and capacity that do not fit each other, `TypeError` for lengths that are not integers.
    """
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
        prefill=prefill,
    )
    return _tokens(model, prompts, lengths, keys, settled)


@eqx.filter_jit
def _tokens(model: PyTree, prompts: Array, lengths: Array, keys: Array, plan: Plan) -> Generation:
    model, drawn = begin(model, prompts, lengths, keys, plan)
    batch = prompts.shape[0]
    row = lambda x: None if x is None else jnp.zeros((batch, plan.steps), x.dtype).at[:, 0].set(x)
    out = (row(drawn.token), row(drawn.log_prob), row(drawn.rounds))
    counts = jnp.ones(batch, jnp.int32)

    def one(carry):
        i, drawn, out, counts = carry
        alive = ~drawn.done
        drawn = after(model, drawn, keys, i, plan)
        put = lambda x, new: None if x is None else x.at[:, i].set(jnp.where(alive, new, 0))
        out = tuple(put(*pair) for pair in zip(out, (drawn.token, drawn.log_prob, drawn.rounds)))
        return i + 1, drawn, out, counts + alive.astype(jnp.int32)

    go_on = lambda carry: (carry[0] < plan.steps) & ~jnp.all(carry[1].done)
    _, _, (tokens, log_probs, rounds), counts = lax.while_loop(go_on, one, (jnp.int32(1), drawn, out, counts))
    return Generation(tokens, counts, log_probs, rounds)  # pyright: ignore[reportArgumentType]


def stream(
    model: PyTree,
    prompts: Prompts,
    *,
    steps: int,
    sampler: Sampler | None = None,
    key: Any = None,
    lengths: Any = None,
    stop: Sequence[int] = (),
    capacity: int | None = None,
    rounds: Rounds = None,
    prefill: Literal["parallel", "sequential"] | None = None,
) -> Iterator[Token]:
    """Continues prompts token by token: the tokens of [`rinsx.generate.tokens`][], each as soon as it is there.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        model = rx.models.DecoderLM(rx.models.presets["nano"], "A^r B", r=2, key=jr.key(0))
        for token in rx.generate.stream(model, jnp.array([[72, 105]]), steps=3, key=jr.key(1)):
            print(int(token.tokens[0]), end=" ", flush=True)
        ```

    **Arguments:**

    Those of [`rinsx.generate.tokens`][].

    **Returns:**

    An iterator of [`rinsx.generate.Token`][]. It ends once all sequences have.
    """
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
        prefill=prefill,
    )
    return _stream(model, prompts, lengths, keys, settled)


def _stream(model, prompts, lengths, keys, plan) -> Iterator[Token]:
    model, drawn = _begin(model, prompts, lengths, keys, plan)
    for i in range(1, plan.steps + 1):
        yield Token(drawn.token, drawn.log_prob, drawn.rounds, drawn.done)
        if i == plan.steps or (plan.stop and bool(jnp.all(drawn.done))):
            return
        kept = drawn._replace(cache=None, log_prob=None, rounds=None)
        drawn = _after((model, kept, keys, jnp.int32(i), plan), drawn.cache)


_begin = eqx.filter_jit(begin)


# The cache is written in place, and what the caller was given stays.
@eqx.filter_jit(donate="all-except-first")
def _after(kept: tuple[PyTree, Drawn, Array, Array, Plan], cache: Cache) -> Drawn:
    model, drawn, keys, i, plan = kept
    return after(model, drawn._replace(cache=cache), keys, i, plan)


def to_right(prompts: Int[Array, "batch p"], mask: Any) -> tuple[Int[Array, "batch p"], Int[Array, " batch"]]:
    """Prompts with their padding on the right, from a mask of what is not padding.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        prompts, lengths = rx.generate.to_right(jnp.array([[0, 0, 5, 6]]), jnp.array([[0, 0, 1, 1]]))
        prompts, lengths  # [[5, 6, 0, 0]], [2]
        ```

    **Arguments:**

    - `prompts`: integers `[batch, p]`.
    - `mask`: `[batch, p]`, true for tokens, false for padding, wherever it is.

    **Returns:**

    The prompts in order from the left, 0 behind them; and their lengths.
    """
    mask = jnp.asarray(mask, bool)
    if mask.shape != prompts.shape:
        raise ValueError(f"the mask has the shape of the prompts, {list(prompts.shape)}; got {list(mask.shape)}")
    order = jnp.argsort(~mask, axis=1, stable=True)
    moved = jnp.take_along_axis(jnp.where(mask, prompts, 0), order, axis=1)
    return moved, jnp.sum(mask, axis=1, dtype=jnp.int32)
