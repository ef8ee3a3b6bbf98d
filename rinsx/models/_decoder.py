"""A decoder-only language model whose depth structure is a signature."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._cache import Cache
from .._check import at_least
from .._converge import converge
from .._handle import Stream
from .._loop import Loop, Rounds
from .._make_cache import make
from .._recur import Recursion
from .._signature import Signature
from .._stack import Stack
from ..gradient import AbstractStorage
from ..nn import cross_entropy, Embedding, Linear, RMSNorm, Rotary, rotary, TransformerLayer
from ..nn._cross_entropy import logits_of
from ._body import check_dtype, computing_in, make_body


Tokens = Int[Array, "batch t"]
Scalar = Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a [`rinsx.models.DecoderLM`][], apart from the order of its blocks.

    !!! example

        ```python
        import dataclasses
        import rinsx as rx

        config = dataclasses.replace(rx.models.presets["nano"], width=64, heads=4)
        ```

    **Attributes:**

    - `vocab_size`: how many tokens there are.
    - `width`: the size of the state, a multiple of `heads`.
    - `layers`: how many layers there are in all blocks together, each counted once.
    - `heads`, `kv_heads`: heads of queries, and of keys and values (by default as many).
    - `hidden`: the size inside an MLP; by default `8/3 * width` for SwiGLU, rounded up to a multiple of 16, and `4 * width` for GELU.
    - `mlp`: `"swiglu"` or `"gelu"`.
    - `tied`: whether the head is the embedding, transposed.
    - `context`: the length of a training sequence, in tokens.
    - `rope_base`: of the rotary positions.
    - `dtype`: what the layers compute in, `"float32"` or `"bfloat16"`; weights, norms and logits are float32 always.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int | None = None
    hidden: int | None = None
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    tied: bool = True
    context: int = 1024
    rope_base: float = 10_000.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        names = ("vocab_size", "width", "layers", "heads", "context")
        at_least(1, **{name: getattr(self, name) for name in names})
        check_dtype(self.dtype)
        if self.hidden is None:
            hidden = 4 * self.width if self.mlp == "gelu" else -(-8 * self.width // 48) * 16
            object.__setattr__(self, "hidden", hidden)


class DecoderLM(eqx.Module):
    """A pre-norm transformer over tokens: embedding, layers in the order of a signature, norm, head.

    Layers have RMS norms, rotary positions, grouped-query attention, and a SwiGLU or GELU MLP. Each block of the signature is a
    [`rinsx.nn.Stack`][] of layers.

    The initial weights of layer `i` depend on the key and on `i` alone, so that models of one shape and different signatures
    start from the same weights.

    !!! example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        model = rx.models.DecoderLM(rx.models.presets["nano"], "A^r B", r=3, key=jr.key(0))
        tokens = jnp.zeros((1, 16), int)
        model(tokens).shape  # (1, 16, 257)
        shallow = rx.with_rounds(model, r=1)(tokens)
        ```
    """

    embedding: Embedding
    body: Recursion
    """The layers, as a block over states `[batch, t, width]`."""
    norm: RMSNorm
    head: Linear | None
    """`None` where the head is tied to the embedding."""
    config: DecoderConfig = eqx.field(static=True)

    def __init__(
        self,
        config: DecoderConfig,
        signature: str | Signature = "A B",
        *,
        split: Sequence[int] | None = None,
        gradient: AbstractStorage | None = None,
        unroll: bool | None = None,
        windows: Mapping[str, int] | None = None,
        key: PRNGKeyArray,
        **loops: Loop | Rounds,
    ):
        """**Arguments:**

        - `config`: the shape, such as one of [`rinsx.models.presets`][].
        - `signature`: the order in which blocks are visited; see [`rinsx.Signature`][].
        - `split`: how many layers each block has, in the order of `Signature.blocks`; by default equal shares.
        - `gradient`, `unroll`: of each [`rinsx.nn.Stack`][]: what is stored of a layer, and whether its layers are unrolled.
        - `windows`: for blocks that attend to the last positions only, to how many: `{"A": 128}`. Their caches are that small.
        - `key`: for the weights.
        - `loops`: for each named exponent, a number of rounds or a [`rinsx.Loop`][] with adapter, injection, start and gradient.

        **Raises:**

        `ValueError` where `split` does not add up to `config.layers`, or the layers cannot be shared equally, and where `windows`
        names a block that the signature does not have.
        """
        signature = Signature(signature)
        key_embedding, key_layers, key_head = jr.split(key, 3)
        hidden: Any = config.hidden

        windows = dict(windows or {})
        if unknown := sorted(set(windows) - set(signature.blocks)):
            raise ValueError(
                f"`windows` names {', '.join(unknown)}, but {str(signature)!r} has {', '.join(signature.blocks)}."
            )

        def layer(block, key):
            return TransformerLayer(
                config.width,
                heads=config.heads,
                kv_heads=config.kv_heads,
                window=windows.get(block),
                hidden=hidden,
                mlp=config.mlp,
                # Each layer adds twice to the state.
                scale=(2 * config.layers) ** -0.5,
                key=key,
            )

        self.embedding = Embedding(config.vocab_size, config.width, key=key_embedding)
        self.body = make_body(
            signature,
            config.layers,
            layer,
            split=split,
            gradient=gradient,
            unroll=unroll,
            key=key_layers,
            loops=loops,
        )
        self.norm = RMSNorm(config.width)
        self.head = None if config.tied else Linear(config.width, config.vocab_size, key=key_head)
        self.config = config

    def __call__(
        self,
        tokens: Tokens,
        *,
        segments: Tokens | None = None,
        positions: Tokens | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch t vocab"]:
        """**Arguments:**

        - `tokens`: integers below `vocab_size`.
        - `segments`: the document that each token belongs to: attention stays within it. By default all is one document.
        - `positions`: counted from the start of each document; by default from the start of the row.
        - `key`: for starts and blocks that draw random numbers.

        **Returns:**

        Logits of the next token at every position, in float32.
        """
        hidden = self.hidden(tokens, segments=segments, positions=positions, key=key)
        return logits_of(hidden, self._head())

    def hidden(
        self,
        tokens: Tokens,
        *,
        segments: Tokens | None = None,
        positions: Tokens | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch t width"]:
        """The normalised states that the head is applied to; the arguments are those of a call."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        dtype = jnp.dtype(self.config.dtype)
        with jax.named_scope("embedding"):
            state = self.embedding(tokens).astype(dtype)
        context: dict[str, Any] = {
            "rotary": rotary(positions, self.config.width // self.config.heads, base=self.config.rope_base),
        }
        if segments is not None:
            context["segments"] = segments
        if key is not None:
            context["key"] = key
        state = computing_in(dtype, self.body)(state, **context)
        with jax.named_scope("norm"):
            return self.norm(state)

    def cache(self, batch: int, capacity: int | None, **options: Any) -> Cache:
        """An empty cache for `decode`, for the depths that the loops of this model are bound to.

        !!! example

            ```python
            import jax.numpy as jnp
            import jax.random as jr
            import rinsx as rx

            model = rx.models.DecoderLM(rx.models.presets["nano"], "A^r B", r=3, key=jr.key(0))
            cache = model.cache(1, 64)
            hidden, cache = model.decode(jnp.array([[1, 2, 3]]), cache)
            logits = model.logits(hidden[:, -1])  # of the fourth token
            ```

        **Arguments:**

        - `batch`: how many sequences.
        - `capacity`: how many positions there is room for; `None` where all blocks have windows.
        - `options`: those of [`rinsx.cache.make`][].

        **Returns:**

        A [`rinsx.cache.Cache`][]. Under `jax.eval_shape` nothing is allocated.
        """
        config = self.config
        x = jax.ShapeDtypeStruct((batch, 1, config.width), config.dtype)
        turns = jax.ShapeDtypeStruct((batch, 1, config.width // config.heads // 2), jnp.float32)
        turns = Rotary(turns, turns)  # pyright: ignore[reportArgumentType]
        return make(self.body, x, capacity, rotary=turns, **options)

    def decode(
        self,
        tokens: Tokens,
        cache: Cache,
        *,
        counts: Int[Array, " batch"] | None = None,
        until: Any = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch t width"], Cache]:
        """The next tokens of each sequence: the same states as of a full forward pass, up to rounding.

        **Arguments:**

        - `tokens`: the next `t` tokens of each sequence.
        - `cache`: of `cache`, or the one that the last call has returned.
        - `counts`: how many of the `t` tokens are there, from the left; the rest is padding, any integers, and nothing of it is
            kept. By default all.
        - `until`: a [`rinsx.generate.Until`][]: run a loop for as many rounds as each sequence needs, one token at a time. No round
            waits for a sequence of no `counts`.
        - `key`: for starts and blocks that draw random numbers.

        **Returns:**

        The normalised states, of which `logits` makes logits; and the cache.

        **Raises:**

        An error if the cache is full, or has no slots for so many rounds.
        """
        t = tokens.shape[1]
        if counts is not None:
            # Padding that no token has would be embedded as NaN, which no weight of attention takes away.
            tokens = jnp.where(jnp.arange(t) < jnp.asarray(counts)[..., None], tokens, 0)
        cache = cache.begin(t)
        turns = rotary(cache.positions(t), self.config.width // self.config.heads, base=self.config.rope_base)
        dtype = jnp.dtype(self.config.dtype)
        with jax.named_scope("embedding"):
            x = self.embedding(tokens).astype(dtype)
        context = {"rotary": turns} if key is None else {"rotary": turns, "key": key}
        body, state = computing_in(dtype, self.body), Stream(x, cache)
        if until is None:
            state = body(state, **context)
        else:
            if t != 1:
                raise ValueError(f"rounds are run until they converge one token at a time; got {t} tokens.")
            idle = None if counts is None else counts == 0
            state = converge(body, state, until, lambda x: self.logits(self.norm(x[:, -1])), idle, **context)
        with jax.named_scope("norm"):
            return self.norm(state.x), state.cache.advance(t if counts is None else counts)

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """The head applied to what `decode` or `hidden` has returned: logits of the next token, in float32."""
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        with jax.named_scope("head"):
            return logits_of(flat, self._head()).reshape(*hidden.shape[:-1], -1)

    def apart(self) -> "DecoderLM":
        """The same model, ready to be called many times: matrices in the dtype of the layers, each layer's by itself."""
        body = computing_in(jnp.dtype(self.config.dtype), self.body)
        split = lambda node: node.apart() if isinstance(node, Stack) else node
        blocks = {name: split(block) for name, block in body.blocks.items()}
        return eqx.tree_at(lambda model: model.body.blocks, self, blocks)

    def loss(self, batch: Mapping[str, Array], key: PRNGKeyArray | None = None) -> tuple[Scalar, Scalar]:
        """The loss of a batch, as [`rinsx.train`][] wants it: `DecoderLM.loss` is a function of a model, a batch and a key.

        **Arguments:**

        - `batch`: `tokens` and `targets`, and if there are any `segments`, `positions` and `weights`: arrays of shape `[batch, t]`.
        - `key`: as in a call.

        **Returns:**

        The weighted sum of the negative log-likelihoods of the targets, in nats, and the sum of the weights.
        """
        context = {name: batch[name] for name in ("segments", "positions") if name in batch}
        hidden = self.hidden(batch["tokens"], key=key, **context)
        targets = batch["targets"]
        weights = batch["weights"] if "weights" in batch else jnp.ones(targets.shape)
        with jax.named_scope("head"):
            return cross_entropy(hidden, self._head(), targets, weights)

    def _head(self) -> Float[Array, "width vocab"]:
        return self.embedding.weight.T if self.head is None else self.head.weight
