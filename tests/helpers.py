"""Blocks, loops, strategies and independent references that several test files share."""

import os
from collections import Counter
from collections.abc import Callable

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

import rinsx as rx


DIM = 5


def examples(n: int) -> hypothesis.settings:
    """`n` examples of a property, or a part of them, as the default of 25 is set lower (tests/conftest.py)."""
    return hypothesis.settings(max_examples=max(1, n * hypothesis.settings().max_examples // 25))


class Noisy(eqx.Module):
    """A block with weights that uses a side input and a key: everything that can go wrong in a visit shows."""

    weight: jax.Array

    def __init__(self, key):
        self.weight = jr.normal(key, (DIM, DIM), jnp.result_type(float)) / 2

    def __call__(self, x, scale=1.0, *, key=None):
        # Uniform: a normal draw takes several times as long to compile.
        noise = 0.0 if key is None else 0.1 * jr.uniform(key, x.shape, x.dtype)
        return jnp.tanh(x @ self.weight) * scale + 0.3 * x + noise


class Scale(eqx.Module):
    """An adapter of one's own."""

    weight: jax.Array

    def __call__(self, state, round):
        return state * (1 + self.weight[round])


class Mix(eqx.Module):
    """An injection of one's own, different in every round."""

    weight: jax.Array

    def __call__(self, state, input, round):
        return state + self.weight * input * (1 + round)


class Affine(eqx.Module):
    """A start of one's own, with a weight, made from the input and the key."""

    weight: jax.Array

    def __call__(self, input, key):
        return self.weight * input + 0.1 * jr.uniform(key, input.shape, input.dtype)


def blocks(names, seed=0) -> dict[str, Noisy]:
    return {name: Noisy(key) for name, key in zip(names, jr.split(jr.key(seed), max(len(names), 1)))}


def option(kind: str, seed=0, rounds=8) -> dict:
    """Options of a loop by what they exercise."""
    key = jr.fold_in(jr.key(99), seed)
    weight = jnp.asarray(0.3, jnp.result_type(float))
    adapter = Scale(0.2 * jr.normal(key, (rounds,), jnp.result_type(float)))
    return {
        "plain": {},
        "adapter": {"adapter": adapter},
        "inject": {"inject": Mix(weight)},
        "start": {"start": Affine(weight)},
        "all": {"adapter": adapter, "inject": Mix(weight), "start": Affine(weight)},
    }[kind]


OPTIONS = ("plain", "adapter", "inject", "start", "all")


def naive(model: rx.Recursion, state, *args, key=None) -> jax.Array:
    """What a recursion computes, as a Python loop with counters: nothing rolled, nothing taped, gradients by JAX."""
    order: list[str] = []
    visits: Counter[str] = Counter()
    entered: Counter[str] = Counter()

    def visit(name, state):
        if name not in order:
            order.append(name)
        kwargs = {}
        if key is not None:
            kwargs["key"] = jr.fold_in(jr.fold_in(key, order.index(name)), visits[name])
        visits[name] += 1
        return model.blocks[name](state, *args, **kwargs)

    def walk(node, state):
        if hasattr(node, "parts"):
            for part in node.parts:
                state = walk(part, state)
            return state
        if not hasattr(node, "body"):
            return visit(node.name, state)
        if isinstance(node.exponent, int):
            for _ in range(node.exponent):
                state = walk(node.body, state)
            return state
        loop = model.loops[node.exponent]
        entry = state
        if loop.start is not None:
            number = loop_numbers[node.exponent]
            folded = jr.fold_in(jr.fold_in(key, 2**32 - 1 - number), entered[node.exponent])
            state = loop.start(entry, folded)
        elif loop.inject is not None:
            state = jtu.tree_map(jnp.zeros_like, entry)
        entered[node.exponent] += 1
        last = None if loop.gradient is None else loop.gradient.last
        for i in range(int(loop.rounds)):
            if last is not None and 0 < i == int(loop.rounds) - last:
                state = jax.lax.stop_gradient(state)
            if loop.inject is not None:
                state = loop.inject(state, entry, i)
            if loop.adapter is not None:
                state = loop.adapter(state, i)
            state = walk(node.body, state)
        return state

    loop_numbers = {name: i for i, name in enumerate(_inner_first(model.signature.tree))}
    return walk(model.signature.tree, state)


def _inner_first(node) -> list[str]:
    """The names of exponents in the order in which their groups close in the text."""
    if hasattr(node, "parts"):
        return list(dict.fromkeys(name for part in node.parts for name in _inner_first(part)))
    if not hasattr(node, "body"):
        return []
    own = [] if isinstance(node.exponent, int) else [node.exponent]
    return list(dict.fromkeys(_inner_first(node.body) + own))


def value_and_grads(call: Callable, model, state, scale, key):
    """The value of a scalar of a model, and its gradients by weights, state and side input, as one list of arrays."""

    def loss(diff):
        model, state, scale = diff
        return jnp.sum(jnp.sin(call(model, state, scale, key=key)))

    value, grads = eqx.filter_value_and_grad(loss)((model, state, scale))
    return [value, *jtu.tree_leaves(eqx.filter(grads, eqx.is_inexact_array))]


def assert_close(a, b, tol=1e-10):
    """Two lists of arrays agree to `tol`, relative to the larger of 1 and their size."""
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.shape == y.shape and x.dtype == y.dtype
        error = float(jnp.max(jnp.abs(x - y))) if x.size else 0.0
        assert error <= tol * max(1.0, float(jnp.max(jnp.abs(y)))), (error, x, y)


def environment() -> dict[str, str]:
    """That of a job's process: the tests' eight devices are not for its workers."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "MPLBACKEND": "Agg"}


@st.composite
def signatures(draw, depth=3) -> str:
    """Texts of signatures over A, B, C with small exponents and the names r, s."""

    def sequence(depth) -> str:
        return " ".join(term(depth) for _ in range(draw(st.integers(1, 3 if depth == 3 else 2))))

    def term(depth) -> str:
        atom = draw(st.sampled_from("ABC")) if depth == 0 or draw(st.booleans()) else f"({sequence(depth - 1)})"
        exponent = draw(st.sampled_from(["", "", "^2", "^r", "^s"]))
        return atom + exponent

    return sequence(depth)
