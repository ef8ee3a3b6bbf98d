"""Parameters are counted from shapes: stored once, used as often as their block is visited."""

from collections import Counter
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from hypothesis import assume, given

import rinsx as rx

from .helpers import blocks, DIM, signatures
from .test_operators import rounds, small


KEY = jr.key(0)


@given(signatures(), rounds)
def test_visited_is_the_sum_over_visits(text, rounds):
    assume(small(text, rounds, 1000))
    signature = rx.Signature(text)
    bound = signature.bind(**{name: rounds[name] for name in signature.exponents})
    sizes = {name: eqx.nn.Linear(DIM, DIM, use_bias=i % 2 == 0, key=KEY) for i, name in enumerate(signature.blocks)}
    model = rx.compose(signature, sizes, **{name: rounds[name] for name in signature.exponents})
    size = {name: sum(x.size for x in jax.tree.leaves(eqx.filter(b, eqx.is_array))) for name, b in sizes.items()}
    count = rx.flops.parameters(model)
    assert count.unique == sum(size.values())
    assert count.visited == sum(size[name] * times for name, times in Counter(bound.visits).items())
    assert count.adapters == count.adapter_share == 0


def test_adapters_nesting_and_models_around():
    adapter = rx.adapters.NormLinear(DIM, rounds=4)
    inner = rx.recur(blocks("A")["A"], rx.Loop(2, adapter=adapter), name="s")
    model = {"deep": rx.compose("A^r B", {"A": inner, "B": blocks("B", 1)["B"]}, r=3), "bias": jnp.ones(7)}
    block, adapters = DIM * DIM, 4 * (DIM * DIM + DIM)
    count = rx.flops.parameters(model)
    assert count == rx.flops.Parameters(2 * block + adapters + 7, 7 * block + adapters + 7, adapters)
    assert count.adapter_share == Fraction(adapters, count.unique)
    abstract = eqx.filter_eval_shape(lambda: model)
    assert rx.flops.parameters(abstract) == count


def test_an_array_at_two_places_counts_twice_as_its_shape_does():
    weight = jnp.ones((8, 8))
    for leaf in (weight, jax.ShapeDtypeStruct(weight.shape, weight.dtype)):
        assert rx.flops.parameters((leaf, leaf)) == rx.flops.Parameters(128, 128, 0)


def test_adapters_in_a_visited_block_count_once():
    inner = rx.recur(blocks("A")["A"], rx.Loop(2, adapter=rx.adapters.FiLM(DIM)))
    wrapped = eqx.nn.Sequential([inner])
    for block in (inner, wrapped):
        count = rx.flops.parameters(rx.recur(block, 3, name="s"))
        assert count.visited == 6 * DIM * DIM + 2 * DIM


def test_the_light_adapter_is_under_a_percent_at_the_size_of_the_paper():
    """300M parameters, of width 1024: a decoder's 24 layers, their blocks counted by shape."""
    layer = lambda key: eqx.nn.MLP(1024, 1024, 6144, 1, key=key)
    a, b = (eqx.filter_eval_shape(lambda k: rx.nn.Stack.make(layer, 12, key=k), jr.key(i)) for i in range(2))
    adapter = eqx.filter_eval_shape(lambda: rx.adapters.NormLinear(1024))
    model = rx.compose("A^r B", {"A": a, "B": b}, r=rx.Loop(2, adapter=adapter))
    count = rx.flops.parameters(model)
    assert 3e8 < count.unique < 3.1e8
    assert 0 < count.adapter_share < Fraction(1, 100)


def test_rewired_models_and_traced_rounds():
    model = eqx.nn.Sequential([eqx.nn.Linear(3, 3, use_bias=False, key=key) for key in jr.split(KEY, 4)])
    new = rx.rewire(model, lambda m: m, "A^r B", r=3)
    assert rx.flops.parameters(new) == rx.flops.Parameters(4 * 9, 8 * 9, 0)
    with pytest.raises(ValueError, match="rounds of loop r are traced"):
        rx.flops.parameters(rx.with_rounds(new, r=jnp.int32(3)))
