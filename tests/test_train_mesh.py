"""Training on eight devices, and by two processes, against training on one device."""

import functools as ft
import shutil
import socket

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import rinsx as rx

from .test_train_resume import finish, lines, start, weights


LOSS = rx.models.DecoderLM.loss
KEY = jr.key(7)


def decoder():
    config = rx.models.DecoderConfig(31, 16, 2, 2, hidden=24, context=8, dtype="float32")
    return rx.models.DecoderLM(config, key=jr.key(0))


def data(steps, rows=8):
    rng = np.random.default_rng(0)
    tokens = rng.integers(31, size=(steps, rows, 9)).astype(np.int32)
    weights = rng.integers(4, size=(steps, rows, 8)).astype(np.float32)
    return [{"tokens": t[:, :-1], "targets": t[:, 1:], "weights": w} for t, w in zip(tokens, weights)]


ADAM = rx.train.adamw(rx.train.cosine(1e-2))


def fit(model, mesh, *, steps=3, loss=LOSS, batches=None, optimizer=ADAM, **options):
    batches = data(steps) if batches is None else batches
    return rx.train.fit(model, loss, batches, optimizer, steps=steps, key=KEY, mesh=mesh, **options)


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def stacked(tree):
    """Whether each array is of a stack."""
    inside = lambda node: isinstance(node, rx.nn.Stack)
    mark = lambda node: jax.tree.map(lambda x: inside(node), eqx.filter(node, eqx.is_array))
    return jax.tree.leaves(jax.tree.map(mark, tree, is_leaf=inside))


class Layer(eqx.Module):
    weight: jax.Array

    def __init__(self, key):
        self.weight = jr.normal(key, (8, 8)) / 8

    def __call__(self, x):
        return x + x @ self.weight


def looped():
    """Has as many layers as there are devices, a key, and arrays that no number of devices divides."""
    blocks = {"A": rx.nn.Stack.make(Layer, 8, key=jr.key(0), unroll=False), "B": Layer(jr.key(1))}
    body = rx.compose("A^r B", blocks, r=2)
    return {
        "body": body,
        "in": jr.normal(jr.key(3), (16, 8)) / 8,
        "key": jr.key(2),
        "odd": jnp.ones(7),
        "n": jnp.arange(8),
    }


def looped_loss(model, batch, key):
    x, weight = batch
    y = jnp.tanh(model["body"](x @ model["in"])) * (1 + 0.1 * jr.normal(key, (8,)))
    rows = jnp.sum((y - model["odd"][0]) ** 2, axis=1) + 0 * jr.normal(model["key"])
    return jnp.sum(rows * weight), jnp.sum(weight)


def looped_data(steps, rows=8):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(rows, 16)), rng.random(rows)) for _ in range(steps)]


def numbers(tree):
    """The arrays in float32, keys too."""
    typed = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return [np.asarray(jr.key_data(x) if typed(x) else x.astype(jnp.float32)) for x in arrays(tree)]


@ft.cache
def alone():
    give = {"loss": looped_loss, "batches": looped_data(3)}
    return fit(looped(), None, depth={"r": [1, 2, 2]}, steps_per_call=2, **give)


@pytest.mark.parametrize("shards", [1, 4, 8])
def test_a_mesh_reaches_the_result_of_one_device(shards):
    mesh = rx.train.mesh(shards)
    assert dict(mesh.shape) == {"replica": 8 // shards, "shard": shards}
    assert jax.device_count() == 8
    model = rx.train.place(looped(), mesh)
    give = {"loss": looped_loss, "batches": looped_data(3)}
    run = fit(model, mesh, depth={"r": [1, 2, 2]}, steps_per_call=2, **give)
    # Adam divides small gradients by themselves: what differs by rounding is seen enlarged.
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(numbers(run.model), numbers(alone().model), strict=True))
    assert run.flops == alone().flops
    assert not any(x.is_deleted() for x in arrays(model))
    for tree, matrices in ((model, 3), (run.model, 3), (run.state, 6)):
        cut = 0
        for x, in_stack in zip(arrays(tree), stacked(tree), strict=True):
            shard = x.addressable_shards[0].data.shape
            assert len(x.sharding.device_set) == 8
            if x.ndim >= 2 and shards > 1:
                # Cut once, along the longest axis but that of the layers.
                cut += 1
                longest = 1 if in_stack else 0
                want = list(x.shape)
                want[longest] //= shards
                assert shard == tuple(want)
            else:
                assert shard == x.shape
        assert cut == (matrices if shards > 1 else 0)
    rounds = {"r": [1, 3]}
    found = rx.train.evaluate(run.model, looped_loss, looped_data(2), rounds=rounds, mesh=mesh)
    want = rx.train.evaluate(alone().model, looped_loss, looped_data(2), rounds=rounds)
    assert list(found) == list(want) == [(1,), (3,)]
    assert all(np.isclose(found[depth].mean, want[depth].mean, rtol=1e-4) for depth in want)


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_other_optimisers_reach_the_result_of_one_device(kind):
    optimizer = getattr(rx.train, kind)(rx.train.cosine(1e-2))
    give = {"loss": looped_loss, "batches": looped_data(3), "optimizer": optimizer}
    one, cut = (fit(looped(), mesh, **give) for mesh in (None, rx.train.mesh(4)))
    moved = [not np.allclose(a, b) for a, b in zip(numbers(one.model), numbers(looped()), strict=True)]
    assert sum(moved) >= 3
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(numbers(one.model), numbers(cut.model), strict=True))


def test_a_decoder_is_cut():
    model = rx.train.place(decoder, rx.train.mesh(8))
    # All matrices are multiples of eight, but for the embedding of 31 tokens, whose width is.
    cut = [x.size == 8 * x.addressable_shards[0].data.size for x in arrays(model) if x.size > 32]
    assert len(cut) > 8
    assert all(cut)


def nested():
    inner = lambda key: rx.nn.Stack.make(Layer, 8, key=key)
    return {**looped(), "stack": rx.nn.Stack.make(inner, 8, key=jr.key(0))}


def test_the_axes_of_layers_are_not_cut():
    mesh = rx.train.mesh(8)
    for model in (rx.train.place(nested(), mesh), rx.train.place(nested, mesh)):
        assert model["stack"].layers.layers.weight.addressable_shards[0].data.shape == (8, 8, 1, 8)
        assert model["in"].addressable_shards[0].data.shape == (2, 8)
        assert model["odd"].addressable_shards[0].data.shape == (7,)
        assert model["n"].addressable_shards[0].data.shape == (8,)
        for a, b in zip(numbers(model), numbers(nested()), strict=True):
            assert np.allclose(a, b, atol=1e-6)
        # Placing again moves nothing.
        again = rx.train.place(model, mesh)
        assert all(a is b for a, b in zip(arrays(again), arrays(model), strict=True))
        other = rx.train.place(model, rx.train.mesh(1))
        assert other["in"].addressable_shards[0].data.shape == (16, 8)


def plain(model, batch, key):
    x, weight = batch
    return jnp.sum(weight * jnp.sum(jnp.tanh(x @ model) ** 2, axis=1)), jnp.sum(weight)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_accumulation_on_a_mesh(accumulate):
    """Also where parts have fewer rows than there are devices, and for a model that was not placed."""
    give = {"loss": plain, "batches": looped_data(3), "accumulate": accumulate, "steps_per_call": 2}
    found = fit(looped()["in"], rx.train.mesh(4), **give)
    want = fit(looped()["in"], None, **give)
    assert np.allclose(found.model, want.model, atol=1e-4)
    assert found.model.addressable_shards[0].data.shape == (4, 8)


def test_compiles_once_on_a_mesh():
    mesh = rx.train.mesh(4)
    # A function of its own, that nothing was compiled for.
    loss = lambda model, batch, key: plain(model, batch, key)
    programs = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: programs.append(event) if "backend_compile" in event else None
    )

    def count(steps):
        programs.clear()
        batches = looped_data(steps)
        fit(looped()["in"], mesh, steps=steps, loss=loss, batches=batches, steps_per_call=2)
        return len(programs)

    assert count(2) > 0
    # However many calls, with steps left over, nothing is compiled any more.
    assert count(9) == 0


def test_bfloat16():
    model = looped()
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model)

    def loss(model, batch, key):
        return looped_loss(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch), key)

    give = {"loss": loss, "batches": looped_data(2), "steps": 2, "accumulate": 2}
    want = fit(model, None, **give)
    found = fit(rx.train.place(model, rx.train.mesh(8)), rx.train.mesh(8), **give)
    assert all(x.dtype == jnp.bfloat16 for x in arrays(found.model) if jnp.issubdtype(x.dtype, jnp.floating))
    assert all(np.allclose(a, b, atol=0.03) for a, b in zip(numbers(found.model), numbers(want.model), strict=True))


def test_a_checkpoint_of_one_mesh_on_another(tmp_path):
    """Saved in parts by four devices, gone on with by eight."""

    def part(folder, steps, shards):
        with rx.train.Checkpoints(folder) as checkpoints:
            return fit(
                looped()["in"],
                rx.train.mesh(shards),
                steps=steps,
                loss=plain,
                batches=Stream(looped_data(6)),
                optimizer=SGD,
                checkpoints=checkpoints,
            )

    part(tmp_path / "a", 3, 4)
    found, want = part(tmp_path / "a", 6, 8), part(tmp_path / "b", 6, 1)
    assert found.step == want.step == 6
    assert found.flops == want.flops
    assert np.allclose(found.model, want.model, atol=1e-4)
    assert found.model.addressable_shards[0].data.shape == (2, 8)


SGD = optax.sgd(0.1, momentum=0.9)


class Stream:
    def __init__(self, batches):
        self.batches, self.n = batches, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.n += 1
        return self.batches[self.n - 1]

    def get_state(self):
        return self.n

    def set_state(self, n):
        self.n = n


def test_what_a_mesh_refuses():
    with pytest.raises(ValueError, match="divide the number of devices, 8; got 3"):
        rx.train.mesh(3)
    with pytest.raises(ValueError, match="divide the number of devices, 8; got 0"):
        rx.train.mesh(0)
    with pytest.raises(ValueError, match="multiple of the 8 devices of the mesh; got 6"):
        fit(looped()["in"], rx.train.mesh(), loss=plain, batches=looped_data(1, rows=6), steps=1)
    with pytest.raises(ValueError, match="multiple of the 8 devices of the mesh; got 4"):
        rx.train.evaluate(looped()["in"], plain, looped_data(1, rows=4), mesh=rx.train.mesh())


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes_reach_the_result_of_one(tmp_path):
    """Stopped half-way by a signal to one of them, then started again from what both saved: by two, and by one alone."""
    one = start(tmp_path / "one", toy=False)
    want, _ = finish(one)

    def two(**options):
        port = free_port()
        told = [
            start(
                tmp_path / "two",
                toy=False,
                port=port,
                processes=2,
                process=i,
                devices=4,
                shards=4,
                place=bool(i),
                log=["metrics", "other"][i],
                **options,
            )
            for i in range(2)
        ]
        return [finish(process)[0] for process in told]

    first, second = two(signal=4)
    assert first == second
    assert first["stopped"] == "SIGTERM"
    # It came after step 4. All know of it once the next call is settled: at 6, which is evaluated.
    assert first["step"] == 6
    assert (tmp_path / "two" / "checkpoints" / "000000006").is_dir()
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    alone = start(tmp_path / "alone", toy=False)
    first, second = two()
    assert first == second
    assert (first["step"], first["stopped"], first["flops"]) == (want["step"], None, want["flops"])
    for name, value in want["metrics"].items():
        assert np.isclose(first["metrics"][name], value, rtol=1e-3)
    last, _ = finish(alone)
    assert (last["step"], last["flops"]) == (want["step"], want["flops"])
    for folder in ("two", "alone"):
        for a, b in zip(weights(tmp_path / folder), weights(tmp_path / "one"), strict=True):
            assert np.allclose(a, b, atol=1e-3)
    # Process 0 alone writes, and each step once.
    assert not (tmp_path / "two" / "other.jsonl").exists()
    found, whole = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert [(x["step"], x.get("flops"), x.get("tokens")) for x in found] == [
        (x["step"], x.get("flops"), x.get("tokens")) for x in whole
    ]
    assert np.allclose([x["loss"] for x in found], [x["loss"] for x in whole], rtol=1e-3)
