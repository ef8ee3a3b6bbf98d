"""Counted FLOPs against closed formulas, XLA's own count, and the algebra of signatures."""

from fractions import Fraction

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from hypothesis import assume, example, given
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import rinsx as rx

from .helpers import examples, signatures


count = rx.flops.count
dims = st.integers(1, 9)


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def pullback(fn, *args):
    """The gradients of all arguments, for a cotangent that costs nothing to make."""

    def run(*args):
        out, pull = jax.vjp(fn, *args)
        return pull(jnp.ones_like(out))

    return count(run, *args)


def matmuls(cost):
    """The contractions of each phase."""
    amounts = dict.fromkeys(cost.by_phase(), 0)
    for (_, phase, _, kind), amount in cost.rows:
        amounts[phase] += amount if kind == "matmul" else 0
    return amounts


def xla(fn, *args):
    return int(jax.jit(fn).lower(*args).cost_analysis()["flops"])


#
# Closed formulas
#


@given(dims, dims, dims, dims)
def test_mlp(batch, width, hidden, out):
    x, w1, w2 = struct(batch, width), struct(width, hidden), struct(hidden, out)
    fn = lambda x, w1, w2: jnp.tanh(x @ w1) @ w2
    first, second = 2 * batch * width * hidden, 2 * batch * hidden * out
    cost = count(fn, x, w1, w2)
    assert (cost.matmul, cost.elementwise) == (first + second, batch * hidden)
    assert pullback(fn, x, w1, w2).matmul == 3 * first + 2 * second  # The last product is no part of any gradient.
    without_input = count(lambda *args: jax.value_and_grad(lambda *a: jnp.sum(fn(*a)), (1, 2))(*args), x, w1, w2)
    assert without_input.matmul == 2 * first + 3 * second


@given(st.integers(1, 3), dims, dims, dims, dims)
def test_attention(batch, queries, keys, heads, width):
    q = struct(batch, queries, heads, width)
    k = struct(batch, keys, heads, width)
    forward = 4 * batch * heads * queries * keys * width
    assert count(jax.nn.dot_product_attention, q, k, k).matmul == forward
    loss = lambda q, k, v: jnp.sum(jax.nn.dot_product_attention(q, k, v))
    assert count(jax.value_and_grad(loss, (0, 1, 2)), q, k, k).matmul == 3 * forward


def test_softmax():
    """A maximum, a difference, an exponential, a sum and a division: one element a row less for each reduction."""
    n, m = 7, 11
    exp = lambda x: jnp.exp(x - jnp.max(x, 1, keepdims=True))
    cost = count(lambda x: exp(x) / jnp.sum(exp(x), 1, keepdims=True), struct(n, m))
    # `exp(x)` is written twice, and counted twice.
    assert cost.total == cost.elementwise == 2 * (n * (m - 1) + 2 * n * m) + n * (m - 1) + n * m


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_block(stride):
    n, h, cin, cout, k = 3, 8, 4, 5, 3
    x, w1, w2 = struct(n, cin, h, h), struct(cout, cin, k, k), struct(cout, cout, 1, 1)

    def fn(x, w1, w2, padding="VALID"):
        return lax.conv(jax.nn.relu(lax.conv(x, w1, (stride, stride), padding)), w2, (1, 1), "VALID")

    side = (h - k) // stride + 1
    first, second = 2 * n * side**2 * cin * cout * k**2, 2 * n * side**2 * cout**2
    cost = count(fn, x, w1, w2)
    assert (cost.matmul, cost.elementwise) == (first + second, n * cout * side**2)
    grad = lambda argnums: count(jax.value_and_grad(lambda *a: jnp.sum(fn(*a)), argnums), x, w1, w2).matmul
    assert grad((0, 1, 2)) == 3 * (first + second)
    assert grad((1, 2)) == 2 * first + 3 * second
    # With padding, the kernel meets fewer elements than positions: at stride 1, two of its three rows at each border.
    if stride == 1:
        padded = count(lambda x, w: lax.conv(x, w, (1, 1), "SAME"), x, w1)
        assert padded.total == 2 * n * cin * cout * (3 * h - 2) ** 2


@examples(10)
@given(st.integers(1, 12), dims, dims)
def test_scan_is_its_length_times_its_body(r, batch, width):
    x, w = struct(batch, width), struct(width, width)
    body = lambda x, w: jnp.tanh(x @ w)
    each = count(body, x, w)

    def fn(x, w, remat=False):
        step = jax.checkpoint(body) if remat else body
        return lax.scan(lambda x, _: (step(x, w), None), x, length=r)[0]

    product = 2 * batch * width**2
    assert each.matmul == product
    assert count(fn, x, w) == r * each
    assert pullback(fn, x, w).matmul == 3 * r * product
    remat = pullback(lambda x, w: fn(x, w, True), x, w)
    assert remat.matmul == 4 * r * product
    assert matmuls(remat) == {"forward": r * product, "backward": 2 * r * product, "remat": r * product}


@given(st.integers(1, 4), st.integers(1, 4), dims, dims, dims)
def test_batched_products(b, c, n, k, m):
    x, y = struct(b, c, n, k), struct(b, c, k, m)
    want = 2 * b * c * n * k * m
    assert count(jnp.matmul, x, y).total == want
    assert count(jax.vmap(jax.vmap(jnp.matmul)), x, y).total == want
    assert count(lambda x, y: jnp.einsum("bcnk,bckm->mbcn", x, y), x, y).total == want
    assert count(jax.vmap(jnp.matmul, (None, 1), 2), struct(n, k), struct(k, c, m)).total == 2 * c * n * k * m
    for dtype, each in (jnp.complex64, 8), (jnp.bfloat16, 2), (jnp.int32, 0):
        assert count(jnp.matmul, struct(n, k, dtype=dtype), struct(k, m, dtype=dtype)).total == each * n * k * m


@given(dims, dims, dims, st.integers(1, 4))
def test_ragged_products(rows, k, m, groups):
    """A row meets the matrix of its own group only."""
    args = struct(rows, k), struct(groups, k, m), struct(groups, dtype=jnp.int32)
    assert count(lax.ragged_dot, *args).total == 2 * rows * k * m
    value_and_grad = jax.value_and_grad(lambda *args: jnp.sum(lax.ragged_dot(*args)), (0, 1))
    assert count(value_and_grad, *args).matmul == 3 * 2 * rows * k * m


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_dense_linear_algebra(n):
    m = struct(n, n)
    steps = lambda k: sum((n - j) ** 2 for j in range(k))
    assert count(lambda m: lax.linalg.lu(m), m).total == 2 * steps(n)
    assert count(lambda m: lax.linalg.cholesky(m, symmetrize_input=False), m).total == steps(n)
    assert count(lambda m: lax.linalg.qr(m), struct(3, n, n)).total == 3 * 8 * steps(n)
    solve = lambda m, b: lax.linalg.triangular_solve(m, b, left_side=True)
    assert count(solve, m, struct(n, 3)).total == 3 * n**2


def test_elementwise_rules():
    n = 10
    x, z = struct(n), struct(n, dtype=jnp.complex64)
    assert count(lambda x: x**5, x).total == 3 * n
    assert count(lambda x: jnp.sum(x), x).total == n - 1
    assert count(lambda z: z * z, z).total == 6 * n
    assert count(lambda z: z + z, z).total == 2 * n
    assert count(jnp.sort, x).total == n * 4
    assert count(jnp.cumsum, x).total == n - 1
    assert count(lambda x: x + 1, struct(n, dtype=jnp.int32)).total == 0
    assert count(lambda key: jr.normal(key, (n,)), jr.key(0)).total > 0
    assert count(lambda key: jr.bits(key, (n,)), jr.key(0)).total == 0
    assert count(lambda x, i: x.at[i].add(1.0), x, struct(3, dtype=jnp.int32)).total == 3


#
# XLA
#


@examples(20)
@given(st.lists(dims, min_size=2, max_size=5), dims, st.booleans())
def test_linear_network_is_what_xla_counts(widths, batch, gradient):
    """Unrolled and made of contractions only, since XLA has its own idea of everything else."""
    x = struct(batch, widths[0])
    ws = [struct(a, b) for a, b in zip(widths, widths[1:])]

    def fn(x, *ws):
        for w in ws:
            x = x @ w
        return x

    def grads(g, x, *ws):
        return jax.vjp(fn, x, *ws)[1](g)

    args = (struct(batch, widths[-1]), x, *ws)
    if gradient:
        assert count(grads, *args).total == xla(grads, *args)
    else:
        assert count(fn, x, *ws).total == xla(fn, x, *ws)


@st.composite
def convolutions(draw):
    groups, batch = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    cin, cout = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    size = draw(st.lists(st.integers(3, 7), min_size=1, max_size=2))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in size)
    kernel, strides, dilation, lhs_dilation = each(1, 3), each(1, 3), each(1, 3), each(1, 2)
    padding = tuple(zip(each(0, 2), each(0, 2)))
    effective = lambda n, d: (n - 1) * d + 1
    for n, k, d, e, (low, high) in zip(size, kernel, dilation, lhs_dilation, padding):
        assume(effective(n, e) + low + high >= effective(k, d))

    def fn(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=dilation,
            feature_group_count=groups,
        )

    return fn, struct(batch, cin, *size), struct(cout, cin // groups, *kernel)


@examples(40)
@given(convolutions(), st.sampled_from([None, 0, 1]))
def test_convolution_is_what_xla_counts(problem, argnum):
    """Strides, padding, both dilations and groups; and both gradients, which are convolutions too."""
    fn, x, w = problem
    if argnum is None:
        assert count(fn, x, w).matmul == xla(fn, x, w)
    else:
        gradient = lambda g, x, w: jax.vjp(fn, x, w)[1](g)[argnum]
        args = jax.eval_shape(fn, x, w), x, w
        assert count(gradient, *args).matmul == xla(gradient, *args)


def test_shard_map_takes_its_body_once_per_device():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    x, w = struct(16, 8), struct(8, 6)
    fn = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P(None, "model")), out_specs=P("data", "model"))
    assert count(fn, x, w).total == count(jnp.matmul, x, w).total
    replicated = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert count(replicated, x, w).total == 2 * count(jnp.matmul, x, w).total
    summed = jax.shard_map(lambda x: lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
    assert count(summed, x).by_primitive().keys() <= {"psum", "psum_invariant"}
    grad = count(jax.value_and_grad(lambda x, w: jnp.sum(fn(x, w)), (0, 1)), x, w)
    assert grad.matmul == 3 * 2 * 16 * 8 * 6


#
# Dead code
#


def test_dead_code_is_not_counted():
    x, w = struct(4, 4), struct(4, 4)
    product = count(jnp.matmul, x, w)

    def plain(x, w):
        _ = x @ w
        return x @ w

    def carry(x, w):
        step = lambda c, _: ((c[0] @ w, c[1] @ c[0] @ w), c[1] @ w)
        return lax.scan(step, (x, x), length=5)[0][0]

    def delayed(x, w):
        # The first of the carry is used only by the second, one round later.
        return lax.scan(lambda c, _: ((c[0] @ w, c[0]), None), (x, x), length=5)[0][1]

    def outputs(x, w):
        return jax.jit(lambda x, w: (x @ w, w @ x @ x))(x, w)[0]

    def cond(x, w):
        return lax.cond(x[0, 0] > 0, lambda: (x @ w, w @ x), lambda: (x, x))[0]

    for fn, times in (plain, 1), (carry, 5), (delayed, 5), (outputs, 1), (cond, 1):
        assert count(fn, x, w).matmul == times * product.matmul, fn
    assert count(lambda x, w: (x @ w, None)[1], x, w) == rx.flops.Cost()


def test_effects_keep_code_alive():
    x = struct(4, 4)
    assert count(lambda x: (jax.debug.callback(lambda y: None, x @ x), x)[1], x).matmul == 128


#
# Loops and branches
#


def looped(x, n):
    with rx.flops.trips("n"):
        return lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ x), x)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_trips_are_declared(wrap):
    x, n = struct(4, 4), struct(dtype=jnp.int32)
    each = count(lambda x: jnp.tanh(x @ x), x)
    for trips in 0, 1, 7:
        assert count(wrap(looped), x, n, trips={"n": trips}) == trips * rx.flops.Cost(
            {("", "forward", "dot_general", "matmul"): each.matmul, ("", "forward", "tanh", "elementwise"): 16}
        )
    batched = count(jax.vmap(wrap(looped), (0, None)), struct(3, 4, 4), n, trips={"n": 7})
    assert batched.matmul == 3 * 7 * each.matmul


def test_trips_minus_most_and_the_innermost():
    x, n = struct(4), struct(dtype=jnp.int32)

    def fn(value, minus=0, most=None):
        def run(x, n):
            with rx.flops.trips(99), rx.flops.trips(value, minus, most):
                return lax.fori_loop(0, n, lambda i, x: jnp.sin(x), x)

        return run

    assert count(fn(3), x, n).total == 12
    for trips in range(6):
        assert count(fn("n", 2), x, n, trips={"n": trips}).total == 4 * max(0, trips - 2)
        assert count(fn("n", 0, 3), x, n, trips={"n": trips}).total == 4 * min(3, trips)
        assert count(fn("n", 1, 3), x, n, trips={"n": trips}).total == 4 * min(3, max(0, trips - 1))


def test_loops_within_loops_are_declared_one_by_one():
    def fn(x, n, declare):
        def outer(i, x):
            if not declare:
                return lax.fori_loop(0, n, lambda i, x: jnp.sin(x), x)
            with rx.flops.trips("m"):
                return lax.fori_loop(0, n, lambda i, x: jnp.sin(x), x)

        with rx.flops.trips("n"):
            return lax.fori_loop(0, n, outer, x)

    x, n = struct(4), struct(dtype=jnp.int32)
    assert count(lambda x, n: fn(x, n, True), x, n, trips={"n": 3, "m": 5}).total == 60
    with pytest.raises(ValueError, match="loops within loops|Loops within loops"):
        count(lambda x, n: fn(x, n, False), x, n, trips={"n": 3})


def test_trips_survive_a_gradient():
    """A `while` loop of a custom derivative is the only kind that reverse mode knows."""

    @jax.custom_vjp
    def root(x, n):
        return looped(x, n)

    root.defvjp(lambda x, n: (root(x, n), (x, n)), lambda res, g: (looped(g + res[0], res[1]), None))
    x, n = struct(4, 4), struct(dtype=jnp.int32)
    gradient = lambda x, n: jax.grad(lambda x: jnp.sum(jax.jit(root)(x, n)))(x)
    cost = count(gradient, x, n, trips={"n": 6})
    assert cost.matmul == 6 * 128  # The value is not used.
    assert cost.by_phase()["backward"] > 6 * 128
    value = lambda x, n: jax.value_and_grad(lambda x: jnp.sum(root(x, n)))(x)
    assert count(value, x, n, trips={"n": 6}).matmul == 12 * 128
    forward = lambda x, n: jax.jvp(lambda x: looped(x, n), (x,), (x,))
    assert count(forward, x, n, trips={"n": 6}).matmul == 6 * 3 * 128


def test_constant_bounds_need_no_declaration():
    x = struct(4)
    body = lambda i, x: jnp.sin(x)
    assert count(lambda x: lax.fori_loop(0, 5, body, x), x).total == 20
    assert count(lambda x: lax.fori_loop(jnp.int32(2), jnp.int32(5), body, x), x).total == 12
    down = lambda x: lax.while_loop(lambda c: c[0] >= 3, lambda c: (c[0] - 2, jnp.sin(c[1])), (10, x))[1]
    assert count(down, x).total == 16
    # A loop over integers costs nothing, however often it runs.
    assert count(lambda n: lax.while_loop(lambda i: i < n, lambda i: i * 3, 1), struct(dtype=jnp.int32)).total == 0


def test_undeclared_loops_are_named():
    def fn(x, n):
        with jax.named_scope("decoder"):
            return lax.fori_loop(0, n, lambda i, x: jnp.sin(x), x)

    args = struct(4), struct(dtype=jnp.int32)
    with pytest.raises(ValueError, match=r'(?s)`while`.*"decoder".*test_flops_count.py:\d+.*flops.trips\(8\)'):
        count(fn, *args)
    square = struct(4, 4), args[1]
    with pytest.raises(ValueError, match="no number in `trips` for the loop named 'n'"):
        count(looped, *square)
    with pytest.raises(ValueError, match="no loop that is counted is named 'm'"):
        count(looped, *square, trips={"n": 1, "m": 2})
    with pytest.raises(ValueError, match="must not be negative"):
        count(looped, *square, trips={"n": -1})
    # However often a loop is looked at, it is named once.
    delayed = lambda x, n: lax.scan(lambda c, _: ((fn(c[1], n), c[0]), None), (x, x), length=3)[0][1]
    with pytest.raises(ValueError) as error:
        count(delayed, *args)
    assert str(error.value).count("a `while` loop") == 1
    for bad in ["1n", "a b", ""]:
        with pytest.raises(ValueError, match="identifier"):
            rx.flops.trips(bad)
    with pytest.raises(ValueError, match="negative"):
        rx.flops.trips(-1)


def test_cond_counts_the_larger_branch_or_what_is_declared():
    x, index = struct(4, 4), struct(dtype=jnp.int32)
    fns = [lambda x: x, lambda x: x @ x, lambda x: jnp.sin(x @ x @ x)]
    costs = [0, 128, 256 + 16]
    assert count(lambda i, x: lax.switch(i, fns, x), index, x).total == costs[2]
    for wrap in [lambda f: f, jax.jit, jax.checkpoint]:

        def fn(i, x):
            with rx.flops.branches("1/2", "1/3", "1/6"):
                return wrap(lambda i, x: lax.switch(i, fns, x))(i, x)

        assert count(fn, index, x).total == Fraction(128, 3) + Fraction(272, 6)
        # In a batch of indices, all branches run. With one index for all, one does.
        assert count(jax.vmap(fn, (None, 0)), index, struct(3, 4, 4)).total == 128 + 136
        batched = count(jax.vmap(fn), struct(3, dtype=jnp.int32), struct(3, 4, 4))
        assert batched.matmul == 3 * 3 * 128
    assert count(lambda x: lax.cond(True, fns[1], fns[2], x), x).total == 128
    gradient = lambda i, x: jax.grad(lambda x: jnp.sum(fn(i, x)))(x)
    most = lambda i, x: jax.grad(lambda x: jnp.sum(lax.switch(i, fns, x)))(x)
    assert 0 < count(gradient, index, x).matmul < count(most, index, x).matmul


def test_branches_that_cannot_be():
    for weights in [(), ("1/2",), (-1, 2), ("1/2", Fraction(1, 4))]:
        with pytest.raises(ValueError, match="sum to one"):
            rx.flops.branches(*weights)

    def fn(p, x):
        with rx.flops.branches(1, 0, 0):
            return lax.cond(p, jnp.sin, lambda x: x, x)

    with pytest.raises(ValueError, match="3 probabilities for a `cond` of 2 branches"):
        count(fn, struct(dtype=jnp.bool_), struct(4))


#
# Rules
#


def primitive(name):
    p = jax.extend.core.Primitive(name)
    p.def_abstract_eval(lambda x: x)
    return p


def test_unknown_primitives_are_named():
    strange, other = primitive("strange_kernel"), primitive("other_kernel")
    x = struct(3, 4)

    def fn(x):
        with jax.named_scope("attention"):
            return jax.jit(strange.bind)(other.bind(strange.bind(x)))

    with pytest.raises(ValueError, match='(?s)`other_kernel`, in scope "attention".*`strange_kernel`.*1 more.*rules='):
        count(fn, x)
    rules = {
        "strange_kernel": lambda eqn: 10 * eqn.invars[0].aval.size,
        "other_kernel": lambda eqn: (7, Fraction(1, 2)),
    }
    cost = count(fn, x, rules=rules)
    assert (cost.matmul, cost.elementwise) == (7, Fraction(481, 2))
    assert cost.by_scope() == {"attention": cost.total}
    assert count(jnp.sin, x, rules={"sin": lambda eqn: 20}).total == 20
    with pytest.raises(TypeError, match="must return an exact number"):
        count(jnp.sin, x, rules={"sin": lambda eqn: 1.5})


N = 6
X, Y, I, B, M = struct(N), struct(N), struct(N, dtype=jnp.int32), struct(N, dtype=jnp.bool_), struct(N, N)
Z = struct(N, dtype=jnp.complex64)


def names(module, text, *args):
    return [(f"{module.__name__}.{name}", getattr(module, name), args) for name in text.split()]


FUNCTIONS = [
    *names(
        jnp,
        """abs acos acosh all any argmax argmin argsort around asin asinh atan atanh average cbrt ceil conj corrcoef cos
        cosh count_nonzero cov cumprod cumsum deg2rad degrees diag diff ediff1d exp exp2 expm1 fabs flip floor
        frexp gradient i0 imag isfinite isinf isnan isneginf log log10 log1p log2 max mean median min modf nan_to_num
        nanargmax nancumsum nanmax nanmean nanmedian nanstd nansum nanvar negative ones_like positive prod ptp
        rad2deg ravel real reciprocal rint round sign signbit sin sinc sinh sort sqrt square std sum tan tanh trapezoid
        trunc unwrap vander var zeros_like""",
        X,
    ),
    *names(
        jnp,
        """add arctan2 convolve copysign correlate divide divmod dot equal floor_divide fmax fmin fmod greater
        heaviside hypot inner isclose kron less logaddexp logaddexp2 maximum minimum mod multiply nextafter not_equal
        outer polyadd polymul polyval power remainder searchsorted subtract true_divide vdot""",
        X,
        Y,
    ),
    *names(jnp, "matmul dot inner tensordot kron outer vecdot", M, M),
    *names(jnp, "trace tril triu transpose diagonal rot90 fliplr", M),
    *names(jnp.fft, "fft ifft rfft irfft fftshift", X),
    *names(jnp.fft, "fft2 ifft2 rfft2 irfft2 fftn", M),
    *names(jnp.linalg, "cholesky det inv norm qr slogdet matrix_transpose", M),
    *names(jnp.linalg, "solve", M, M),
    *names(jax.scipy.special, "digamma entr erf erfc erfinv expit gammaln i0 i0e i1 i1e log_ndtr logit ndtr ndtri", X),
    *names(jax.scipy.special, "betaln gammainc gammaincc rel_entr xlog1py xlogy zeta", X, Y),
    *names(jax.scipy.special, "logsumexp softmax log_softmax", X),
    *names(
        jax.nn,
        """celu elu gelu glu hard_sigmoid hard_silu hard_swish hard_tanh leaky_relu log_sigmoid log_softmax logsumexp
        mish relu relu6 selu sigmoid silu softmax softplus soft_sign sparse_plus squareplus standardize swish""",
        X,
    ),
    *names(
        lax,
        """abs acos asin atan bessel_i0e bessel_i1e cbrt ceil cos cosh cummax cumlogsumexp cumsum digamma erf erf_inv
        erfc exp exp2 expm1 floor is_finite lgamma log log1p logistic neg reciprocal round rsqrt sign sin sqrt square
        tan tanh""",
        X,
    ),
    *names(lax, "add atan2 div igamma igammac max min mul nextafter pow rem sub eq lt", X, Y),
    *names(lax, "add bitwise_and bitwise_or bitwise_xor mul shift_left shift_right_logical", I, I),
    *names(lax, "clz population_count bitwise_not", I),
    *names(jnp, "logical_not sum", B),
    *names(jnp, "abs angle conj exp imag real sqrt square sum", Z),
    ("clamp", lambda x: lax.clamp(0.0, x, 1.0), (X,)),
    ("where", jnp.where, (B, X, Y)),
    ("clip", lambda x: jnp.clip(x, 0, 1), (X,)),
    ("interp", jnp.interp, (X, X, X)),
    ("histogram", lambda x: jnp.histogram(x, bins=4), (X,)),
    ("quantile", lambda x: jnp.quantile(x, 0.3), (X,)),
    ("top_k", lambda x: lax.top_k(x, 2), (X,)),
    ("take", jnp.take, (X, I)),
    ("bincount", lambda i: jnp.bincount(i, length=3), (I,)),
    ("unique", lambda x: jnp.unique(x, size=3), (X,)),
    ("one_hot", lambda i: jax.nn.one_hot(i, 4), (I,)),
    ("roll, pad, tile", lambda x: jnp.tile(jnp.pad(jnp.roll(x, 2), 1), 2), (X,)),
    ("concatenate", lambda x: jnp.concatenate([x, x]), (X,)),
    ("scatter", lambda x, i: (x.at[i].set(1.0), x.at[i].mul(2.0), x.at[i].max(0.0), x.at[i].get()), (X, I)),
    ("scatter_apply", lambda x, i: x.at[i].apply(jnp.sin), (X, I)),
    ("reduce", lambda x: lax.reduce(x, 0.0, lambda a, b: jnp.sin(a) + b, (0,)), (X,)),
    ("reduce_window", lambda x: lax.reduce_window(x, 0.0, lax.add, (2,), (1,), "VALID"), (X,)),
    ("associative_scan", lambda x: lax.associative_scan(jnp.add, x), (X,)),
    ("map", lambda x: lax.map(jnp.sin, x), (X,)),
    ("segment_sum", lambda x, i: jax.ops.segment_sum(x, i, 4), (X, I)),
    ("solve_triangular", lambda m: jax.scipy.linalg.solve_triangular(m, m), (M,)),
    ("lu", jax.scipy.linalg.lu_factor, (M,)),
    ("cho_solve", lambda m: jax.scipy.linalg.cho_solve((m, True), m), (M,)),
    ("expm", jax.scipy.linalg.expm, (M,)),
    *((f"random.{f.__name__}", f, (jr.key(0),)) for f in (jr.uniform, jr.normal, jr.gumbel, jr.exponential, jr.split)),
    ("random.categorical", jr.categorical, (jr.key(0), X)),
    ("random.permutation", jr.permutation, (jr.key(0), X)),
    ("ragged_dot", lax.ragged_dot, (M, struct(2, N, 3), struct(2, dtype=jnp.int32))),
    ("convert", lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), (X,)),
    ("layer norm", lambda x: eqx.nn.LayerNorm(N)(x), (X,)),
    ("group norm", lambda x: eqx.nn.GroupNorm(2, N)(x), (M,)),
    ("max pool", lambda x: eqx.nn.MaxPool1d(2, 1)(x), (M,)),
    ("average pool", lambda x: eqx.nn.AvgPool1d(2, 2)(x), (M,)),
    ("error_if", lambda x: eqx.error_if(x, jnp.any(x > 1), "too large"), (X,)),
]


@pytest.mark.parametrize("name, fn, args", FUNCTIONS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FUNCTIONS)])
def test_functions_are_counted(name, fn, args):
    assert count(fn, *args).total >= 0


@pytest.mark.parametrize(
    "name, fn, args",
    [
        ("eigh", jnp.linalg.eigvalsh, (M,)),
        ("svd", lambda m: jnp.linalg.svd(m, compute_uv=False), (M,)),
        ("random_gamma", lambda key: jr.gamma(key, 2.0, (3,)), (jr.key(0),)),
    ],
)
def test_methods_that_iterate_until_they_converge_need_a_rule(name, fn, args):
    with pytest.raises(ValueError, match=f"no rule for the primitive `{name}`"):
        count(fn, *args)
    assert count(fn, *args, rules={name: lambda eqn: 1000}).by_primitive()[name] == 1000


def test_gradients_of_pooling_sorting_and_decompositions_are_counted():
    for fn in (
        lambda m: eqx.nn.MaxPool1d(2, 1)(m),
        lambda m: eqx.nn.AvgPool1d(2, 2)(m),
        jnp.sort,
        jnp.linalg.inv,
        jnp.linalg.cholesky,
        lambda m: jnp.linalg.qr(m)[0],
        lambda m: jnp.cumprod(m, 0),
        jax.nn.logsumexp,
        lambda m: jnp.prod(m, 1),
        lambda m: jnp.take(m, jnp.array([1, 2]), 0),
    ):
        assert count(jax.grad(lambda m: jnp.sum(fn(m))), M).total > 0


#
# Costs
#


def scoped(x, w):
    with jax.named_scope("embed"):
        x = jnp.tanh(x @ w)
    with jax.named_scope("body"):
        layer = jax.checkpoint(lambda x, w: jax.named_scope("mlp")(jnp.tanh)(x @ w))
        x = lax.scan(lambda x, _: (layer(x, w), None), x, length=3)[0]
    return jnp.sum(x * x)


def test_breakdowns_add_up():
    x, w = struct(4, 5), struct(5, 5)
    cost = count(jax.value_and_grad(scoped, (0, 1)), x, w)
    for table in cost.by_scope(), cost.by_scope(1), cost.by_phase(), cost.by_primitive():
        assert sum(table.values()) == cost.total
    assert cost.matmul + cost.elementwise == cost.total
    assert set(cost.by_scope()) == {"", "embed", "body", "body/mlp"}
    assert set(cost.by_scope(1)) == {"", "embed", "body"}
    product = 2 * 4 * 5 * 5
    assert matmuls(cost) == {"forward": 4 * product, "backward": 8 * product, "remat": 3 * product}
    assert "body/mlp" in str(cost) and "remat" in str(cost) and f"{cost.total:,}" in str(cost)
    assert str(cost.total) in repr(cost)
    assert str(rx.flops.Cost())
    many = rx.flops.Cost({(f"s{i:02d}", "forward", "add", "elementwise"): i + 1 for i in range(40)})
    assert "smaller)" in str(many) and f"{many.total:,}" in str(many)


amounts = st.dictionaries(
    st.tuples(
        st.sampled_from(["", "a", "a/b"]),
        st.sampled_from(["forward", "backward", "remat"]),
        st.sampled_from(["sin", "dot_general"]),
        st.sampled_from(["matmul", "elementwise"]),
    ),
    st.integers(0, 10) | st.fractions(0, 10),
)


@given(amounts, amounts, st.integers(0, 5) | st.fractions(0, 5))
def test_costs_add_and_multiply(a, b, factor):
    a, b = rx.flops.Cost(a), rx.flops.Cost(b)
    assert a + b == b + a and sum([a, b]) == a + b and (a + b).total == a.total + b.total
    assert factor * (a + b) == factor * a + b * factor and (factor * a).total == factor * a.total
    assert 2 * a == a + a and hash(2 * a) == hash(a + a)
    assert 0 * a == rx.flops.Cost() and a + 0 == a
    assert all(isinstance(n, int) or n.denominator > 1 for _, n in a.rows)
    with pytest.raises(TypeError):
        a + 1.5  # pyright: ignore
    with pytest.raises(TypeError):
        a * 1.5  # pyright: ignore


def test_petascale_shapes_allocate_nothing():
    before = len(jax.live_arrays())
    x, w = struct(2**24, 2**24), struct(2**24, 2**24)
    step = jax.grad(lambda x, w: jnp.sum(lax.scan(lambda x, _: (x @ w, None), x, length=10**6)[0]), (0, 1))
    cost = count(step, x, w)
    assert cost.matmul == 3 * 10**6 * 2**73
    assert len(jax.live_arrays()) <= before


def test_numpy_arrays_are_inputs():
    """As constants they would be folded, and products of them lost."""
    assert count(jnp.matmul, np.ones((3, 4), np.float32), np.ones((4, 5))).total == 120
    assert count(lambda x: x * x, np.float32(3)).total == 1


def test_arguments():
    model = eqx.nn.MLP(3, 4, 5, 1, key=jr.key(0))
    assert count(model, struct(3)) == count(lambda m, x: m(x), eqx.filter_eval_shape(lambda: model), jnp.ones(3))
    assert count(lambda *, x: x @ x, x=struct(2, 2)).total == 16
    assert count(lambda x, name: jnp.sin(x) if name == "sin" else x, struct(2), "sin").total == 2


#
# Recursions
#


class Mixer(eqx.Module):
    """A block of two products, whose cost tells it from the others."""

    up: jax.Array | jax.ShapeDtypeStruct
    down: jax.Array | jax.ShapeDtypeStruct

    def __call__(self, x):
        return x + jnp.tanh(x @ self.up) @ self.down


WIDTH = 4
STATE = struct(3, WIDTH)
BLOCKS = {name: Mixer(struct(WIDTH, h), struct(h, WIDTH)) for name, h in zip("ABC", (3, 17, 101))}
EACH = {name: count(block, STATE) for name, block in BLOCKS.items()}
rounds = st.fixed_dictionaries(dict.fromkeys("rst", st.integers(1, 4)))


def compose(text, **loops):
    signature = rx.Signature(text)
    return rx.compose(
        signature,
        {name: BLOCKS[name] for name in signature.blocks},
        **{name: loops[name] for name in signature.exponents},
    )


@given(signatures(), rounds)
@example("A^r B", {"r": 4, "s": 1, "t": 1})
def test_a_recursion_costs_the_sum_of_its_visits(text, rounds):
    signature = rx.Signature(text)
    bound = signature.bind(**{name: rounds[name] for name in signature.exponents})
    cost = count(compose(text, **rounds), STATE)
    want = sum(n * EACH[name] for name, n in bound.counts.items())
    assert (cost.total, cost.matmul) == (want.total, want.matmul)


@given(st.integers(1, 200))
def test_rins_costs_its_rounds(n):
    assert count(compose("A^r B", r=n), STATE).total == n * EACH["A"].total + EACH["B"].total
    chained = rx.chain(compose("A^r B", r=n), BLOCKS["C"])
    assert count(chained, STATE).total == n * EACH["A"].total + EACH["B"].total + EACH["C"].total


@given(signatures(), rounds)
def test_equal_signatures_cost_the_same(text, rounds):
    signature = rx.Signature(text)
    bound = signature.bind(**{name: rounds[name] for name in signature.exponents})
    expanded = rx.Signature(" ".join(bound.visits))
    costs = [count(compose(str(s), **rounds), STATE) for s in (signature, bound, expanded)]
    assert len({(cost.total, cost.matmul) for cost in costs}) == 1


def gradient(model, state, rounds=None, traced=False):
    """The cost of the gradient of all weights and of the state."""
    arrays, rest = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct) and leaf.ndim == 2)
    numbers = jtu.tree_map(lambda _: struct(dtype=jnp.int32), rounds) if traced else {}

    def step(arrays, state, numbers):
        def loss(arrays, state):
            model = eqx.combine(arrays, rest)
            return jnp.sum(rx.with_rounds(model, **numbers)(state) if numbers else model(state))

        return jax.value_and_grad(loss, (0, 1))(arrays, state)

    return count(step, arrays, state, numbers, trips=rounds if traced else None)


def pair(text, rounds, forms=None):
    """The same recursion with traced rounds, and with static ones that are rolled and rematerialised."""
    names = rx.Signature(text).exponents
    rounds = {name: rounds[name] for name in names}
    last = {name: (forms or {}).get(name) for name in names}
    remat = rx.gradient.Remat()
    dynamic = {n: rx.Loop(1, max=8, gradient=None if last[n] is None else rx.gradient.Last(last[n])) for n in names}
    static = {
        n: rx.Loop(rounds[n], unroll=False, gradient=remat if last[n] is None else rx.gradient.Last(last[n], remat))
        for n in names
    }
    return compose(text, **dynamic), compose(text, **static), rounds


@given(signatures(), rounds, st.fixed_dictionaries(dict.fromkeys("rst", st.sampled_from([None, 1, 2]))))
@example("(A^r B)^s", {"r": 4, "s": 3, "t": 1}, {"r": 2, "s": None, "t": 1})
def test_traced_rounds_cost_forward_what_static_rounds_cost(text, rounds, last):
    dynamic, static, rounds = pair(text, rounds, last)
    assume(rounds)
    numbers = {name: struct(dtype=jnp.int32) for name in rounds}
    fn = lambda model, numbers, x: rx.with_rounds(model, **numbers)(x)
    traced = count(fn, dynamic, numbers, STATE, trips=rounds)
    fixed = count(static, STATE)
    assert (traced.total, traced.matmul) == (fixed.total, fixed.matmul)


@examples(15)
@given(signatures(depth=2), rounds)
@example("A", {"r": 1, "s": 1, "t": 4})
@example("A^r B", {"r": 3, "s": 1, "t": 4})
@example("A^r B^2", {"r": 1, "s": 1, "t": 1})
def test_traced_gradients_cost_what_static_rematerialised_ones_cost_less_a_visit(text, rounds):
    """Every block stands inside the loop. Elementwise, the traced form adds up gradients once a visit."""
    dynamic, static, rounds = pair(f"({text})^t", rounds)
    traced, fixed = gradient(dynamic, STATE, rounds, traced=True), gradient(static, STATE)
    assert traced.matmul == fixed.matmul - _again(f"({text})^t", rounds)
    assert traced.by_phase()["remat"] <= traced.by_phase()["forward"]
    assert matmuls(fixed)["remat"] - matmuls(traced)["remat"] == _again(f"({text})^t", rounds)


def _again(text, rounds):
    """What traced rounds save: the last visit is not computed again, of which only the first product would be needed."""
    names = rx.Signature(text).exponents
    last = rx.Signature(text).bind(**{name: rounds[name] for name in names}).visits[-1]
    return EACH[last].matmul // 2


@examples(15)
@given(st.sampled_from(["A", "A B", "A^r B", "(A^r B)^s C"]), rounds, st.integers(1, 3), st.sampled_from(["r", "t"]))
def test_truncated_gradients_cost_their_last_rounds(text, rounds, k, at):
    dynamic, static, rounds = pair(f"({text})^t", rounds, {at: k})
    traced, fixed = gradient(dynamic, STATE, rounds, traced=True), gradient(static, STATE)
    largest = max(cost.matmul for cost in EACH.values())
    # Where a cut stands right before a visit, the static form leaves out the gradient of that visit's input.
    more = traced.matmul + _again(f"({text})^t", rounds) - fixed.matmul
    assert 0 <= more <= rounds["t"] * rounds.get("s", 1) * largest


@examples(15)
@given(st.integers(1, 6), st.integers(1, 8))
def test_truncated_gradient_in_closed_form(n, k):
    """Every round forward; of the last `k`, twice that for its gradient, and all but the last of them again."""
    each = EACH["A"].matmul
    dynamic, _, rounds = pair("A^r", {"r": n}, {"r": k})
    cost = gradient(dynamic, STATE, rounds, traced=True)
    k = min(n, k)
    assert cost.matmul == (n + 2 * k + (k - 1)) * each - _unused(k - 1)


def _unused(visits):
    """What is computed again although no gradient needs it: nothing of a block's last product."""
    return visits * 2 * 3 * 3 * WIDTH


def test_traced_recomputation_is_reported_as_remat():
    n = 5
    dynamic, static, rounds = pair("A^r", {"r": n})
    cost = gradient(dynamic, STATE, rounds, traced=True)
    product = 2 * 3 * 3 * WIDTH
    assert matmuls(cost) == {"forward": 2 * n * product, "backward": 4 * n * product, "remat": (n - 1) * product}
    assert n * cost.by_phase()["remat"] == (n - 1) * gradient(static, STATE).by_phase()["remat"]


def test_traced_rounds_that_are_not_told_are_named():
    dynamic, _, rounds = pair("(A^r B)^s", {"r": 2, "s": 3})
    run = lambda model, r, s, x: rx.with_rounds(model, r=r, s=s)(x)
    n = struct(dtype=jnp.int32)
    with pytest.raises(
        ValueError, match=r"(?s)loop named 's'.*test_flops_count.py.*loop named 'r'|loop named 'r'.*'s'"
    ):
        count(run, dynamic, n, n, STATE)
    # Static rounds need no telling, and a name that no loop has is an error.
    with pytest.raises(ValueError, match="no loop that is counted is named 'r'"):
        count(compose("A^r", r=2), STATE, trips={"r": 2})


@pytest.mark.parametrize(
    "text, rounds", [("A^r", {"r": 1}), ("(A^r B)^s", {"r": 1, "s": 1}), ("(A^r B)^s", {"r": 2, "s": 1})]
)
def test_a_loop_of_at_most_one_round_leaves_no_while_and_keeps_its_name(text, rounds):
    most = {name: rx.Loop(1, max=r) for name, r in rounds.items()}
    model = compose(text, **most)
    cost = gradient(model, STATE, rounds, traced=True)
    static = compose(text, **{name: rx.Loop(r, max=r, gradient=rx.gradient.Remat()) for name, r in rounds.items()})
    parts = [matmuls(c) for c in (cost, gradient(static, STATE))]
    assert all(parts[0][phase] == parts[1][phase] for phase in ("forward", "backward"))
    assert all("rx." not in scope for scope in cost.by_scope())


def test_a_loop_of_at_most_one_round_cannot_be_told_more():
    model = compose("A^r", r=rx.Loop(1, max=1))
    with pytest.raises(ValueError, match="of the loop named 'r' at most one round is counted.* got 5 in `trips`"):
        gradient(model, STATE, {"r": 5}, traced=True)
    # A name that no loop has is still an error.
    grad = lambda model, n, x: jax.grad(lambda x: jnp.sum(rx.with_rounds(model, r=n)(x)))(x)
    n = struct(dtype=jnp.int32)
    assert count(grad, model, n, STATE, trips={"r": 1})
    with pytest.raises(ValueError, match="no loop that is counted is named 'q'"):
        count(grad, model, n, STATE, trips={"q": 1})


def test_scopes_of_blocks_survive_traced_rounds():
    class Named(eqx.Module):
        inner: Mixer

        def __call__(self, x):
            with jax.named_scope("mixer"):
                return self.inner(x)

    model = rx.compose("A^r B", {"A": Named(BLOCKS["A"]), "B": BLOCKS["B"]}, r=rx.Loop(1, max=8))
    cost = gradient(model, STATE, {"r": 5}, traced=True)
    assert set(cost.by_scope()) == {"", "A/mixer", "B"}
    inside = {key: n for key, n in cost.rows if key[0] == "A/mixer" and key[3] == "matmul"}
    assert sum(inside.values()) == 15 * EACH["A"].matmul + 4 * EACH["A"].matmul // 2
    batched = count(lambda m, x: jax.vmap(m)(x), model, struct(7, *STATE.shape))
    assert batched.matmul == 7 * (EACH["A"].matmul + EACH["B"].matmul)


@pytest.mark.parametrize("most", [1, 2])
def test_trips_of_at_most_one_round_are_named_all_the_same(most):
    model = rx.recur(rx.lift(jnp.sin), rx.Loop(1, max=most))
    step = jax.grad(lambda x, r: jnp.sum(rx.with_rounds(model, r=r)(x)))
    one = rx.flops.count(step, struct(4), struct(dtype=jnp.int32), trips={"r": 1})
    with pytest.raises(ValueError, match="no loop that is counted is named 'q'"):
        rx.flops.count(step, struct(4), struct(dtype=jnp.int32), trips={"r": 1, "q": 1})
    static = rx.flops.count(jax.grad(lambda x: jnp.sum(rx.with_rounds(model, r=1)(x))), struct(4))
    assert one.by_primitive()["cos"] == static.by_primitive()["cos"] > 0


@pytest.mark.parametrize("text", ["A^r", "(A^r B)^s C"])
def test_traced_gradients_under_transformations(text):
    """A batch costs its size, and what is rematerialised around the loop runs forward once more."""
    dynamic, _, rounds = pair(text, {"r": 3, "s": 2}, {"r": 2})
    numbers = {name: struct(dtype=jnp.int32) for name in rounds}
    arrays, rest = eqx.partition(dynamic, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct) and leaf.ndim == 2)

    def grads(numbers, arrays, state, wrap=lambda fn: fn):
        model = lambda arrays, state: rx.with_rounds(eqx.combine(arrays, rest), **numbers)(state)
        return jax.value_and_grad(lambda *args: jnp.sum(wrap(model)(*args) ** 2), (0, 1))(arrays, state)

    plain = count(grads, numbers, arrays, STATE, trips=rounds)
    assert count(jax.jit(grads), numbers, arrays, STATE, trips=rounds) == plain
    batched = count(jax.vmap(grads, (None, None, 0)), numbers, arrays, struct(7, *STATE.shape), trips=rounds)
    assert matmuls(batched) == {phase: 7 * n for phase, n in matmuls(plain).items()}
    steps = lambda *args: lax.scan(lambda c, _: (c, grads(*args[:2], c)), args[2], length=5)[1]
    assert count(steps, numbers, arrays, STATE, trips=rounds).matmul == 5 * plain.matmul
    again = count(lambda *args: grads(*args, jax.checkpoint), numbers, arrays, STATE, trips=rounds)
    run = lambda model, numbers, state: rx.with_rounds(model, **numbers)(state)
    forward = count(run, dynamic, numbers, STATE, trips=rounds).matmul
    assert plain.matmul < again.matmul <= plain.matmul + forward
    assert matmuls(again)["backward"] == matmuls(plain)["backward"]
