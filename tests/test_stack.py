"""A stack is its layers one after the other."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import rinsx as rx

from .helpers import assert_close, DIM, Noisy


KEY = jr.key(0)
KEYS = jr.split(KEY, 6)


def in_order(layers, x, key):
    for i, layer in enumerate(layers):
        x = layer(x, 0.9, key=jr.fold_in(key, i))
    return x


@pytest.mark.parametrize("unroll", [None, True, False])
@pytest.mark.parametrize("gradient", [None, rx.gradient.Full(), rx.gradient.Remat()])
def test_values_and_gradients(unroll, gradient):
    layers = [Noisy(key) for key in KEYS]
    stack = rx.nn.Stack(layers, unroll=unroll, gradient=gradient)
    x = jr.normal(KEY, (DIM,))
    loss = lambda stack: jnp.sum(stack(x, 0.9, key=KEY))
    value, grads = eqx.filter_jit(eqx.filter_value_and_grad(loss))(stack)
    want, want_grads = eqx.filter_value_and_grad(lambda layers: jnp.sum(in_order(layers, x, KEY)))(layers)
    assert_close([value], [want], 1e-5)
    assert_close([grads.layers.weight], [jnp.stack([g.weight for g in want_grads])], 1e-5)


def test_make_is_the_stack_of_the_layers():
    made = rx.nn.Stack.make(Noisy, 6, key=KEY, gradient=rx.gradient.Remat())
    assert eqx.tree_equal(made, rx.nn.Stack([Noisy(key) for key in KEYS], gradient=rx.gradient.Remat()))
    assert rx.nn.Stack.make(Noisy, 1, key=KEY).depth == 1
    # A raw key of two numbers is one key.
    raw = rx.nn.Stack.make(lambda key: Noisy(jr.wrap_key_data(key)), 2, key=jr.PRNGKey(0))
    assert raw.depth == 2 and not jnp.array_equal(*raw.layers.weight)


def test_one_layer_is_compiled():
    def lines(depth):
        stack = rx.nn.Stack([Noisy(KEY)] * depth, unroll=False)
        return len(jax.jit(lambda x: stack(x)).lower(jnp.ones(DIM)).as_text().splitlines())

    assert lines(3) == lines(60)


def test_as_a_block_under_every_number_of_rounds():
    stack = rx.nn.Stack([Noisy(key) for key in KEYS])
    model = rx.compose("A^r B", {"A": stack, "B": Noisy(KEY)}, r=rx.Loop(3, max=4))
    grad = lambda model: eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(DIM), 0.9, key=KEY)))(model)
    leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    assert_close(leaves(grad(rx.with_rounds(model, r=jnp.int32(3)))), leaves(grad(model)), 1e-5)


@pytest.mark.parametrize("depth", [3, 20])
def test_rounds_reach_recursions_in_the_layers(depth):
    stack = rx.nn.Stack.make(lambda key: rx.recur(eqx.nn.Linear(4, 4, key=key), rx.Loop(2, max=3)), depth, key=KEY)
    grad = eqx.filter_value_and_grad(lambda m: jnp.sum(m(jnp.ones(4))))
    leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    traced, static = (grad(rx.with_rounds(stack, r=r)) for r in (jnp.int32(3), 3))
    assert_close(leaves(traced), leaves(static), 1e-5)


def test_bad_stacks():
    with pytest.raises(ValueError, match="at least one layer"):
        rx.nn.Stack([])
    with pytest.raises(ValueError, match="at least one layer, got depth=0"):
        rx.nn.Stack.make(Noisy, 0, key=KEY)
    linear = lambda out: eqx.nn.Linear(4, out, key=KEY)
    with pytest.raises(ValueError, match="layer 1 is"):
        rx.nn.Stack([linear(4), linear(5)])
    with pytest.raises(ValueError, match="layer 1 is"):
        rx.nn.Stack([eqx.nn.Lambda(jnp.sin), eqx.nn.Lambda(jnp.cos)])
    with pytest.raises(ValueError, match="layer Linear of a stack must keep"):
        rx.nn.Stack([linear(5)])(jnp.ones(4))
