"""The comparison at matched compute: its statistics against simulation, its plan, its resumption, its honesty."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

import rinsx as rx

from .helpers import environment


BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _statistics

import _arms
import _report
import compute_matched


def setting(**changes):
    options = compute_matched.Options(
        width=16, layers=4, heads=2, length=16, tokens=6400, windows=24, points=2, **changes
    )
    return compute_matched.setting_of(options)


#
# Statistics
#


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = np.array([0.0, 0.3, -0.2, 0.0])
    held = []
    for _ in range(2000):
        losses = truth[:, None] + rng.normal(size=(1, 5)) * 10 + rng.normal(size=(4, 5)) * 0.5
        half = _statistics.smallest_visible(losses)
        held += list(np.abs((losses - losses[:1]).mean(1)[1:] - truth[1:]) <= half)
    assert abs(np.mean(held) - 0.95) < 0.015


def test_two_arms_are_the_paired_t_interval():
    losses = np.random.default_rng(1).normal(size=(2, 6))
    apart = losses[1] - losses[0]
    low, high = stats.t.interval(0.95, 5, apart.mean(), stats.sem(apart))
    assert np.isclose(_statistics.smallest_visible(losses), (high - low) / 2)


def test_what_a_seed_does_to_all_arms_cancels():
    losses = np.random.default_rng(2).normal(size=(3, 4))
    shifted = losses + np.array([5.0, -3.0, 2.0, 100.0])
    assert np.allclose(_statistics.residual(losses), _statistics.residual(shifted))


def test_a_single_seed_decides_nothing():
    losses, sizes = np.array([[1.0], [0.5]]), np.full(7, 3.0)
    windows = np.array([[[1.0] * 7], [[0.5] * 7]]) * 3
    found = _statistics.differences(losses, windows, sizes, 0)
    assert np.isnan(found[1].half) and found[1].verdict == "not decided" and found[1].mean == -0.5
    assert found[1].show(".2f") == "-0.50" and found[1].show(".2f", -1) == "+0.50"
    (line,) = _statistics.said(losses, ".2f", "points")
    assert line.startswith("2 arms, 1 seeds: no deviation is known")


def test_what_is_not_known_is_null_in_a_record(tmp_path):
    record = {"deviation": math.nan, "runs": [{"curve": [(1, math.nan)]}], "mean": 0.5}
    _report.write(tmp_path / "results.json", record)
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert found == {"deviation": None, "runs": [{"curve": [[1, None]]}], "mean": 0.5}


def test_the_error_over_windows_is_that_of_a_resampled_ratio():
    rng = np.random.default_rng(3)
    sizes = rng.integers(50, 100, 400).astype(float)
    windows = sizes * rng.normal([[[2.0]], [[2.1]]], 0.2, (2, 3, 400))
    losses = windows.sum(-1) / sizes.sum()
    found = _statistics.differences(losses, windows, sizes, 0)[1]
    apart = (windows[1] - windows[0]).mean(0)
    draws = rng.integers(0, 400, (4000, 400))
    resampled = apart[draws].sum(1) / sizes[draws].sum(1)
    assert np.isclose(found.windows, resampled.std(), rtol=0.08)


def test_a_verdict_needs_more_than_the_smallest_visible_difference():
    verdict = lambda mean: _statistics.Difference(mean, 0.1, 0.0).verdict
    assert [verdict(x) for x in (-0.2, -0.1, 0.05, 0.2)] == ["better", "not decided", "not decided", "worse"]


#
# Arms
#


def test_arms_start_from_the_same_weights_and_have_the_same_parameters():
    s = setting()
    models = {name: _arms.build(arm, s, jr.key(3)) for name, arm in _arms.ARMS.items()}
    ups = {
        name: jnp.concatenate([b.layers.mlp.up.weight for b in m.body.blocks.values()]) for name, m in models.items()
    }
    counts = {name: rx.flops.parameters(m) for name, m in models.items()}
    for name in models:
        assert jnp.array_equal(ups[name], ups["A B"])
        assert counts[name].unique - counts[name].adapters == counts["A B"].unique


def test_the_plan_spends_what_it_says():
    s = setting()
    arms = list(_arms.ARMS.values())
    plan = _arms.plan(arms, s)
    for arm in arms:
        per_step = float(plan[arm.name].cost_per_step)
        assert abs(float(plan[arm.name].total - plan.budget)) <= per_step / 2
    # The stochastic arm's quota spends the plan to within a step of its deepest draw.
    arm = _arms.ARMS["A^r B stochastic"]
    cost = lambda r: _arms.cost(arm, s, r)
    depths = s.depth_law().quota(plan[arm.name].steps, jr.key(0))
    spent = rx.flops.spent(cost, r=np.asarray(depths))
    assert abs(float(spent - plan[arm.name].total)) <= cost(3)


@pytest.mark.parametrize("law", ["binomial", "uniform", "poisson", "lognormal-poisson"])
def test_every_law_that_can_be_asked_for_is_made(law):
    assert setting(law=law).depth_law().max <= 3


def test_any_signature_is_an_arm():
    assert _arms.arm("A^4 B") == _arms.Arm("A^4 B", "A^4 B", None)
    assert _arms.arm("A B^r").rounds == 2
    for text in ("A^4 B", "A B C D", "(A^2 B)^2", "A^r"):
        _arms.build(_arms.arm(text), setting(), jr.key(0))
    with pytest.raises(ValueError, match="one named exponent, r, or none; got r, s"):
        _arms.arm("(A^r B)^s")


def test_windows_to_tune_on_and_to_report_on_share_nothing(tmp_path):
    s = dataclasses.replace(setting(), cache=str(tmp_path))
    data = _arms.load(s)
    spans = lambda windows: {tuple(span) for span in np.asarray(windows.tokens.spans)}
    parts = [spans(x) for x in (data.train, data.tune, data.report)]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_the_tuned_learning_rates_are_interior_for_every_arm():
    tuned = json.loads((BENCHMARKS / "tuned.json").read_text("utf-8"))
    defaults = compute_matched.Options()
    optimizers = set()
    for sweep in tuned["sweeps"]:
        optimizers.add(sweep["optimizer"])
        assert set(sweep["losses"]) >= set(defaults.arms)
        for name, losses in sweep["losses"].items():
            grid = sorted(map(float, losses))
            best = min(losses, key=losses.get)
            assert float(best) == sweep["best"][name] and grid[0] < float(best) < grid[-1]
    assert optimizers >= {defaults.optimizer}


#
# The whole job
#


def command(output, *more):
    shape = "--width 16 --layers 2 --heads 2 --length 16"
    small = f"{shape} --tokens 6400 --windows 24 --points 2 --seeds 2 --learning-rate 0.02 --workers 1"
    return [sys.executable, str(BENCHMARKS / "compute_matched.py"), *small.split(), "--output", str(output), *more]


def test_the_job_runs_resumes_and_reports(tmp_path):
    arms = ["--arms", "A B", "A^2 B", "A^r B stochastic"]
    first = subprocess.run(command(tmp_path, *arms), env=environment(), capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "The smallest difference that this run could have seen" in first.stdout
    assert "What it can show" in first.stdout
    record = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert len(record["runs"]) == 6 and (tmp_path / "loss.png").stat().st_size > 10_000
    for run in record["runs"]:
        # What ran is what was planned, exactly, but for the depths that a quota rounds.
        assert abs(run["flops"] / record["plan"][run["arm"]]["total"] - 1) < (
            0.01 if "stochastic" in run["arm"] else 1e-12
        )
        assert 0 < run["bits_per_byte"] < 9
        assert run["tokens"] == record["plan"][run["arm"]]["tokens"]
    at = {run["arm"]: run["at_depth"] for run in record["runs"] if run["seed"] == 0}
    assert set(at["A^2 B"]) == {"1", "2", "3", "4"} and set(at["A B"]) == {"None"}

    # A lost run is computed again to the same number; the others are not touched.
    files = sorted((tmp_path / "runs").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in files}
    lost = json.loads(files[0].read_text("utf-8"))
    files[0].unlink()
    again = subprocess.run(command(tmp_path, *arms), env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert set(after) == set(before) and [n for n in before if before[n] != after[n]] == [files[0].name]
    found = json.loads(files[0].read_text("utf-8"))
    drop = ("seconds", "wall")
    assert {k: v for k, v in found.items() if k not in drop} == {k: v for k, v in lost.items() if k not in drop}


def test_the_job_tunes(tmp_path):
    arms = ["--arms", "A B", "--tune", "--grid", "0.001", "0.01", "0.1"]
    ran = subprocess.run(command(tmp_path, *arms), env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (sweep,) = json.loads((tmp_path / "tuned.json").read_text("utf-8"))["sweeps"]
    assert set(sweep["losses"]["A B"]) == {"0.001", "0.01", "0.1"} and sweep["best"]["A B"] in (0.001, 0.01, 0.1)
    assert compute_matched.SWEEPS.rates(
        dataclasses.replace(compute_matched.Options(), output=tmp_path), setting(), ["A B", "A^9 B"]
    ) == {"A B": sweep["best"]["A B"], "A^9 B": sweep["best"]["A B"]}


def test_a_run_that_fails_is_named(tmp_path):
    ran = subprocess.run(
        command(tmp_path, "--arms", "A B", "--corpus", str(tmp_path / "nothing.txt")),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode != 0 and "nothing.txt" in ran.stderr


def test_names_of_runs_tell_apart_what_changes_results():
    arm, s = _arms.ARMS["A B"], setting()
    name = lambda **changes: _arms.identity(arm, dataclasses.replace(s, **changes), 0, 0.1, "x")
    assert name() == name(cache="elsewhere") != name(width=32)
    assert len({name(), _arms.identity(arm, s, 1, 0.1, "x"), _arms.identity(arm, s, 0, 0.1, "y")}) == 3
    assert jax.__version__ and _report.scale(s, [{"tokens": 10, "parameters": 5, "epochs": 0.1}]).startswith(
        "What it can"
    )
