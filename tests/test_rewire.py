"""Recursion in models that others wrote: the old model at one round, the naive loop beyond."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from equimo.models.vit import VisionTransformer

import rinsx as rx

from .helpers import assert_close


KEY = jr.key(0)


class Layer(eqx.Module):
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.linear = eqx.nn.Linear(6, 6, key=key)

    def __call__(self, x, *, key=None):
        noise = 0 if key is None else 0.1 * jr.uniform(key, x.shape)
        return x + jnp.tanh(self.linear(x)) + noise


class Zipped(eqx.Module):
    """The loop that drops visits when its sequence grows."""

    layers: list
    depth: int = eqx.field(static=True)

    def __call__(self, x, key):
        for layer, sub in zip(self.layers, jr.split(key, self.depth)):
            x = layer(x, key=sub)
        return x


def zipped(depth=6):
    return Zipped([Layer(key) for key in jr.split(KEY, depth)], depth)


def in_order(model, order, x):
    for i in order:
        x = model.layers[i](x)
    return x


class Keyless(eqx.Module):
    layers: tuple

    def __call__(self, x):
        for i in range(len(self.layers)):
            x = self.layers[i](x)
        return x


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "text, split, order",
    [
        ("A^r B", None, lambda r, s: (0, 1, 2) * r + (3, 4, 5)),
        ("A^r B", (1, 5), lambda r, s: (0,) * r + (1, 2, 3, 4, 5)),
        ("A B^r C", None, lambda r, s: (0, 1) + (2, 3) * r + (4, 5)),
        ("A B^r", (5, 1), lambda r, s: (0, 1, 2, 3, 4) + (5,) * r),
        ("(A B)^r", None, lambda r, s: tuple(range(6)) * r),
        ("(A^r B)^s", None, lambda r, s: ((0, 1, 2) * r + (3, 4, 5)) * s),
        ("(A^r B)^s C", (1, 2, 3), lambda r, s: ((0,) * r + (1, 2)) * s + (3, 4, 5)),
        ("(A^2)^r B^3", None, lambda r, s: (0, 1, 2) * 2 * r + (3, 4, 5) * 3),
    ],
)
def test_rewired_is_the_layers_in_order(text, split, order, traced):
    model = Keyless(tuple(zipped().layers))
    names = rx.Signature(text).exponents
    x = jr.normal(KEY, (6,))
    new = rx.rewire(model, lambda m: m.layers, text, split=split, **{name: rx.Loop(1, max=4) for name in names})
    leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    for r, s in [(1, 1), (3, 1), (2, 3)]:
        values = {name: {"r": r, "s": s}[name] for name in names}
        values = {name: jnp.int32(v) for name, v in values.items()} if traced else values
        run = eqx.filter_value_and_grad(lambda m: jnp.sum(rx.with_rounds(m, **values)(x)))
        value, grads = eqx.filter_jit(run)(new)
        want, want_grads = eqx.filter_value_and_grad(lambda m: jnp.sum(in_order(m, order(r, s), x)))(model)
        assert_close([value, *leaves(grads)], [want, *leaves(want_grads)], 1e-4)


@pytest.mark.parametrize("text", ["A^r B", "A B^r C", "(A^r B)^s"])
def test_at_one_round_it_is_the_old_model_bit_for_bit(text):
    """Keys included: the model splits them for its layers as it did."""
    model = zipped()
    names = rx.Signature(text).exponents
    new = rx.rewire(model, lambda m: m.layers, text, **{name: 1 for name in names})
    x = jr.normal(KEY, (6,))
    assert jnp.array_equal(new(x, jr.key(4)), model(x, jr.key(4)))
    count = lambda m: sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(m, eqx.is_inexact_array)))
    assert count(new) == count(model)


def test_no_visit_is_dropped_and_keys_differ():
    model = zipped()
    new = rx.rewire(model, lambda m: m.layers, "A^r B", r=3)
    x = jr.normal(KEY, (6,))
    seen = rx.trace(new, x, jr.key(4))
    assert seen.rounds == ("r=1", "r=2", "r=3")
    a = lambda x, keys: [x := model.layers[i](x, key=key) for i, key in enumerate(keys)][-1]
    keys = jr.split(jr.key(4), 6)
    state = a(x, keys[:3])
    assert_close([seen.states[0]], [state], 1e-6)
    for n in (1, 2):
        visit = jr.fold_in(jr.fold_in(jr.fold_in(keys[2], 2**31), 0), n)
        state = a(state, [jr.fold_in(visit, i) for i in range(3)])
        assert_close([seen.states[n]], [state], 1e-6)


@pytest.mark.parametrize("rounds", [1, 3])
def test_equimo_vision_transformer(rounds):
    vit = VisionTransformer(
        img_size=32, in_channels=3, dim=32, patch_size=8, num_heads=[2], depths=[4], num_classes=10, key=jr.PRNGKey(0)
    )
    images = jr.normal(KEY, (2, 3, 32, 32))
    where = lambda m: m.blocks[0].blocks
    key = jr.PRNGKey(2)
    run = lambda m, inference=True: jax.vmap(lambda x: m(x, key=key, inference=inference))(images)
    new = rx.rewire(vit, where, "A^r B", r=rx.Loop(rounds, max=4))
    if rounds == 1:
        assert jnp.array_equal(run(new), run(vit))
        assert jnp.array_equal(run(new, inference=False), run(vit, inference=False))
    layers = tuple(where(vit))
    longer = eqx.tree_at(where, vit, layers[:2] * rounds + layers[2:])
    assert_close([run(new)], [run(longer)], 1e-5)
    traced = rx.with_rounds(new, r=jnp.int32(rounds))
    assert_close([run(traced)], [run(longer)], 1e-5)
    seen = rx.trace(run, new)
    assert [state.shape[0] for state in seen.states] == [2] * rounds
    assert all(drift.shape == (2,) and bool(jnp.all(drift > 0)) for drift in seen.drift)


def test_sequential_and_adapters():
    keys = jr.split(KEY, 4)
    model = eqx.nn.Sequential([Layer(key) for key in keys])
    x = jr.normal(KEY, (6,))
    for where in (lambda m: m, lambda m: m.layers):
        new = rx.rewire(model, where, "A^r B", r=2)
        assert_close([new(x)], [in_order(model, (0, 1, 0, 1, 2, 3), x)], 1e-5)
        assert new(x, key=KEY).shape == (6,)
    film = rx.adapters.FiLM(6, rounds=2)
    film = eqx.tree_at(
        lambda a: jax.tree.leaves(a), film, [leaf + 0.1 * (i + 1) for i, leaf in enumerate(jax.tree.leaves(film))]
    )
    for rounds in (2, jnp.int32(2)):
        new = rx.rewire(model, lambda m: m, "A^r B", r=rx.Loop(rounds, max=2, adapter=film))
        want = in_order(model, (2, 3), in_order(model, (0, 1), film(in_order(model, (0, 1), film(x, 0)), 1)))
        assert_close([new(x)], [want], 1e-5)


@pytest.mark.parametrize("text, static", [("A^r B", {"r": 1}), ("(A^r B)^s", {"r": 2, "s": 1})])
def test_a_loop_with_no_further_round_has_a_gradient(text, static):
    model = eqx.nn.Sequential([Layer(key) for key in jr.split(KEY, 2)])
    loops = {name: rx.Loop(value, max=value) for name, value in static.items()}
    new = rx.rewire(model, lambda m: m, text, **loops)
    grad = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(6)) ** 2))
    leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    assert_close(leaves(grad(rx.with_rounds(new, r=jnp.int32(static["r"])))), leaves(grad(new)), 1e-6)


def test_truncation_cuts_the_first_round_too():
    model = Keyless(tuple(zipped(4).layers))
    x = jr.normal(KEY, (6,))
    for rounds in (3, jnp.int32(3)):
        new = rx.rewire(model, lambda m: m.layers, "A^r B", r=rx.Loop(rounds, max=3, gradient=rx.gradient.Last(2)))
        assert float(jnp.abs(jax.grad(lambda x: jnp.sum(new(x)))(x)).max()) == 0.0
        grads = eqx.filter_grad(lambda m: jnp.sum(m(x)))(new)

        def two_phase(model):
            state = jax.lax.stop_gradient(in_order(model, (0, 1), x))
            return jnp.sum(in_order(model, (0, 1, 0, 1, 2, 3), state))

        want = eqx.filter_grad(two_phase)(model)
        leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
        assert_close(leaves(grads), leaves(want), 1e-5)


def test_what_cannot_be_rewired_is_refused():
    model = zipped()
    where = lambda m: m.layers
    with pytest.raises(ValueError, match="cannot be split into 4 equal groups"):
        rx.rewire(model, where, "A B C D^r", r=2)
    with pytest.raises(ValueError, match=r"split=\(2, 2\) must give each of the 2 blocks"):
        rx.rewire(model, where, "A^r B", r=2, split=(2, 2))
    with pytest.raises(ValueError, match="names a block twice"):
        rx.rewire(model, where, "A^r B A", r=2, split=(2, 2, 2))
    with pytest.raises(ValueError, match="injection or a start state"):
        rx.rewire(model, where, "A^r B", r=rx.Loop(2, inject=rx.injection.Add()))
    with pytest.raises(ValueError, match=r"loop r has the policy First\(\), which a rewired model cannot have"):
        rx.rewire(model, where, "A^r B", r=rx.Loop(2, cache=rx.cache.First()))
    rewired = rx.cache.with_policy(rx.rewire(model, where, "A^r B", r=2), r=rx.cache.Last())
    with pytest.raises(ValueError, match=r"loop r has the policy Last\(k=1\)"):
        rewired(jnp.ones(6), KEY)
    with pytest.raises(TypeError, match="got Zipped"):
        rx.rewire(model, lambda m: m, "A^r B", r=2)
    with pytest.raises(ValueError, match="exponent r, which was not given"):
        rx.rewire(model, where, "A^r B")
    with pytest.raises(TypeError, match="layer 1 of the sequence is not callable"):
        rx.rewire([jnp.sin, 3], lambda m: m, "A^r B", r=2)
    stateful = eqx.nn.Sequential([Layer(KEY), eqx.nn.BatchNorm(6, "batch", mode="ema")])
    with pytest.raises(ValueError, match="BatchNorm.*is stateful"):
        rx.rewire(stateful, lambda m: m, "A^r B", r=2)


def test_layers_that_return_something_else_are_refused_when_called():
    pair = lambda x: (x, None)
    bigger = lambda x: jnp.concatenate([x, x])
    for layer in (pair, bigger):
        new = rx.rewire(Keyless((layer, rx.lift(jnp.sin))), lambda m: m.layers, "A^r B", r=2)
        with pytest.raises(ValueError, match="rewired layer .* must keep the structure"):
            new(jnp.ones(6))
