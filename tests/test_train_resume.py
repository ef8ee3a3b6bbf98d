"""Runs that are killed, stopped and damaged, and started again."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import rinsx as rx


SCRIPT = pathlib.Path(__file__).with_name("_processes.py")
STEPS = 14
KEY = jr.key(7)
SGD = optax.sgd(1e-2)


def start(folder, **options):
    options = {"folder": str(folder), "steps": STEPS, "toy": True, **options}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("RUN "))
    return json.loads(line[4:]), err


def weights(folder):
    with np.load(folder / "model.npz") as file:
        return [file[name] for name in file]


def lines(folder):
    """The metrics, but for what a clock says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if not name.endswith("_per_second")} for line in found]


def assert_same(folder, told, undisturbed):
    whole, want = undisturbed
    assert told == want
    assert lines(folder) == lines(whole)
    for a, b in zip(weights(folder), weights(whole), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    told, _ = finish(start(folder))
    assert told["step"] == STEPS
    assert told["stopped"] is None
    # Calls end where something is due: after 4, 6, 8, 12 and 14 steps.
    assert [line["step"] for line in lines(folder)] == [2, 4, 6, 6, 8, 10, 12, 12, 14, 14]
    return folder, told


def test_killed_at_any_moment(tmp_path, undisturbed):
    """Once after each of the first lines, as soon as they are there, and a random part of a second later."""
    delay = random.Random(0)
    for wanted in (1, 4, 7):
        process = start(tmp_path)
        path = tmp_path / "metrics.jsonl"
        while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= wanted):
            time.sleep(0.002)
        time.sleep(delay.random() / 50)
        process.kill()
        process.communicate()
    told, _ = finish(start(tmp_path))
    assert_same(tmp_path, told, undisturbed)


def test_sigterm_saves_and_a_damaged_checkpoint_is_passed_over(tmp_path, undisturbed):
    told, _ = finish(start(tmp_path, signal=10))
    assert told["stopped"] == "SIGTERM"
    assert 10 <= told["step"] <= 12
    checkpoints = tmp_path / "checkpoints"
    newest = max(checkpoints.iterdir())
    assert int(newest.name) == told["step"]
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    told, err = finish(start(tmp_path))
    assert f"{newest} is damaged" in err
    assert_same(tmp_path, told, undisturbed)


class Points:
    """A regression, computed from the number of the batch."""

    def __len__(self):
        return 100

    def __getitem__(self, i):
        rng = np.random.default_rng(int(i))
        return rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=4).astype(np.float32)


def points():
    return grain.MapDataset.source(Points()).to_iter_dataset()


MODEL = eqx.nn.Linear(3, "scalar", key=jr.key(0))


def squares(model, batch, key):
    x, y = batch
    noise = 0.1 * jr.normal(key, y.shape)
    return jnp.sum((jax.vmap(model)(x) + noise - y) ** 2), y.size


def fit(folder, *, steps=6, every=2, model=MODEL, loss=squares, batches=None, key=KEY, **options):
    with rx.train.Checkpoints(folder, every=every, keep=10, best="score") as checkpoints:
        data = points() if batches is None else batches
        return rx.train.fit(model, loss, data, SGD, steps=steps, key=key, checkpoints=checkpoints, **options)


def stored(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_longer_runs_go_on(tmp_path):
    fit(tmp_path / "parts", steps=3)
    fit(tmp_path / "parts", steps=5)
    run = fit(tmp_path / "parts")
    whole = fit(tmp_path / "whole")
    assert np.array_equal(run.model.weight, whole.model.weight)
    assert run.flops == whole.flops > 0
    assert stored(tmp_path / "parts") == [2, 3, 4, 5, 6]
    # Ended: once more, it trains nothing, takes no data, and says the same.
    again = fit(tmp_path / "parts")
    assert np.array_equal(again.model.weight, whole.model.weight)
    assert (again.step, again.flops, again.seconds, again.stopped) == (6, whole.flops, 0, None)
    # The first call, of one step, is not timed.
    assert [(x.timed, x.begun) for x in (whole, run, again)] == [(5, 0), (0, 5), (0, 6)]


def test_only_what_was_evaluated_there_is_best(tmp_path):
    scores = iter([3.0, 1.0, 2.0])
    run = fit(tmp_path, every=1, evaluate=lambda model: {"score": next(scores)}, evaluate_every=2)
    assert run.metrics == {"score": 2.0}
    with rx.train.Checkpoints(tmp_path, best="score") as checkpoints:
        best = checkpoints.restore_best((run.model, run.state))
    assert best.step == 4
    # An earlier evaluation is known to a run that goes on.
    assert fit(tmp_path, every=1, steps=7).metrics == {"score": 2.0}


def test_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    bad = jr.key_data(jr.fold_in(KEY, 4))

    def loss(model, batch, key):
        total, weight = squares(model, batch, key)
        return jnp.where(jnp.all(jr.key_data(key) == bad), jnp.nan, total), weight

    with pytest.raises(rx.train.NonFiniteLoss, match=r"step 4: the loss is nan.*steps \[2, 4\] are kept"):
        fit(tmp_path, loss=loss)
    assert stored(tmp_path) == [2, 4]
    assert fit(tmp_path).step == 6


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match="iterator with get_state and set_state"):
        fit(tmp_path, batches=[next(iter(points()))] * 6)
    order = grain.samplers.IndexSampler(12, grain.sharding.NoSharding(), num_epochs=1, seed=0)
    loader = grain.DataLoader(
        data_source=[np.ones(3, np.float32)] * 12, sampler=order, operations=[grain.transforms.Batch(2)]
    )
    with pytest.raises(
        TypeError, match=r"a state that JSON can hold; got .*whose state is b'.*an `IterDataset` has one"
    ):
        fit(tmp_path, batches=loader)
    fit(tmp_path)
    with pytest.raises(ValueError, match="the checkpoint is of step 6, past the 5 steps"):
        fit(tmp_path, steps=5)
    with pytest.raises(ValueError, match="run with another `key`"):
        fit(tmp_path, steps=8, key=jr.key(8))
    with pytest.raises(ValueError, match=r"different model: its array 0 is .*weight"):
        fit(tmp_path, model=eqx.nn.Linear(3, 2, key=jr.key(0)))
    with pytest.raises(ValueError, match="the data ends at step 100"):
        fit(tmp_path, steps=101, every=50)


def test_refuses_what_it_did_not_save(tmp_path):
    state = SGD.init(eqx.filter(MODEL, eqx.is_inexact_array))
    with rx.train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, (MODEL, state), data=points().__iter__().get_state())
    with pytest.raises(ValueError, match=r"not saved by rx.train.fit: its metadata is None"):
        fit(tmp_path)


def test_the_handler_of_signals_is_put_back():
    mine = lambda number, frame: None
    before = signal.signal(signal.SIGTERM, mine)
    try:
        rx.train.fit(MODEL, squares, points(), SGD, steps=1, key=KEY)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
