"""How the next token is drawn from logits."""

import math
import operator
from typing import SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from .._check import at_least


class Sampler(eqx.Module):
    """The distribution of the next token, made from logits.

    In this order, as Hugging Face transformers does it, and only what is asked for: the repetition penalty, the temperature,
    top-k, top-p, min-p. Every filter sees what the one before it has left. Where tokens tie, those of the lowest numbers are kept.

    A sampler holds nothing but Python numbers, as static fields: other numbers are another program, to be compiled anew.

    **Attributes:**

    - `temperature`: what logits are divided by; 0 is greedy.
    - `top_k`, `top_p`, `min_p`, `repetition_penalty`: as given; `None` where there is none.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        sampler = rx.generate.Sampler(temperature=0.8, top_k=2)
        log_probs = sampler.log_probs(jnp.array([[1.0, 3.0, 2.0, 0.0]]))
        jnp.exp(log_probs)  # [[0, 0.777, 0.223, 0]]
        sampler.draw(log_probs, jr.split(jr.key(0), 1))  # a token for each row: 1 or 2
        ```
    """

    temperature: float = eqx.field(static=True)
    top_k: int | None = eqx.field(static=True)
    top_p: float | None = eqx.field(static=True)
    min_p: float | None = eqx.field(static=True)
    repetition_penalty: float | None = eqx.field(static=True)

    def __init__(
        self,
        temperature: float | int = 1.0,
        top_k: SupportsIndex | None = None,
        top_p: float | int | None = None,
        min_p: float | int | None = None,
        repetition_penalty: float | int | None = None,
    ):
        """**Arguments:**

        - `temperature`: at least 0. At 0 all probability is on the largest logit, whatever the three filters are: each keeps
            the largest.
        - `top_k`: keeps this many tokens, the likeliest; at least 1. All, if there are no more.
        - `top_p`: keeps the fewest of the likeliest tokens whose probabilities add up to this much, in `(0, 1]`: the token that
            reaches it is kept. 1 keeps all.
        - `min_p`: keeps tokens at least this many times as likely as the likeliest, in `(0, 1]`.
        - `repetition_penalty`: above 0. The logits of tokens already seen are divided by it where they are positive, and
            multiplied by it where they are negative: above 1 they become less likely, below 1 likelier.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"`temperature` must be at least 0, which is greedy, and finite; got {temperature}.")
        for name, value in {"top_p": top_p, "min_p": min_p}.items():
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"`{name}` is a probability and must be in (0, 1]; got {value}.")
        if repetition_penalty is not None and not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
            raise ValueError(f"`repetition_penalty` must be above 0, and finite; got {repetition_penalty}.")
        self.temperature = float(temperature)
        self.top_k = _integer(top_k)
        at_least(1, top_k=self.top_k)
        self.top_p, self.min_p, self.repetition_penalty = _float(top_p), _float(min_p), _float(repetition_penalty)

    def log_probs(
        self, logits: Float[Array, "*batch vocab"], seen: Bool[Array, "*batch vocab"] | None = None
    ) -> Float32[Array, "*batch vocab"]:
        """The logarithm of the distribution that is drawn from.

        **Arguments:**

        - `logits`: of any floating dtype, at least one of each row finite, none NaN or `inf`; one that is `-inf` is never drawn.
        - `seen`: the tokens that the repetition penalty applies to. To be given if there is one, and only then.

        **Returns:**

        Float32, with probabilities that add up to 1; `-inf` for what is filtered out.
        """
        if (seen is None) != (self.repetition_penalty is None):
            given = "none was given" if seen is None else "one was given"
            raise ValueError(
                "`seen` must be given exactly if there is a repetition penalty; "
                f"{given}, with repetition_penalty={self.repetition_penalty}."
            )
        x = logits.astype(jnp.float32)
        if seen is not None and self.repetition_penalty is not None:
            penalised = jnp.where(x > 0, x / self.repetition_penalty, x * self.repetition_penalty)
            x = jnp.where(seen, penalised, x)
        if self.temperature == 0:
            largest = jnp.argmax(x, axis=-1, keepdims=True)
            return jnp.where(_numbers(x) == largest, jnp.float32(0), -jnp.inf)
        # With the largest at 0, dividing by a low temperature makes no `inf`.
        x = (x - jnp.max(x, axis=-1, keepdims=True)) / _in_float32(self.temperature)
        x = self._likeliest(x)
        if self.min_p is not None:
            x = jnp.where(x >= math.log(self.min_p), x, -jnp.inf)
        return jax.nn.log_softmax(x, axis=-1)

    def draw(self, log_probs: Float[Array, "*batch vocab"], keys: Key[Array, "*batch"]) -> Int32[Array, "*batch"]:
        """Draws one token for each row, from that row's own key: what a row draws does not depend on the rows beside it.

        (Not so with keys of the implementation `rbg`, which JAX draws from differently in a batch.)

        **Arguments:**

        - `log_probs`: what this sampler's `log_probs` returned.
        - `keys`: of `jax.random.key`, one for each row.

        **Returns:**

        Int32, never a token that was filtered out.
        """
        if self.temperature == 0:
            return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
        if self.top_k is None:
            return draw(log_probs, keys)
        # Noise for a few tokens costs far less than noise for the whole vocabulary.
        values, tokens = lax.top_k(log_probs, min(self.top_k, log_probs.shape[-1]))
        place = draw(values, keys)
        return jnp.take_along_axis(tokens, place[..., None], axis=-1)[..., 0].astype(jnp.int32)

    def _likeliest(self, x: Float32[Array, "*batch vocab"]) -> Float32[Array, "*batch vocab"]:
        """Top-k and top-p: what they have in common is that they keep the first few in the order of likelihood."""
        vocab = x.shape[-1]
        top_p = None if self.top_p == 1 else self.top_p
        most = vocab if self.top_k is None else min(self.top_k, vocab)
        if top_p is None and most == vocab:
            return x
        # Equal ones come out in the order of their numbers. Of the whole vocabulary, this is a sort.
        # XLA would merge the look-up of the last into it and then sort everything: the barrier keeps them apart.
        values, tokens = lax.optimization_barrier(lax.top_k(x, most))
        if top_p is None:
            last = jnp.full((*x.shape[:-1], 1), most - 1)
        else:
            probs = jax.nn.softmax(values, axis=-1)
            before = jnp.cumsum(probs, axis=-1) - probs
            last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
        value, token = (jnp.take_along_axis(of, last, axis=-1) for of in (values, tokens))
        return jnp.where((x > value) | ((x == value) & (_numbers(x) <= token)), x, -jnp.inf)


def draw(log_probs: Float[Array, "*batch vocab"], keys: Key[Array, "*batch"]) -> Int32[Array, "*batch"]:
    """Draws one token for each row of log-probabilities, whosever they are, from that row's own key."""
    one = jr.categorical
    for _ in range(keys.ndim):
        one = jax.vmap(one)
    return one(keys, log_probs).astype(jnp.int32)


def _numbers(x: Float[Array, "*batch vocab"]) -> Int32[Array, " vocab"]:
    return jnp.arange(x.shape[-1], dtype=jnp.int32)


def _in_float32(temperature: float) -> float:
    # Neither this nor its reciprocal may become 0 or `inf`.
    return min(max(temperature, 1e-37), 1e37)


def _float(value: float | int | None) -> float | None:
    return None if value is None else float(value)


def _integer(value: SupportsIndex | None) -> int | None:
    try:
        return None if value is None else operator.index(value)
    except TypeError:
        raise TypeError(f"`top_k` must be an integer; got {value!r}.") from None
