"""Decoding with a cache computes what the full forward pass computes, whatever the recursion."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax import lax

import rinsx as rx

from ._naive_decoder import decode as naive
from .helpers import examples


WIDTH, TOKENS = 8, 7
CONFIG = rx.models.DecoderConfig(11, WIDTH, 2, 2, kv_heads=1, hidden=16, context=TOKENS, dtype="float32")
PROMPT = jr.randint(jr.key(9), (2, TOKENS), 0, 11)


def model_of(signature="A^r B", config=CONFIG, **options):
    return rx.models.DecoderLM(config, signature, key=jr.key(0), **options)


@eqx.filter_jit
def decoded(model, cache, tokens, sizes, counts=None):
    """Logits of all tokens, run in pieces of the given sizes."""
    out, at = [], 0
    for i, n in enumerate(sizes):
        given = None if counts is None else counts[i]
        hidden, cache = model.decode(tokens[:, at : at + n], cache, counts=given)
        out.append(model.logits(hidden))
        at += n
    return jnp.concatenate(out, 1), cache


FORMS = [{}, {"separate": True}, {"aligned": True, "chunk": 4}, {"separate": True, "aligned": True, "chunk": 3}]


@examples(10)
@given(
    signature=st.sampled_from(["A^r B", "(A B)^r", "A B^r", "A B^r A", "(A^r B)^2", "A^r B A^r"]),
    option=st.sampled_from(["plain", "low-rank", "norm-linear", "inject", "gated"]),
    rounds=st.integers(1, 3),
    traced=st.booleans(),
    form=st.sampled_from(FORMS),
    sizes=st.sampled_from([(7,), (1,) * 7, (3, 1, 1, 2)]),
)
def test_decoding_is_the_full_forward_pass(signature, option, rounds, traced, form, sizes):
    key = jr.key(5)
    options = {
        "plain": {},
        "low-rank": {"adapter": rx.adapters.LowRank(WIDTH, rank=2, rounds=3, key=key)},
        "norm-linear": {"adapter": rx.adapters.NormLinear(WIDTH, past="last", key=key)},
        "inject": {"inject": rx.injection.Add(), "start": rx.start.Zeros()},
        "gated": {"inject": rx.injection.Concat(WIDTH, key=key)},
    }[option]
    # An adapter is the identity when it is made; moved from there, it must be met at the right round.
    nudge = lambda x: x + 0.3 * jr.normal(jr.key(6), x.shape) if eqx.is_inexact_array(x) else x
    options = jax.tree.map(nudge, options)
    model = model_of(signature, r=rx.Loop(jnp.int32(rounds) if traced else rounds, max=3, **options))
    want = eqx.filter_jit(model)(PROMPT)
    got, cache = decoded(model, model.cache(2, TOKENS, **form), PROMPT, sizes)
    assert cache.length.tolist() == [TOKENS] * 2
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


READ = {
    "per visit": (None, lambda i, r: i if r is None else min(i, r - 1)),
    "first": (rx.cache.First(), lambda i, r: 0),
    "every 2": (rx.cache.Every(2), lambda i, r: i // 2 * 2 if r is None else min(i // 2, (r - 1) // 2) * 2),
    "last": (rx.cache.Last(), lambda i, r: i if r is None else r - 1),
    # The latest round of that token in the same slot; where none was run, what the last one has left.
    "last 2": (
        rx.cache.Last(2),
        lambda i, r: i if r is None else max([j for j in range(r) if j % 2 == i % 2], default=r - 1),
    ),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("separate", [False, True])
def test_policies_against_a_dictionary(name, separate):
    policy, read = READ[name]
    model = model_of(r=rx.Loop(3, cache=policy))
    got, _ = decoded(model, model.cache(2, TOKENS, separate=separate), PROMPT, (1,) * TOKENS)
    for b in range(2):
        np.testing.assert_allclose(got[b], naive(model, PROMPT[b].tolist(), [3] * TOKENS, read), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [rx.cache.PerVisit(), rx.cache.First(), rx.cache.Every(2)])
@pytest.mark.parametrize("traced", [False, True])
def test_parallel_policies_agree_in_training_prefill_and_steps(policy, traced):
    r = jnp.int32(3) if traced else 3
    model = model_of(r=rx.Loop(r, max=3, cache=policy))
    want = eqx.filter_jit(model)(PROMPT)
    for sizes in ((TOKENS,), (4, 1, 2)):
        got, _ = decoded(model, model.cache(2, TOKENS), PROMPT, sizes)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_of_shared_slots():
    batch = {"tokens": PROMPT, "targets": PROMPT, "segments": jnp.arange(TOKENS) // 4 * jnp.ones((2, 1), jnp.int32)}
    loss = eqx.filter_jit(eqx.filter_value_and_grad(lambda model: model.loss(batch)[0]))
    make = lambda r, **options: model_of(r=rx.Loop(r, max=3, cache=rx.cache.First(), **options))
    value, grads = loss(make(3, gradient=rx.gradient.Full(), unroll=True))
    others = make(3, unroll=False), make(3, gradient=rx.gradient.Remat()), make(jnp.int32(3))
    for other in others:
        again, more = loss(other)
        np.testing.assert_allclose(again, value, rtol=1e-5)
        of = lambda tree: jax.tree.leaves((tree.body.blocks, tree.embedding))
        for a, b in zip(of(more), of(grads)):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    # Against differences, along one direction.
    step = 1e-2 * jr.normal(jr.key(2), (2, WIDTH, WIDTH // 2))[:1]
    at = lambda sign: eqx.tree_at(
        lambda m: m.body.blocks["A"].layers.attention.k.weight,
        make(3),
        replace_fn=lambda w: w + sign * step[:, :, : w.shape[-1]],
    )
    slope = (loss(at(1))[0] - loss(at(-1))[0]) / 2
    k = grads.body.blocks["A"].layers.attention.k.weight
    np.testing.assert_allclose(jnp.sum(k * step[:, :, : k.shape[-1]]), slope, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("unfilled", ["fill", "mask"])
@pytest.mark.parametrize("policy", ["per visit", "every 2"])
def test_depth_that_changes_between_tokens(separate, unfilled, policy):
    if separate and unfilled == "mask":
        pytest.skip("one program of static depths is enough for what is masked")
    given, read = READ[policy]
    if unfilled == "mask":
        used = {"per visit": lambda r: r, "every 2": lambda r: (r + 1) // 2}[policy]
        slot = {"per visit": lambda i: i, "every 2": lambda i: i // 2}[policy]
        own = read
        read = lambda i, r: own(i, r) if r is None or slot(i) < used(r) else None
    rounds = [2, 4, 1, 3, 1, 4, 2]
    model = model_of(r=rx.Loop(4, max=4, cache=given))
    cache = model.cache(1, TOKENS, separate=separate, unfilled=unfilled, chunk=4)
    out = []
    for t, r in enumerate(rounds):
        now = rx.with_rounds(model, r=r if separate else jnp.int32(r))
        logits, cache = decoded(now, cache, PROMPT[:1, t : t + 1], (1,))
        out.append(logits[0, 0])
    np.testing.assert_allclose(jnp.stack(out), naive(model, PROMPT[0].tolist(), rounds, read), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("separate", [False, True])
def test_windows(separate):
    model = model_of(r=2, windows={"A": 3})
    want = eqx.filter_jit(model)(PROMPT)
    dictionary = naive(model, PROMPT[0].tolist(), [2] * TOKENS, READ["per visit"][1])
    np.testing.assert_allclose(want[0], dictionary, rtol=1e-4, atol=1e-4)
    for sizes, piece, chunk in (((1,) * 7, 1, 128), ((2, 2, 1, 2), 2, 128), ((2, 1, 2, 2), 2, 2)):
        unfilled = "fill" if separate else "mask"
        cache = model.cache(2, TOKENS, separate=separate, piece=piece, chunk=chunk, unfilled=unfilled)
        got, _ = decoded(model, cache, PROMPT, sizes)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    # The window is what its slots have room for, however long the text.
    long = eqx.filter_eval_shape(lambda: model.cache(2, 1000, piece=1, chunk=1024))
    assert [k.shape[-2] for k in long.keys] == [3, 1000]
    with pytest.raises(ValueError, match="room for 2 new positions at a time; got 3"):
        model.decode(PROMPT[:, :3], model.cache(2, TOKENS, piece=2))


def test_ragged_batches():
    model = model_of(r=2)
    lengths = jnp.array([5, 3])
    cache = model.cache(2, 12)
    hidden, cache = eqx.filter_jit(model.decode)(PROMPT[:, :5], cache, counts=lengths)
    more = PROMPT[:, 5:]
    got, cache = decoded(model, cache, more, (1, 1))
    assert cache.length.tolist() == [7, 5]
    for b, n in enumerate((5, 3)):
        alone = jnp.concatenate([PROMPT[b, :n], more[b]])[None]
        np.testing.assert_allclose(got[b], model(alone)[0, n:], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(model.logits(hidden)[b, :n], model(alone)[0, :n], rtol=1e-4, atol=1e-4)


class PerExample(eqx.Module):
    """A block that maps over its batch by itself, and does its own attention: a mean of what is seen."""

    project: rx.nn.Linear

    def __call__(self, state, *, key=None):
        def one(state):
            x, cache = rx.cache.open(state)
            k, v = jnp.split(self.project(x), 2, axis=-1)
            cache = cache.append(k[None], v[None])

            def step(carry, k, v, seen):
                total, count = carry
                return total + jnp.einsum("ts,gsd->td", seen.astype(v.dtype), v * jnp.tanh(k)), count + seen.sum(-1)

            zeros = jnp.zeros(x.shape), jnp.zeros(x.shape[0], int)
            total, count = cache.fold(step, zeros)
            return cache.close(x + total / count[:, None])

        return jax.vmap(one)(state)


@pytest.mark.parametrize("chunk", [2, 128])
@pytest.mark.parametrize("traced", [False, True])
def test_a_block_of_ones_own_maps_over_its_batch(chunk, traced):
    keys = jr.split(jr.key(3))
    blocks = {name: PerExample(rx.nn.Linear(WIDTH, 2 * WIDTH, key=key)) for name, key in zip("AB", keys)}
    body = rx.compose("A^r B", blocks, r=rx.Loop(jnp.int32(2) if traced else 2, max=2))
    x = jr.normal(jr.key(4), (2, TOKENS, WIDTH))
    want = eqx.filter_jit(body)(x)
    # By hand, without any of it.
    project = lambda name, x: jnp.split(x @ blocks[name].project.weight, 2, -1)
    state = x
    for name in "AAB":
        k, v = project(name, state)
        state = state + jnp.cumsum(v * jnp.tanh(k), 1) / jnp.arange(1, TOKENS + 1)[:, None]
    np.testing.assert_allclose(want, state, rtol=1e-5, atol=1e-5)

    def step(cache, x):
        state = body(rx.cache.Stream(x[:, None], cache.begin(1)))
        return state.cache.advance(1), state.x[:, 0]

    cache = rx.cache.make(body, x[:, :1], TOKENS, chunk=chunk)
    _, got = jax.jit(lambda cache, x: lax.scan(step, cache, x.swapaxes(0, 1)))(cache, x)
    np.testing.assert_allclose(got.swapaxes(0, 1), want, rtol=1e-5, atol=1e-5)


class Sums(eqx.Module):
    """A block with heads and attention of its own, over the whole batch: a sum of what is seen, weighed by `q k`."""

    project: rx.nn.Linear

    def __call__(self, state, *, key=None):
        x, cache = rx.cache.open(state)
        batch, t, _ = x.shape
        heads = self.project(x).reshape(batch, t, 3, 2, WIDTH // 2)
        q, k, v = jnp.moveaxis(heads, (2, 3), (0, 2))
        cache = cache.append(k, v)

        def step(total, k, v, visible):
            return total + jnp.where(visible[..., None, :, :], q @ k.swapaxes(-2, -1), 0) @ v

        out = cache.fold(step, jnp.zeros_like(q))
        return cache.close(x + jnp.moveaxis(out, 1, 2).reshape(x.shape))


@pytest.mark.parametrize("aligned", [False, True])
def test_what_is_visible_broadcasts_over_the_batch(aligned):
    body = rx.recur(Sums(rx.nn.Linear(WIDTH, 3 * WIDTH, key=jr.key(3))), 2)
    x = 0.1 * jr.normal(jr.key(4), (2, TOKENS, WIDTH))
    want = eqx.filter_jit(body)(x)
    cache = rx.cache.make(body, x[:, :1], TOKENS, aligned=aligned, chunk=4)
    state = eqx.filter_jit(body)(rx.cache.Stream(x[:, :5], cache.begin(5)))
    np.testing.assert_allclose(state.x, want[:, :5], rtol=1e-5, atol=1e-5)
    state = eqx.filter_jit(body)(rx.cache.Stream(x[:, 5:], state.cache.advance(5).begin(TOKENS - 5)))
    np.testing.assert_allclose(state.x, want[:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("separate", [False, True])
def test_a_slot_that_is_well_filled_is_read_where_it_stands(separate):
    sizes = set()

    class Noted(eqx.Module):
        weight: jax.Array

        def __call__(self, state, *, key=None):
            x, cache = rx.cache.open(state)
            cache = cache.append(x[:, None], x[:, None] @ self.weight)

            def step(carry, k, v, seen):
                sizes.add(k.shape[-2])
                seen = jnp.broadcast_to(seen, (2, *seen.shape[-2:])).astype(v.dtype)
                return carry + jnp.einsum("bts,bgsd->btd", seen, v * k)

            return cache.close(x + cache.fold(step, jnp.zeros_like(x)))

    keys = jr.split(jr.key(7))
    blocks = {name: Noted(jr.normal(key, (4, 4)) / 8) for name, key in zip("AB", keys)}
    body = rx.compose("A^r B", blocks, r=rx.Loop(2, unroll=True))
    x = jr.normal(jr.key(8), (2, 12, 4)) / 4
    want = body(x)
    cache = rx.cache.make(body, x[:, :1], 12, chunk=2, separate=separate)

    @jax.jit
    def step(x, cache):
        state = body(rx.cache.Stream(x, cache.begin(1)))
        return state.x, state.cache.advance(1)

    sizes.clear()
    # Chunks up to 4 positions, all 12 from there on.
    for i in range(12):
        got, cache = step(x[:, i : i + 1], cache)
        np.testing.assert_allclose(got[:, 0], want[:, i], rtol=1e-5, atol=1e-5)
    assert sizes == ({2, 12} if separate and jax.default_backend() == "cpu" else {2})


def test_bytes_of_every_policy():
    def size(model, batch, capacity, **options):
        cache = eqx.filter_eval_shape(lambda: model.cache(batch, capacity, **options))
        return rx.flops.nbytes((cache.keys, cache.values))

    config = dataclasses.replace(rx.models.presets["rins-300m"], context=64)
    make = lambda policy: eqx.filter_eval_shape(lambda: model_of("A^r B", config, r=rx.Loop(5, cache=policy)))
    plain = eqx.filter_eval_shape(lambda: model_of("A B", config))
    layers, groups = config.layers // 2, config.kv_heads or config.heads
    slot = 3 * 4096 * groups * (config.width // config.heads) * 2 * 2
    assert size(plain, 3, 4096) == 2 * layers * slot
    policies = rx.cache.PerVisit(), rx.cache.First(), rx.cache.Every(2), rx.cache.Last(), rx.cache.Last(2)
    for policy, slots in zip(policies, (5, 1, 3, 1, 2)):
        assert size(make(policy), 3, 4096) == (slots + 1) * layers * slot
        assert size(make(policy), 3, 4096, separate=True) == (slots + 1) * layers * slot
    assert size(make(rx.cache.First()), 3, 4096) == size(plain, 3, 4096)


@pytest.mark.parametrize("separate", [False, True])
def test_a_step_touches_what_is_filled_and_not_the_capacity(separate):
    model = model_of(config=dataclasses.replace(CONFIG, width=128), r=2)

    def temporary(capacity):
        cache = model.cache(1, capacity, separate=separate, trusted=True, chunk=64)
        step = lambda cache, token: model.decode(token, cache)
        compiled = jax.jit(step, donate_argnums=0).lower(cache, jnp.zeros((1, 1), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # A copy of one slot would be 2**22 bytes. What is read where it stands takes scores and weights for all of it.
    scores = 2 * CONFIG.heads * 4 * (2**14 - 2**11)
    assert temporary(2**14) - temporary(2**11) < 2**12 + (scores if separate else 0)


def test_a_cache_of_one_chunk_is_not_copied_for_a_token():
    config = dataclasses.replace(CONFIG, width=32)
    model = model_of(config=config, r=2).apart()
    cache = model.cache(1, 96, separate=True, aligned=True, trusted=True)
    (buffer, *_), *_ = cache.keys
    assert buffer.shape == (1, 1, 96, 16)

    def many(cache, token):
        def one(_, carry):
            cache, token = carry
            hidden, cache = model.decode(token, cache)
            return cache, jnp.argmax(model.logits(hidden), -1).astype(jnp.int32)

        return lax.fori_loop(0, 8, one, (cache, token))

    token = jnp.zeros((1, 1), jnp.int32)
    text = jax.jit(many, donate_argnums=0).lower(cache, token).compile().as_text()
    assert "f32[1,1,96,16]{3,2,1,0} parameter(" in text
    assert not [line for line in text.splitlines() if "= f32[1,1,96,16]" in line and " copy(" in line]
    # Each token is counted as the products that it takes: three visits, and attention to all that there is room for.
    maps = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 16
    counted = rx.flops.count(lambda cache, token: model.decode(token, cache)[0], cache, token)
    assert counted.matmul == 2 * 3 * (maps + 2 * 2 * 96 * 16)


def test_a_full_cache_says_so():
    model = model_of(r=2)
    with pytest.raises(ValueError, match="capacity of 4 positions, and 5 do not fit"):
        model.decode(PROMPT[:, :5], model.cache(2, 4))
    step = eqx.filter_jit(model.decode)
    _, cache = step(PROMPT[:, :4], model.cache(2, 5))
    with pytest.raises(Exception, match="no room for 2 more in this cache: its capacity is 5 positions"):
        jax.block_until_ready(step(PROMPT[:, :2], cache))


def test_rounds_past_the_cache():
    model = model_of(r=rx.Loop(2, max=3))
    cache = model.cache(2, TOKENS)
    model.decode(PROMPT[:, :1], cache)
    with pytest.raises(ValueError, match="r of 4 rounds runs past its cache, which has slots for 3"):
        rx.with_rounds(model, r=4).decode(PROMPT[:, :1], cache)
    with pytest.raises(Exception, match="r runs past its cache, which has slots for 3 rounds"):
        deep = rx.with_rounds(model, r=jnp.int32(4))
        jax.block_until_ready(eqx.filter_jit(deep.decode)(PROMPT[:, :1], cache))
    with pytest.raises(ValueError, match="r is a run-time number of rounds without a maximum"):
        model_of(r=jnp.int32(2)).cache(2, TOKENS)
    # What does not count rounds has slots for any number.
    free = model_of(r=rx.Loop(jnp.int32(2), cache=rx.cache.First()))
    cache = free.cache(2, TOKENS)
    got, _ = decoded(rx.with_rounds(free, r=jnp.int32(9)), cache, PROMPT, (TOKENS,))
    want = rx.with_rounds(free, r=9)(PROMPT)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


class Twice(eqx.Module):
    attention: rx.nn.Attention

    def __call__(self, state, *, key=None):
        return self.attention(self.attention(state))


class Forgetful(eqx.Module):
    attention: rx.nn.Attention

    def __call__(self, state, *, key=None):
        x, _ = rx.cache.open(self.attention(state))
        return x


class Stale(eqx.Module):
    attention: rx.nn.Attention

    def __call__(self, state, *, key=None):
        _, before = rx.cache.open(state)
        x, _ = rx.cache.open(self.attention(state))
        return before.close(x)


def test_what_is_refused():
    attention = rx.nn.Attention(WIDTH, heads=2, key=jr.key(0))
    x = jnp.ones((1, 1, WIDTH))
    make = lambda block: rx.cache.make(rx.recur(block, 2), x, 4)
    with pytest.raises(ValueError, match="block A attends 2 times a visit"):
        make(Twice(attention))
    with pytest.raises(ValueError, match="no block attends to a cache"):
        make(rx.lift(jnp.tanh))
    with pytest.raises(TypeError) as caught:
        make(eqx.nn.MLP(WIDTH, WIDTH, 8, 1, key=jr.key(0)))
    assert any("block A was given a state with a cache" in note for note in caught.value.__notes__)
    body = rx.recur(attention, 2)
    cache = rx.cache.make(body, x, 4)
    state = rx.cache.Stream(x, cache.begin(1))
    for block, message in ((Forgetful, "returned one without"), (Stale, "a handle from before that")):
        with pytest.raises(ValueError, match=f"block A .*{message}"):
            rx.recur(block(attention), 2)(state)
        layers = rx.nn.Stack([block(attention)] * 2)
        deep = rx.cache.Stream(x, rx.cache.make(rx.recur(rx.nn.Stack([attention] * 2), 2), x, 4).begin(1))
        with pytest.raises(ValueError, match=f"layer {block.__name__} of a stack .*{message}"):
            rx.recur(layers, 2)(deep)
    with pytest.raises(ValueError, match="returned one without"):
        make(Forgetful(attention))
    with pytest.raises(TypeError, match="rx.compose, rx.recur or rx.chain have made; got a Attention"):
        rx.cache.make(attention, x, 4)
    with pytest.raises(ValueError, match="`counts` are from 0 to 1.*got 2"):
        cache.begin(1).advance(2)
    with pytest.raises(Exception, match="rewound to at most what is filled"):
        jax.block_until_ready(eqx.filter_jit(cache.rewind)(jnp.array([3])))
    with pytest.raises(ValueError, match="begins with cache = cache.begin"):
        body(rx.cache.Stream(x, cache))
    with pytest.raises(ValueError, match="one document for each sequence"):
        body(state, segments=jnp.zeros((1, 1), jnp.int32))
    with pytest.raises(ValueError, match="no visit: call the recursion"):
        attention(state)
    with pytest.raises(ValueError, match="sequential: it is defined token by token"):
        model_of(r=rx.Loop(2, cache=rx.cache.Last()))(PROMPT)
    with pytest.raises(TypeError, match="cache"):
        rx.Loop(2, cache="first")
    with pytest.raises(ValueError, match="`k` must be at least 1; got 0"):
        rx.cache.Every(0)
    with pytest.raises(ValueError, match="`unfilled` must be 'fill' or 'mask'; got 'zero'"):
        rx.cache.make(body, x, 4, unfilled="zero")
    with pytest.raises(ValueError, match="`capacity` is needed"):
        rx.cache.make(body, x, None)
    with pytest.raises(ValueError, match="names C, but 'A B' has A, B"):
        model_of("A B", windows={"C": 3})


def test_policies_are_set_on_a_model():
    model = model_of(r=3)
    cheap = rx.cache.with_policy(model, r=rx.cache.First())
    assert cheap.body.loops["r"].cache == rx.cache.First()
    np.testing.assert_array_equal(cheap(PROMPT), model_of(r=rx.Loop(3, cache=rx.cache.First()))(PROMPT))
    np.testing.assert_array_equal(rx.cache.with_policy(cheap, r=None)(PROMPT), model(PROMPT))
    with pytest.raises(ValueError, match="no loop of this model is named q: its loops are r"):
        rx.cache.with_policy(model, q=rx.cache.First())


def test_a_second_step_does_not_compile_again():
    model = model_of(r=2)
    step = eqx.filter_jit(eqx.debug.assert_max_traces(lambda m, t, c: m.decode(t, c), max_traces=1))
    _, cache = step(model, PROMPT[:, :1], model.cache(2, TOKENS))
    _, cache = step(model, PROMPT[:, 1:2], cache)
    assert cache.length.tolist() == [2, 2]


def test_sharded_over_the_batch():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model = model_of(r=2)
    cache = model.cache(2, TOKENS)
    want, _ = decoded(model, cache, PROMPT, (4, 1, 2))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    cache = jax.device_put(cache, over)
    got, cache = decoded(model, cache, jax.device_put(PROMPT, over), (4, 1, 2))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_cache_of_another_model_is_refused():
    model, late = model_of(r=3), model_of("A B^r", r=3)
    first = rx.cache.with_policy(model, r=rx.cache.First())
    for cache, other, has, wants in (
        (first.cache(2, TOKENS), model, "'A': 1, 'B': 1", "'A': 3, 'B': 1"),
        (model.cache(2, TOKENS), first, "'A': 3, 'B': 1", "'A': 1, 'B': 1"),
        (model.cache(2, TOKENS), late, "'A': 3, 'B': 1", "'A': 1, 'B': 3"),
        (model.cache(2, TOKENS), model_of("A C^r", r=3), "'A': 3, 'B': 1", "blocks A, C"),
    ):
        with pytest.raises(ValueError, match=f"not made for this recursion: it has .*{has}.*{wants}"):
            other.decode(PROMPT, cache)
