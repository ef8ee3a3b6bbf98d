"""A vision transformer whose depth structure is a signature."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._loop import Loop, Rounds
from .._signature import Signature
from ..gradient import AbstractStorage
from ..nn import Linear, patches, sincos
from ..nn._linear import Embedding, normal
from ..nn._patches import grid_of
from ..nn._transformer import Kind
from ._encoder import check_shape, Encoder, Pool


Images = Float[Array, "batch rows columns channels"]
Scalar = Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The shape of a [`rinsx.models.ViT`][], apart from the order of its blocks.

    !!! example

        ```python
        import dataclasses
        import rinsx as rx

        config = dataclasses.replace(rx.models.vit_presets["B/16"], size=256, classes=1000)
        config.grid  # (16, 16)
        ```

    **Attributes:**

    - `size`: of an image, in pixels: a number, or height and width; multiples of `patch`.
    - `patch`: the size of a patch, in pixels.
    - `width`: the size of the state, a multiple of `heads`.
    - `layers`: how many layers there are in all blocks together, each counted once.
    - `heads`: of the attention.
    - `hidden`: the size inside an MLP; by default `4 * width`.
    - `mlp`: a kind of [`rinsx.nn.MLP`][].
    - `positions`: `"learned"`, or `"sincos"`, which are fixed.
    - `pool`: how one vector is made of all positions: `"map"` by attention, `"mean"`, or `"first"`, the state of a class token that
        is put before the patches.
    - `classes`: how many logits the head makes; `None` is no head.
    - `channels`: of an image.
    - `epsilon`: of the norms.
    - `dtype`: what the layers compute in, `"float32"` or `"bfloat16"`; weights, norms, pooled vectors and logits are float32.
    """

    size: int | tuple[int, int]
    patch: int
    width: int
    layers: int
    heads: int
    hidden: int | None = None
    mlp: Kind = "gelu"
    positions: Literal["learned", "sincos"] = "learned"
    pool: Pool = "map"
    classes: int | None = None
    channels: int = 3
    epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        check_shape(self, "patch", "channels", "classes")
        if self.positions not in ("learned", "sincos"):
            raise ValueError(f"`positions` must be 'learned' or 'sincos'; got {self.positions!r}.")
        if self.pool == "last":
            raise ValueError("the last patch of an image is no summary of it: `pool` must be 'map', 'mean' or 'first'.")
        if isinstance(self.size, int):
            object.__setattr__(self, "size", (self.size, self.size))
        _ = self.grid

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.size  # pyright: ignore[reportGeneralTypeIssues]
        return grid_of((height, width), self.patch)


class ViT(eqx.Module):
    """A pre-norm transformer over the patches of images: embedding, layers in the order of a signature, norm, pool, head.

    As with [`rinsx.models.DecoderLM`][], each block of the signature is a [`rinsx.nn.Stack`][] of layers, and the initial weights of
    layer `i` depend on the key and on `i` alone.

    !!! example

        ```python
        import dataclasses
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        config = dataclasses.replace(rx.models.vit_presets["nano"], classes=10)
        model = rx.models.ViT(config, "A^r B", r=3, key=jr.key(0))
        images = jnp.zeros((2, 32, 32, 3))
        model(images).shape  # (2, 10)
        shallow = rx.with_rounds(model, r=1)(images)
        ```

    ??? cite "Reference"

        Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929.
    """

    patches: Linear
    """What maps a flattened patch, its rows, columns and channels in this order, to a state."""
    positions: Embedding | None
    """One for each patch, after that of the class token if there is one; `None` where they are fixed."""
    token: Float[Array, " width"] | None
    """The class token."""
    encoder: Encoder
    head: Linear | None
    config: ViTConfig = eqx.field(static=True)

    def __init__(
        self,
        config: ViTConfig,
        signature: str | Signature = "A B",
        *,
        split: Sequence[int] | None = None,
        gradient: AbstractStorage | None = None,
        unroll: bool | None = None,
        key: PRNGKeyArray,
        **loops: Loop | Rounds,
    ):
        """**Arguments:**

        - `config`: the shape, such as one of [`rinsx.models.vit_presets`][].
        - `signature`: the order in which blocks are visited; see [`rinsx.Signature`][].
        - `split`: how many layers each block has, in the order of `Signature.blocks`; by default equal shares.
        - `gradient`, `unroll`: of each [`rinsx.nn.Stack`][]: what is stored of a layer, and whether its layers are unrolled.
        - `key`: for the weights.
        - `loops`: for each named exponent, a number of rounds or a [`rinsx.Loop`][] with adapter, injection, start and gradient.

        **Raises:**

        `ValueError` where `split` does not add up to `config.layers`, or the layers cannot be shared equally.
        """
        width = config.width
        key_patches, key_positions, key_token, key_encoder, key_head = jr.split(key, 5)
        self.patches = Linear(config.patch**2 * config.channels, width, bias=True, key=key_patches)
        self.token = normal(key_token, (width,), width**-0.5) if config.pool == "first" else None
        number = config.grid[0] * config.grid[1] + (self.token is not None)
        self.positions = Embedding(number, width, key=key_positions) if config.positions == "learned" else None
        self.encoder = Encoder(
            config, signature, split=split, gradient=gradient, unroll=unroll, key=key_encoder, loops=loops
        )
        self.head = None if config.classes is None else Linear(width, config.classes, bias=True, key=key_head)
        self.config = config

    def __call__(self, images: Images, *, key: PRNGKeyArray | None = None) -> Float[Array, "batch size"]:
        """**Arguments:**

        - `images`: normalised pixels, of any size that the patch divides. Learned positions are resized to its grid, bilinearly.
        - `key`: for starts and blocks that draw random numbers.

        **Returns:**

        Logits `[batch, classes]`, or where there is no head the pooled states `[batch, width]`; in float32.
        """
        pooled = self.encoder(self._embed(images), key)
        with jax.named_scope("head"):
            return pooled if self.head is None else self.head(pooled)

    def hidden(self, images: Images, *, key: PRNGKeyArray | None = None) -> Float[Array, "batch n width"]:
        """The normalised states of all patches, after that of the class token if there is one, before they are pooled."""
        return self.encoder.hidden(self._embed(images), key)

    def loss(self, batch: Mapping[str, Array], key: PRNGKeyArray | None = None) -> tuple[Scalar, Scalar]:
        """The loss of a classifier, as [`rinsx.train`][] wants it: `ViT.loss` is a function of a model, a batch and a key.

        **Arguments:**

        - `batch`: `images`, `labels` of shape `[batch]`, and if there are any `weights` of that shape. Values are not checked: a
            label that is no class makes the loss NaN, unless its weight is 0.
        - `key`: as in a call.

        **Returns:**

        The weighted sum of the negative log-likelihoods of the labels, in nats, and the sum of the weights.
        """
        if self.head is None:
            raise ValueError("a ViT without a head has no classes to learn: set `classes` in its config.")
        logits = self(batch["images"], key=key)
        labels = batch["labels"]
        weights = batch["weights"] if "weights" in batch else jnp.ones(labels.shape)
        known = (labels >= 0) & (labels < logits.shape[1])
        right = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(known, labels, 0)[:, None], axis=1)[:, 0]
        lost = jnp.where(weights == 0, 0.0, jnp.where(known, -weights * right, jnp.nan))
        return jnp.sum(lost), jnp.sum(weights)

    def _embed(self, images: Images) -> Float[Array, "batch n width"]:
        config = self.config
        _, height, width, channels = images.shape
        grid = grid_of((height, width), config.patch)
        if channels != config.channels:
            raise ValueError(f"images must have {config.channels} channels on their last axis; got {images.shape}.")
        with jax.named_scope("embedding"):
            cut = patches(images.astype(config.dtype), config.patch)
            state = self.patches(cut)
            first, at = self._positions(grid)
            state = state + at.astype(state.dtype)
            if self.token is not None:
                token = (self.token + first).astype(state.dtype)
                state = jnp.concatenate([jnp.broadcast_to(token, (len(state), 1, config.width)), state], axis=1)
            return state

    def _positions(self, grid: tuple[int, int]):
        """Of the class token, and of the patches."""
        if self.positions is None:
            return 0.0, jnp.asarray(sincos(grid, self.config.width))
        weight = self.positions.weight
        first, at = (0.0, weight) if self.token is None else (weight[0], weight[1:])
        if grid != self.config.grid:
            at = at.reshape(*self.config.grid, -1)
            at = jax.image.resize(at, (*grid, at.shape[-1]), "bilinear", antialias=False)
            at = at.reshape(-1, at.shape[-1])
        return first, at
