"""The loss of a classifier over many tokens, without all of its logits in memory at once."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped


# Of logits at once. Smaller pieces make the matrix products of an accelerator inefficient.
_PIECE = 2**28

Scalar = Float[Array, ""]


def cross_entropy(
    hidden: Float[Array, "batch t width"],
    head: Float[Array, "width tokens"],
    targets: Int[Array, "batch t"],
    weights: Shaped[Array, "batch t"],
    *,
    piece: int = _PIECE,
) -> tuple[Scalar, Scalar]:
    """The weighted sum of `-log softmax(hidden @ head)[target]`, in nats.

    Long batches are cut into pieces along `t`. Their gradient is made in the forward pass, piece by piece, so that the head is
    applied once, and only one piece of logits stands in memory. Such a loss can be differentiated in reverse mode, once.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        hidden, head = jnp.zeros((1, 6, 8)), jnp.zeros((8, 257))
        total, weight = rx.nn.cross_entropy(hidden, head, jnp.zeros((1, 6), int), jnp.ones((1, 6)))
        total / weight  # log(257)
        ```

    **Arguments:**

    - `hidden`: what the head is applied to, of any floating dtype; products are taken in it and added up in float32.
    - `head`: the matrix that makes logits.
    - `targets`: the right tokens, in range: this is not checked.
    - `weights`: how much each counts, in float32 or what becomes it, such as a mask; 0 leaves it out.
    - `piece`: the most bytes of float32 logits at once.

    **Returns:**

    The sum, and the sum of the weights: both float32 scalars.
    """
    if piece < 1:
        raise ValueError(f"`piece` is a number of bytes, at least 1; got {piece}.")
    batch, t, _ = hidden.shape
    weights = jnp.asarray(weights, jnp.float32)
    length = max(min(t, piece // (4 * batch * head.shape[1])), 1)
    if length == t:
        total = _loss(hidden, head, targets, weights)
    else:
        total = _in_pieces(hidden, head, targets, weights, length)
    return total, jnp.sum(weights)


def logits_of(
    hidden: Float[Array, "batch t width"], head: Float[Array, "width tokens"]
) -> Float[Array, "batch t tokens"]:
    """The head applied, in the dtype of what it is applied to and added up in float32."""
    return jnp.einsum("btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _loss(hidden, head, targets, weights) -> Scalar:
    return jnp.sum(weights * _nats(hidden, head, targets))


def _nats(hidden, head, targets):
    logits = logits_of(hidden, head)
    right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - right


@jax.custom_vjp
def _pieces(hidden, head, targets, weights):
    """Arrays cut into pieces, stacked along a new first axis."""
    add = lambda total, x: (total + _loss(x[0], head, x[1], x[2]), None)
    return lax.scan(add, jnp.float32(0), (hidden, targets, weights))[0]


def _pieces_fwd(hidden, head, targets, weights):
    def step(carry, x):
        total, of_head = carry
        value, pull = jax.vjp(lambda hidden, head, weights: _loss(hidden, head, x[1], weights), x[0], head, x[2])
        of_hidden, more, of_weights = pull(jnp.float32(1))
        return (total + value, of_head + more), (of_hidden, of_weights)

    zeros = (jnp.float32(0), jnp.zeros_like(head))
    (total, of_head), (of_hidden, of_weights) = lax.scan(step, zeros, (hidden, targets, weights))
    return total, (of_hidden, of_head, of_weights)


def _pieces_bwd(residuals, grad):
    of_hidden, of_head, of_weights = residuals
    scaled = lambda x: (x * grad).astype(x.dtype)
    return scaled(of_hidden), scaled(of_head), None, scaled(of_weights)


_pieces.defvjp(_pieces_fwd, _pieces_bwd)


def _in_pieces(hidden, head, targets, weights, length) -> Scalar:
    t = hidden.shape[1]
    number = -(-t // length)

    def cut(x):
        # Positions of weight zero fill the last piece. The batch stays whole, since devices share it out.
        x = jnp.pad(x, [(0, 0), (0, number * length - t)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], number, length, *x.shape[2:]).swapaxes(0, 1)

    return _pieces(cut(hidden), head, cut(targets), cut(weights))
