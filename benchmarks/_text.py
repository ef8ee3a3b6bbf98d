"""The text of a comparison: what is trained on, the windows that are evaluated on, and the loss on them."""

import dataclasses
import functools as ft
import glob
import hashlib
import pathlib
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

import rinsx as rx


if TYPE_CHECKING:
    from _arms import Setting


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on, and the windows that are evaluated on: to choose learning rates, to report, and from elsewhere."""

    train: rx.data.Windows
    tune: rx.data.Windows
    report: rx.data.Windows
    elsewhere: rx.data.Windows | None
    fingerprint: str


@ft.cache
def load(setting: "Setting") -> Data:
    """The corpus, tokenised once into the cache."""
    tokenizer = rx.data.Bytes()
    source = _source(setting.corpus, setting.field)
    tokens = rx.data.tokenize(source, tokenizer, setting.cache)
    by: Any = "document" if setting.chunk is None else setting.chunk
    train, held = rx.data.split(tokens, setting.held_out, by=by, seed=0)
    report, tune = rx.data.split(held, "1/2", by="document", seed=1)
    elsewhere = None
    digest = hashlib.sha256(tokens.tokens.tobytes())
    if setting.elsewhere:
        other = rx.data.tokenize(_source(setting.elsewhere, setting.field), tokenizer, setting.cache)
        elsewhere = rx.data.Windows(other, setting.length, drop_last=False)
        digest.update(other.tokens.tobytes())
    whole = ft.partial(rx.data.Windows, length=setting.length, drop_last=False)
    return Data(
        rx.data.Windows(train, setting.length),
        whole(tune),
        whole(report),
        elsewhere,
        digest.hexdigest(),
    )


def _source(paths: tuple[str, ...], field: str) -> rx.data.AbstractSource:
    if not paths:
        return rx.data.stdlib()
    files = [file for path in paths for file in _files(path)]
    lines = [file for file in files if {".jsonl", ".ndjson"} & set(file.suffixes)]
    if not lines:
        return rx.data.text(*paths)
    if others := [file for file in files if file not in lines]:
        pattern = str(lines[0].with_name("*" + "".join(lines[0].suffixes)))
        raise ValueError(
            f"a corpus is of JSON lines or of text files, not of both; got {lines[0]} and {others[0]}: name files of one kind, as "
            f"{pattern!r} does"
        )
    return rx.data.jsonl(*lines, field=field)


def _files(path: str) -> list[pathlib.Path]:
    """What a path, folder or pattern stands for, as `rx.data.text` reads it; a path by itself where there is nothing."""
    folder = pathlib.Path(path)
    if folder.is_dir():
        shown = lambda file: not any(part[0] == "." for part in file.relative_to(folder).parts)
        return sorted(file for file in folder.rglob("*") if file.is_file() and shown(file))
    found = [] if folder.exists() else glob.glob(path, recursive=True)
    return [file for file in map(pathlib.Path, found) if file.is_file()] or [folder]


def nats_and_bytes(model, batch, key):
    """The loss of each row, and how many bytes of text it stands for. One function for all, so that it is compiled once an arm."""

    def row(batch):
        rows = {name: x[None] for name, x in batch.items() if name != "bytes"}
        return rx.models.DecoderLM.loss(model, rows, key)[0], jnp.sum(batch["bytes"])

    return jax.vmap(row)(batch)


def spread(windows: rx.data.Windows, number: int) -> np.ndarray:
    """Which windows are evaluated on: evenly spaced, so that every part of the text is heard."""
    return np.unique(np.linspace(0, len(windows) - 1, min(number, len(windows))).astype(int))


def documents(windows: rx.data.Windows, number: int) -> np.ndarray:
    """The document of each window that is evaluated on: where it has several, that of its middle."""
    tokens = windows.tokens
    middle = spread(windows, number) * windows.length + windows.length // 2
    span = np.searchsorted(tokens.offsets, np.minimum(middle, tokens.number_of_tokens - 1), "right") - 1
    return tokens.documents[span]


class Evaluator:
    """Adds up nats and bytes of each of a fixed set of windows."""

    def __init__(self, windows: rx.data.Windows, number: int):
        chosen = spread(windows, number)
        size = 16
        self.number = len(chosen)
        self.batches = []
        for i in range(0, len(chosen), size):
            part = chosen[i : i + size]
            batch = windows.take(np.resize(part, size))
            # What fills up the last batch counts nothing.
            batch["weights"][len(part) :] = 0
            batch["bytes"] = windows.tokens.bytes_per_token[batch["targets"]] * batch["weights"].astype(np.int32)
            self.batches.append(batch)

    def __call__(
        self, model, depths: tuple[int, ...] | None, few: int | None = None
    ) -> dict[Any, tuple[np.ndarray, np.ndarray]]:
        """Nats and bytes of each window, at each depth (or at none, for a model without a loop)."""
        batches = self.batches if few is None else self.batches[:: max(len(self.batches) // few, 1)]
        rounds = None if depths is None else {"r": depths}
        found = rx.train.evaluate(model, nats_and_bytes, batches, rounds=rounds)
        flat = lambda x: x.reshape(-1)[: self.number].astype(np.float64)
        return {(key[0] if key else None): (flat(t.total), flat(t.weight)) for key, t in found.items()}


def bits_per_byte(nats: np.ndarray, size: np.ndarray) -> float:
    """Bits per byte of text."""
    return float(nats.sum() / size.sum() / np.log(2))
