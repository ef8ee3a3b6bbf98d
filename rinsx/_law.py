"""A law of depth: a finite table of integer weights, and draws from exactly that table."""

import abc
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import SupportsIndex

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, Int32, PRNGKeyArray, UInt32


INT32_MAX = 2**31 - 1
_APPORTIONED = 2**30
# Most laws list every depth up to their largest, in big integers. This bounds the work.
_LONGEST = 1024


class AbstractLaw(eqx.Module):
    """A distribution over the number of rounds.

    A law holds nothing but Python numbers, as static fields: it is hashable, and a
    pytree without leaves.

    **Attributes:**

    - `support`: the depths that can be drawn: increasing, at least 1, each of positive
        weight.
    - `weights`: the integer weight of each depth in `support`, with a sum below
        `2**31`. Wherever the law is exactly proportional to such integers, these are
        the ones. Elsewhere they are apportioned (largest remainder) to a sum of exactly
        `2**30`, and a depth whose share is zero is left out. `pmf`, `mean`, `sample`
        and `quota` describe this table and nothing else.
    """

    support: eqx.AbstractVar[tuple[int, ...]]
    weights: eqx.AbstractVar[tuple[int, ...]]

    @property
    def max(self) -> int:
        """The largest depth that can be drawn: the static maximum that a loop needs."""
        return self.support[-1]

    @abc.abstractmethod
    def pmf(self) -> dict[int, Fraction]:
        """The exact probability of each depth in `support`."""

    @abc.abstractmethod
    def mean(self) -> Fraction:
        """The exact mean of the depths that are sampled."""

    @abc.abstractmethod
    def at(self, step: SupportsIndex) -> "AbstractLaw":
        """The law in force at one training step: itself, except for a
        [`rinsx.depth.Curriculum`][].

        **Arguments:**

        - `step`: the training step, counted from 0.

        **Returns:**

        A law that is the same at every step.
        """

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, step: Int[Array, ""] | SupportsIndex | None = None) -> Int32[Array, ""]:
        """Draws one depth. Can be jitted and vmapped.

        **Arguments:**

        - `key`: a `jax.random.key`.
        - `step`: the training step, counted from 0, possibly traced. Required by
            [`rinsx.depth.Curriculum`][]; the other laws are the same at every step.

        **Returns:**

        An int32 scalar.
        """

    @abc.abstractmethod
    def quota(self, n: int, key: PRNGKeyArray) -> Int32[Array, " n"]:
        """Draws `n` depths whose counts are as near to `n * pmf` as integers allow
        (largest remainder), in random order.

        Where `n * pmf` is integral, a run over these depths costs exactly what is
        expected of it. Elsewhere each count is off by less than one.

        **Arguments:**

        - `n`: how many depths to draw.
        - `key`: a `jax.random.key`, for the order.

        **Returns:**

        An int32 array of shape `(n,)`.
        """


class AbstractTable(AbstractLaw):
    """A law that is the same at every step."""

    def pmf(self) -> dict[int, Fraction]:
        total = sum(self.weights)
        return {r: Fraction(w, total) for r, w in zip(self.support, self.weights)}

    def mean(self) -> Fraction:
        return sum((r * p for r, p in self.pmf().items()), Fraction(0))

    def at(self, step: SupportsIndex) -> AbstractLaw:
        del step
        return self

    def sample(self, key: PRNGKeyArray, step: Int[Array, ""] | SupportsIndex | None = None) -> Int32[Array, ""]:
        del step
        return lookup(self.support, self.weights, below(sum(self.weights), key))

    def quota(self, n: int, key: PRNGKeyArray) -> Int32[Array, " n"]:
        if n < 0:
            raise ValueError(f"`n` must not be negative; got {n}.")
        depths = np.repeat(np.array(self.support, np.int32), apportion(self.weights, n))
        return jr.permutation(key, jnp.asarray(depths))


def below(total: int, key: PRNGKeyArray) -> UInt32[Array, ""]:
    """Draws an integer uniformly from `range(total)`, for a `total` below `2**31`."""
    # Above 2**16, `jr.randint` is 32 bits modulo `total`: at 3 * 2**29 the lowest two
    # thirds come with probability 3/4. Rejection has no bias. A candidate has as few
    # bits as `total`, and is accepted with probability 1/2 or more. All 64 are refused,
    # which gives the largest depth, with probability 2**-64 or less.
    candidates = jr.bits(key, (64,), jnp.uint32) >> (32 - total.bit_length())
    return candidates[jnp.argmax(candidates < total)]


def lookup(support: tuple[int, ...], weights: tuple[int, ...], draw: UInt32[Array, ""]) -> Int32[Array, ""]:
    """The depth that owns `draw` once `range(sum(weights))` is dealt out in order."""
    bounds = jnp.asarray(list(itertools.accumulate(weights))[:-1], jnp.uint32)
    index = jnp.searchsorted(bounds, draw, side="right")
    return jnp.asarray(support, jnp.int32)[index]


def apportion(weights: Sequence[int], total: int) -> list[int]:
    """Splits `total` in proportion to `weights`: largest remainder, then order."""
    whole = sum(weights)
    shares, remainders = zip(*(divmod(w * total, whole) for w in weights))
    order = sorted(range(len(weights)), key=lambda i: -remainders[i])
    rounded_up = set(order[: total - sum(shares)])
    return [share + (i in rounded_up) for i, share in enumerate(shares)]


def table_of(weights: Mapping[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The `support` and `weights` of a law with integer weights of any size."""
    depths = sorted(weights)
    divisor = math.gcd(*weights.values())
    reduced = [weights[r] // divisor for r in depths]
    if sum(reduced) > INT32_MAX:
        reduced = apportion(reduced, _APPORTIONED)
    support, kept = zip(*((r, w) for r, w in zip(depths, reduced) if w > 0))
    return support, kept


def checked_depth(name: str, value: SupportsIndex, largest: int = _LONGEST) -> int:
    try:
        depth = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer; got {value!r}.") from None
    if not 1 <= depth <= largest:
        raise ValueError(f"`{name}` must be in 1, ..., {largest}; got {value}.")
    return depth
