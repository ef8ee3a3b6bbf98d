"""The decoder: against another library's, causal, packed, in every form of recursion; presets as the docs say."""

import dataclasses
import functools as ft
import re
import types
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
import rinsx._attend

from .helpers import examples


CONFIG = rx.models.DecoderConfig(31, width=16, layers=4, heads=4, kv_heads=2, hidden=24, context=8, dtype="float32")
DOCS = Path(__file__).parent.parent / "docs" / "models.md"


def tokens(batch=2, t=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, t)), jnp.int32)


def decoder(signature="A^r B", config=CONFIG, **loops):
    loops = loops or {name: 2 for name in rx.Signature(signature).exponents}
    return make(config, signature, **loops)


@eqx.filter_jit
def make(config, signature, **loops):
    # Compiled as a whole: one by one, the first use of each operation compiles it.
    return rx.models.DecoderLM(config, signature, key=jr.key(0), **loops)


@eqx.filter_jit
def logits_of(model, *args, **kwargs):
    return model(*args, **kwargs)


def reference(model, row):
    """Logits of one row, in NumPy and float64: heads and positions in loops, layers in the order of the signature."""
    f = lambda x: np.asarray(x, np.float64)
    width, dim = model.config.width, model.config.width // model.config.heads
    share = model.config.heads // (model.config.kv_heads or model.config.heads)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * f(scale)

    def turn(x, position):
        out = np.empty(dim)
        for i in range(dim // 2):
            angle = position * model.config.rope_base ** (-2 * i / dim)
            pair = x[i] + 1j * x[i + dim // 2]
            pair *= np.exp(1j * angle)
            out[i], out[i + dim // 2] = pair.real, pair.imag
        return out

    def layer(p, x):
        h = norm(x, p.attention_norm.scale)
        q, k, v = (h @ f(m.weight) for m in (p.attention.q, p.attention.k, p.attention.v))
        mixed = np.zeros((len(x), width))
        for head in range(model.config.heads):
            own, group = slice(head * dim, (head + 1) * dim), slice(head // share * dim, (head // share + 1) * dim)
            for t in range(len(x)):
                scores = np.array([turn(q[t, own], t) @ turn(k[s, group], s) / np.sqrt(dim) for s in range(t + 1)])
                weights = np.exp(scores - scores.max())
                mixed[t, own] = weights / weights.sum() @ v[: t + 1, group]
        x = x + mixed @ f(p.attention.out.weight)
        h = norm(x, p.mlp_norm.scale)
        up = h @ f(p.mlp.up.weight)
        if p.mlp.gate is None:
            bent = f(jax.nn.gelu(jnp.asarray(up)))
        else:
            gate = h @ f(p.mlp.gate.weight)
            bent = gate / (1 + np.exp(-gate)) * up
        return x + bent @ f(p.mlp.down.weight)

    x = f(model.embedding.weight)[np.asarray(row)]
    rounds = {name: loop.rounds for name, loop in model.body.loops.items()}
    signature = model.body.signature.bind(**rounds) if rounds else model.body.signature
    for name in signature.visits:
        stack = model.body.blocks[name]
        for i in range(stack.depth):
            x = layer(jtu.tree_map(lambda w: w[i] if eqx.is_array(w) else w, stack.layers), x)
    head = f(model.embedding.weight).T if model.head is None else f(model.head.weight)
    return norm(x, model.norm.scale) @ head


@pytest.mark.parametrize(
    ("signature", "tied", "mlp"),
    [("A B", True, "swiglu"), ("A^r B", False, "gelu"), ("(A^r B)^s", True, "gelu"), ("A B^r", False, "swiglu")],
)
def test_equals_a_reference_in_numpy(signature, tied, mlp):
    config = rx.models.DecoderConfig(31, 16, 4, 4, kv_heads=2, hidden=24, mlp=mlp, tied=tied, dtype="float32")
    model = decoder(signature, config)
    row = tokens(1)
    np.testing.assert_allclose(logits_of(model, row)[0], reference(model, row[0]), atol=2e-5)


@examples(8)
@given(st.integers(0, 7), st.integers(0, 30), st.sampled_from(["A B", "(A B)^r", "A^r B^s"]))
def test_a_token_changes_no_logits_before_it(place, token, signature):
    model = decoder(signature)
    before = tokens()
    after = jnp.where(jnp.arange(8) == place, token, before)
    a, b = logits_of(model, before), logits_of(model, after)
    assert jnp.array_equal(a[:, :place], b[:, :place])
    if (before[:, place] != token).all():
        assert not jnp.allclose(a[:, place], b[:, place])


@examples(8)  # each length compiles
@given(st.lists(st.integers(1, 5), min_size=2, max_size=3), st.integers(0, 2**16), st.sampled_from(["A B", "A^r B"]))
def test_a_document_is_deaf_to_the_one_before_it_bit_for_bit(lengths, seed, signature):
    texts = [
        bytes(np.random.default_rng([seed, i]).integers(97, 123, n).tolist()).decode() for i, n in enumerate(lengths)
    ]
    other = [texts[0][::-1].upper(), *texts[1:]]
    total = sum(lengths) + len(lengths)
    config = rx.models.presets["nano"]
    model = make(config, signature, **({"r": 3} if "r" in signature else {}))

    def logits(texts):
        data = rx.data.tokenize(rx.data.documents(texts), rx.data.Bytes())
        window = rx.data.Windows(data, total)[0]
        batch = {name: jnp.asarray(window[name])[None] for name in ("tokens", "segments", "positions")}
        return logits_of(model, batch["tokens"], segments=batch["segments"], positions=batch["positions"])[0]

    a, b = logits(texts), logits(other)
    first = lengths[0] + 1
    assert jnp.array_equal(a[first:], b[first:])
    assert not jnp.array_equal(a[:first], b[:first])


def test_a_packed_document_is_what_it_is_alone():
    model = decoder()
    whole = tokens(1, 8)
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]])
    packed = logits_of(model, whole, segments=segments, positions=positions)
    alone = jnp.concatenate([logits_of(model, whole[:, :3]), logits_of(model, whole[:, 3:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


def test_models_of_one_key_start_from_the_same_layers():
    layers = lambda model: jnp.concatenate([b.layers.mlp.up.weight for b in model.body.blocks.values()])
    a = layers(decoder("A B"))
    b = layers(make(CONFIG, "A B^r C", split=(1, 2, 1), r=3))
    c = layers(decoder("A^r"))
    assert jnp.array_equal(a, b) and jnp.array_equal(a, c)


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": rx.adapters.NormLinear(16, rounds=4, key=jr.key(3))},
        {"inject": rx.injection.Add(), "start": rx.start.Normal()},
        {"gradient": rx.gradient.Last(1)},
        {"gradient": rx.gradient.Remat()},
    ],
    ids=["adapter", "latent", "last", "remat"],
)
def test_traced_depth_trains_as_static_depth_does(options):
    batch = {"tokens": tokens(), "targets": tokens(seed=1)}
    traced = decoder("A^r B", dataclasses.replace(CONFIG, layers=2), r=rx.Loop(2, max=3, **options))
    loss = lambda model, r: rx.models.DecoderLM.loss(rx.with_rounds(model, r=r), batch, jr.key(5))[0]
    gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    for r in (1, 3):
        a, b = gradient(traced, r), gradient(traced, jnp.int32(r))
        leaves = lambda x: jtu.tree_leaves(eqx.filter(x, eqx.is_inexact_array))
        assert len(leaves(a)) == len(leaves(b)) > 10
        for x, y in zip(leaves(a), leaves(b)):
            np.testing.assert_allclose(x, y, atol=2e-4, rtol=2e-4)


def test_bfloat16_is_close_and_logits_are_float32():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    model = decoder(config=config)
    logits = logits_of(model, tokens())
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array)))
    exact = logits_of(decoder(), tokens())
    assert float(jnp.abs(logits - exact).max()) < 0.1 and not jnp.array_equal(logits, exact)


@jax.jit
@ft.partial(jax.value_and_grad, argnums=(0, 1, 2))
def loss_at_once(hidden, head, weights, targets):
    right = jax.nn.log_softmax(hidden @ head)
    return -jnp.sum(weights * jnp.take_along_axis(right, targets[..., None], -1)[..., 0])


@pytest.mark.parametrize("t", [1, 7, 8])
@pytest.mark.parametrize("piece", [1, 200, 10**6])
def test_the_loss_in_pieces_is_the_loss(t, piece):
    @jax.jit
    @ft.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def cut(hidden, head, weights, targets):
        return 3 * rx.nn.cross_entropy(hidden, head, targets, weights, piece=piece)[0]

    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, t, 6)).astype(np.float32), rng.normal(size=(6, 11)).astype(np.float32)
    targets = rng.integers(11, size=(2, t)).astype(np.int32)
    for weights in (np.ones((2, t), np.float32), (rng.random((2, t)) > 0.3).astype(np.float32)):
        (value, grads), (want, wants) = (f(hidden, head, weights, targets) for f in (cut, loss_at_once))
        np.testing.assert_allclose(value, 3 * want, rtol=1e-5)
        for a, b in zip(grads, wants):
            np.testing.assert_allclose(a, 3 * b, atol=1e-4)


@pytest.mark.parametrize("piece", [200, 10**6])
@pytest.mark.parametrize("dtype", [bool, jnp.int32, jnp.bfloat16])
def test_the_loss_takes_weights_of_any_kind(piece, dtype):
    hidden, head = jr.normal(jr.key(0), (2, 8, 6)), jr.normal(jr.key(1), (6, 11))
    weights = jnp.arange(16).reshape(2, 8) % 3 > 0
    loss = lambda hidden, weights: rx.nn.cross_entropy(hidden, head, jnp.zeros((2, 8), int), weights, piece=piece)
    total, count = loss(hidden, weights.astype(dtype))
    assert total.dtype == count.dtype == jnp.float32 and count == weights.sum()
    slope = lambda weights: jax.grad(lambda hidden: loss(hidden, weights)[0])(hidden)
    np.testing.assert_allclose(slope(weights.astype(dtype)), slope(weights.astype(jnp.float32)), rtol=1e-5)


def test_the_loss_in_pieces_holds_one_piece_and_applies_the_head_once():
    batch, t, width, vocab = 2, 64, 16, 1000
    args = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((batch, t, width), jnp.float32),
            ((width, vocab), jnp.float32),
            ((batch, t), jnp.int32),
            ((batch, t), jnp.float32),
        ]
    ]
    piece = 4 * batch * 4 * vocab
    grad = jax.grad(lambda h, w, y, m: rx.nn.cross_entropy(h, w, y, m, piece=piece)[0], (0, 1))
    whole = jax.grad(lambda h, w, y, m: rx.nn.cross_entropy(h, w, y, m)[0], (0, 1))
    compiled = [jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes for f in (grad, whole)]
    assert compiled[0] < 8 * piece < compiled[1]
    assert (
        rx.flops.count(grad, *args).matmul == rx.flops.count(whole, *args).matmul == 3 * 2 * batch * t * width * vocab
    )


@examples(8)
@given(st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)]), st.booleans())
def test_attention_equals_that_of_jax(heads, segmented):
    q_heads, groups = heads
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 7, 8)), jnp.float32) for n in (q_heads, groups, groups))
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1]]) if segmented else None
    mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    swap = lambda x: x.swapaxes(1, 2)
    theirs = jax.jit(ft.partial(jax.nn.dot_product_attention, is_causal=True))
    expected = swap(theirs(swap(q), swap(k), swap(v), mask=mask))
    np.testing.assert_allclose(jax.jit(rx.nn.attention)(q, k, v, segments), expected, atol=1e-5)


@pytest.mark.parametrize("t, s", [(7, 7), (8, 8), (7, 5), (6, 5), (7, 6)])
@pytest.mark.parametrize(
    "causal, segmented, window", [(True, False, None), (True, True, None), (True, False, 3), (False, False, None)]
)
def test_what_is_given_to_the_kernel_is_of_even_length(t, s, causal, segmented, window):
    """The kernel of a GPU refuses gradients of odd lengths: here its stand-in is given the same arrays."""
    if s != t and causal:
        return
    of = lambda i, heads, n: jr.normal(jr.key(i), (2, heads, n, 8))
    q, k, v = of(0, 4, t), of(1, 2, s), of(2, 2, s)
    segments = jnp.arange(t) // 3 * jnp.ones((2, 1), jnp.int32) if segmented else None
    lengths = []

    def stand_in(q, k, v, **options):
        lengths.extend((q.shape[1], k.shape[1]))
        return jax.nn.dot_product_attention(q, k, v, **(options | {"implementation": "xla"}))

    with pytest.MonkeyPatch.context() as patch:
        theirs = types.SimpleNamespace(**{**vars(jax.nn), "dot_product_attention": stand_in})
        patch.setattr(rinsx._attend, "jax", types.SimpleNamespace(**{**vars(jax), "nn": theirs}))
        out = rinsx._attend._kernel(q, k, v, segments, causal, window)
    assert not any(n % 2 for n in lengths)
    np.testing.assert_allclose(out, rx.nn.attention(q, k, v, segments, causal=causal, window=window), atol=1e-5)


def test_weights_are_float32_where_the_default_is_not():
    with jax.enable_x64(True):
        parts = (
            rx.models.DecoderLM(CONFIG, "A B", key=jr.key(0)),
            rx.nn.LayerNorm(4),
            rx.nn.Linear(4, 4, bias=True, key=jr.key(0)),
        )
        assert {x.dtype for x in jax.tree.leaves(eqx.filter(parts, eqx.is_inexact_array))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", rx.models.presets)
@pytest.mark.parametrize("signature", ["A B", "A^r B"])
def test_every_preset_is_traced_lowered_and_counted(name, signature):
    config = rx.models.presets[name]
    loops = {"r": rx.Loop(3, max=4)} if "r" in signature else {}
    model = eqx.filter_eval_shape(lambda: rx.models.DecoderLM(config, signature, key=jr.key(0), **loops))
    shape = jax.ShapeDtypeStruct((2, config.context), jnp.int32)
    batch = {"tokens": shape, "targets": shape}
    cost = rx.train.cost(rx.models.DecoderLM.loss, model, batch)
    forward = rx.flops.count(lambda model, tokens: model(tokens), model, shape)
    visits = config.layers // 2 * (sum(rx.Signature(signature).bind(r=3).counts.values()) if loops else 2)
    dim, t, width = config.width // config.heads, config.context, config.width
    layer = 2 * t * (4 * width**2 + 3 * width * config.hidden) + 2 * 2 * t * t * config.heads * dim
    assert forward.matmul == 2 * (visits * layer + 2 * t * width * config.vocab_size)
    assert cost.matmul >= 2.9 * forward.matmul
    arrays, rest = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def step(arrays, batch):
        return eqx.filter_grad(lambda model: rx.models.DecoderLM.loss(model, batch)[0])(eqx.combine(arrays, rest))

    text = jax.jit(lambda arrays, batch: eqx.filter(step(arrays, batch), eqx.is_array)).lower(arrays, batch).as_text()
    assert "stablehlo.dot_general" in text


def test_the_docs_show_every_preset_as_it_is():
    text = DOCS.read_text("utf-8").partition("## Presets of encoders")[0]
    rows = dict(re.findall(r"^\| `([\w-]+)` \|(.*)\|$", text, re.MULTILINE))
    assert set(rows) == set(rx.models.presets)
    for name, config in rx.models.presets.items():
        cells = [cell.strip() for cell in rows[name].split("|")]
        assert cells == preset_row(config), name


def preset_row(config):
    """Parameters in millions, and millions of FLOPs a token in training for `A B` and `A^3 B`, everything stored."""
    costs = []
    for rounds in (1, 3):
        # Rolled costs the same, and is traced once.
        loop = rx.Loop(rounds, gradient=rx.gradient.Full(), unroll=False)
        make = lambda: rx.models.DecoderLM(config, "A^r B", unroll=False, key=jr.key(0), r=loop)
        model = eqx.filter_eval_shape(make)
        shape = jax.ShapeDtypeStruct((1, config.context), jnp.int32)
        cost = rx.train.cost(rx.models.DecoderLM.loss, model, {"tokens": shape, "targets": shape}).matmul
        costs.append(f"{cost / config.context / 1e6:,.2f}")
    parameters = rx.flops.parameters(model).unique
    shape = [config.width, config.layers, config.heads, config.hidden, config.vocab_size, config.context]
    return [*map(str, shape), config.dtype, f"{parameters / 1e6:,.2f}", *costs]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decoder("A B C"), "4 layers cannot be shared equally by the 3 blocks"),
        (lambda: rx.models.DecoderLM(CONFIG, "A B", split=(1, 2), key=jr.key(0)), r"got \(1, 2\)"),
        (lambda: rx.models.DecoderConfig(31, 0, 4, 4), "`width` must be at least 1; got 0"),
        (lambda: rx.models.DecoderConfig(31, 16, 4, 4, dtype="float16"), "'float16'"),
        (lambda: rx.nn.Attention(16, heads=3, key=jr.key(0)), "width=16 and heads=3"),
        (lambda: rx.nn.Attention(16, heads=4, kv_heads=3, key=jr.key(0)), "kv_heads=3 and heads=4"),
        (lambda: rx.nn.MLP(4, 4, kind="relu", key=jr.key(0)), "'relu'"),
        (lambda: rx.nn.rotary(jnp.arange(3), 5), "even size; got 5"),
        (lambda: rx.nn.Linear(0, 3, key=jr.key(0)), "`inputs` must be at least 1; got 0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make, message):
    # In the tests the annotations are checked too, and may be first.
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=message):
        make()
