"""The losses of pairs against their formulas, on one device and around a ring of eight."""

import functools as ft
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import rinsx as rx
from rinsx.nn import _contrastive


def sigmoid(x, y, scale, bias, w):
    """The formula and its derivatives by x, y, scale and bias, pair by pair, in float64."""
    x, y, w = (np.asarray(a, np.float64) for a in (x, y, w))
    total, of_x, of_y, of_scale, of_bias = 0.0, np.zeros_like(x), np.zeros_like(y), 0.0, 0.0
    for i in range(len(x)):
        for j in range(len(y)):
            z, dot = (1 if i == j else -1), float(x[i] @ y[j])
            logit = scale * dot + bias
            total += w[i] * w[j] * np.logaddexp(0, -z * logit)
            slope = -z * w[i] * w[j] / (1 + np.exp(z * logit))
            of_x[i] += slope * scale * y[j]
            of_y[j] += slope * scale * x[i]
            of_scale += slope * dot
            of_bias += slope
    return [total, of_x, of_y, of_scale, of_bias]


def softmax(x, y, scale, w):
    """The formula of CLIP and its derivatives by x, y and scale, logit by logit, in float64."""
    x, y, w = (np.asarray(a, np.float64) for a in (x, y, w))
    rows = [i for i in range(len(w)) if w[i] > 0]
    logits = {(i, j): scale * float(x[i] @ y[j]) for i in rows for j in rows}
    total, of_x, of_y, of_scale = 0.0, np.zeros_like(x), np.zeros_like(y), 0.0
    of_image = {i: np.logaddexp.reduce([logits[i, j] for j in rows]) for i in rows}
    of_text = {j: np.logaddexp.reduce([logits[i, j] for i in rows]) for j in rows}
    for (i, j), logit in logits.items():
        slope = (w[i] * np.exp(logit - of_image[i]) + w[j] * np.exp(logit - of_text[j])) / 2
        if i == j:
            total += w[i] * ((of_image[i] + of_text[i]) / 2 - logit)
            slope -= w[i]
        of_x[i] += slope * scale * y[j]
        of_y[j] += slope * scale * x[i]
        of_scale += slope * float(x[i] @ y[j])
    return [total, of_x, of_y, of_scale]


def data(n, d, seed, zeros=True):
    rng = np.random.default_rng(seed)
    x, y = (rng.normal(size=(n, d)).astype(np.float32) / np.sqrt(d) for _ in range(2))
    w = rng.choice([0.0, 0.5, 1.0, 3.0] if zeros else [1.0], size=n).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(y), jnp.asarray(w)


def slopes(loss, x, y, *scalars):
    """Value and gradient of the total by all arguments, under jit."""
    total = lambda *args: loss(*args)[0]
    args = (x, y, *map(jnp.float32, scalars))
    value, grads = jax.jit(jax.value_and_grad(total, argnums=tuple(range(len(args)))))(*args)
    return [value, *grads]


def close(got, want, tol=2e-5):
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(jax.device_get(a), np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.max(np.abs(a - b), initial=0) <= tol * max(1, np.max(np.abs(b), initial=0)), (a, b)


@ft.cache
def made(loss, piece, scalars):
    """A loss, and its value and gradient by all arguments but weights: compiled once for all examples of one shape."""
    call = lambda w, *args: loss(*args, weights=w, piece=piece)
    grads = jax.value_and_grad(lambda *args: call(*args)[0], argnums=tuple(range(1, 3 + scalars)))
    return jax.jit(call), jax.jit(grads)


def check(loss, formula, piece, x, y, w, given, *scalars):
    value, grads = made(loss, piece, len(scalars))
    args = (given, x, y, *map(jnp.float32, scalars))
    total, weight = value(*args)
    assert total.dtype == weight.dtype == jnp.float32 and weight == np.sum(w)
    total_too, slopes = grads(*args)
    close([total_too, *slopes], formula(x, y, *scalars, w))
    # What is computed without a gradient, apart from it, is the same.
    close([total], [total_too])


@given(
    # One row; pieces of one text, of several, with a last one to fill up; and one piece of all.
    st.sampled_from([(1, 7, 1), (5, 1, 2**28), (12, 7, 1), (12, 7, 130), (5, 7, 60), (5, 7, 300)]),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 10.0]),
    st.sampled_from([-10.0, 0.0, 2.0]),
    st.integers(0, 99),
)
def test_sigmoid_loss_is_the_formula(shape, zeros, scale, bias, seed):
    n, d, piece = shape
    x, y, w = data(n, d, seed, zeros)
    check(rx.nn.sigmoid_loss, sigmoid, piece, x, y, w, w if zeros else None, scale, bias)


@given(
    st.sampled_from([(1, 1), (4, 2**28), (9, 1), (9, 180)]),
    st.booleans(),
    st.sampled_from([0.0, 3.0, 20.0]),
    st.integers(0, 99),
)
def test_softmax_loss_is_the_formula(shape, zeros, scale, seed):
    n, piece = shape
    x, y, w = data(n, 5, seed, zeros)
    check(rx.nn.softmax_loss, softmax, piece, x, y, w, w if zeros else None, scale)


def test_the_losses_of_the_papers():
    """Rows of weight 1, divided by their number: the pseudocode of both papers, in NumPy."""
    x, y, _ = data(6, 4, 0)
    logits = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T * 10 - 10
    labels = 2 * np.eye(6) - 1
    total, weight = made(rx.nn.sigmoid_loss, 2**28, 2)[0](None, x, y, 10.0, -10.0)
    assert np.isclose(total / weight, np.sum(np.log1p(np.exp(-labels * logits))) / 6)
    entropy = lambda logits: -np.mean(np.diag(logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))))
    total, weight = made(rx.nn.softmax_loss, 2**28, 1)[0](None, x, y, 10.0)
    assert np.isclose(total / weight, (entropy(logits) + entropy(logits.T)) / 2)


@pytest.mark.parametrize("loss", [rx.nn.sigmoid_loss, rx.nn.softmax_loss])
def test_rows_of_weight_zero_have_no_influence(loss):
    """Not even where they are not numbers."""
    x, y, _ = data(6, 4, 1)
    w = jnp.array([1.0, 0.0, 2.0, 1.0, 0.0, 1.0])
    keep = np.array([0, 2, 3, 5])
    scalars = (5.0, -3.0) if loss is rx.nn.sigmoid_loss else (5.0,)
    bad = slopes(ft.partial(loss, weights=w, piece=50), x.at[1].set(jnp.nan), y.at[4].set(jnp.inf), *scalars)
    want = slopes(ft.partial(loss, weights=w[keep]), x[keep], y[keep], *scalars)
    for i in (1, 2):
        assert not np.any(bad[i][np.array([1, 4])])
        bad[i] = bad[i][keep]
    close(bad, want, tol=1e-6)


@pytest.mark.parametrize("loss", [rx.nn.sigmoid_loss, rx.nn.softmax_loss])
def test_weights_are_not_differentiated(loss):
    x, y, w = data(6, 4, 1, zeros=False)
    scalars = (5.0, -3.0) if loss is rx.nn.sigmoid_loss else (5.0,)
    grads = jax.grad(lambda w: sum(loss(x, y, *scalars, weights=w)))(w)
    assert not np.any(grads)


@pytest.mark.parametrize("loss", [rx.nn.sigmoid_loss, rx.nn.softmax_loss])
@pytest.mark.parametrize(
    ("first", "second"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32")]
)
def test_embeddings_of_less_precision(loss, first, second):
    """Gradients have the dtype of their inputs, and agree to 1% of the largest with those in float32 at the rounded inputs."""
    x, y, w = data(24, 16, 2)
    x, y = x.astype(first), y.astype(second)
    scalars = (5.0, -3.0) if loss is rx.nn.sigmoid_loss else (5.0,)
    total, weight = loss(x, y, *scalars, weights=w)
    assert total.dtype == weight.dtype == jnp.float32
    wide = x.astype(jnp.float32), y.astype(jnp.float32)
    want = slopes(ft.partial(loss, weights=w), *wide, *scalars)
    for piece in (300, 2**28):
        got = slopes(ft.partial(loss, weights=w, piece=piece), x, y, *scalars)
        assert [a.dtype for a in got[:3]] == [jnp.float32, x.dtype, y.dtype]
        for a, b in zip(got, want, strict=True):
            error = np.max(np.abs(np.asarray(a, np.float32) - b))
            assert error <= 1e-2 * np.max(np.abs(b))
        # The value needs no slopes: products of such numbers are exact in float32.
        close(got[:1], want[:1], tol=1e-5)


def test_gradients_of_many_pieces_are_added_up_in_float32():
    """A thousand equal steps of 1: in bfloat16, sums of ones end at 256."""
    n = 1000
    x, y = jnp.zeros((n, 1), jnp.bfloat16), jnp.ones((n, 1), jnp.bfloat16)
    loss = lambda x: rx.nn.sigmoid_loss(x, y, 1.0, 20.0, piece=1)[0]
    # At a bias of 20 every pair of strangers has a slope of 1, and every right pair one of 0.
    assert np.all(np.abs(np.asarray(jax.grad(loss)(x), np.float32) - 999) <= 4)


#
# The ring
#


def meshes():
    auto = lambda *shape: (AxisType.Auto,) * len(shape)
    make = lambda *shape: jax.make_mesh(shape, tuple("abc"[: len(shape)]), axis_types=auto(*shape))
    explicit = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    one = jax.make_mesh((1,), ("a",), axis_types=auto(1), devices=jax.devices()[:1])
    return {"8x1": rx.train.mesh(), "2x4": rx.train.mesh(4), "2x2x2": make(2, 2, 2), "explicit": explicit, "1": one}


@pytest.mark.parametrize("name", ["8x1", "2x4", "2x2x2", "explicit", "1"])
@pytest.mark.parametrize("piece", [1, 2**28])
def test_the_ring_is_the_formula(name, piece):
    assert jax.device_count() == 8
    mesh = meshes()[name]
    x, y, w = data(24, 5, 3)
    place = lambda a: jax.device_put(a, NamedSharding(mesh, P(mesh.axis_names)))
    loss = lambda x, y, s, b: rx.nn.sigmoid_loss(x, y, s, b, weights=place(w), mesh=mesh, piece=piece)
    want = sigmoid(x, y, 8.0, -4.0, w)
    got = slopes(loss, place(x), place(y), 8.0, -4.0)
    close(got, want)
    assert got[1].sharding.is_equivalent_to(place(x).sharding, 2)
    # Of the value alone, and of arrays that are not shared out yet.
    total, weight = jax.jit(lambda *a: rx.nn.sigmoid_loss(*a, 8.0, -4.0, weights=w, mesh=mesh, piece=piece))(x, y)
    close([total, weight], [want[0], np.sum(w)])


def test_bfloat16_around_the_ring():
    x, y, w = data(16, 8, 4)
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    alone, ring = (
        slopes(lambda *a: rx.nn.sigmoid_loss(*a, weights=w, mesh=mesh), x, y, 8.0, -4.0)
        for mesh in (None, rx.train.mesh())
    )
    # The last rounding, to the dtype of the embeddings, may go either way.
    close(ring, alone, tol=2**-8)


@pytest.mark.parametrize("given", [False, True])
def test_softmax_loss_under_a_mesh(given):
    """Of rows that are shared out already, and of rows that the loss shares out."""
    mesh = rx.train.mesh(2)
    x, y, w = data(24, 5, 3)
    rows = NamedSharding(mesh, P(mesh.axis_names))
    place = lambda a: a if given else jax.device_put(a, rows)
    want = softmax(x, y, 8.0, w)
    for piece in (1, 500, 2**28) if given else (500,):
        options = {"weights": place(w), "piece": piece, "mesh": mesh if given else None}
        got = slopes(ft.partial(rx.nn.softmax_loss, **options), place(x), place(y), 8.0)
        close(got, want)
        if given:
            assert all(slope.sharding.is_equivalent_to(rows, 2) for slope in got[1:3])


@pytest.mark.parametrize("loss", [rx.nn.sigmoid_loss, rx.nn.softmax_loss])
def test_a_mesh_outside_of_jit(loss):
    mesh = rx.train.mesh(2)
    x, y, w = data(8, 5, 3)
    rows = NamedSharding(mesh, P(mesh.axis_names))
    scalars, formula = ((5.0, -3.0), sigmoid) if loss is rx.nn.sigmoid_loss else ((5.0,), softmax)
    want = formula(x, y, *scalars, w)[:1]
    for place in (lambda a: a, lambda a: jax.device_put(a, rows)):
        total, weight = loss(place(x), place(y), *scalars, weights=place(w), mesh=mesh)
        close([total, weight], [*want, np.sum(w)])


#
# What it takes
#

ROWS, WIDTH = 2048, 16


@ft.cache
def compiled(loss, grad, ring, piece):
    mesh = rx.train.mesh(2) if ring else None
    sharding = NamedSharding(mesh, P(mesh.axis_names)) if mesh is not None else None
    rows = lambda *shape: jax.ShapeDtypeStruct((ROWS, *shape), jnp.float32, sharding=sharding)
    scalars = (jnp.float32(8), jnp.float32(-4)) if loss is rx.nn.sigmoid_loss else (jnp.float32(8),)
    total = lambda w, *args: loss(*args, weights=w, piece=piece, mesh=mesh)[0]
    run = jax.value_and_grad(total, argnums=(1, 2, 3)) if grad else total
    return jax.jit(run).lower(rows(), rows(WIDTH), rows(WIDTH), *scalars).compile()


@pytest.mark.parametrize("loss", [rx.nn.sigmoid_loss, rx.nn.softmax_loss])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("ring", [False, True])
def test_the_matrix_of_all_pairs_is_never_in_memory(loss, grad, ring):
    temporary = lambda piece: compiled(loss, grad, ring, piece).memory_analysis().temp_size_in_bytes
    devices = 8 if ring else 1
    # Of a device. A piece of the ring is one of the pairs of two devices.
    assert temporary(2**17) < ROWS * ROWS * 4 / (20 if ring and loss is rx.nn.sigmoid_loss else 5)
    # And it is what takes the memory where the piece is large.
    assert temporary(2**28) >= ROWS * ROWS * 4 / devices**2


@pytest.mark.parametrize("grad", [False, True])
def test_the_ring_gathers_nothing(grad):
    text = compiled(rx.nn.sigmoid_loss, grad, True, 2**17).as_text()
    assert re.search(r"collective-permute(-start)?\(", text)
    assert not re.search(r"all-(gather|to-all)(-start)?\(", text)
    # What is added up over devices are scalars.
    reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    assert reduced and not any("," in shape for all in reduced for shape in re.findall(r"\[(.*?)\]", all))


@pytest.mark.parametrize("piece", [2**11, 2**28])
@pytest.mark.parametrize("ring", [False, True])
def test_flops_of_the_sigmoid_loss(piece, ring):
    n, d = 64, 12
    mesh = rx.train.mesh() if ring else None
    rows, scalar = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    total = lambda *args: rx.nn.sigmoid_loss(*args, mesh=mesh, piece=piece)[0]
    args = (rows, rows, scalar, scalar)
    assert rx.flops.count(total, *args).matmul == 2 * n * n * d
    assert rx.flops.count(jax.value_and_grad(total, argnums=(0, 1, 2, 3)), *args).matmul == 3 * 2 * n * n * d


def test_flops_of_the_softmax_loss():
    """Logits are made twice."""
    n, d = 64, 12
    rows, scalar = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    total = lambda *args: rx.nn.softmax_loss(*args, piece=2**11)[0]
    assert rx.flops.count(total, rows, rows, scalar).matmul == 2 * n * n * d
    cost = rx.flops.count(jax.value_and_grad(total, argnums=(0, 1, 2)), rows, rows, scalar)
    assert cost.matmul == 4 * 2 * n * n * d


#
# What is refused
#


def test_refuses():
    x, y, w = data(6, 4, 0)
    for loss, scalars in ((rx.nn.sigmoid_loss, (1.0, 0.0)), (rx.nn.softmax_loss, (1.0,))):
        with pytest.raises(ValueError, match=r"one shape, \[rows, d\]; got \(6, 4\) and \(5, 4\)"):
            loss(x, y[:5], *scalars)
        with pytest.raises(ValueError, match=r"one shape, \[rows, d\]; got \(0, 4\) and \(0, 4\)"):
            loss(x[:0], y[:0], *scalars)
        with pytest.raises(ValueError, match=r"one weight a row, 6; got the shape \(4,\)"):
            loss(x, y, *scalars, weights=w[:4])
        with pytest.raises(ValueError, match="`piece` is a number of bytes, at least 1; got 0"):
            loss(x, y, *scalars, piece=0)
        with pytest.raises(ValueError, match="a multiple of the 8 devices of the mesh; got 6 rows"):
            loss(x, y, *scalars, mesh=rx.train.mesh())
        with pytest.raises(TypeError, match="mesh"):
            loss(x, y, *scalars, mesh=(4, 2))
    # Without the annotations, which the tests enforce.
    with pytest.raises(TypeError, match=r"`mesh` must be a jax.sharding.Mesh.* got \(4, 2\)"):
        _contrastive._shared_by((4, 2), 6)
    with pytest.raises(ValueError, match="must be of the type Auto; got .*Explicit"):
        rx.nn.softmax_loss(*data(8, 4, 0)[:2], 1.0, mesh=meshes()["explicit"])
