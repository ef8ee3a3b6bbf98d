"""Schedules, roles and optimisers, against closed formulas and an AdamW written by hand in numpy."""

import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import rinsx as rx
from rinsx import train


SCHEDULES = {
    "constant": train.constant,
    "cosine": train.cosine,
    "warmup_stable_decay": train.warmup_stable_decay,
    "reverse_square_root": train.reverse_square_root,
}
OPTIMIZERS = {"adamw": train.adamw, "adafactor": train.adafactor, "muon": train.muon}


class Block(eqx.Module):
    norm: eqx.nn.RMSNorm
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.RMSNorm(8)
        self.linear = eqx.nn.Linear(8, 8, key=key)

    def __call__(self, x):
        return x + self.linear(self.norm(x))


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    core: rx.Recursion
    head: eqx.nn.Linear

    def __call__(self, i):
        return self.head(self.core(self.embed(i)))


@pytest.fixture(scope="module")
def model():
    keys = jr.split(jr.key(0), 4)
    blocks = {"A": rx.nn.Stack.make(Block, 3, key=keys[0]), "B": Block(keys[1])}
    core = rx.compose("A^r B", blocks, r=rx.Loop(2, adapter=rx.adapters.NormLinear(8, rounds=2)))
    return Model(eqx.nn.Embedding(4, 8, key=keys[2]), core, eqx.nn.Linear(8, 4, key=keys[3]))


def floats(model):
    return eqx.filter(model, eqx.is_inexact_array)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_bounded_and_without_jumps(name):
    rates = np.asarray(jax.vmap(SCHEDULES[name](2.0))(jnp.linspace(0, 1, 5001)))
    assert rates.dtype == np.float32
    assert rates.min() >= 0 and rates.max() <= 2.0 + 1e-6 and np.isclose(rates.max(), 2.0)
    # The steepest is the warm-up, of slope 2 / 0.02.
    assert np.abs(np.diff(rates)).max() <= 2 / 0.02 / 5000 * 1.01


def test_schedules_on_points():
    cosine = train.cosine(1.0, warmup=0.2, floor=0.1)
    points = {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.55, 1: 0.1, 1.5: 0.1, -1: 0}
    assert all(float(cosine(x)) == pytest.approx(y, abs=1e-6) for x, y in points.items())
    wsd = train.warmup_stable_decay(1.0, warmup=0.2, decay=0.4, floor=0.5)
    points = {0.1: 0.5, 0.2: 1, 0.5: 1, 0.6: 1, 0.8: 0.75, 1: 0.5}
    assert all(float(wsd(x)) == pytest.approx(y, abs=1e-6) for x, y in points.items())
    root = train.reverse_square_root(1.0, warmup=0.1, timescale=0.1, cooldown=0.2)
    points = {0.05: 0.5, 0.1: 1, 0.4: 0.5, 0.9: 0.5 / 3, 1: 0}
    assert all(float(root(x)) == pytest.approx(y, abs=1e-6) for x, y in points.items())
    assert float(train.constant(0.3)(0.7)) == pytest.approx(0.3)
    assert float(train.warmup_stable_decay(1.0, warmup=0.0, decay=0.0)(1.0)) == 1
    train.warmup_stable_decay(1.0, warmup=0.7, decay=0.3)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: train.constant(0.0), "peak"),
        (lambda: train.constant(math.nan), "nan"),
        (lambda: train.cosine(1.0, warmup=1.0), "below 1"),
        (lambda: train.cosine(1.0, floor=1.5), "1.5"),
        (lambda: train.warmup_stable_decay(1.0, warmup=0.6, decay=0.5), r"warmup=0.6 \+ decay=0.5"),
        (lambda: train.reverse_square_root(1.0, timescale=0.0), "timescale"),
        (lambda: train.reverse_square_root(1.0, cooldown=-0.1), "-0.1"),
        (lambda: train.adamw(train.constant(1.0), clip=0.0), "clip"),
        (lambda: train.adamw(train.constant(1.0), b1=1.0), "b1"),
        (lambda: train.adamw(train.constant(1.0), decay={"matrices"}), "matrices"),
        (lambda: train.muon(train.constant(1.0), weight_decay=-1.0), "-1"),
        (lambda: train.adafactor(train.constant(1.0), decay_rate=0.0), "decay_rate"),
    ],
)
def test_bad_numbers_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_roles(model):
    named = train.roles(model)
    assert eqx.tree_equal(named, train.roles(floats(model)))
    a, b = named.core.blocks["A"].layers, named.core.blocks["B"]
    assert (a.norm.weight, a.linear.weight, a.linear.bias) == ("norm", "matrix", "vector")
    assert (b.norm.weight, b.linear.weight, b.linear.bias) == ("norm", "matrix", "vector")
    assert (named.embed.weight, named.head.weight, named.head.bias) == ("embedding", "embedding", "vector")
    assert set(jtu.tree_leaves(named.core.loops)) == {"adapter"}


def test_adamw_is_adamw(model):
    """Five steps, clipped, with decay on matrices and embeddings, against numpy in float64."""
    params = floats(model)
    optimizer = train.adamw(train.constant(0.01), b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, clip=0.5)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    decayed = [role in ("matrix", "embedding") for role in jtu.tree_leaves(train.roles(params))]
    leaves, structure = jtu.tree_flatten(params)
    theirs = [np.asarray(x, np.float64) for x in leaves]
    m, v = [0.0 * x for x in theirs], [0.0 * x for x in theirs]
    for t in range(1, 6):
        keys = jr.split(jr.key(t), len(leaves))
        grads = [(0.02 * t) * jr.normal(key, x.shape) for key, x in zip(keys, leaves)]
        updates, state = update(structure.unflatten(grads), state, params, fraction=t / 5)
        params = optax.apply_updates(params, updates)
        norm = math.sqrt(sum(float(np.sum(np.asarray(g, np.float64) ** 2)) for g in grads))
        for i, g in enumerate(grads):
            g = np.asarray(g, np.float64) * min(1, 0.5 / norm)
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.9 * v[i] + 0.1 * g**2
            step = m[i] / (1 - 0.8**t) / (np.sqrt(v[i] / (1 - 0.9**t)) + 1e-6)
            theirs[i] = theirs[i] - 0.01 * (step + 0.3 * decayed[i] * theirs[i])
    for ours, x in zip(jtu.tree_leaves(params), theirs):
        np.testing.assert_allclose(ours, x, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_decay_leaves_norms_biases_and_adapters_alone(make, model):
    params = jtu.tree_map(jnp.ones_like, floats(model))
    zeros = jtu.tree_map(jnp.zeros_like, params)

    def moved(**options):
        optimizer = make(train.constant(0.1), weight_decay=0.5, **options)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params, fraction=0.5)
        return jtu.tree_map(lambda u, role: (role, float(jnp.abs(u + 0.05).max()) < 1e-6), updates, train.roles(params))

    def pairs(tree):
        return set(jtu.tree_leaves(tree, is_leaf=lambda x: isinstance(x, tuple)))

    off = {("vector", False), ("norm", False), ("adapter", False)}
    assert pairs(moved()) == {("matrix", True), ("embedding", True)} | off
    chosen = pairs(moved(decay=lambda role: role == "norm"))
    assert {role for role, on in chosen if on} == {"norm"}


def test_muon_is_orthogonal_for_each_layer_of_a_stack(model):
    params = floats(model)
    grads = jtu.tree_map(lambda x: jr.normal(jr.key(x.size), x.shape), params)
    optimizer = train.muon(train.constant(1.0), weight_decay=0.0, rms=0.5)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, fraction=0.5)
    stacked = updates.core.blocks["A"].layers.linear.weight
    singular = np.linalg.svd(np.asarray(stacked), compute_uv=False) / (0.5 * math.sqrt(8))
    assert singular.min() > 0.5 and singular.max() < 1.3
    for i in range(3):
        alone = eqx.filter(Block(jr.key(0)), eqx.is_inexact_array)
        g = jtu.tree_map(lambda x: x[i], floats(grads.core.blocks["A"].layers))
        unclipped = train.muon(train.constant(1.0), weight_decay=0.0, rms=0.5, clip=None)
        u, _ = unclipped.update(g, unclipped.init(alone), alone, fraction=0.5)
        np.testing.assert_allclose(u.linear.weight, stacked[i], rtol=1e-3, atol=1e-4)


def test_muon_has_a_schedule_of_its_own_for_the_rest(model):
    params = floats(model)
    optimizer = train.muon(train.constant(1.0), adamw=train.constant(0.01), weight_decay=0.0)
    updates, _ = optimizer.update(params, optimizer.init(params), params, fraction=0.0)
    assert float(jnp.abs(updates.embed.weight).max()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_contract(make, schedule, model):
    """Runs under scan, takes the fraction, keeps the structure of its state, and makes a quadratic smaller."""
    params = floats(model)
    optimizer = make(schedule(0.05))
    loss = lambda p: sum(jnp.sum((x - 0.1) ** 2) for x in jtu.tree_leaves(p))

    @jax.jit
    def run(params, state):
        def step(carry, fraction):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params, fraction=fraction)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jnp.linspace(0, 1, 60))[0]

    state = optimizer.init(params)
    after, last = run(params, state)
    shapes = ft.partial(jtu.tree_map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert eqx.tree_equal(shapes(state), shapes(last))
    assert float(loss(after)) < 0.6 * float(loss(params))
    run(after, last)
    assert run._cache_size() == 1
    with pytest.raises(TypeError, match="fraction"):
        optimizer.update(params, state, params)


def test_parameters_are_floats_only(model):
    optimizer = train.adamw(train.constant(1.0))
    params = eqx.filter((model, jnp.arange(3)), eqx.is_array)
    with pytest.raises(ValueError, match="is_inexact_array"):
        optimizer.init(params)


def test_a_plain_optax_transformation_ignores_the_fraction(model):
    params = floats(model)
    optimizer = optax.with_extra_args_support(optax.sgd(0.1))
    updates, _ = optimizer.update(params, optimizer.init(params), params, fraction=0.5)
    assert eqx.tree_equal(updates.embed.weight, -0.1 * params.embed.weight)
