"""How many FLOPs each primitive takes, from the shapes of one equation."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn


Rule = Callable[[JaxprEqn], int | Fraction]

# Primitives that hold a jaxpr and run it once.
CALLS = frozenset(
    """
    call closed_call composite custom_jvp_call custom_partitioning custom_vjp_call
    custom_vmap_call eval_jaxpr jit remat2 remat_opt shard_map xla_metadata_call
    """.split()
)

_MOVEMENT = """
    after_all all_gather all_gather_done all_gather_invariant all_gather_reduced
    all_gather_reduced_start all_gather_start all_to_all all_to_all_done
    all_to_all_start axis_index bitcast_convert_type broadcast_in_dim broadcast_to
    complex concatenate convert_element_type copy create_token dce_sink device_put
    dim_as_value dimension_size dynamic_slice dynamic_update_slice empty empty2
    empty_ref free_ref freeze from_edtype gather get imag inspect_sharding iota
    layout_constraint lu_pivots_to_permutation name new_ref optimization_barrier pad
    pbroadcast pbroadcast_done pbroadcast_dynamic pbroadcast_start pin
    platform_index ppermute ppermute_done ppermute_start precv preduced psend
    psum_done pvary ragged_all_to_all real reduce_precision reduce_scatter_done
    reduced_vary_cast reduced_vary_cast_p relayout reshape reshard rev select_n
    shape_assertion sharding_constraint slice split squeeze stack stage
    stop_gradient swap tie tile to_edtype transpose unpin unstack
    vary_unreduced_cast vary_unreduced_cast_p with_memory_space_constraint
    xla_metadata_value zeros_like
"""
_RANDOM = """
    iota_2x32_shape philox2x32 philox4x32 random_bits random_clone random_fold_in
    random_seed random_split random_unwrap random_wrap rng_bit_generator
    rng_uniform threefry2x32 threefry4x32
"""
_HOST = "check debug_callback debug_print io_callback pure_callback"
# Equinox's own: checks, and what its filtered transformations leave behind.
_EQUINOX = """
    announce_jaxpr nonbatchable nondifferentiable_backward nontraceable select_if_vmap
    unreachable unvmap_all unvmap_any unvmap_max
"""
_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clz conj cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1
    floor ge gt igamma igamma_grad_a igammac is_finite le le_to lgamma log log1p log2
    logistic lt lt_to max min mul mulhi ne neg nextafter not or polygamma
    population_count pow reciprocal regularized_incomplete_beta rem round rsqrt
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub
    tan tanh xor zeta
"""
_REDUCTIONS = """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
    reduce_xor
"""
_COLLECTIVES = """
    pmax pmin psum psum_invariant psum_invariant_start psum_start reduce_scatter
    reduce_scatter_start unreduced_pmax unreduced_pmin unreduced_psum
    unreduced_psum_start unreduced_reduce_scatter unreduced_reduce_scatter_start
"""
_SCATTERS = "scatter-add scatter-max scatter-min scatter-mul scatter-sub"

# Of complex numbers: an addition is two real ones, a product is six real operations.
_COMPLEX = {
    **dict.fromkeys(
        """
        add add_any addupdate cumsum neg psum psum_invariant reduce_scatter reduce_sum
        reduce_window_sum scatter-add scatter-sub select_and_scatter_add sub
        """.split(),
        2,
    ),
    **dict.fromkeys("cumprod integer_pow mul reduce_prod scatter-mul square".split(), 6),
    "div": 11,
}


def _shape(var) -> tuple[int, ...]:
    return tuple(int(dim) for dim in getattr(var.aval, "shape", ()))


def _size(var) -> int:
    return math.prod(_shape(var))


def _is(var, kind) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, kind))


def _any(eqn: JaxprEqn, kind) -> bool:
    return any(_is(var, kind) for var in (*eqn.invars, *eqn.outvars))


def _weight(eqn: JaxprEqn) -> int:
    """The FLOPs of one step: none for integers, more than one for complex numbers."""
    if _any(eqn, jnp.complexfloating):
        return _COMPLEX.get(eqn.primitive.name, 1)
    return int(_any(eqn, jnp.inexact))


def _zero(eqn: JaxprEqn) -> int:
    del eqn
    return 0


def _per_output(steps: int) -> Rule:
    return lambda eqn: steps * _size(eqn.outvars[0]) * _weight(eqn)


def _per_input(index: int) -> Rule:
    return lambda eqn: _size(eqn.invars[index]) * _weight(eqn)


def _collective(eqn: JaxprEqn) -> int:
    return sum(map(_size, eqn.invars)) * _weight(eqn)


def _reduced(eqn: JaxprEqn) -> int:
    return max(0, _size(eqn.invars[0]) - _size(eqn.outvars[0]))


def _reduction(eqn: JaxprEqn) -> int:
    return _reduced(eqn) * _weight(eqn)


def _cumulative(steps: int) -> Rule:
    def rule(eqn):
        shape, axis = _shape(eqn.invars[0]), eqn.params["axis"]
        rows = _size(eqn.invars[0]) // max(1, shape[axis])
        return steps * (_size(eqn.invars[0]) - rows) * _weight(eqn)

    return rule


def _integer_pow(eqn: JaxprEqn) -> int:
    # By squaring: 5 is 0b101, hence two squarings and one product more.
    y = abs(eqn.params["y"])
    products = y.bit_length() + y.bit_count() - 2 if y else 0
    return _size(eqn.outvars[0]) * (products * _weight(eqn) + int(eqn.params["y"] < 0))


def _polynomial(eqn: JaxprEqn) -> int:
    # Horner's scheme: the operands are x and one coefficient more than the degree.
    return 2 * (len(eqn.invars) - 2) * _size(eqn.outvars[0]) * _weight(eqn)


def _sort(eqn: JaxprEqn) -> int:
    keys = eqn.invars[: eqn.params.get("num_keys", 1)]
    if not any(_is(key, jnp.inexact) for key in keys):
        return 0
    # `sort`, `top_k` and `approx_top_k` each have their own name for the axis.
    names = ("dimension", "axis", "reduction_dimension")
    (axis,) = (eqn.params[name] for name in names if name in eqn.params)
    return _size(keys[0]) * _log2(_shape(keys[0])[axis])


def _log2(n: int) -> int:
    """The binary logarithm, rounded up."""
    return max(0, n - 1).bit_length()


def _window(eqn: JaxprEqn) -> int:
    return math.prod(eqn.params["window_dimensions"])


def _reduce_window(eqn: JaxprEqn) -> int:
    return _size(eqn.outvars[0]) * (_window(eqn) - 1) * _weight(eqn)


def _select_and_scatter_add(eqn: JaxprEqn) -> int:
    # For each element of the source: the comparisons in its window, and an addition.
    additions = _weight(eqn)
    comparisons = int(additions > 0) * (_window(eqn) - 1)
    return _size(eqn.invars[0]) * (comparisons + additions)


def _fft(eqn: JaxprEqn) -> int:
    lengths = [int(n) for n in eqn.params["fft_lengths"]]
    shape = max(map(_shape, (eqn.invars[0], eqn.outvars[0])), key=math.prod)
    batch = math.prod(shape[: len(shape) - len(lengths)])
    flops = 5 * batch * math.prod(lengths) * sum(map(_log2, lengths))
    real = _is(eqn.invars[0], jnp.floating) or _is(eqn.outvars[0], jnp.floating)
    return -(-flops // 2) if real else flops


#
# Contractions
#


def _multiply_add(eqn: JaxprEqn) -> int:
    if _is(eqn.outvars[0], jnp.complexfloating):
        return 8
    return 2 if _is(eqn.outvars[0], jnp.inexact) else 0


def _dot(eqn: JaxprEqn) -> int:
    groups = ()
    if "ragged_dot_dimension_numbers" in eqn.params:
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        groups, numbers = numbers.rhs_group_dimensions, numbers.dot_dimension_numbers
    else:
        numbers = eqn.params["dimension_numbers"]
    (_, contracted), (_, batch) = numbers
    # A row meets the matrix of its own group only.
    shared = {*contracted, *batch, *groups}
    shape = _shape(eqn.invars[1])
    free = math.prod(dim for i, dim in enumerate(shape) if i not in shared)
    return _multiply_add(eqn) * _size(eqn.invars[0]) * free


def _conv(eqn: JaxprEqn) -> int:
    params = eqn.params
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    lhs, rhs, out = map(_shape, (*eqn.invars[:2], eqn.outvars[0]))
    pairs = lhs[lhs_spec[0]] // params["batch_group_count"]
    pairs *= rhs[rhs_spec[0]] * rhs[rhs_spec[1]]
    for i, (low, _) in enumerate(params["padding"]):
        pairs *= _hits(
            lhs[lhs_spec[2 + i]],
            params["lhs_dilation"][i],
            (out[out_spec[2 + i]], params["window_strides"][i]),
            (rhs[rhs_spec[2 + i]], params["rhs_dilation"][i]),
            low,
        )
    return _multiply_add(eqn) * pairs


def _hits(size: int, dilation: int, a: tuple[int, int], b: tuple[int, int], low: int) -> int:
    """How many pairs of `i < a[0]` and `j < b[0]` hit an element of a dilated input of
    `size` elements, at `i * a[1] + j * b[1] - low`."""
    # One of the two is the kernel, the other the output: few positions of the first are
    # stepped through, those of the second are counted in closed form.
    (few, stride), (many, step) = sorted([a, b])
    divisor = math.gcd(step, dilation)
    period = dilation // divisor
    inverse = pow(step // divisor, -1, period)
    hits = 0
    for i in range(few):
        offset = i * stride - low
        if offset % divisor:
            continue
        first = -offset // divisor * inverse % period
        least = max(0, -(offset // step))
        most = min(many - 1, ((size - 1) * dilation - offset) // step)
        if least <= most:
            hits += (most - first) // period - (least - 1 - first) // period
    return hits


def _symmetric_product(eqn: JaxprEqn) -> int:
    n = _shape(eqn.outvars[0])[-1]
    return _multiply_add(eqn) * _size(eqn.invars[0]) * (n + 1) // 2


#
# Dense linear algebra, to leading order
#


_Shape = tuple[int, ...]


def _shrinking(shape: _Shape, steps: int) -> int:
    """The sum of `(m - j) * (n - j)` over `j < steps`: the work on an `m` by `n` matrix
    of which each step finishes one row and one column."""
    (m, n), k = shape, steps
    return k * m * n - (m + n) * (k * (k - 1) // 2) + (k - 1) * k * (2 * k - 1) // 6


def _qr(params: dict[str, Any], a: _Shape) -> int:
    k = min(a)
    q = (a[0], a[0] if params["full_matrices"] else k)
    return 4 * (_shrinking(a, k) + _shrinking(q, k))


def _ormqr(params: dict[str, Any], a: _Shape, taus: _Shape, c: _Shape) -> int:
    (m, n), k = c if params["left"] else c[::-1], taus[-1]
    return 4 * n * (k * m - k * (k - 1) // 2)


# Of the parameters of the equation, and the last two dimensions of each operand.
_DENSE: dict[str, Callable[..., int]] = {
    "cholesky": lambda _, a: _shrinking(a, min(a)),
    "cholesky_update": lambda _, r, w: 3 * r[0] * w[0],
    "geqp3": lambda _, a, pivots: 4 * _shrinking(a, min(a)),
    "geqrf": lambda _, a: 4 * _shrinking(a, min(a)),
    "hessenberg": lambda _, a: 10 * _shrinking(a, min(a)),
    "householder_product": lambda _, a, taus: 4 * _shrinking(a, taus[-1]),
    "lu": lambda _, a: 2 * _shrinking(a, min(a)),
    "ormqr": _ormqr,
    "qr": _qr,
    "triangular_solve": lambda _, a, b: a[0] * b[0] * b[1],
    "tridiagonal": lambda _, a: 4 * _shrinking(a, min(a)),
}


def _dense(eqn: JaxprEqn) -> int:
    shapes = [_shape(var) for var in eqn.invars]
    flops = _DENSE[eqn.primitive.name](eqn.params, *(s[-2:] for s in shapes))
    batch = math.prod(shapes[0][:-2])
    return batch * flops * (4 if _any(eqn, jnp.complexfloating) else 1)


def _flash(products: int) -> Rule:
    """The flash kernel of cuDNN, by the products that attention written out takes. That it skips what a causal mask hides, and
    computes scores again on the way back, is not counted, so that one plan serves every backend."""

    def rule(eqn: JaxprEqn) -> int:
        layout = eqn.params["layout"]
        heads_first = int(getattr(layout, "value", layout)) == 1
        keys = _shape(eqn.invars[1])[2 if heads_first else 1]
        return products * 2 * _size(eqn.invars[0]) * keys

    return rule


CONTRACTIONS: dict[str, Rule] = {
    **dict.fromkeys(["dot_general", "ragged_dot_general", "scaled_dot"], _dot),
    "conv_general_dilated": _conv,
    **dict.fromkeys(["dot_product_attention_fwd", "dot_product_attention_fwd_wrapper"], _flash(2)),
    **dict.fromkeys(["dot_product_attention_bwd", "dot_product_attention_bwd_wrapper"], _flash(4)),
    "symmetric_product": _symmetric_product,
}

ELEMENTWISE: dict[str, Rule] = {
    **dict.fromkeys((_MOVEMENT + _RANDOM + _HOST + _EQUINOX).split(), _zero),
    **dict.fromkeys(_ELEMENTWISE.split(), _per_output(1)),
    **dict.fromkeys(["clamp", "one_minus_square"], _per_output(2)),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(_COLLECTIVES.split(), _collective),
    **dict.fromkeys(_SCATTERS.split(), _per_input(2)),
    "addupdate": _per_input(1),
    **dict.fromkeys("cummax cummin cumprod cumsum".split(), _cumulative(1)),
    # max(a, b) + log1p(exp(-abs(a - b)))
    "cumlogsumexp": _cumulative(7),
    **dict.fromkeys("sort top_k approx_top_k".split(), _sort),
    **dict.fromkeys("reduce_window_max reduce_window_min reduce_window_sum".split(), _reduce_window),
    "select_and_gather_add": _reduce_window,
    "select_and_scatter_add": _select_and_scatter_add,
    "integer_pow": _integer_pow,
    "polynomial": _polynomial,
    "fft": _fft,
    **dict.fromkeys(_DENSE, _dense),
    "tridiagonal_solve": lambda eqn: 8 * _size(eqn.invars[-1]),
}


# Primitives that apply a jaxpr of scalars many times: its name, and how many.
def _scatter(eqn: JaxprEqn) -> dict[str, int]:
    return {"update_jaxpr": _size(eqn.invars[2])}


def _select_and_scatter(eqn: JaxprEqn) -> dict[str, int]:
    source = _size(eqn.invars[1])
    return {"select_jaxpr": source * (_window(eqn) - 1), "scatter_jaxpr": source}


COMBINERS: dict[str, Callable[[JaxprEqn], dict[str, int]]] = {
    "reduce": lambda eqn: {"jaxpr": _reduced(eqn)},
    "reduce_window": lambda eqn: {"jaxpr": _size(eqn.outvars[0]) * (_window(eqn) - 1)},
    "scatter": _scatter,
    "select_and_scatter": _select_and_scatter,
}
