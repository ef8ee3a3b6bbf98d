"""Weights into files."""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from .._recur import Recursion
from ..models import SigLIP, ViT
from ._config import describe
from ._load import import_safetensors
from ._names import at, check_kind, shape_of, tables, towers


def save(model: SigLIP | ViT, folder: str | os.PathLike) -> None:
    """Writes `config.json` and `model.safetensors`, which the transformers library loads. Needs `pip install 'rinsx[vision]'`.

    The weights are written as they are: those that [`rinsx.pretrained.load`][] read from a float32 file go back bit for bit.
    transformers runs each layer once, so the model must do so too.

    !!! example

        ```python
        import tempfile
        import jax.random as jr
        import rinsx as rx

        config = rx.models.siglip_presets["nano"]
        image = rx.models.ViT(config.image, "A^r B", r=3, key=jr.key(0))
        model = rx.models.SigLIP(image, rx.models.TextEncoder(config.text, key=jr.key(1)))
        with tempfile.TemporaryDirectory() as folder:
            rx.pretrained.save(rx.with_rounds(model, r=1), folder)
        ```

    **Arguments:**

    - `model`: as for [`rinsx.pretrained.load`][], each block visited once, without adapters, injections and starts.
    - `folder`: is made if it does not exist. Files of these names are replaced.

    **Raises:**

    `ValueError` for what transformers cannot compute, by its name.
    """
    check_kind(model)
    described = describe(shape_of(model))
    for place, tower in towers(model).items():
        _check_plain(tower.encoder.body, f" of `{place[:-1]}`" if place else "")
    table = tables(model)[0]
    leaves = {place: _array(model, place) for entry in table for place in entry.places}
    arrays = {}
    for entry in table:
        pieces = [leaves[place] if entry.layer is None else leaves[place][entry.layer] for place in entry.places]
        # The file is written in the order of memory.
        arrays[entry.name] = np.ascontiguousarray(np.concatenate([entry.form.theirs(piece) for piece in pieces]))
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "model.safetensors.tmp"
    # transformers refuses files that do not name the library that laid out the arrays.
    import_safetensors("save", "safetensors.numpy").save_file(arrays, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")


def _array(model: Any, place: str) -> np.ndarray:
    leaf = at(model, place)
    if isinstance(leaf, jax.ShapeDtypeStruct) or leaf.dtype != np.float32:
        raise ValueError(f"weights must be float32 to be saved; {place} is {leaf}.")
    return np.asarray(leaf)


def _check_plain(body: Recursion, where: str) -> None:
    """Refuses what transformers has no place for."""
    for name, loop in body.loops.items():
        for option in ("adapter", "inject", "start"):
            if (part := getattr(loop, option)) is not None:
                raise ValueError(
                    f"the loop {name}{where} has {option}={type(part).__name__}, for which transformers has no place: "
                    "save the model without it."
                )
    more = {name: loop.rounds for name, loop in body.loops.items() if not (loop.static and loop.rounds == 1)}
    if more:
        rounds = ", ".join(f"{name}={rounds}" for name, rounds in more.items())
        one = ", ".join(f"{name}=1" for name in more)
        raise ValueError(
            f"transformers runs each layer once, and the model has {rounds}{where}: save rx.with_rounds(model, {one}), which has "
            "the same weights."
        )
    counts = body.signature.bind(**dict.fromkeys(body.signature.exponents, 1)).counts
    if again := [block for block, count in counts.items() if count > 1]:
        raise ValueError(
            f"transformers runs each layer once, and {str(body.signature)!r}{where} visits {', '.join(again)} more than "
            "once. With an exponent that is a name, such as 'A^r B', a model can be saved at one round."
        )
