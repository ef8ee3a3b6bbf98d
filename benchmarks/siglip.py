"""Does recursion help image-text learning, at equal training FLOPs? SigLIP, with RINS in the image tower, the text tower, or both.

    python benchmarks/siglip.py

(after `pip install -e '.[bench,text,vision]'`) trains five arms on scikit-learn's handwritten digits, with captions made from the
labels, three seeds each, in a few minutes on two cores, and compares their zero-shot accuracy on held-out images. It writes
a table, a plot and a JSON of results into `outputs/siglip`. Interrupted, it goes on where it was; what is there is not
computed again. Real photographs:

    python benchmarks/siglip.py --train cifar10/train.parquet --test cifar10/test.parquet --label label --names label_name \
        --size 32 --patch 4 --width 64 --heads 4 --images 60000 --crop 0.5 --flip
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
    SCRIPT.parent / "tuned_vision.json",
    same=("task", "optimizer"),
    near=("width", "size", "layers", "batch", "images"),
    shape=("patch", "heads"),
    metric="accuracy",
    plural="accuracies",
    title="Accuracy, %,",
    best=max,
    show=lambda accuracy: f"{100 * accuracy:.2f}",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains each way to recurse at equal training FLOPs, and compares accuracies on held-out images."""

    arms: tuple[str, ...] = ("plain", "image", "text", "both", "stochastic")
    """Which of the arms, the baseline first."""
    rounds: int = 2
    """Of the towers that recurse: `A^rounds B`."""
    size: int = 8
    """Height and width of an image."""
    patch: int = 2
    width: int = 48
    """Of both towers."""
    layers: int = 4
    """Of both towers."""
    heads: int = 3
    context: int = 12
    """Tokens in a caption."""
    vocabulary: int = 320
    """Of the byte-pair encoding that is trained on the captions."""
    batch: int = 64
    """Pairs in a step."""
    images: int = 30_000
    """How many images the baseline is trained on, each as often as it comes."""
    crop: float = 0.7
    """The least part of an image that a random crop has; 1 is no crop."""
    flip: bool = False
    """Mirror images at random."""
    seeds: int = 3
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float | None = None
    """For all arms; by default what `tuned_vision.json` has for these shapes, or for the nearest that it has."""
    law_max: int = 3
    """The most rounds of the stochastic arm's binomial law."""
    law_skip: str = "1/2"
    """The probability of skipping a round."""
    rank: int = 2
    """Of the stochastic arm's low-rank adapters."""
    depths: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of rounds to evaluate at, besides the trained one."""
    points: int = 8
    """How many points a curve has."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What layers compute in."""
    shards: int = 1
    """In how many parts parameters are cut over the devices of a worker."""
    prefetch: int = 0
    """How many batches are decoded ahead, by a thread."""
    save_every: int | None = None
    """Save checkpoints after so many steps, for long runs. By default a run that is interrupted starts over."""
    train: tuple[pathlib.Path, ...] = ()
    """Parquet files of images to train on. By default scikit-learn's digits, a third of them held out."""
    test: tuple[pathlib.Path, ...] = ()
    """Parquet files of images to report on."""
    image: str = "image"
    """The column of the images."""
    label: str = "label"
    """The column of the numbers of classes."""
    names: str = "label_name"
    """The column of the names of classes."""
    output: pathlib.Path = pathlib.Path("outputs/siglip")
    workers: int | None = None
    """Processes that train side by side, each on one core. By default one for each core; 1 where there is an accelerator."""
    tune: bool = False
    """Sweep the learning rate of each arm instead, over all seeds, on images that are not reported on; `tuned_vision.json` in the
    output folder."""
    grid: tuple[float, ...] = (0.0025, 0.005, 0.01, 0.02, 0.04)
    """The learning rates to sweep."""


def arms_of(options: Options, task: str) -> list[Any]:
    """The arms by their names."""
    from _vision import Arm

    deep = f"A^{options.rounds} B"
    if task == "pairs":
        arms = [
            Arm("plain"),
            Arm("image", "A^r B", "A B", options.rounds),
            Arm("text", "A B", "A^r B", options.rounds),
            Arm("both", "A^r B", "A^r B", options.rounds),
            Arm("stochastic", "A^r B", "A^r B", options.law_max, stochastic=True),
        ]
    else:
        arms = [
            Arm("plain"),
            Arm(deep, "A^r B", rounds=options.rounds),
            Arm(f"(A B)^{options.rounds}", "(A B)^r", rounds=options.rounds),
            Arm("stochastic", "A^r B", rounds=options.law_max, stochastic=True),
        ]
    known = {arm.name: arm for arm in arms}
    if unknown := [name for name in options.arms if name not in known]:
        raise SystemExit(f"--arms are some of {', '.join(map(repr, known))}; got {', '.join(map(repr, unknown))}")
    return [known[name] for name in dict.fromkeys(options.arms)]


def setting_of(options: Options, task: Literal["pairs", "classes"]) -> Any:
    """What the results depend on."""
    from _vision import Setting

    if bool(options.train) != bool(options.test):
        raise SystemExit("--train and --test are given together")
    given: dict[str, Any] = {f.name: getattr(options, f.name) for f in dataclasses.fields(Setting) if f.name != "task"}
    paths: dict[str, Any] = {name: tuple(str(p.resolve()) for p in given[name]) for name in ("train", "test")}
    return Setting(task=task, **{**given, **paths})


def jobs_of(options: Options, setting: Any, arms: list[Any], planned: Any) -> list[dict[str, Any]]:
    """All runs, those of one arm together."""
    from _vision import identity

    found = SWEEPS.rates(options, setting, [arm.name for arm in arms])
    name = lambda arm, seed, rate, steps: identity(arm, setting, seed, rate, steps, options.tune)
    return _workers.jobs_of(options, setting, arms, planned, found, name, prefetch=options.prefetch)


def work() -> None:
    """Trains what the parent says."""
    _workers.pin()
    from _vision import Arm, Setting, train

    def one(job: dict[str, Any], logs: list[Any]) -> dict[str, Any]:
        arm, setting = Arm(**job["arm"]), Setting(**_workers.settings(job["setting"]))
        path = lambda name: None if job[name] is None else pathlib.Path(job[name])
        same = {name: job[name] for name in ("every", "prefetch", "tuning")}
        files = {name: path(name) for name in ("metrics", "checkpoints")}
        return train(arm, setting, job["row"], job["seed"], job["rate"], logs=logs, **files, **same)

    _workers.work(one)


def compare(options: Options, task: Literal["pairs", "classes"]) -> None:
    """Plans, trains, reports."""
    # The parent only plans: the memory of an accelerator is for the worker.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import _report
    import _vision_report
    from _vision import plan

    begin = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    setting = setting_of(options, task)
    arms = arms_of(options, task)
    planned = plan(arms, setting)
    print(planned)
    jobs = jobs_of(options, setting, arms, planned)
    with _report.Live("images") as show:
        results = _workers.run_all(SCRIPT, options.output / "runs", jobs, show, options.workers)
    if options.tune:
        SWEEPS.tuned(options, setting, arms, results, _report.ends(setting.train) or ["scikit-learn's digits"])
    else:
        _vision_report.compared(options, setting, arms, planned, results, time.perf_counter() - begin)


def main() -> None:
    """The command."""
    if sys.argv[1:] == ["--worker"]:
        work()
        return
    compare(tyro.cli(Options, description=__doc__), "pairs")


if __name__ == "__main__":
    main()
