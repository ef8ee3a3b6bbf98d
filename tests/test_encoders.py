"""The encoders of images and texts: against a reference in NumPy, at every size, in every form of recursion."""

import dataclasses
import functools as ft
import math
import re
from pathlib import Path

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import pytest
from hypothesis import given

import rinsx as rx

from .helpers import examples


IMAGE = rx.models.ViTConfig(8, patch=4, width=16, layers=4, heads=4, hidden=24, classes=5, dtype="float32")
TEXT = rx.models.TextConfig(31, context=6, width=16, layers=4, heads=4, hidden=24, outputs=12, dtype="float32")
DOCS = Path(__file__).parent.parent / "docs" / "models.md"


def make(kind, config, signature, **loops):
    """A model whose biases, norms and adapters are not those of the start. Nothing is compiled for it."""
    model = eqx.filter_eval_shape(lambda: kind(config, signature, key=jr.key(0), **loops))
    arrays, rest = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    rng = np.random.default_rng(0)
    # Of the size that they start with: one over the root of the inputs; norms near one.
    draw = lambda x: rng.normal(size=x.shape) * (x.shape[-2] ** -0.5 if x.ndim > 1 else 0.3)
    role = rx.train.roles(arrays)
    fill = lambda x, role: jnp.asarray(draw(x) + (role == "norm"), x.dtype)
    return eqx.combine(jtu.tree_map(fill, arrays, role), rest)


@eqx.filter_jit
def call(model, *args, **kwargs):
    return model(*args, **kwargs)


def images(batch=2, size=(8, 8), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, *size, 3)), jnp.float32)


def tokens(batch=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 31, (batch, 6)), jnp.int32)


#
# The reference: one row at a time, heads in a loop, float64.
#


def f(x):
    return np.asarray(x, np.float64)


def linear(p, x):
    return x @ f(p.weight) + f(p.bias)


def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + p.epsilon) * f(p.scale) + f(p.bias)


def gelu(x, kind):
    if kind == "gelu_exact":
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(p, x):
    return linear(p.down, gelu(linear(p.up, x), p.kind))


def attend(p, queries, x, heads):
    q, k, v = linear(p.q, queries), linear(p.k, x), linear(p.v, x)
    dim = q.shape[1] // heads
    out = np.zeros_like(q)
    for head in range(heads):
        own = slice(head * dim, (head + 1) * dim)
        for t in range(len(q)):
            scores = np.exp([q[t, own] @ k[s, own] / math.sqrt(dim) for s in range(len(x))])
            out[t, own] = scores / scores.sum() @ v[:, own]
    return linear(p.out, out)


def encode(encoder, x, heads):
    rounds = {name: loop.rounds for name, loop in encoder.body.loops.items()}
    signature = encoder.body.signature.bind(**rounds) if rounds else encoder.body.signature
    for name in signature.visits:
        stack = encoder.body.blocks[name]
        for i in range(stack.depth):
            p = jtu.tree_map(lambda w: w[i] if eqx.is_array(w) else w, stack.layers)
            h = norm(p.attention_norm, x)
            x = x + attend(p.attention, h, h, heads)
            x = x + mlp(p.mlp, norm(p.mlp_norm, x))
    x = norm(encoder.norm, x)
    if encoder.pool == "map":
        pool = encoder.attention_pool
        out = attend(pool, f(pool.query)[None], x, heads)[0]
        return out + mlp(pool.mlp, norm(pool.norm, out))
    return {"mean": x.mean(0), "first": x[0], "last": x[-1]}[encoder.pool]


def reference_of_image(model, image):
    config = model.config
    rows, columns = (n // config.patch for n in image.shape[:2])
    cut = lambda i, j: image[i * config.patch :, j * config.patch :][: config.patch, : config.patch].ravel()
    x = linear(model.patches, np.stack([cut(i, j) for i in range(rows) for j in range(columns)]))
    if model.positions is None:
        at = np.zeros((rows * columns, config.width))
        for i in range(rows):
            for j in range(columns):
                for n in range(quarter := config.width // 4):
                    rate = 10_000.0 ** (-n / (quarter - 1))
                    four = [math.sin(j * rate), math.cos(j * rate), math.sin(i * rate), math.cos(i * rate)]
                    at[i * columns + j, n::quarter] = four
    else:
        at = f(model.positions.weight)
    if model.token is not None:
        x = np.concatenate([f(model.token)[None], x])
        at = at if model.positions is not None else np.concatenate([np.zeros((1, config.width)), at])
    out = encode(model.encoder, x + at, config.heads)
    return out if model.head is None else linear(model.head, out)


@pytest.mark.parametrize(
    ("signature", "pool", "positions", "mlp", "classes"),
    [
        ("A B", "map", "learned", "gelu", None),
        ("A^r B", "first", "learned", "gelu_exact", 5),
        ("(A^r B)^s", "mean", "sincos", "gelu", 5),
        ("A B^r", "first", "sincos", "gelu", None),
    ],
)
def test_vit_equals_a_reference_in_numpy(signature, pool, positions, mlp, classes):
    config = dataclasses.replace(IMAGE, pool=pool, positions=positions, mlp=mlp, classes=classes)
    model = make(rx.models.ViT, config, signature, **dict.fromkeys(rx.Signature(signature).exponents, 2))
    x = images()
    expected = [reference_of_image(model, f(image)) for image in x]
    np.testing.assert_allclose(call(model, x), expected, atol=2e-5)


@pytest.mark.parametrize(("signature", "pool"), [("A^r B", "last"), ("A B^r", "map"), ("A B", "mean")])
def test_text_encoder_equals_a_reference_in_numpy(signature, pool):
    config = dataclasses.replace(TEXT, pool=pool)
    model = make(rx.models.TextEncoder, config, signature, **dict.fromkeys(rx.Signature(signature).exponents, 3))
    x = tokens()
    embed = lambda row: f(model.tokens.weight)[row] + f(model.positions.weight)
    expected = [linear(model.head, encode(model.encoder, embed(row), config.heads)) for row in np.asarray(x)]
    np.testing.assert_allclose(call(model, x), expected, atol=2e-5)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_patches_are_cut_row_by_row(size, rows, columns, channels, seed):
    x = np.random.default_rng(seed).normal(size=(2, rows * size, columns * size, channels)).astype(np.float32)
    cut = rx.nn.patches(jnp.asarray(x), size)
    assert cut.shape == (2, rows * columns, size * size * channels)
    for n in range(rows * columns):
        i, j = n // columns * size, n % columns * size
        np.testing.assert_array_equal(cut[:, n], x[:, i : i + size, j : j + size].reshape(2, -1))


@examples(6)  # each size compiles
@given(st.sampled_from([(4, 4), (8, 12), (16, 8)]), st.sampled_from(["learned", "sincos"]))
def test_any_size_that_the_patch_divides(size, positions):
    config = dataclasses.replace(IMAGE, positions=positions, pool="mean", classes=None)
    model = make(rx.models.ViT, config, "A^r B", r=2)
    grid = size[0] // 4, size[1] // 4
    assert model.hidden(images(1, size)).shape == (1, grid[0] * grid[1], 16)
    if positions == "learned":
        # Positions that do not differ are what they were at any size, and so are patches that do not.
        same = eqx.tree_at(lambda m: m.positions.weight, model, jnp.broadcast_to(model.positions.weight[0], (4, 16)))
        np.testing.assert_allclose(call(same, jnp.ones((1, *size, 3))), call(same, jnp.ones((1, 8, 8, 3))), atol=1e-5)


def test_positions_are_resized_linearly_between_patches():
    model = make(rx.models.ViT, dataclasses.replace(IMAGE, pool="mean"), "A B")
    row, column = jnp.meshgrid(jnp.arange(2.0), jnp.arange(2.0), indexing="ij")
    plane = (row + 10 * column).reshape(4, 1) * jnp.ones(16)
    model = eqx.tree_at(lambda m: m.positions.weight, model, plane)
    _, at = model._positions((4, 4))
    # The centre of a patch in the finer grid, in patches of the coarser one, no further out than the outermost centre.
    centre = np.clip((np.arange(4) + 0.5) / 2 - 0.5, 0, 1)
    expected = centre[:, None] + 10 * centre[None, :]
    np.testing.assert_allclose(at.reshape(4, 4, 16)[..., 0], expected, atol=1e-5)


@examples(6)
@given(st.sampled_from([("A^r B", {"r": 3}), ("(A B)^r", {"r": 2}), ("A B^r", {"r": 1})]), st.integers(0, 9))
def test_rounds_at_run_time_equal_static_ones(given_, seed):
    signature, rounds = given_
    model = make(rx.models.ViT, IMAGE, signature, r=rx.Loop(2, max=4))
    x = images(seed=seed)
    deep = lambda model, r: rx.with_rounds(model, r=r)(x)
    static = eqx.filter_jit(deep)(model, rounds["r"])
    np.testing.assert_allclose(eqx.filter_jit(deep)(model, jnp.int32(rounds["r"])), static, atol=1e-5)


@examples(8)
@given(
    st.sampled_from([(4, 4), (4, 2), (6, 3)]), st.sampled_from([(7, 7), (1, 5), (3, 8)]), st.booleans(), st.integers(0, 9)
)  # fmt: skip
def test_attention_to_all_equals_that_of_jax(heads, lengths, segmented, seed):
    rng = np.random.default_rng(seed)
    t, s = lengths
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, n, m, 8)), jnp.float32)
        for n, m in ((heads[0], t), (heads[1], s), (heads[1], s))
    )
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, t)), axis=1), jnp.int32) if segmented and t == s else None
    mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    swap = lambda x: x.swapaxes(1, 2)
    expected = swap(jax.jit(jax.nn.dot_product_attention)(swap(q), swap(k), swap(v), mask=mask))
    ours = jax.jit(ft.partial(rx.nn.attention, causal=False))(q, k, v, segments)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_layer_norm_equals_that_of_equinox():
    x = 3 + 2 * jr.normal(jr.key(0), (4, 7, 12))
    ours = rx.nn.LayerNorm(12, epsilon=1e-5)
    theirs = eqx.nn.LayerNorm(12, eps=1e-5)
    np.testing.assert_allclose(ours(x), jax.vmap(jax.vmap(theirs))(x), atol=1e-5)
    assert ours(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_bfloat16_stays_near_float32():
    full = make(rx.models.ViT, IMAGE, "A^r B", r=2)
    half = make(rx.models.ViT, dataclasses.replace(IMAGE, dtype="bfloat16"), "A^r B", r=2)
    a, b = call(full, images()), call(half, images())
    assert b.dtype == jnp.float32 and not jnp.array_equal(a, b)
    np.testing.assert_allclose(b, a, atol=0.1)


def test_the_loss_of_a_classifier_leaves_out_rows_of_weight_zero():
    model = make(rx.models.ViT, IMAGE, "A^r B", r=2)
    x, labels = images(3), jnp.array([0, 3, 4])
    logits = f(call(model, x))
    right = [logits[i, n] - np.log(np.exp(logits[i]).sum()) for i, n in enumerate(labels)]
    total, weight = model.loss({"images": x, "labels": labels})
    np.testing.assert_allclose((total, weight), (-sum(right), 3), rtol=1e-5)
    total, weight = model.loss({"images": x, "labels": labels, "weights": jnp.array([1.0, 0.0, 1.0])})
    np.testing.assert_allclose((total, weight), (-right[0] - right[2], 2), rtol=1e-5)
    # A label that is no class is seen, where it counts.
    for wrong in (-1, 5):
        batch = {"images": x, "labels": jnp.array([0, wrong, 4])}
        assert jnp.isnan(model.loss(batch)[0])
        assert model.loss({**batch, "weights": jnp.array([1.0, 0.0, 1.0])})[0] == total


def test_adapters_and_keys_reach_the_layers():
    key = jr.key(3)
    loop = rx.Loop(
        2, max=3, adapter=rx.adapters.NormLinear(16, rounds=3, past="last", key=key), start=rx.start.Normal()
    )
    loop = dataclasses.replace(loop, inject=rx.injection.Add())
    model = make(rx.models.ViT, IMAGE, "A^r B", r=loop)
    a, b = (call(model, images(), key=jr.key(i)) for i in range(2))
    assert not jnp.allclose(a, b)
    grads = eqx.filter_jit(eqx.filter_grad(lambda m: jnp.sum(m(images(), key=key))))(model)
    assert all(jnp.any(leaf != 0) for leaf in jtu.tree_leaves(grads.encoder.body.loops["r"].adapter))


@pytest.mark.parametrize("name", rx.models.vit_presets)
def test_every_preset_is_traced_lowered_and_counted(name):
    config = dataclasses.replace(rx.models.vit_presets[name], classes=10)
    half = config.layers // 2
    build = lambda: rx.models.ViT(config, "A^r B", split=(half, config.layers - half), key=jr.key(0), r=3)
    model = eqx.filter_eval_shape(build)
    n, width = math.prod(config.grid), config.width
    shape = jax.ShapeDtypeStruct((2, *config.size, 3), jnp.float32)
    forward = rx.flops.count(lambda model, x: model(x), model, shape)
    visits = config.layers + 2 * half
    layer = 2 * n * (4 * width**2 + 2 * width * config.hidden) + 4 * n * n * width
    # The query of the pool is mapped once for all rows.
    pool = 4 * n * width**2 + 2 * (width**2 + 2 * width * config.hidden) + 4 * n * width
    ends = 2 * n * width * 3 * config.patch**2 + 2 * width * 10
    assert forward.matmul == 2 * (visits * layer + pool + ends) + 2 * width**2
    batch = {"images": shape, "labels": jax.ShapeDtypeStruct((2,), jnp.int32)}
    cost = rx.train.cost(rx.models.ViT.loss, model, batch)
    assert cost.matmul >= 2.9 * forward.matmul
    arrays, rest = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    step = lambda arrays, batch: jax.grad(lambda a: eqx.combine(a, rest).loss(batch)[0])(arrays)
    assert "stablehlo.dot_general" in jax.jit(step).lower(arrays, batch).as_text()


def test_the_docs_show_every_preset_as_it_is():
    text = DOCS.read_text("utf-8").partition("## Presets of encoders")[2]
    rows = dict(re.findall(r"^\| `([\w/-]+)` \|(.*)\|$", text, re.MULTILINE))
    assert set(rows) == set(rx.models.vit_presets) == set(rx.models.siglip_presets)
    for name in rows:
        assert [cell.strip() for cell in rows[name].split("|")] == preset_row(name), name


def preset_row(name):
    """Shapes of both towers, their parameters in millions, and GFLOPs of a pair in training for `A B` and `A^3 B` in both."""
    config = rx.models.siglip_presets[name]
    half = config.image.layers // 2
    costs = []
    for rounds in (1, 3):
        loop = {
            "split": (half, config.image.layers - half),
            "key": jr.key(0),
            # Rolled costs the same, and is traced once.
            "unroll": False,
            "r": rx.Loop(rounds, gradient=rx.gradient.Full(), unroll=False),
        }
        towers = lambda: (
            rx.models.ViT(config.image, "A^r B", **loop),
            rx.models.TextEncoder(config.text, "A^r B", **loop),
        )
        model = eqx.filter_eval_shape(lambda: rx.models.SigLIP(*towers()))
        batch = {
            "images": jax.ShapeDtypeStruct((1, *config.image.size, 3), jnp.float32),
            "tokens": jax.ShapeDtypeStruct((1, config.text.context), jnp.int32),
        }
        costs.append(f"{rx.train.cost(rx.models.SigLIP.loss, model, batch).matmul / 1e9:,.2f}")
    millions = lambda tree: f"{rx.flops.parameters(tree).unique / 1e6:,.2f}"
    image, text = config.image, config.text
    shape = [f"{image.size[0]}", *map(str, (image.width, image.layers, image.heads, image.hidden))]
    return [*shape, f"{text.vocab_size}", f"{text.context}", millions(model.image), millions(model.text), *costs]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(IMAGE, size=(8, 10)), "8 x 10 pixels .* patches of 4 x 4; 8 x 8 or 8 x 12 could"),
        (lambda: rx.nn.patches(jnp.ones((1, 3, 8, 3)), 4), "3 x 8 pixels .*; 4 x 8 or 4 x 8 could"),
        (lambda: rx.models.ViT(IMAGE, key=jr.key(0))(jnp.ones((1, 8, 8, 1))), r"3 channels .* got \(1, 8, 8, 1\)"),
        (lambda: rx.models.ViT(IMAGE, "A B C", key=jr.key(0)), "4 layers cannot be shared equally by the 3 blocks"),
        (lambda: dataclasses.replace(IMAGE, pool="last"), "no summary"),
        (lambda: dataclasses.replace(IMAGE, pool="max"), "'max'"),
        (lambda: dataclasses.replace(IMAGE, positions="rotary"), "'rotary'"),
        (lambda: dataclasses.replace(IMAGE, classes=0), "`classes` must be at least 1; got 0"),
        (lambda: dataclasses.replace(TEXT, dtype="float16"), "'float16'"),
        (lambda: rx.nn.sincos((2, 2), 6), "multiple of 4, and 8 at least; got 6"),
        (lambda: rx.nn.AttentionPool(16, heads=3, hidden=8, key=jr.key(0)), "width=16 and heads=3"),
        (lambda: rx.models.TextEncoder(TEXT, key=jr.key(0))(jnp.zeros((2, 5), int)), r"6 tokens; got .*\(2, 5\)"),
        (lambda: rx.models.ViT(dataclasses.replace(IMAGE, classes=None), key=jr.key(0)).loss({}), "without a head"),
        (lambda: rx.nn.attention(*[jnp.ones((1, 1, n, 4)) for n in (2, 3, 3)]), "as many queries as keys; got 2 and 3"),
        (lambda: rx.nn.attention(*[jnp.ones((1, 1, 2, 4))] * 3, causal=False, window=2), "got window=2"),
        (
            lambda: rx.models.ViT(IMAGE, "A^r B", r=rx.Loop(2, cache=rx.cache.First()), key=jr.key(0))(images()),
            "only causal attention keeps keys and values",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make, message):
    # In the tests the annotations are checked too, and may be first.
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=message):
        make()
