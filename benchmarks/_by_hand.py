"""The model and the training step of `benchmarks/training.py`, written by hand in JAX and optax, without rinsx.

What someone would write who needs `A^r B` once: a list of layers, a Python loop over their visits, everything stored for the backward
pass, several steps in one compiled call, and what is trained updated in place.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax


LAYER = ("attention_norm", "q", "k", "v", "out", "mlp_norm", "up", "gate", "down")


def init(shape: Any, key: jax.Array) -> dict[str, Any]:
    """Weights like those of `rx.models.DecoderLM`: the same sizes and deviations, other numbers."""
    width, hidden = shape.width, shape.hidden
    depth = sum(shape.split)
    small = (2 * depth) ** -0.5
    sizes = {"q": (width, width), "k": (width, width), "v": (width, width), "out": (width, width)}
    sizes |= {"up": (width, hidden), "gate": (width, hidden), "down": (hidden, width)}

    def matrix(key, rows, columns, scale=1.0):
        return jax.random.normal(key, (rows, columns)) * scale * rows**-0.5

    def layer(key):
        keys = dict(zip(sizes, jax.random.split(key, len(sizes))))
        out: dict[str, Any] = {"attention_norm": jnp.ones(width), "mlp_norm": jnp.ones(width)}
        return out | {
            name: matrix(keys[name], *size, small if name in ("out", "down") else 1.0) for name, size in sizes.items()
        }

    keys = jax.random.split(key, depth + 2)
    params = {
        "embedding": jax.random.normal(keys[0], (shape.vocabulary, width)) * width**-0.5,
        "layers": [layer(key) for key in keys[2:]],
        "norm": jnp.ones(width),
    }
    return params if shape.tied else params | {"head": matrix(keys[1], width, shape.vocabulary)}


def norm(scale, x):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rotate(x, cos, sin):
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(layer, x, heads, cos, sin):
    batch, length, width = x.shape
    split = lambda y: y.reshape(batch, length, heads, -1).swapaxes(1, 2)
    flat = x.reshape(-1, width)
    q, k, v = (split(flat @ layer[name]) for name in ("q", "k", "v"))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    scores = jnp.einsum("bhtd,bhsd->bhts", q * q.shape[-1] ** -0.5, k)
    weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bhts,bhsd->bhtd", weights, v).swapaxes(1, 2).reshape(-1, width)
    return (out @ layer["out"]).reshape(x.shape)


def mlp(layer, x):
    flat = x.reshape(-1, x.shape[-1])
    return ((jax.nn.silu(flat @ layer["gate"]) * (flat @ layer["up"])) @ layer["down"]).reshape(x.shape)


def loss(params, shape, tokens, targets):
    """The mean over tokens of the negative log-likelihood, in nats."""
    size = shape.width // shape.heads
    angles = jnp.arange(tokens.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(0, size, 2) / size)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x = params["embedding"][tokens]
    for i in shape.order:
        layer = params["layers"][i]
        x = x + attention(layer, norm(layer["attention_norm"], x), shape.heads, cos, sin)
        x = x + mlp(layer, norm(layer["mlp_norm"], x))
    head = params["embedding"].T if shape.tied else params["head"]
    logits = norm(params["norm"], x) @ head
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def optimizer(shape: Any) -> optax.GradientTransformation:
    """AdamW as `rx.train.adamw` makes it: clipped by the global norm, with decay on matrices and embeddings."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.9, 0.95),
        optax.add_decayed_weights(0.1, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.scale(-shape.learning_rate),
    )


def make_steps(shape: Any):
    """`(params, state, tokens, targets) -> (params, state, losses)`, for tokens and targets of shape `[steps, batch, length]`."""
    optimise = optimizer(shape)

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, shape, *batch)
        updates, state = optimise.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def steps(params, state, tokens, targets):
        (params, state), losses = lax.scan(step, (params, state), (tokens, targets))
        return params, state, losses

    return jax.jit(steps, donate_argnums=(0, 1))
