"""What rx.trace sees: every round, in order, in any model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import rinsx as rx

from .helpers import assert_close, blocks, DIM, Noisy
from .test_operators import build


KEY = jr.key(0)


def states_by_hand(block, x, rounds):
    states = []
    for _ in range(rounds):
        x = block(x)
        states.append(x)
    return states


def drift_by_hand(before, after):
    return jnp.linalg.norm(after - before) / jnp.linalg.norm(before)


@pytest.mark.parametrize("unroll", [None, False])
def test_states_and_drift(unroll):
    a, b = blocks("AB").values()
    model = rx.compose("A^r B", {"A": a, "B": b}, r=rx.Loop(4, unroll=unroll))
    x = jr.normal(KEY, (DIM,))
    seen = rx.trace(model, x)
    states = states_by_hand(a, x, 4)
    assert seen.rounds == ("r=1", "r=2", "r=3", "r=4")
    assert_close(seen.states, states, 1e-6)
    assert_close(seen.drift, [drift_by_hand(s, t) for s, t in zip([x, *states], states)], 1e-5)
    assert_close([seen.output], [model(x)], 1e-6)


def test_nested_and_fixed_rounds_are_listed_as_they_end():
    model = build("(A^2 B^r)^s", {"r": 1, "s": 2})
    seen = rx.trace(model, jnp.ones(DIM), key=KEY)
    assert seen.rounds == ("^2=1", "^2=2", "r=1", "s=1") + ("^2=1", "^2=2", "r=1", "s=2")
    assert_close([seen.states[-1]], [seen.output], 1e-6)


@pytest.mark.parametrize("text", ["(A^2 B)^2", "(A^r B)^r", "(A^r)^2 B^2"])
def test_drift_of_nested_loops_of_one_name(text):
    """Each round is compared with the state before that same round, whatever ran inside."""
    model = build(text, {"r": 2})
    seen = rx.trace(model, jnp.ones(DIM))
    spelled = rx.Signature(text).bind(**{name: 2 for name in rx.Signature(text).exponents}).visits
    states = [jnp.ones(DIM)]
    for name in spelled:
        states.append(model.blocks[name](states[-1]))
    for state, drift in zip(seen.states, seen.drift):
        after = min(range(len(states)), key=lambda i: float(jnp.abs(states[i] - state).max()))
        assert any(float(jnp.abs(drift_by_hand(states[i], states[after]) - drift)) < 1e-5 for i in range(after))
    outer = [i for i, label in enumerate(seen.rounds) if label == seen.rounds[-1]][-1]
    if text != "(A^r)^2 B^2":
        assert_close([seen.drift[outer]], [drift_by_hand(states[3], states[6])], 1e-5)


def test_in_a_model_with_its_own_vmap_and_jit():
    """Whatever axis `vmap` computes with, states come out with the batch in front; cached jits are seen into."""
    weight = jr.normal(KEY, (DIM, DIM)) / 3
    recursion = rx.recur(rx.lift(lambda x: weight @ x), 2)

    @eqx.filter_jit
    def model(x):
        return {"out": jax.vmap(jax.vmap(recursion))(x), "note": "static"}

    x = jr.normal(KEY, (3, 4, DIM))
    out = model(x)
    for _ in range(2):
        seen = rx.trace(model, x)
        assert seen.output["note"] == "static"
        assert_close([seen.output["out"], seen.states[1]], [out["out"], out["out"]], 1e-5)
        want = jax.vmap(jax.vmap(lambda x: drift_by_hand(x, weight @ x)))(x)
        assert_close([seen.drift[0]], [want], 1e-5)


def test_trace_is_a_function_of_arrays():
    model = rx.recur(Noisy(KEY), 3)
    seen = jax.jit(lambda x: rx.trace(model, x).drift)(jnp.ones(DIM))
    assert_close(seen, rx.trace(model, jnp.ones(DIM)).drift, 1e-6)


def test_what_cannot_be_seen_is_an_error():
    model = rx.recur(Noisy(KEY), 3)
    inside = lambda x: jax.lax.scan(lambda x, _: (model(x), None), x, None, length=2)[0]
    with pytest.raises(ValueError, match="cannot see the rounds r=1, r=2, r=3"):
        rx.trace(inside, jnp.ones(DIM))
    with pytest.raises(ValueError, match="needs a Python integer for the rounds of r"):
        rx.trace(rx.with_rounds(model, r=jnp.int32(2)), jnp.ones(DIM))
    jitted = jax.jit(lambda x: model(x))
    with pytest.raises(ValueError, match="called more than once"):
        rx.trace(lambda x: jitted(jitted(x)), jnp.ones(DIM))
    layers = eqx.nn.Sequential([eqx.nn.Linear(4, 4, key=key) for key in jr.split(KEY, 2)])
    with pytest.raises(ValueError, match="without its beginning"):
        rx.trace(rx.rewire(layers, lambda m: m.layers, "A^r", r=2).layers[1], jnp.ones(4))
    seen = rx.trace(jnp.sin, jnp.ones(DIM))
    assert seen.rounds == () and seen.states == []
