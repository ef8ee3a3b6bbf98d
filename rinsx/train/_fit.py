"""The training loop."""

import contextlib
import dataclasses
import itertools as it
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from .. import flops
from .._loop import with_rounds
from ..depth import AbstractLaw
from ._checkpoint import Checkpoints
from ._log import AbstractLog
from ._mesh import constrain, share_out
from ._step import cost, gradient, Loss, Record, run, Stepper, tables


Evaluate = Callable[[Any], Mapping[str, float]]


class NonFiniteLoss(FloatingPointError):
    """Training met a loss that is infinite or not a number."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What [`rinsx.train.fit`][] returns.

    **Attributes:**

    - `model`: the trained model.
    - `state`: of the optimiser.
    - `step`: how many steps the model has been trained for, those of earlier runs that were resumed included.
    - `flops`: the contractions of all these steps, forward and backward, exact; without the optimiser.
    - `seconds`: wall time of the steps of this call, without the first, which compiles.
    - `stopped`: `None` at the end of training, or the name of the signal that ended it early.
    - `metrics`: what was last evaluated.
    """

    model: PyTree
    state: PyTree
    step: int
    flops: int
    seconds: float
    stopped: str | None
    metrics: dict[str, float]


def fit(
    model: PyTree,
    loss: Loss,
    batches: Iterable[PyTree],
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    key: PRNGKeyArray,
    depth: Mapping[str, AbstractLaw | int | Sequence[int]] | None = None,
    specialise: int = 4,
    accumulate: int = 1,
    steps_per_call: int = 1,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    checkpoints: Checkpoints | None = None,
    logs: Sequence[AbstractLog] = (),
    mesh: Mesh | None = None,
) -> Run:
    """Trains a model, from its start or from its last checkpoint.

    Every step is determined by its number, the key, and the data before it: its key is folded from `key` and its number, its
    depth from `key` and its number. So a run that was killed and started again with the same arguments ends bit for bit where
    an undisturbed run ends, on one machine.

    !!! example

        ```python
        import jax.random as jr
        import numpy as np
        import rinsx as rx

        model = rx.models.DecoderLM(rx.models.presets["nano"], "A^r B", r=rx.Loop(2, max=3), key=jr.key(0))
        tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
        batches = [{"tokens": tokens, "targets": tokens + 1}] * 4
        optimizer = rx.train.adamw(rx.train.cosine(1e-3))
        law = rx.depth.Binomial(3, skip="1/2")
        run = rx.train.fit(
            model, rx.models.DecoderLM.loss, batches, optimizer, steps=4, key=jr.key(1), depth={"r": law}
        )
        run.flops  # exact, by the depths that were drawn
        ```

    **Arguments:**

    - `model`: its floating arrays are trained.
    - `loss`: `(model, batch, key) -> (total, weight)`: the sum over what counts in a batch, and how much counts, both scalars. The
        mean is minimised.
    - `batches`: yields batches, pytrees of NumPy arrays whose first axis is that of the rows: those of this process, where there
        are several. To resume from checkpoints, its iterator needs `get_state` and `set_state`, as those of grain have.
    - `optimizer`: one of [`rinsx.train.adamw`][], [`rinsx.train.adafactor`][], [`rinsx.train.muon`][], or any of optax. Its
        `update` is given `fraction=`, the part of the training FLOPs that is spent, where it accepts extra arguments.
    - `steps`: how many steps to train in all.
    - `key`: for the depths and the losses of all steps.
    - `depth`: for each name of a loop, a law to draw the number of rounds from, once a step and the same on every process; or a
        number; or the number for each of all steps, such as a law's `quota`. By default the model runs as it is.
    - `specialise`: up to so many distinct depths are compiled as programs of their own, in which the number of rounds is a Python integer.
        Where there are more, one program runs them all as traced integers, which rematerialises, and the loops need a `max`.
    - `accumulate`: in how many parts to take a batch, one after the other, to save memory. The result is that of the whole batch.
    - `steps_per_call`: how many steps to run in one compiled call. Small steps gain by it; logs, evaluations and signals wait for its end.
    - `evaluate`: `model -> {name: number}`; its numbers are logged, and the checkpoints see them.
    - `evaluate_every`: after how many steps, besides at the end.
    - `checkpoints`: where to save and to resume from.
    - `logs`: where metrics are written.
    - `mesh`: of [`rinsx.train.mesh`][], where `model` was placed by [`rinsx.train.place`][].

    **Returns:**

    A [`rinsx.train.Run`][].

    **Raises:**

    `rinsx.train.NonFiniteLoss` at the first loss that is not finite; the last good checkpoint stays. `ValueError` for a batch whose
    rows cannot be divided as asked, for data that ends before `steps`, and where a number of rounds is refused.
    """
    _check(steps=steps, accumulate=accumulate, steps_per_call=steps_per_call, evaluate_every=evaluate_every)
    plan = _depths(model, depth or {}, steps, key)
    optimizer = optax.with_extra_args_support(optimizer)
    trained = _start(model, optimizer, mesh)
    iterator = iter(batches)
    step, weight, metrics = 0, 0.0, {}
    if checkpoints is not None:
        if not (hasattr(iterator, "get_state") and hasattr(iterator, "set_state")):
            raise TypeError(
                f"to resume, data needs an iterator with get_state and set_state, as those of rx.data.batches have; got {iterator!r}."
            )
        if (found := checkpoints.restore_latest(trained)) is not None:
            if found.step > steps:
                raise ValueError(f"the checkpoint is of step {found.step}, past the {steps} steps to train.")
            trained, step, metrics = found.state, found.step, dict(found.metrics)
            weight = found.metadata["weight"]
            iterator.set_state(found.data)  # pyright: ignore[reportAttributeAccessIssue]
    stepper = Stepper(loss, optimizer, tuple(plan), tables(plan, specialise), accumulate, mesh)
    data = _Data(iterator, steps_per_call, accumulate, mesh)
    ledger = _Ledger(stepper, trained[0], plan, steps)
    watch = _Watch()
    pending: tuple[int, int, Record] | None = None

    def settle() -> None:
        """Waits for the steps that were last begun, and writes what is known of them."""
        nonlocal pending, weight
        if pending is None:
            return
        first, count, record = pending
        pending = None
        record = Record(*(np.asarray(column)[:count] for column in jax.device_get(record)))
        seconds = watch.lap()
        _finite(record, first, checkpoints)
        end = first + count
        counted = float(np.sum(record.weight))
        weight += counted
        values = {
            "loss": float(np.sum(record.loss * record.weight) / max(counted, 1)),
            "gradient_norm": float(record.gradient_norm[-1]),
            "fraction": ledger.spent(end) / ledger.total,
            "flops": ledger.spent(end),
            "tokens": weight,
        }
        if seconds is not None:
            values["tokens_per_second"] = counted / seconds
            values["flops_per_second"] = (ledger.spent(end) - ledger.spent(first)) / seconds
        for name, rounds in plan.items():
            values[f"rounds_{name}"] = float(np.mean(rounds[first:end]))
        for log in logs:
            log.write(end, values)

    with _signals() as caught:
        while step < steps:
            count = min(steps_per_call, steps - step, *_until(step, evaluate_every, checkpoints))
            batch = data.take(count, step)
            if not ledger.before:
                ledger.measure(jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch))
            fractions, rounds = ledger.schedule(step, steps_per_call)
            trained, record = run(stepper, trained, batch, key, step, count, fractions, rounds)
            settle()
            pending = (step, count, record)
            step += count
            stopped = _agree(caught)
            evaluates = step == steps or (evaluate_every is not None and step % evaluate_every == 0)
            saves = checkpoints is not None and (step == steps or stopped or checkpoints.due(step))
            if evaluates or saves:
                settle()
                with watch.paused():
                    if evaluates and evaluate is not None:
                        metrics = {name: float(value) for name, value in evaluate(trained[0]).items()}
                        for log in logs:
                            log.write(step, metrics)
                    if saves and checkpoints is not None:
                        # Copied, since the next step writes over its input.
                        copy = jtu.tree_map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, trained)
                        checkpoints.save(step, copy, data=data.state, metrics=metrics, metadata={"weight": weight})
            if stopped:
                break
        settle()
    if checkpoints is not None:
        checkpoints.wait()
    return Run(
        model=trained[0],
        state=trained[1],
        step=step,
        flops=ledger.spent(step),
        seconds=watch.seconds,
        stopped=caught[0] if caught and step < steps else None,
        metrics=metrics,
    )


def _check(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be at least 1; got {number}.")


def _depths(model: PyTree, depth: Mapping[str, Any], steps: int, key: PRNGKeyArray) -> dict[str, tuple[int, ...]]:
    """The number of rounds of each loop at every step."""
    plan = {}
    for i, (name, given) in enumerate(sorted(depth.items())):
        if isinstance(given, AbstractLaw):
            # Folded apart from the keys of the steps, which count up.
            keys = jax.vmap(lambda s: jr.fold_in(jr.fold_in(key, 2**32 - 1 - i), s))(jnp.arange(steps))
            rounds = np.asarray(jax.jit(jax.vmap(given.sample))(keys, jnp.arange(steps)))
        elif np.ndim(given) == 0:
            rounds = np.full(steps, given)
        else:
            rounds = np.asarray(given)
        if rounds.shape != (steps,) or rounds.dtype.kind not in "iu":
            raise ValueError(
                f"`depth[{name!r}]` must be a law, an integer, or an integer for each of {steps} steps; got {rounds.dtype} of "
                f"shape {rounds.shape}."
            )
        for r in np.unique(rounds):
            with_rounds(model, **{name: int(r)})  # refuses what the model cannot do
        plan[name] = tuple(int(r) for r in rounds)
    return plan


def _start(model: PyTree, optimizer: Any, mesh: Mesh | None) -> tuple[PyTree, PyTree]:
    """The model and the optimiser's first state, in buffers of their own, which the steps may write over."""

    @eqx.filter_jit
    def start(model):
        return constrain(optimizer.init(eqx.filter(model, eqx.is_inexact_array)), mesh)

    copy = jtu.tree_map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, model)
    return copy, start(model)


def _until(step: int, evaluate_every: int | None, checkpoints: Checkpoints | None) -> list[int]:
    """How many steps are left until something else than a step is due."""
    every = [n for n in (evaluate_every, None if checkpoints is None else checkpoints.every) if n is not None]
    return [n - step % n for n in every]


def _agree(caught: list[str]) -> bool:
    """Whether any process has caught a signal."""
    if jax.process_count() == 1:
        return bool(caught)
    return bool(np.any(multihost_utils.process_allgather(np.asarray(bool(caught)))))


def _finite(record: Record, first: int, checkpoints: Checkpoints | None) -> None:
    bad = np.flatnonzero(~np.isfinite(record.loss) | ~np.isfinite(record.gradient_norm))
    if bad.size == 0:
        return
    i = int(bad[0])
    kept = "no checkpoint was kept"
    if checkpoints is not None:
        checkpoints.wait()
        kept = f"the checkpoints of steps {list(checkpoints.steps)} are kept" if checkpoints.steps else kept
    before = ", ".join(f"{x:.4g}" for x in record.gradient_norm[max(i - 3, 0) : i]) or "none in this call"
    raise NonFiniteLoss(
        f"step {first + i}: the loss is {record.loss[i]} and the norm of its gradient {record.gradient_norm[i]}; the norms of the "
        f"steps before were {before}. Training stops here; {kept}. Look at the learning rate and its warm-up, at "
        "gradient clipping, at the batch of this step, and at what bfloat16 cannot hold."
    )


class _Data:
    """Takes batches, several at a time, and knows the position after the last."""

    def __init__(self, iterator: Iterator[Any], limit: int, accumulate: int, mesh: Mesh | None):
        self.iterator, self.limit, self.accumulate, self.mesh = iterator, limit, accumulate, mesh

    @property
    def state(self) -> Any:
        state = self.iterator.get_state()  # pyright: ignore[reportAttributeAccessIssue]
        return state

    def take(self, count: int, step: int) -> PyTree:
        """`count` batches along a new first axis, which is filled up to the limit so that its length never changes."""
        batches = []
        for i in range(count):
            try:
                batches.append(next(self.iterator))
            except StopIteration:
                raise ValueError(f"the data ends at step {step + i}: let it repeat, or train for fewer steps.") from None
        rows = {x.shape[0] for x in jtu.tree_leaves(batches[0])}
        if len(rows) != 1 or (rows.pop() * jax.process_count()) % self.accumulate != 0:
            shapes = jtu.tree_map(lambda x: x.shape, batches[0])
            raise ValueError(f"the rows of a batch must be a multiple of accumulate={self.accumulate}; its shapes are {shapes}.")
        batches += [batches[-1]] * (self.limit - count)
        return share_out(jtu.tree_map(lambda *x: np.stack(x), *batches), self.mesh, lead=1)


class _Ledger:
    """What every step costs, and how much is spent before it: exact."""

    def __init__(self, stepper: Stepper, model: PyTree, plan: dict[str, tuple[int, ...]], steps: int):
        self.stepper, self.plan, self.steps = stepper, plan, steps
        self.model = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x, model)
        self.before: list[int] = []

    def measure(self, batch: PyTree) -> None:
        """Counts the step at each depth that occurs, and adds up."""
        names = tuple(self.plan)
        columns = list(zip(*self.plan.values())) if names else [()] * self.steps
        costs = {depth: self._cost(batch, dict(zip(names, depth))) for depth in set(columns)}
        self.before = [0, *it.accumulate(costs[depth] for depth in columns)]

    def _cost(self, batch: PyTree, rounds: dict[str, int]) -> int:
        loss = self.stepper.loss
        if self.stepper.depths is not None:
            return int(cost(loss, self.model, batch, **rounds).matmul)
        traced = {name: jax.ShapeDtypeStruct((), jnp.int32) for name in rounds}
        key = jax.eval_shape(lambda: jr.key(0))
        step = lambda model, rounds, batch, key: gradient(loss, with_rounds(model, **rounds), batch, key)[0]
        return int(flops.count(step, self.model, traced, batch, key, trips=rounds).matmul)

    @property
    def total(self) -> int:
        return self.before[-1]

    def spent(self, step: int) -> int:
        """The FLOPs of all steps before this one."""
        return self.before[step]

    def schedule(self, first: int, limit: int) -> tuple[list[float], list[list[int]]]:
        """For a call from step `first` on: the part of all FLOPs that is spent before each step, and the depths."""
        index = [min(step, self.steps - 1) for step in range(first, first + limit)]
        total = max(self.total, 1)
        return [self.before[i] / total for i in index], [[rounds[i] for i in index] for rounds in self.plan.values()]


class _Watch:
    """Times the steps, but for the first call, which compiles, and for what is not a step."""

    def __init__(self):
        self.seconds, self.mark = 0.0, None

    def lap(self) -> float | None:
        """The seconds since the last lap, `None` at the first."""
        now, mark = time.perf_counter(), self.mark
        self.mark = now
        if mark is None:
            return None
        self.seconds += now - mark
        return now - mark

    @contextlib.contextmanager
    def paused(self):
        begin = time.perf_counter()
        yield
        if self.mark is not None:
            self.mark += time.perf_counter() - begin


@contextlib.contextmanager
def _signals():
    """Collects SIGTERM instead of dying of it. Only the main thread can."""
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(signal.Signals(number).name))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGTERM, before)
