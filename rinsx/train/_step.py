"""One training step, and several of them as one program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .. import flops
from .._loop import with_rounds
from ._mesh import constrain


Scalar = Float[Array, ""]
Loss = Callable[[Any, Any, PRNGKeyArray], tuple[Scalar, Scalar]]
"""`(model, batch, key) -> (total, weight)`: the sum over what counts in the batch, and how much counts."""


class Record(NamedTuple):
    """What is known of each step of a call: arrays of one number a step."""

    loss: Float[Array, " steps"]
    gradient_norm: Float[Array, " steps"]
    weight: Float[Array, " steps"]


def gradient(loss: Loss, model: PyTree, batch: PyTree, key: PRNGKeyArray, accumulate: int = 1):
    """The gradient of the mean loss of a batch, the mean, and the weight that it was divided by.

    With `accumulate=n` the batch is taken in `n` parts, one after the other. Totals and weights are added up before the division, so the
    result is that of the whole batch however the weights fall.
    """
    diff, rest = eqx.partition(model, eqx.is_inexact_array)

    def total(diff, batch, key):
        return loss(eqx.combine(diff, rest), batch, key)

    grad = jax.value_and_grad(total, has_aux=True)
    if accumulate == 1:
        (value, weight), grads = grad(diff, batch, key)
    else:
        # Every n-th row, so that each device has its share of every part.
        parts = jtu.tree_map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(carry, part):
            i, batch = part
            (value, weight), grads = grad(diff, batch, jr.fold_in(key, i))
            return jtu.tree_map(jnp.add, carry, (value, weight, grads)), None

        zeros = (jnp.float32(0), jnp.float32(0), jtu.tree_map(jnp.zeros_like, diff))
        (value, weight, grads), _ = lax.scan(add, zeros, (jnp.arange(accumulate), parts))
    # A batch in which nothing counts has a loss of zero.
    divisor = jnp.where(weight == 0, 1, weight)
    return jtu.tree_map(lambda g: g / divisor.astype(g.dtype), grads), value / divisor, weight


def cost(loss: Loss, model: PyTree, batch: PyTree, **rounds: int) -> flops.Cost:
    """Counts the FLOPs of the gradient of one batch: forward and backward pass, and what is computed twice.

    The optimiser is not in it. What compute-matched comparisons add up is `.matmul`, the contractions.

    !!! example

        ```python
        import jax
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        model = rx.models.DecoderLM(rx.models.presets["nano"], "A^r B", r=3, key=jr.key(0))
        tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
        batch = {"tokens": tokens, "targets": tokens}
        rx.train.cost(rx.models.DecoderLM.loss, model, batch, r=2).matmul
        ```

    **Arguments:**

    - `loss`: `(model, batch, key) -> (total, weight)`.
    - `model`: a model, of arrays or of shapes.
    - `batch`: a batch, of arrays or of shapes.
    - `rounds`: numbers of rounds to set first, see [`rinsx.with_rounds`][].

    **Returns:**

    A [`rinsx.flops.Cost`][].
    """
    model = with_rounds(model, **rounds) if rounds else model
    key = jax.eval_shape(lambda: jr.key(0))
    return flops.count(lambda model, batch, key: gradient(loss, model, batch, key)[0], model, batch, key)


class Stepper(eqx.Module):
    """Runs up to `limit` steps in one compiled call."""

    loss: Loss = eqx.field(static=True)
    optimizer: optax.GradientTransformationExtraArgs = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    # Each combination of depths that can occur, compiled as a branch of its own; `None` runs them all as traced integers.
    depths: tuple[tuple[int, ...], ...] | None = eqx.field(static=True)
    accumulate: int = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)

    def one(self, model, state, batch, key, fraction, rounds):
        """A single step: gradient at the given depths, and update."""

        def at(model, rounds):
            deep = with_rounds(model, **dict(zip(self.names, rounds))) if self.names else model
            return gradient(self.loss, deep, batch, key, self.accumulate)

        if self.depths is None:
            grads, value, weight = at(model, tuple(rounds))
        elif len(self.depths) == 1:
            grads, value, weight = at(model, self.depths[0])
        else:
            arrays, rest = eqx.partition(model, eqx.is_array)
            branches = [lambda arrays, d=d: at(eqx.combine(arrays, rest), d) for d in self.depths]
            table = jnp.asarray(self.depths, jnp.int32)
            which = jnp.argmax(jnp.all(table == jnp.stack(list(rounds)), axis=1))
            grads, value, weight = lax.switch(which, branches, arrays)
        params = eqx.filter(model, eqx.is_inexact_array)
        norm = optax.global_norm(grads)
        updates, state = self.optimizer.update(grads, state, params, fraction=fraction)
        model = eqx.apply_updates(model, updates)
        return constrain(model, self.mesh), constrain(state, self.mesh), Record(value, norm, weight)

    def many(self, given, trained):
        """Runs the first `count` of the steps whose batches are given, in a loop whose length is known when it runs."""
        batches, key, first, count, fractions, rounds = given
        model, state = trained
        arrays, rest = eqx.partition((model, state), eqx.is_array)
        limit = fractions.shape[0]
        record = Record(*(jnp.zeros(limit, jnp.float32) for _ in Record._fields))

        def body(i, carry):
            arrays, record = carry
            model, state = eqx.combine(arrays, rest)
            pick = lambda x: lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
            batch = jtu.tree_map(pick, batches)
            step_key = jr.fold_in(key, first + i)
            depth = tuple(pick(r) for r in rounds)
            model, state, seen = self.one(model, state, batch, step_key, pick(fractions), depth)
            arrays = eqx.filter((model, state), eqx.is_array)
            return arrays, Record(*(a.at[i].set(b.astype(a.dtype)) for a, b in zip(record, seen)))

        arrays, record = lax.fori_loop(0, count, body, (arrays, record))
        if self.mesh is not None:
            whole = NamedSharding(self.mesh, P())
            record = Record(*(lax.with_sharding_constraint(x, whole) for x in record))
        return eqx.combine(arrays, rest), record


# What the steps are given is kept; what is trained is written in place.
_many = eqx.filter_jit(lambda given, trained: given[0].many(given[1:], trained), donate="all-except-first")


def run(
    stepper: Stepper,
    trained: tuple[PyTree, PyTree],
    batches: PyTree,
    key: PRNGKeyArray,
    first: int,
    count: int,
    fractions: Float[Any, " limit"],
    rounds: Sequence[Int[Any, " limit"]],
) -> tuple[tuple[PyTree, PyTree], Record]:
    """`count` steps from step `first` on: batches, fractions and rounds have a first axis of one fixed length, at least `count`."""
    given = (stepper, batches, key, jnp.int32(first), jnp.int32(count), jnp.asarray(fractions, jnp.float32))
    return _many((*given, tuple(jnp.asarray(r, jnp.int32) for r in rounds)), trained)


def tables(depth: Mapping[str, Sequence[int]], most: int) -> tuple[tuple[int, ...], ...] | None:
    """The distinct combinations of depths of a run, or `None` where there are more than `most`."""
    found = sorted(set(zip(*depth.values()))) if depth else [()]
    return tuple(found) if len(found) <= most else None

