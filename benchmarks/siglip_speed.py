"""How fast does rinsx train a SigLIP, beside JAX by hand and transformers on PyTorch?

    python benchmarks/siglip_speed.py --torch peers/bin/python    # the table of docs/results/siglip_speed.md
    python benchmarks/siglip_speed.py                             # rinsx and JAX by hand alone
    python benchmarks/siglip_speed.py --preset B/16 --batch 256 --dtype bfloat16   # on a GPU, with its utilisation
    python benchmarks/siglip_speed.py --quick                     # to see that all works, in a minute

All train the same model from the same weights on the same batch: forward pass, backward pass, AdamW. That they do is checked by their
first losses and gradients. `A B` is rinsx in its default form and with all stored and unrolled; by hand in JAX it is written with
layers unrolled and scanned; transformers' `SiglipModel` runs eagerly and under `torch.compile`, in float32 on a CPU only, in
processes of their own whose Python (`--torch`) needs torch, transformers, safetensors and numpy. `A^2 B` has the same weights and
more work. They take turns in random order, on the same cores. Ratios are medians of ratios of the same turn, since other load on
the machine hits both, and ratios of the best turns. FLOP/s are of the contractions of a step that stores everything, so what is
computed twice counts for nothing.
"""

import contextlib
import dataclasses
import functools as ft
import gc
import json
import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import tyro
from _machine import machine
from _process import Failed, Process
from _siglip_peers import make_batch
from _siglip_steps import ADAMW, build, by_hand, by_rinsx, Contestant, flops, weights_of
from rich.console import Console
from rich.table import Table

import rinsx as rx


@dataclasses.dataclass
class Config:
    """Times training steps of a SigLIP by rinsx beside hand-written JAX and transformers on PyTorch."""

    torch: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """The Python that has PyTorch and transformers. Without it only rinsx and JAX by hand are run."""
    preset: Literal["small", "S/16", "B/16", "So400m/14"] = "small"
    """The shape: `small` is 6 + 6 layers of width 192, images of 64 x 64 in patches of 8, texts of 16 tokens."""
    batch: int = 32
    """Pairs of a step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the layers compute in."""
    turns: int = 8
    """How many times each is timed, in turns with the others."""
    steps: int = 2
    """Steps a turn, and calls of the embeddings a turn."""
    compiled: bool = True
    """Run transformers under `torch.compile` too."""
    recursive: bool = True
    """Run `A^2 B` too."""
    threads: int = 2
    """On how many cores everything runs."""
    quick: bool = False
    """Two turns of a tiny model, without `torch.compile`, to see that all works."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("outputs/siglip_speed")
    """Where the table and the JSON of results go."""


def shape_of(config: Config) -> rx.models.SigLIPConfig:
    if config.preset == "small":
        size: dict[str, Any] = {"width": 192, "layers": 6, "heads": 3}
        if config.quick:
            size = {"width": 32, "layers": 2, "heads": 2}
        image = rx.models.ViTConfig(64, patch=8, **size, dtype=config.dtype)
        return rx.models.SigLIPConfig(image, rx.models.TextConfig(1000, context=16, **size, dtype=config.dtype))
    preset = rx.models.siglip_presets[config.preset]
    cast = lambda tower: dataclasses.replace(tower, dtype=config.dtype)
    return rx.models.SigLIPConfig(cast(preset.image), cast(preset.text))


def batch_of(shape: rx.models.SigLIPConfig, batch: int) -> dict[str, Any]:
    """The arguments of `make_batch`."""
    return {
        "size": shape.image.size[0],  # pyright: ignore[reportIndexIssue]
        "context": shape.text.context,
        "vocabulary": shape.text.vocab_size,
        "batch": batch,
    }


def in_jax(shape: rx.models.SigLIPConfig, batch: dict[str, Any], limit: int, recursive: bool) -> dict[str, Any]:
    """What makes each contestant in JAX, the first of them what others are compared with."""
    # One at a time: a model is made, given away, and only then the next one is.
    model = lambda *args, **kwargs: eqx.filter_jit(build)(shape, *args, **kwargs)
    makers = {
        "rinsx": lambda: by_rinsx(model(), batch, limit),
        "rinsx, stored": lambda: by_rinsx(model(stored=True), batch, limit),
        "JAX by hand, unrolled": lambda: by_hand(weights_of(model(), False), batch, shape),
        "JAX by hand, scanned": lambda: by_hand(weights_of(model(), True), batch, shape),
    }
    more = {"rinsx, A^2 B": lambda: by_rinsx(model("A^r B"), batch, limit)} if recursive else {}
    return makers | more


def in_torch(config: Config, shape: Any, stack: contextlib.ExitStack, console: Console) -> dict[str, Process]:
    """A process for each contestant on PyTorch, built; none where there is no PyTorch for this."""
    if config.torch is None:
        console.print("no --torch: rinsx and JAX by hand alone, without transformers on PyTorch")
        return {}
    processes = {}
    # Before JAX has started its threads, which a fork does not survive.
    for name in ("transformers", "transformers, compiled")[: 1 + config.compiled]:
        log = config.output / f"{name}.log".replace(", ", "_")
        processes[name] = Process(config.torch, "_siglip_peers.py", config.threads, log)
        stack.callback(processes[name].close)
    backend = jax.default_backend()
    if config.dtype != "float32" or backend != "cpu":
        console.print(f"transformers takes part in float32 on a CPU: left out of {config.dtype} on {backend}")
        return {}
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    rx.pretrained.save(eqx.filter_jit(build)(shape), folder)
    given = {"threads": config.threads, "batch": batch_of(shape, config.batch), "adamw": ADAMW}
    for name, process in list(processes.items()):
        try:
            process.ask(cmd="build", folder=folder, compiled="compiled" in name, **given)
        except Failed as error:
            console.print(f"[red]{name}: {error}")
            del processes[name]
    return processes


def by_process(process: Process) -> Contestant:
    def check(count):
        answer = process.ask(cmd="check", steps=count)
        return answer["losses"], answer["norm"]

    return Contestant(check, lambda what, calls: process.ask(cmd="run", what=what, calls=calls)["seconds"])


def same(firsts: dict[str, tuple[list[float], float]], tolerance: float) -> float:
    """How far contestants are apart, relatively, in their first losses and gradients; too far is the end."""
    mine, *others = (jnp.asarray([*losses, norm]) for losses, norm in firsts.values())
    apart = max(float(jnp.max(jnp.abs(other / mine - 1))) for other in others)
    if not apart <= tolerance:
        raise SystemExit(f"from the same weights contestants differ by {apart:.1e}: {firsts}")
    return apart


def measure(config: Config, console: Console) -> dict[str, Any]:
    shape = shape_of(config)
    limit = max(config.steps, 2)
    with contextlib.ExitStack() as stack:
        processes = in_torch(config, shape, stack, console)
        images, tokens = make_batch(**batch_of(shape, config.batch))
        batch = {"images": jnp.asarray(images), "tokens": jnp.asarray(tokens)}
        makers = in_jax(shape, batch, limit, config.recursive)
        makers |= {name: ft.partial(by_process, process) for name, process in processes.items()}
        contestants, firsts = {}, {}
        for name, make in makers.items():
            try:
                contestant = make()
                # Compiles all there is.
                found = contestant.check(2)
                contestant.run("embed", 1)
                contestant.run("step", config.steps)
            except Failed as error:
                console.print(f"[red]{name}: {error}")
                continue
            contestants[name] = contestant
            if not name.endswith("A^2 B"):
                firsts[name] = found
            console.print(f"{name}: first losses {found[0][0]:.6f}, {found[0][1]:.6f}, gradient {found[1]:.5f}")
        apart = same(firsts, 1e-3 if config.dtype == "float32" else 5e-2)
        console.print(f"first losses and gradients are the same to {apart:.1e}")

        times = {what: {name: [] for name in contestants} for what in ("step", "embed")}
        order, shuffle = list(contestants), random.Random(0)
        gc.collect()
        # The first turn warms up.
        for turn in range(config.turns + 1):
            for what, found in times.items():
                shuffle.shuffle(order)
                for name in order:
                    seconds = contestants[name].run(what, config.steps) / config.steps
                    if turn:
                        found[name].append(seconds)
        versions = next(iter(processes.values())).ask(cmd="versions") if processes else {}
    structs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    counted = {s: flops(eqx.filter_eval_shape(build, shape, s, stored=True), structs) for s in ("A B", "A^r B")}
    peak = rx.train.peak_flops()
    rows = [
        row(name, config.batch, times, counted["A^r B" if name.endswith("A^2 B") else "A B"], peak)
        for name in contestants
    ]
    return {"rows": rows, "flops": counted, "peak": peak, "apart": apart, "versions": versions}


def row(name: str, batch: int, times: dict[str, dict[str, list[float]]], counted: int, peak: float | None):
    out: dict[str, Any] = {"name": name, "flops": counted, "utilisation": None}
    for what, found in times.items():
        mine, base = found[name], next(iter(found.values()))
        quartiles = statistics.quantiles(mine, n=4, method="inclusive") if len(mine) > 1 else mine * 3
        out[what] = {
            "seconds": mine,
            "median": statistics.median(mine),
            "quartiles": [quartiles[0], quartiles[2]],
            "images_per_s": batch / statistics.median(mine),
            "ratio": statistics.median(b / a for a, b in zip(mine, base)),
            "ratio_of_best": min(base) / min(mine),
        }
    out["flops_per_s"] = counted / out["step"]["median"]
    if peak is not None:
        out["utilisation"] = out["flops_per_s"] / peak
    return out


COLUMNS = (
    "form",
    "ms a step [quartiles]",
    "images/s",
    "of rinsx's (best)",
    "GFLOP a step",
    "GFLOP/s",
    "utilisation",
    "embed images/s",
    "of rinsx's (best)",
)


def cells(row: dict[str, Any]) -> list[str]:
    step, embed = row["step"], row["embed"]
    low, high = step["quartiles"]
    return [
        row["name"],
        f"{step['median'] * 1e3:.1f} [{low * 1e3:.1f}, {high * 1e3:.1f}]",
        f"{step['images_per_s']:,.1f}",
        f"{step['ratio']:.2f} ({step['ratio_of_best']:.2f})",
        f"{row['flops'] / 1e9:.1f}",
        f"{row['flops_per_s'] / 1e9:,.0f}",
        "unknown" if row["utilisation"] is None else f"{row['utilisation']:.1%}",
        f"{embed['images_per_s']:,.1f}",
        f"{embed['ratio']:.2f} ({embed['ratio_of_best']:.2f})",
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title="A SigLIP's training steps and embeddings, medians over turns")
    for i, column in enumerate(COLUMNS):
        out.add_column(column, justify="right" if i else "left")
    for row in rows:
        out.add_row(*cells(row))
    return out


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(config: Config) -> None:
    if min(config.turns, config.steps, config.batch, config.threads) < 1:
        raise SystemExit(
            "--turns, --steps, --batch and --threads are at least 1, got "
            f"{config.turns}, {config.steps}, {config.batch} and {config.threads}"
        )
    if config.quick:
        config = dataclasses.replace(config, turns=2, batch=min(config.batch, 8), compiled=False)
    if hasattr(os, "sched_setaffinity"):
        # The same cores for all: XLA has no other limit, and takes as many threads as it has cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.threads])
    console = Console(width=160)
    config.output.mkdir(parents=True, exist_ok=True)
    found = measure(config, console)
    hardware = {
        "device": jax.devices()[0].device_kind,
        **machine("jax", "jaxlib", "equinox", "optax", "rinsx"),
        **found.pop("versions"),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    settings = dataclasses.asdict(config) | {"torch": config.torch is not None}
    del settings["output"]
    shape = dataclasses.asdict(shape_of(config))
    results = {"config": settings, "shape": shape, "adamw": ADAMW, "hardware": hardware, **found}
    (config.output / "siglip_speed.json").write_text(json.dumps(results, indent=1) + "\n")
    (config.output / "siglip_speed.md").write_text(markdown(found["rows"]))
    console.print(table(found["rows"]))
    console.print(f"{hardware['processor']}, {config.threads} cores, device {hardware['device']}.")
    if found["peak"] is None:
        console.print("The peak of this device is not known: no utilisation.")
    console.print(f"results in {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
