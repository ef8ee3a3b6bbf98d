"""Checkpoints: bit for bit, kept by rule, never half there, and damage is noticed."""

import logging
import pathlib
import random
import shutil
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from rinsx import train


def layout(*names):
    return jax.sharding.NamedSharding(jax.make_mesh((8,), ("d",)), jax.sharding.PartitionSpec(*names))


def bits(x):
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jr.key_data(x)
    return np.asarray(x).tobytes()


def everything():
    return {
        "bf16": jr.normal(jr.key(0), (16, 8), jnp.bfloat16),
        "special": jnp.asarray([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32),
        "ints": jnp.arange(-3, 5, dtype=jnp.int8),
        "bools": jnp.asarray([True, False]),
        "key": jr.key(3),
        "keys": jr.split(jr.key(4, impl="rbg"), 3),
        "numpy": np.arange(3.0),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(2),
        "numpy scalar": np.int64(2**40 + 1),
        "numpy float": np.float64(0.1),
        "numpy without axes": np.array(0.1),
        "empty keys": jr.split(jr.key(5), 0),
        "sharded": jax.device_put(jr.normal(jr.key(1), (16, 8)), layout("d")),
        "function": jax.nn.relu,
        "number": 3,
    }


def zeros_like(state):
    def zero(x):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jr.wrap_key_data(jnp.zeros_like(jr.key_data(x)), impl=jr.key_impl(x))
        if isinstance(x, np.generic):
            return type(x)(0)
        if isinstance(x, np.ndarray):
            return np.zeros_like(x)
        return jax.device_put(jnp.zeros_like(x), x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(zero, state)


def test_restores_bit_for_bit(tmp_path):
    state = everything()
    with train.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(state) is None
        checkpoints.save(7, state, data={"next": [1]}, metrics={"loss": 0.1, "x": float("nan")}, metadata="why")
        found = checkpoints.restore_latest(zeros_like(state))
    assert (found.step, found.data, found.metadata) == (7, {"next": [1]}, "why")
    assert found.metrics == {"loss": 0.1, "x": None}
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    for name, x in state.items():
        y = found.state[name]
        if hasattr(x, "dtype"):
            assert type(x) is type(y) and x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y), name
        else:
            assert x is y
    assert found.state["sharded"].sharding == state["sharded"].sharding


def test_restores_into_another_sharding(tmp_path):
    x = jr.normal(jr.key(1), (16, 8), jnp.bfloat16)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jax.device_put(x, layout("d"))})
        for like in (
            jax.device_put(jnp.zeros_like(x), layout(None, "d")),
            jnp.zeros_like(x),
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout()),
        ):
            found = checkpoints.restore_latest({"x": like}).state["x"]
            assert found.sharding == like.sharding and bits(found) == bits(x)


def test_shapes_restore_what_arrays_do(tmp_path):
    state = {name: x for name, x in everything().items() if hasattr(x, "dtype")}
    state["sharded keys"] = jax.device_put(jr.split(jr.key(6), 8), layout("d"))

    def shape(x):
        sharding = x.sharding if isinstance(x, jax.Array) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        found = checkpoints.restore_latest({name: shape(x) for name, x in state.items()}).state
    for name, x in state.items():
        y = found[name]
        assert isinstance(y, jax.Array if isinstance(x, jax.Array) else np.ndarray), name
        assert x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y), name
        assert not isinstance(x, jax.Array) or y.sharding.is_equivalent_to(x.sharding, x.ndim), name


def test_state_may_be_donated_once_save_returns(tmp_path):
    x = jnp.arange(2_000_000.0)
    kept, array = np.array(x), np.arange(5.0)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, (x, array))
        array[:] = -1
        x = overwrite(x)
        x.block_until_ready()
        found = checkpoints.restore_latest((x, array)).state
    assert np.array_equal(found[0], kept) and np.array_equal(found[1], np.arange(5.0))


def test_keeps_the_last_and_the_best(tmp_path):
    losses = {1: 3.0, 2: 0.5, 3: 2.0, 4: float("nan"), 5: 0.7, 6: 4.0, 7: 5.0}
    with train.Checkpoints(tmp_path, keep=2, keep_best=2, every=3) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, jnp.full(2, float(step)), metrics={"loss": loss})
        checkpoints.wait()
        assert checkpoints.steps == (2, 5, 6, 7)
        assert checkpoints.restore_best(jnp.zeros(2)).step == 2
        assert checkpoints.restore_latest(jnp.zeros(2)).step == 7
        assert [step for step in range(10) if checkpoints.due(step)] == [3, 6, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{step:09d}" for step in (2, 5, 6, 7)]


def test_another_model_is_refused_by_the_first_array_that_differs(tmp_path):
    model = eqx.nn.MLP(2, 2, 4, depth=1, key=jr.key(0))
    wider = eqx.nn.MLP(2, 2, 5, depth=1, key=jr.key(0))
    deeper = eqx.nn.MLP(2, 2, 4, depth=2, key=jr.key(0))
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model)
        with pytest.raises(ValueError, match=r"layers\[0\].weight: float32\[4, 2\].*float32\[5, 2\]"):
            checkpoints.restore_latest(wider)
        with pytest.raises(ValueError, match=r"array 2 .*layers\[1\].weight: float32\[2, 4\].*float32\[4, 4\]"):
            checkpoints.restore_latest(deeper)
    with train.Checkpoints(tmp_path / "list") as checkpoints:
        checkpoints.save(1, [jnp.ones(1)])
        with pytest.raises(ValueError, match=r"array 1 is nothing, .* is \[1\]: float32\[1\]"):
            checkpoints.restore_latest([jnp.ones(1), jnp.ones(1)])


def test_a_run_that_did_not_restore_removes_nothing(tmp_path):
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, jnp.ones(1))
    with train.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="step 5, later than step 2"):
            checkpoints.save(2, jnp.ones(1))
    with pytest.raises(ValueError, match="keep"):
        train.Checkpoints(tmp_path, keep=0)


def test_a_step_can_be_saved_again(tmp_path):
    with train.Checkpoints(tmp_path, keep=1) as checkpoints:
        for value in (1.0, 2.0, 3.0):
            checkpoints.save(5, jnp.full(1, value))
        assert float(checkpoints.restore_latest(jnp.ones(1)).state[0]) == 3
        assert checkpoints.steps == (5,)
    assert len(list(tmp_path.iterdir())) == 1


def test_every_damage_is_noticed(tmp_path):
    """Each file is cut, changed in its middle, and removed; the checkpoint before is used then, and goes on."""
    state = {"x": jr.normal(jr.key(0), (64,)), "key": jr.key(1)}
    whole = tmp_path / "whole"
    with train.Checkpoints(whole) as checkpoints:
        checkpoints.save(1, jax.tree.map(lambda x: x, state), metrics={"loss": 1.0})
        checkpoints.save(2, state, metrics={"loss": 0.5})
    files = [p.relative_to(whole) for p in (whole / "000000002").rglob("*") if p.is_file()]
    assert len(files) > 5
    folder = tmp_path / "damaged"
    with train.Checkpoints(folder) as checkpoints:
        for file in files:
            for damage in ("cut", "changed", "removed"):
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(whole, folder)
                path, content = folder / file, bytearray((folder / file).read_bytes())
                if damage == "removed":
                    path.unlink()
                elif content:
                    content[len(content) // 2] ^= 1
                    path.write_bytes(content[:-1] if damage == "cut" else content)
                else:
                    continue
                with pytest.warns(UserWarning, match="000000002 is damaged"):
                    assert checkpoints.restore_latest(state).step == 1
        checkpoints.save(2, state)
        assert checkpoints.restore_latest(state).step == 2
        for path in folder.glob("*/checkpoint.json"):
            path.write_text("{}")
        with pytest.warns(UserWarning, match="damaged"), pytest.raises(RuntimeError, match="all 2"):
            checkpoints.restore_latest(state)


LOOP = """
import sys, warnings
warnings.simplefilter("error")
import jax.numpy as jnp
from rinsx import train
with train.Checkpoints(sys.argv[1], keep=2, keep_best=0) as checkpoints:
    found = checkpoints.restore_latest(jnp.zeros(100_000))
    start = 0 if found is None else found.step
    if found is not None:
        assert bool((found.state == start).all()) and found.data == start
    print("ready", flush=True)
    for step in range(start + 1, 10_000):
        checkpoints.save(step, jnp.full(100_000, float(step)), data=step)
"""


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path):
    random.seed(0)
    done = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            # With a damaged or missing checkpoint the process would have failed before this.
            assert process.stdout.readline() == b"ready\n", process.stderr.read().decode()
            time.sleep(0.3 + random.random())
            assert process.poll() is None
        finally:
            process.kill()
            # Nothing of orbax in the terminal.
            assert process.communicate()[1] == b""
        steps = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
        assert max(steps, default=0) >= done
        done = max(steps, default=0)
    assert done > 1
    with train.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(jnp.zeros(100_000)).step == done


def test_what_fails_in_the_background_is_raised(tmp_path):
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, jnp.ones(2))
    checkpoints.wait()
    with pytest.raises(TypeError):
        checkpoints.save(2, jnp.ones(2), data=object())
    checkpoints._finish, finish = lambda *_: pathlib.Path(tmp_path / "no" / "file").read_text(), checkpoints._finish
    checkpoints.save(2, jnp.ones(2))
    with pytest.raises(FileNotFoundError):
        checkpoints.wait()
    checkpoints._finish = finish
    checkpoints.close()
    assert checkpoints.steps == (1,)


def test_other_logs_of_absl_still_pass(caplog):
    train.Checkpoints("unused").close()
    with caplog.at_level(logging.INFO, logger="absl"):
        logging.getLogger("absl").info("mine")
    assert "mine" in caplog.text
