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
import _text
import _workers
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


def test_windows_of_one_document_are_one_draw():
    rng = np.random.default_rng(4)
    of = np.repeat(np.arange(40), 10)
    sizes = rng.integers(50, 100, 400).astype(float)
    # What a document does to a difference, it does to all of its windows.
    apart = sizes * (0.1 + rng.normal(0, 0.2, 40)[of] + rng.normal(0, 0.1, 400))
    windows = np.stack([2 * sizes, 2 * sizes + apart])[:, None]
    found = lambda documents: (
        _statistics.differences(windows.sum(-1) / sizes.sum(), windows, sizes, 0, documents)[1].windows
    )
    draws = rng.integers(0, 40, (4000, 40))
    totals = [np.bincount(of, x)[draws].sum(1) for x in (apart, sizes)]
    assert np.isclose(found(of + 7), (totals[0] / totals[1]).std(), rtol=0.08)
    assert found(None) < found(of) / 2 and found(None) == found(np.arange(400))
    assert math.isnan(found(np.zeros(400, int)))


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


def test_the_document_of_a_window_is_that_of_its_middle():
    tokens = rx.data.tokenize(rx.data.documents(["a" * 30, "b" * 3, "c" * 20]), rx.data.Bytes()).subset([0, 2])
    windows = rx.data.Windows(tokens, 10, drop_last=False)
    # Of 31 tokens and 21: the window of tokens 30 to 39 has the middle 35, and the last one is filled up.
    assert _text.documents(windows, 99).tolist() == [0, 0, 0, 2, 2, 2]
    assert _text.documents(windows, 2).tolist() == [0, 2]


def test_a_law_of_many_depths_is_trained_and_judged_at_its_most(tmp_path, monkeypatch):
    # The tests' eight devices are not for a worker.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"document {i} " * 20, "utf-8")
    options = compute_matched.Options(
        arms=("A B", "A^r B stochastic"), corpus=(tmp_path / "texts",), output=tmp_path, seeds=1, learning_rate=0.01
    )
    small = {"width": 8, "layers": 2, "heads": 1, "length": 8, "tokens": 800, "windows": 16, "points": 2}
    options = dataclasses.replace(options, law="uniform", law_max=5, depths=(1,), held_out="1/4", **small)
    s = compute_matched.setting_of(options)
    arms, planned, jobs = compute_matched.jobs_of(options, s)
    assert [arm.rounds for arm in arms] == [None, 5]
    same = {"logs": [], "checkpoints": None, "every": 1, "tuning": False}
    results = [
        _arms.train(arm, s, job["row"], 0, 0.01, metrics=tmp_path / f"{i}.jsonl", **same)
        for i, (arm, job) in enumerate(zip(arms, jobs))
    ]
    found = results[1]
    assert set(found["at_depth"]) == {"1", "5"} and found["bits_per_byte"] == found["at_depth"]["5"]
    # All but the first call, of half the steps, is timed.
    assert found["timed"] == found["steps"] - found["steps"] // 2
    _report.compared(options, s, arms, planned, results, 1.0)
    told = (tmp_path / "results.md").read_text("utf-8")
    assert "The stochastic arm is judged at its most rounds, 5." in told
    assert (
        f"over the {len(np.unique(_text.documents(_text.load(s).report, 16)))} documents that the windows are of"
        in told
    )


def test_the_stochastic_arm_is_by_default_the_one_of_old_results():
    s = compute_matched.setting_of(compute_matched.Options())
    for arm in _arms.ARMS.values():
        assert _arms.judged(arm, s) == arm


def test_speed_is_of_what_was_timed():
    options = compute_matched.Options()
    run = {"tokens": 1000, "steps": 10, "seconds": 2.0}
    assert _report.speed(options, [{**run, "timed": 8}, {**run, "timed": 4}], "tokens") == "300"
    # A run that went on from a checkpoint says nothing of its speed.
    assert _report.speed(options, [{**run, "timed": 8}, {**run, "timed": 0}], "tokens") == "400"
    assert _report.speed(options, [{**run, "timed": 0}], "tokens") == ""
    # Results from before steps were counted.
    assert _report.speed(options, [run], "tokens") == "500"
    assert _report.speed(dataclasses.replace(options, save_every=5), [run], "tokens") == ""


def test_json_lines_are_told_by_their_suffix(tmp_path):
    folder, mixed = tmp_path / "lines", tmp_path / "mixed"
    for place in (folder, mixed):
        place.mkdir()
        for name in ("a.jsonl", "b.ndjson"):
            (place / name).write_text('{"text": "one", "other": 1}\n', "utf-8")
    (folder / ".hidden").write_text("no", "utf-8")
    (mixed / "c.txt").write_text("plain", "utf-8")
    read = lambda *paths: list(_text._source(tuple(map(str, paths)), "text").documents())
    assert read(folder / "b.ndjson") == ["one"]
    assert read(folder) == read(folder / "*") == read(folder / "a.jsonl", folder / "b.ndjson") == ["one", "one"]
    assert read(mixed / "c.txt") == read(mixed / "*.txt") == ["plain"]
    for paths in ([mixed], [mixed / "*"], [folder, mixed / "c.txt"], [mixed / "c.txt", mixed / "b.ndjson"]):
        with pytest.raises(
            ValueError, match=r"JSON lines or of text files, not of both; got .*(jsonl|ndjson) and .*c\.txt"
        ):
            read(*paths)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(tmp_path / "nothing.txt")


def test_the_last_arm_is_begun_first_and_reported_last(tmp_path, monkeypatch):
    begun = []

    class Worker:
        def __init__(self, script, number, alone):
            self.job, self.seen = None, {}

        def do(self, job):
            begun.append(job["name"])
            return {"name": job["name"]}

        def stop(self):
            pass

    monkeypatch.setattr(_workers, "Worker", Worker)
    jobs = [{"name": f"{arm}{seed}", "seed": seed, "arm": {"name": arm}} for arm in "abc" for seed in (0, 1)]
    results = _workers.run_all(pathlib.Path("none"), tmp_path, jobs, lambda *_: None, 1)
    assert begun == ["c0", "c1", "b0", "b1", "a0", "a1"]
    assert [r["name"] for r in results] == ["a0", "a1", "b0", "b1", "c0", "c1"]


def test_an_own_sweep_hides_no_other(tmp_path, capsys):
    committed = json.loads((BENCHMARKS / "tuned.json").read_text("utf-8"))["sweeps"]
    default = compute_matched.setting_of(compute_matched.Options())
    shape = {name: getattr(default, name) for name in ("optimizer", *compute_matched.SWEEPS.near)}
    own = {**shape, "best": {"A B": 0.3, "A^2 B": 0.4}}
    (tmp_path / "tuned.json").write_text(json.dumps({"sweeps": [own]}), "utf-8")
    options = dataclasses.replace(compute_matched.Options(), output=tmp_path)
    best = lambda optimizer: next(s["best"] for s in committed if s["optimizer"] == optimizer)
    assert compute_matched.SWEEPS.rates(options, default, list(options.arms)) == {**best("muon"), **own["best"]}
    adamw = dataclasses.replace(default, optimizer="adamw")
    assert compute_matched.SWEEPS.rates(options, adamw, list(options.arms)) == best("adamw")
    assert capsys.readouterr().out == ""
    # An arm that was never tuned is named.
    assert compute_matched.SWEEPS.rates(options, default, ["A^2 B", "A^9 B"]) == {"A^2 B": 0.4, "A^9 B": 0.4}
    assert "no learning rate is tuned for A^9 B: 0.4, the median" in capsys.readouterr().out


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
    data = _text.load(s)
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
    arms = ["--arms", "A B", "--tune", "--learning-rate", "None", "--grid", "0.001", "0.01", "0.1"]
    ran = subprocess.run(command(tmp_path, *arms), env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (sweep,) = json.loads((tmp_path / "tuned.json").read_text("utf-8"))["sweeps"]
    runs = [json.loads(path.read_text("utf-8")) for path in (tmp_path / "runs").iterdir()]
    assert sorted((run["learning_rate"], run["seed"]) for run in runs) == [
        (x, y) for x in (0.001, 0.01, 0.1) for y in (0, 1)
    ]
    means = {x: sum(run["bits_per_byte"] for run in runs if run["learning_rate"] == x) / 2 for x in (0.001, 0.01, 0.1)}
    assert sweep["seeds"] == 2 and sweep["losses"]["A B"] == pytest.approx({f"{x:g}": means[x] for x in means})
    assert sweep["best"]["A B"] == min(means, key=lambda x: means[x])
    assert compute_matched.SWEEPS.rates(
        dataclasses.replace(compute_matched.Options(), output=tmp_path), setting(), ["A B", "A^9 B"]
    ) == {"A B": sweep["best"]["A B"], "A^9 B": sweep["best"]["A B"]}


def test_a_sweep_takes_no_learning_rate():
    options = dataclasses.replace(compute_matched.Options(), tune=True)
    assert compute_matched.SWEEPS.rates(options, setting(), ["A B"]) == {}
    with pytest.raises(SystemExit, match="--tune sweeps --grid, and --learning-rate 0.02 would fix it"):
        compute_matched.SWEEPS.rates(dataclasses.replace(options, learning_rate=0.02), setting(), ["A B"])


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
