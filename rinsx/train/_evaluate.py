"""Losses over a whole data set, at every depth of interest."""

import itertools as it
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._loop import forward_only, with_room, with_rounds
from ._mesh import share_out
from ._step import Loss


class Totals(NamedTuple):
    """What [`rinsx.train.evaluate`][] adds up at one depth.

    **Attributes:**

    - `total`, `weight`: what the loss returned for each batch, stacked along a new first axis: float32 NumPy arrays.
    """

    total: Float[np.ndarray, "batches ..."]
    weight: Float[np.ndarray, "batches ..."]

    @property
    def mean(self) -> float:
        """The sum of totals over the sum of weights, added up in float64. `ValueError` where nothing counts."""
        weight = np.sum(self.weight, dtype=np.float64)
        if weight == 0:
            raise ValueError("there is no mean: the weights of all batches add up to 0.")
        return float(np.sum(self.total, dtype=np.float64) / weight)


def evaluate(
    model: PyTree,
    loss: Loss,
    batches: Iterable[PyTree],
    *,
    rounds: Mapping[str, Sequence[int]] | None = None,
    key: PRNGKeyArray | None = None,
    mesh: Mesh | None = None,
) -> dict[tuple[int, ...], Totals]:
    """Adds up a loss over batches, at each number of rounds asked for, whether or not the model was trained at it.

    One compiled program serves every depth, and each batch is read once. Where depths are asked for, the
    options `gradient`, `unroll` and `max` of the loops, which bind training only, do not count.

    !!! example

        ```python
        import jax.random as jr
        import numpy as np
        import rinsx as rx

        model = rx.models.DecoderLM(rx.models.presets["nano"], "A^r B", r=3, key=jr.key(0))
        tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
        batches = [{"tokens": tokens, "targets": tokens + 1}]
        found = rx.train.evaluate(model, rx.models.DecoderLM.loss, batches, rounds={"r": [1, 2]})
        found[(2,)].mean  # nats per token at r=2
        ```

    **Arguments:**

    - `model`: a model.
    - `loss`: `(model, batch, key) -> (total, weight)`: scalars, or arrays such as one number a row.
    - `batches`: batches of one shape, such as [`rinsx.data.evaluation`][] makes.
    - `rounds`: for each name of a loop, the numbers of rounds; with several names, every combination. By default the
        model runs as it is.
    - `key`: given to the loss, folded with the number of the batch. By default `jax.random.key(0)`.
    - `mesh`: where `model` was placed, if it was; see [`rinsx.train.place`][].

    **Returns:**

    For each combination of rounds, a tuple in the order of the names, its [`rinsx.train.Totals`][]. Without `rounds`
    there is one, `()`.

    **Raises:**

    `ValueError` where a number of rounds is refused, where there is no batch, and where rows cannot be shared out over
    the mesh.
    """
    rounds = {} if rounds is None else rounds
    names = tuple(rounds)
    for name, numbers in rounds.items():
        if np.ndim(numbers) != 1 or len(numbers) == 0:
            raise ValueError(f"`rounds[{name!r}]` must be a sequence of numbers of rounds; got {numbers!r}.")
    # A depth that is asked for twice counts once.
    depths = list(dict.fromkeys(it.product(*(map(operator.index, numbers) for numbers in rounds.values()))))
    for depth in depths:
        with_rounds(model, **dict(zip(names, depth)))  # refuses, before anything runs, what the model cannot do
    # Rounds that share keys and values need slots for all of them.
    model = with_room(model, **{name: max(map(operator.index, numbers)) for name, numbers in rounds.items()})
    key = jr.key(0) if key is None else key
    seen: dict[tuple[int, ...], list[Any]] = {depth: [] for depth in depths}
    late: dict[tuple[int, ...], Any] = {}
    for i, batch in enumerate(batches):
        batch = share_out(batch, mesh)
        step_key = jr.fold_in(key, i)
        now = {}
        for depth in depths:
            deep = tuple(jnp.int32(r) for r in depth)
            now[depth] = _losses(loss, names, mesh, model, batch, step_key, deep)
        # Waits one batch late: devices stay busy, and few batches are held at a time.
        _collect(seen, late)
        late = now
    _collect(seen, late)
    if not late:
        raise ValueError("there are no batches to evaluate on.")
    return {depth: Totals(*(np.stack(column) for column in zip(*pairs))) for depth, pairs in seen.items()}


def _collect(seen: dict[tuple[int, ...], list[Any]], late: dict[tuple[int, ...], Any]) -> None:
    for depth, pair in jax.device_get(late).items():
        seen[depth].append(pair)


@eqx.filter_jit
def _losses(loss, names, mesh, model, batch, key, depth) -> tuple[Array, Array]:
    if names:
        model = with_rounds(forward_only(model), **dict(zip(names, depth)))
    total, weight = loss(model, batch, key)
    out = jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32)
    if mesh is not None:
        out = jax.lax.with_sharding_constraint(out, NamedSharding(mesh, P()))
    return out
