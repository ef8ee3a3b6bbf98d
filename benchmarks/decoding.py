"""How fast does rinsx decode with recursion, beside PyTorch libraries with their caches, and beside what memory allows?

    python benchmarks/decoding.py --peer-python peers/bin/python   # all
    python benchmarks/decoding.py                                  # rinsx alone
    python benchmarks/decoding.py --points 1000/2048 4000/4096     # longer contexts
    python benchmarks/decoding.py --quick                          # to see that all works, in a minute

Greedy decoding in float32, with weights as they are drawn: of `A^3 B` by each policy of its cache, of `(A B)^2` and `A B`, by rinsx;
and of peers, whose Python (`--peer-python`) needs torch, x-transformers, transformers and numpy. Each runs in a process of its own,
on the same cores. They take turns in random order. Reported are medians over turns with quartiles; ratios are medians of ratios of
the same turn, since other load on the machine hits both. A library whose threads wait for each other by spinning loses more
by load, so use an idle machine.

A **point** is a prompt and a capacity, such as `96/1024`: `--steps` tokens are decoded behind a prompt of 96, with a cache that has
room for 1024 tokens. The time of the first token is that of the prompt. The time of a token is that of the others, each.

The **bound** is the time that memory takes to give what a token must read, at the bandwidth that products of a matrix of
`--bandwidth-mib` and a vector reach on the same cores. It is told twice: with the weights, keys and values that several visits
read counted once, as if all stayed in the processor's cache after that, and counted at each visit. Where all fits that cache,
decoding can be faster than either. The bandwidth of arrays of the size of the weights is reported too.
"""

import dataclasses
import json
import os
import platform
import random
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import tyro
from _decode_peers import DECODERS, Point
from _decoders import POLICIES
from _machine import machine
from _peers import Shape
from _process import Failed, Process
from rich.console import Console
from rich.table import Table


matplotlib.use("agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass
class Config:
    """Times greedy decoding of rinsx beside PyTorch libraries."""

    peer_python: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """The Python that has the peers. Without it only rinsx is run."""
    peers: tuple[str, ...] = tuple(DECODERS)
    """Which peers."""
    compile_peers: bool = True
    """Run each peer under `torch.compile` too."""
    compile_s: float = 240.0
    """A peer that takes longer than this to compile for a point is left out from there on."""
    policies: tuple[str, ...] = POLICIES
    """Which policies of rinsx's cache, for `A^r B`."""
    points: tuple[str, ...] = ("96/128", "96/1024", "960/1024")
    """Which prompts and capacities, as PROMPT/CAPACITY."""
    steps: int = 32
    """How many tokens are decoded; those and the prompt must fit the capacity."""
    batches: tuple[int, ...] = (1, 8)
    """How many sequences are decoded at once."""
    turns: int = 9
    """How many times each is timed, in turns with the others."""
    seconds: float = 0.5
    """How long a turn of one is, at least one run."""
    bandwidth_mib: int = 1024
    """The size of the array by which bandwidth is measured: many times the processor's cache."""
    shape: Annotated[Shape, tyro.conf.arg(name="")] = Shape(vocabulary=256)
    """The model; `length`, `batch` and `learning_rate` are not used."""
    quick: bool = False
    """A short run of a small model, to see that all works."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("outputs/decoding")
    """Where the tables, the plot and the JSON of results go."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A signature with the policy of its cache, by rinsx; or a peer."""

    signature: str
    name: str
    peer: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        if not self.peer:
            return f"rinsx, {self.name}"
        return f"{self.name}, compiled" if self.compiled else self.name

    def request(self) -> dict[str, Any]:
        if self.peer:
            return {"name": self.name, "compile": self.compiled}
        return {"signature": self.signature, "policy": self.name}


def contestants(config: Config) -> list[Contestant]:
    deep, twice = f"A^{config.shape.rounds} B", "(A B)^2"
    found = [Contestant(deep, policy) for policy in config.policies]
    found += [Contestant(signature, "per visit") for signature in (twice, "A B")]
    if config.peer_python is not None:
        for name in config.peers:
            signature = twice if name == "x-transformers looped" else deep
            found += [
                Contestant(signature, name, True, c) for c in ((False, True) if config.compile_peers else (False,))
            ]
    return found


def make_points(config: Config) -> list[Point]:
    points = []
    for text in config.points:
        prompt, _, capacity = text.partition("/")
        if not (prompt.isdecimal() and capacity.isdecimal()):
            raise SystemExit(f"--points are PROMPT/CAPACITY, such as 96/128, got {text!r}")
        for batch in config.batches:
            try:
                points.append(Point(int(prompt), int(capacity), batch, config.steps))
            except ValueError as error:
                raise SystemExit(f"--points, --batches, --steps: {error}") from None
    return points


class Race:
    """The workers that are left, and why others are not."""

    def __init__(self, config: Config, console: Console):
        self.config, self.console = config, console
        self.workers: dict[Contestant, Process] = {}
        self.built: dict[Contestant, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}

    def start(self, points: list[Point]) -> None:
        shape = dataclasses.replace(self.config.shape, length=max(point.capacity for point in points))
        for one in contestants(self.config):
            python = self.config.peer_python if one.peer else sys.executable
            assert python is not None
            name = "".join(c if c.isalnum() else "_" for c in f"{one.signature} {one.label}")
            script = "_decode_peers.py" if one.peer else "_decoders.py"
            # The threads that PyTorch is told of; JAX has those of its cores.
            self.workers[one] = Process(python, script, shape.threads, self.config.output / f"{name}.log")
            answer = self.ask(one, cmd="build", **one.request(), **dataclasses.asdict(shape))
            if answer is None:
                continue
            # At the capacity of the first point, whose compiled step serves both.
            capacity = points[0].capacity
            checking = {"prompt": capacity // 4, "steps": min(24, capacity // 2), "capacity": capacity}
            checked = self.ask(one, limit=self.config.compile_s if one.compiled else None, cmd="check", **checking)
            if checked is None:
                continue
            self.built[one] = {**answer, **checked}
            self.console.print(
                f"{one.signature}, {one.label}: decoding is within {checked['logit_difference']:.1e} of the forward pass"
                f" in logits of standard deviation {checked['logit_deviation']:.2f}, and its tokens are "
                f"{'the same' if checked['equal'] else 'others'}"
            )

    def ask(self, one: Contestant, limit: float | None = None, **request: Any) -> dict[str, Any] | None:
        """An answer; `None` from one that fails, which leaves the race."""
        try:
            return self.workers[one].ask(limit, **request)
        except Failed as error:
            self.console.print(f"[red]{one.signature}, {one.label}, {request['cmd']}: {error}")
            self.failed[f"{one.signature}, {one.label}"] = f"{request['cmd']}: {error}"
            self.workers.pop(one).close()
            return None

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def run(self, point: Point) -> list[dict[str, Any]]:
        """One row for each contestant that can run the point: its times in turns with the others."""
        fields = dataclasses.asdict(point)
        prepared: dict[Contestant, dict[str, Any]] = {}
        for one in list(self.workers):
            largest = self.built[one]["largest_batch"]
            if largest is None or point.batch <= largest:
                answer = self.ask(one, limit=self.config.compile_s if one.compiled else None, cmd="prepare", **fields)
                if answer is not None:
                    prepared[one] = answer
        turns: dict[Contestant, list[dict[str, Any]]] = {one: [] for one in prepared}
        order, shuffle = list(prepared), random.Random(0)
        for _ in range(self.config.turns):
            shuffle.shuffle(order)
            for one in list(order):
                answer = self.ask(one, cmd="run", seconds=self.config.seconds, **fields)
                if answer is None:
                    order.remove(one)
                    del turns[one]
                else:
                    turns[one].append(answer)
        if not turns:
            return []
        times = {
            name: {one: [statistics.median(turn[name]) for turn in mine] for one, mine in turns.items()}
            for name in ("first_s", "token_s")
        }
        base = next(iter(turns))
        rows = []
        for one, mine in turns.items():
            row = {"signature": one.signature, "label": one.label, "compiled": one.compiled, "point": fields}
            row |= {name: value for name, value in self.built[one].items() if name not in ("shape", "compile", "name")}
            for name, found in times.items():
                row[name] = statistics.median(found[one])
                quartiles = (
                    statistics.quantiles(found[one], n=4, method="inclusive")
                    if self.config.turns > 1
                    else found[one] * 3
                )
                row[f"{name}_quartiles"] = [quartiles[0], quartiles[2]]
                row[f"{name}_ratio"] = statistics.median(a / b for a, b in zip(found[one], found[base]))
            row["tokens_per_s"] = point.batch / row["token_s"]
            row["prefill_tokens_per_s"] = point.batch * point.prompt / row["first_s"]
            row |= {"cache": mine[0]["cache"], "cache_bytes": mine[0]["cache_bytes"]}
            row["prepare_s"] = prepared[one]["prepare_s"]
            rows.append(row)
        return rows


def measure(config: Config, points: list[Point], console: Console) -> tuple[list[dict[str, Any]], dict[str, str]]:
    race = Race(config, console)
    rows: list[dict[str, Any]] = []
    try:
        race.start(points)
        for point in points:
            found = race.run(point)
            rows += found
            rates = "; ".join(f"{row['signature']}, {row['label']} {row['tokens_per_s']:,.0f}" for row in found)
            console.print(f"{describe(dataclasses.asdict(point))}, tokens/s: {rates}")
    finally:
        race.close()
    return rows, race.failed


def add_bounds(config: Config, rows: list[dict[str, Any]], console: Console) -> dict[str, Any]:
    """Adds to each row the bytes that a step of one token must read and the share of its time that memory takes to give them."""
    weights = [row["weights_once"] for row in rows]
    sizes = [config.bandwidth_mib * 2**20, *sorted(set(weights))]
    worker = Process(sys.executable, "_decoders.py", config.shape.threads, config.output / "bandwidth.log")
    try:
        found = worker.ask(cmd="bandwidth", sizes=sizes)
    finally:
        worker.close()
    memory, *resident = found["bytes_per_s"]
    by_size = dict(zip(sizes[1:], resident))
    for row in rows:
        point = Point(**row["point"])
        # Keys and values of one slot, in float32, for all tokens that are there.
        slot = 2 * 4 * config.shape.width * point.filled * point.batch
        row["bound"] = {}
        for name, read, slots in (("once", "weights_once", "slots"), ("per visit", "weights_per_visit", "visits")):
            total = row[read] + slot * row[slots]
            row["bound"][name] = {"bytes": total, "share": total / memory / row["token_s"]}
        row["bytes_per_s"] = row["bound"]["per visit"]["bytes"] / row["token_s"]
        row["resident_bytes_per_s"] = by_size[row["weights_once"]]
    console.print(
        f"Memory gives {memory / 1e9:.1f} GB/s, by an array of {config.bandwidth_mib} MiB; "
        + ", ".join(f"{rate / 1e9:.1f} GB/s by one of {size / 2**20:.1f} MiB" for size, rate in by_size.items())
    )
    return found


COLUMNS = (
    "signature",
    "form",
    "ms a token [quartiles]",
    "tokens/s",
    "time / first row",
    "ms to first token",
    "prefill tokens/s",
    "cache MiB",
    "bound / time: once",
    "per visit",
    "drift of logits",
)


def describe(point: dict[str, Any]) -> str:
    return f"{point['prompt']} + {point['steps']} tokens of {point['capacity']}, batch {point['batch']}"


def cells(row: dict[str, Any]) -> list[str]:
    low, high = row["token_s_quartiles"]
    label = row["label"] if row["cache"] is None else f"{row['label']} ({row['cache']} cache)"
    return [
        row["signature"],
        label,
        f"{row['token_s'] * 1e3:.2f} [{low * 1e3:.2f}, {high * 1e3:.2f}]",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['token_s_ratio']:.2f}",
        f"{row['first_s'] * 1e3:.1f}",
        f"{row['prefill_tokens_per_s']:,.0f}",
        f"{row['cache_bytes'] / 2**20:.2f}",
        f"{row['bound']['once']['share']:.2f}",
        f"{row['bound']['per visit']['share']:.2f}",
        # Against the spread of the logits, without which a difference means nothing.
        f"{row['logit_difference'] / row['logit_deviation']:.0e}{'' if row['equal'] else ', other tokens'}",
    ]


def grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each point, by its description."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(describe(row["point"]), []).append(row)
    return found


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    out = Table(title=title)
    for column in COLUMNS:
        out.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    for row in rows:
        out.add_row(*cells(row))
    return out


def markdown(rows: list[dict[str, Any]]) -> str:
    text = []
    for title, mine in grouped(rows).items():
        lines = [COLUMNS, ["---", "---", *["---:"] * (len(COLUMNS) - 2)]]
        lines += [[f"`{first}`", *rest] for first, *rest in map(cells, mine)]
        text.append(f"{title}:\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    return "\n".join(text)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of a token against what is filled, a panel for each batch. Hollow marks: most of the cache is empty."""
    batches = sorted({row["point"]["batch"] for row in rows})
    labels = list(dict.fromkeys((row["signature"], row["label"]) for row in rows))
    colours = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    figure, axes = plt.subplots(
        1, len(batches), figsize=(4.8 * len(batches) + 2.6, 4.2), squeeze=False, layout="constrained"
    )
    for axis, batch in zip(axes[0], batches):
        for i, (signature, label) in enumerate(labels):
            mine = [r for r in rows if (r["signature"], r["label"], r["point"]["batch"]) == (signature, label, batch)]
            for empty in (False, True):
                of = sorted(
                    (Point(**r["point"]).filled, r["token_s"] * 1e3, [x * 1e3 for x in r["token_s_quartiles"]])
                    for r in mine
                    if (2 * Point(**r["point"]).filled < r["point"]["capacity"]) == empty
                )
                if not of:
                    continue
                x, y, quartiles = zip(*of)
                spread = [[b - q[0] for b, q in zip(y, quartiles)], [q[1] - b for b, q in zip(y, quartiles)]]
                axis.errorbar(
                    # Points of one context stand beside each other.
                    [a * 1.015 ** (i - len(labels) / 2) for a in x],
                    y,
                    spread,
                    marker="o" if label.startswith("rinsx") else "s",
                    linestyle="none" if empty else "-" if label.startswith("rinsx") else "--",
                    markerfacecolor="none" if empty else None,
                    color=colours[i % len(colours)],
                    label=None if empty and len(of) < len(mine) else f"{signature}, {label}",
                )
        axis.set(xscale="log", yscale="log", xlabel="tokens in the cache", title=f"batch {batch}")
        ticks = sorted({Point(**r["point"]).filled for r in rows})
        axis.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms a token")
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def quick(config: Config) -> Config:
    shape = dataclasses.replace(config.shape, width=64, heads=2, hidden=176)
    return dataclasses.replace(
        config,
        points=("24/48", "24/256"),
        steps=16,
        batches=(1, 2),
        turns=2,
        seconds=0.05,
        compile_peers=False,
        bandwidth_mib=256,
        shape=shape,
    )


def main(config: Config) -> None:
    if config.quick:
        config = quick(config)
    for name, known in (("peers", tuple(DECODERS)), ("policies", POLICIES)):
        if unknown := [one for one in getattr(config, name) if one not in known]:
            raise SystemExit(f"--{name} are {', '.join(map(repr, known))}, got {unknown[0]!r}")
    if config.turns < 1 or config.bandwidth_mib < 1:
        raise SystemExit(f"--turns and --bandwidth-mib are at least 1, got {config.turns} and {config.bandwidth_mib}")
    console = Console()
    points = make_points(config)
    config.output.mkdir(parents=True, exist_ok=True)
    if config.peer_python is None:
        console.print("no --peer-python: rinsx alone, without PyTorch peers")
    rows, failed = measure(config, points, console)
    if not rows:
        raise SystemExit(f"nothing could be run; what the workers printed is in {config.output}")
    bandwidth = add_bounds(config, rows, console)
    hardware = {
        "machine": platform.machine(),
        **machine(),
        "threads": config.shape.threads,
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "versions": {name: number for row in rows for name, number in row.pop("versions").items()},
    }
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items() if k != "output"}
    settings["peer_python"] = config.peer_python is not None
    results = {"config": settings, "hardware": hardware, "bandwidth": bandwidth, "failed": failed, "rows": rows}
    (config.output / "decoding.json").write_text(json.dumps(results, indent=1))
    (config.output / "decoding.md").write_text(markdown(rows))
    plot(rows, config.output / "decoding.png")
    wide = Console(width=190)
    for title, mine in grouped(rows).items():
        wide.print(table(title, mine))
        peers = [row for row in mine if not row["label"].startswith("rinsx")]
        if peers and mine[0]["label"].startswith("rinsx"):
            fastest = min(peers, key=lambda row: row["token_s_ratio"])
            wide.print(
                f"{mine[0]['label']} has {fastest['token_s_ratio']:.2f} times the tokens per second of {fastest['label']}."
            )
    wide.print(f"{hardware['processor']}, {config.shape.threads} cores; results in {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
