"""Composed recursions compute what a naive Python loop computes, whatever their form."""

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from hypothesis import assume, example, given

import rinsx as rx
from rinsx._loop import checked_rounds

from .helpers import assert_close, blocks, DIM, examples, naive, Noisy, option, OPTIONS, signatures, value_and_grads


KEY = jr.key(7)


def inputs():
    return jr.normal(jr.key(1), (DIM,), jnp.result_type(float)), jnp.asarray(0.9, jnp.result_type(float))


def build(text, rounds, options="plain", **more):
    """A composed model, its loops all with one kind of options."""
    signature = rx.Signature(text)
    loops = {
        name: rx.Loop(rounds[name], max=6, **option(options, i), **more) for i, name in enumerate(signature.exponents)
    }
    return rx.compose(signature, blocks(signature.blocks), **loops)


def small(text, rounds, most=40):
    return sum(rx.Signature(text).bind(**{n: rounds[n] for n in rx.Signature(text).exponents}).counts.values()) <= most


rounds = st.fixed_dictionaries({"r": st.integers(1, 3), "s": st.integers(1, 3)})


@examples(25)
@given(signatures(), rounds, st.sampled_from(OPTIONS), st.sampled_from([None, True, False]))
@example("A^r B", {"r": 3, "s": 1}, "all", False)
@example("(A^r B)^s", {"r": 2, "s": 3}, "all", False)
@example("(A^r B)^r A", {"r": 2, "s": 1}, "plain", False)
def test_composed_is_the_naive_loop(text, rounds, options, unroll):
    assume(small(text, rounds))
    with jax.enable_x64(True):
        model = build(text, rounds, options, unroll=unroll)
        x, scale = inputs()
        ours = value_and_grads(lambda model, *args, key: model(*args, key=key), model, x, scale, KEY)
        reference = value_and_grads(naive, model, x, scale, KEY)
        assert_close(ours, reference)


@given(signatures(), rounds)
def test_equal_signatures_compute_equal_functions(text, rounds):
    """The normal form, and a spelling with every loop of the text repeated by hand, keys included."""
    assume(small(text, rounds))
    signature = rx.Signature(text).bind(**{n: rounds[n] for n in rx.Signature(text).exponents})
    spelled = " ".join(signature.visits)
    assert rx.Signature(spelled) == signature
    x, scale = jnp.linspace(-1, 1, DIM), jnp.asarray(0.9)
    parts = blocks(signature.blocks)
    results = [rx.compose(text, parts)(x, scale, key=KEY) for text in (spelled, signature, str(signature))]
    assert_close(results[:2], results[1:], 1e-5)


def test_nested_operators_are_nested_signatures():
    a, b, c = blocks("ABC").values()
    x, scale = jnp.ones(DIM), jnp.asarray(0.9)
    nested = rx.recur(rx.chain(rx.recur(a, 2), b), 3, name="s")
    nested = rx.chain(nested, c)
    composed = rx.compose("(A^2 B)^3 C", {"A": a, "B": b, "C": c})
    assert_close([nested(x, scale, key=KEY)], [composed(x, scale, key=KEY)], 1e-6)
    deeper = rx.with_rounds(nested, r=1)
    assert_close([deeper(x, scale)], [rx.compose("(A B)^3 C", {"A": a, "B": b, "C": c})(x, scale)], 1e-6)


def test_a_nested_block_visited_in_two_places_is_one_block():
    inner = rx.recur(Noisy(KEY), 2)
    model = rx.compose("A B A", {"A": inner, "B": Noisy(jr.key(3))})
    flat = rx.compose("A^2 B A^2", {"A": inner.blocks["A"], "B": model.blocks["B"]})
    assert_close([model(jnp.ones(DIM), key=KEY)], [flat(jnp.ones(DIM), key=KEY)], 1e-6)


def test_gradients_of_all_visits_meet_in_one_leaf():
    model = rx.compose("A^r B A", blocks("AB"), r=4)
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    assert len(arrays) == 2
    grads = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(DIM))))(model)

    def unshared(weights):
        x = jnp.ones(DIM)
        for weight in weights[:4] + weights[5:] + weights[4:5]:
            x = eqx.tree_at(lambda b: b.weight, model.blocks["A"], weight)(x)
        return x

    def separate(weights):
        x = jnp.ones(DIM)
        for weight in weights:
            x = eqx.tree_at(lambda b: b.weight, model.blocks["A"], weight)(x)
        return jnp.sum(x)

    a, b = model.blocks["A"].weight, model.blocks["B"].weight
    each = jax.grad(separate)([a, a, a, a, b, a])
    assert_close([grads.blocks["A"].weight], [sum(g for i, g in enumerate(each) if i != 4)], 1e-5)
    assert_close([grads.blocks["B"].weight], [each[4]], 1e-5)


@pytest.mark.parametrize("unroll", [True, False])
def test_state_is_any_pytree(unroll):
    """Integer leaves and PRNG keys ride along."""

    def step(state):
        key, sub = jr.split(state["key"])
        return {"x": state["x"] + jr.normal(sub, (3,)), "n": state["n"] + 1, "key": key}

    model = rx.recur(rx.lift(step), rx.Loop(4, unroll=unroll))
    start = {"x": jnp.zeros(3), "n": 0, "key": jr.key(5)}
    out = eqx.filter_jit(model)(start)
    want = start
    for _ in range(4):
        want = step(want)
    assert_close([out["x"]], [want["x"]], 1e-6)
    assert out["n"] == 4
    assert jnp.all(jr.key_data(out["key"]) == jr.key_data(want["key"]))


def test_side_inputs_reach_every_visit_and_lift_drops_them():
    seen = []

    def fn(x, mask):
        seen.append(mask is not None)
        return x * mask

    model = rx.compose("A^2 B", {"A": rx.lift(fn, keep=["mask"]), "B": rx.lift(jnp.sin)})
    out = model(jnp.ones(3), "positional", mask=jnp.array([1.0, 2.0, 0.0]), key=KEY)
    assert_close([out], [jnp.sin(jnp.array([1.0, 4.0, 0.0]))], 1e-6)
    assert seen and all(seen)
    with pytest.raises(TypeError, match="called without mask"):
        model(jnp.ones(3))
    with pytest.raises(TypeError, match=r"write \['mask'\]"):
        rx.lift(fn, keep="mask")


def test_library_modules_are_blocks():
    keys = jr.split(KEY, 2)
    a, b = eqx.nn.MLP(4, 4, 8, 1, key=keys[0]), eqx.nn.Linear(4, 4, key=keys[1])
    x = jnp.ones(4)
    want = b(a(a(a(x))))
    assert_close([rx.compose("A^r B", {"A": a, "B": b}, r=3)(x)], [want], 1e-6)
    assert_close([rx.chain(rx.recur(a, 3), b)(x, key=KEY)], [want], 1e-6)


def test_chain_names_more_blocks_than_letters():
    model = rx.chain(*(rx.lift(lambda x, i=i: x * 2 + i) for i in range(30)))
    want = 0
    for i in range(30):
        want = want * 2 + i
    assert float(model(jnp.zeros(()))) == pytest.approx(want)
    assert model.signature.blocks[26] == "A1"


# What JAX and Equinox do to a module works on the result.


def test_jit_vmap_scan_and_a_second_call_does_not_recompile():
    model = rx.compose("(A^r B)^s", blocks("AB"), r=3, s=2)
    traces = 0

    @eqx.filter_jit
    def run(model, x):
        nonlocal traces
        traces += 1
        return jax.vmap(lambda x: model(x, key=KEY))(x)

    x = jr.normal(KEY, (4, DIM))
    out = run(model, x)
    assert_close([out], [jnp.stack([model(row, key=KEY) for row in x])], 1e-5)
    run(jax.tree.map(lambda leaf: leaf * 2 if eqx.is_inexact_array(leaf) else leaf, model), x)
    assert traces == 1
    run(rx.with_rounds(model, r=2), x)
    assert traces == 2
    scanned = jax.lax.scan(lambda c, _: (model(c), None), x[0], None, length=2)[0]
    assert_close([scanned], [model(model(x[0]))], 1e-5)


def test_equal_signatures_with_options_do_not_share_an_executable():
    """`A^r A` and `A A^r` are equal by meaning, but their adapters stand at different visits."""
    run = eqx.filter_jit(lambda model: model(jnp.ones(DIM)))
    models = [build(text, {"r": 2}, "adapter") for text in ("A^r A", "A A^r")]
    assert models[0].signature == models[1].signature
    assert_close([run(model) for model in models], [naive(model, jnp.ones(DIM)) for model in models], 1e-6)
    assert float(jnp.abs(run(models[0]) - run(models[1])).max()) > 1e-3


def test_forward_mode_and_second_derivatives_with_static_rounds():
    with jax.enable_x64(True):
        for unroll in (True, False):
            model = build("A^r B", {"r": 4}, unroll=unroll)
            f = lambda x: jnp.sum(jnp.sin(model(x)))
            g = lambda x: jnp.sum(jnp.sin(naive(model, x)))
            x, _ = inputs()
            assert_close([jax.jacfwd(f)(x), jax.hessian(f)(x)], [jax.jacfwd(g)(x), jax.hessian(g)(x)])


def test_partition_optimise_and_serialise(tmp_path):
    model = build("A^r B", {"r": 3}, "adapter")
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = optax.adam(1e-3)
    state = optimiser.init(params)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(DIM))))(model)
    updates, _ = optimiser.update(grads, state, params)
    trained = eqx.combine(eqx.apply_updates(params, updates), static)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", trained)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", model)
    assert eqx.tree_equal(loaded, trained)
    assert not eqx.tree_equal(loaded, model)


def test_weakly_typed_states_keep_their_type():
    model = rx.recur(rx.lift(lambda x: x * 2), rx.Loop(3, unroll=False))
    assert model(1.0) == 8.0
    assert model(jnp.bfloat16(1)).dtype == jnp.bfloat16


# Bad input.


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize(
    "fn, shown",
    [
        (lambda x: x[:2], r"f32\[3\].*f32\[2\]"),
        (lambda x: x.astype(jnp.bfloat16), r"f32\[3\].*bf16\[3\]"),
        (lambda x: (x, None), r"f32\[3\]"),
    ],
)
def test_a_block_that_changes_the_state_is_refused_by_name(fn, shown, unroll):
    later = []
    model = rx.compose(
        "A B^r C",
        {"A": rx.lift(jnp.sin), "B": rx.lift(fn), "C": rx.lift(lambda x: later.append(1) or x)},
        r=rx.Loop(3, unroll=unroll),
    )
    with pytest.raises(ValueError, match=f"block B must keep .*{shown}"):
        model(jnp.ones(3))
    assert not later


def test_bad_arguments_of_compose():
    a, b = blocks("AB").values()
    with pytest.raises(ValueError, match="block B, which was not given"):
        rx.compose("A^r B", {"A": a}, r=3)
    with pytest.raises(ValueError, match="block C was given, but signature 'A B' has only A, B"):
        rx.compose("A B", {"A": a, "B": b, "C": b})
    with pytest.raises(ValueError, match="exponent r, which was not given"):
        rx.compose("A^r B", {"A": a, "B": b})
    with pytest.raises(ValueError, match="exponent s was given"):
        rx.compose("A^r B", {"A": a, "B": b}, r=1, s=2)
    with pytest.raises(ValueError, match="A and B hold the same array"):
        rx.compose("A B", {"A": a, "B": a})
    shared = rx.Loop(2, **option("adapter"))
    with pytest.raises(ValueError, match="r and s hold the same array"):
        rx.compose("A^r B^s", {"A": a, "B": b}, r=shared, s=shared)
    with pytest.raises(TypeError):
        rx.compose("A", {"A": 3})
    with pytest.raises(ValueError, match="at least one block"):
        rx.chain()
    with pytest.raises(TypeError, match="state holds arrays only"):
        rx.chain(a)("text")


def test_bad_rounds():
    model = rx.compose("A^r B", blocks("AB"), r=2)
    for bad, error in [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)]:
        with pytest.raises(error):
            rx.with_rounds(model, r=bad)
        with pytest.raises(error):
            rx.Loop(bad)
        # The type checker of the test suite stands before those; this is what a user reads.
        with pytest.raises(error, match=f"rounds must be (at least 1|an integer).*, got {bad!r}"):
            checked_rounds(bad, "rounds")
    with pytest.raises(ValueError, match=r"int32\[2\].*a number per example would save nothing"):
        checked_rounds(jnp.array([1, 2]), "rounds")
    with pytest.raises(ValueError, match="float32"):
        checked_rounds(jnp.array(1.0), "rounds")
    with pytest.raises(ValueError, match="named s: its loops are named r"):
        rx.with_rounds(model, s=2)
    with pytest.raises(ValueError, match="no named loop"):
        rx.with_rounds(rx.chain(rx.lift(jnp.sin)), r=2)
    with pytest.raises(ValueError, match="max=.* at least 1, got 0"):
        rx.Loop(3, max=0)


def test_with_rounds_reaches_every_level_and_changes_nothing_else():
    class Model(eqx.Module):
        inner: list
        bias: jax.Array

        def __call__(self, x):
            return self.inner[0](x) + self.bias

    nested = rx.compose("A^r B", {"A": rx.recur(Noisy(KEY), rx.Loop(1), name="s"), "B": Noisy(jr.key(2))}, r=1)
    model = Model([nested], jnp.ones(DIM))
    other = rx.with_rounds(model, r=2, s=3)
    assert other.inner[0].loops["r"].rounds == 2
    assert other.inner[0].blocks["A"].loops["s"].rounds == 3
    assert model.inner[0].loops["r"].rounds == 1
    arrays = lambda m: jax.tree.leaves(eqx.filter(m, eqx.is_array))
    assert all(a is b for a, b in zip(arrays(model), arrays(other)))
    want = rx.compose("(A^3)^2 B", {"A": nested.blocks["A"].blocks["A"], "B": nested.blocks["B"]})
    assert_close([other(jnp.ones(DIM))], [want(jnp.ones(DIM)) + 1], 1e-5)
