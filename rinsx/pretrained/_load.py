"""Weights from files."""

import contextlib
import importlib
import json
import os
import pathlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ..models import SigLIP, SigLIPConfig, ViT
from ._config import config, describe, differences
from ._names import at, check_kind, Entry, shape_of, tables, towers


Model = TypeVar("Model", SigLIP, ViT)


def load(model: Model, folder: str | os.PathLike, *, ignore: Sequence[str] = ()) -> Model:
    """The model with the weights of a folder that the transformers library wrote. Needs `pip install 'rinsx[vision]'`.

    Layers are numbered over all blocks, in the order of `Signature.blocks`: `A^r B` has the first ones in A, whatever `r` is.
    Adapters, injections and starts stay as they are.

    !!! example

        ```python
        import tempfile
        import equinox as eqx
        import jax.random as jr
        import rinsx as rx

        model = rx.models.ViT(rx.models.vit_presets["nano"], key=jr.key(0))
        with tempfile.TemporaryDirectory() as folder:
            rx.pretrained.save(model, folder)

            # No weights are made but those of the file.
            config = rx.pretrained.config(folder)
            shapes = eqx.filter_eval_shape(rx.models.ViT, config, "A^r B", split=(3, 1), r=2, key=jr.key(0))
            deeper = rx.pretrained.load(shapes, folder)
        ```

    **Arguments:**

    - `model`: a [`rinsx.models.SigLIP`][] of a [`rinsx.models.ViT`][] and a [`rinsx.models.TextEncoder`][], or a
        [`rinsx.models.ViT`][]; of any signature. Its arrays may be shapes only, except those of adapters, injections and starts.
    - `folder`: with `config.json`, and `model.safetensors` or the index of several, in float32, bfloat16 or float16.
    - `ignore`: how the names begin of arrays that are to be left out, such as `("pooler.",)`.

    **Returns:**

    A model like `model`, its weights in float32.

    **Raises:**

    `ValueError` that lists the names that are missing in the folder, those that are left over, and those whose shapes differ, with
    both shapes; or settings that differ, such as the number of heads.
    """
    check_kind(model)
    describe(shape_of(model))
    theirs = config(folder)
    if isinstance(model, SigLIP) and not isinstance(theirs, SigLIPConfig):
        raise ValueError(f"{folder} holds no SigLIP: load it into the image tower, or into a rx.models.ViT.")
    with contextlib.ExitStack() as files:
        tensors = _open(pathlib.Path(folder), files)
        # The naming that the file has is the one of which it knows the most names.
        table = max(tables(model), key=lambda table: sum(entry.name in tensors for entry in table))
        _check_names(model, table, tensors, ignore, folder)
        _check_settings(model, theirs, folder)
        sources = defaultdict[str, list[tuple[Entry, int]]](list)
        for entry in table:
            for part, place in enumerate(entry.places):
                sources[place].append((entry, part))
        where = lambda model: [at(model, place) for place in sources]
        _check_rest(eqx.tree_at(where, model, [None] * len(sources)))
        # One array at a time: beside the model no second copy of it stands in memory.
        return eqx.tree_at(where, model, [_read(at(model, place), sources[place], tensors) for place in sources])


def _read(leaf: Any, sources: list[tuple[Entry, int]], tensors: dict[str, Callable]) -> jax.Array:
    out = np.empty(leaf.shape, np.float32)
    for entry, part in sources:
        piece = np.split(tensors[entry.name]()[:], len(entry.places))[part]
        out[() if entry.layer is None else entry.layer] = entry.form.ours(piece).astype(np.float32)
    sharding = getattr(leaf, "sharding", None)
    spread = sharding is not None and len(sharding.device_set) > 1
    return jax.device_put(out, sharding) if spread else jnp.asarray(out)


def _open(folder: pathlib.Path, files: contextlib.ExitStack) -> dict[str, Callable]:
    """For each name, a function that gives the slice of the file, unread."""
    safetensors = import_safetensors("load")
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        paths = [whole]
    elif index.is_file():
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        paths = [folder / name for name in sorted(set(names))]
    else:
        raise FileNotFoundError(
            f"there is neither {whole.name} nor {index.name} in {folder}; what is saved by torch must be saved again by transformers."
        )
    found = {}
    for path in paths:
        file = files.enter_context(safetensors.safe_open(path, "numpy"))
        found |= {name: lambda file=file, name=name: file.get_slice(name) for name in file.keys()}
    return found


def _check_names(
    model: Any, table: list[Entry], tensors: dict[str, Callable], ignore: Sequence[str], folder: Any
) -> None:
    if isinstance(ignore, str):
        raise TypeError(f"`ignore` must be a sequence of texts, such as ({ignore!r},).")
    needed = {entry.name: entry.shape(model) for entry in table}
    given = {name: (tuple(piece().get_shape()), piece().get_dtype()) for name, piece in tensors.items()}
    if useless := [start for start in ignore if not any(name.startswith(start) for name in given.keys() - needed)]:
        raise ValueError(
            f"`ignore`: nothing that is left over in {folder} begins with {', '.join(map(repr, useless))}."
        )
    missing = [f"{name} {list(shape)}" for name, shape in needed.items() if name not in given]
    left = [
        f"{name} {list(shape)}"
        for name, (shape, _) in given.items()
        if name not in needed and not name.startswith(tuple(ignore))
    ]
    both = [(name, given[name], shape) for name, shape in needed.items() if name in given]
    misfit = [
        f"{name}: {list(has)} in the folder, {list(shape)} in the model"
        for name, (has, _), shape in both
        if has != shape
    ]
    dtypes = [f"{name}: {dtype}" for name, (_, dtype), _ in both if dtype not in ("F32", "BF16", "F16")]
    problems = {
        "missing in the folder": missing,
        "left over in the folder": left,
        "of another shape": misfit,
        "neither float32 nor bfloat16 nor float16": dtypes,
    }
    if text := "".join(_listed(what, names) for what, names in problems.items() if names):
        raise ValueError(f"the weights in {folder} are not those of the model.{text}")


def _listed(what: str, names: list[str], most: int = 20) -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return f"\n{what} ({len(names)}):" + "".join(f"\n    {name}" for name in [*sorted(names)[:most], *more])


def _check_settings(model: SigLIP | ViT, theirs: Any, folder: Any) -> None:
    # An image tower alone may be taken from a whole SigLIP.
    parts = (
        {"image.": theirs.image, "text.": theirs.text, "": theirs.image}
        if isinstance(theirs, SigLIPConfig)
        else {"": theirs}
    )
    for place, tower in towers(model).items():
        if found := differences(parts[place], tower.config):
            raise ValueError(
                f"{folder} has {place}{f'; {place}'.join(found)}: make the model of rx.pretrained.config(...)."
            )


def _check_rest(model: Any) -> None:
    """Refuses shapes for which the folder has no weights."""
    shapes = lambda x: isinstance(x, jax.ShapeDtypeStruct) and jnp.issubdtype(x.dtype, jnp.inexact)
    leaves = [jtu.keystr(path, simple=True, separator=".") for path, x in jtu.tree_leaves_with_path(model) if shapes(x)]
    if leaves:
        raise ValueError(
            f"adapters, injections and starts have no weights in the folder, and here they are shapes only: {', '.join(leaves)}. "
            "Make the model with weights."
        )


def import_safetensors(what: str, module: str = "safetensors") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"rx.pretrained.{what} needs safetensors: pip install 'rinsx[vision]'") from error
