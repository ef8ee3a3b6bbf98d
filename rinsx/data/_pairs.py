"""Pairs of images and texts: a sequence with random access, each row computed from its number and what it draws from."""

import copy
import logging
import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final, NamedTuple, SupportsIndex, TypeVar

import numpy as np

from .._check import at_least
from ._captions import Captions
from ._decode import BrokenImage, pillow
from ._images import AbstractImages, captions_in, check_label, check_texts, Example
from ._pixels import Pixels


_logger = logging.getLogger("rinsx.data")
# How many rows a thread takes at once. So few that threads are at work on neighbours, which parquet reads together.
_PIECE = 8
_X = TypeVar("_X")


@final
class Pairs:
    """Images with captions, labels, or both: a sequence with random access. It is what [`rinsx.data.batches`][] and
    [`rinsx.data.evaluation`][] make batches of.

    Element `i` is a dict:

    - `images`, float32 `[height, width, 3]`: as [`rinsx.data.Pixels`][] makes them.
    - `tokens`, int32 `[context]`: as [`rinsx.data.Captions`][] makes them; only where there are captions.
    - `labels`, int32 `[]`: only where the source has labels.
    - `weights`, float32 `[]`: 1, or 0 where the row does not count.

    Where an image has several captions, one is drawn in training, and in evaluation it is the first.
    [`rinsx.data.all_captions`][] gives all of them. What is drawn of an image does not depend on captions.

    A row does not count if its image is broken, which then is all zeros; or if its caption is empty: there is none, or it
    has only white space. Of several captions the empty ones are passed over. Nothing of this stops a run. It is counted, by
    kind, in `counts`, and the logger `rinsx.data` names each such row at the level DEBUG. What is wrong with the layout is an
    error that names the place.

    !!! example

        ```python
        import rinsx as rx

        captions = rx.data.Captions(rx.data.Bytes(), 32, templates=("the digit {}.", "a handwritten {}."))
        pairs = rx.data.Pairs(rx.data.digits(), rx.data.Pixels(8), captions)
        pairs[5]["images"].shape  # (8, 8, 3)
        batch = next(iter(rx.data.batches(pairs, 16)))
        batch["tokens"].shape  # (16, 32)
        pairs.counts  # {"rows": 17, "mode L": 17}
        ```

    **Attributes:**

    - `source`, `pixels`: as given.
    - `captions`: as given, with the names of the source where it had none of its own and has templates.
    - `labels`: whether batches have labels.
    """

    def __init__(
        self, source: AbstractImages, pixels: Pixels, captions: Captions | None = None, *, labels: bool | None = None
    ):
        """**Arguments:**

        - `source`: a [`rinsx.data.AbstractImages`][].
        - `pixels`: what is done to images.
        - `captions`: what is done to texts; `None` leaves them out, as for a classifier of images.
        - `labels`: whether batches have labels; by default if the source has them.

        **Raises:**

        `ValueError` if the source lacks what is asked for: texts, labels, or names for the templates.
        """
        pillow()
        if not len(source):
            raise ValueError(f"{source!r} has no rows")
        first = source.example(0)
        self._labelled = first.label is not None
        if labels and not self._labelled:
            raise ValueError(f"{source!r} has no labels; got labels=True")
        self._classes: tuple[np.ndarray, Any] | None = None
        if captions is not None and captions.templates is not None:
            captions = self._with_names(source, captions)
            self._classes = captions.read_classes()
        elif captions is not None:
            check_texts(source)
        self.source = source
        self.pixels = pixels
        self.captions = captions
        self.labels = self._labelled if labels is None else labels
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _with_names(self, source: AbstractImages, captions: Captions) -> Captions:
        if not self._labelled:
            raise ValueError(f"{source!r} has no labels, from which captions by templates are made")
        names = source.names if captions.names is None else captions.names
        if names is None:
            raise ValueError(f"{source!r} has no names of classes for the templates; give Captions(names=...)")
        if source.names is not None and len(names) != len(source.names):
            raise ValueError(f"the captions have {len(names)} names of classes, and {source!r} has {len(source.names)}")
        return Captions(captions.tokenizer, captions.context, captions.templates, names)

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        # For worker processes: a lock cannot be sent to them.
        return {**vars(self), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __repr__(self) -> str:
        return f"Pairs({len(self)} of {self.source!r})"

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        return {key: value[0] for key, value in self.take([operator.index(index)]).items()}

    @property
    def counts(self) -> dict[str, int]:
        """What this process has read so far, by kind. A row that is read twice counts twice; one that a thread has prepared
        counts, though nobody took it yet.

        - `rows`.
        - `broken images`, `empty captions`, `captions cut off`, `captions not UTF-8`.
        - `mode L`, `mode P`, `mode RGBA` and so on: images that were not RGB, by Pillow's name of the mode; of
            arrays, `mode L 16-bit`, `mode RGB float` and so on.
        - `transparency`: images in which a palette or one colour is transparent.
        - `EXIF orientation`, `animation`: images that were turned, or of which the first frame was taken.
        """
        with self._lock:
            return dict(self._counts)

    def subset(self, indices: Any) -> "Pairs":
        """Some of the rows.

        **Arguments:**

        - `indices`: their numbers, in the order wanted.

        **Returns:**

        `Pairs` with counts of its own.
        """
        # Not made anew: what the constructor refuses in the whole can be so in a part.
        part = copy.copy(self)
        part.source = self.source.subset(indices)
        part._counts = Counter()
        return part

    def take(
        self,
        indices: Sequence[int] | np.ndarray,
        draws: Sequence[tuple[int, ...]] | None = None,
        *,
        threads: int = 1,
    ) -> dict[str, np.ndarray]:
        """Several rows at once.

        **Arguments:**

        - `indices`: `n` numbers of rows, from 0 to below `len(pairs)`.
        - `draws`: for each row the integers, from 0, that with its number decide what is drawn: template or caption,
            flip and crop. `None` is for evaluation: the first template or caption, no flip, and the middle.
        - `threads`: how many threads decode. The rows are the same.

        **Returns:**

        A dict of arrays `[n, ...]`.
        """
        at_least(1, threads=threads)
        index = np.asarray(indices, np.int64)
        wrong = index[(index < 0) | (index >= len(self))]
        if wrong.size:
            raise IndexError(f"row {wrong[0]} of {len(self)}; they are numbered from 0 to {len(self) - 1}")
        if draws is not None and len(draws) != len(index):
            raise ValueError(f"`draws` must have an entry for each row; got {len(draws)} for {len(index)} rows")
        batch = self.blank(len(index))

        def read(row: int) -> list[str]:
            found = self._read(int(index[row]), None if draws is None else draws[row])
            if found.image is not None:
                batch["images"][row] = self.pixels.normalise(found.image)
            if found.tokens is not None:
                batch["tokens"][row] = found.tokens
            if self.labels:
                batch["labels"][row] = found.label
            batch["weights"][row] = found.counts
            return found.kinds

        counts: Counter[str] = Counter()
        # In the order of the source, so that what lies side by side is read together.
        for kinds in _each(read, np.argsort(index, kind="stable").tolist(), threads):
            counts.update(kinds)
        with self._lock:
            self._counts.update(counts)
        return batch

    def survey(self, *, threads: int = 1) -> dict[str, int]:
        """Goes through all rows once, as an evaluation does, and counts.

        **Arguments:**

        - `threads`: how many threads decode.

        **Returns:**

        The counts of this pass, as `counts` has them. They are not added to `counts`.
        """
        total: Counter[str] = Counter()
        for kinds in self.each(lambda row: row.kinds, threads):
            total.update(kinds)
        return dict(total)

    @property
    def layout(self) -> dict[str, Any]:
        """What batches must agree in to be mixed, by what it is called."""
        return {
            "images of one size": self.pixels.size,
            "captions of one length": None if self.captions is None else self.captions.context,
            "one vocabulary": None if self.captions is None else self.captions.vocab_size,
            "one `end`": None if self.captions is None else self.captions.end,
            "all labels or none": self.labels,
            "the same classes": self.source.names if self.labels else None,
        }

    def blank(self, rows: int) -> dict[str, np.ndarray]:
        """Rows that do not count, to fill up a batch."""
        batch: dict[str, np.ndarray] = {"images": np.zeros((rows, *self.pixels.size, 3), np.float32)}
        if self.captions is not None:
            batch["tokens"] = np.full((rows, self.captions.context), self.captions.end, np.int32)
        if self.labels:
            batch["labels"] = np.zeros(rows, np.int32)
        batch["weights"] = np.zeros(rows, np.float32)
        return batch

    def each(self, fn: Callable[["Row"], _X], threads: int) -> Iterator[_X]:
        """What a function makes of each row, in order, as for an evaluation. Nothing is added to `counts`."""
        at_least(1, threads=threads)
        return _each(lambda index: fn(self._read(index, None)), range(len(self)), threads)

    def _read(self, index: int, draw: tuple[int, ...] | None) -> "Row":
        example = self.source.example(index)
        label = self._label(example, index)
        kinds = ["rows"]
        captions: tuple[str, ...] = ()
        tokens = None
        if self.captions is not None:
            captions, tokens, found = self._tokens(example, label, index, draw)
            kinds += found
            if tokens is None:
                _logger.debug("%s: the caption is empty", self.source.place(index))
        image = None
        try:
            image, found = self.pixels.read(
                example.image, None if draw is None else np.random.default_rng([*draw, index])
            )
        except BrokenImage as error:
            found = ["broken images"]
            _logger.debug("%s: the image is broken: %s", self.source.place(index), error)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.source.place(index)}: {error}") from None
        counts = image is not None and (self.captions is None or tokens is not None)
        return Row(image, tokens, label, counts, [*kinds, *found], captions)

    def _label(self, example: Example, index: int) -> int:
        """The label of a row, or 0 where the source has none."""
        if (example.label is not None) != self._labelled:
            has = "has a label" if self._labelled else "has none"
            raise ValueError(
                f"{self.source.place(index)}: the label is {example.label}, and the first row {has}; all rows have one or none"
            )
        label = 0 if example.label is None else operator.index(example.label)
        if self._labelled:
            names = self.source.names
            if names is None and self._classes is not None and self.captions is not None:
                names = self.captions.names
            check_label(label, names, index, self.source.place)
        return label

    def _tokens(
        self, example: Example, label: int, index: int, draw: tuple[int, ...] | None
    ) -> tuple[tuple[str, ...], np.ndarray | None, list[str]]:
        """The captions of a row, the tokens of one of them, and what was met."""
        assert self.captions is not None
        try:
            captions = () if self._classes is not None else captions_in(example.text)
        except TypeError as error:
            raise TypeError(f"{self.source.place(index)}: {error}") from None
        several = len(captions) if self._classes is None else self._classes[0].shape[1]
        which = 0
        if draw is not None and several > 1:
            # A generator of its own: what is drawn of the image is the same with other captions, and with none.
            text = np.random.SeedSequence([*draw, index], spawn_key=(1,))
            which = int(np.random.default_rng(text).integers(several))
        if self._classes is not None:
            tokens, found = self._classes
            return captions, tokens[label, which], found[label][which]
        if not captions:
            return captions, None, ["empty captions"]
        return captions, *self.captions.read(captions[which])


class Row(NamedTuple):
    """A row that was read: what becomes of it, whether it counts, what was met, and all of its captions."""

    image: np.ndarray | None
    tokens: np.ndarray | None
    label: int
    counts: bool
    kinds: list[str]
    captions: tuple[str, ...]


def _each(fn: Callable[[int], _X], rows: Sequence[int], threads: int) -> Iterator[_X]:
    """What a function makes of each row, in their order. An error is that of the first row that has one."""
    if threads == 1 or len(rows) <= 1:
        yield from map(fn, rows)
        return
    work = lambda piece: [fn(row) for row in piece]
    # Not the pieces of a whole source at once: each waits with its results until its turn.
    block = 64 * threads * _PIECE
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(rows), block):
            stop = min(start + block, len(rows))
            pieces = [rows[low : min(low + _PIECE, stop)] for low in range(start, stop, _PIECE)]
            for found in pool.map(work, pieces):
                yield from found
