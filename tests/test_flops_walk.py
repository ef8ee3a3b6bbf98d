"""What a walk must get right: which results are used, scopes, phases, counters, every function of JAX."""

import functools as ft
import operator
from fractions import Fraction

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax import lax

import rinsx as rx


count = rx.flops.count


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


W, X, F = struct(8, 8), struct(4, 8), 2 * 4 * 8 * 8


def test_dead_carries():
    def body(carry, _):
        a, b, c = carry
        # `c` feeds `b` from the next round on, and nothing uses `b` but `b`.
        return (jnp.sin(a), b + c, jnp.exp(c) * 2), a * 3

    scan = lambda a, b, c: lax.scan(body, (a, b, c), None, length=5)
    args = struct(8), struct(8), struct(8)
    carry = lambda i: count(lambda *args: scan(*args)[0][i], *args).by_primitive()
    assert carry(0) == {"sin": 40}
    assert carry(1) == {"add": 40, "exp": 40, "mul": 40}
    assert carry(2) == {"exp": 40, "mul": 40}
    assert count(lambda *args: scan(*args)[1], *args).by_primitive() == {"sin": 40, "mul": 40}
    # The way into a dead carry is dead.
    assert count(lambda a, b, c: scan(a, jnp.exp(b), c)[0][0], *args).by_primitive() == {"sin": 40}


def test_dead_carries_of_a_while():
    def fn(a, b, c):
        go = lambda carry: jnp.sum(carry[2]) < 1
        step = lambda carry: (jnp.sin(carry[0]), jnp.cos(carry[1]), carry[2] * 2)
        with rx.flops.trips(5):
            return lax.while_loop(go, step, (a, jnp.exp(b), jnp.tanh(c)))[0]

    # The condition keeps what it reads alive, even if nothing else does. It runs once more than the body.
    cost = count(fn, struct(8), struct(8), struct(8))
    assert cost.by_primitive() == {"reduce_sum": 6 * 7, "mul": 40, "sin": 40, "tanh": 8, "lt": 6}


@pytest.mark.parametrize("compare", ["lt", "le", "gt", "ge"])
@pytest.mark.parametrize("step", [-3, -2, 2, 3])
def test_a_counter_is_followed(compare, step):
    start, bound = (1, 12) if step > 0 else (12, 1)
    go = lambda carry: getattr(lax, compare)(carry[0], bound)
    adds = lambda carry: (carry[0] + step, jnp.sin(carry[1]))
    subtracts = lambda carry: (carry[0] - (-step), jnp.sin(carry[1]))
    n, trips = start, 0
    while getattr(operator, compare)(n, bound) and trips < 100:
        n, trips = n + step, trips + 1
    for body in (adds, subtracts):
        fn = lambda x: lax.while_loop(go, body, (start, x))
        if trips < 100:
            assert count(fn, struct(8)).total == 8 * trips
        else:
            with pytest.raises(ValueError, match="trips are not known"):
                count(fn, struct(8))


@pytest.mark.parametrize(
    "go, body",
    [
        (lambda i, x: i < 5, lambda i, x: (i * 2, jnp.sin(x))),
        (lambda i, x: (i < 5) & (i > 0), lambda i, x: (i + 1, jnp.sin(x))),
        (lambda i, x: x[0] < 5, lambda i, x: (i + 1, jnp.sin(x))),
        (lambda i, x: i < 5, lambda i, x: (i + i, jnp.sin(x))),
        (lambda i, x: i != 5, lambda i, x: (i + 1, jnp.sin(x))),
    ],
)
def test_what_is_no_counter_is_not_followed(go, body):
    with pytest.raises(ValueError, match="trips are not known"):
        count(lambda x: lax.while_loop(lambda c: go(*c), lambda c: body(*c), (1, x)), struct(8))


def test_branches_reach_the_conds_directly_inside():
    def nested(p, q, x):
        inner = lambda x: lax.cond(q, jnp.sin, lambda x: x, x)
        with rx.flops.branches("1/2", "1/2"):
            return lax.cond(p, inner, lambda x: x, x)

    p = struct(dtype=jnp.bool_)
    assert count(nested, p, p, struct(8)).total == 4


def scoped(w, x):
    with jax.named_scope("a"):
        x = jnp.sin(x @ w)
        with jax.named_scope("b"):
            return x @ w


@pytest.mark.parametrize(
    "wrap, within",
    [(lambda f: f, ""), (jax.jit, ""), (jax.checkpoint, ""), (jax.named_scope("c"), "/c")],
    ids=["plain", "jit", "checkpoint", "scope"],
)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("rolled", [False, True])
def test_scopes_are_those_of_the_user_in_each_phase(wrap, within, batched, rolled):
    def loss(w, x):
        with jax.named_scope("loss"):
            if rolled:
                x = lax.scan(lambda x, _: (wrap(scoped)(w, x), None), x, None, length=1)[0]
            else:
                x = wrap(scoped)(w, x)
            return jnp.sum(x)

    step = jax.value_and_grad(loss, (0, 1))
    train = jax.named_scope("train")(jax.vmap(step, (None, 0)) if batched else step)
    cost = count(train, W, struct(1, 4, 8) if batched else X)
    products = {
        scope: sorted(n for (s, _, _, kind), n in cost.rows if (s, kind) == (scope, "matmul"))
        for scope in cost.by_scope()
    }
    again = wrap is jax.checkpoint
    # Forward, backward, and perhaps again: the second product is not needed for it.
    inner = f"train/loss{within}/a"
    assert products.pop(inner) == [F] * (1 + again) + [2 * F]
    assert products.pop(f"{inner}/b") == [F, 2 * F]
    assert set(products) <= {"train", "train/loss"} and not any(products.values())
    assert (cost.by_phase()["remat"] > 0) == again


def test_phases_of_derivatives():
    phases = lambda fn: {phase for phase, n in count(fn, struct(8)).by_phase().items() if n > 0}
    f = lambda x: jnp.sum(jnp.sin(x) ** 3)
    assert phases(f) == phases(lambda x: jax.jvp(f, (x,), (x,))) == {"forward"}
    assert phases(jax.grad(f)) == phases(jax.hessian(f)) == {"forward", "backward"}
    assert phases(jax.grad(jax.checkpoint(f))) == {"backward", "remat"}


def test_a_backward_pass_written_by_hand_can_say_that_it_recomputes():
    fn = jax.custom_vjp(lambda w, x: jnp.sin(x @ w))

    def backward(residuals, g):
        with jax.named_scope("rematted_computation"):
            _, pull = jax.vjp(lambda w, x: jnp.sin(x @ w), *residuals)
        return pull(g)

    fn.defvjp(lambda w, x: (fn(w, x), (w, x)), backward)
    step = jax.value_and_grad(jax.named_scope("s")(lambda w, x: jnp.sum(fn(w, x))), (0, 1))
    cost = count(step, W, X)
    assert cost.by_phase() == {"forward": F + 32 + 31, "backward": 2 * F + 32, "remat": F + 32}
    assert set(cost.by_scope()) == {"s"}


def test_odd_scopes():
    @jax.named_scope("jvp")
    @jax.named_scope("f(x)/g")
    @jax.named_scope("a b[1]")
    def fn(x):
        return jnp.sum(jnp.sin(x) ** 2)

    scopes = {"jvp/f(x)/g/a b[1]"}
    assert set(count(fn, struct(8)).by_scope()) == set(count(jax.grad(fn), struct(8)).by_scope()) == scopes
    unbalanced = jax.named_scope("a)")(jax.named_scope("(b")(jnp.sin))
    assert set(count(unbalanced, struct(8)).by_scope()) == {"a)/(b"}


def test_a_program_that_repeats_is_walked_once():
    calls = []
    rules = {"dot_general": lambda eqn: calls.append(eqn) or (1, 0)}
    block = jax.jit(lambda w, x: jnp.sin(x @ w))

    def loss(w, x):
        x = ft.reduce(lambda x, _: block(w, x), range(50), x)
        return jnp.sum(lax.scan(lambda x, _: (block(w, x), None), x, None, 50)[0])

    assert count(jax.value_and_grad(loss, (0, 1)), W, X, rules=rules).matmul == 100 + 200
    # Forward and backward, and again where fewer of the outputs are used.
    assert len(calls) < 20


def test_partly_manual_shard_map():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=auto)
    P = jax.sharding.PartitionSpec
    fn = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"})
    x = struct(16, 8)
    assert count(fn, x, W).total == count(jnp.matmul, x, W).total
    nested = lambda x, w: jax.shard_map(
        lambda x, w: jax.shard_map(
            jnp.matmul, in_specs=(P(None, "b"), P("b")), out_specs=P(), axis_names={"b"}, check_vma=False
        )(x, w),
        mesh=mesh,
        in_specs=(P("a"), P()),
        out_specs=P("a"),
        axis_names={"a"},
        check_vma=False,
    )(x, w)
    assert count(nested, x, W).total == count(jnp.matmul, x, W).total


A, C, N = struct(4, 6), struct(4, 6, dtype=jnp.complex64), 24
PRIMITIVES = {
    "clamp": (lambda x: lax.clamp(0.0, x, 1.0), A, 2 * N),
    "power_1": (lambda x: lax.integer_pow(x, 1), A, 0),
    "power_8": (lambda x: lax.integer_pow(x, 8), A, 3 * N),
    "power_-7": (lambda x: lax.integer_pow(x, -7), A, 5 * N),
    "argmax": (lambda x: jnp.argmax(x, 1), A, N - 4),
    "sum_of_nothing": (jnp.sum, struct(0, 3), 0),
    "argsort": (lambda x: jnp.argsort(x, 0), A, 6 * 4 * 2),
    "top_k": (lambda x: lax.top_k(x, 2), A, 4 * 6 * 3),
    "max_pool": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 3), (2, 3), "VALID"), A, 20),
    "reduce": (lambda x: lax.reduce(x, 0.0, lambda a, b: a * b + a, (0,)), A, 2 * 18),
    "scatter_apply": (lambda x: x.at[0].apply(jnp.sin), A, 6),
    "complex_sum": (jnp.sum, C, 2 * (N - 1)),
    "fft": (jnp.fft.fft, C, 4 * 5 * 6 * 3),
    "rfft": (jnp.fft.rfft, A, 4 * 5 * 6 * 3 // 2),
    "cholesky": (lambda x: lax.linalg.cholesky(x, symmetrize_input=False), struct(2, 3, 3), 2 * (9 + 4 + 1)),
}


@pytest.mark.parametrize("case", PRIMITIVES.values(), ids=PRIMITIVES)
def test_primitives(case):
    fn, x, want = case
    assert count(fn, x).total == want


@pytest.mark.parametrize(
    "fn, leading",
    [
        (lambda a: lax.linalg.cholesky(a, symmetrize_input=False), Fraction(1, 3)),
        (lax.linalg.lu, Fraction(2, 3)),
        (lambda a: lax.linalg.triangular_solve(a, a), 1),
        (lambda a: lax.linalg.qr(a, full_matrices=False), Fraction(8, 3)),
        (lax.linalg.hessenberg, Fraction(10, 3)),
        (lambda a: jnp.linalg.solve(a, a[:, 0]), Fraction(2, 3)),
    ],
)
def test_linear_algebra_to_leading_order(fn, leading):
    n = 10**6
    assert abs(count(fn, struct(n, n)).total / (leading * n**3) - 1) < 1e-5


OPERANDS = [
    (struct(4, 4),),
    (struct(4, 4), struct(4, 4)),
    (struct(4), struct(4), struct(4)),
    (struct(4, 4, dtype=jnp.int32),),
]


@pytest.mark.parametrize("module", [jnp, jax.nn, jnp.fft, jax.scipy.special, lax], ids=lambda module: module.__name__)
@pytest.mark.filterwarnings("ignore")
def test_every_function_that_takes_such_operands(module):
    counted = 0
    for name in dir(module):
        fn = getattr(module, name, None)
        if name.startswith("_") or not callable(fn) or isinstance(fn, type):
            continue
        for args in OPERANDS:
            try:
                jax.make_jaxpr(fn)(*args)
            except Exception:
                continue
            try:
                count(fn, *args)
                counted += 1
            except ValueError as error:
                # Iterative methods, and loops until convergence.
                known = ("`eig`", "`svd`", "trips are not known")
                assert any(cause in str(error) for cause in known), (name, error)
    assert counted > 20


MORE = {
    "conv_patches": lambda x: lax.conv_general_dilated_patches(x[None, None], (2, 2), (1, 1), "SAME"),
    "conv_transpose": lambda x: lax.conv_transpose(x[None], x[None], (1,), "SAME"),
    "custom_root": lambda x: lax.custom_root(lambda y: y - x, x, lambda f, y: y, lambda g, y: y),
    "householder": lambda x: lax.linalg.householder_product(x, x[0]),
    "nonzero": lambda x: jnp.nonzero(x, size=3),
    "platform_dependent": lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos),
    "searchsorted": lambda x: jnp.searchsorted(x[0], x),
    "tridiagonal_solve": lambda x: lax.linalg.tridiagonal_solve(x[0], x[0], x[0], x),
    "keys": lambda x: jr.key_data(jr.fold_in(jr.clone(jr.key(0)), 1)),
    "refs": lambda x: (lambda ref: (ref.__setitem__(0, x[1]), ref[...])[1])(jax.new_ref(x)),
}


@pytest.mark.parametrize("fn", MORE.values(), ids=MORE)
def test_more_functions(fn):
    assert count(fn, struct(4, 4)).total >= 0
    assert count(jax.vmap(fn), struct(3, 4, 4)).total >= 0


@pytest.mark.parametrize("heads_first", [False, True])
def test_the_flash_kernel_costs_what_attention_written_out_does(heads_first):
    """The kernel exists on GPUs only: primitives of its names and parameters stand for it."""
    batch, heads, queries, keys, dim = 2, 3, 5, 7, 4

    def bind(name, outputs, *args):
        primitive = jax.extend.core.Primitive(f"dot_product_attention_{name}_wrapper")
        primitive.multiple_results = True
        primitive.def_abstract_eval(lambda *args, layout: [jax.core.ShapedArray(x.shape, x.dtype) for x in outputs])
        return primitive.bind(*args, layout=int(heads_first))

    swap = (lambda x: x.swapaxes(1, 2)) if heads_first else (lambda x: x)
    q = swap(jnp.ones((batch, queries, heads, dim)))
    k = v = swap(jnp.ones((batch, keys, heads, dim)))
    plain = lambda q, k, v: jnp.sum(jnp.sin(jax.nn.dot_product_attention(swap(q), swap(k), swap(v))))
    forward = rx.flops.count(lambda q, k, v: bind("fwd", [q], q, k, v), q, k, v)
    both = rx.flops.count(lambda q, k, v: (bind("fwd", [q], q, k, v), bind("bwd", [q, k, v], q, k, v)), q, k, v)
    assert forward.matmul == rx.flops.count(plain, q, k, v).matmul == 4 * batch * heads * queries * keys * dim
    assert both.matmul == rx.flops.count(jax.grad(plain, (0, 1, 2)), q, k, v).matmul
