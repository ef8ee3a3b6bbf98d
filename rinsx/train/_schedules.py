"""Learning rates as functions of the fraction of training FLOPs that is spent."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


Schedule = Callable[[Any], Float[Array, ""]]


def constant(peak: float) -> Schedule:
    """The same learning rate from start to end.

    !!! example

        ```python
        import rinsx as rx

        schedule = rx.train.constant(1e-3)
        float(schedule(0.5))  # 0.001
        ```

    **Arguments:**

    - `peak`: the learning rate, positive.

    **Returns:**

    A function from the fraction of training FLOPs spent, in [0, 1], to a learning rate in float32. The fraction may be a Python
    number or a traced scalar; below 0 it counts as 0, above 1 as 1.
    """
    peak = _peak(peak)
    return lambda fraction: jnp.full_like(_clip(fraction), peak)


def cosine(peak: float, *, warmup: float = 0.02, floor: float = 0.1) -> Schedule:
    """A linear warm-up, then half a cosine down to the floor: with `x` the part spent of what follows the warm-up,
    `peak * (floor + (1 - floor) * (1 + cos(pi * x)) / 2)`.

    !!! example

        ```python
        import rinsx as rx

        schedule = rx.train.cosine(1e-3, warmup=0.1, floor=0.1)
        [float(schedule(x)) for x in (0.0, 0.1, 1.0)]  # 0, 0.001, 0.0001
        ```

    ??? cite "Reference"

        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv 1608.03983, without restarts.

    **Arguments:**

    - `peak`: the learning rate at the end of the warm-up, positive.
    - `warmup`: the fraction of FLOPs over which the rate rises from zero, in [0, 1).
    - `floor`: the rate at the end as a fraction of `peak`, in [0, 1].

    **Returns:**

    A function from the fraction of training FLOPs spent to a learning rate, as for [`rinsx.train.constant`][].
    """
    peak, warmup, floor = _peak(peak), _fraction("warmup", warmup), _fraction("floor", floor)
    _fits(warmup=warmup, strictly=True)

    def schedule(fraction):
        fraction = _clip(fraction)
        x = jnp.maximum(fraction - warmup, 0) / (1 - warmup)
        return peak * _rise(fraction, warmup) * (floor + (1 - floor) * (1 + jnp.cos(math.pi * x)) / 2)

    return schedule


def warmup_stable_decay(peak: float, *, warmup: float = 0.02, decay: float = 0.2, floor: float = 0.0) -> Schedule:
    """A linear warm-up, a constant rate, and a linear decay to the floor at the end.

    !!! example

        ```python
        import rinsx as rx

        schedule = rx.train.warmup_stable_decay(1e-3, warmup=0.1, decay=0.2)
        [float(schedule(x)) for x in (0.05, 0.5, 0.9)]  # 0.0005, 0.001, 0.0005
        ```

    ??? cite "Reference"

        Hu et al., "MiniCPM", arXiv 2404.06395. Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
        Durations", arXiv 2405.18392, compare forms and lengths of the decay.

    **Arguments:**

    - `peak`: the learning rate between warm-up and decay, positive.
    - `warmup`: the fraction of FLOPs over which the rate rises from zero, in [0, 1].
    - `decay`: the fraction of FLOPs over which it falls, in [0, 1]; `warmup + decay` is at most 1.
    - `floor`: the rate at the end as a fraction of `peak`, in [0, 1].

    **Returns:**

    A function from the fraction of training FLOPs spent to a learning rate, as for [`rinsx.train.constant`][].
    """
    peak, warmup, decay = _peak(peak), _fraction("warmup", warmup), _fraction("decay", decay)
    floor = _fraction("floor", floor)
    _fits(warmup=warmup, decay=decay)

    def schedule(fraction):
        fraction = _clip(fraction)
        return peak * _rise(fraction, warmup) * (floor + (1 - floor) * _fall(fraction, decay))

    return schedule


def reverse_square_root(
    peak: float, *, warmup: float = 0.02, timescale: float = 0.1, cooldown: float = 0.2
) -> Schedule:
    """A linear warm-up, then `peak / sqrt(1 + (fraction - warmup) / timescale)`, times a linear cooldown to zero at the end.

    Until the cooldown starts, the rate does not depend on where the run ends, if `warmup` and `timescale` are given in proportion.

    !!! example

        ```python
        import rinsx as rx

        schedule = rx.train.reverse_square_root(1e-3, warmup=0.1, timescale=0.1, cooldown=0.2)
        [float(schedule(x)) for x in (0.1, 0.4, 1.0)]  # 0.001, 0.0005, 0
        ```

    ??? cite "Reference"

        Zhai et al., "Scaling Vision Transformers", arXiv 2106.04560, Section 3.5. The default of `timescale` is ours.

    **Arguments:**

    - `peak`: the learning rate at the end of the warm-up, positive.
    - `warmup`: the fraction of FLOPs over which the rate rises from zero, in [0, 1].
    - `timescale`: the fraction of FLOPs after the warm-up at which the rate has fallen by the square root of two, positive.
    - `cooldown`: the fraction of FLOPs at the end over which a factor falls from 1 to 0, in [0, 1]; `warmup + cooldown` is
        at most 1.

    **Returns:**

    A function from the fraction of training FLOPs spent to a learning rate, as for [`rinsx.train.constant`][].
    """
    peak, warmup, cooldown = _peak(peak), _fraction("warmup", warmup), _fraction("cooldown", cooldown)
    if not (math.isfinite(timescale) and timescale > 0):
        raise ValueError(f"`timescale` is a fraction of the training FLOPs and must be positive; got {timescale}.")
    _fits(warmup=warmup, cooldown=cooldown)

    def schedule(fraction):
        fraction = _clip(fraction)
        body = 1 / jnp.sqrt(1 + jnp.maximum(fraction - warmup, 0) / timescale)
        return peak * _rise(fraction, warmup) * body * _fall(fraction, cooldown)

    return schedule


def _clip(fraction) -> Float[Array, ""]:
    # Sums of FLOPs over steps may end a rounding error past one.
    return jnp.clip(jnp.asarray(fraction, jnp.float32), 0, 1)


def _rise(fraction, length: float):
    return jnp.minimum(fraction / length, 1) if length > 0 else jnp.ones_like(fraction)


def _fall(fraction, length: float):
    return jnp.minimum((1 - fraction) / length, 1) if length > 0 else jnp.ones_like(fraction)


def _peak(peak: float) -> float:
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"`peak` is a learning rate and must be positive and finite; got {peak}.")
    return float(peak)


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` is a fraction and must be in [0, 1]; got {value}.")
    return float(value)


def _fits(strictly: bool = False, **parts: float) -> None:
    total = math.fsum(parts.values())
    # As decimals, 0.7 + 0.3 is 1: one rounding error is no error of the user's.
    if total > 1 + 1e-9 or (strictly and total >= 1):
        listed = " + ".join(f"{name}={value}" for name, value in parts.items())
        raise ValueError(f"{listed} must be {'below' if strictly else 'at most'} 1, the whole run.")
