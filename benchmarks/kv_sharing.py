"""Does it cost quality that rounds share keys and values? Loss at equal training FLOPs, against the bytes of the cache.

    python benchmarks/kv_sharing.py

trains, on the text of Python's standard library and with three seeds each, the plain model `A B`; `A^3 B` with a slot of the
cache for each visit; and `A^3 B` under each parallel policy of `rx.cache`, as it runs. The model that was trained with a slot for
each visit is then run under policies that it was not trained for: parallel ones, and sequential ones, which are defined token
by token. It takes some minutes on two cores, and writes a table, a plot and a JSON of results into `outputs/kv_sharing`.
Interrupted, it goes on where it was.

The options are those of `compute_matched.py`, but for `--tune` and `--elsewhere`. Of `--arms`, the first is the plain model and
sets the budget, the second has a slot for each visit, and the others are the second under a policy.
"""

import dataclasses
import json
import math
import os
import pathlib
import time
from _statistics import differences, said
from typing import Any

import _report
import _workers
import compute_matched
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import tyro
from _arms import arm as arm_of, build, policy
from _text import bits_per_byte, documents, Evaluator, load
from rich.console import Console

import rinsx as rx


matplotlib.use("Agg")
import matplotlib.pyplot as plt


DEFAULT = compute_matched.Options(
    arms=("A B", "A^3 B", "A^3 B, first", "A^3 B, every 2"), output=pathlib.Path("outputs/kv_sharing")
)
AT_INFERENCE = ("first", "every 2", "last 1", "last 2")
CLAIM = "Whether rounds can share keys and values in a large model, trained far longer, it does not say."


#
# The model as it was trained, under other policies
#


@eqx.filter_jit
def measure(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Decodes windows token by token, all at once, and their first half at once with the rest token by token.

    Each result has one number for each window: `nats` of all its targets; and for windows of a single document (`single`) the
    largest and mean difference of log-probabilities from token by token: at once (`prompt`), and behind a half that was run at
    once (`behind`), with the nats and bytes of that second half.
    """
    rows, length = batch["tokens"].shape
    half = length // 2
    empty = model.cache(rows, length, chunk=length, trusted=True)
    log_probs = lambda hidden: jax.nn.log_softmax(model.logits(hidden))

    def step(cache, now):
        token, position = now
        # The position is 0 where a document starts: then the cache forgets the one before.
        hidden, cache = model.decode(token[:, None], cache.rewind(position))
        return cache, log_probs(hidden[:, 0])

    def steps(cache, begin):
        _, found = jax.lax.scan(step, cache, (batch["tokens"].T[begin:], batch["positions"].T[begin:]))
        return found.swapaxes(0, 1)

    def nats(found, begin):
        targets, weights = batch["targets"][:, begin:], batch["weights"][:, begin:]
        return -jnp.sum(jnp.take_along_axis(found, targets[..., None], -1)[..., 0] * weights, 1)

    by_token = steps(empty, 0)
    hidden, _ = model.decode(batch["tokens"], empty)
    _, filled = model.decode(batch["tokens"][:, :half], empty)
    mixed = steps(filled, half)
    at_once = jnp.abs(log_probs(hidden) - by_token)
    behind = jnp.abs(mixed - by_token[:, half:])
    over = lambda of, x: of(x, axis=(1, 2))
    return {
        "nats": nats(by_token, 0),
        "bytes": jnp.sum(batch["bytes"], 1),
        "single": jnp.all((batch["segments"] == batch["segments"][:, :1]) & (batch["weights"] > 0), 1),
        "prompt": {"max": over(jnp.max, at_once), "mean": over(jnp.mean, at_once)},
        "behind": {
            "max": over(jnp.max, behind),
            "mean": over(jnp.mean, behind),
            "nats": nats(mixed, half),
            "nats_by_token": nats(by_token[:, half:], half),
            "bytes": jnp.sum(batch["bytes"][:, half:], 1),
        },
    }


def at_inference(options: Any, setting: Any, arm: Any, job: dict[str, Any], name: str) -> dict[str, Any]:
    """The loss under one policy of the model that one run has trained; kept on disk."""
    path = options.output / "at_inference" / f"{job['name']}-{name.replace(' ', '-')}.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    model = build(dataclasses.replace(arm, cache=name), setting, jr.key(job["seed"]))
    arrays, rest = eqx.partition(model, eqx.is_array)
    model = eqx.combine(eqx.tree_deserialise_leaves(job["keep"], arrays), rest)
    evaluator = Evaluator(load(setting).report, setting.windows)
    found: dict[str, Any] = {"arm": arm.name, "seed": job["seed"], "cache": name}
    if policy(name).parallel and name != "per visit":
        ((nats, sizes),) = evaluator(model, (arm.rounds,)).values()
    else:
        parts = [jax.device_get(measure(model, batch)) for batch in evaluator.batches]
        told = jax.tree.map(lambda *x: np.concatenate(x)[: evaluator.number].astype(np.float64), *parts)
        nats, sizes, single = told["nats"], told["bytes"], told["single"] > 0
        apart = lambda x: {"max": float(np.max(x["max"][single])), "mean": float(np.mean(x["mean"][single]))}
        if single.any():
            behind = {key: x[single] for key, x in told["behind"].items()}
            found["at_once"] = {
                "windows": int(single.sum()),
                "prompt": apart(told["prompt"]),
                "behind": {
                    **apart(told["behind"]),
                    "bits_per_byte": bits_per_byte(behind["nats"], behind["bytes"]),
                    "bits_per_byte_by_token": bits_per_byte(behind["nats_by_token"], behind["bytes"]),
                },
            }
    found["bits_per_byte"] = bits_per_byte(nats, sizes)
    found["windows"] = {"nats": [float(x) for x in nats], "bytes": [float(x) for x in sizes]}
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".new")
    staged.write_text(json.dumps(found), "utf-8")
    os.replace(staged, path)
    return found


def costs(arm: Any, setting: Any) -> tuple[int, int]:
    """Bytes of keys and values for each token, and the contractions that decode a token whose cache is as long as a window."""
    if arm.rounds is not None:
        # Slots for the rounds that are counted, not for deeper ones at which it is evaluated.
        arm, setting = dataclasses.replace(arm, stochastic=False), dataclasses.replace(setting, depths=(arm.rounds,))
    model = eqx.filter_eval_shape(build, arm, setting, jr.key(0))
    # One array for each slot: what rounds do not write is then known when the program is compiled, and not computed.
    cache = eqx.filter_eval_shape(lambda m: m.cache(1, setting.length, chunk=setting.length, separate=True), model)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    cost = rx.flops.count(lambda m, token, cache: m.logits(m.decode(token, cache)[0]), model, token, cache)
    return rx.flops.nbytes((cache.keys, cache.values)) // cache.capacity, int(cost.matmul)


#
# The report
#


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: an arm under a policy, with its runs in the order of seeds."""

    label: str
    trained: bool
    arm: Any
    runs: list[dict[str, Any]]
    difference: Any


def rows_of(
    arms: list[Any], results: list[Any], inference: dict[str, list[dict[str, Any]]], document: np.ndarray
) -> list[Row]:
    """All lines. Trained arms share one interval; the others have each their own, since what is not trained spreads otherwise."""
    by_arm = [sorted((r for r in results if r["arm"] == arm.name), key=lambda r: r["seed"]) for arm in arms]

    def compared(groups, baseline):
        losses = np.array([[r["bits_per_byte"] for r in runs] for runs in groups])
        bits = np.array([[r["windows"]["nats"] for r in runs] for runs in groups]) / math.log(2)
        return differences(losses, bits, np.array(groups[0][0]["windows"]["bytes"]), baseline, document)

    rows = [Row(arm.cache, True, arm, runs, d) for arm, runs, d in zip(arms, by_arm, compared(by_arm, 1))]
    rows[0] = dataclasses.replace(rows[0], label=f"{arms[0].name} (plain)")
    for name, runs in inference.items():
        arm = dataclasses.replace(arms[1], cache=name)
        rows.append(Row(name, False, arm, runs, compared([by_arm[1], runs], 0)[1]))
    return rows


def report(
    options: Any,
    setting: Any,
    planned: Any,
    results: list[Any],
    rows: list[Row],
    document: np.ndarray,
    control: list[Any],
    wall: float,
) -> None:
    """Prints and writes what was found."""
    plain, visits = rows[0], rows[1]
    cost = [costs(row.arm, setting) for row in rows]
    loss = [float(np.mean([r["bits_per_byte"] for r in row.runs])) for row in rows]
    header = [
        "policy",
        "",
        "cache bytes/token",
        "of plain",
        "MFLOPs/token, training",
        "MFLOPs/token, decoding",
        "tokens",
        "bits/byte",
        "less per visit",
        "",
    ]
    table = []
    for row, (size, flops), x in zip(rows, cost, loss):
        first = row.runs[0]
        table.append(
            [
                row.label,
                "trained" if row.trained else "at inference only",
                f"{size:,}",
                f"{size / cost[0][0]:.2f}",
                f"{first['flops'] / first['tokens'] / 1e6:.3f}" if row.trained else "",
                f"{flops / 1e6:.3f}",
                f"{first['tokens']:,}" if row.trained else "",
                f"{x:.4f}",
                "" if row is visits else row.difference.show(".4f"),
                "" if row is visits else row.difference.verdict,
            ]
        )
    told = [row for row in rows if "at_once" in row.runs[0]]
    at_once_header = [
        "policy",
        "log-probabilities of the prompt: max",
        "mean",
        "behind it: max",
        "mean",
        "bits/byte behind it, token by token",
        "prompt at once",
    ]
    at_once = [at_once_row(row.label, row.runs) for row in told]
    exact = [r["at_once"]["prompt"]["max"] for r in control if "at_once" in r]
    gap = max(
        abs(a["bits_per_byte"] - b["bits_per_byte"])
        for a, b in zip(control, sorted(visits.runs, key=lambda r: r["seed"]))
    )
    trained = np.array([[r["bits_per_byte"] for r in row.runs] for row in rows if row.trained])
    lines = [
        f"{rows[1].arm.name} under policies of its cache, {plain.arm.name} beside it; {len(visits.runs)} seeds, "
        f"{len(visits.runs[0]['windows']['bytes'])} windows of held-out text of {setting.length} bytes; lower is better.",
        *said(trained, ".4f", "bits per byte"),
        "That is of trained models. At inference only, each policy has a deviation of its own.",
        _report.over_documents(document, [row.difference for row in rows]),
        "Decoding token by token with a slot for each visit is checked against the forward pass: "
        f"their losses differ by up to {gap:.1e} bits per byte"
        + (f", log-probabilities by up to {max(exact):.1e} from those of a window at once." if exact else "."),
        _report.scale(setting, results, CLAIM),
    ]
    console = Console(width=None if Console().is_terminal else 200)
    console.print(_report.rich_table("Loss by policy of the cache", header, table))
    if at_once:
        console.print(_report.rich_table("A prompt at once, less token by token (nats)", at_once_header, at_once))
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"wall time {_report.minutes(wall)}; written to {options.output}", highlight=False)

    record = {
        **_report.record_of(setting, planned, results, wall),
        "rows": [
            {
                "policy": row.label,
                "trained": row.trained,
                "cache_bytes_per_token": size,
                "decoding_flops_per_token": flops,
                "bits_per_byte": [r["bits_per_byte"] for r in row.runs],
                "less_per_visit": dataclasses.asdict(row.difference) | {"verdict": row.difference.verdict},
                "at_once": [r["at_once"] for r in row.runs if "at_once" in r],
            }
            for row, (size, flops) in zip(rows, cost)
        ],
        "smallest_visible": visits.difference.half,
        "control": [{k: v for k, v in r.items() if k != "windows"} for r in control],
    }
    _report.write(options.output / "results.json", record)
    tables = [_report.markdown(header, table), *([_report.markdown(at_once_header, at_once)] if at_once else [])]
    (options.output / "results.md").write_text("\n\n".join([*tables, "\n".join(lines)]) + "\n", "utf-8")
    plot(options.output / "loss.png", rows, [size for size, _ in cost], loss)


def at_once_row(label: str, runs: list[dict[str, Any]]) -> list[str]:
    """What it changes to run a prompt at once: the largest difference over seeds, and means."""
    found = [r["at_once"] for r in runs]
    mean = lambda part, key: float(np.mean([x[part][key] for x in found]))
    cells = []
    for part in ("prompt", "behind"):
        cells += [f"{max(x[part]['max'] for x in found):.2g}", f"{mean(part, 'mean'):.2g}"]
    return [label, *cells, *(f"{mean('behind', key):.4f}" for key in ("bits_per_byte_by_token", "bits_per_byte"))]


def plot(path: Any, rows: list[Row], sizes: list[int], losses: list[float]) -> None:
    """Loss against the bytes of the cache, with the intervals of differences to a slot for each visit."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row, size, loss in zip(rows, sizes, losses):
        color = "tab:blue" if row.trained else "tab:orange"
        half = 0 if row.label == "per visit" or math.isnan(row.difference.half) else row.difference.half
        axes.errorbar(
            size, loss, half, fmt="o", color=color, markerfacecolor=color if row.trained else "none", capsize=3
        )
        # Trained or not, a policy has the same bytes: one name below, one above.
        place = (7, -10 if row.trained else 4)
        axes.annotate(row.label, (size, loss), xytext=place, textcoords="offset points", fontsize=8, color=color)
    axes.set(xlabel="bytes of keys and values for each token", ylabel="held-out bits per byte")
    axes.set_title("equal training FLOPs; blue: trained so, orange: at inference only", fontsize=10)
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """The command."""
    options = tyro.cli(compute_matched.Options, default=DEFAULT, description=__doc__)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    begin = time.perf_counter()
    arms = [arm_of(text) for text in options.arms]
    if options.tune or options.elsewhere:
        # An arm with a policy learns at the rate of the arm that shares nothing.
        raise SystemExit("--tune and --elsewhere are for compute_matched.py, which takes the same arms")
    shared = [dataclasses.replace(a, name=arms[1].name, cache=arms[1].cache) for a in arms[1:]] if len(arms) > 1 else []
    if not shared or any(a != arms[1] for a in shared) or arms[1].cache != "per visit" or arms[1].rounds is None:
        raise SystemExit(
            "--arms are a plain model, a recursion whose rounds share nothing, and that one under policies, such as "
            f"'A B' 'A^3 B' 'A^3 B, first'; got {', '.join(map(repr, options.arms))}"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    setting = compute_matched.setting_of(options)
    arms, planned, jobs = compute_matched.jobs_of(options, setting)
    print(planned)
    kept = [job for job in jobs if job["arm"]["name"] == arms[1].name]
    for job in kept:
        job["keep"] = str((options.output / "models" / f"{job['name']}.eqx").resolve())
        if not os.path.exists(job["keep"]):
            # A result without its model, as compute_matched.py leaves it, is of no use here.
            (options.output / "runs" / f"{job['name']}.json").unlink(missing_ok=True)
    with _report.Live() as show:
        results = _workers.run_all(compute_matched.SCRIPT, options.output / "runs", jobs, show, options.workers)
    inference = {}
    for name in (*AT_INFERENCE, "per visit"):
        print(f"at inference: {name}", flush=True)
        inference[name] = [at_inference(options, setting, arms[1], job, name) for job in kept]
    control = inference.pop("per visit")
    document = documents(load(setting).report, setting.windows)
    rows = rows_of(arms, results, inference, document)
    report(options, setting, planned, results, rows, document, control, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
