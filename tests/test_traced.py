"""A traced number of rounds computes what the Python integer computes, in one executable, in reverse mode too."""

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from hypothesis import assume, example, given

import rinsx as rx

from .helpers import assert_close, blocks, DIM, examples, naive, Noisy, option, OPTIONS, signatures, value_and_grads
from .test_operators import build, inputs, KEY, rounds, small


def traced(model, rounds):
    names = model.signature.exponents
    return rx.with_rounds(model, **{name: jnp.asarray(rounds[name], jnp.int32) for name in names})


def call(model, *args, key):
    return model(*args, key=key)


@examples(25)
@given(signatures(), rounds, st.sampled_from(OPTIONS), st.sampled_from([None, 1, 2]))
@example("(A^r B)^s", {"r": 2, "s": 3}, "all", None)
@example("(A^r B^2)^3 C^r", {"r": 3, "s": 1}, "all", 2)
@example("(A^r)^r B", {"r": 3, "s": 1}, "plain", None)
def test_traced_is_the_naive_loop(text, rounds, options, last):
    """Values and gradients, at every degree, with every option and truncated too."""
    assume(small(text, rounds) and rx.Signature(text).exponents)
    with jax.enable_x64(True):
        gradient = None if last is None else rx.gradient.Last(last)
        model = build(text, rounds, options, gradient=gradient)
        x, scale = inputs()
        ours = eqx.filter_jit(value_and_grads)(call, traced(model, rounds), x, scale, KEY)
        reference = value_and_grads(naive, model, x, scale, KEY)
        assert_close(ours, reference)


@examples(4)
@given(st.sampled_from(["A^r B", "(A^r B)^s", "A (B^s)^r C"]), rounds)
def test_one_executable_serves_all_rounds(text, rounds):
    assume(small(text, rounds))
    model = build(text, {"r": 1, "s": 1})
    assert _traces_for(model, [{"r": 1, "s": 1}, rounds, {"r": 6, "s": 6}]) == 1


def _traces_for(model, many):
    traces = 0

    @eqx.filter_jit
    def step(model):
        nonlocal traces
        traces += 1
        return eqx.filter_grad(lambda model: jnp.sum(model(jnp.ones(DIM), key=KEY)))(model)

    for values in many:
        step(traced(model, values))
    return traces


def test_only_the_work_asked_for():
    """A block counts its visits on the host: neither direction runs a round more than asked."""
    ran = []

    def fn(x):
        jax.debug.callback(lambda: ran.append(1))
        return jnp.sin(x)

    model = rx.recur(rx.lift(fn), rx.Loop(1, max=50))
    forward = eqx.filter_jit(lambda model: model(jnp.ones(2)))
    forward(rx.with_rounds(model, r=jnp.int32(7)))
    jax.effects_barrier()
    assert len(ran) == 7
    ran.clear()
    grad = eqx.filter_jit(lambda model: jax.grad(lambda x: jnp.sum(model(x)))(jnp.ones(2)))
    grad(rx.with_rounds(model, r=jnp.int32(7)))
    jax.effects_barrier()
    # Forwards, and again backwards but for the last.
    assert len(ran) == 13


def test_a_gradient_of_at_most_one_round_is_no_loop():
    """With one slot a loop over the tape would find the same state in each round, and XLA would compute it ahead of the loop."""
    model = rx.recur(Noisy(KEY), rx.Loop(1, max=1))
    step = lambda r: jax.grad(lambda x: jnp.sum(rx.with_rounds(model, r=r)(x)))(jnp.ones(DIM))
    assert "while" not in jax.jit(step).lower(jnp.int32(1)).as_text()
    assert_close([step(jnp.int32(1))], [step(1)], 1e-6)
    with pytest.raises(Exception, match="max=1"):
        jax.jit(step)(jnp.int32(2))


def test_memory_is_that_of_the_saved_states():
    """Doubling the maximum adds the saved states of the further rounds, and nothing else."""
    x = jnp.ones((64, 32))
    block = eqx.nn.MLP(32, 32, 256, 2, key=KEY)

    def temporary(most):
        model = rx.recur(rx.lift(lambda x: jax.vmap(block)(x)), rx.Loop(jnp.int32(1), max=most))
        step = jax.jit(lambda r, x: jax.grad(lambda x: jnp.sum(rx.with_rounds(model, r=r)(x)))(x))
        return step.lower(jnp.int32(1), x).compile().memory_analysis().temp_size_in_bytes

    at_64, at_128, at_256 = temporary(64), temporary(128), temporary(256)
    assert at_128 - at_64 <= 1.05 * 64 * x.nbytes
    assert at_256 - at_128 <= 1.05 * 128 * x.nbytes


def test_inference_needs_no_maximum_and_reverse_mode_says_so():
    model = rx.recur(Noisy(KEY), jnp.int32(5))
    assert_close([model(jnp.ones(DIM))], [rx.with_rounds(model, r=5)(jnp.ones(DIM))], 1e-6)
    with pytest.raises(ValueError, match=r"needs a static maximum.*rx.Loop\(..., max=...\)"):
        jax.grad(lambda x: jnp.sum(model(x)))(jnp.ones(DIM))


def test_out_of_range_is_an_error_when_it_runs():
    model = rx.recur(Noisy(KEY), rx.Loop(1, max=4, adapter=rx.adapters.FiLM(DIM, rounds=6)))
    value = eqx.filter_jit(lambda model: model(jnp.ones(DIM)))
    grad = eqx.filter_jit(lambda model: eqx.filter_grad(lambda model: jnp.sum(model(jnp.ones(DIM))))(model))
    at = lambda r: rx.with_rounds(model, r=jnp.int32(r))
    value(at(6)), grad(at(4))
    with pytest.raises(Exception, match="r must be at least 1"):
        value(at(0))
    with pytest.raises(Exception, match="its adapter, which has weights for 6 rounds"):
        value(at(7))
    with pytest.raises(Exception, match="more rounds than its max=4|max=4"):
        grad(at(5))
    with pytest.raises(ValueError, match="7 rounds runs past its adapter, which has weights for 6"):
        rx.with_rounds(model, r=7)


def test_wide_integers_do_not_wrap():
    with jax.enable_x64(True):
        model = rx.recur(rx.lift(jnp.sin), jnp.array(2**32 + 3, jnp.int64))
        with pytest.raises(Exception, match="more than 2"):
            eqx.filter_jit(model)(jnp.ones(2))


def test_what_cannot_be_honoured_is_refused():
    x = jnp.ones(DIM)
    full = rx.recur(Noisy(KEY), rx.Loop(jnp.int32(2), max=3, gradient=rx.gradient.Full()))
    with pytest.raises(ValueError, match="cannot store Full"):
        full(x)
    saved = rx.gradient.Remat(jax.checkpoint_policies.dots_saveable)
    with pytest.raises(ValueError, match="cannot store Remat"):
        rx.recur(Noisy(KEY), rx.Loop(jnp.int32(2), max=3, gradient=rx.gradient.Last(1, saved)))(x)
    with pytest.raises(ValueError, match="cannot be unrolled"):
        rx.recur(Noisy(KEY), rx.Loop(jnp.int32(2), max=3, unroll=True))(x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(rx.recur(Noisy(KEY), rx.Loop(jnp.int32(2), max=3)), (x,), (x,))


def test_integer_and_key_leaves_are_taped():
    def step(state):
        x, n, key = state
        key, sub = jr.split(key)
        return jnp.sin(x) * (n + 1) + jr.normal(sub, x.shape), n + 1, key

    def loss(x, rounds):
        model = rx.recur(rx.lift(step), rx.Loop(rounds, max=6))
        x, n, _ = model((x, jnp.int32(0), jr.key(3)))
        return jnp.sum(x), n

    ours, n = jax.jit(jax.grad(loss, has_aux=True))(jnp.ones(3), jnp.int32(5))
    want, m = jax.grad(loss, has_aux=True)(jnp.ones(3), 5)
    assert_close([ours], [want], 1e-5)
    assert n == m == 5


def test_vmap_over_examples_and_over_rounds():
    model = build("(A^r B)^s", {"r": 1, "s": 2})
    xs = jr.normal(KEY, (4, DIM))
    at = lambda r: lambda x: jnp.sum(rx.with_rounds(model, r=r)(x, key=KEY))
    batched = jax.vmap(jax.grad(at(jnp.int32(3))))(xs)
    assert_close([batched], [jnp.stack([jax.grad(at(3))(x) for x in xs])], 1e-5)
    each = jax.vmap(lambda r, x: jax.grad(at(r))(x))(jnp.arange(1, 5), xs)
    assert_close([each], [jnp.stack([jax.grad(at(i + 1))(x) for i, x in enumerate(xs)])], 1e-5)


def test_remat_around_and_data_from_a_law():
    law = rx.depth.Binomial(3, skip="4/5")
    model = rx.recur(Noisy(KEY), rx.Loop(3, max=law.max, **option("adapter")))

    @eqx.filter_jit
    def step(model, key):
        rounds = law.sample(key)
        loss = eqx.filter_checkpoint(lambda model: jnp.sum(rx.with_rounds(model, r=rounds)(jnp.ones(DIM))))
        return rounds, eqx.filter_grad(loss)(model)

    for seed in range(4):
        rounds, grads = step(model, jr.key(seed))
        want = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(DIM))))(rx.with_rounds(model, r=int(rounds)))
        leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
        assert_close(leaves(grads), leaves(want), 1e-5)


def test_unused_blocks_and_frozen_weights():
    """A weight that is not differentiated costs and receives nothing."""
    model = rx.compose("A^r B", blocks("AB"), r=rx.Loop(jnp.int32(3), max=4))
    spec = jax.tree.map(lambda _: False, model)
    spec = eqx.tree_at(lambda m: m.blocks["A"].weight, spec, True)
    train, frozen = eqx.partition(model, spec)
    grads = eqx.filter_grad(lambda t: jnp.sum(eqx.combine(t, frozen)(jnp.ones(DIM))))(train)
    assert grads.blocks["B"].weight is None
    full = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(DIM))))(model)
    assert_close([grads.blocks["A"].weight], [full.blocks["A"].weight], 1e-6)
