"""The contestants of the benchmark of SigLIP's speed compute the same, from the same weights."""

import contextlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rinsx as rx
from rinsx.train._step import gradient


BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _siglip_peers
import _siglip_steps as steps
import siglip_speed


CONFIG = siglip_speed.Config(quick=True, batch=4)


@pytest.fixture(scope="module")
def case():
    shape = siglip_speed.shape_of(CONFIG)
    images, tokens = _siglip_peers.make_batch(**siglip_speed.batch_of(shape, CONFIG.batch))
    return shape, {"images": jnp.asarray(images), "tokens": jnp.asarray(tokens)}


def close(found, wanted, tolerance):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * (1e-3 + np.max(np.abs(y))))


@pytest.fixture(scope="module")
def mine(case):
    """The model of rinsx, and its loss, weight and gradient."""
    shape, batch = case
    model = jax.jit(lambda: steps.build(shape))()
    return model, *jax.jit(lambda m: gradient(rx.models.SigLIP.loss, m, batch, jax.random.key(0)))(model)


@pytest.mark.parametrize("scanned", [False, True])
def test_by_hand_has_the_loss_the_gradient_and_the_embeddings(case, mine, scanned):
    shape, batch = case
    model, slopes, loss, weight = mine
    params = steps.weights_of(model, scanned)
    value, grads = jax.jit(jax.value_and_grad(lambda p: steps.loss(p, batch, shape)))(params)
    assert weight == CONFIG.batch
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    # The same selection of arrays serves gradients.
    close(grads, steps.weights_of(slopes, scanned), 1e-3)
    vectors = model.embed_images(batch["images"]), model.embed_texts(batch["tokens"])
    close(steps.embed(params, batch, shape), vectors, 1e-4)


def test_steps_are_the_same(case):
    shape, batch = case
    made = siglip_speed.in_jax(shape, batch, 2, recursive=False)
    firsts = {name: made[name]().check(2) for name in ("rinsx", "JAX by hand, unrolled")}
    losses, norm = firsts["rinsx"]
    assert losses[1] < losses[0] and norm > 0
    assert siglip_speed.same(firsts, 1e-4) < 1e-4
    wrong = firsts | {"wrong": ([losses[0], losses[1] * 1.01], norm)}
    with pytest.raises(SystemExit, match="differ"):
        siglip_speed.same(wrong, 1e-4)


def test_transformers_has_the_loss_and_the_gradient(case, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    shape, batch = case
    rx.pretrained.save(steps.build(shape), tmp_path)
    worker = _siglip_peers.Worker()
    given = siglip_speed.batch_of(shape, CONFIG.batch)
    worker.build(folder=str(tmp_path), compiled=False, threads=1, batch=given, adamw=steps.ADAMW)
    answer = worker.check(steps=2)
    firsts = {
        "rinsx": steps.by_rinsx(steps.build(shape), batch, 2).check(2),
        "transformers": (answer["losses"], answer["norm"]),
    }
    assert siglip_speed.same(firsts, 1e-4) < 1e-4


def test_without_pytorch_a_line_says_so(case, capsys):
    with contextlib.ExitStack() as stack:
        found = siglip_speed.in_torch(CONFIG, case[0], stack, siglip_speed.Console(width=160))
    assert found == {}
    assert "without transformers on PyTorch" in capsys.readouterr().out


def test_more_work_counts_as_more_flops(case):
    shape, batch = case
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    plain, deep = (steps.flops(steps.build(shape, s, stored=True), structs) for s in ("A B", "A^r B"))
    # One of two layers of each tower is visited once more; the rest is the embedding, the pool and the loss.
    assert plain * 1.2 < deep < plain * 1.5


def test_utilisation_is_the_share_of_the_peak():
    times = {what: {"rinsx": [2.0, 1.0, 3.0], "other": [1.0, 1.0, 1.0]} for what in ("step", "embed")}
    found = siglip_speed.row("other", 8, times, 40, 100.0)
    assert found["step"]["ratio"] == 2 and found["step"]["ratio_of_best"] == 1
    assert found["step"]["images_per_s"] == 8 and found["utilisation"] == 0.4
