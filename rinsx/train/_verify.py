"""The files of a checkpoint: its manifest, checksums, and the arrays of a pytree by name."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from .._hash import hash_file


MANIFEST = "checkpoint.json"


class Damaged(Exception):
    """What is wrong with the files of a checkpoint."""


def write_manifest(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, with the size and the checksum of every file below the folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = [path.stat().st_size, hash_file(path)]
    text = json.dumps({**manifest, "files": files}, allow_nan=False)
    # The first line is the checksum of the second.
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Reads a manifest, which must be whole."""
    try:
        checksum, text, _ = (folder / MANIFEST).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except ValueError:
        raise Damaged(f"{MANIFEST} is cut or changed") from None
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise Damaged(f"{MANIFEST} is cut or changed")
    return json.loads(text)


def verify(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Compares every file with what the manifest says of it."""
    for name, (size, checksum) in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{name} has {path.stat().st_size} bytes in place of {size}")
        if hash_file(path) != checksum:
            raise Damaged(f"{name} is changed")


def is_stored(leaf: Any) -> bool:
    """Whether a leaf is an array, or the shape of one."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def is_key(leaf: Any) -> bool:
    """Whether an array is one of typed keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_numpy(leaf: Any) -> bool:
    """Whether what a leaf stands for is restored by NumPy: JAX has not all of its dtypes, and would round them off."""
    if isinstance(leaf, jax.ShapeDtypeStruct) and not is_key(leaf):
        return jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype
    return isinstance(leaf, np.ndarray | np.generic)


def implementation(key: Any) -> Any:
    """The generator of typed keys, of which a shape is enough."""
    found = []
    jax.eval_shape(lambda key: found.append(jr.key_impl(key)), key)
    return found[0]


def empty(leaf: Any) -> Any:
    """What a leaf without elements stands for. It is not in the files."""
    if is_numpy(leaf):
        return np.zeros(leaf.shape, leaf.dtype)
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if not is_key(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype, device=sharding(leaf))
    data = jax.eval_shape(jr.key_data, leaf)
    return jr.wrap_key_data(jnp.zeros(data.shape, data.dtype, device=sharding(leaf)), impl=implementation(leaf))


def named(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """The arrays of a pytree by their paths."""
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if is_stored(leaf):
            yield jtu.keystr(path), leaf


def describe(leaf: Any) -> list[Any]:
    """Shape and dtype as JSON."""
    return [list(leaf.shape), str(leaf.dtype)]


def plain(leaf: Any) -> Any:
    """An array as numbers that no one else will change."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.array(leaf)
    return jr.key_data(leaf) if is_key(leaf) else leaf


def sharding(leaf: Any) -> jax.sharding.Sharding:
    """How the numbers of an array are laid out."""
    if isinstance(leaf, jax.Array):
        return plain(leaf).sharding
    given = getattr(leaf, "sharding", None)
    # That of keys also holds for their numbers, which have one more axis, if it names axes of a mesh.
    if given is None or (is_key(leaf) and not isinstance(given, jax.sharding.NamedSharding)):
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return given


def compare(folder: pathlib.Path, saved: list[Any], wanted: list[Any]) -> None:
    """Refuses a checkpoint of other arrays, naming the first that differs."""
    show = lambda entry: "nothing" if entry is None else f"{entry[0]}: {entry[2]}{entry[1]}"
    for i in range(max(len(saved), len(wanted))):
        a, b = (entries[i] if i < len(entries) else None for entries in (saved, wanted))
        if a != b:
            raise ValueError(
                f"the checkpoint {folder} is of a different model: its array {i} is {show(a)}, and that of `like` is {show(b)}."
            )


def gather(text: str) -> list[str]:
    """The texts of all processes."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray([mine.size], np.int32))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: mine.size] = mine
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [rows[i, :size].tobytes().decode() for i, size in enumerate(sizes)]


def agree(*numbers: int) -> tuple[int, ...]:
    """The numbers of process 0."""
    if jax.process_count() == 1:
        return numbers
    return tuple(int(n) for n in multihost_utils.broadcast_one_to_all(np.asarray(numbers, np.int32)))
