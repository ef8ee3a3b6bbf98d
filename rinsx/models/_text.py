"""An encoder of short texts whose depth structure is a signature."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._loop import Loop, Rounds
from .._signature import Signature
from ..gradient import AbstractStorage
from ..nn import Embedding, Linear
from ..nn._transformer import Kind
from ._encoder import check_shape, Encoder, Pool


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The shape of a [`rinsx.models.TextEncoder`][], apart from the order of its blocks.

    !!! example

        ```python
        import dataclasses
        import rinsx as rx

        config = dataclasses.replace(rx.models.siglip_presets["nano"].text, context=48)
        ```

    **Attributes:**

    - `vocab_size`: how many tokens there are.
    - `context`: how many tokens a text has; shorter ones are padded, and attention sees the padding, as in SigLIP.
    - `width`, `layers`, `heads`, `hidden`, `mlp`, `epsilon`, `dtype`: as in [`rinsx.models.ViTConfig`][].
    - `outputs`: the size of the vector that the head makes; by default `width`.
    - `pool`: how one vector is made of all positions: `"last"` (SigLIP's), `"first"`, `"mean"`, or `"map"` by attention.
    """

    vocab_size: int
    context: int
    width: int
    layers: int
    heads: int
    hidden: int | None = None
    outputs: int | None = None
    mlp: Kind = "gelu"
    pool: Pool = "last"
    epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        check_shape(self, "vocab_size", "context", "outputs")
        if self.outputs is None:
            object.__setattr__(self, "outputs", self.width)


class TextEncoder(eqx.Module):
    """A pre-norm transformer over tokens that all see each other: the text tower of [`rinsx.models.SigLIP`][].

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        config = rx.models.siglip_presets["nano"].text
        model = rx.models.TextEncoder(config, "A^s B", s=2, key=jr.key(0))
        model(jnp.zeros((3, config.context), int)).shape  # (3, 64)
        ```
    """

    tokens: Embedding
    positions: Embedding
    encoder: Encoder
    head: Linear
    config: TextConfig = eqx.field(static=True)

    def __init__(
        self,
        config: TextConfig,
        signature: str | Signature = "A B",
        *,
        split: Sequence[int] | None = None,
        gradient: AbstractStorage | None = None,
        unroll: bool | None = None,
        key: PRNGKeyArray,
        **loops: Loop | Rounds,
    ):
        """**Arguments:**

        - `config`: the shape.
        - `signature`, `split`, `gradient`, `unroll`, `key`, `loops`: as in [`rinsx.models.ViT`][].
        """
        key_tokens, key_positions, key_encoder, key_head = jr.split(key, 4)
        outputs: int = config.outputs  # pyright: ignore[reportAssignmentType]
        self.tokens = Embedding(config.vocab_size, config.width, key=key_tokens)
        self.positions = Embedding(config.context, config.width, key=key_positions)
        self.encoder = Encoder(
            config, signature, split=split, gradient=gradient, unroll=unroll, key=key_encoder, loops=loops
        )
        self.head = Linear(config.width, outputs, bias=True, key=key_head)
        self.config = config

    def __call__(
        self, tokens: Int[Array, "batch context"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch size"]:
        """**Arguments:**

        - `tokens`: integers below `vocab_size`, `config.context` a row: this is not checked of their values.
        - `key`: for starts and blocks that draw random numbers.

        **Returns:**

        One vector for each text, in float32.
        """
        if tokens.shape[1] != self.config.context:
            raise ValueError(
                f"texts must be padded or cut to {self.config.context} tokens; got tokens of shape {tokens.shape}."
            )
        with jax.named_scope("embedding"):
            state = self.tokens(tokens) + self.positions.weight
        pooled = self.encoder(state, key)
        with jax.named_scope("head"):
            return self.head(pooled)
