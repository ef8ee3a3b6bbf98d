"""Linear maps, embeddings and norms that act on the last axis of arrays of any rank."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._check import at_least


class Linear(eqx.Module):
    """Multiplies the last axis by a matrix, with all other axes flattened into one: `x @ weight`, and adds a bias if it has one.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        linear = rx.nn.Linear(8, 16, key=jr.key(0))
        linear(jnp.ones((2, 5, 8))).shape  # (2, 5, 16)
        ```
    """

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"] | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, scale: float = 1.0, key: PRNGKeyArray):
        """**Arguments:**

        - `inputs`, `outputs`: sizes of the last axis before and after.
        - `bias`: whether a vector is added, of zeros at first.
        - `scale`: the weights are drawn from a normal distribution of standard deviation `scale / sqrt(inputs)`, cut off at
            three deviations.
        - `key`: for the weights.
        """
        at_least(1, inputs=inputs, outputs=outputs)
        self.weight = normal(key, (inputs, outputs), scale * inputs**-0.5)
        self.bias = jnp.zeros(outputs, jnp.float32) if bias else None

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """The product and the bias, in the dtype of `x`."""
        # One matrix product over all rows: on CPU XLA runs a product with more axes slower.
        flat = x.reshape(-1, x.shape[-1]) @ self.weight.astype(x.dtype)
        if self.bias is not None:
            flat = flat + self.bias.astype(x.dtype)
        return flat.reshape(*x.shape[:-1], -1)


class Embedding(eqx.Module):
    """A vector for each token.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        embedding = rx.nn.Embedding(257, 8, key=jr.key(0))
        embedding(jnp.array([[0, 5, 256]])).shape  # (1, 3, 8)
        ```
    """

    weight: Float[Array, "tokens width"]

    def __init__(self, tokens: int, width: int, *, key: PRNGKeyArray):
        """**Arguments:**

        - `tokens`: how many tokens there are.
        - `width`: the size of a vector.
        - `key`: for the weights, normal of standard deviation `1 / sqrt(width)`, so that logits of a tied head start at unit size.
        """
        at_least(1, tokens=tokens, width=width)
        self.weight = normal(key, (tokens, width), width**-0.5)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        """The vectors of `tokens`, whose numbers must be in range: this is not checked."""
        return jnp.take(self.weight, tokens, axis=0)


class RMSNorm(eqx.Module):
    """Divides by the root of the mean square along the last axis, computed in float32, and scales.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        rx.nn.RMSNorm(8)(3 * jnp.ones((2, 8)))  # ones
        ```

    ??? cite "Reference"

        Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
    """

    scale: Float[Array, " width"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, width: int, *, epsilon: float = 1e-6):
        """**Arguments:**

        - `width`: the size of the last axis.
        - `epsilon`: added to the mean square.
        """
        at_least(1, width=width)
        self.scale = jnp.ones(width, jnp.float32)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """The normalised array, in the dtype of `x`."""
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale).astype(x.dtype)


class LayerNorm(eqx.Module):
    """Takes away the mean along the last axis, divides by the standard deviation, scales and shifts, all in float32.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        rx.nn.LayerNorm(2)(jnp.array([[1.0, 3.0]]))  # [[-1, 1]]
        ```

    ??? cite "Reference"

        Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450.
    """

    scale: Float[Array, " width"]
    bias: Float[Array, " width"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, width: int, *, epsilon: float = 1e-6):
        """**Arguments:**

        - `width`: the size of the last axis.
        - `epsilon`: added to the variance.
        """
        at_least(1, width=width)
        self.scale = jnp.ones(width, jnp.float32)
        self.bias = jnp.zeros(width, jnp.float32)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """The normalised array, in the dtype of `x`."""
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale + self.bias).astype(x.dtype)


def normal(key: PRNGKeyArray, shape: tuple[int, ...], deviation: float) -> Float[Array, "..."]:
    """Weights of a standard deviation, none beyond three of them."""
    # Cutting a normal distribution at three deviations leaves 0.9866 of its deviation.
    return jr.truncated_normal(key, -3.0, 3.0, shape, jnp.float32) * (deviation / 0.98658)
