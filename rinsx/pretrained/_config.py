"""The shape of a checkpoint: `config.json`, read and written."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from ..models import SigLIPConfig, TextConfig, ViTConfig


# Of transformers, of ours, and what transformers takes where the file says nothing.
SHAPE = (
    ("hidden_size", "width", 768),
    ("num_hidden_layers", "layers", 12),
    ("num_attention_heads", "heads", 12),
    ("intermediate_size", "hidden", 3072),
)
IMAGE = (*SHAPE, ("num_channels", "channels", 3), ("patch_size", "patch", 16), ("image_size", "size", 224))
TEXT = (*SHAPE, ("vocab_size", "vocab_size", 32_000), ("max_position_embeddings", "context", 64))
EPSILON = {"siglip": 1e-6, "vit": 1e-12}
ACTIVATION = {"siglip": "gelu_pytorch_tanh", "vit": "gelu"}
MLP = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu": "gelu_exact"}
ARCHITECTURES = {
    "siglip": ("SiglipModel",),
    "siglip_vision_model": ("SiglipVisionModel",),
    "vit": ("ViTModel", "ViTForImageClassification"),
}


def config(folder: str | os.PathLike, *, dtype: Literal["float32", "bfloat16"] = "float32") -> SigLIPConfig | ViTConfig:
    """The shape of the model that a folder of the transformers library holds.

    What its `config.json` leaves out is as transformers has it. Where the patch does not divide the size of an image, transformers
    drops the last rows and columns; here `size` is what is left, such as 378 of 384 for patches of 14.

    !!! example

        ```python
        import tempfile
        import jax.random as jr
        import rinsx as rx

        model = rx.models.ViT(rx.models.vit_presets["nano"], key=jr.key(0))
        with tempfile.TemporaryDirectory() as folder:
            rx.pretrained.save(model, folder)
            rx.pretrained.config(folder).width  # 64
        ```

    **Arguments:**

    - `folder`: with a `config.json` whose `model_type` is `siglip`, `siglip_vision_model` or `vit`.
    - `dtype`: what the layers compute in, `"float32"` or `"bfloat16"`.

    **Returns:**

    A [`rinsx.models.SigLIPConfig`][], or a [`rinsx.models.ViTConfig`][]: with `pool="map"` of the image tower of a SigLIP, with
    `pool="first"` of a ViT, and with `classes` where that is a `ViTForImageClassification`.

    **Raises:**

    `ValueError` for what [`rinsx.models`][] cannot compute, by its name in the file.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: `folder` is one that transformers' `save_pretrained` has written."
        )
    given = json.loads(path.read_text("utf-8"))
    kind = given.get("model_type")
    _check(kind in ARCHITECTURES, path, "model_type", kind, ARCHITECTURES)
    architecture = (given.get("architectures") or ARCHITECTURES[kind])[0]
    _check(architecture in ARCHITECTURES[kind], path, "architectures", architecture, ARCHITECTURES[kind])
    if kind == "siglip":
        image = _image(given.get("vision_config") or {}, "siglip", f"{path}: vision_config", dtype)
        return SigLIPConfig(image, _text(given.get("text_config") or {}, f"{path}: text_config", dtype))
    if kind == "siglip_vision_model":
        return _image(given, "siglip", path, dtype)
    classes = _classes(given) if architecture == "ViTForImageClassification" else None
    return _image(given, "vit", path, dtype, classes)


def describe(config: SigLIPConfig | ViTConfig) -> dict[str, Any]:
    """What stands in `config.json`, or a `ValueError` for what transformers cannot compute."""
    if isinstance(config, SigLIPConfig):
        if config.image.pool != "map" or config.image.classes is not None:
            raise ValueError(
                "the image tower of transformers' SiglipModel has pool='map' and no head; got "
                f"pool={config.image.pool!r} and classes={config.image.classes}."
            )
        return {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "dtype": "float32",
            "vision_config": {"model_type": "siglip_vision_model", **_describe_image(config.image)},
            "text_config": {"model_type": "siglip_text_model", **_describe_text(config.text)},
        }
    kind = "siglip_vision_model" if config.pool == "map" else "vit"
    architecture = ARCHITECTURES[kind][0 if config.classes is None else -1]
    out = {"architectures": [architecture], "model_type": kind, "dtype": "float32", **_describe_image(config)}
    if config.classes is not None:
        labels = {str(i): f"LABEL_{i}" for i in range(config.classes)}
        out |= {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
    return out


def differences(theirs: ViTConfig | TextConfig, ours: ViTConfig | TextConfig) -> list[str]:
    """The settings that change what is computed, though not the shape of any weight."""
    names = ("size", "patch", "heads", "mlp", "epsilon", "pool")
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in names if hasattr(ours, name)]
    return [f"{name}={a!r}, and the model {name}={b!r}" for name, a, b in pairs if a != b]


def _check(right: bool, where: Any, name: str, value: Any, known: Any) -> None:
    if not right:
        known = ", ".join(map(str, known))
        raise ValueError(f"{where}: `{name}` must be one of {known} to be computed by rx.models; got {value!r}.")


def _common(given: Mapping[str, Any], fields: Any, family: str, where: Any) -> dict[str, Any]:
    activation = given.get("hidden_act", ACTIVATION[family])
    _check(activation in MLP, where, "hidden_act", activation, MLP)
    out = {ours: given.get(theirs, default) for theirs, ours, default in fields}
    return {**out, "mlp": MLP[activation], "epsilon": given.get("layer_norm_eps", EPSILON[family])}


def _image(given: Mapping[str, Any], family: str, where: Any, dtype: Any, classes: int | None = None) -> ViTConfig:
    shape = _common(given, IMAGE, family, where)
    for name, only in (("vision_use_head", True), ("qkv_bias", True), ("head_dim", shape["width"] // shape["heads"])):
        if name in given:
            _check(given[name] == only, where, name, given[name], (only,))
    sizes = {name: _pair(given, theirs, shape[name], where) for theirs, name, _ in IMAGE if name in ("patch", "size")}
    patch, size = sizes["patch"], sizes["size"]
    if patch[0] != patch[1]:
        raise ValueError(f"{where}: `patch_size` must be that of a square; got {list(patch)}.")
    if family == "siglip" and size[0] != size[1]:
        raise ValueError(f"{where}: `image_size` must be that of a square, as transformers has it; got {list(size)}.")
    shape |= {"patch": patch[0], "size": tuple(side // patch[0] * patch[0] for side in size)}
    return ViTConfig(**shape, pool="map" if family == "siglip" else "first", classes=classes, dtype=dtype)


def _text(given: Mapping[str, Any], where: Any, dtype: Any) -> TextConfig:
    return TextConfig(**_common(given, TEXT, "siglip", where), outputs=given.get("projection_size"), dtype=dtype)


def _pair(given: Mapping[str, Any], name: str, value: Any, where: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{where}: `{name}` must be a number, or height and width; got {given[name]!r}.")
    return pair


def _classes(given: Mapping[str, Any]) -> int | None:
    # transformers has two labels where nothing is said of them, and no head where there are none.
    labels = given.get("id2label")
    return (given.get("num_labels", 2) if labels is None else len(labels)) or None


def _describe(config: ViTConfig | TextConfig, fields: Any) -> dict[str, Any]:
    # The second of two names for one formula is that of other models.
    names = {ours: theirs for theirs, ours in reversed(MLP.items())}
    if config.mlp not in names:
        raise ValueError(f"transformers' SigLIP and ViT have no mlp={config.mlp!r}, only {' and '.join(names)}.")
    shape = {theirs: getattr(config, ours) for theirs, ours, _ in fields}
    return {**shape, "hidden_act": names[config.mlp], "layer_norm_eps": config.epsilon}


def _describe_image(config: ViTConfig) -> dict[str, Any]:
    if config.positions != "learned":
        raise ValueError(
            f"transformers' SigLIP and ViT have learned positions only; got positions={config.positions!r}."
        )
    if config.pool == "mean" or (config.pool == "map" and config.classes is not None):
        raise ValueError(
            "transformers has ViT with pool='first', and the image tower of SigLIP with pool='map' and no head; got "
            f"pool={config.pool!r} and classes={config.classes}."
        )
    height, width = config.size  # pyright: ignore[reportGeneralTypeIssues]
    if config.pool == "map" and height != width:
        raise ValueError(f"transformers' SigLIP has square images only; got size=({height}, {width}).")
    return {**_describe(config, IMAGE), "image_size": height if height == width else [height, width]}


def _describe_text(config: TextConfig) -> dict[str, Any]:
    if config.pool != "last":
        raise ValueError(f"the text tower of transformers' SigLIP has pool='last'; got pool={config.pool!r}.")
    # Its defaults for these are tokens of another vocabulary, of which transformers warns.
    special = {"bos_token_id": None, "eos_token_id": None}
    return {**_describe(config, TEXT), "projection_size": config.outputs, **special}
