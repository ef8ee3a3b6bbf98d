"""The training loop."""

import contextlib
import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from .._check import at_least
from .._loop import with_rounds
from ..depth import AbstractLaw
from ._batches import Batches
from ._checkpoint import Checkpoints
from ._json import encode
from ._log import AbstractLog
from ._mesh import constrain, place, share_out
from ._step import Ledger, Loss, prepare, Record, run, Stepper, tables
from ._watch import Watch


Evaluate = Callable[[Any], Mapping[str, float]]


class NonFiniteLoss(FloatingPointError):
    """Training met a loss, a gradient or a weight that is infinite or not a number."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What [`rinsx.train.fit`][] returns.

    **Attributes:**

    - `model`: the trained model.
    - `state`: of the optimiser.
    - `step`: how many steps the model has been trained for, those of earlier runs that were resumed included.
    - `flops`: the contractions of all these steps, forward and backward, exact; without the optimiser.
    - `seconds`: wall time of the steps that this call of `fit` ran, without evaluations and checkpoints, and without
        its first `steps_per_call` steps, which are compiled.
    - `timed`: how many steps `seconds` is the time of.
    - `begun`: the step that this call of `fit` began at: 0, or that of the checkpoint that it went on from.
    - `stopped`: `None` at the end of training, or the name of the signal that ended it early.
    - `metrics`: what was last evaluated, if only by an earlier run that was resumed.
    """

    model: PyTree
    state: PyTree
    step: int
    flops: int
    seconds: float
    timed: int
    begun: int
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
    depth: Mapping[str, AbstractLaw | int | Sequence[int] | np.ndarray | jax.Array] | None = None,
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

    Step `s`, counted from 0, calls the loss with the key `jax.random.fold_in(key, s)`, folded once more with the number
    of the part where `accumulate` is above 1. Its depth is drawn from `key` and `s` as well. So a run that was killed
    and started again with the same arguments ends bit for bit where an undisturbed run ends, on one machine.

    While one call runs on the devices, the data of the next one is fetched; a call's loss is looked at once the next
    has begun. (A CPU runs each call at once, so there nothing overlaps, but for what the data prefetches by itself.)

    SIGTERM ends training early: the call that runs is finished, a checkpoint is saved, and `Run.stopped` says so. With
    several processes it is enough that one of them gets it, and up to two calls more are run. Only the main thread can
    catch signals.

    `model` keeps its arrays: training begins with a copy. What `evaluate` is given may be kept, too. Logs and
    checkpoints belong to the caller, who closes them.

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
    - `loss`: `(model, batch, key) -> (total, weight)`: the sum over what counts in a batch, and how much counts, both
        scalars. The mean is minimised.
    - `batches`: yields batches, pytrees of NumPy arrays, all of the same shapes, whose first axis is that of the rows:
        those of this process, where there are several. To resume from checkpoints, its iterator needs `get_state` and
        `set_state`, with a state that JSON can hold, as those of a grain `IterDataset` have.
    - `optimizer`: one of [`rinsx.train.adamw`][], [`rinsx.train.adafactor`][], [`rinsx.train.muon`][], or any of optax.
        Its `update` is given `fraction=`, the part of the training FLOPs that is spent before the step, where it
        accepts extra arguments. (For a loss without any contraction it is the part of the steps.)
    - `steps`: how many steps to train in all.
    - `key`: for the depths and the losses of all steps.
    - `depth`: for each name of a loop, a law to draw the number of rounds from, once a step and the same on every
        process; or a number; or the number for each of all steps, such as a law's `quota`. By default the model runs as
        it is.
    - `specialise`: up to so many distinct depths are compiled as programs of their own, in which the number of rounds
        is a Python integer. Where there are more, one program runs them all as traced integers, which rematerialises,
        and the loops need a `max`.
    - `accumulate`: in how many parts to take a batch, one after the other, to save memory. The result is that of the
        whole batch, also where the parts have unequal weights.
    - `steps_per_call`: how many steps to run in one compiled call. Small steps gain by it; logs, evaluations and
        signals wait for its end.
    - `evaluate`: `model -> {name: number}`; its numbers are logged, and the checkpoints see them.
    - `evaluate_every`: after how many steps, besides at the end.
    - `checkpoints`: where to save and to resume from. A checkpoint has the metrics of its own step, if that was
        evaluated.
    - `logs`: where metrics are written, after each call: `loss`, `gradient_norm` (of the last step, before any
        clipping), `fraction` and `flops` spent, `tokens` (the weights of all steps so far), `tokens_per_second`,
        `flops_per_second` and the mean `rounds_` of each loop. Only process 0 writes.
    - `mesh`: of [`rinsx.train.mesh`][]; needed with several processes. `model` is placed by [`rinsx.train.place`][]
        where it was not.

    **Returns:**

    A [`rinsx.train.Run`][].

    **Raises:**

    [`rinsx.train.NonFiniteLoss`][] at the first loss that is not finite; the last good checkpoint stays. `ValueError`
    for a batch whose rows cannot be divided as asked, for data that ends before `steps`, where a number of rounds is
    refused, and for a checkpoint that was trained with another `key` or for more `steps`.
    """
    at_least(1, steps=steps, accumulate=accumulate, steps_per_call=steps_per_call, evaluate_every=evaluate_every)
    at_least(0, specialise=specialise)
    if mesh is None and jax.process_count() > 1:
        raise ValueError(f"training by {jax.process_count()} processes needs a mesh: give mesh=rx.train.mesh().")
    plan = _depths(model, depth or {}, steps, key)
    optimizer = optax.with_extra_args_support(optimizer)
    trained = _start(model, optimizer, mesh)
    iterator = iter(batches)
    position, metrics = _Position(0, 0, 0.0, _numbers(key)), {}
    if checkpoints is not None:
        _resumable(iterator)
        if (found := checkpoints.restore_latest(trained)) is not None:
            position, metrics = position.resumed(found.metadata, steps)
            trained = found.state
            iterator.set_state(found.data)  # pyright: ignore[reportAttributeAccessIssue]
    stepper = Stepper(loss, optimizer, tuple(plan), tables(plan, specialise), accumulate, mesh)
    data = Batches(iterator, steps_per_call, accumulate, mesh)
    ledger = Ledger(stepper, trained[0], plan, steps, position.step, position.flops)
    watch = Watch()
    devices = 1 if mesh is None else mesh.size // jax.process_count()
    logs = logs if jax.process_index() == 0 else ()
    unsound = int(_unsound(trained[0]))
    step, weight, timed, stopping = position.step, position.weight, 0, False
    pending: tuple[int, int, Any] | None = None

    def settle() -> None:
        """Waits for the steps that were last begun, and writes what is known of them."""
        nonlocal pending, stopping, timed, weight
        if pending is None:
            return
        first, count, seen = pending
        pending = None
        record, flagged = jax.device_get(seen)
        stopping = stopping or bool(flagged)
        record = Record(*(column[:count].astype(np.float64) for column in record))
        seconds = watch.lap()
        _finite(record, first, checkpoints)
        end = first + count
        counted = float(np.sum(record.weight))
        weight += counted
        values = {
            "loss": float(np.sum(record.loss * record.weight)) / counted if counted else 0.0,
            "gradient_norm": float(record.gradient_norm[-1]),
            "fraction": ledger.fraction(end),
            "flops": ledger.spent(end),
            "tokens": weight,
        }
        if seconds is not None:
            timed += count
            values["tokens_per_second"] = counted / seconds
            values["flops_per_second"] = (ledger.spent(end) - ledger.spent(first)) / seconds
        for name, rounds in plan.items():
            values[f"rounds_{name}"] = float(np.mean(rounds[first:end]))
        for log in logs:
            log.write(end, values)

    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(_signals())
        if iterator is not batches and callable(close := getattr(iterator, "close", None)):
            stack.callback(close)
        while step < steps and not stopping:
            count = min(steps_per_call, steps - step, *_until(step, evaluate_every, checkpoints))
            batch = data.take(count, step)
            if not ledger.measured:
                ledger.measure(jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch))
            fractions, rounds = ledger.schedule(step, steps_per_call)
            flags = share_out(np.full(devices, bool(caught)), mesh)
            given = batch, key, step, count, fractions, rounds, flags
            if step == ledger.first:
                prepare(stepper, trained, *given)
            trained, seen = run(stepper, trained, *given)
            settle()
            pending = (step, count, seen)
            # The first call compiles: nothing is begun before it has ended, so that it can be left out of the time. One that is
            # ready, as always where the backend runs it at once, is timed by now.
            ready = jax.process_count() == 1 and seen[1].is_ready()  # pyright: ignore[reportAttributeAccessIssue]
            if ready or step == ledger.first:
                settle()
            step += count
            if jax.process_count() == 1:
                # Several must stop at the same step: they know of each other's signals once a call is settled.
                stopping = bool(caught)
            evaluates = step == steps or (evaluate_every is not None and step % evaluate_every == 0)
            saves = checkpoints is not None and (step == steps or stopping or checkpoints.due(step))
            if evaluates or saves:
                settle()
                saves = saves or (checkpoints is not None and stopping)
                with watch.paused():
                    # A copy, since the next step writes over its input.
                    model = _copy(trained[0])
                    if _unsound(model) > unsound:
                        raise NonFiniteLoss(_advice(f"step {step - 1}: the update made weights", checkpoints))
                    now = {}
                    if evaluates and evaluate is not None:
                        now = metrics = {name: float(value) for name, value in evaluate(model).items()}
                        for log in logs:
                            log.write(step, metrics)
                    if saves and checkpoints is not None:
                        position = dataclasses.replace(position, step=step, flops=ledger.spent(step), weight=weight)
                        metadata = {**dataclasses.asdict(position), "metrics": encode(metrics)}
                        state = model, _copy(trained[1])
                        checkpoints.save(step, state, data=data.state, metrics=now, metadata=metadata)
        settle()
    if checkpoints is not None:
        checkpoints.wait()
    return Run(
        model=trained[0],
        state=trained[1],
        step=step,
        flops=ledger.spent(step),
        seconds=watch.seconds,
        timed=timed,
        begun=ledger.first,
        stopped=signal.SIGTERM.name if step < steps else None,
        metrics=metrics,
    )


@dataclasses.dataclass(frozen=True)
class _Position:
    """How far a run is: what a checkpoint says of it besides arrays and data."""

    step: int
    flops: int
    weight: float
    key: list[int]

    def resumed(self, saved: Any, steps: int) -> tuple["_Position", dict[str, float]]:
        """The position and the metrics that were saved, if they are of the run that begins here."""
        if not (isinstance(saved, Mapping) and {"metrics", *dataclasses.asdict(self)} <= set(saved)):
            raise ValueError(f"the checkpoint was not saved by rx.train.fit: its metadata is {saved!r}.")
        metrics = {name: math.nan if value is None else value for name, value in saved["metrics"].items()}
        found = _Position(**{field.name: saved[field.name] for field in dataclasses.fields(_Position)})
        if found.step > steps:
            raise ValueError(f"the checkpoint is of step {found.step}, past the {steps} steps to train.")
        if found.key != self.key:
            raise ValueError(
                f"the checkpoint is of a run with another `key`, of the numbers {found.key}; got {self.key}. To go on from its "
                "weights with other random numbers, begin a new run with the model that it holds."
            )
        return found, metrics


def _resumable(iterator: Any) -> None:
    """Refuses, before the first step, data whose position a checkpoint cannot hold."""
    needs = "to resume, data needs an iterator with get_state and set_state, as those of rx.data.batches have"
    if not (hasattr(iterator, "get_state") and hasattr(iterator, "set_state")):
        raise TypeError(f"{needs}; got {iterator!r}.")
    state = iterator.get_state()
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        shown = repr(state) if len(repr(state)) < 80 else f"{repr(state)[:80]}..."
        raise TypeError(
            f"{needs}, and a state that JSON can hold; got {iterator!r}, whose state is {shown} ({error}). Of grain, an "
            "`IterDataset` has one, a `DataLoader` has not."
        ) from None


def _numbers(key: PRNGKeyArray) -> list[int]:
    data = jr.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return np.asarray(data).tolist()


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
    if mesh is not None:
        model = place(model, mesh)

    return _copy(model), _first_state(optimizer.init, model, mesh)


@eqx.filter_jit
def _first_state(init: Callable[[PyTree], PyTree], model: PyTree, mesh: Mesh | None) -> PyTree:
    # Copied, since some optimisers keep the parameters as part of their state.
    return constrain(_copy(init(eqx.filter(model, eqx.is_inexact_array))), mesh)


def _copy(tree: PyTree) -> PyTree:
    return jtu.tree_map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, tree)


@eqx.filter_jit
def _unsound(model: PyTree) -> Any:
    """How many weights are infinite or not a number: some may be meant to be, such as a mask of -inf."""
    weights = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    return sum((jnp.sum(~jnp.isfinite(x)) for x in weights), jnp.int32(0))


def _until(step: int, evaluate_every: int | None, checkpoints: Checkpoints | None) -> list[int]:
    """How many steps are left until something else than a step is due."""
    every = [n for n in (evaluate_every, None if checkpoints is None else checkpoints.every) if n is not None]
    return [n - step % n for n in every]


def _finite(record: Record, first: int, checkpoints: Checkpoints | None) -> None:
    bad = np.flatnonzero(~np.isfinite(record.loss) | ~np.isfinite(record.gradient_norm))
    if bad.size == 0:
        return
    i = int(bad[0])
    before = ", ".join(f"{x:.4g}" for x in record.gradient_norm[max(i - 3, 0) : i]) or "none in this call"
    what = (
        f"step {first + i}: the loss is {record.loss[i]:.6g} and the norm of its gradient {record.gradient_norm[i]:.6g} (the "
        f"norms of the steps before: {before}),"
    )
    raise NonFiniteLoss(_advice(what, checkpoints))


def _advice(what: str, checkpoints: Checkpoints | None) -> str:
    kept = "no checkpoint was kept"
    if checkpoints is not None:
        checkpoints.wait()
        kept = f"the checkpoints of steps {list(checkpoints.steps)} are kept" if checkpoints.steps else kept
    return (
        f"{what} that are infinite or not a number. Training stops here; {kept}. Look at the learning rate and its "
        "warm-up, at gradient clipping, at the batch of this step (they are counted from 0), and at what bfloat16 cannot hold."
    )


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
        # `None` is a handler that was not set from Python: it cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
