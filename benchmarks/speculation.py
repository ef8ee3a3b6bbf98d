"""Does a model that drafts for itself decode faster, and by how many rounds should it draft?

    python benchmarks/speculation.py           # about 10 minutes on two cores; the table of docs/results/speculation.md
    python benchmarks/speculation.py --quick   # a minute, to see that all works

Trains one `A^r B` on the text of Python's standard library, at a depth that is drawn anew at every step, so that it is a model at
every depth. Then it continues held-out text at its greatest depth, in two ways in turns: token by token, and by
`rx.generate.speculate`, for several depths and lengths of drafts. Reported are the median over turns of the ratio of their times
in the same turn, the part of the drafts that stood, and whether greedy text is the same. Also what the depths are worth: the
loss at each, from `rx.generate.sweep`.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from _machine import machine
from rich.console import Console
from rich.table import Table

import rinsx as rx


@dataclasses.dataclass
class Config:
    """Times self-speculation beside decoding token by token, of a model that it trains first."""

    width: int = 128
    heads: int = 4
    layers: tuple[int, int] = (3, 1)
    """Of `A` and of `B`: a draft at one round saves what `A` costs at the others."""
    depth: int = 4
    """The greatest number of rounds; training draws from 1 to this, each as often."""
    tokens: int = 2_000_000
    """How many tokens it is trained on."""
    length: int = 128
    batch: int = 8
    learning_rate: float = 0.01
    drafts: tuple[int, ...] = (1, 2)
    """Numbers of rounds of drafts."""
    ahead: tuple[int, ...] = (2, 4, 8)
    """Numbers of tokens drafted at a time."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    prompts: int = 8
    """How many prompts of held-out text are continued, one after the other."""
    prompt: int = 64
    """The length of a prompt."""
    steps: int = 128
    """How many tokens are generated behind each."""
    turns: int = 7
    quick: bool = False
    """A short run, to see that all works."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("outputs/speculation")
    """Where the table and the JSON of results go."""


def trained(config: Config, console: Console) -> tuple[Any, rx.data.Windows, dict[str, float]]:
    """The model, held-out windows, and the loss at each depth in bits per byte."""
    tokens = rx.data.tokenize(rx.data.stdlib(), rx.data.Bytes())
    train, held_out = rx.data.split(tokens, "1/20", seed=0)
    shape = rx.models.DecoderConfig(
        257, config.width, sum(config.layers), config.heads, context=config.length, dtype="float32"
    )
    loop = rx.Loop(config.depth, max=config.depth)
    model = rx.models.DecoderLM(shape, "A^r B", split=config.layers, key=jr.key(0), r=loop)
    steps = -(-config.tokens // (config.batch * config.length))
    console.print(f"training {rx.flops.parameters(model).unique:,} parameters for {steps:,} steps")
    run = rx.train.fit(
        model,
        rx.models.DecoderLM.loss,
        rx.data.batches(rx.data.Windows(train, config.length), config.batch, seed=0),
        rx.train.muon(rx.train.cosine(config.learning_rate, warmup=0.05, floor=0.05)),
        steps=steps,
        key=jr.key(1),
        depth={"r": rx.depth.Uniform(1, config.depth)},
        steps_per_call=20,
        logs=[rx.train.Progress(steps)] if hasattr(rx.train, "Progress") else (),
    )
    windows = rx.data.Windows(held_out, config.length)
    batch = {name: jnp.asarray(x) for name, x in windows.take(np.arange(min(64, len(windows)))).items()}
    depths = range(1, 2 * config.depth + 1)
    losses = rx.generate.sweep(run.model, rx.models.DecoderLM.loss, batch, depths)
    return run.model, windows, {str(r): float(x / np.log(2)) for r, x in zip(depths, losses)}


def measure(model: Any, prompts: Any, config: Config, temperature: float, draft: int, ahead: int) -> dict[str, Any]:
    """Both ways over all prompts, in turns."""
    sampler = rx.generate.Sampler(temperature=temperature)
    each = [prompts[i : i + 1] for i in range(len(prompts))]
    options = {"steps": config.steps, "sampler": sampler, "rounds": {"r": config.depth}}
    ways = {
        "plain": lambda p, key: rx.generate.tokens(model, p, key=key, **options),
        "drafted": lambda p, key: rx.generate.speculate(model, p, key=key, draft={"r": draft}, ahead=ahead, **options),
    }
    found = {name: [way(p, jr.key(i)) for i, p in enumerate(each)] for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(config.turns):
        for name in sorted(ways, reverse=bool(turn % 2)):
            start = time.perf_counter()
            for i, p in enumerate(each):
                jax.block_until_ready(ways[name](p, jr.key(i)).tokens)
            times[name].append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in zip(times["plain"], times["drafted"]))
    drafted = sum(int(out.drafted.sum()) for out in found["drafted"])
    stood = sum(int(out.accepted.sum()) for out in found["drafted"])
    same = [bool((a.tokens == b.tokens).all()) for a, b in zip(found["plain"], found["drafted"])]
    number = len(each) * config.steps
    return {
        "temperature": temperature,
        "draft": draft,
        "ahead": ahead,
        "stood": stood / drafted,
        "tokens_per_pass": (number - len(each)) / sum(int(out.passes) for out in found["drafted"]),
        "speed_up": statistics.median(ratios),
        "speed_up_range": [ratios[0], ratios[-1]],
        "plain_tokens_per_s": number / statistics.median(times["plain"]),
        "drafted_tokens_per_s": number / statistics.median(times["drafted"]),
        "same_text": sum(same) if temperature == 0 else None,
    }


def table(rows: list[dict[str, Any]], config: Config) -> Table:
    out = Table(title=f"drafts against token by token at {config.depth} rounds, batch 1")
    for column in (
        "temperature",
        "draft rounds",
        "ahead",
        "stood",
        "tokens a pass",
        "tokens/s",
        "speed-up",
        "same text",
    ):
        out.add_column(column, justify="right")
    for row in rows:
        low, high = row["speed_up_range"]
        same = "" if row["same_text"] is None else f"{row['same_text']} of {config.prompts}"
        out.add_row(
            f"{row['temperature']:g}",
            str(row["draft"]),
            str(row["ahead"]),
            f"{row['stood']:.0%}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['drafted_tokens_per_s']:,.0f}",
            f"{row['speed_up']:.2f} [{low:.2f}, {high:.2f}]",
            same,
        )
    return out


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(
            config, width=32, tokens=60_000, drafts=(1,), ahead=(2,), prompts=2, steps=16, turns=2
        )
    console = Console(width=120)
    model, windows, losses = trained(config, console)
    chosen = np.linspace(0, len(windows) - 1, config.prompts).astype(int)
    prompts = jnp.asarray(windows.take(chosen)["tokens"][:, : config.prompt])
    rows = []
    for temperature in config.temperatures:
        for draft in config.drafts:
            for ahead in config.ahead:
                rows.append(measure(model, prompts, config, temperature, draft, ahead))
                jax.clear_caches()
    console.print(table(rows, config))
    console.print("bits per byte by rounds: " + ", ".join(f"{r}: {x:.3f}" for r, x in losses.items()))
    config.output.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "output"}
    results = {"config": settings, "machine": machine("jax", "rinsx"), "bits_per_byte": losses, "rows": rows}
    (config.output / "speculation.json").write_text(json.dumps(results, indent=1))
    console.print(f"results in {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
