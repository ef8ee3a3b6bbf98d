"""Two towers, of images and of texts, that learn to agree."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from ..nn import sigmoid_loss, softmax_loss
from ._text import TextConfig
from ._vit import ViTConfig


Scalar = Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class SigLIPConfig:
    """The shapes of both towers of a [`rinsx.models.SigLIP`][].

    !!! example

        ```python
        import rinsx as rx

        config = rx.models.siglip_presets["B/16"]
        config.image.width, config.text.context  # (768, 64)
        ```

    **Attributes:**

    - `image`: a [`rinsx.models.ViTConfig`][], without classes.
    - `text`: a [`rinsx.models.TextConfig`][], whose `outputs` are as many as the width of the image tower.
    """

    image: ViTConfig
    text: TextConfig

    def __post_init__(self):
        size = self.image.width if self.image.classes is None else self.image.classes
        if size != self.text.outputs:
            raise ValueError(
                f"both towers must make vectors of one size; got {size} of images, {self.text.outputs} of texts."
            )


class SigLIP(eqx.Module):
    """Vectors of images and of texts in one space, and how alike each pair is.

    The towers are any callables, such as a [`rinsx.models.ViT`][] and a [`rinsx.models.TextEncoder`][]. Each has a signature,
    loops and adapters of its own. [`rinsx.with_rounds`][] sets loops of one name in both together, of different names apart.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        config = rx.models.siglip_presets["nano"]
        image = rx.models.ViT(config.image, "A^r B", r=rx.Loop(3, max=4), key=jr.key(0))
        text = rx.models.TextEncoder(config.text, "A^s B", s=1, key=jr.key(1))
        model = rx.models.SigLIP(image, text)

        images, tokens = jnp.zeros((2, 32, 32, 3)), jnp.zeros((5, config.text.context), int)
        model(images, tokens).shape  # (2, 5)
        shallow = rx.with_rounds(model, r=1)
        ```

    ??? cite "Reference"

        Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343.
    """

    image: Callable[..., Float[Array, "batch size"]]
    text: Callable[..., Float[Array, "batch size"]]
    log_scale: Scalar
    """The logarithm of what products of unit vectors are multiplied by. Training moves it."""
    bias: Scalar
    """What is added then."""

    def __init__(self, image: Callable, text: Callable, *, scale: float = 10.0, bias: float = -10.0):
        """**Arguments:**

        - `image`: `(images, key=) -> [batch, size]`.
        - `text`: `(tokens, key=) -> [batch, size]`.
        - `scale`, `bias`: where training begins; by default as published. A softmax loss has no use for the bias; CLIP begins it at
            a scale of `1 / 0.07`.
        """
        if not scale > 0:
            raise ValueError(f"`scale` must be positive; got {scale}.")
        self.image = image
        self.text = text
        self.log_scale = jnp.log(jnp.float32(scale))
        self.bias = jnp.float32(bias)

    def embed_images(self, images: Any, *, key: PRNGKeyArray | None = None) -> Float[Array, "batch size"]:
        """Unit vectors of images, in float32 (float64 where the tower makes that, under x64). `key` is for towers that draw
        random numbers."""
        with jax.named_scope("image"):
            return _unit(self.image(images) if key is None else self.image(images, key=jr.fold_in(key, 0)))

    def embed_texts(self, tokens: Any, *, key: PRNGKeyArray | None = None) -> Float[Array, "batch size"]:
        """Unit vectors of texts, in float32 (float64 where the tower makes that, under x64)."""
        with jax.named_scope("text"):
            return _unit(self.text(tokens) if key is None else self.text(tokens, key=jr.fold_in(key, 1)))

    def __call__(self, images: Any, tokens: Any, *, key: PRNGKeyArray | None = None) -> Float[Array, "images texts"]:
        """Logits: their sigmoid is the probability that an image and a text belong together."""
        x, y = self.embed_images(images, key=key), self.embed_texts(tokens, key=key)
        return x @ y.T * jnp.exp(self.log_scale) + self.bias

    def loss(
        self,
        batch: Mapping[str, Array],
        key: PRNGKeyArray | None = None,
        *,
        mesh: Mesh | None = None,
        softmax: bool = False,
    ) -> tuple[Scalar, Scalar]:
        """The loss of a batch of pairs, as [`rinsx.train`][] wants it: `SigLIP.loss` is a function of a model, a batch and a key.

        Every pair of the batch counts, so gradient accumulation changes it: each part has the negatives of that part only.

        **Arguments:**

        - `batch`: `images`, `tokens`, and if there are any `weights` of shape `[batch]`: a row of weight 0 is in no pair.
        - `key`: for towers that draw random numbers.
        - `mesh`: share the pairs out over its devices: `functools.partial(SigLIP.loss, mesh=mesh)`. The sigmoid loss passes the
            texts around them, see [`rinsx.nn.sigmoid_loss`][].
        - `softmax`: take the loss of CLIP instead, see [`rinsx.nn.softmax_loss`][].

        **Returns:**

        The sum, in nats, over all pairs of an image and a text (with `softmax`: over rows), and the sum of the weights.
        """
        x, y = self.embed_images(batch["images"], key=key), self.embed_texts(batch["tokens"], key=key)
        if x.shape != y.shape:
            raise ValueError(
                f"pairs need as many images as texts, and vectors of one size; got {x.shape} of images, {y.shape} of texts."
            )
        scale, weights = jnp.exp(self.log_scale), batch.get("weights")
        with jax.named_scope("loss"):
            if softmax:
                return softmax_loss(x, y, scale, weights=weights, mesh=mesh)
            return sigmoid_loss(x, y, scale, self.bias, weights=weights, mesh=mesh)


def _unit(x: Float[Array, "batch size"]) -> Float[Array, "batch size"]:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # A vector of zeros has no direction, and gets a gradient of zeros.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
