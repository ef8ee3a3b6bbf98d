"""Runs of a comparison, handed out to processes: each on one core, each run on disk once it is done."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


#
# The worker: trains what it is told, one job after the other.
#


def work(train: Callable[[dict[str, Any], list[Any]], dict[str, Any]]) -> None:
    """Reads jobs from standard input, a line of JSON each; answers with lines of progress and results.

    **Arguments:**

    - `train`: from a job, and logs to train with, to a result that is plain JSON. JAX is not yet imported when `work` is called.
    """
    import rinsx as rx

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    class Report(rx.train.AbstractLog):
        def write(self, step, metrics):
            if "loss" in metrics:
                names = ("loss", "fraction", "tokens_per_second", "flops_per_second")
                answers.write(json.dumps({"step": step, **{name: metrics.get(name) for name in names}}) + "\n")

        def close(self):
            pass

    for line in sys.stdin:
        try:
            result = train(json.loads(line), [Report()])
        except Exception as error:
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            raise
        answers.write(json.dumps({"result": result}) + "\n")


def pin() -> None:
    """One core for each worker, before JAX counts them and starts as many threads."""
    if "RINSX_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["RINSX_WORKER"]) % len(cores)]})


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that went through JSON: tuples again."""
    return {name: tuple(map(_tuples, value)) if isinstance(value, list) else value for name, value in given.items()}


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Worker:
    """A process that trains, and what it last said."""

    def __init__(self, script: pathlib.Path, number: int, alone: bool):
        environment = dict(os.environ)
        if not alone:
            environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
            environment.update(OMP_NUM_THREADS="1", JAX_PLATFORMS="cpu", RINSX_WORKER=str(number))
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.job: dict[str, Any] | None = None
        self.seen: dict[str, Any] = {}

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """The result of a job; what the worker says on the way is in `seen`."""
        self.job, self.seen = job, {}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            said = json.loads(line)
            if "error" in said:
                raise RuntimeError(f"{job['arm']['name']}, seed {job['seed']}: {said['error']}")
            if "result" in said:
                self.job = None
                return said["result"]
            self.seen = said
        raise RuntimeError(f"{job['arm']['name']}, seed {job['seed']}: the worker ended with {self.process.wait()}")

    def stop(self) -> None:
        """Lets the process save what it has, if it saves anything, and ends it."""
        self.process.terminate()
        self.process.wait()


#
# The parent: hands out jobs, shows progress.
#


def jobs_of(
    options: Any, setting: Any, arms: list[Any], planned: Any, rates: dict[str, float], identity: Any, **more: Any
) -> list[dict[str, Any]]:
    """All runs of a comparison, or of a sweep of learning rates: those of one arm together.

    **Arguments:**

    - `rates`: the learning rate of each arm; of no use where a grid of them is swept.
    - `identity`: `(arm, seed, rate, steps) -> name`. The steps belong to it, since they follow from the baseline.
    - `more`: entries of every job.
    """
    jobs = []
    for arm in arms:
        row = {"steps": planned[arm.name].steps, "total": float(planned[arm.name].total)}
        for rate in options.grid if options.tune else [rates[arm.name]]:
            for seed in range(options.seeds):
                name = identity(arm, seed, rate, row["steps"])
                folder = None if options.save_every is None else str((options.output / "checkpoints" / name).resolve())
                jobs.append(
                    {
                        "arm": dataclasses.asdict(arm),
                        "setting": dataclasses.asdict(setting),
                        "row": row,
                        "seed": seed,
                        "rate": rate,
                        "metrics": str((options.output / "metrics" / f"{name}.jsonl").resolve()),
                        "checkpoints": folder,
                        "every": options.save_every or 1000,
                        "tuning": options.tune,
                        "name": name,
                        **more,
                    }
                )
    return jobs


def run_all(
    script: pathlib.Path, folder: pathlib.Path, jobs: list[dict[str, Any]], show: Any, number: int | None = None
) -> list[dict[str, Any]]:
    """The results of all runs, those of earlier calls included.

    **Arguments:**

    - `script`: what to start as a worker, with `--worker`.
    - `folder`: where results are kept, a file for each run, named by its job's `name`.
    - `jobs`: dicts of JSON, with `name`, `seed` and an `arm` with a name. Jobs of one arm go to one worker, which compiles once.
    - `show`: called with the number of runs that are done, that of all, and the workers.
    - `number`: of workers; by default one for each core, and 1 where there is an accelerator.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = lambda job: folder / f"{job['name']}.json"
    todo: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        if not path(job).exists():
            todo.setdefault(job["arm"]["name"], []).append(job)
    # The last group first. The arms that compile longest are named last by habit; begun last, each worker that has nothing left
    # would compile them once more to help.
    groups = list(todo.values())[::-1]
    lock = threading.Lock()
    number = max(min(number or _default_workers(), sum(map(len, groups))), 1)
    workers = [Worker(script, i, alone=number == 1) for i in range(number)] if todo else []
    begun: list[list[dict[str, Any]]] = []
    failed: list[BaseException] = []

    def take(group: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
        # Who has nothing left helps where most is left.
        with lock:
            if not group and groups:
                group = groups.pop(0)
                begun.append(group)
            group = group or max(begun, key=len, default=[])
            return (group, group.pop(0)) if group else None

    def serve(worker: Worker) -> None:
        try:
            group: list[dict[str, Any]] = []
            while not failed and (job := take(group)) is not None:
                group = job[0]
                result = worker.do(job[1])
                staged = path(job[1]).with_suffix(".new")
                staged.write_text(json.dumps(result), "utf-8")
                os.replace(staged, path(job[1]))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        done = lambda: sum(path(job).exists() for job in jobs)
        while any(thread.is_alive() for thread in threads) and not failed:
            show(done(), len(jobs), workers)
            time.sleep(0.5)
        show(done(), len(jobs), workers)
    finally:
        for worker in workers:
            worker.stop()
    if failed:
        raise SystemExit(str(failed[0]))
    return [json.loads(path(job).read_text("utf-8")) for job in jobs]


def _default_workers() -> int:
    import jax

    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
