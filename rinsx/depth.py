"""Depth distributions, "laws": how many rounds a training step runs.

Every law is a finite table of integer weights. What is sampled is exactly that table,
so that its probabilities, its mean and any cost expected under it are exact rationals.

!!! tip

    Draw once per training step, never once per example. Under `jax.vmap` a `lax.cond`
    computes both branches, and a `lax.while_loop` runs until the last example is done:
    a batch always costs as much as its deepest example, so that depths drawn for each
    example save nothing.

!!! example

    ```python
    import jax.random as jr
    import rinsx as rx

    law = rx.depth.Binomial(3, skip="4/5")
    law.mean()  # Fraction(7, 5)
    rounds = law.sample(jr.key(0))  # for `rx.with_rounds(model, r=rounds)`
    ```
"""

import math
import operator
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, PRNGKeyArray

from ._check import rational
from ._law import AbstractLaw, AbstractTable as _AbstractTable, checked_depth, INT32_MAX, table_of


__all__ = [
    "AbstractLaw",
    "Binomial",
    "Categorical",
    "Curriculum",
    "Fixed",
    "LogNormalPoisson",
    "Poisson",
    "Uniform",
]


class Fixed(_AbstractTable):
    """The same depth always.

    !!! example

        ```python
        import rinsx as rx

        rx.depth.Fixed(3).pmf()  # {3: Fraction(1, 1)}
        ```
    """

    support: tuple[int, ...] = eqx.field(static=True)
    weights: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, rounds: int):
        """**Arguments:**

        - `rounds`: the depth, at least 1.
        """
        self.support = (checked_depth("rounds", rounds, INT32_MAX),)
        self.weights = (1,)


class Binomial(_AbstractTable):
    """Every round after the first is skipped with probability `skip`:
    `r = 1 + Binomial(max - 1, 1 - skip)`.

    !!! example

        ```python
        import rinsx as rx

        law = rx.depth.Binomial(3, skip="4/5")
        law.pmf()  # {1: Fraction(16, 25), 2: Fraction(8, 25), 3: Fraction(1, 25)}
        ```

    ??? cite "Reference"

        The law of stochastic RINS: "Recursive INference Scaling", arXiv 2502.07503.
        That it is binomial is stated there; how the parameters enter follows an
        independent re-implementation.
    """

    support: tuple[int, ...] = eqx.field(static=True)
    weights: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, max: int, skip: Fraction | int | float | str):
        """**Arguments:**

        - `max`: the largest depth, at least 1.
        - `skip`: the probability of skipping a round, in `[0, 1]`. A float stands for
            its shortest decimal text: `0.8` is exactly 4/5. Write `"1/3"` where no
            decimal is exact.
        """
        n, p = checked_depth("max", max) - 1, rational("skip", skip)
        if not 0 <= p <= 1:
            raise ValueError(f"`skip` is a probability, in [0, 1]; got {skip!r}.")
        run, rest = p.denominator - p.numerator, p.numerator
        self.support, self.weights = table_of({1 + k: math.comb(n, k) * run**k * rest ** (n - k) for k in range(n + 1)})


class Uniform(_AbstractTable):
    """Every depth in `low, ..., high` is equally likely.

    !!! example

        ```python
        import rinsx as rx

        rx.depth.Uniform(2, 5).mean()  # Fraction(7, 2)
        ```
    """

    support: tuple[int, ...] = eqx.field(static=True)
    weights: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, low: int, high: int):
        """**Arguments:**

        - `low`: the smallest depth, at least 1.
        - `high`: the largest depth, at least `low`.
        """
        low, high = checked_depth("low", low), checked_depth("high", high)
        if low > high:
            raise ValueError(f"`low` must not exceed `high`; got {low} and {high}.")
        self.support = tuple(range(low, high + 1))
        self.weights = (1,) * len(self.support)


class Categorical(_AbstractTable):
    """Any finite law, given by its weights.

    !!! example

        ```python
        import rinsx as rx

        law = rx.depth.Categorical({1: 1, 4: "1/2"})
        law.pmf()  # {1: Fraction(2, 3), 4: Fraction(1, 3)}
        ```
    """

    support: tuple[int, ...] = eqx.field(static=True)
    weights: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, weights: Mapping[int, Fraction | int | float | str]):
        """**Arguments:**

        - `weights`: the weight of each depth. They need not sum to one. A float stands
            for its shortest decimal text: `0.1` is exactly 1/10.
        """
        table = {
            checked_depth("a depth in `weights`", r, INT32_MAX): rational("a weight", w) for r, w in weights.items()
        }
        if min(table.values(), default=0) < 0 or not any(table.values()):
            raise ValueError(f"`weights` must have none below zero and one above; got {dict(weights)}.")
        scale = math.lcm(*(w.denominator for w in table.values()))
        self.support, self.weights = table_of({r: w.numerator * (scale // w.denominator) for r, w in table.items()})


class Poisson(_AbstractTable):
    """`r = 1 + Poisson(mean - 1)`, restricted to `1, ..., max` and renormalised.

    The restriction lowers the mean: `law.mean()` tells what is left of `mean`.

    !!! example

        ```python
        import rinsx as rx

        law = rx.depth.Poisson(4, max=8)
        float(law.mean())  # 3.93...
        ```
    """

    support: tuple[int, ...] = eqx.field(static=True)
    weights: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, mean: Fraction | int | float | str, max: int):
        """**Arguments:**

        - `mean`: the mean before the restriction, at least 1. A float stands for its
            shortest decimal text.
        - `max`: the largest depth, at least 1. (`law.max` is smaller where the
            weights at the end come to zero.)
        """
        rate = rational("mean", mean) - 1
        if rate < 0:
            raise ValueError(f"`mean` must be at least 1; got {mean!r}.")
        # exp(-rate) cancels, which leaves rate^k / k!, here with denominators cleared.
        n, p, q = checked_depth("max", max) - 1, rate.numerator, rate.denominator
        self.support, self.weights = table_of({1 + k: p**k * q ** (n - k) * math.perm(n, n - k) for k in range(n + 1)})


class LogNormalPoisson(_AbstractTable):
    """`r = 1 + Poisson(tau)` where `log(tau) ~ Normal(log(mean) - sigma^2 / 2, sigma)`,
    restricted to `1, ..., max` and renormalised.

    Most draws lie below the mean, a few far above it. `mean` is the mean of `tau`, so
    that the mean depth is `mean + 1` before the restriction (not so for
    [`rinsx.depth.Poisson`][]). The restriction lowers it: `law.mean()` tells what is
    left.

    !!! example

        ```python
        import rinsx as rx

        law = rx.depth.LogNormalPoisson(32, max=128)
        float(law.mean())  # 32.8...
        ```

    ??? cite "Reference"

        The law of latent recurrent thinking: Geiping et al., "Scaling up Test-Time
        Compute with Latent Reasoning", arXiv 2502.05171, Section 3.3.
    """

    support: tuple[int, ...] = eqx.field(static=True)
    weights: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        mean: Fraction | int | float | str,
        sigma: Fraction | int | float | str = 0.5,
        *,
        max: int,
    ):
        """**Arguments:**

        - `mean`: the mean of `tau`, in `(0, max]`.
        - `sigma`: the standard deviation of `log(tau)`, in `[0, 4]`.
        - `max`: the largest depth, at least 1. (`law.max` is smaller where the
            weights at the end come to zero.)
        """
        m, s = float(rational("mean", mean)), float(rational("sigma", sigma))
        largest = checked_depth("max", max)
        if not 0 < m <= largest:
            raise ValueError(f"`mean` must be in (0, max={largest}]; got {mean!r}.")
        if not 0 <= s <= 4:
            raise ValueError(f"`sigma` must be in [0, 4]; got {sigma!r}.")
        # The trapezium rule converges geometrically on an analytic integrand that dies
        # out at both ends. With the arguments bounded as above, these points leave
        # nothing but float64 rounding, far below one part in 2**30.
        z = np.linspace(-12, 12, 16385)
        log_tau = math.log(m) - s**2 / 2 + s * z
        log_density = -(z**2) / 2 - np.exp(log_tau)
        logs = []
        for k in range(largest):
            x = log_density + k * log_tau
            logs.append(x.max() + np.log(np.exp(x - x.max()).sum()) - math.lgamma(k + 1))
        weights = np.exp(np.array(logs) - np.max(logs))
        self.support, self.weights = table_of({1 + k: int(math.ldexp(w, 62)) for k, w in enumerate(weights)})


class Curriculum(AbstractLaw):
    """A law that changes with the training step, stage by stage.

    A stage lasts until the next one starts, and the last one for good. `support` and
    `max` span all stages. What belongs to one step (`weights`, `pmf`, `mean`, `quota`)
    is a `ValueError` here: ask `law.at(step)`.

    !!! example

        ```python
        import jax.random as jr
        import rinsx as rx

        stages = [(0, rx.depth.Fixed(1)), (1000, rx.depth.Uniform(1, 4))]
        law = rx.depth.Curriculum(stages)
        law.at(1000).mean()  # Fraction(5, 2)
        law.sample(jr.key(0), step=999)  # 1
        ```
    """

    stages: tuple[tuple[int, AbstractLaw], ...] = eqx.field(static=True)
    support: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, stages: Sequence[tuple[int, AbstractLaw]]):
        """**Arguments:**

        - `stages`: pairs of the step at which a stage starts, and its law. The first
            starts at step 0, each later one after the one before it.
        """
        starts = [operator.index(start) for start, _ in stages]
        if starts[:1] != [0] or any(a >= b for a, b in zip(starts, starts[1:])):
            raise ValueError(f"Stages must start at step 0 and then at ever later steps; got starts {starts}.")
        if starts[-1] > INT32_MAX:
            raise ValueError(f"A stage must start below 2**31; got {starts[-1]}.")
        for _, law in stages:
            if isinstance(law, Curriculum):
                raise ValueError(f"A stage cannot be a `Curriculum`: list its stages instead; got {law}.")
        self.stages = tuple((start, law) for start, (_, law) in zip(starts, stages))
        self.support = tuple(sorted({r for _, law in stages for r in law.support}))

    @staticmethod
    def ramp(low: int, high: int, steps: int) -> "Curriculum":
        """A linear ramp of fixed depths: `low + floor((high - low) * step / steps)`
        until `high` is reached at `steps`, then `high`.

        **Arguments:**

        - `low`: the depth at step 0, at least 1.
        - `high`: the depth from `steps` on, at least `low`.
        - `steps`: the length of the ramp, at least `high - low`.

        **Returns:**

        A `Curriculum`.
        """
        rise = checked_depth("high", high) - checked_depth("low", low)
        if rise < 0:
            raise ValueError(f"`low` must not exceed `high`; got {low} and {high}.")
        if steps < rise:
            raise ValueError(f"A ramp from {low} to {high} takes at least {rise} steps; got {steps}.")
        # Depth `low + i` is reached at `ceil(i * steps / rise)`.
        later = [(-(-i * steps // rise), Fixed(low + i)) for i in range(1, rise + 1)]
        return Curriculum([(0, Fixed(low)), *later])

    @property
    def weights(self) -> tuple[int, ...]:
        raise _needs_step("weights")

    def pmf(self) -> dict[int, Fraction]:
        raise _needs_step("pmf()")

    def mean(self) -> Fraction:
        raise _needs_step("mean()")

    def quota(self, n: int, key: PRNGKeyArray) -> Int32[Array, " n"]:
        raise _needs_step(f"quota({n}, key)")

    def at(self, step: SupportsIndex) -> AbstractLaw:
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"Steps are counted from 0; got {step}.")
        return [law for start, law in self.stages if start <= step][-1]

    def sample(self, key: PRNGKeyArray, step: Int[Array, ""] | SupportsIndex | None = None) -> Int32[Array, ""]:
        if step is None:
            raise _needs_step("sample(key)")
        if not isinstance(step, jax.Array):
            return self.at(step).sample(key)
        later = jnp.asarray([start for start, _ in self.stages[1:]], jnp.int32)
        stage = jnp.sum(step >= later, dtype=jnp.int32)
        return jax.lax.switch(stage, [law.sample for _, law in self.stages], key)


def _needs_step(what: str) -> ValueError:
    return ValueError(
        f"A `Curriculum` changes with the training step: instead of `.{what}` use "
        f"`.at(step).{what}`, or `.sample(key, step)` to draw."
    )
