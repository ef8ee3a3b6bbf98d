"""Which drafted tokens stand: the rule of speculative sampling."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Int32, Key

from ._sampler import draw


def accept(
    drafted: Int[Array, "batch k"],
    draft_log_probs: Float[Array, "batch k vocab"],
    target_log_probs: Float[Array, "batch k+1 vocab"],
    keys: Key[Array, " batch"],
) -> tuple[Int32[Array, " batch"], Int32[Array, "batch k+1"]]:
    """Accepts a beginning of what was drafted and adds one token, so that what comes out has the target's distribution exactly.

    A token `x` drafted from `q` stands with probability `min(1, p(x) / q(x))`, where `p` is the target. At the first that does
    not, one is drawn from the positive part of `p - q`, normalised; if all stand, one more is drawn from the target. A distribution
    may have all its mass on one token: between two such, a draft stands for as long as they agree.

    What comes out is exact up to the rounding of float32, in which the probabilities are compared.

    ??? cite "Reference"

        Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192; Chen et al.,
        "Accelerating Large Language Model Decoding with Speculative Sampling", arXiv 2302.01318.

    **Arguments:**

    - `drafted`: tokens, each drawn from its row of `draft_log_probs`: the rule is exact for these only.
    - `draft_log_probs`: normalised, `-inf` where the probability is 0.
    - `target_log_probs`: the same of the target, given the same tokens before; one row more, which follows the last draft.
    - `keys`: one for each row, independent of those that the drafts were drawn from.

    **Returns:**

    How many of the drafted stand, in `0, ..., k`; and tokens, of which those up to and including that number count. What is
    behind them repeats the last one that does.
    """
    k = drafted.shape[1]
    keys = jax.vmap(jr.split)(keys)
    chances = jax.vmap(lambda key: jr.uniform(key, (k,), jnp.float32))(keys[:, 0])
    # Products, not quotients or differences of logarithms: those are NaN where both probabilities are 0.
    stands = chances * _probs(draft_log_probs, drafted) < _probs(target_log_probs[:, :k], drafted)
    accepted = jnp.sum(jnp.cumprod(stands, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)

    place = accepted[:, None, None]
    target = jnp.take_along_axis(target_log_probs, place, axis=1)[:, 0]
    # There is no draft behind the last: filled with probability 0, it leaves the target as it is.
    draft = jnp.take_along_axis(draft_log_probs, place, axis=1, mode="fill", fill_value=-jnp.inf)[:, 0]
    left = jnp.maximum(jnp.exp(target) - jnp.exp(draft), 0)
    # Distributions equal but for rounding may refuse, with a chance of about 1e-7, and leave nothing.
    left = jnp.where(jnp.any(left > 0, axis=-1, keepdims=True), jnp.log(left), target)
    last = draw(left, keys[:, 1])

    padded = jnp.pad(drafted.astype(jnp.int32), ((0, 0), (0, 1)))
    return accepted, jnp.where(jnp.arange(k + 1) < accepted[:, None], padded, last[:, None])


def _probs(log_probs: Float[Array, "batch k vocab"], tokens: Int[Array, "batch k"]) -> Float[Array, "batch k"]:
    return jnp.exp(jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0])
