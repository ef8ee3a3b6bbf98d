"""Shows a comparison: progress while it runs; then a table, a plot, and a JSON of results."""

import json
import math
import pathlib
import sys
import time
from _statistics import Difference, differences, residual, said, smallest_visible
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from _arms import MEANINGS
from _machine import machine
from _text import documents, load
from rich.console import Console
from rich.live import Live as RichLive
from rich.table import Table


class Live:
    """Shows what every worker is at; plain lines where there is no terminal."""

    def __init__(self, unit: str = "tokens"):
        self.unit = unit
        self.console = Console()
        self.live = RichLive(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        self.begin = self.last = time.perf_counter()
        self.at_start: int | None = None

    def __enter__(self) -> Callable[..., None]:
        if self.live is not None:
            self.live.start()
        return self.show

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, done: int, total: int, workers: list[Any]) -> None:
        """Shows how many runs are done, and what the others are at."""
        now = time.perf_counter()
        if self.live is None and now - self.last < 15 and done < total:
            return
        self.last = now
        if self.at_start is None:
            self.at_start = done
        part = sum(worker.seen.get("fraction") or 0 for worker in workers if worker.job is not None)
        worked = done - self.at_start + part
        left = (total - done - part) * (now - self.begin) / worked if worked > 0 else math.nan
        table = Table(title=f"{done} of {total} runs, {minutes(now - self.begin)} passed, {minutes(left)} left")
        for column in ("arm", "seed", "done", "loss, nats", f"{self.unit}/s", "GFLOP/s"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for worker in workers:
            if worker.job is None:
                continue
            seen = worker.seen
            table.add_row(
                worker.job["arm"]["name"],
                str(worker.job["seed"]),
                f"{seen.get('fraction', 0):.0%}",
                _number(seen.get("loss"), ".3f"),
                _number(seen.get("tokens_per_second"), ",.0f"),
                _number((seen.get("flops_per_second") or math.nan) / 1e9, ".1f"),
            )
        if self.live is not None:
            self.live.update(table)
            return
        at = "; ".join(
            f"{worker.job['arm']['name']} seed {worker.job['seed']} {worker.seen.get('fraction', 0):.0%}"
            for worker in workers
            if worker.job is not None
        )
        print(f"{table.title}{': ' if at else ''}{at}", flush=True)


def compared(options: Any, setting: Any, arms: list[Any], planned: Any, results: list[Any], wall: float) -> None:
    """Prints and writes what the comparison found."""
    names = [arm.name for arm in arms]
    by_arm = {name: sorted((r for r in results if r["arm"] == name), key=lambda r: r["seed"]) for name in names}
    losses = np.array([[r["bits_per_byte"] for r in by_arm[name]] for name in names])
    nats = np.array([[r["windows"]["nats"] for r in by_arm[name]] for name in names])
    sizes = np.array(results[0]["windows"]["bytes"])
    # Not of the results: those from before documents counted are read alike.
    document = documents(load(setting).report, setting.windows)
    found = differences(losses, nats / math.log(2), sizes, 0, document)
    visible = smallest_visible(losses)
    mean = lambda name, of: float(np.mean([r[of] for r in by_arm[name]]))

    header = [
        "arm",
        "",
        "parameters",
        "MFLOPs/token",
        "tokens",
        "FLOPs",
        "off budget",
        "s",
        "tokens/s",
        "bits/byte",
        f"less {names[0]}",
        "",
    ]
    rows = []
    for name, difference in zip(names, found):
        first = by_arm[name][0]
        rows.append(
            [
                name,
                MEANINGS.get(name, ""),
                f"{first['parameters']:,}",
                f"{first['flops'] / first['tokens'] / 1e6:.3f}",
                f"{first['tokens']:,}",
                f"{first['flops']:.4g}",
                f"{first['flops'] / float(planned.budget) - 1:+.2%}",
                f"{mean(name, 'wall'):.0f}",
                speed(options, by_arm[name], "tokens"),
                f"{losses[names.index(name)].mean():.4f}",
                "" if name == names[0] else difference.show(".4f"),
                "" if name == names[0] else difference.verdict,
            ]
        )
    deep = sorted({int(d) for r in results for d in r["at_depth"] if d != "None"})
    depth_rows = []
    for arm in arms:
        at = by_arm[arm.name]
        cells = []
        for d in deep:
            seen = [r["at_depth"].get(str(d)) for r in at]
            trained = d == arm.rounds and not arm.stochastic
            cells.append("" if None in seen else f"{np.mean(seen):.4f}{'*' if trained else ''}")
        plain = f"{np.mean([r['bits_per_byte'] for r in at]):.4f}*" if arm.rounds is None else None
        depth_rows.append([arm.name, *([plain] + [""] * (len(deep) - 1) if plain else cells)])

    most = next(
        (f" The stochastic arm is judged at its most rounds, {arm.rounds}." for arm in arms if arm.stochastic), ""
    )
    lines = [
        f"{len(names)} arms, {losses.shape[1]} seeds, {len(sizes)} windows of held-out text; lower is better.{most}",
        *said(losses, ".4f", "bits per byte"),
        over_documents(document, found),
        scale(setting, results),
    ]
    console = Console(width=None if Console().is_terminal else 200)
    console.print(rich_table("At the trained depth", header, rows))
    console.print(
        rich_table(
            "Bits per byte by rounds at evaluation (* as trained)", ["arm", *(f"r={d}" for d in deep)], depth_rows
        )
    )
    if setting.elsewhere:
        other = np.array([[r["elsewhere"] for r in by_arm[name]] for name in names])
        apart = smallest_visible(other)
        elsewhere = [
            [name, f"{x.mean():.4f}", "" if i == 0 else Difference((x - other[0]).mean(), apart, math.nan).show(".4f")]
            for i, (name, x) in enumerate(zip(names, other))
        ]
        console.print(rich_table("Text from elsewhere", ["arm", "bits/byte", f"less {names[0]}"], elsewhere))
    else:
        elsewhere = []
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"wall time {minutes(wall)}; written to {options.output}", highlight=False)

    record = {
        **record_of(setting, planned, results, wall),
        "deviation": residual(losses)[0],
        "smallest_visible": visible,
        "documents": len(np.unique(document)),
        "differences": {
            name: {"mean": d.mean, "half": d.half, "windows": d.windows, "verdict": d.verdict}
            for name, d in zip(names, found)
        },
    }
    write(options.output / "results.json", record)
    parts = [markdown(header, rows), markdown(["arm", *(f"r={d}" for d in deep)], depth_rows)]
    if elsewhere:
        parts.append(markdown(["arm", "elsewhere, bits/byte", f"less {names[0]}"], elsewhere))
    (options.output / "results.md").write_text("\n\n".join([*parts, "\n".join(lines)]) + "\n", "utf-8")
    seen = _number(visible, ".4f")
    plot(options.output / "loss.png", names, by_arm, seen, ylabel="held-out bits per byte", xscale="log")


def over_documents(document: np.ndarray, found: list[Difference]) -> str:
    """In one line, how far differences depend on the text that was evaluated on."""
    number = len(np.unique(document))
    if number < 2:
        return "All windows are of one document: how far a difference depends on the text is not known."
    return (
        f"The standard error of a difference over the {number} documents that the windows are of, apart from that, is up to "
        f"{max(d.windows for d in found):.4f}."
    )


def speed(options: Any, runs: list[dict[str, Any]], unit: str) -> str:
    """How much of a unit the runs of an arm trained on in a second of the steps that were timed; empty where none was."""
    # Results from before steps were counted: all of them, unless the run may have gone on from a checkpoint.
    untold = 0.0 if options.save_every else 1.0
    parts = [r["timed"] / r["steps"] if "timed" in r else untold for r in runs]
    seconds = sum(r["seconds"] for r, part in zip(runs, parts) if part)
    return f"{sum(part * r[unit] for r, part in zip(runs, parts)) / seconds:,.0f}" if seconds > 0 else ""


def write(path: pathlib.Path, record: Any) -> None:
    """Writes JSON; a number that is not known, such as a deviation of one seed, is `null`."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: known(x) for name, x in value.items()}
        if isinstance(value, list | tuple):
            return [known(x) for x in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    path.write_text(json.dumps(known(record), indent=1, allow_nan=False), "utf-8")


def record_of(setting: Any, planned: Any, results: list[Any], wall: float) -> dict[str, Any]:
    """What was run, on what, and what each run gave."""
    return {
        "command": "python " + " ".join(ends((arg,))[0] if "/" in arg else arg for arg in sys.argv),
        "machine": hardware(),
        "setting": {
            **setting.__dict__,
            "cache": None,
            "corpus": ends(setting.corpus),
            "elsewhere": ends(setting.elsewhere),
        },
        "plan": {
            row.name: {"steps": row.steps, "tokens": row.tokens, "total": float(row.total)} for row in planned.rows
        },
        "budget": float(planned.budget),
        "runs": [{k: v for k, v in r.items() if k != "windows"} for r in results],
        "wall": wall,
    }


PAPER = (
    "The paper's effect is of 300M parameters and more, trained far longer: a run of this size shows the method of the "
    "comparison, and neither confirms nor refutes the claim."
)


def scale(setting: Any, results: list[Any], claim: str = PAPER) -> str:
    """In one line, what the size of the run lets it say."""
    baseline = results[0]
    ratio = baseline["tokens"] / baseline["parameters"]
    size, tokens = baseline["parameters"] / 1e6, baseline["tokens"] / 1e6
    return (
        f"What it can show: {size:.2g}M parameters, {tokens:.3g}M tokens for the baseline ({ratio:.0f} a parameter, "
        f"{baseline['epochs']:.2g} epochs). {claim}"
    )


def plot(
    path: Any,
    names: list[str],
    by_arm: dict[str, list[Any]],
    visible: str,
    *,
    ylabel: str,
    xscale: str = "linear",
    factor: float = 1,
) -> None:
    """What was evaluated on the way, times `factor`, against training FLOPs, one line an arm: the mean over seeds.

    `visible` is the smallest visible difference, or empty where there is none.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name in names:
        curves = [np.array(r["curve"]) for r in by_arm[name]]
        step = curves[0][:, 0]
        flops = step / step[-1] * by_arm[name][0]["flops"]
        label = f"{name}  {MEANINGS.get(name, '')}"
        mean = factor * np.mean([c[:, 1] for c in curves], axis=0)
        axes.plot(flops, mean, marker="o", markersize=3, linewidth=1.2, label=label)
    axes.set(xlabel="training FLOPs (contractions, forward and backward)", ylabel=ylabel, xscale=xscale)
    title = "equal training FLOPs" + (f"; smallest visible difference {visible}" if visible else "")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def hardware() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    told = machine("rinsx", "jax", "equinox", "optax", "grain", "numpy")
    return {**told, "device": f"{len(devices)} x {devices[0].device_kind}"}


def ends(paths: tuple[str, ...]) -> list[str]:
    # Only the ends of paths: where a machine keeps its data is no part of a result.
    return ["/".join(path.replace("\\", "/").split("/")[-2:]) for path in paths]


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def minutes(seconds: float) -> str:
    return "?" if math.isnan(seconds) else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def rich_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 1 or name == "" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(header: list[str], rows: list[list[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(header), line(["---"] * len(header)), *(line(row) for row in rows)])
