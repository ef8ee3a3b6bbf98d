"""The loss at many depths."""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._loop import forward_only, with_room, with_rounds


def sweep(
    model: PyTree,
    loss: Callable[..., tuple[Array, Array]],
    batch: PyTree,
    rounds: Iterable[int],
    *,
    loop: str = "r",
    key: Any = None,
) -> Float[Array, " depths"]:
    """The loss of a batch at each number of rounds, in one executable: to see how a model does beyond the depth it was trained at.

    The options `gradient`, `unroll` and `max` of the loops, which bind training only, do not count. Over a whole data set, at
    depths of several loops, see [`rinsx.train.evaluate`][].

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        model = rx.models.DecoderLM(rx.models.presets["nano"], "A^r B", r=3, key=jr.key(0))
        batch = {"tokens": jnp.array([[1, 2, 3]]), "targets": jnp.array([[2, 3, 4]])}
        rx.generate.sweep(model, rx.models.DecoderLM.loss, batch, range(1, 7)).shape  # (6,)
        ```

    **Arguments:**

    - `model`: a model with a loop of that name.
    - `loss`: `(model, batch, key) -> (total, weight)`.
    - `batch`, `key`: as `loss` takes them.
    - `rounds`: the numbers of rounds, integers of at least 1.
    - `loop`: the name of the loop.

    **Returns:**

    The mean loss, `total / weight`, at each number of rounds, in their order.

    **Raises:**

    `TypeError` for rounds that are not integers, and `ValueError` for rounds below 1 or none at all.
    """
    given = list(rounds)
    try:
        depths = [operator.index(r) for r in given]
    except TypeError:
        raise TypeError(f"`rounds` are integers of at least 1; got {given}") from None
    if min(depths, default=0) < 1:
        raise ValueError(f"`rounds` are integers of at least 1; got {depths}")
    # One signature of the compiled program, whatever the model is bound to.
    model = with_rounds(forward_only(model), **{loop: jnp.int32(1)})
    model = with_room(model, **{loop: max(depths)})
    return _sweep(model, loss, batch, jnp.asarray(depths, jnp.int32), loop, key)


@eqx.filter_jit
def _sweep(model, loss, batch, depths, loop, key):
    def at(r):
        total, weight = loss(with_rounds(model, **{loop: r}), batch, key)
        return total / weight

    return lax.map(at, depths)
