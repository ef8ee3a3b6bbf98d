"""Losses over all pairs of images and texts, without the matrix of all pairs in memory."""

import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float

from ._cross_entropy import Scalar


# Of logits at once. Smaller pieces make the matrix products of an accelerator inefficient.
_PIECE = 2**28
# Takes a pair out of a logarithm of sums. Infinity would make the gradient of a piece that has no other pairs NaN.
_NEVER = -1e30


def sigmoid_loss(
    images: Float[Array, "rows d"],
    texts: Float[Array, "texts d"],
    scale: Scalar | float,
    bias: Scalar | float,
    *,
    weights: Float[Array, " weights"] | None = None,
    mesh: Mesh | None = None,
    piece: int = _PIECE,
) -> tuple[Scalar, Scalar]:
    """SigLIP's loss of all pairs, each judged on its own ([Zhai et al.](https://arxiv.org/abs/2303.15343)):

        total = sum over i, j of w[i] w[j] log(1 + exp(-z[i, j] (scale x[i] . y[j] + bias)))

    with `z[i, j] = 1` where image `x[i]` and text `y[j]` are of one row, and -1 elsewhere. Where all weights are 1, it is the loss
    of the paper once it is divided by their sum.

    Texts are taken a piece at a time, and the gradient is made in the same pass, so that the matrix of all pairs never
    stands in memory. With `mesh`, each device keeps its images and hands its texts around the ring of all devices; the gradient of
    a block of texts travels with it, and is home after one turn. Nothing is gathered.

    Products are taken in the dtype of the embeddings and added up in float32. In float16 the smallest slopes of pairs vanish;
    bfloat16 keeps them. Such a loss can be differentiated in reverse mode, once.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        images, texts = jnp.eye(4), jnp.eye(4)
        total, weight = rx.nn.sigmoid_loss(images, texts, 10.0, -10.0)
        total / weight  # log(2), and a little for the three texts of others
        ```

    **Arguments:**

    - `images`, `texts`: row by row what belongs together, of any floating dtype. They are taken as they are: where the dot
        product is to be a cosine, make them unit vectors first.
    - `scale`: the factor on the dot product: the exponential of a learned temperature.
    - `bias`: what is added to it.
    - `weights`: how much each row counts, at least 0; by default 1. A row of weight 0 has no influence, whatever it holds.
        Weights are not differentiated (`jax.lax.stop_gradient`).
    - `mesh`: rows are shared out over all of its axes; see [`rinsx.train.mesh`][]. By default the arrays are taken as one.
    - `piece`: the most bytes of float32 logits at once, on each device; but always those of one text.

    **Returns:**

    The sum, and the sum of the weights: both float32 scalars.

    **Raises:**

    `ValueError` where there are not as many texts or weights as images, and where the devices do not divide the rows.
    `TypeError` where `mesh` is no mesh.
    """
    images, texts, weights = _prepare(images, texts, weights, piece)
    mesh = _shared_by(mesh, images.shape[0])
    weight, scale, bias = jnp.sum(weights), jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        # Axes of this type move nothing by themselves.
        shared, whole = (NamedSharding(mesh, spec) for spec in (P(mesh.axis_names), P()))
        images, texts, weights = jax.reshard((images, texts, weights), shared)
        scale, bias = jax.reshard((scale, bias), whole)
    return _sigmoid(mesh, piece, images.dtype, images, texts, weights, scale, bias), weight


def softmax_loss(
    images: Float[Array, "rows d"],
    texts: Float[Array, "texts d"],
    scale: Scalar | float,
    *,
    weights: Float[Array, " weights"] | None = None,
    mesh: Mesh | None = None,
    piece: int = _PIECE,
) -> tuple[Scalar, Scalar]:
    """CLIP's loss ([Radford et al.](https://arxiv.org/abs/2103.00020)): the mean of two cross-entropies, in nats, that of the
    right text among all texts and that of the right image among all images. The logits are `scale * images @ texts.T`.

    Texts are taken a piece at a time, and logits are made again for the gradient, so that the matrix of all pairs never
    stands in memory; one float32 for each image and piece does. With `mesh`, rows are kept shared out over its devices, and XLA
    decides what is moved between them, inside `jax.jit`.

    Products are taken in the dtype of the embeddings and added up in float32. Embeddings in float64 are rounded to float32 first.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        images, texts = jnp.eye(4), jnp.eye(4)
        total, weight = rx.nn.softmax_loss(images, texts, 0.0)
        total / weight  # log(4)
        ```

    **Arguments:**

    - `images`, `texts`, `scale`: as in [`rinsx.nn.sigmoid_loss`][].
    - `weights`: how much each row counts, at least 0; by default 1. A row of weight 0 neither counts nor is an alternative for
        others; any other is one alternative, whatever its weight. Weights are not differentiated (`jax.lax.stop_gradient`).
    - `mesh`: rows are shared out over all of its axes, which are of the type Auto, such as those of [`rinsx.train.mesh`][]. By
        default the arrays stay as they are.
    - `piece`: the most bytes of float32 logits at once; but always those of one text. Under a mesh, on all devices together.

    **Returns:**

    The sum over rows, and the sum of the weights: both float32 scalars.

    **Raises:**

    `ValueError` where there are not as many texts or weights as images, where the devices do not divide the rows, and where an axis
    of the mesh is not of the type Auto. `TypeError` where `mesh` is no mesh.
    """
    images, texts, weights = _prepare(images, texts, weights, piece)
    mesh = _shared_by(mesh, images.shape[0])
    if mesh is not None:
        if any(kind != AxisType.Auto for kind in mesh.axis_types):
            raise ValueError(f"the axes of the mesh must be of the type Auto; got {mesh.axis_types}.")
        shared = NamedSharding(mesh, P(mesh.axis_names))

        def keep(x) -> Array:
            return lax.with_sharding_constraint(x, shared)

        images, texts, weights = keep(images), keep(texts), keep(weights)
    n, dtype = images.shape[0], images.dtype
    scale = jnp.asarray(scale, jnp.float32)
    number, length = _pieces(n, n, piece)
    # In float32 so that the gradients of pieces are added up in it.
    images, texts = images.astype(jnp.float32), texts.astype(jnp.float32)
    counts = weights > 0

    def cut(x):
        # Each piece takes its rows from all over the batch, so that devices which share it out have equal parts.
        x = jnp.pad(x, [(0, number * length - n)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(length, number, *x.shape[1:]).swapaxes(0, 1)

    def step(_, x):
        texts, texts_count = x
        logits = scale * _dots(dtype, images, texts)  # pyright: ignore[reportOperatorIssue]
        of_images = jax.nn.logsumexp(jnp.where(texts_count, logits, _NEVER), axis=1)
        of_texts = jax.nn.logsumexp(jnp.where(counts[:, None], logits, _NEVER), axis=0)
        return None, (of_images, of_texts)

    step = jax.checkpoint(step, prevent_cse=False)
    _, (of_images, of_texts) = lax.scan(step, None, (cut(texts), cut(counts)))
    of_images = jax.nn.logsumexp(of_images, axis=0)
    of_texts = of_texts.T.reshape(-1)[:n]
    right = scale * jnp.sum(images * texts, axis=1)
    return jnp.sum(weights * ((of_images + of_texts) / 2 - right)), jnp.sum(weights)


def _prepare(images, texts, weights, piece) -> tuple[Array, Array, Array]:
    """Checked, of one dtype, and without what is in rows of weight 0."""
    if piece < 1:
        raise ValueError(f"`piece` is a number of bytes, at least 1; got {piece}.")
    if images.ndim != 2 or images.shape != texts.shape or images.shape[0] == 0:
        raise ValueError(f"images and texts must be of one shape, [rows, d]; got {images.shape} and {texts.shape}.")
    dtype = jnp.promote_types(images.dtype, texts.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"images and texts must be of a floating dtype; got {images.dtype} and {texts.dtype}.")
    weights = jnp.ones(images.shape[0], jnp.float32) if weights is None else weights
    if weights.shape != images.shape[:1]:
        raise ValueError(f"there must be one weight a row, {images.shape[0]}; got the shape {weights.shape}.")
    weights = lax.stop_gradient(jnp.asarray(weights, jnp.float32))
    # Zero times NaN would be NaN.
    clean = lambda x: jnp.where((weights != 0)[:, None], x, 0).astype(dtype)
    return clean(images), clean(texts), weights


def _shared_by(mesh: Any, rows: int) -> Mesh | None:
    """The mesh, checked; `None` where there is nothing to share out."""
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        raise TypeError(f"`mesh` must be a jax.sharding.Mesh, such as rx.train.mesh(), or None; got {mesh!r}.")
    if rows % mesh.size != 0:
        raise ValueError(f"the rows must be a multiple of the {mesh.size} devices of the mesh; got {rows} rows.")
    return None if mesh.size == 1 else mesh


def _pieces(rows: int, texts: int, piece: int) -> tuple[int, int]:
    """How many pieces of texts, and how many texts in each."""
    number = math.ceil(texts / max(piece // (4 * rows), 1))
    return number, math.ceil(texts / number)


#
# All pairs, each judged on its own
#


@ft.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sigmoid(mesh, piece, dtype, images, texts, weights, scale, bias) -> Scalar:
    return _all_pairs(mesh, piece, False, images, texts, weights, scale, bias)[0]


def _sigmoid_fwd(mesh, piece, dtype, images, texts, weights, scale, bias):
    total, *slopes = _all_pairs(mesh, piece, True, images, texts, weights, scale, bias)
    return total, slopes


def _sigmoid_bwd(mesh, piece, dtype, slopes, grad):
    of_scale, of_bias, of_images, of_texts = (grad * slope for slope in slopes)
    return of_images.astype(dtype), of_texts.astype(dtype), None, of_scale, of_bias


_sigmoid.defvjp(_sigmoid_fwd, _sigmoid_bwd)


def _all_pairs(mesh, piece, slopes, images, texts, weights, scale, bias):
    """The sum and, with `slopes`, its derivatives by scale, bias, images and texts, in float32."""
    if mesh is None:
        return _block(piece, slopes, images, weights, texts, weights, scale, bias, 0)
    axes = mesh.axis_names
    ring = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]

    def on_device(images, texts, weights, scale, bias):
        me, rows = lax.axis_index(axes), images.shape[0]

        def step(carry, turn):
            sums, of_texts, texts, text_weights = carry
            # What is here after so many turns came from the device that is as many places back.
            apart = ((me - turn) % mesh.size - me) * rows
            found = _block(piece, slopes, images, weights, texts, text_weights, scale, bias, apart)
            *more, of_these = found if slopes else (*found, 0)
            sums = [x + y for x, y in zip(sums, more)]
            on = lax.ppermute((of_texts + of_these, texts, text_weights), axes, ring)
            return (sums, *on), None

        of_texts = jnp.zeros(texts.shape if slopes else (), jnp.float32)
        carry = (_zeros(images, slopes), of_texts, texts, weights)
        (sums, of_texts, *_), _ = lax.scan(step, carry, jnp.arange(mesh.size))
        sums[:3] = lax.psum(sums[:3], axes)
        return (*sums, of_texts) if slopes else tuple(sums)

    shared = P(axes)
    # It is differentiated as a whole, never from within: so what varies over devices need not be tracked.
    call = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(shared, shared, shared, P(), P()),
        out_specs=(P(), P(), P(), shared, shared) if slopes else (P(),),
        check_vma=False,
    )
    return call(images, texts, weights, scale, bias)


def _block(piece, slopes, images, weights, texts, text_weights, scale, bias, apart):
    """`_all_pairs` of some images and some texts, text `j` belonging to image `j + apart`."""
    number, length = _pieces(images.shape[0], texts.shape[0], piece)

    def cut(x):
        # Texts of weight zero fill the last piece.
        x = jnp.pad(x, [(0, number * length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(number, length, *x.shape[1:])

    def step(sums, x) -> tuple[list[Array], Any]:
        texts, text_weights, start = x
        dots = _product("id,jd->ij", images, texts)
        pairs = weights[:, None] * text_weights
        right = jnp.arange(images.shape[0])[:, None] == jnp.arange(length) + start
        sign = jnp.where(right, 1.0, -1.0)
        agree = sign * (scale * dots + bias)
        value = jnp.sum(pairs * jax.nn.softplus(-agree))
        if not slopes:
            return [sums[0] + value], None
        slope = -sign * pairs * jax.nn.sigmoid(-agree)
        pull = slope.astype(images.dtype)
        of_images = scale * _product("ij,jd->id", pull, texts)
        of_texts = scale * _product("ij,id->jd", pull, images)
        more = [value, jnp.sum(slope * dots), jnp.sum(slope), of_images]
        return [x + y for x, y in zip(sums, more)], of_texts

    starts = apart + length * jnp.arange(number)
    sums, of_texts = lax.scan(step, _zeros(images, slopes), (cut(texts), cut(text_weights), starts))
    return (*sums, of_texts.reshape(-1, images.shape[1])[: texts.shape[0]]) if slopes else tuple(sums)


def _zeros(images, slopes) -> list[Array]:
    """Of the sum and, with `slopes`, of its derivatives by scale, bias and images."""
    shapes = [(), (), (), images.shape] if slopes else [()]
    return [jnp.zeros(shape, jnp.float32) for shape in shapes]


#
# Products
#


def _product(form: str, x, y) -> Array:
    return jnp.einsum(form, x, y, preferred_element_type=jnp.float32)


@ft.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dots(dtype, x, y) -> Array:
    """The dot products of float32 rows, in a dtype. JAX's own derivative multiplies in float32 what is of another dtype."""
    return _product("id,jd->ij", x.astype(dtype), y.astype(dtype))


def _dots_fwd(dtype, x, y):
    return _dots(dtype, x, y), (x, y)


def _dots_bwd(dtype, rows, slope):
    x, y = (row.astype(dtype) for row in rows)
    slope = slope.astype(dtype)
    return _product("ij,jd->id", slope, y), _product("ij,id->jd", slope, x)


_dots.defvjp(_dots_fwd, _dots_bwd)
