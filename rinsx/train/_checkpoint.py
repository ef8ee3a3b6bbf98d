"""Checkpoints: saved in the background, complete or absent, verified when they are read."""

import concurrent.futures
import dataclasses
import json
import logging
import math
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any, final

import jax
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._json import encode
from ._verify import (
    agree,
    compare,
    Damaged,
    describe,
    empty,
    gather,
    implementation,
    is_key,
    is_numpy,
    is_stored,
    named,
    plain,
    read_manifest,
    sharding,
    verify,
    write_manifest,
)


_NAME = re.compile(r"(\d{9,})(?:\.(\d+))?")
_ARRAYS = "arrays"


@final
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What [`rinsx.train.Checkpoints`][] restores.

    !!! example

        ```python
        import tempfile

        import jax.numpy as jnp
        import rinsx as rx

        with tempfile.TemporaryDirectory() as folder, rx.train.Checkpoints(folder) as checkpoints:
            checkpoints.save(10, {"x": jnp.arange(3)}, metrics={"loss": 2.5})
            checkpoint = checkpoints.restore_latest({"x": jnp.zeros(3, jnp.int32)})
            checkpoint.step, checkpoint.metrics  # 10, {'loss': 2.5}
        ```

    **Attributes:**

    - `step`: the step that it was saved at.
    - `state`: the pytree that was saved.
    - `data`: the position in the data that this process saved.
    - `metrics`: the metrics given with it; those that were not finite are `None`.
    - `metadata`: the metadata given with it.
    """

    step: int
    state: PyTree
    data: Any
    metrics: dict[str, float | None]
    metadata: Any


@final
class Checkpoints:
    """A folder of checkpoints, of which the last few and the best are kept.

    Arrays are written by orbax in the background. A checkpoint appears in the folder under its final name, by one rename, once it
    is complete and the checksums of its files are written beside them: a process that is killed at any moment leaves earlier
    checkpoints as they were. The rename needs a file system of the POSIX kind, shared by all processes.

    With many processes, all of them call `save` and the `restore_` methods, in the same order; arrays are global ones. Process 0
    alone writes JSON, verifies and deletes.

    !!! example

        ```python
        import tempfile

        import equinox as eqx
        import jax.random as jr
        import rinsx as rx

        model = eqx.nn.Linear(2, 2, key=jr.key(0))
        with tempfile.TemporaryDirectory() as folder:
            with rx.train.Checkpoints(folder, keep=2, every=100) as checkpoints:
                for step in range(0, 301, 100):
                    if checkpoints.due(step):
                        checkpoints.save(step, model, data={"next": step}, metrics={"loss": 1 / (1 + step)})
                checkpoints.restore_latest(model).data  # {'next': 300}
        ```
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 3,
        keep_best: int = 1,
        best: str = "loss",
        every: int = 1000,
    ):
        """**Arguments:**

        - `folder`: where the checkpoints are; made by the first one.
        - `keep`: how many of the last checkpoints are kept, at least 1.
        - `keep_best`: how many of the best are kept besides, those with the lowest finite `metrics[best]`.
        - `best`: the name of that metric.
        - `every`: the number of steps from one checkpoint to the next, for `due`.
        """
        for name, value, least in (("keep", keep, 1), ("keep_best", keep_best, 0), ("every", every, 1)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}; got {value}.")
        # Importing orbax takes about a second.
        import orbax.checkpoint as ocp

        _quiet()
        self._ocp = ocp
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._finishing = concurrent.futures.ThreadPoolExecutor(1, "rinsx-checkpoint")
        self._pending: concurrent.futures.Future | None = None
        # Checkpoints that a restore has passed over: damaged, or of a future that the run has turned away from.
        self._passed: set[str] = set()
        self._folder = pathlib.Path(folder).absolute()
        self._keep, self._keep_best, self._best, self._every = keep, keep_best, best, every

    @property
    def every(self) -> int:
        """The number of steps from one checkpoint to the next."""
        return self._every

    def due(self, step: int) -> bool:
        """Whether `step` is a positive multiple of `every`."""
        return step > 0 and step % self._every == 0

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the checkpoints in the folder, increasing. They are complete, but not verified."""
        return tuple(sorted({_step(name) for name in self._names()}))

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        data: Any = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Any = None,
    ) -> None:
        """Saves a checkpoint. Returns once `state` may be changed or donated; the files are written in the background. Waits for the
        checkpoint before it to be complete, and raises what went wrong with it.

        **Arguments:**

        - `step`: how many steps are done, at least 0.
        - `state`: any pytree, such as `(model, optimizer_state, key)`. Its JAX and numpy arrays are saved, typed keys too.
            Anything else (functions, Python numbers) is not; it is taken from `like` when restoring.
        - `data`: the position in the data, of this process; anything that JSON can hold.
        - `metrics`: by name, among them the one that the best are chosen by.
        - `metadata`: anything that JSON can hold.

        **Raises:**

        `ValueError` if the folder holds later steps, which belong to a run that was not restored from.
        """
        if step < 0:
            raise ValueError(f"Steps are counted from 0; got {step}.")
        self.wait()
        positions = gather(json.dumps(data))
        name = self._claim(step)
        staging = self._folder / f".saving-{name}"
        leaves = dict(named(state))
        manifest = {
            "step": step,
            "metrics": encode(dict(metrics or {})),
            "metadata": metadata,
            "data": [json.loads(position) for position in positions],
            "leaves": [[path, *describe(leaf)] for path, leaf in leaves.items()],
        }
        # Fails here, not in the background, on what JSON cannot hold.
        json.dumps(manifest, allow_nan=False)
        stored = {str(i): plain(leaf) for i, leaf in enumerate(leaves.values()) if leaf.size}
        self._checkpointer.save(staging / _ARRAYS, self._ocp.args.PyTreeSave(stored or {"none": np.zeros(1)}))
        self._pending = self._finishing.submit(self._finish, name, staging, manifest)

    def wait(self) -> None:
        """Waits until the last checkpoint is complete. Raises what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        try:
            self.wait()
        finally:
            self._finishing.shutdown()
            self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def restore_latest(self, like: PyTree) -> Checkpoint | None:
        """Restores the last checkpoint that is undamaged, bit for bit.

        A damaged one (a file missing, cut or changed) is named in a warning, and the one before it is used. From then on the folder
        belongs to this run: its next checkpoint removes what is damaged and what is later than itself.

        **Arguments:**

        - `like`: a pytree of the structure that was saved; its arrays, or `jax.ShapeDtypeStruct`s, give shapes, dtypes and shardings,
            which may be others than when saving. Where it has NumPy arrays or scalars, these are restored; so they are for structs of
            a dtype that JAX does not have, such as float64 where `jax_enable_x64` is off.

        **Returns:**

        A [`rinsx.train.Checkpoint`][]; `None` if the folder has none.

        **Raises:**

        `ValueError` if the checkpoint is of a different model, naming the first array that differs; `RuntimeError` if there are
        checkpoints and all are damaged.
        """
        return self._restore(like, lambda name, manifest: (_order(name),))

    def restore_best(self, like: PyTree) -> Checkpoint | None:
        """Restores the undamaged checkpoint with the lowest finite `metrics[best]`, and leaves the folder to whom it belongs.

        **Arguments:**

        - `like`: as for `restore_latest`.

        **Returns:**

        A [`rinsx.train.Checkpoint`][]; `None` if the folder has none with that metric.
        """

        def rank(name, manifest):
            metric = self._metric(manifest)
            return None if metric is None else (-metric, _order(name))

        return self._restore(like, rank, claims=False)

    def _names(self) -> list[str]:
        found = os.listdir(self._folder) if self._folder.is_dir() else []
        return sorted(filter(_NAME.fullmatch, found), key=_order)

    def _metric(self, manifest: Mapping[str, Any]) -> float | None:
        metric = manifest["metrics"].get(self._best)
        return metric if isinstance(metric, int | float) and math.isfinite(metric) else None

    def _claim(self, step: int) -> str:
        """A name that is not taken. Process 0 decides."""
        attempt, blocked = 0, -1
        if jax.process_index() == 0:
            names = self._names()
            blocked = max((_step(name) for name in names if name not in self._passed), default=-1)
            attempt = max((_order(name)[1] + 1 for name in names if _step(name) == step), default=0)
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in (*self._folder.glob(".saving-*"), *self._folder.glob(".old-*")):
                shutil.rmtree(leftover)
        attempt, blocked = agree(attempt, blocked)
        if blocked > step:
            raise ValueError(
                f"{self._folder} holds a checkpoint of step {blocked}, later than step {step}, which is to be saved: restore it "
                "first, or use another folder."
            )
        return f"{step:09d}" + (f".{attempt}" if attempt else "")

    def _finish(self, name: str, staging: pathlib.Path, manifest: dict[str, Any]) -> None:
        self._checkpointer.wait_until_finished()
        if jax.process_index() != 0:
            return
        write_manifest(staging, manifest)
        os.rename(staging, self._folder / name)
        self._remove_old(name)

    def _remove_old(self, latest: str) -> None:
        manifests: dict[str, Any] = {}
        # The last attempt at a step stands for it.
        last = {
            _step(name): name for name in self._names() if name not in self._passed and _order(name) <= _order(latest)
        }
        for name in last.values():
            try:
                manifests[name] = read_manifest(self._folder / name)
            except Damaged:
                # Not judged here: it counts as one of the last, and restoring names it.
                manifests[name] = {"metrics": {}}
        metrics = {name: metric for name, m in manifests.items() if (metric := self._metric(m)) is not None}
        kept = set(list(manifests)[-self._keep :])
        # A draw goes to the later one.
        ranked = sorted(metrics, key=lambda name: (metrics[name], -_step(name)))
        kept |= set(ranked[: self._keep_best])
        for name in self._names():
            if name not in kept:
                # Renamed first: what is half removed must not be taken for a damaged checkpoint.
                os.rename(self._folder / name, self._folder / f".old-{name}")
                shutil.rmtree(self._folder / f".old-{name}")
        self._passed.clear()

    def _restore(self, like: PyTree, rank: Callable[[str, Any], Any], claims: bool = True) -> Checkpoint | None:
        self.wait()
        chosen, damaged = (-1, 0), []
        if jax.process_index() == 0:
            names, readable = self._names(), {}
            for name in names:
                try:
                    if (place := rank(name, manifest := read_manifest(self._folder / name))) is not None:
                        readable[name] = (place, manifest)
                except Damaged as error:
                    damaged.append((name, error))
            for name in sorted(readable, key=lambda name: readable[name][0], reverse=True):
                try:
                    verify(self._folder / name, readable[name][1])
                except Damaged as error:
                    damaged.append((name, error))
                    continue
                chosen = _order(name)
                break
            for name, error in damaged:
                # What is older than the one that is used does not matter here.
                if not claims or _order(name) > chosen:
                    warnings.warn(
                        f"the checkpoint {self._folder / name} is damaged ({error}) and is not used", stacklevel=3
                    )
            if claims:
                self._passed = {name for name in names if _order(name) > chosen}
        *chosen, broken = agree(*chosen, len(damaged))
        if chosen[0] < 0:
            if broken:
                raise RuntimeError(f"all {broken} checkpoints in {self._folder} are damaged; see the warnings")
            return None
        name = f"{chosen[0]:09d}" + (f".{chosen[1]}" if chosen[1] else "")
        return self._read(self._folder / name, like)

    def _read(self, path: pathlib.Path, like: PyTree) -> Checkpoint:
        manifest = read_manifest(path)
        leaves = dict(named(like))
        compare(path, manifest["leaves"], [[path, *describe(leaf)] for path, leaf in leaves.items()])
        ocp = self._ocp
        wanted = {str(i): leaf for i, leaf in enumerate(leaves.values()) if leaf.size}
        found = {}
        if wanted:
            restore_args = {
                i: ocp.RestoreArgs(restore_type=np.ndarray)
                if is_numpy(leaf)
                else ocp.ArrayRestoreArgs(sharding=sharding(leaf))
                for i, leaf in wanted.items()
            }
            args = ocp.args.PyTreeRestore(item={i: 0 for i in wanted}, restore_args=restore_args)
            found = self._checkpointer.restore(path / _ARRAYS, args)
        numbers = {path: str(i) for i, path in enumerate(leaves)}

        def fill(path, leaf):
            if not is_stored(leaf):
                return leaf
            if not leaf.size:
                return empty(leaf)
            value = found[numbers[jtu.keystr(path)]]
            if isinstance(leaf, np.generic):
                # The scalar in an array without axes.
                return np.asarray(value)[()]
            return jr.wrap_key_data(value, impl=implementation(leaf)) if is_key(leaf) else value

        state = jtu.tree_map_with_path(fill, like)
        return Checkpoint(
            manifest["step"], state, _position(path, manifest["data"]), manifest["metrics"], manifest["metadata"]
        )


def _order(name: str) -> tuple[int, int]:
    """The step of a checkpoint and the number of the attempt at it."""
    step, _, attempt = name.partition(".")
    return int(step), int(attempt or 0)


def _step(name: str) -> int:
    return _order(name)[0]


def _position(folder: pathlib.Path, positions: list[Any]) -> Any:
    """The position in the data of this process."""
    if len(positions) == jax.process_count():
        return positions[jax.process_index()]
    if all(position == positions[0] for position in positions):
        return positions[0]
    raise ValueError(
        f"the checkpoint {folder} holds positions in the data of {len(positions)} processes, which differ, and there are now"
        f" {jax.process_count()}: restore it with as many as saved it."
    )


def _quiet() -> None:
    """Keeps orbax, which logs every step of every save, out of the terminal. Its errors still pass."""
    log = logging.getLogger("absl")
    if _from_elsewhere not in log.filters:
        log.addFilter(_from_elsewhere)


def _from_elsewhere(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or "orbax" not in record.pathname
