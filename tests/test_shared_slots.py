"""Training under a policy that shares slots is plain training otherwise: windows, injections, keys, meshes, blocks of one's own."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rinsx as rx


WIDTH = 8
LAYER = rx.nn.TransformerLayer(WIDTH, heads=2, hidden=16, key=jr.key(0))
X = jr.normal(jr.key(1), (4, 5, WIDTH))
POLICIES = [rx.cache.First(), rx.cache.Every(2)]


@eqx.filter_jit
@eqx.filter_grad
def gradient(weights, rest, x):
    return jnp.sum(eqx.combine(weights, rest)(x) ** 2)


def gradients(model, x=X):
    return jax.tree.leaves(gradient(*eqx.partition(model, eqx.is_inexact_array), x))


def assert_close(got, want, atol=1e-3):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(jax.device_get(a), b, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("inject", [rx.injection.Add(), rx.injection.Concat(WIDTH, key=jr.key(2))])
@pytest.mark.parametrize("last", [None, 2])
def test_injections_have_gradients_at_traced_rounds(policy, inject, last):
    cut = None if last is None else rx.gradient.Last(last)
    make = lambda r: rx.recur(LAYER, rx.Loop(r, max=4, inject=inject, cache=policy, gradient=cut))
    assert_close(gradients(make(jnp.int32(3))), gradients(make(3)))


@pytest.mark.parametrize("policy", POLICIES)
def test_windows_train_as_they_decode(policy):
    config = rx.models.DecoderConfig(11, WIDTH, 2, 2, kv_heads=1, hidden=16, context=7, dtype="float32")
    model = rx.models.DecoderLM(config, "A^r B", r=rx.Loop(3, cache=policy), windows={"A": 3}, key=jr.key(0))
    tokens = jr.randint(jr.key(3), (2, 7), 0, 11)
    cache, out = model.cache(2, 7), []
    for t in range(7):
        hidden, cache = model.decode(tokens[:, t : t + 1], cache)
        out.append(model.logits(hidden))
    np.testing.assert_allclose(jnp.concatenate(out, 1), model(tokens), rtol=1e-4, atol=1e-4)


class Mean(eqx.Module):
    """Does its own attention: a mean of what is seen."""

    def __call__(self, state, *, key=None):
        x, cache = rx.cache.open(state)
        cache = cache.append(x[:, None], x[:, None])
        seen_of = lambda seen: jnp.broadcast_to(seen, (x.shape[0], *seen.shape[-2:])).astype(x.dtype)
        step = lambda carry, k, v, seen: (
            carry[0] + seen_of(seen) @ v[:, 0],
            carry[1] + seen_of(seen).sum(-1, keepdims=True),
        )
        total, count = cache.fold(step, (jnp.zeros_like(x), jnp.zeros((*x.shape[:-1], 1))))
        return cache.close(x + total / count)


def test_a_block_outside_the_loop_does_its_own_attention():
    blocks = {"A": LAYER, "B": Mean()}
    body = rx.compose("A^r B", blocks, r=rx.Loop(2, cache=rx.cache.First()))
    inner = rx.recur(LAYER, rx.Loop(2, cache=rx.cache.First()))(X)
    mean = jnp.cumsum(inner, 1) / jnp.arange(1, X.shape[1] + 1)[:, None]
    np.testing.assert_allclose(body(X), inner + mean, rtol=1e-5, atol=1e-5)
    cache = rx.cache.make(body, X[:, :1], X.shape[1])
    np.testing.assert_allclose(body(rx.cache.Stream(X, cache.begin(X.shape[1]))).x, body(X), rtol=1e-4, atol=1e-4)


class Mapped(eqx.Module):
    """Maps over its batch by itself, and attends within."""

    attention: rx.nn.Attention

    def __call__(self, state, *, key=None):
        def one(state):
            x, cache = rx.cache.open(state)
            project = lambda linear: linear(x).reshape(x.shape[0], 2, -1).swapaxes(0, 1)
            q, k, v = (project(linear) for linear in (self.attention.q, self.attention.k, self.attention.v))
            out, cache = cache.attend(q, k, v)
            return cache.close(x + self.attention.out(out.swapaxes(0, 1).reshape(x.shape)))

        return jax.vmap(one)(state)


@pytest.mark.parametrize("policy", [None, rx.cache.First()])
def test_a_block_that_maps_over_its_batch_attends_in_training_too(policy):
    attention = rx.nn.Attention(WIDTH, heads=2, key=jr.key(0))
    mapped = rx.recur(Mapped(attention), rx.Loop(3, cache=policy))
    model = rx.recur(Mapped(attention), rx.Loop(3, cache=policy))
    alone = jnp.concatenate([model(X[b : b + 1]) for b in range(X.shape[0])])
    np.testing.assert_allclose(mapped(X), alone, rtol=1e-5, atol=1e-5)
    cache = rx.cache.make(mapped, X[:, :1], X.shape[1])
    np.testing.assert_allclose(mapped(rx.cache.Stream(X, cache.begin(X.shape[1]))).x, alone, rtol=1e-4, atol=1e-4)


class Dropped(eqx.Module):
    attention: rx.nn.Attention
    dropout: eqx.nn.Dropout

    def __call__(self, state, *, key):
        x, cache = rx.cache.open(self.attention(state))
        return cache.close(self.dropout(x, key=key))


def test_a_block_may_need_a_key():
    block = Dropped(rx.nn.Attention(WIDTH, heads=2, key=jr.key(0)), eqx.nn.Dropout(0.5))
    run = lambda key: rx.recur(block, rx.Loop(2, cache=rx.cache.First()))(X, key=key)
    np.testing.assert_array_equal(run(jr.key(1)), run(jr.key(1)))
    assert not jnp.array_equal(run(jr.key(1)), run(jr.key(2)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("traced", [False, True])
def test_under_a_mesh(kind, traced):
    model = rx.recur(LAYER, rx.Loop(jnp.int32(3) if traced else 3, max=3, cache=rx.cache.Every(2)))
    want = gradients(model)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
        everywhere = jax.tree.map(lambda x: put(x) if eqx.is_array(x) else x, model)
        assert_close(gradients(everywhere, put(X, "data")), want)


def test_a_trace_is_of_what_blocks_compute_on():
    model = rx.recur(LAYER, rx.Loop(2, cache=rx.cache.First()))
    seen = rx.trace(model, X)
    one = rx.recur(LAYER, rx.Loop(1, cache=rx.cache.First()))(X)
    np.testing.assert_allclose(seen.states[0], one, rtol=1e-5, atol=1e-5)
    states = [X, one, model(X)]
    far = [jnp.linalg.norm(b - a) / jnp.linalg.norm(a) for a, b in zip(states, states[1:])]
    np.testing.assert_allclose(seen.drift, far, rtol=1e-5)


class Inside(eqx.Module):
    inner: rx.Recursion

    def __call__(self, state, *, key=None):
        return self.inner(state)


def test_what_is_refused():
    with pytest.raises(ValueError, match="a recursion inside a block was given the state of the block"):
        rx.recur(Inside(rx.recur(LAYER, 2)), rx.Loop(2, cache=rx.cache.First()))(X)
