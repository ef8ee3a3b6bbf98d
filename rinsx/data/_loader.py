"""Batches: windows or pairs in a shuffled order, cut among processes, as grain datasets whose state is one integer."""

import operator
import sys
from collections.abc import Sequence
from typing import final, SupportsIndex

import grain
import jax
import numpy as np

from .._check import at_least
from ._mixture import Mixture
from ._pairs import Pairs
from ._windows import Batch, Windows


def batches(
    windows: Windows | Pairs | Mixture,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    shard: tuple[int, int] | None = None,
    prefetch: int = 0,
    threads: int = 1,
) -> grain.IterDataset:
    """Batches to train on, deterministic, shuffled anew in every epoch.

    Batch `s` is a function of the arguments and of `s`. So the state of an iterator is one integer: `get_state()` gives it, and
    `set_state(state)` on a new iterator goes on with the batch that would have come. Epochs follow each other without a
    gap: a batch can have the end of one and the beginning of the next. Only with `epochs` is something dropped: the windows
    after the last full batch.

    Of pairs, what is random in a row, which is crop, flip, and template or caption, comes from `seed`, the number of the
    epoch and the number of the row. It is drawn with `shuffle=False` too.

    With several processes each one gets its rows of every batch. Put together in the order of the processes, they are the
    batch of one process.

    !!! example

        ```python
        import rinsx as rx

        tokens = rx.data.tokenize(rx.data.stdlib(), rx.data.Bytes())
        dataset = rx.data.batches(rx.data.Windows(tokens, 128), 4, seed=1)
        iterator = iter(dataset)
        batch = next(iterator)
        batch["tokens"].shape  # (4, 128)

        state = iterator.get_state()
        again = iter(dataset)
        again.set_state(state)
        assert (next(again)["tokens"] == next(iterator)["tokens"]).all()
        ```

    **Arguments:**

    - `windows`: [`rinsx.data.Windows`][], [`rinsx.data.Pairs`][], or the result of [`rinsx.data.mix`][].
    - `batch_size`: the rows of a batch, over all processes.
    - `seed`: an integer from 0, for the order and for what pairs draw. Runs with the same seed see the same data.
    - `shuffle`: whether the windows are shuffled; otherwise they come in order.
    - `epochs`: how often all windows are gone through; `None` is without end.
    - `shard`: `(index, count)`, which of how many processes this one is; by default as JAX says. `count` must divide
        `batch_size`.
    - `prefetch`: how many batches are prepared ahead of time in the background, one after the other; 0 is none. So up to
        `prefetch + 1` are in memory: these, and the one that was handed out. The state of an iterator counts only what was
        handed out. Call the iterator's `close()` when done.
    - `threads`: how many threads decode the images of a batch, which takes no more memory. Batches are the same. Windows of
        tokens have nothing to decode.

    **Returns:**

    A `grain.IterDataset` of dicts of arrays: `[batch_size // count, length]`, as in [`rinsx.data.Windows`][]; or
    `[batch_size // count, ...]`, as in [`rinsx.data.Pairs`][].

    **Raises:**

    `TypeError` for a source of images without [`rinsx.data.Pairs`][]. `ValueError` if a number is out of range, or not one
    batch is full.
    """
    if not isinstance(windows, Windows | Pairs | Mixture):
        raise TypeError(f"`windows` must be `rx.data.Windows`, `rx.data.Pairs` or a mixture of these; got {windows!r}")
    if seed < 0:
        raise ValueError(f"`seed` must be an integer from 0; got {seed}")
    if epochs is not None and epochs < 1:
        raise ValueError(f"`epochs` must be at least 1, or None for no end; got {epochs}")
    rows = share(batch_size, shard)
    if epochs is not None and epochs * len(windows) < batch_size:
        raise ValueError(
            f"{windows!r} has {len(windows)} {_called(windows)}: {epochs} epoch(s) do not fill one batch of {batch_size}"
        )
    steps = sys.maxsize // batch_size if epochs is None else epochs * len(windows) // batch_size
    _check_threads(windows, threads)
    return _dataset(_Training(windows, batch_size, rows, seed, shuffle, steps, threads), prefetch)


def evaluation(
    windows: Windows | Pairs,
    batch_size: int,
    *,
    shard: tuple[int, int] | None = None,
    prefetch: int = 0,
    threads: int = 1,
) -> grain.IterDataset:
    """Batches to evaluate on: every window or pair once, in order. Of pairs nothing is random.

    All batches have the same shape. The last one is filled up with rows of weight 0.

    !!! example

        ```python
        import rinsx as rx

        tokens = rx.data.tokenize(rx.data.documents(["some text", "and more"]), rx.data.Bytes())
        windows = rx.data.Windows(tokens, 5, drop_last=False)
        weight = sum(batch["weights"].sum() for batch in rx.data.evaluation(windows, 3))
        weight == tokens.number_of_tokens  # True
        ```

    **Arguments:**

    - `windows`: [`rinsx.data.Windows`][], with `drop_last=False` where all tokens are to count; or [`rinsx.data.Pairs`][].
    - `batch_size`, `shard`, `prefetch`, `threads`: as in [`rinsx.data.batches`][].

    **Returns:**

    A `grain.IterDataset` of as many batches as it takes.
    """
    if not isinstance(windows, Windows | Pairs):
        raise TypeError(
            f"`windows` must be `rx.data.Windows` or `rx.data.Pairs`: a mixture is evaluated part by part; got {windows!r}"
        )
    _check_threads(windows, threads)
    return _dataset(_Evaluation(windows, batch_size, share(batch_size, shard), threads), prefetch)


def share(batch_size: int, shard: tuple[int, int] | None) -> range:
    """The rows of a global batch that belong to this process."""
    index, count = (jax.process_index(), jax.process_count()) if shard is None else shard
    if not 0 <= index < count:
        raise ValueError(f"`shard` must be (index, count) with 0 <= index < count; got {shard}")
    if batch_size < 1 or batch_size % count:
        raise ValueError(f"`batch_size` must be a positive multiple of the {count} processes; got {batch_size}")
    return range(index * batch_size // count, (index + 1) * batch_size // count)


def _check_threads(windows: Windows | Pairs | Mixture, threads: int) -> None:
    at_least(1, threads=threads)
    if threads > 1 and _called(windows) == "windows":
        raise ValueError(f"`threads` decode images, of which windows of tokens have none; got threads={threads}")


def _dataset(source: "_Training | _Evaluation", prefetch: int) -> grain.IterDataset:
    if prefetch < 0:
        raise ValueError(f"`prefetch` must be 0 or a number of batches; got {prefetch}")
    # One batch at a time is prepared: what is parallel is within it.
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return grain.MapDataset.source(source).to_iter_dataset(options)


@final
class _Training:
    """A sequence of batches. Element `s` is computed from `s` alone."""

    def __init__(
        self,
        windows: Windows | Pairs | Mixture,
        batch_size: int,
        rows: range,
        seed: int,
        shuffle: bool,
        steps: int,
        threads: int,
    ):
        self._windows = windows
        self._batch_size = batch_size
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._steps = steps
        self._threads = threads

    def __len__(self) -> int:
        return self._steps

    def __repr__(self) -> str:
        return f"batches({self._windows!r}, {self._batch_size})"

    def __getitem__(self, index: SupportsIndex) -> Batch:
        begin = operator.index(index) * self._batch_size
        chosen = [_pick(self._windows, begin + row, self._seed, self._shuffle, ()) for row in self._rows]
        return _gather(chosen, self._threads)


@final
class _Evaluation:
    def __init__(self, windows: Windows | Pairs, batch_size: int, rows: range, threads: int):
        self._windows = windows
        self._batch_size = batch_size
        self._rows = rows
        self._threads = threads

    def __len__(self) -> int:
        return -(-len(self._windows) // self._batch_size)

    def __repr__(self) -> str:
        return f"evaluation({self._windows!r}, {self._batch_size})"

    def __getitem__(self, index: SupportsIndex) -> Batch:
        begin = operator.index(index) * self._batch_size
        index = begin + np.array(self._rows)
        beyond = index >= len(self._windows)
        if isinstance(self._windows, Pairs):
            # No image is decoded, or counted, to fill up a batch.
            batch = self._windows.take(index[~beyond], threads=self._threads)
            blank = self._windows.blank(int(beyond.sum()))
            return {key: np.concatenate([value, blank[key]]) for key, value in batch.items()} if beyond.any() else batch
        batch = self._windows.take(np.where(beyond, 0, index))
        batch["weights"][beyond] = 0
        return batch


# A window or pair that was picked: of what, its number, and what its row draws from.
_Picked = tuple[Windows | Pairs, int, tuple[int, ...]]


def _pick(windows: Windows | Pairs | Mixture, index: int, seed: int, shuffle: bool, path: tuple[int, ...]) -> _Picked:
    """Which window or pair comes at place `index` of the endless order."""
    if isinstance(windows, Mixture):
        part, index = windows.locate(index)
        return _pick(windows.parts[part], index, seed, shuffle, (*path, part))
    epoch, index = divmod(index, len(windows))
    if shuffle and len(windows) > 1:
        # Mixed, not added: with `seed + epoch`, epoch 1 of one seed would be epoch 0 of the next.
        mixed = int(np.random.SeedSequence([seed, epoch, *path]).generate_state(1)[0])
        index = grain.experimental.index_shuffle(index, max_index=len(windows) - 1, seed=mixed, rounds=4)
    return windows, index, (seed, epoch, *path)


def _called(windows: Windows | Pairs | Mixture) -> str:
    """What the elements are called."""
    while isinstance(windows, Mixture):
        windows = windows.parts[0]
    return "pairs" if isinstance(windows, Pairs) else "windows"


def _gather(chosen: Sequence[_Picked], threads: int) -> Batch:
    """The rows of a batch, those of each corpus read at once."""
    rows: dict[int, list[int]] = {}
    for row, (windows, _, _) in enumerate(chosen):
        rows.setdefault(id(windows), []).append(row)
    batch: Batch = {}
    for group in rows.values():
        windows, indices = chosen[group[0]][0], [chosen[row][1] for row in group]
        if isinstance(windows, Pairs):
            part = windows.take(indices, [chosen[row][2] for row in group], threads=threads)
        else:
            part = windows.take(indices)
        if len(rows) == 1:
            return part
        # Images are large: a part is put in its place before the next one is read.
        for key in tuple(part):
            value = part.pop(key)
            if key not in batch:
                batch[key] = np.empty((len(chosen), *value.shape[1:]), value.dtype)
            batch[key][group] = value
    return batch
