"""Two towers: what they compute, how their loops are named, that they train, alike on any mesh."""

import dataclasses
import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import rinsx as rx


IMAGE = rx.models.ViTConfig(8, patch=4, width=16, layers=2, heads=2, hidden=24, dtype="float32")
TEXT = rx.models.TextConfig(31, context=6, width=12, layers=2, heads=2, hidden=16, outputs=16, dtype="float32")


@eqx.filter_jit
def siglip(image="A^r B", text="A^s B", dtype="float32", **loops):
    of = lambda signature: {n: loops.get(n, rx.Loop(2, max=3)) for n in rx.Signature(signature).exponents}
    keys = jr.split(jr.key(0))
    return rx.models.SigLIP(
        rx.models.ViT(dataclasses.replace(IMAGE, dtype=dtype), image, key=keys[0], **of(image)),
        rx.models.TextEncoder(dataclasses.replace(TEXT, dtype=dtype), text, key=keys[1], **of(text)),
    )


def batch(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "images": jnp.asarray(rng.normal(size=(rows, 8, 8, 3)), jnp.float32),
        "tokens": jnp.asarray(rng.integers(0, 31, (rows, 6)), jnp.int32),
    }


def test_logits_are_scaled_products_of_unit_vectors():
    model, x = siglip(), batch()
    model = eqx.tree_at(lambda m: (m.log_scale, m.bias), model, (jnp.log(3.0), jnp.float32(-0.5)))
    images, texts = model.embed_images(x["images"]), model.embed_texts(x["tokens"])
    for found, raw in ((images, model.image(x["images"])), (texts, model.text(x["tokens"]))):
        np.testing.assert_allclose(found, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(model(x["images"], x["tokens"]), 3 * images @ texts.T - 0.5, atol=1e-5)


def test_it_starts_as_published():
    model = siglip()
    np.testing.assert_allclose((jnp.exp(model.log_scale), model.bias), (10, -10), rtol=1e-6)
    published = rx.models.siglip_presets["B/16"]
    shapes = eqx.filter_eval_shape(
        lambda: rx.models.SigLIP(
            rx.models.ViT(published.image, key=jr.key(0)), rx.models.TextEncoder(published.text, key=jr.key(0))
        )
    )
    # That of google/siglip-base-patch16-224.
    assert rx.flops.parameters(shapes).unique == 203_155_970


@pytest.mark.parametrize("softmax", [False, True])
def test_the_loss_is_that_of_its_logits(softmax):
    model, x = siglip(), batch()
    weights = jnp.array([1.0, 1, 0, 1, 0, 1, 1, 1])
    kept = np.asarray(weights) > 0
    logits = np.asarray(model(x["images"], x["tokens"]), np.float64)[kept][:, kept]
    if softmax:
        ways = [np.log(np.exp(z).sum(1)) - np.diag(z) for z in (logits, logits.T)]
        expected = np.sum(ways) / 2
    else:
        expected = np.log1p(np.exp(-logits * (2 * np.eye(6) - 1))).sum()
    total, weight = model.loss({**x, "weights": weights}, softmax=softmax)
    np.testing.assert_allclose((total, weight), (expected, 6), rtol=1e-5)


def test_loops_of_the_towers_are_set_together_or_apart():
    x = batch()
    same, apart = siglip("A^r B", "A^r B"), siglip("A^r B", "A^s B")
    both = lambda model: (model.embed_images(x["images"]), model.embed_texts(x["tokens"]))
    changed = lambda a, b: [not np.allclose(p, q, atol=1e-6) for p, q in zip(both(a), both(b))]
    assert changed(same, rx.with_rounds(same, r=1)) == [True, True]
    assert changed(apart, rx.with_rounds(apart, r=1)) == [True, False]
    assert changed(apart, rx.with_rounds(apart, s=3)) == [False, True]


def test_any_callables_are_towers():
    towers = [rx.nn.Linear(5, 4, key=jr.key(i)) for i in range(2)]
    model = rx.models.SigLIP(*towers)
    total, weight = model.loss({"images": jnp.ones((3, 5)), "tokens": jnp.ones((3, 5))})
    assert weight == 3 and jnp.isfinite(total)


def test_a_vector_of_zeros_has_a_gradient():
    model = rx.models.SigLIP(*[rx.nn.Linear(5, 4, key=jr.key(i)) for i in range(2)])
    grads = eqx.filter_grad(lambda m: m.loss({"images": jnp.zeros((3, 5)), "tokens": jnp.ones((3, 5))})[0])(model)
    assert all(jnp.isfinite(leaf).all() for leaf in jtu.tree_leaves(grads))


def test_keys_reach_both_towers():
    start = rx.Loop(2, start=rx.start.Normal(), inject=rx.injection.Add())
    model, x = siglip(r=start, s=start), batch()
    a, b = (model.embed_images(x["images"], key=jr.key(i)) for i in range(2))
    c, d = (model.embed_texts(x["tokens"], key=jr.key(i)) for i in range(2))
    assert not jnp.allclose(a, b) and not jnp.allclose(c, d)


def test_towers_in_bfloat16_are_near_those_in_float32():
    """To the 8 bits of bfloat16, through both towers, two rounds of one, the loss and back."""
    wide, narrow = (siglip("A^r B", "A B", dtype=dtype, r=rx.Loop(2)) for dtype in ("float32", "bfloat16"))
    x = batch()

    @eqx.filter_jit
    @ft.partial(eqx.filter_value_and_grad, has_aux=True)
    def run(model):
        total, weight = model.loss(x)
        return total, (weight, model.embed_images(x["images"]), model.embed_texts(x["tokens"]))

    ((total, (weight, *vectors)), want), ((near, (near_weight, *near_vectors)), found) = run(wide), run(narrow)
    for a, b in zip(near_vectors, vectors):
        assert a.dtype == jnp.float32
        assert 1e-4 < np.max(np.abs(a - b)) < 0.02
        # Unit vectors are made in float32.
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-6)
    assert near.dtype == near_weight.dtype == jnp.float32
    np.testing.assert_allclose((near, near_weight), (total, weight), rtol=0.01)
    assert all(leaf.dtype == jnp.float32 for leaf in jtu.tree_leaves(found))
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jtu.tree_leaves(tree)])
    assert np.linalg.norm(flat(found) - flat(want)) < 0.05 * np.linalg.norm(flat(want))


def fit(mesh, **options):
    batches = [batch(16, seed) for seed in range(4)]
    loss = rx.models.SigLIP.loss if mesh is None else ft.partial(rx.models.SigLIP.loss, mesh=mesh)
    laws = {"r": rx.depth.Binomial(3, skip="1/2"), "s": 2}
    # Adam would blow up the rounding of gradients that are zero, such as those of the biases of keys.
    optimizer = optax.sgd(0.1)
    return rx.train.fit(siglip(), loss, batches, optimizer, steps=4, key=jr.key(1), depth=laws, mesh=mesh, **options)


def near(a, b, atol):
    leaves = [jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array)) for tree in (a, b)]
    for x, y in zip(*leaves, strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


def test_it_trains_alike_on_one_device_and_around_the_ring():
    one, ring = fit(None), fit(rx.train.mesh(2))
    assert one.flops == ring.flops
    near(one.model, ring.model, 2e-5)
    moved = [one.model.log_scale - jnp.log(10.0), one.model.bias + 10]
    assert all(abs(x) > 1e-4 for x in moved)


class Tower(eqx.Module):
    """Small, and so quick to compile."""

    linear: rx.nn.Linear

    def __call__(self, x, key=None):
        return self.linear(x)


def linear(**options):
    return rx.models.SigLIP(*[Tower(rx.nn.Linear(5, 4, key=jr.key(i))) for i in range(2)], **options)


def rows(number, seed, weights):
    rng = np.random.default_rng(seed)
    x = {name: jnp.asarray(rng.normal(size=(number, 5)), jnp.float32) for name in ("images", "tokens")}
    return {**x, "weights": jnp.asarray(weights, jnp.float32)}


def test_softmax_trains_alike_on_one_device_and_on_eight():
    batches = [rows(16, seed, [1, 0.5, 0, 1] * 4) for seed in range(4)]

    def fit(mesh):
        loss = ft.partial(rx.models.SigLIP.loss, mesh=mesh, softmax=True)
        return rx.train.fit(linear(), loss, batches, optax.sgd(0.1), steps=4, key=jr.key(1), mesh=mesh).model

    one, eight = fit(None), fit(rx.train.mesh(2))
    near(one, eight, 1e-5)
    assert abs(one.log_scale - jnp.log(10.0)) > 1e-3


@pytest.mark.parametrize("softmax", [False, True])
def test_a_mesh_shares_out_the_rows_of_either_loss(softmax):
    mesh, x = rx.train.mesh(2), rows(16, 0, [1, 0.5, 0, 1] * 4)
    run = lambda x: jax.grad(lambda images: linear().loss({**x, "images": images}, mesh=mesh, softmax=softmax)[0])(
        x["images"]
    )
    slope = jax.jit(run)(x)
    assert slope.sharding.is_equivalent_to(NamedSharding(mesh, P(("replica", "shard"))), 2)
    with pytest.raises(ValueError, match="a multiple of the 8 devices of the mesh; got 6 rows"):
        linear().loss(rows(6, 0, [1] * 6), mesh=mesh, softmax=softmax)
    with pytest.raises(TypeError, match="mesh"):
        linear().loss(x, mesh="shard", softmax=softmax)


@pytest.mark.parametrize("softmax", [False, True])
def test_accumulation_adds_up_the_losses_of_the_parts(softmax):
    """Each part, every third row, has negatives of its own; weights are unlike from part to part."""
    model, x = linear(scale=3.0, bias=0.0), rows(12, 0, [1, 1, 0, 1, 0, 0.5, 1, 1, 1, 1, 1, 0])
    loss = ft.partial(rx.models.SigLIP.loss, softmax=softmax)
    parts = [jtu.tree_map(lambda rows: rows[i::3], x) for i in range(3)]

    def mean(model):
        totals, counts = zip(*(loss(model, part) for part in parts))
        return sum(totals) / sum(counts)

    value, slope = eqx.filter_jit(eqx.filter_value_and_grad(mean))(model)
    run = rx.train.fit(model, loss, [x], optax.sgd(0.1), steps=1, key=jr.key(1), accumulate=3)
    near(run.model, eqx.apply_updates(model, jtu.tree_map(lambda g: -0.1 * g, slope)), 1e-6)
    # Which is not the loss of the whole.
    total, weight = loss(model, x)
    assert abs(total / weight - value) > 0.1


def test_it_learns_pairs_by_heart_at_every_depth_it_was_trained_at():
    x = batch(8)
    law = {"r": rx.depth.Uniform(1, 2), "s": rx.depth.Uniform(1, 2)}
    optimizer = rx.train.adamw(rx.train.cosine(1e-2))
    run = rx.train.fit(
        siglip(), rx.models.SigLIP.loss, [x] * 60, optimizer, steps=60, key=jr.key(1), depth=law, steps_per_call=20
    )
    for r in (1, 2):
        deep = rx.with_rounds(run.model, r=r, s=r)
        assert (deep(x["images"], x["tokens"]).argmax(1) == jnp.arange(8)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rx.models.SigLIP(abs, abs, scale=0.0), "`scale` must be positive; got 0.0"),
        (lambda: rx.models.SigLIPConfig(IMAGE, dataclasses.replace(TEXT, outputs=8)), "got 16 of images, 8 of texts"),
        (
            lambda: siglip().loss({"images": batch(4)["images"], "tokens": batch(3)["tokens"]}),
            r"as many images as texts.*\(4, 16\) of images, \(3, 16\) of texts",
        ),
        (lambda: jax.eval_shape(rx.with_rounds, siglip(), t=2), "t"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
