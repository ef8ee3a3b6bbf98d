"""Which recursion pays at equal training FLOPs? Trains each on the same text, and says what the run can and cannot decide.

    python benchmarks/compute_matched.py

trains the seven arms of `_arms.py` on the text of Python's standard library, three seeds each, in a few minutes on two
cores. It writes a table, a plot and a JSON of results into `outputs/compute_matched`. Interrupted, it goes on where it was;
what is there is not computed again.
"""

import dataclasses
import os
import pathlib
import sys
import time
from typing import Any, Literal

import _workers
import tyro
from _rates import Sweeps


SCRIPT = pathlib.Path(__file__)
SWEEPS = Sweeps(
    SCRIPT.parent / "tuned.json",
    same=("optimizer",),
    near=("width", "layers", "length", "batch", "tokens"),
    shape=("heads",),
    metric="bits_per_byte",
    plural="losses",
    title="Bits per byte",
    best=min,
    show="{:.4f}".format,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains each way to recurse at equal training FLOPs, and compares."""

    arms: tuple[str, ...] = (
        "A B",
        "A^2 B",
        "A^3 B",
        "(A B)^2",
        "A B^2",
        "A B^2 C latent",
        "A^r B stochastic",
    )
    """Names of arms, or any signatures, such as "A^4 B"; behind a comma the policy of the cache, as in "A^3 B, first". The
    first is the baseline and sets the budget."""
    preset: str | None = None
    """Take width, layers, heads and length from a preset of rx.models.presets; the vocabulary is bytes always."""
    width: int = 48
    layers: int = 4
    heads: int = 3
    length: int = 128
    """Tokens in a window."""
    batch: int = 4
    """Windows in a step."""
    tokens: int = 900_000
    """How many tokens the baseline is trained on."""
    seeds: int = 3
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float | None = None
    """For all arms; by default what `tuned.json` has for these shapes, or for the nearest that it has."""
    law: Literal["binomial", "uniform", "poisson", "lognormal-poisson"] = "binomial"
    """The depth distribution of the stochastic arm."""
    law_max: int = 3
    law_skip: str = "1/2"
    """The probability of skipping a round, of the binomial law."""
    law_mean: float = 2.0
    """Of the Poisson laws."""
    rank: int = 4
    """Of the stochastic arm's low-rank adapters."""
    depths: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of rounds to evaluate at, besides the trained one."""
    windows: int = 512
    """How many windows of held-out text to evaluate on."""
    points: int = 10
    """How many points a curve has."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What layers compute in."""
    corpus: tuple[pathlib.Path, ...] = ()
    """Text files, or JSON lines (.jsonl or .ndjson, also .gz, .xz, .zst), or folders of one kind. By default Python's standard
    library."""
    field: str = "text"
    """The field of JSON lines that holds the text."""
    held_out: str = "1/20"
    """The part of the corpus that is not trained on."""
    chunk: int | None = None
    """Hold out chunks of so many bytes from every document. By default whole documents are held out."""
    elsewhere: tuple[pathlib.Path, ...] = ()
    """More text to evaluate on, from outside the corpus."""
    output: pathlib.Path = pathlib.Path("outputs/compute_matched")
    workers: int | None = None
    """Processes that train side by side, each on one core. By default one for each core; 1 where there is an accelerator."""
    shards: int = 1
    """In how many parts parameters are cut over the devices of a worker."""
    save_every: int | None = None
    """Save checkpoints after so many steps, for long runs. By default a run that is interrupted starts over."""
    tune: bool = False
    """Sweep the learning rate of each arm instead, over all seeds, on text that is not reported on, and write `tuned.json` into the
    output folder."""
    grid: tuple[float, ...] = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)
    """The learning rates to sweep."""


def setting_of(options: Options):
    """What the results depend on."""
    from _arms import Setting

    import rinsx as rx

    shape: dict[str, Any] = {name: getattr(options, name) for name in ("width", "layers", "heads", "length")}
    if options.preset is not None:
        if options.preset not in rx.models.presets:
            raise SystemExit(f"--preset is one of {', '.join(rx.models.presets)}; got {options.preset}")
        config = rx.models.presets[options.preset]
        shape = {"width": config.width, "layers": config.layers, "heads": config.heads, "length": config.context}
    same: dict[str, Any] = {
        f.name: getattr(options, f.name) for f in dataclasses.fields(Setting) if hasattr(options, f.name)
    }
    paths: dict[str, Any] = {
        name: tuple(str(path.resolve()) for path in getattr(options, name)) for name in ("corpus", "elsewhere")
    }
    return Setting(**{**same, **shape, **paths, "cache": str((options.output / "tokens").resolve())})


def work() -> None:
    """Trains what the parent says."""
    _workers.pin()
    from _arms import Arm, Setting, train

    def one(job: dict[str, Any], logs: list[Any]) -> dict[str, Any]:
        path = lambda name: None if job[name] is None else pathlib.Path(job[name])
        return train(
            Arm(**job["arm"]),
            Setting(**_workers.settings(job["setting"])),
            job["row"],
            job["seed"],
            job["rate"],
            logs=logs,
            metrics=pathlib.Path(job["metrics"]),
            checkpoints=path("checkpoints"),
            every=job["every"],
            tuning=job["tuning"],
            keep=path("keep"),
        )

    _workers.work(one)


def jobs_of(options: Options, setting: Any) -> tuple[list[Any], Any, list[dict[str, Any]]]:
    """The arms, the plan, and all runs, those of one arm together."""
    from _arms import arm, identity, judged, plan
    from _text import load

    arms = [judged(arm(text), setting) for text in dict.fromkeys(options.arms)]
    planned = plan(arms, setting)
    fingerprint = load(setting).fingerprint
    found = SWEEPS.rates(options, setting, [a.name for a in arms])
    name = lambda a, seed, rate, steps: identity(a, setting, seed, rate, f"{fingerprint} {options.tune} {steps}")
    return arms, planned, _workers.jobs_of(options, setting, arms, planned, found, name, keep=None)


def main() -> None:
    """The command."""
    if sys.argv[1:] == ["--worker"]:
        work()
        return
    options = tyro.cli(Options, description=__doc__)
    # The parent only plans: the memory of an accelerator is for the worker.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import _report

    begin = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    setting = setting_of(options)
    arms, planned, jobs = jobs_of(options, setting)
    print(planned)
    with _report.Live() as show:
        results = _workers.run_all(SCRIPT, options.output / "runs", jobs, show, options.workers)
    if options.tune:
        SWEEPS.tuned(options, setting, arms, results, _report.ends(setting.corpus) or ["standard library"])
    else:
        _report.compared(options, setting, arms, planned, results, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
