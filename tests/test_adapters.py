"""Adapters, injections and starts: what every one of them promises, then each by its
formula."""

import io
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from jaxtyping import Array

import rinsx.adapters as adapters
import rinsx.injection as injection
import rinsx.start as start


DIM = 8

# Each makes an adapter, given `rounds` and `past`.
ADAPTERS = {
    "linear": lambda **kw: adapters.Linear(DIM, **kw),
    "low_rank": lambda **kw: adapters.LowRank(DIM, 2, key=jr.key(1), **kw),
    "norm_linear": lambda **kw: adapters.NormLinear(DIM, key=jr.key(1), **kw),
    "film": lambda **kw: adapters.FiLM(DIM, **kw),
    "round_embedding": lambda **kw: adapters.RoundEmbedding(DIM, **kw),
}
INJECTIONS = {
    "add": lambda: injection.Add(),
    "gated_add": lambda: injection.GatedAdd(DIM, init=0.5),
    "concat": lambda: injection.Concat(DIM, key=jr.key(2)),
}
STARTS = {
    "input": lambda: start.Input(),
    "zeros": lambda: start.Zeros(),
    "normal": lambda: start.Normal(),
    "normal_seed": lambda: start.Normal(scale=0.5, seed=3),
}
# What all three do to a state, as a function of the state and of an array of integers.
OPERATORS = {
    **{f"adapters.{name}": make for name, make in ADAPTERS.items()},
    **{f"injection.{name}": make for name, make in INJECTIONS.items()},
    **{f"start.{name}": make for name, make in STARTS.items()},
}
PAST = {"error", "last", "identity"}

each_adapter = pytest.mark.parametrize("make", ADAPTERS.values(), ids=ADAPTERS)
each_injection = pytest.mark.parametrize("make", INJECTIONS.values(), ids=INJECTIONS)
each_start = pytest.mark.parametrize("make", STARTS.values(), ids=STARTS)
each_operator = pytest.mark.parametrize("name", OPERATORS)
each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])


class State(NamedTuple):
    x: Array
    more: dict
    position: Array
    key: Array


def _array(seed=0, shape=(3, DIM), dtype=jnp.float32):
    return jr.normal(jr.key(seed), shape, dtype)


def _state(seed=0):
    return State(
        x=_array(seed),
        more={"low": _array(seed + 1, (DIM,), jnp.bfloat16), "none": None},
        position=jnp.arange(5),
        key=jr.key(7),
    )


def _trained(module):
    """`module` with every parameter moved away from its initialisation."""
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(params)
    moved = [leaf + 0.3 * jr.normal(jr.key(100 + i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    return eqx.combine(jax.tree.unflatten(treedef, moved), rest)


def _operator(name, **kwargs):
    """A module, and how to apply it: `apply(module, state, round)`."""
    module = _trained(OPERATORS[name](**kwargs))
    if name.startswith("adapters."):
        return module, lambda module, state, round: module(state, round)
    if name.startswith("injection."):
        return module, lambda module, state, round: module(state, state, round)
    return module, lambda module, state, round: module(state, jr.key(round))


def _data(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jr.key_data(leaf) if is_key else leaf)


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(_data(x), _data(y))


def _assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        tolerance = 1e-5 if x.dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(
            _data(x).astype(float),
            _data(y).astype(float),
            rtol=tolerance,
            atol=tolerance,
        )


# Adapters, injections and starts alike


@each_operator
def test_structure_shapes_and_dtypes_are_kept(name):
    module, apply = _operator(name)
    state = _state()
    for round in (0, jnp.int32(2)):
        out = apply(module, state, round)
        assert jax.tree.structure(out) == jax.tree.structure(state)
        for new, old in zip(jax.tree.leaves(out), jax.tree.leaves(state)):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)


@each_operator
def test_what_is_not_floating_passes_through(name):
    module, apply = _operator(name)
    out = apply(module, _state(), 0)
    _assert_same((out.position, out.key), (_state().position, _state().key))


@each_operator
@each_dtype
def test_dtype_is_kept(name, dtype):
    module, apply = _operator(name)
    out = apply(module, _array(dtype=dtype), 0)
    assert out.dtype == dtype
    # The same function in every precision.
    if name != "start.normal" and name != "start.normal_seed":
        wide = apply(module, _array(dtype=dtype).astype(jnp.float32), 0)
        np.testing.assert_allclose(np.asarray(out, np.float32), wide, atol=0.1, rtol=0.05)


@each_operator
def test_numpy_arrays_are_acted_on(name):
    module, apply = _operator(name)
    x = _array()
    _assert_same(apply(module, np.asarray(x), 0) + 0, apply(module, x, 0))


@each_operator
def test_jit_agrees(name):
    module, apply = _operator(name)
    state = _state()
    for round in range(3):
        jitted = eqx.filter_jit(apply)(module, state, jnp.int32(round))
        _assert_close(jitted, apply(module, state, round))


@each_operator
def test_compiles_once_for_all_rounds(name):
    module, apply = _operator(name)
    traced = eqx.debug.assert_max_traces(apply, max_traces=1)
    jitted = eqx.filter_jit(traced)
    for round in range(3):
        jitted(module, _state(round), jnp.int32(round))


@each_operator
def test_vmap_agrees(name):
    module, apply = _operator(name)
    xs = _array(shape=(4, 3, DIM))
    together = jax.vmap(lambda x: apply(module, x, 1))(xs)
    _assert_close(together, jnp.stack([apply(module, x, 1) for x in xs]))


@each_operator
def test_scan_over_rounds_agrees(name):
    module, apply = _operator(name)

    def body(state, round):
        return apply(module, state, round), None

    scanned, _ = jax.lax.scan(body, _state(), jnp.arange(3))
    unrolled = _state()
    for round in range(3):
        unrolled = apply(module, unrolled, round)
    _assert_close(scanned, unrolled)


@each_operator
def test_gradients_reach_every_parameter_and_are_those_of_the_static_round(name):
    module, apply = _operator(name)
    x, target = _array(), _array(9)

    @eqx.filter_grad
    def grad(module, round):
        return jnp.sum(target * jnp.sin(apply(module, x, round)))

    static, traced = grad(module, 1), eqx.filter_jit(grad)(module, jnp.int32(1))
    _assert_close(static, traced)
    for leaf in jax.tree.leaves(static):
        assert jnp.any(leaf != 0)


@each_operator
def test_serialisation_round_trip(name):
    module, apply = _operator(name)
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, module)
    buffer.seek(0)
    like = OPERATORS[name]()
    _assert_same(
        apply(eqx.tree_deserialise_leaves(buffer, like), _state(), 1),
        apply(module, _state(), 1),
    )


@each_operator
def test_parameters_are_float32(name):
    for leaf in jax.tree.leaves(OPERATORS[name]()):
        assert leaf.dtype == jnp.float32


@each_operator
@pytest.mark.parametrize("spec", [P("data", None, None), P("data", None, "model")])
@pytest.mark.parametrize("weights", ["replicated", "sharded"])
def test_sharding_is_kept(name, spec, weights):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    module, apply = _operator(name)
    x = _array(shape=(4, 2, DIM))
    expected = apply(module, x, 1)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, spec)
        if weights == "sharded":
            over = lambda leaf: P("model", *[None] * (leaf.ndim - 1))
            module = jax.tree.map(lambda w: jax.device_put(w, over(w)), module)

        @jax.jit
        def run(x):
            out = apply(module, x, jnp.int32(1))
            assert jax.typeof(out) == jax.typeof(x)
            return out

        out = run(sharded)
        assert jax.typeof(apply(module, sharded, 1)) == jax.typeof(sharded)
    assert out.sharding == sharded.sharding
    _assert_close(out, expected)


@each_operator
def test_works_in_a_shard_map(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    module, apply = _operator(name)
    with jax.set_mesh(mesh):
        x = jax.device_put(_array(shape=(8, DIM)), P("data", None))
        for dtype in (int, jnp.int32):
            body = lambda x: apply(module, x, dtype(1))
            run = jax.shard_map(body, in_specs=P("data"), out_specs=P("data"))
            assert jax.typeof(jax.jit(run)(x)) == jax.typeof(x)


@pytest.mark.parametrize(
    "name",
    [n for n in OPERATORS if n.split(".")[0] != "start" and n != "injection.add"],
)
@pytest.mark.parametrize("shape", [(3, DIM + 1), ()])
def test_wrong_dim_prints_both_shapes_and_where(name, shape):
    module, apply = _operator(name)
    state = {"x": _array(), "y": _array(shape=shape)}
    with pytest.raises(ValueError, match=r"state\['y'\]") as e:
        apply(module, state, 0)
    assert f"f32[{','.join(map(str, shape))}]" in str(e.value)
    assert f"(..., {DIM})" in str(e.value)
    assert "on=lambda state: state.x" in str(e.value)


@pytest.mark.parametrize("name", [n for n in OPERATORS if n.split(".")[0] != "start"])
def test_any_number_of_leading_axes(name):
    module, apply = _operator(name)
    x = _array(shape=(2, 3, DIM))
    assert apply(module, x, 0).shape == x.shape
    _assert_close(apply(module, x, 0)[1, 2], apply(module, x[1, 2], 0))


# Adapters


@each_adapter
@pytest.mark.parametrize("rounds", [None, 3])
def test_identity_at_initialisation_bit_for_bit(make, rounds):
    adapter = make(rounds=rounds)
    for round in (0, 2, jnp.int32(1)):
        _assert_same(adapter(_state(), round), _state())


@each_adapter
@pytest.mark.parametrize("rounds", [None, 3])
def test_traced_round_is_static_round(make, rounds):
    adapter = _trained(make(rounds=rounds))
    for round in range(3):
        _assert_same(adapter(_state(), jnp.int32(round)), adapter(_state(), round))


@each_adapter
@pytest.mark.parametrize("past", ["last", "identity"])
def test_vmap_over_rounds_agrees(make, past):
    adapter = _trained(make(rounds=3, past=past))
    together = jax.vmap(adapter, in_axes=(None, 0))(_array(), jnp.arange(5))
    _assert_close(together, jnp.stack([adapter(_array(), i) for i in range(5)]))


@each_adapter
def test_each_round_reads_its_own_weights(make):
    adapter = _trained(make(rounds=3))
    for round in range(3):
        rows = [leaf[round] for leaf in jax.tree.leaves(adapter)]
        shared = eqx.tree_at(jax.tree.leaves, make(), rows)
        _assert_same(adapter(_state(), round), shared(_state(), round))
    assert jnp.any(adapter(_array(), 0) != adapter(_array(), 1))


@each_adapter
def test_one_shared_set_is_a_table_of_equal_rows(make):
    shared = _trained(make())
    rows = [jnp.stack([leaf] * 3) for leaf in jax.tree.leaves(shared)]
    table = eqx.tree_at(jax.tree.leaves, make(rounds=3), rows)
    for round in (0, 2, jnp.int32(1)):
        _assert_same(shared(_state(), round), table(_state(), round))
    _assert_same(shared(_state(), 1000), shared(_state(), 0))


@each_adapter
def test_limit(make):
    assert make().limit is None
    assert make(past="last").limit is None
    assert make(rounds=3).limit == 3
    assert make(rounds=3, past="error").limit == 3
    assert make(rounds=3, past="last").limit is None
    assert make(rounds=3, past="identity").limit is None


@each_adapter
def test_past_error(make):
    adapter = _trained(make(rounds=3))
    adapter(_state(), 2)
    with pytest.raises(ValueError, match="3 rounds, and round 3"):
        adapter(_state(), 3)
    # A traced round is for the loop to check; here it is clamped.
    _assert_same(adapter(_state(), jnp.int32(3)), adapter(_state(), 2))


@each_adapter
def test_past_last(make):
    adapter = _trained(make(rounds=3, past="last"))
    for round in (3, 50, jnp.int32(3), jnp.int32(50)):
        _assert_same(adapter(_state(), round), adapter(_state(), 2))


@each_adapter
def test_past_identity(make):
    adapter = _trained(make(rounds=3, past="identity"))
    for round in (3, 50, jnp.int32(3), jnp.int32(50)):
        _assert_same(adapter(_state(), round), _state())
    assert jnp.any(adapter(_array(), 2) != _array())
    assert jnp.any(adapter(_array(), jnp.int32(2)) != _array())

    @eqx.filter_grad
    def grad(adapter, round):
        return jnp.sum(adapter(_array(), round) ** 2)

    for leaf in jax.tree.leaves(grad(adapter, jnp.int32(3))):
        assert not jnp.any(leaf)
    for leaf in jax.tree.leaves(grad(adapter, jnp.int32(2))):
        assert jnp.any(leaf[2]) and not jnp.any(leaf[:2])


@each_adapter
@pytest.mark.parametrize("past", sorted(PAST - {"last"}))
def test_past_without_rounds_is_refused(make, past):
    with pytest.raises(ValueError, match=past):
        make(past=past)


@each_adapter
def test_bad_arguments_are_printed(make):
    with pytest.raises(ValueError, match="got 0"):
        make(rounds=0)
    with pytest.raises(Exception, match="sometimes"):
        make(rounds=2, past="sometimes")
    with pytest.raises(ValueError, match="got -1"):
        make(rounds=2)(_array(), -1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapters.Linear(0),
        lambda: adapters.LowRank(4, 0, key=jr.key(0)),
        lambda: injection.GatedAdd(0),
        lambda: injection.Concat(0, key=jr.key(0)),
    ],
)
def test_bad_sizes_are_printed(make):
    with pytest.raises(ValueError, match="got 0"):
        make()


@each_adapter
def test_first_gradients_can_move_it(make):
    # At initialisation not every parameter has a gradient, but some have, in the round
    # that ran and in no other.
    @eqx.filter_grad
    def grad(adapter):
        return jnp.sum(_array(9) * adapter(_array(), 1))

    leaves = jax.tree.leaves(grad(make(rounds=3)))
    assert any(jnp.any(leaf[1]) for leaf in leaves)
    assert not any(jnp.any(leaf[0]) or jnp.any(leaf[2]) for leaf in leaves)


def _norm(x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)


@pytest.mark.parametrize(
    "name, formula",
    [
        ("linear", lambda a, x, i: x + np.einsum("de,be->bd", a.weight[i], x)),
        (
            "low_rank",
            lambda a, x, i: x + np.einsum("dr,re,be->bd", a.b[i], a.a[i], x),
        ),
        (
            "norm_linear",
            lambda a, x, i: x + np.einsum("de,be->bd", a.weight[i], a.scale[i] * _norm(x)),
        ),
        ("film", lambda a, x, i: x * (1 + a.gamma[i]) + a.beta[i]),
        ("round_embedding", lambda a, x, i: x + a.embedding[i]),
    ],
)
def test_adapter_formula(name, formula):
    adapter = _trained(ADAPTERS[name](rounds=3))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), adapter)
    x = _array()
    for i in range(3):
        expected = formula(wide, np.asarray(x, np.float64), i)
        np.testing.assert_allclose(adapter(x, i), expected, rtol=1e-5, atol=1e-5)


def test_norm_is_computed_in_float32():
    # In float16 the squares overflow, and the norm would come out as zero.
    adapter = _trained(adapters.NormLinear(DIM))
    x = 1000 * jnp.sign(_array())
    narrow = adapter(x.astype(jnp.float16), 0)
    np.testing.assert_allclose(narrow - x, adapter(x, 0) - x, atol=1)
    assert jnp.any(jnp.abs(narrow - x) > 1)


# Injections


@pytest.mark.parametrize(
    "name, formula",
    [
        ("add", lambda m, x, i: x + i),
        ("gated_add", lambda m, x, i: x + np.asarray(m.gate) * i),
        (
            "concat",
            lambda m, x, i: x @ np.asarray(m.weight)[:, :DIM].T + i @ np.asarray(m.weight)[:, DIM:].T,
        ),
    ],
)
def test_injection_formula(name, formula):
    inject = _trained(INJECTIONS[name]())
    x, i = _array(), _array(4)
    np.testing.assert_allclose(inject(x, i, 0), formula(inject, np.asarray(x), np.asarray(i)), atol=1e-5)


@each_injection
def test_injection_keeps_the_dtype_and_the_rest_of_the_state(make):
    state, input = _state(), _state(5)
    input = input._replace(position=input.position + 1)
    out = make()(state._replace(x=state.x.astype(jnp.bfloat16)), input, 0)
    assert out.x.dtype == jnp.bfloat16
    _assert_same(out.position, state.position)


@each_injection
def test_injection_refuses_an_input_of_another_shape(make):
    with pytest.raises(ValueError, match=r"f32\[3,8\].*f32\[8\]"):
        make()(_array(), _array(shape=(DIM,)), 0)
    with pytest.raises(ValueError, match=r"f32\[3,8\].*i32\[3,8\]"):
        make()(_array(), jnp.zeros((3, DIM), jnp.int32), 0)


def test_closed_gate_is_the_identity():
    _assert_same(injection.GatedAdd(DIM, init=0.0)(_state(), _state(5), 0), _state())


def test_concat_keeps_the_variance():
    inject = injection.Concat(256, key=jr.key(2))
    out = inject(_array(0, (64, 256)), _array(1, (64, 256)), 0)
    assert abs(float(jnp.std(out)) - 1) < 0.05


# Starts


@each_start
def test_start_takes_a_key_where_it_needs_one(make):
    begin = make()
    assert begin.needs_key == (isinstance(begin, start.Normal) and begin.seed is None)
    if begin.needs_key:
        with pytest.raises(ValueError, match=r"key=\.\.\..*Normal\(seed=\.\.\.\)"):
            begin(_state(), None)
    else:
        _assert_same(begin(_state(), None), begin(_state(), jr.key(5)))


def test_input_and_zeros():
    _assert_same(start.Input()(_state(), None), _state())
    out = start.Zeros()(_state(), None)
    assert not jnp.any(out.x) and not jnp.any(out.more["low"])


def test_normal_is_fresh_for_each_key():
    x = _array()
    begin = start.Normal()
    _assert_same(begin(x, jr.key(0)), begin(x + 1, jr.key(0)))
    assert jnp.all(begin(x, jr.key(0)) != begin(x, jr.key(1)))
    assert jnp.all(start.Normal(seed=0)(x, None) != start.Normal(seed=1)(x, None))


def test_normal_leaves_are_independent():
    a, b = start.Normal()([_array(), _array()], jr.key(0))
    assert jnp.all(a != b)


@pytest.mark.parametrize("begin", [start.Normal(2.0), start.Normal(2.0, seed=0)])
def test_normal_has_its_moments(begin):
    noise = begin(jnp.zeros((100, 100)), jr.key(0))
    assert abs(float(jnp.mean(noise))) < 0.1
    assert abs(float(jnp.std(noise)) - 2) < 0.1
    assert abs(float(jnp.mean(jnp.abs(noise) < 2)) - 0.6827) < 0.02


def test_normal_noise_ignores_the_input_even_where_it_is_not_finite():
    x = jnp.full((3, DIM), jnp.nan)
    assert jnp.all(jnp.isfinite(start.Normal(seed=0)(x, None)))


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_bad_scale_is_printed(scale):
    with pytest.raises(ValueError, match=str(scale)):
        start.Normal(scale)


def test_normal_is_drawn_where_it_lives():
    # No device makes more than its own shard.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.zeros((64, 7)), P("data", None))
        compiled = jax.jit(start.Normal()).lower(x, jr.key(0)).compile()
    assert "[64,7]" not in compiled.as_text().split("ENTRY")[1]
    assert "[8,7]" in compiled.as_text()


@pytest.mark.parametrize(
    "module, base",
    [
        (adapters, adapters.AbstractAdapter),
        (injection, injection.AbstractInjection),
        (start, start.AbstractStart),
    ],
)
def test_all_is_complete(module, base):
    public = {
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and not name.startswith("_")
    }
    assert set(module.__all__) == public
