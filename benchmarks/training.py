"""How fast does rinsx train a language model with recursion, beside JAX by hand and two PyTorch libraries?

    python benchmarks/training.py --peer-python peers/bin/python   # the table of docs/results/training.md
    python benchmarks/training.py                                  # rinsx and JAX by hand alone
    python benchmarks/training.py --quick                          # to see that all works, in a minute

Everything runs in a process of its own, on the same cores: `A^3 B` and `A B` by rinsx in its default form and with all
stored, the same by hand in JAX, and the peers, whose Python (`--peer-python`) needs torch, x-transformers, transformers and
numpy. They take turns in random order. A step is the forward and backward pass and the update of AdamW, on the same tokens, in
float32. Reported are medians over turns with quartiles; ratios are medians of ratios of the same turn, since other load on the
machine hits both. With more threads than one that is not enough: a library whose threads wait for each other by spinning
loses more by load, so use an idle machine.

Memory is the peak of resident memory above what the process held once all was imported and a tiny model had made a step, twice:
once it is built, in the timed steps; and while it is built and makes its first steps, with compilers that run in processes of their
own, and nothing compiled kept from an earlier run. "MiB in all" is the peak of the worker's own process, with all that is imported.
"""

import dataclasses
import json
import os
import platform
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro
from _machine import machine
from _peers import PEERS, Shape
from _process import Failed, Process
from _trainers import FORMS, STEPS_PER_CALL
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass
class Config:
    """Times training steps of rinsx beside hand-written JAX and PyTorch libraries."""

    peer_python: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """The Python that has the peers. Without it only rinsx and JAX by hand are run."""
    peers: tuple[str, ...] = ("x-transformers", "hrm_text", "llama")
    """Which peers; `python benchmarks/_peers.py --list` names all."""
    compile_peers: bool = True
    """Run each peer under `torch.compile` too."""
    turns: int = 15
    """How many times each is timed, in turns with the others."""
    steps: int = 10
    """Steps a turn, a multiple of 5."""
    shape: Annotated[Shape, tyro.conf.arg(name="")] = Shape()
    """What is trained."""
    quick: bool = False
    """A short run of a small model, to see that all works."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("outputs/training")
    """Where the tables and the JSON of results go."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A form, peer or compiled peer of one signature."""

    signature: str
    name: str
    shape: Shape
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, compiled" if self.compiled else self.name

    @property
    def peer(self) -> bool:
        return self.name in PEERS


def contestants(config: Config) -> list[Contestant]:
    deep = config.shape
    shallow = dataclasses.replace(deep, rounds=1)
    named = {f"A^{deep.rounds} B" if deep.rounds > 1 else "A B": deep}
    if deep.rounds > 1:
        named["A B"] = shallow
    found = [Contestant(signature, name, shape) for signature, shape in named.items() for name in FORMS]
    if config.peer_python is not None:
        signature = next(iter(named))
        for name in config.peers:
            found += [
                Contestant(signature, name, deep, c) for c in ((False, True) if config.compile_peers else (False,))
            ]
    return found


def measure(config: Config, console: Console) -> list[dict[str, Any]]:
    """One row for each contestant: what it is, and its times in turns with the others."""
    with tempfile.TemporaryDirectory() as caches:
        return _measure(config, console, caches)


def _measure(config: Config, console: Console, caches: str) -> list[dict[str, Any]]:
    workers: list[tuple[Contestant, Process]] = []
    rows: dict[Contestant, dict[str, Any]] = {}
    try:
        for one in contestants(config):
            python = config.peer_python if one.peer else sys.executable
            assert python is not None
            log = config.output / f"{one.signature} {one.label}.log".replace(" ", "_").replace(",", "")
            script = "_peers.py" if one.peer else "_trainers.py"
            # Each compiles for itself, from nothing.
            fresh = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/{len(workers)}", "JAX_ENABLE_COMPILATION_CACHE": "false"}
            worker = Process(python, script, config.shape.threads, log, fresh)
            workers.append((one, worker))
            # The threads that PyTorch is told of; JAX has those of its cores.
            built = {"compile": one.compiled} if one.peer else {}
            try:
                with worker.all_memory() as seen:
                    rows[one] = worker.ask(cmd="build", name=one.name, **built, **dataclasses.asdict(one.shape))
                    first = worker.ask(cmd="run", steps=STEPS_PER_CALL)["peak_rss"]
                # Sampled, so a short peak of the worker itself may be missed.
                rows[one] |= {"built_rss": first, "all_rss": max([first, *seen])}
                worker.restart_peak()
            except Failed as error:
                console.print(f"[red]{one.signature}, {one.label}: {error}")
                rows.pop(one, None)
                workers.pop()
                worker.close()
            else:
                console.print(f"{one.signature}, {one.label}: built in {rows[one]['build_s']:.1f} s")
        times: dict[Contestant, list[float]] = {one: [] for one in rows}
        processor: dict[Contestant, list[float | None]] = {one: [] for one in rows}
        shuffle = random.Random(0)
        for _ in range(config.turns):
            shuffle.shuffle(workers)
            for one, worker in workers:
                before = worker.cpu()
                answer = worker.ask(cmd="run", steps=config.steps)
                after = worker.cpu()
                processor[one].append(None if before is None or after is None else (after - before) / config.steps)
                times[one].append(sum(answer["seconds"]) / config.steps)
                rows[one] |= {name: answer[name] for name in ("loss", "peak_rss")}
    finally:
        for _, worker in workers:
            worker.close()
    for one, row in rows.items():
        base = next(other for other in rows if other.signature == one.signature)
        quartiles = statistics.quantiles(times[one], n=4) if config.turns > 1 else [times[one][0]] * 3
        row |= {
            "signature": one.signature,
            "label": one.label,
            "step_s": statistics.median(times[one]),
            "step_s_quartiles": [quartiles[0], quartiles[2]],
            "tokens_per_s": row["tokens_per_step"] / statistics.median(times[one]),
            "ratio": statistics.median(a / b for a, b in zip(times[one], times[base])),
            "cpu_s": None if None in processor[one] else statistics.median(filter(None, processor[one])),
            "memory": row["peak_rss"] - row["import_rss"],
            "memory_building": row["all_rss"] - row["import_rss"],
        }
    return list(rows.values())


def extras(config: Config, rows: list[dict[str, Any]], console: Console) -> dict[str, Any]:
    """What the numbers rest on: equal losses, FLOPs, the time to make a batch, and utilisation on a GPU."""
    worker = Process(sys.executable, "_trainers.py", config.shape.threads, config.output / "extras.log")
    found: dict[str, Any] = {"losses": {}}
    try:
        shapes = {one.signature: one.shape for one in contestants(config)}
        for signature, shape in shapes.items():
            answer = worker.ask(cmd="check", **dataclasses.asdict(shape))
            found["losses"][signature] = answer["losses"]
            mine, *others = (losses[:2] for losses in answer["losses"].values())
            difference = max(abs(a - b) for other in others for a, b in zip(mine, other))
            if difference > 1e-4:
                raise SystemExit(
                    f"{signature}: from the same weights the forms differ by {difference} nats after a step"
                )
            console.print(
                f"{signature}: all forms have the same loss, before a step and after, to {difference:.1e} nats"
            )
            for row in rows:
                if row["signature"] == signature:
                    row["flops_per_s"] = answer["flops"] / row["step_s"]
        found["input_s"] = statistics.median(
            worker.ask(cmd="input", batches=20 * STEPS_PER_CALL, **dataclasses.asdict(next(iter(shapes.values()))))[
                "seconds"
            ]
        )
        try:
            found["utilisation"] = worker.ask(cmd="utilisation", preset="rins-300m", batch=8, calls=5)
        except Failed as error:
            found["utilisation"] = None
            console.print(str(error))
    finally:
        worker.close()
    return found


COLUMNS = (
    "signature",
    "form",
    "ms a step [quartiles]",
    "tokens/s",
    "time / rinsx",
    "CPU ms a step",
    "GFLOP/s",
    "peak MiB above import",
    "while built",
    "MiB in all",
)


def cells(row: dict[str, Any]) -> list[str]:
    low, high = row["step_s_quartiles"]
    return [
        row["signature"],
        row["label"],
        f"{row['step_s'] * 1e3:.1f} [{low * 1e3:.1f}, {high * 1e3:.1f}]",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['ratio']:.2f}",
        "" if row["cpu_s"] is None else f"{row['cpu_s'] * 1e3:.0f}",
        f"{row['flops_per_s'] / 1e9:.0f}",
        f"{row['memory'] / 2**20:.0f}",
        f"{row['memory_building'] / 2**20:.0f}",
        f"{max(row['built_rss'], row['peak_rss']) / 2**20:.0f}",
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title="Training steps, medians over turns")
    for column in COLUMNS:
        out.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    for row in rows:
        out.add_row(*cells(row))
    return out


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [COLUMNS, ["---", "---", *["---:"] * (len(COLUMNS) - 2)]]
    lines += [[f"`{first}`", *rest] for first, *rest in map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(
            config,
            turns=2,
            steps=STEPS_PER_CALL,
            shape=dataclasses.replace(config.shape, width=64, heads=2, hidden=176),
        )
    if config.steps % STEPS_PER_CALL or config.steps < 1 or config.turns < 1:
        raise SystemExit(
            f"--turns is at least 1 and --steps a positive multiple of {STEPS_PER_CALL}, got {config.turns} and {config.steps}"
        )
    console = Console()
    config.output.mkdir(parents=True, exist_ok=True)
    if config.peer_python is None:
        console.print("no --peer-python: rinsx and JAX by hand alone, without PyTorch peers")
    rows = measure(config, console)
    found = extras(config, rows, console)
    hardware = {
        "machine": platform.machine(),
        **machine(),
        "threads": config.shape.threads,
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "versions": {name: number for row in rows for name, number in row["versions"].items()},
    }
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items() if k != "output"}
    settings["peer_python"] = config.peer_python is not None
    results = {"config": settings, "hardware": hardware, **found, "rows": rows}
    (config.output / "training.json").write_text(json.dumps(results, indent=1))
    (config.output / "training.md").write_text(markdown(rows))
    wide = Console(width=150)
    wide.print(table(rows))
    first = rows[0]
    wide.print(
        f"{hardware['processor']}, {config.shape.threads} cores. A batch of real text takes {found['input_s'] * 1e3:.2f} ms to make, "
        f"{found['input_s'] / first['step_s']:.2%} of a step of {first['label']}."
    )
    rates = {row["signature"]: row["flops_per_s"] for row in rows if row["label"] == first["label"]}
    if len(rates) > 1:
        deep, shallow = rates.values()
        wide.print(f"For each FLOP, {first['signature']} runs at {deep / shallow:.2f} of the speed of A B.")
    console.print(f"results in {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
