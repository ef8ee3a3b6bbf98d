"""What is built on counts: expectations and runs of random depth, plans at matched compute, sizes, bytes."""

import math
from fractions import Fraction

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import assume, example, given

import rinsx as rx


#
# Random depths
#


def key(scope="", kind="matmul"):
    return (scope, "forward", "dot_general", kind)


def affine(a, b):
    """A cost that is `a` for each round and `b` once."""
    return lambda r: rx.flops.Cost({key("a"): a * r, key("b", "elementwise"): b})


@st.composite
def tables(draw):
    """Random laws, as mappings from values to exact probabilities."""
    weights = draw(st.dictionaries(st.integers(1, 9), st.integers(0, 7), min_size=1, max_size=5))
    total = sum(weights.values())
    assume(total > 0)
    return {value: Fraction(weight, total) for value, weight in weights.items()}


def test_expectation_over_a_binomial():
    """Each of the two further rounds is skipped four times of five: 7/5 rounds."""
    law = rx.depth.Binomial(3, skip="4/5")
    cost = rx.flops.expected(affine(100, 7), r=law)
    assert cost == rx.flops.Cost({key("a"): 140, key("b", "elementwise"): 7})
    assert (cost.total, cost.matmul) == (147, 140)
    square = rx.flops.expected(lambda r: r * r, r=law)
    assert square == Fraction(1 * 16 + 4 * 8 + 9 * 1, 25)


@given(tables(), st.integers(0, 50), st.integers(0, 50))
def test_expectation_is_linear(law, a, b):
    mean = sum(value * p for value, p in law.items())
    assert rx.flops.expected(affine(a, b), r=law).total == a * mean + b
    assert rx.flops.expected(lambda r: a * r + b, r=law) == a * mean + b


@given(tables(), tables())
def test_expectation_over_independent_depths(r, s):
    want = sum(p * q * (i**2 + 3 * i * j) for i, p in r.items() for j, q in s.items())
    assert rx.flops.expected(lambda r, s: r**2 + 3 * r * s, r=r, s=s) == want


@given(st.integers(1, 6), st.fractions(0, 1, max_denominator=9))
def test_expectation_of_a_recursion(most, skip):
    """Of `A^r B`, with one count for each depth that can be drawn and no arrays at all."""
    a = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    blocks = {name: eqx.tree_at(lambda layer: layer.weight, LAYER, a) for name in "AB"}
    model = rx.compose("A^r B", blocks, r=1)
    cost = lambda r: rx.flops.count(rx.with_rounds(model, r=r), jax.ShapeDtypeStruct((4,), jnp.float32))
    law = rx.depth.Binomial(most, skip=skip)
    assert rx.flops.expected(cost, r=law).total == 32 * (law.mean() + 1)


LAYER = eqx.nn.Linear(4, 4, use_bias=False, key=jr.key(0))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=30), st.integers(0, 50), st.integers(0, 50))
def test_spent_is_the_sum_over_steps(draws, a, b):
    r, s = [list(column) for column in zip(*draws)] or [[], []]
    calls = []

    def cost(r, s):
        calls.append((r, s))
        return a * r + b * s

    assert rx.flops.spent(cost, r=r, s=np.asarray(s, int)) == a * sum(r) + b * sum(s)
    assert len(calls) == len(set(calls))
    assert rx.flops.spent(affine(a, b), r=jnp.asarray(r, jnp.int32)) == sum(map(affine(a, b), r))


def test_spent_of_a_quota_is_what_was_expected():
    """A quota of whole proportions spends exactly what its law expects."""
    law = rx.depth.Binomial(3, skip="4/5")
    rounds = law.quota(250, jr.key(0))
    assert rx.flops.spent(affine(100, 7), r=rounds) == 250 * rx.flops.expected(affine(100, 7), r=law)


def test_laws_and_draws_that_cannot_be():
    for law in ({1: Fraction(1, 2)}, {1: 2, 2: -1}, {}):
        with pytest.raises(ValueError, match="`r` must not be negative and must sum to one"):
            rx.flops.expected(lambda r: r, r=law)
    with pytest.raises(TypeError, match="must be exact"):
        rx.flops.expected(lambda r: r, r={1: 0.5, 2: 0.5})
    assert rx.flops.expected(lambda r: r, r={1: "1/3", 4: "2/3"}) == 3
    with pytest.raises(ValueError, match="sequence of integers"):
        rx.flops.spent(lambda r: r, r=[1.5])
    with pytest.raises(ValueError, match="sequence of integers"):
        rx.flops.spent(lambda r: r, r=[[1]])
    with pytest.raises(ValueError, match="as many for each argument"):
        rx.flops.spent(lambda r, s: r + s, r=[1, 2], s=[1])


#
# Plans
#


costs = st.integers(1, 10**18) | st.fractions(1, 10**6)
candidates = st.dictionaries(st.text("abc", min_size=1, max_size=3), costs, min_size=1, max_size=6)


@given(candidates, st.integers(1, 10**24))
@example({"a": 2, "b": 3}, 3)
def test_every_candidate_is_within_half_a_step(candidates, budget):
    assume(budget >= max(candidates.values()))
    plan = rx.flops.match(candidates, budget=budget)
    assert list(plan) == list(candidates) and len(plan) == len(candidates) and plan.budget == budget
    for name, row in plan.items():
        assert row.name == name and row.steps >= 1 and row.tokens is None
        assert row.cost_per_step == candidates[name] and row.total == row.steps * candidates[name]
        assert row.residual == row.total - budget and row.relative == Fraction(row.residual) / budget
        assert abs(row.residual) <= Fraction(candidates[name]) / 2
    totals = [row.total for row in plan.values()]
    assert max(totals) - min(totals) <= max(candidates.values())


@given(candidates, st.integers(1, 10**6), st.data())
def test_the_reference_runs_its_own_steps(candidates, steps, data):
    reference = data.draw(st.sampled_from(sorted(candidates)))
    assume(steps * candidates[reference] >= max(candidates.values()))
    per_step = {name: i + 1 for i, name in enumerate(candidates)}
    plan = rx.flops.match(candidates, reference=reference, steps=steps, tokens_per_step=per_step)
    assert plan[reference].steps == steps and plan[reference].residual == 0
    assert all(row.tokens == row.steps * per_step[name] for name, row in plan.items())
    by_tokens = rx.flops.match(
        candidates, reference=reference, tokens=steps * per_step[reference], tokens_per_step=per_step
    )
    assert by_tokens == plan


@given(st.integers(1, 8), st.integers(1, 10**4))
def test_equal_halves_run_two_over_r_plus_one_of_the_steps(r, steps):
    half = rx.flops.Cost({key(): 10})
    plan = rx.flops.match({"A B": 2 * half, "A^r B": (r + 1) * half}, reference="A B", steps=steps * (r + 1))
    assert plan["A^r B"].steps == 2 * steps and plan["A^r B"].residual == 0


def test_a_plan_is_a_table():
    plan = rx.flops.match({"plain": 300, "rins": 420}, reference="plain", steps=1000, tokens_per_step=8)
    text = str(plan)
    assert all(word in text for word in ("300,000", "714", "5,712", "-120", "-4.00e-04", "tokens"))
    assert "tokens" not in str(rx.flops.match({"plain": 300}, budget=rx.flops.Cost({key(): 3000})))
    assert rx.flops.match({"plain": 300}, budget=3e21)["plain"].steps == 10**19
    with pytest.raises(KeyError):
        plan["other"]


@pytest.mark.parametrize(
    "costs, options, message",
    [
        ({"a": 10, "b": 0}, {"budget": 100}, "b: costs 0 FLOPs a step"),
        ({"a": 10, "b": 30}, {"budget": 20}, "b: costs 30 FLOPs a step, more than the budget of 20"),
        ({"a": 10}, {"budget": 0}, "must be positive"),
        ({"a": 10}, {"budget": 20.5}, "must be a whole number; got 20.5"),
        ({"a": 10}, {"budget": float("inf")}, "must be a whole number; got inf"),
        ({"a": 10}, {}, "Give either `budget`"),
        ({"a": 10}, {"budget": 20, "steps": 2}, "Give either `budget`"),
        ({"a": 10}, {"reference": "a"}, "give `steps` or `tokens`"),
        ({"a": 10}, {"reference": "a", "steps": 2, "tokens": 2}, "give `steps` or `tokens`"),
        ({"a": 10}, {"reference": "a", "steps": 2, "budget": 2}, "no `budget`"),
        ({"a": 10}, {"reference": "b", "steps": 2}, "`reference` must be one of a; got 'b'"),
        ({"a": 10}, {"reference": "a", "tokens": 2}, "requires `tokens_per_step`"),
        ({"a": 10}, {"reference": "a", "tokens": 10, "tokens_per_step": 4}, "whole number of steps of `a`"),
        ({"a": 10, "b": 1}, {"budget": 20, "tokens_per_step": {"a": 1}}, "b: is missing from `tokens_per_step`"),
        ({"a": 10}, {"budget": 20, "tokens_per_step": {"a": 1, "c": 1}}, "c: is in `tokens_per_step`"),
        ({"a": 10}, {"budget": 20, "tokens_per_step": 0}, "a: sees 0 tokens a step"),
    ],
)
def test_refusals_are_named(costs, options, message):
    with pytest.raises(ValueError, match=message):
        rx.flops.match(costs, **options)


#
# Sizes
#


@given(
    st.lists(st.integers(0, 5) | st.fractions(0, 5), min_size=1, max_size=40),
    st.integers(0, 20),
    st.integers(1, 4),
    st.fractions(0, 1),
)
def test_solve_is_brute_force(increments, low, multiple_of, where):
    measures, total = [], Fraction(0)
    for increment in increments:
        total += increment
        measures.append(total)
    high = low + len(measures) - 1
    grid = [value for value in range(low, high + 1) if value % multiple_of == 0]
    assume(grid)
    measure = lambda value: measures[value - low]
    ends = measure(grid[0]), measure(grid[-1])
    target = ends[0] + where * (ends[1] - ends[0])
    calls = []

    def recorded(value):
        calls.append(value)
        return measure(value)

    solution = rx.flops.solve(recorded, target, low=low, high=high, multiple_of=multiple_of)
    best = min(abs(measure(value) - target) for value in grid)
    nearest = [measure(value) for value in grid if abs(measure(value) - target) == best]
    assert solution.value in grid
    assert solution.measured == measure(solution.value) == min(nearest)
    assert solution.residual == solution.measured - target
    assert len(calls) == len(set(calls)) <= 3 + math.log2(len(grid))


def test_solve_for_a_width_by_parameters():
    """Models of any size, none of them allocated."""

    def parameters(width):
        model = eqx.filter_eval_shape(lambda: eqx.nn.MLP(8, 8, width, 1, key=jr.key(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(model) if eqx.is_array(leaf) or hasattr(leaf, "shape"))

    solution = rx.flops.solve(parameters, 17 * 10**9 + 8, low=1, high=10**10)
    assert (solution.value, solution.residual) == (10**9, 0)


def test_solve_says_why_it_cannot():
    with pytest.raises(ValueError, match="out of reach: `measure` gives 1 at 1 and 9 at 3"):
        rx.flops.solve(lambda n: n * n, 10, low=1, high=3)
    with pytest.raises(ValueError, match="must not decrease; got 4 at 5 and 3 at 7"):
        rx.flops.solve(lambda n: {0: 0, 5: 4, 7: 3, 10: 9}[n], 5, low=0, high=10)
    with pytest.raises(ValueError, match=r"no multiple of 8 in \[9, 15\]"):
        rx.flops.solve(lambda n: n, 10, low=9, high=15, multiple_of=8)
    with pytest.raises(ValueError, match="must be at least 1; got 0"):
        rx.flops.solve(lambda n: n, 10, low=9, high=15, multiple_of=0)


#
# Bytes
#


@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_, jnp.complex64]),
)
def test_bytes_of_arrays(shape, dtype):
    array = jnp.zeros(shape, dtype)
    forms = (array, np.asarray(array), jax.ShapeDtypeStruct(shape, dtype))
    assert [rx.flops.nbytes(x) for x in forms] == [array.nbytes] * 3
    assert rx.flops.nbytes({"a": forms, "b": [None, "text", 3, jnp.sin]}) == 3 * array.nbytes


def test_bytes_of_keys_and_caches():
    assert rx.flops.nbytes(jr.key(0)) == 8 == rx.flops.nbytes(jr.key_data(jr.key(0)))
    assert rx.flops.nbytes(jr.split(jr.key(0), 5)) == 40
    assert rx.flops.nbytes(jax.ShapeDtypeStruct((2**30, 2**30), jnp.bfloat16)) == 2**61
    assert rx.flops.nbytes(np.float64(1)) == 8
