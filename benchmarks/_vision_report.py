"""Shows what a comparison on images found: tables, a plot, and a JSON of results."""

import math
import sys
from _statistics import differences, residual, said, smallest_visible
from typing import Any

import numpy as np
from _report import ends, hardware, markdown, minutes, plot, rich_table, speed, write
from rich.console import Console


CLAIM = {
    "pairs": "The paper's gain is of SigLIP-B/16, 203M parameters, on web data",
    "classes": "The paper's finding that recursion does not help to classify images alone is of models as large",
}


def compared(options: Any, setting: Any, arms: list[Any], planned: Any, results: list[Any], wall: float) -> None:
    """Prints and writes the comparison. Accuracies are in per cent, differences in points."""
    names = [arm.name for arm in arms]
    by_arm = {name: sorted((r for r in results if r["arm"] == name), key=lambda r: r["seed"]) for name in names}
    # The statistics are those of losses: what is told wrong.
    wrong = np.array([[1 - np.array(r["correct"]) for r in by_arm[name]] for name in names], float) * 100
    losses = wrong.mean(-1)
    found = differences(losses, wrong, np.ones(wrong.shape[-1]), 0)
    visible = smallest_visible(losses)
    mean = lambda name, of: float(np.mean([r[of] for r in by_arm[name]]))

    pairs = setting.task == "pairs"
    unit = "pairs" if pairs else "images"
    header = [
        "arm",
        *(["image tower", "text tower"] if pairs else ["signature"]),
        "parameters",
        f"MFLOPs/{unit[:-1]}",
        unit,
        "FLOPs",
        "off budget",
        "s",
        f"{unit}/s",
        "accuracy, %",
        f"less {names[0]}",
        "",
    ]
    rows = []
    for arm, name, loss, difference in zip(arms, names, losses, found):
        first, base = by_arm[name][0], name == names[0]
        shown = lambda signature: signature if arm.stochastic else signature.replace("^r", f"^{arm.rounds}")
        towers = [shown(arm.image), shown(arm.text)] if pairs else [shown(arm.image)]
        rows.append(
            [
                name,
                *towers,
                f"{first['parameters']:,}",
                f"{first['flops'] / first['images'] / 1e6:.2f}",
                f"{first['images']:,}",
                f"{first['flops']:.4g}",
                f"{first['flops'] / float(planned.budget) - 1:+.2%}",
                f"{mean(name, 'wall'):.0f}",
                speed(options, by_arm[name], "images"),
                f"{100 - loss.mean():.2f}",
                "" if base else difference.show(".2f", -1),
                "" if base else difference.verdict,
            ]
        )
    deep = sorted({int(d) for r in results for d in r["at_depth"] if d != "None"})
    depth_rows = []
    for arm in arms:
        at = by_arm[arm.name]
        if arm.rounds is None:
            depth_rows.append([arm.name, f"{100 * mean(arm.name, 'accuracy'):.2f}*", *[""] * (len(deep) - 1)])
            continue
        trained = lambda d: "*" if d == arm.rounds and not arm.stochastic else ""
        # The most rounds of one arm need not be asked of the others.
        seen = [[r["at_depth"].get(str(d)) for r in at] for d in deep]
        cells = ["" if None in x else f"{100 * np.mean(x):.2f}{trained(d)}" for d, x in zip(deep, seen)]
        depth_rows.append([arm.name, *cells])

    baseline = by_arm[names[0]][0]
    number = wrong.shape[-1]
    what = "zero-shot accuracy" if pairs else "accuracy"
    lines = [
        f"{len(names)} arms, {losses.shape[1]} seeds, {what} on {number:,} held-out images; higher is better. The stochastic arm is "
        f"judged at its most rounds, {setting.law_max}.",
        *said(losses, ".2f", "points"),
        f"The standard error of a difference over images, apart from that, is up to {max(d.windows for d in found):.2f}.",
        f"What it can show: {baseline['parameters'] / 1e6:.2g}M parameters, {baseline['images']:,} images for the baseline "
        f"({baseline['epochs']:.2g} epochs). {CLAIM[setting.task]}; a run that is smaller neither confirms nor refutes it.",
    ]
    if pairs:
        lines.append(
            "Classes and templates are those of the training captions: what is judged is classification by text, no transfer."
        )
    console = Console(width=None if Console().is_terminal else 200)
    console.print(rich_table("At the trained depth", header, rows))
    by_depth = ["arm", *(f"r={d}" for d in deep)]
    console.print(rich_table("Accuracy by rounds at evaluation, % (* as trained)", by_depth, depth_rows))
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"wall time {minutes(wall)}; written to {options.output}", highlight=False)

    record = {
        "command": "python " + " ".join(ends((arg,))[0] if "/" in arg else arg for arg in sys.argv),
        "machine": hardware(),
        "setting": {**setting.__dict__, "train": ends(setting.train), "test": ends(setting.test)},
        "plan": {
            row.name: {"steps": row.steps, "images": row.tokens, "total": float(row.total)} for row in planned.rows
        },
        "budget": float(planned.budget),
        "runs": [{k: v for k, v in r.items() if k != "correct"} for r in results],
        "wall": wall,
        "deviation": residual(losses)[0],
        "smallest_visible": visible,
        "differences": {
            name: {"mean": -d.mean, "half": d.half, "images": d.windows, "verdict": d.verdict}
            for name, d in zip(names, found)
        },
    }
    write(options.output / "results.json", record)
    parts = [markdown(header, rows), markdown(by_depth, depth_rows), "\n".join(lines)]
    (options.output / "results.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    seen = "" if math.isnan(visible) else f"{visible:.2f}"
    plot(options.output / "accuracy.png", names, by_arm, seen, ylabel="held-out accuracy, % (of a part)", factor=100)
