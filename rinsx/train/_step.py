"""One training step, and several of them as one program."""

import itertools as it
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
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .. import flops
from .._loop import with_rounds
from ._mesh import constrain
from ._release import release


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

    With `accumulate=n` the batch is taken in `n` parts, one after the other, each with a key of its own. Totals,
    weights and gradients are added up, in float32 or wider, before the division, so the result is that of the whole
    batch however the weights fall.
    """
    diff, rest = eqx.partition(model, eqx.is_inexact_array)

    def total(diff, batch, key):
        out = loss(eqx.combine(diff, rest), batch, key)
        if not (isinstance(out, tuple) and len(out) == 2 and all(jnp.shape(x) == () for x in out)):
            shown = eqx.tree_pformat(out, short_arrays=True)
            raise ValueError(f"a loss to train on must return two scalars, `(total, weight)`; got {shown}.")
        value, weight = out
        return jnp.asarray(value, jnp.float32), jnp.asarray(weight, jnp.float32)

    grad = jax.value_and_grad(total, has_aux=True)
    if accumulate == 1:
        (value, weight), grads = grad(diff, batch, key)
    else:
        # Every n-th row, so that each device has its share of every part.
        parts = jtu.tree_map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(carry, part):
            i, batch = part
            (value, weight), grads = grad(diff, batch, jr.fold_in(key, i))
            return jtu.tree_map(jnp.add, carry, (value, weight, jtu.tree_map(_wide, grads))), None

        zeros = (jnp.float32(0), jnp.float32(0), jtu.tree_map(lambda x: _wide(jnp.zeros_like(x)), diff))
        (value, weight, grads), _ = lax.scan(add, zeros, (jnp.arange(accumulate), parts))
    # A batch in which nothing counts has a loss of zero.
    divisor = jnp.where(weight == 0, 1, weight)
    return jtu.tree_map(lambda g, x: (_wide(g) / divisor).astype(x.dtype), grads, diff), value / divisor, weight


def _wide(x: Array) -> Array:
    """Gradients are added and divided in float32 at least: bfloat16 cannot hold a weight of 257."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


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
    return _count(loss, model, batch, rounds)


def _count(
    loss: Loss, model: PyTree, batch: PyTree, rounds: Mapping[str, int], accumulate: int = 1, traced: bool = False
) -> flops.Cost:
    """The cost of a gradient at some depths, given as Python integers or, where the program is made for any, as traced ones."""

    def step(model, given, batch, key):
        given = given if traced else rounds
        deep = with_rounds(model, **given) if given else model
        return gradient(loss, deep, batch, key, accumulate)[0]

    given = {name: jax.ShapeDtypeStruct((), jnp.int32) for name in rounds} if traced else {}
    key = jax.eval_shape(lambda: jr.key(0))
    return flops.count(step, model, given, batch, key, trips=dict(rounds) if traced else {})


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
        grads = constrain(grads, self.mesh)
        norm = jnp.sqrt(sum((jnp.sum(jnp.abs(_wide(g)) ** 2) for g in jtu.tree_leaves(grads)), jnp.float32(0)))
        params, rest = eqx.partition(model, eqx.is_inexact_array)
        updates, state = self.optimizer.update(grads, state, params, fraction=fraction)
        model = eqx.combine(optax.apply_updates(params, updates), rest)
        return constrain(model, self.mesh), constrain(state, self.mesh), Record(value, norm, weight)

    def many(self, given, trained):
        """Runs the first `count` of the steps whose batches are given, in a loop whose length is known when it runs."""
        batches, key, first, count, fractions, rounds, flags = given
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
        seen = record, jnp.any(flags)
        if self.mesh is not None:
            seen = lax.with_sharding_constraint(seen, NamedSharding(self.mesh, P()))
        return eqx.combine(arrays, rest), seen


# What the steps are given is kept; what is trained is written in place.
_many: Any = eqx.filter_jit(lambda given, trained: given[0].many(given[1:], trained), donate="all-except-first")


def run(
    stepper: Stepper,
    trained: tuple[PyTree, PyTree],
    batches: PyTree,
    key: PRNGKeyArray,
    first: int,
    count: int,
    fractions: Sequence[float],
    rounds: Sequence[Sequence[int]],
    flags: Any,
) -> tuple[tuple[PyTree, PyTree], tuple[Record, Bool[Array, ""]]]:
    """`count` steps from step `first` on: batches, fractions and rounds are as many as one fixed limit, at least `count`.

    Besides what is trained and the record, tells whether any of `flags`, one for each device of all processes, is set.
    """
    return _many(_given(stepper, batches, key, first, count, fractions, rounds, flags), trained)


def prepare(stepper: Stepper, trained: tuple[PyTree, PyTree], *args: Any) -> None:
    """Compiles what `run` with the same arguments then runs, and gives back the memory that compiling took."""
    release()
    # JAX keeps the program and takes it for the call.
    _many.lower(_given(stepper, *args), trained).compile()
    release()


def _given(stepper, batches, key, first, count, fractions, rounds, flags):
    given = (stepper, batches, key, jnp.int32(first), jnp.int32(count), jnp.asarray(fractions, jnp.float32))
    return (*given, tuple(jnp.asarray(r, jnp.int32) for r in rounds), flags)


def tables(depth: Mapping[str, Sequence[int]], most: int) -> tuple[tuple[int, ...], ...] | None:
    """The distinct combinations of depths of a run, or `None` where there are more than `most`."""
    if not depth:
        return ((),)
    found = sorted(set(zip(*depth.values())))
    return tuple(found) if len(found) <= most else None


class Ledger:
    """What every step costs, and how much is spent before it: exact."""

    def __init__(
        self, stepper: Stepper, model: PyTree, plan: dict[str, tuple[int, ...]], steps: int, first: int, spent: int
    ):
        self.stepper, self.plan, self.steps, self.first = stepper, plan, steps, first
        self.model = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x, model)
        # What is spent before the first step of this call of `fit`, and then before each one after it.
        self.before = [spent]

    @property
    def measured(self) -> bool:
        return len(self.before) > 1

    def measure(self, batch: PyTree) -> None:
        """Counts the step at each depth that occurs, and adds up."""
        names = tuple(self.plan)
        columns = (list(zip(*self.plan.values())) if names else [()] * self.steps)[self.first :]
        loss, accumulate, traced = self.stepper.loss, self.stepper.accumulate, self.stepper.depths is None
        count = lambda depth: _count(loss, self.model, batch, dict(zip(names, depth)), accumulate, traced)
        costs = {depth: int(count(depth).matmul) for depth in set(columns)}
        self.before = list(it.accumulate((costs[depth] for depth in columns), initial=self.before[0]))

    def spent(self, step: int) -> int:
        """The FLOPs of all steps before this one."""
        return self.before[step - self.first]

    def fraction(self, step: int) -> float:
        """The part of the FLOPs of all steps that is spent before this one."""
        total = self.before[-1]
        return self.spent(step) / total if total else step / self.steps

    def schedule(self, first: int, limit: int) -> tuple[list[float], list[list[int]]]:
        """For a call from step `first` on: the part of all FLOPs that is spent before each step, and the depths."""
        index = [min(step, self.steps - 1) for step in range(first, first + limit)]
        return [self.fraction(i) for i in index], [[rounds[i] for i in index] for rounds in self.plan.values()]
