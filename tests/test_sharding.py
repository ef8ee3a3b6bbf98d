"""Eight devices, under Auto and Explicit meshes: the value and the gradients of one device."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import rinsx as rx


KEY = jr.key(0)
WIDTH = 8


class Layer(eqx.Module):
    weight: jax.Array

    def __init__(self, key):
        self.weight = jr.normal(key, (WIDTH, WIDTH)) / 3

    def __call__(self, x, *, key=None):
        return x + jnp.tanh(x @ self.weight)


def model(traced):
    keys = jr.split(KEY, 5)
    blocks = {"A": rx.nn.Stack([Layer(keys[0]), Layer(keys[1])]), "B": Layer(keys[2])}
    r = rx.Loop(3, max=4, adapter=rx.adapters.NormLinear(WIDTH, rounds=4, key=keys[3]))
    s = rx.Loop(2, max=3, inject=rx.injection.Concat(WIDTH, key=keys[4]), start=rx.start.Normal(seed=0))
    m = rx.compose("(A^r B)^s", blocks, r=r, s=s)
    return rx.with_rounds(m, r=jnp.int32(3), s=jnp.int32(2)) if traced else m


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_is_unsharded(kind, traced):
    step = eqx.filter_jit(eqx.filter_value_and_grad(lambda m, x: jnp.mean(m(x, key=KEY) ** 2)))
    x = jr.normal(KEY, (16, WIDTH))
    want = step(model(traced), x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        arrays, static = eqx.partition(model(traced), eqx.is_array)
        arrays = jax.device_put(arrays, NamedSharding(mesh, P()))
        got = step(eqx.combine(arrays, static), jax.device_put(x, NamedSharding(mesh, P("data"))))
    leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    for a, b in zip(leaves(got), leaves(want)):
        assert jnp.allclose(jax.device_get(a), jax.device_get(b), atol=1e-5)


@pytest.mark.parametrize("traced", [False, True])
def test_the_tape_is_sharded_like_the_state(traced):
    """Eight devices hold an eighth of the saved states each."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.ones((1024, WIDTH))
    layer = Layer(KEY)

    def temporary(x):
        def loss(x, r):
            m = rx.recur(layer, rx.Loop(r if traced else 64, max=64, unroll=None if traced else False))
            return jnp.sum(m(x))

        return jax.jit(jax.grad(loss)).lower(x, jnp.int32(64)).compile().memory_analysis().temp_size_in_bytes

    with jax.set_mesh(mesh):
        sharded = temporary(jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert sharded < temporary(x) / 4
