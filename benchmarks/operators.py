"""What do the operators cost beside the best hand-written JAX of the same computation?

    python benchmarks/operators.py            # about 40 minutes on two cores; the table of docs/results/operators.md
    python benchmarks/operators.py --quick    # under a minute

For each block and number of rounds, every form of `A^r` is timed in one process, in turns: a Python loop, a `lax.scan`
and a `lax.scan` of checkpointed blocks, each written by hand and by rinsx, and rinsx with a traced number of rounds.
Other load on the machine hits all forms of a turn, so what counts is the ratio of two forms in the same turn, and of
those the median over turns. Where a process happens to put programs and arrays in memory moves that median by some
percent, and no number of turns shows it. So all is done again in several fresh processes: reported are the median
over processes and its range. Compile time, temporary memory and lines of StableHLO stand beside them, and whether XLA makes
the same instructions of a form as of one by hand: then their ratio is 1 but for the order in which XLA schedules them.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import tyro
from jax import lax
from rich.console import Console
from rich.table import Table

import rinsx as rx


matplotlib.use("agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass
class Config:
    """Times rinsx's operators beside hand-written JAX."""

    rounds: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    """Numbers of rounds."""
    blocks: tuple[str, ...] = ("mlp-16x1", "mlp-64x32", "mlp-256x512", "attention-64x512", "attention-256x512")
    """Which blocks: a kind, the width, and the number of tokens."""
    processes: int = 5
    """In how many fresh processes all is measured."""
    turns: int = 30
    """How many times a process times each form, in turns with the others."""
    seconds: float = 5.0
    """The most time that the turns of one block and number of rounds may take in a process; at least 5 turns run."""
    compilations: int = 9
    """How many times each form is compiled at the fewest and the most rounds."""
    quick: bool = False
    """A short run of a small block, to see that all works."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("outputs/operators")
    """Where the table, the plot and the JSON of results go."""


def make_block(name: str) -> tuple[Any, Callable, jax.Array]:
    """The parameters, the block `(parameters, x) -> x` and the input of a benchmark block, such as `mlp-256x512`."""
    kind, _, size = name.partition("-")
    width, tokens = (int(n) for n in size.split("x"))
    keys = jr.split(jr.key(0), 5)
    matrix = lambda key, rows, columns: jr.normal(key, (rows, columns)) * 0.02
    if kind == "mlp":
        params = {"up": matrix(keys[0], width, 4 * width), "down": matrix(keys[1], 4 * width, width)}
        return params, mlp, jr.normal(keys[4], (tokens, width))
    if kind != "attention":
        raise ValueError(f"blocks are mlp-WIDTHxTOKENS or attention-WIDTHxTOKENS, got {name!r}")
    params = {
        "qkv": matrix(keys[0], width, 3 * width),
        "out": matrix(keys[1], width, width),
        "up": matrix(keys[2], width, 4 * width),
        "down": matrix(keys[3], 4 * width, width),
    }
    length = min(128, tokens)
    return params, transformer, jr.normal(keys[4], (tokens // length, length, width))


def mlp(params, x):
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


def transformer(params, x):
    batch, length, width = x.shape
    norm = lambda x: x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    heads = lambda x: x.reshape(batch, length, max(width // 64, 1), -1)
    q, k, v = map(heads, jnp.split(norm(x) @ params["qkv"], 3, -1))
    x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ params["out"]
    return mlp(params, norm(x)) - norm(x) + x


class Block(eqx.Module):
    """The same block as rinsx sees it."""

    params: Any
    fn: Callable = eqx.field(static=True)

    def __call__(self, x, *, key=None):
        return self.fn(self.params, x)


def forms(block: Callable, rounds: int, most: int) -> dict[str, Callable]:
    """`(parameters, x, rounds as an array) -> x` in every form, by hand and by rinsx; `most` is the larger tape's maximum."""

    def python_loop(params, x, _):
        for _ in range(rounds):
            x = block(params, x)
        return x

    def scan(params, x, _):
        return lax.scan(lambda x, _: (block(params, x), None), x, None, length=rounds)[0]

    def scan_remat(params, x, _):
        visit = jax.checkpoint(block, prevent_cse=False)
        return lax.scan(lambda x, _: (visit(params, x), None), x, None, length=rounds)[0]

    def ours(**options):
        return lambda params, x, _: rx.recur(Block(params, block), rx.Loop(rounds, **options))(x)

    def traced(most):
        return lambda params, x, r: rx.recur(Block(params, block), rx.Loop(r, max=most))(x)

    full, remat = rx.gradient.Full(), rx.gradient.Remat()
    return {
        "hand unrolled": python_loop,
        "hand rolled": scan,
        "hand remat": scan_remat,
        "rinsx unrolled": ours(unroll=True, gradient=full),
        "rinsx rolled": ours(unroll=False, gradient=full),
        "rinsx remat": ours(unroll=False, gradient=remat),
        "rinsx default": ours(),
        "rinsx traced": traced(rounds),
        "rinsx traced of many": traced(most),
    }


# What is compared: a form of rinsx with the form by hand that it should equal.
PAIRS = {
    "rinsx unrolled": "hand unrolled",
    "rinsx rolled": "hand rolled",
    "rinsx remat": "hand remat",
    "rinsx traced": "hand remat",
    "rinsx traced of many": "hand remat",
}
LONGEST_UNROLLED = 16


def compile_form(fn: Callable, args: tuple) -> tuple[Callable, dict[str, Any]]:
    """The compiled form, with what compiling it took."""
    start = time.perf_counter()
    lowered = jax.jit(fn).lower(*args)
    lines = len(lowered.as_text().splitlines())
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    temporary = 0 if memory is None else memory.temp_size_in_bytes
    facts = {"compile_s": seconds, "temporary_bytes": temporary, "stablehlo_lines": lines}
    return compiled, facts | {"instructions": instructions(compiled.as_text() or "")}


def instructions(text: str) -> str:
    """A hash of the instructions of a compiled program: their kinds, shapes and attributes, without their names and order."""
    named = r", (metadata|frontend_attributes|backend_config)=.*|/\*.*?\*/|%[\w.\-]+|, index=\d+"
    lines = []
    for line in text.splitlines():
        name, equals, rest = line.partition(" = ")
        if equals and "%" in name:
            # In what order a loop carries its arrays is a matter of names too.
            words = re.findall(r"[\w\-]+(?:\[[\d,]*\])?", re.sub(named, "", rest))
            lines.append(" ".join(sorted(words)))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def measure(name: str, rounds: int, config: Config) -> list[dict[str, Any]]:
    """One row for each form and direction, of one process: times in turns, and ratios to the forms by hand turn by turn."""
    params, block, x = make_block(name)
    args = (params, x, jnp.int32(rounds))
    rows, compiled = {}, {}
    for form, fn in forms(block, rounds, max(config.rounds)).items():
        if rounds > LONGEST_UNROLLED and form.endswith("unrolled"):
            continue
        for direction in ("forward", "gradient"):
            call = fn
            if direction == "gradient":
                loss = lambda params, x, r, fn=fn: jnp.sum(fn(params, x, r) ** 2)
                call = jax.grad(loss, argnums=(0, 1))
            compiled[form, direction], facts = compile_form(call, args)
            rows[form, direction] = {"block": name, "rounds": rounds, "form": form, "direction": direction, **facts}
    times: dict[Any, list[float]] = {key: [] for key in compiled}
    for fn in compiled.values():
        jax.block_until_ready(fn(*args))
    # Short programs are called several times a turn, so that the clock does not decide.
    repeats = {key: max(1, min(200, int(2e-3 / _once(fn, args)))) for key, fn in compiled.items()}
    start, turn = time.perf_counter(), 0
    order = list(compiled)
    shuffle = np.random.default_rng(0)
    while turn < config.turns and (turn < 5 or time.perf_counter() - start < config.seconds):
        shuffle.shuffle(order)
        for key in map(tuple, order):
            begin = time.perf_counter()
            jax.block_until_ready([compiled[key](*args) for _ in range(repeats[key])])
            times[key].append((time.perf_counter() - begin) / repeats[key])
        turn += 1
    for (form, direction), row in rows.items():
        mine = times[form, direction]
        row |= {"median_s": statistics.median(mine), "turns": turn}
        row["to"] = {
            other: statistics.median(a / b for a, b in zip(mine, times[other, way]))
            for other, way in times
            if way == direction and other.startswith("hand")
        }
    return list(rows.values())


def pool(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of several processes as one row for each form and direction: medians over processes, and ranges of ratios."""
    rows = []
    for same in zip(*runs):
        row = {key: same[0][key] for key in ("block", "rounds", "form", "direction", "stablehlo_lines", "instructions")}
        row |= {
            key: statistics.median(run[key] for run in same) for key in ("compile_s", "temporary_bytes", "median_s")
        }
        row["turns"] = [run["turns"] for run in same]
        row["to"] = {other: [run["to"][other] for run in same] for other in same[0]["to"]}
        rows.append(row)
    for row in rows:
        hand = {
            other["form"]: other
            for other in rows
            if other["direction"] == row["direction"] and other["form"].startswith("hand")
        }
        # All forms are measured by the same one, process by process.
        best = min(hand, key=lambda form: statistics.median(hand[form]["to"]["hand rolled"]))
        row |= over_processes("to_best_hand", row["to"][best]) | {"best_hand": best}
        row["instructions_of"] = [f for f, other in hand.items() if other["instructions"] == row["instructions"]]
        if row["form"] in PAIRS and PAIRS[row["form"]] in hand:
            row |= over_processes("to_same_form", row["to"][PAIRS[row["form"]]])
    for row in rows:
        del row["to"], row["instructions"]
    return rows


def over_processes(name: str, ratios: list[float]) -> dict[str, Any]:
    """The median over processes, and the range, which of five processes is a 94% interval for it."""
    return {name: statistics.median(ratios), f"{name}_range": [min(ratios), max(ratios)]}


def compiling(name: str, config: Config) -> list[dict[str, Any]]:
    """Seconds to lower and compile a gradient step at few and at many rounds, in turns: medians, and the ratio of the two."""
    params, block, x = make_block(name)
    few, many = min(r for r in config.rounds if r > 1), max(config.rounds)
    names = ("hand remat", "rinsx remat", "rinsx traced")
    times: dict[tuple[str, int], list[float]] = {(form, r): [] for form in names for r in (few, many)}
    for _ in range(config.compilations):
        for form, r in times:
            jax.clear_caches()
            fn = forms(block, r, many)[form]
            step = jax.grad(lambda params, x, r, fn=fn: jnp.sum(fn(params, x, r) ** 2), argnums=(0, 1))
            times[form, r].append(compile_form(step, (params, x, jnp.int32(r)))[1]["compile_s"])
    return [
        {
            "block": name,
            "form": form,
            "rounds": [few, many],
            "median_s": [statistics.median(times[form, r]) for r in (few, many)],
            **ratio("many_to_few", times[form, many], times[form, few]),
        }
        for form in names
    ]


def _once(fn, args) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return max(time.perf_counter() - begin, 1e-6)


def ratio(name: str, mine: list[float], other: list[float]) -> dict[str, Any]:
    """The median ratio over turns, with its 95% interval from the order statistics of a median."""
    ratios = sorted(a / b for a, b in zip(mine, other))
    n = len(ratios)
    half = 0.98 * n**0.5
    low, high = max(0, int(n / 2 - half)), min(n - 1, int(n / 2 + half))
    return {name: statistics.median(ratios), f"{name}_interval": [ratios[low], ratios[high]]}


def counting() -> dict[str, float]:
    """Seconds to count the FLOPs of a training step of a 1B-parameter `A^64 B`, from shapes alone."""
    width, depth = 2048, 10

    class Layer(eqx.Module):
        params: Any

        def __init__(self, key):
            del key
            shapes = {
                "qkv": (width, 3 * width),
                "out": (width, width),
                "up": (width, 4 * width),
                "down": (4 * width, width),
            }
            self.params = {name: jnp.zeros(shape) for name, shape in shapes.items()}

        def __call__(self, x, *, key=None):
            return transformer(self.params, x)

    stack = lambda seed: rx.nn.Stack.make(Layer, depth, key=jr.key(seed))
    model = eqx.filter_eval_shape(lambda: rx.compose("A^r B", {"A": stack(0), "B": stack(1)}, r=64))
    x = jax.ShapeDtypeStruct((8, 1024, width), jnp.float32)
    step = eqx.filter_grad(lambda model, x: jnp.mean(model(x) ** 2))
    start = time.perf_counter()
    cost = rx.flops.count(step, model, x)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "parameters": rx.flops.parameters(model).unique, "flops": int(cost.total)}


def table(rows: list[dict[str, Any]], direction: str) -> Table:
    out = Table(title=f"{direction}: time as a ratio, median over processes [range]")
    for column in (
        "block",
        "r",
        "form",
        "ms",
        "to same form by hand",
        "to best by hand",
        "best by hand",
        "instructions of",
        "compile s",
        "temp MiB",
        "lines",
    ):
        out.add_column(column, justify="left" if column in ("block", "form") else "right")
    show = lambda row, name: f"{row[name]:.3f} [{row[name + '_range'][0]:.3f}, {row[name + '_range'][1]:.3f}]"
    for row in rows:
        if row["direction"] == direction:
            out.add_row(
                row["block"],
                str(row["rounds"]),
                row["form"],
                f"{row['median_s'] * 1e3:.3f}",
                show(row, "to_same_form") if "to_same_form" in row else "",
                show(row, "to_best_hand"),
                row["best_hand"].removeprefix("hand "),
                ", ".join(form.removeprefix("hand ") for form in row["instructions_of"]),
                f"{row['compile_s']:.2f}",
                f"{row['temporary_bytes'] / 2**20:.1f}",
                str(row["stablehlo_lines"]),
            )
    return out


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The time of a gradient step of each form over that of the best form by hand."""
    names = list(dict.fromkeys(row["block"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names):
        for form in ("hand unrolled", "hand rolled", "hand remat", "rinsx default", "rinsx traced"):
            mine = [r for r in rows if (r["block"], r["form"], r["direction"]) == (name, form, "gradient")]
            style = {"linestyle": "-" if form.startswith("rinsx") else ":", "marker": "."}
            axis.plot([r["rounds"] for r in mine], [r["to_best_hand"] for r in mine], label=form, **style)
        axis.set(title=name, xlabel="rounds", xscale="log")
        axis.axhline(1, color="grey", linewidth=0.5)
    axes[0][0].set_ylabel("gradient step: time / best by hand")
    axes[0][-1].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def apart(fn: Callable, *args: Any) -> Any:
    """`fn(*args)` in a fresh process. This one leaves the accelerator to it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(fn, *args).result()


def machine() -> dict[str, Any]:
    """What was measured on."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(jax.devices()) if jax.default_backend() != "cpu" else _cores(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "equinox": eqx.__version__,
        "rinsx": rx.__version__,
    }


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(
            config, rounds=(2, 8), blocks=("mlp-64x32",), processes=1, turns=5, seconds=1, compilations=1
        )
    console = Console()
    rows: list[dict[str, Any]] = []
    compiled: list[dict[str, Any]] = []
    for name in config.blocks:
        for rounds in config.rounds:
            rows += pool([apart(measure, name, rounds, config) for _ in range(config.processes)])
            console.print(f"{name}, {rounds} rounds: measured")
        compiled += apart(compiling, name, config)
    counted, hardware = apart(counting), apart(machine)
    config.output.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "output"}
    results = {"config": settings, "hardware": hardware, "counting": counted, "compiling": compiled, "rows": rows}
    (config.output / "operators.json").write_text(json.dumps(_rounded(results)))
    plot(rows, config.output / "operators.png")
    wide = Console(width=200, record=True)
    for direction in ("forward", "gradient"):
        wide.print(table(rows, direction))
    for row in compiled:
        few, many = row["median_s"]
        low, high = row["many_to_few_interval"]
        wide.print(
            f"compiling {row['form']} of {row['block']}: {few:.3f} s at {row['rounds'][0]} rounds, {many:.3f} s at "
            f"{row['rounds'][1]}, ratio {row['many_to_few']:.3f} [{low:.3f}, {high:.3f}]"
        )
    wide.print(f"counting a training step of {counted['parameters'] / 1e9:.2f}B parameters: {counted['seconds']:.2f} s")
    (config.output / "operators.txt").write_text(wide.export_text())
    console.print(f"results in {config.output}")


def _rounded(value: Any) -> Any:
    """Floats to four digits, all that such measurements are good for."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
