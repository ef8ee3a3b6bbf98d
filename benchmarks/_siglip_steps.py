"""The training step and the embeddings of a SigLIP: by rinsx, and written by hand in JAX and optax.

By hand is what someone would write who needs a SigLIP once: plain functions of nested dictionaries, the loss from the whole matrix of
logits, everything stored for the backward pass, several steps in one compiled call, what is trained updated in place.
"""

import functools as ft
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax

import rinsx as rx
from rinsx.train._step import run, Stepper


class Contestant(NamedTuple):
    """Steps and embeddings, ready to be timed: `check(n)` gives the losses of the first `n` steps and the norm of the first
    gradient; `run(what, calls)`, of `"step"` or `"embed"`, gives seconds."""

    check: Callable[[int], tuple[list[float], float]]
    run: Callable[[str, int], float]


ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-4}
"""Of all contestants, in the words of PyTorch: every parameter decays, no gradient is clipped."""


#
# rinsx
#


def build(config: rx.models.SigLIPConfig, signature: str = "A B", *, stored: bool = False, seed: int = 0) -> Any:
    """The model; every signature of the same blocks starts from the same weights. `stored` unrolls all and stores it."""
    full: dict[str, Any] = {"gradient": rx.gradient.Full(), "unroll": True} if stored else {}
    loops: dict[str, Any] = {name: rx.Loop(2, **full) for name in rx.Signature(signature).exponents}
    keys = jr.split(jr.key(seed))
    image = rx.models.ViT(config.image, signature, key=keys[0], **full, **loops)
    return rx.models.SigLIP(image, rx.models.TextEncoder(config.text, signature, key=keys[1], **full, **loops))


def flops(model: Any, batch: dict[str, Any]) -> int:
    """Of the contractions of a step. What is computed twice to save memory counts: give it a model that stores everything."""
    return int(rx.train.cost(rx.models.SigLIP.loss, model, batch).matmul)


def by_rinsx(model: Any, batch: dict[str, Any], limit: int) -> Contestant:
    """The step of `rx.train.fit`: the same compiled program of up to `limit` steps a call, without logs and evaluations.

    The arrays of the model are given away.
    """
    b1, b2 = ADAMW["betas"]
    rest = {"eps": ADAMW["eps"], "weight_decay": ADAMW["weight_decay"], "decay": lambda role: True, "clip": None}
    optimizer = rx.train.adamw(lambda fraction: ADAMW["lr"], b1=b1, b2=b2, **rest)
    stepper = Stepper(rx.models.SigLIP.loss, optimizer, (), ((),), 1, None)
    # Compiled, as `fit` does it.
    state = eqx.filter_jit(optimizer.init)(eqx.filter(model, eqx.is_inexact_array))
    batches = {name: jnp.stack([x] * limit) for name, x in batch.items()}
    trained, first, flags = (model, state), 0, np.zeros(1, bool)
    embed = eqx.filter_jit(
        lambda model, batch: (model.embed_images(batch["images"]), model.embed_texts(batch["tokens"]))
    )

    def steps(count):
        nonlocal trained, first
        trained, (record, _) = run(stepper, trained, batches, jr.key(0), first, count, [0.0] * limit, (), flags)
        first += count
        return jax.block_until_ready(record)

    def check(count):
        record = steps(count)
        return record.loss[:count].tolist(), float(record.gradient_norm[0])

    def timed(what, calls):
        start = time.perf_counter()
        if what == "step":
            steps(calls)
        else:
            for _ in range(calls):
                jax.block_until_ready(embed(trained[0], batch))
        return time.perf_counter() - start

    return Contestant(check, timed)


#
# By hand
#


def weights_of(model: Any, scanned: bool) -> dict[str, Any]:
    """The weights of a `rx.models.SigLIP`, or gradients by them, for the form by hand: layers in a list, or along a first axis."""

    def dense(x):
        return {"weight": x.weight, "bias": x.bias}

    def norm(x):
        return {"scale": x.scale, "bias": x.bias}

    def tower(x):
        encoder = x.encoder
        layers = []
        for block in encoder.body.blocks.values():
            layer = block.layers
            found = {name: dense(getattr(layer.attention, name)) for name in ("q", "k", "v", "out")}
            found |= {name: dense(getattr(layer.mlp, name)) for name in ("up", "down")}
            layers.append(found | {name: norm(getattr(layer, name)) for name in ("attention_norm", "mlp_norm")})
        stacked = jtu.tree_map(lambda *x: jnp.concatenate(x), *layers)
        depth = stacked["q"]["bias"].shape[0]
        split = [jtu.tree_map(lambda x: x[i], stacked) for i in range(depth)]
        return {"positions": x.positions.weight, "layers": stacked if scanned else split, "norm": norm(encoder.norm)}

    pool = model.image.encoder.attention_pool
    head = {name: dense(getattr(pool, name)) for name in ("q", "k", "v", "out")}
    head |= {"up": dense(pool.mlp.up), "down": dense(pool.mlp.down), "norm": norm(pool.norm), "query": pool.query}
    image = tower(model.image) | {"patches": dense(model.image.patches), "head": head}
    text = tower(model.text) | {"tokens": model.text.tokens.weight, "head": dense(model.text.head)}
    params = {"image": image, "text": text, "log_scale": model.log_scale, "bias": model.bias}
    return jtu.tree_map(jnp.array, params)


def dense(p, x):
    # Rows flattened: on CPU XLA is faster so.
    flat = x.reshape(-1, x.shape[-1]) @ p["weight"].astype(x.dtype) + p["bias"].astype(x.dtype)
    return flat.reshape(*x.shape[:-1], -1)


def layer_norm(p, x, epsilon):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.var(wide, axis=-1, keepdims=True)
    return ((wide - mean) * lax.rsqrt(variance + epsilon) * p["scale"] + p["bias"]).astype(x.dtype)


def attention(p, x, queries, heads):
    split = lambda y: y.reshape(*y.shape[:2], heads, -1)
    q, k, v = split(dense(p["q"], queries)), split(dense(p["k"], x)), split(dense(p["v"], x))
    if jax.default_backend() == "gpu" and x.dtype == jnp.bfloat16:
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    else:
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)
        out = jnp.einsum("bhts,bshd->bthd", weights.astype(x.dtype), v)
    return dense(p["out"], out.reshape(queries.shape))


def mlp(p, x):
    return dense(p["down"], jax.nn.gelu(dense(p["up"], x), approximate=True))


def layer(p, x, heads, epsilon):
    y = layer_norm(p["attention_norm"], x, epsilon)
    x = x + attention(p, y, y, heads)
    return x + mlp(p, layer_norm(p["mlp_norm"], x, epsilon))


def tower(p, x, config):
    one = ft.partial(layer, heads=config.heads, epsilon=config.epsilon)
    if isinstance(p["layers"], list):
        for weights in p["layers"]:
            x = one(weights, x)
    else:
        x, _ = lax.scan(lambda x, weights: (one(weights, x), None), x, p["layers"])
    return layer_norm(p["norm"], x, config.epsilon)


def embed_images(p, images, config):
    size = config.patch
    batch, rows, columns, channels = images.shape
    x = images.astype(config.dtype).reshape(batch, rows // size, size, columns // size, size, channels)
    x = x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)
    x = tower(p, dense(p["patches"], x) + p["positions"].astype(x.dtype), config)
    head = p["head"]
    query = jnp.broadcast_to(head["query"].astype(x.dtype), (batch, 1, config.width))
    x = attention(head, x, query, config.heads)[:, 0]
    return unit(x + mlp(head, layer_norm(head["norm"], x, config.epsilon)))


def embed_texts(p, tokens, config):
    x = (p["tokens"][tokens] + p["positions"]).astype(config.dtype)
    return unit(dense(p["head"], tower(p, x, config)[:, -1].astype(jnp.float32)))


def unit(x):
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def embed(p, batch, config):
    return embed_images(p["image"], batch["images"], config.image), embed_texts(p["text"], batch["tokens"], config.text)


def loss(p, batch, config):
    """The loss of the paper, from the logits of all pairs."""
    images, texts = embed(p, batch, config)
    logits = jnp.exp(p["log_scale"]) * images @ texts.T + p["bias"]
    sign = 2 * jnp.eye(len(logits)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(sign * logits)) / len(logits)


def by_hand(params: dict[str, Any], batch: dict[str, Any], config: rx.models.SigLIPConfig) -> Contestant:
    b1, b2 = ADAMW["betas"]
    optimizer = optax.adamw(ADAMW["lr"], b1, b2, ADAMW["eps"], weight_decay=ADAMW["weight_decay"])

    # Several steps in one call, as rinsx has them: on CPU a step in a loop measures faster than a step alone.
    @ft.partial(jax.jit, donate_argnums=(0, 1), static_argnums=2)
    def steps(params, state, count, batches):
        def step(carry, batch):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch, config)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), (value, optax.tree.norm(grads))

        (params, state), seen = lax.scan(step, (params, state), batches, length=count)
        return params, state, *seen

    trained = params, jax.jit(optimizer.init)(params)
    embeddings = jax.jit(ft.partial(embed, config=config))
    stacked: dict[int, Any] = {}

    def batches(count):
        if count not in stacked:
            stacked[count] = {name: jnp.stack([x] * count) for name, x in batch.items()}
        return stacked[count]

    def check(count):
        nonlocal trained
        *trained, losses, norms = steps(*trained, count, batches(count))
        return losses.tolist(), float(norms[0])

    def timed(what, calls):
        nonlocal trained
        given = batches(calls) if what == "step" else batch
        start = time.perf_counter()
        if what == "step":
            *trained, _, _ = steps(*trained, calls, given)
            jax.block_until_ready(trained)
        else:
            for _ in range(calls):
                jax.block_until_ready(embeddings(trained[0], given))
        return time.perf_counter() - start

    return Contestant(check, timed)
