"""How gradients flow: stored, rematerialised, truncated. Values always agree; memory falls where it is said to."""

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, example, given

import rinsx as rx
from rinsx import _unroll

from .helpers import assert_close, blocks, DIM, naive, Noisy, option, signatures, value_and_grads
from .test_operators import build, inputs, KEY, rounds, small


GRADIENTS = {
    "none": None,
    "full": rx.gradient.Full(),
    "remat": rx.gradient.Remat(),
    "policy": rx.gradient.Remat(jax.checkpoint_policies.dots_saveable),
    "last": rx.gradient.Last(2),
    "last full": rx.gradient.Last(1, rx.gradient.Full()),
    "last remat": rx.gradient.Last(1, rx.gradient.Remat()),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("unroll", [True, False])
def test_every_gradient_is_the_naive_one(name, unroll):
    with jax.enable_x64(True):
        for options in ("plain", "all"):
            model = build("A (B^r A)^s", {"r": 3, "s": 1}, options, gradient=GRADIENTS[name], unroll=unroll)
            x, scale = inputs()
            call = lambda model, *args, key: model(*args, key=key)
            assert_close(
                eqx.filter_jit(value_and_grads)(call, model, x, scale, KEY),
                value_and_grads(naive, model, x, scale, KEY),
            )


@given(signatures(), rounds, st.integers(1, 4), st.booleans())
def test_last_is_the_naive_truncation(text, rounds, last, unroll):
    assume(small(text, rounds) and rx.Signature(text).exponents)
    with jax.enable_x64(True):
        model = build(text, rounds, "inject", gradient=rx.gradient.Last(last), unroll=unroll)
        x, scale = inputs()
        call = lambda model, *args, key: model(*args, key=key)
        assert_close(value_and_grads(call, model, x, scale, KEY), value_and_grads(naive, model, x, scale, KEY))


@pytest.mark.parametrize("traced", [False, True])
def test_last_is_the_two_phase_gradient_written_by_hand(traced):
    """First run without gradient, then differentiate the rest: `A B^r C` with injection, as latent recurrent thinking does."""
    with jax.enable_x64(True):
        a, b, c = blocks("ABC").values()
        inject = option("inject")["inject"]
        loop = rx.Loop(7, max=9, inject=inject, gradient=rx.gradient.Last(3))
        model = rx.compose("A B^r C", {"A": a, "B": b, "C": c}, r=loop)
        model = rx.with_rounds(model, r=jnp.int32(7)) if traced else model
        x, _ = inputs()

        def two_phase(diff):
            a, b, c, inject = diff
            entry = a(x)
            state = jnp.zeros_like(entry)
            for i in range(4):
                state = jax.tree.map(jax.lax.stop_gradient, b)(
                    inject_at(jax.lax.stop_gradient(inject), state, jax.lax.stop_gradient(entry), i)
                )
            for i in range(4, 7):
                state = b(inject_at(inject, state, entry, i))
            return jnp.sum(jnp.sin(c(state)))

        inject_at = lambda inject, state, entry, i: inject(state, entry, i)
        want = eqx.filter_grad(two_phase)((a, b, c, inject))
        got = eqx.filter_grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
        got = [got.blocks["A"], got.blocks["B"], got.blocks["C"], got.loops["r"].inject]
        leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
        assert_close(leaves(got), leaves(want))


def temporary(loop, state, block):
    model = rx.recur(block, loop)
    step = jax.jit(jax.grad(lambda x: jnp.sum(model(x) ** 2)))
    return step.lower(state).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_truncation_and_rematerialisation():
    """Early rounds of `Last` store nothing, and `Remat` stores one state a round."""
    x = jnp.ones((64, 32))
    mlp = eqx.nn.MLP(32, 32, 512, 2, key=KEY)
    block = rx.lift(lambda x: jax.vmap(mlp)(x))
    measure = lambda rounds, gradient: temporary(rx.Loop(rounds, unroll=False, gradient=gradient), x, block)
    full, remat = rx.gradient.Full(), rx.gradient.Remat()
    assert measure(64, full) > 4 * measure(64, remat)
    assert measure(64, remat) <= 1.3 * measure(2, remat) + 62 * x.nbytes
    # By default the last four visits store all, and the others a state each.
    default = lambda rounds: temporary(rx.Loop(rounds), x, block)
    assert default(64) <= 1.1 * default(4) + measure(2, remat) + 60 * x.nbytes
    assert measure(64, rx.gradient.Last(2, full)) <= 1.1 * measure(3, rx.gradient.Last(2, full))
    assert measure(64, rx.gradient.Last(2, remat)) <= 1.1 * measure(3, rx.gradient.Last(2, remat))


@given(signatures(), rounds, st.sampled_from(["plain", "all", "inject"]), st.integers(0, 3), st.sampled_from([None, 2]))
@example("A^r B", {"r": 3, "s": 1}, "all", 0, None)
@example("A^r B", {"r": 3, "s": 1}, "plain", 2, 2)
@example("(A^r B)^s", {"r": 2, "s": 3}, "all", 0, None)
def test_a_loop_rolled_by_default_is_the_naive_one(text, rounds, options, few, last):
    """Whatever a backend unrolls: no more than `few` visits, and so many behind a loop."""
    assume(small(text, rounds))
    gradient = None if last is None else rx.gradient.Last(last)
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_unroll, "_FEW", few)
        patch.setattr(_unroll, "_MANY", 0)
        model = build(text, rounds, options, gradient=gradient)
        x, scale = inputs()
        call = lambda model, *args, key: model(*args, key=key)
        assert_close(value_and_grads(call, model, x, scale, KEY), value_and_grads(naive, model, x, scale, KEY))


@pytest.mark.parametrize(
    ("backend", "rounds", "width", "stored"),
    [
        ("cpu", 16, 1, 16),
        ("cpu", 17, 1, 4),
        ("cpu", 5, 2**18, 4),
        ("cpu", 4, 2**18, 4),
        ("gpu", 2, 1, 1),
        ("gpu", 9, 1, 1),
    ],
)
def test_the_last_rounds_of_a_rolled_loop_are_not_computed_again(monkeypatch, backend, rounds, width, stored):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    weight = jax.ShapeDtypeStruct((width, width), jnp.float32)
    visit = 2 * width * width
    block = lambda weight: rx.lift(lambda x: jnp.tanh(x @ weight))
    loss = lambda weight, x: jnp.sum(rx.recur(block(weight), rounds)(x))
    cost = rx.flops.count(jax.grad(loss, (0, 1)), weight, jax.ShapeDtypeStruct((width,), jnp.float32)).matmul
    assert cost == (4 * (rounds - stored) + 3 * stored) * visit
    remat = lambda weight, x: jnp.sum(
        rx.recur(block(weight), rx.Loop(rounds, unroll=False, gradient=rx.gradient.Remat()))(x)
    )
    shapes = weight, jax.ShapeDtypeStruct((width,), jnp.float32)
    assert rx.flops.count(jax.grad(remat, (0, 1)), *shapes).matmul == 4 * rounds * visit


def test_a_loop_inherits_storage_from_the_loops_around():
    """What is stored around a visit is what its innermost loop with an opinion says: seen in the program itself."""
    inner = lambda gradient: rx.recur(Noisy(KEY), rx.Loop(2, gradient=gradient, unroll=True))
    program = lambda outer, gradient: str(
        jax.make_jaxpr(rx.recur(inner(gradient), rx.Loop(2, gradient=outer, unroll=True), name="s"))(jnp.ones(DIM))
    )
    full, remat = rx.gradient.Full(), rx.gradient.Remat()
    assert "remat" not in program(None, None) and "checkpoint" not in program(None, None)
    assert program(remat, None) != program(None, None)
    assert program(remat, full) == program(None, full) == program(None, None)
    assert program(full, remat) == program(remat, None)


def test_bad_gradients():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        rx.gradient.Last(0)
    # The type checker of the test suite sees these before rinsx does; both are a TypeError that names the argument.
    for bad in (
        lambda: rx.gradient.Last(1, rx.gradient.Last(1)),
        lambda: rx.Loop(2, gradient="full"),
        lambda: rx.Loop(2, adapter=3),
    ):
        with pytest.raises(TypeError, match="store|gradient|adapter"):
            bad()
    with pytest.raises(ValueError, match="none of them is given"):
        rx.Loop(2, on=lambda state: state)
