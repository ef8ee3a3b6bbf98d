"""Which array of transformers stands where in our models: one table, read in both directions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .._recur import Recursion
from .._stack import Stack
from ..models import SigLIP, SigLIPConfig, TextEncoder, ViT, ViTConfig
from ..nn import TransformerLayer


class Form(NamedTuple):
    """How an array of ours is written by transformers, and back."""

    theirs: Callable[[np.ndarray], np.ndarray]
    ours: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Entry:
    """An array of transformers.

    **Attributes:**

    - `name`: of the array.
    - `places`: the attributes of our model, whose arrays it puts one after the other along its first axis.
    - `layer`: which layer of a stack is meant; `None` where there is no stack.
    - `form`: of each of these.
    """

    name: str
    places: tuple[str, ...]
    layer: int | None
    form: Form

    def shape(self, model: Any) -> tuple[int, ...]:
        """The shape of the array of transformers, by that of the model's."""
        here = at(model, self.places[0]).shape[self.layer is not None :]
        first, *rest = self.form.theirs(np.broadcast_to(np.float32(0), here)).shape
        return (first * len(self.places), *rest)


SAME = Form(lambda x: x, lambda x: x)
TURNED = Form(lambda x: x.T, lambda x: x.T)


def ahead(axes: int) -> Form:
    """Axes of length 1 before the others."""
    return Form(lambda x: x.reshape(*[1] * axes, *x.shape), lambda x: x.reshape(x.shape[axes:]))


def convolution(patch: int, channels: int) -> Form:
    """`[outputs, channels, rows, columns]`; ours is `[rows * columns * channels, outputs]`."""
    return Form(
        lambda x: x.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1),
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    )


# A row: name of transformers, place in our model, kind. A kind gives for each array: name, place, form.
NORM = (("weight", "scale", SAME), ("bias", "bias", SAME))
LINEAR = (("weight", "weight", TURNED), ("bias", "bias", SAME))
EMBEDDING = (("weight", "weight", SAME),)

SIGLIP_LAYER = (
    ("layer_norm1", "attention_norm", NORM),
    ("self_attn.q_proj", "attention.q", LINEAR),
    ("self_attn.k_proj", "attention.k", LINEAR),
    ("self_attn.v_proj", "attention.v", LINEAR),
    ("self_attn.out_proj", "attention.out", LINEAR),
    ("layer_norm2", "mlp_norm", NORM),
    ("mlp.fc1", "mlp.up", LINEAR),
    ("mlp.fc2", "mlp.down", LINEAR),
)
SIGLIP_TEXT = (
    ("embeddings.token_embedding", "tokens", EMBEDDING),
    ("embeddings.position_embedding", "positions", EMBEDDING),
    ("final_layer_norm", "encoder.norm", NORM),
    ("head", "head", LINEAR),
)
SIGLIP_IMAGE = (
    ("embeddings.position_embedding", "positions", EMBEDDING),
    ("post_layernorm", "encoder.norm", NORM),
    ("head.attention.out_proj", "encoder.attention_pool.out", LINEAR),
    ("head.layernorm", "encoder.attention_pool.norm", NORM),
    ("head.mlp.fc1", "encoder.attention_pool.mlp.up", LINEAR),
    ("head.mlp.fc2", "encoder.attention_pool.mlp.down", LINEAR),
)
VIT_LAYER = (
    ("layernorm_before", "attention_norm", NORM),
    ("attention.attention.query", "attention.q", LINEAR),
    ("attention.attention.key", "attention.k", LINEAR),
    ("attention.attention.value", "attention.v", LINEAR),
    ("attention.output.dense", "attention.out", LINEAR),
    ("layernorm_after", "mlp_norm", NORM),
    ("intermediate.dense", "mlp.up", LINEAR),
    ("output.dense", "mlp.down", LINEAR),
)
VIT = (("layernorm", "encoder.norm", NORM),)
HEAD = (("classifier", "head", LINEAR),)


def tables(model: SigLIP | ViT) -> list[list[Entry]]:
    """The table of a model, in every naming that files have; the first is the one to write.

    The model is one that `describe` has not refused.
    """
    if isinstance(model, SigLIP):
        alone = ahead(1)
        scalars = [
            Entry("logit_scale", ("log_scale",), None, alone),
            Entry("logit_bias", ("bias",), None, alone),
        ]
        image = _siglip_image(model.image, "vision_model.", "image.")
        return [[*image, *_siglip_text(model.text, "text_model.", "text."), *scalars]]
    if model.encoder.attention_pool is not None:
        # Version 5 writes no prefix, and reads it; version 4 writes it, and reads nothing else.
        return [list(_siglip_image(model, prefix, "")) for prefix in ("vision_model.", "")]
    head = [] if model.head is None else list(_rows(HEAD, "", ""))
    prefixes = ("", "vit.") if model.head is None else ("vit.", "")
    return [[*_vit(model, prefix), *head] for prefix in prefixes]


def at(model: Any, place: str) -> Any:
    """What stands in a place, such as `encoder.body.blocks.A.layers.mlp.up.weight`."""
    for name in place.split("."):
        model = model[name] if isinstance(model, dict) else getattr(model, name)
    return model


def towers(model: SigLIP | ViT) -> dict[str, ViT | TextEncoder]:
    """The parts of a model that have a signature, by their places."""
    if isinstance(model, ViT):
        return {"": model}
    return {"image.": model.image, "text.": model.text}  # pyright: ignore[reportReturnType]


def shape_of(model: SigLIP | ViT) -> SigLIPConfig | ViTConfig:
    if isinstance(model, ViT):
        return model.config
    return SigLIPConfig(*(tower.config for tower in towers(model).values()))  # pyright: ignore[reportArgumentType]


def check_kind(model: Any) -> None:
    """Refuses models and towers that are others' or changed."""
    if not isinstance(model, SigLIP | ViT):
        raise TypeError(f"`model` must be a rx.models.SigLIP or a rx.models.ViT; got {type(model).__name__}.")
    wanted = {"": ViT, "image.": ViT, "text.": TextEncoder}
    for place, tower in towers(model).items():
        if not isinstance(tower, wanted[place]):
            raise TypeError(f"`{place[:-1]}` must be a rx.models.{wanted[place].__name__}; got {type(tower).__name__}.")
        for name, block in tower.encoder.body.blocks.items():
            if not (isinstance(block, Stack) and isinstance(block.layers, TransformerLayer)):
                raise TypeError(
                    f"block {name} must be a rx.nn.Stack of rx.nn.TransformerLayer; got {type(block).__name__}."
                )


def _siglip_image(model: Any, theirs: str, ours: str) -> Iterator[Entry]:
    yield from _patches(model, f"{theirs}embeddings.patch_embedding", ours)
    yield from _rows(SIGLIP_IMAGE, theirs, ours)
    yield from _layers(model.encoder.body, SIGLIP_LAYER, f"{theirs}encoder.layers.", ours)
    pool = f"{ours}encoder.attention_pool."
    yield Entry(f"{theirs}head.probe", (f"{pool}query",), None, ahead(2))
    for name, place, form in LINEAR:
        places = tuple(f"{pool}{part}.{place}" for part in "qkv")
        yield Entry(f"{theirs}head.attention.in_proj_{name}", places, None, form)


def _siglip_text(model: Any, theirs: str, ours: str) -> Iterator[Entry]:
    yield from _rows(SIGLIP_TEXT, theirs, ours)
    yield from _layers(model.encoder.body, SIGLIP_LAYER, f"{theirs}encoder.layers.", ours)


def _vit(model: ViT, theirs: str) -> Iterator[Entry]:
    yield from _patches(model, f"{theirs}embeddings.patch_embeddings.projection", "")
    yield Entry(f"{theirs}embeddings.cls_token", ("token",), None, ahead(2))
    yield Entry(f"{theirs}embeddings.position_embeddings", ("positions.weight",), None, ahead(1))
    yield from _rows(VIT, theirs, "")
    yield from _layers(model.encoder.body, VIT_LAYER, f"{theirs}encoder.layer.", "")


def _patches(model: Any, theirs: str, ours: str) -> Iterator[Entry]:
    form = convolution(model.config.patch, model.config.channels)
    yield Entry(f"{theirs}.weight", (f"{ours}patches.weight",), None, form)
    yield Entry(f"{theirs}.bias", (f"{ours}patches.bias",), None, SAME)


def _rows(rows: Any, theirs: str, ours: str, layer: int | None = None) -> Iterator[Entry]:
    for there, here, kind in rows:
        for name, place, form in kind:
            yield Entry(f"{theirs}{there}.{name}", (f"{ours}{here}.{place}",), layer, form)


def _layers(body: Recursion, rows: Any, theirs: str, ours: str) -> Iterator[Entry]:
    """Layers are numbered over all blocks, in the order of their first visits."""
    number = 0
    for block in body.signature.blocks:
        for layer in range(body.blocks[block].depth):  # pyright: ignore[reportFunctionMemberAccess]
            here = f"{ours}encoder.body.blocks.{block}.layers."
            yield from _rows(rows, f"{theirs}{number}.", here, layer)
            number += 1
