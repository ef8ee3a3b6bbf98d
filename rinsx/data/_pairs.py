"""Pairs of images and texts: a sequence with random access, each row computed from its number and what it draws from."""

import logging
import operator
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final, SupportsIndex

import numpy as np

from .._check import at_least
from ._captions import Captions
from ._decode import BrokenImage, pillow
from ._images import AbstractImages, check_label, Example
from ._pixels import Pixels


_logger = logging.getLogger("rinsx.data")
# How many rows may lack a text before it is said that there are none.
_LOOK = 100
# How many rows a thread takes at once where all are gone through.
_BLOCK = 256


@final
class Pairs:
    """Images with captions, labels, or both: a sequence with random access. It is what [`rinsx.data.batches`][] and
    [`rinsx.data.evaluation`][] make batches of.

    Element `i` is a dict:

    - `images`, float32 `[height, width, 3]`: as [`rinsx.data.Pixels`][] makes them.
    - `tokens`, int32 `[context]`: as [`rinsx.data.Captions`][] makes them; only where there are captions.
    - `labels`, int32 `[]`: only where the source has labels.
    - `weights`, float32 `[]`: 1, or 0 where the row does not count.

    A row does not count if its image is broken, which then is all zeros; or if its caption is empty: there is none, or it
    has only white space. Nothing of this stops a run. It is counted, by kind, in `counts`, and the logger `rinsx.data`
    names each such row at the level DEBUG. What is wrong with the layout is an error that names the place.

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
            look = range(min(len(source), _LOOK))
            if first.text is None and all(source.example(i).text is None for i in look):
                raise ValueError(
                    f"{source!r}: none of the first {len(look)} rows has a text; say where the captions are, or make them "
                    "from labels, with `templates`"
                )
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
        return Pairs(self.source.subset(indices), self.pixels, self.captions, labels=self.labels)

    def take(
        self, indices: Sequence[int] | np.ndarray, draws: Sequence[tuple[int, ...]] | None = None
    ) -> dict[str, np.ndarray]:
        """Several rows at once.

        **Arguments:**

        - `indices`: `n` numbers of rows, from 0 to below `len(pairs)`.
        - `draws`: for each row the integers, from 0, that with its number decide what is drawn: template, flip and crop.
            `None` is for evaluation: the first template, no flip, and the middle.

        **Returns:**

        A dict of arrays `[n, ...]`.
        """
        batch, counts = self._take(np.asarray(indices, np.int64), draws)
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
        at_least(1, threads=threads)
        blocks = [np.arange(low, min(low + _BLOCK, len(self))) for low in range(0, len(self), _BLOCK)]
        total: Counter[str] = Counter()
        with ThreadPoolExecutor(threads) as pool:
            for counts in pool.map(lambda block: self._take(block, None)[1], blocks):
                total.update(counts)
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

    def _take(
        self, index: np.ndarray, draws: Sequence[tuple[int, ...]] | None
    ) -> tuple[dict[str, np.ndarray], Counter[str]]:
        wrong = index[(index < 0) | (index >= len(self))]
        if wrong.size:
            raise IndexError(f"row {wrong[0]} of {len(self)}; they are numbered from 0 to {len(self) - 1}")
        if draws is not None and len(draws) != len(index):
            raise ValueError(f"`draws` must have an entry for each row; got {len(draws)} for {len(index)} rows")
        counts: Counter[str] = Counter()
        batch = self.blank(len(index))
        whole = np.zeros(len(index), bool)
        pixels = np.zeros((len(index), *self.pixels.size, 3), np.uint8)
        # In the order of the source, so that what lies side by side is read together.
        for row in np.argsort(index, kind="stable").tolist():
            number = int(index[row])
            random = None if draws is None else np.random.default_rng([*draws[row], number])
            example = self.source.example(number)
            label = self._label(example, number)
            if self.labels:
                batch["labels"][row] = label
            counted = True
            if self.captions is not None:
                tokens, found = self._tokens(example, label, random)
                if tokens is None:
                    counted = False
                    _logger.debug("%s: the caption is empty", self.source.place(number))
                else:
                    batch["tokens"][row] = tokens
                counts.update(found)
            try:
                pixels[row], found = self.pixels.read(example.image, random)
                whole[row] = True
            except BrokenImage as error:
                found = ["broken images"]
                _logger.debug("%s: the image is broken: %s", self.source.place(number), error)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{self.source.place(number)}: {error}") from None
            counts.update(["rows", *found])
            batch["weights"][row] = counted and whole[row]
        batch["images"] = self.pixels.normalise(pixels)
        batch["images"][~whole] = 0
        return batch, counts

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
        self, example: Example, label: int, random: np.random.Generator | None
    ) -> tuple[np.ndarray | None, list[str]]:
        if self._classes is not None:
            tokens, found = self._classes
            which = 0 if random is None else int(random.integers(tokens.shape[1]))
            return tokens[label, which], found[label][which]
        assert self.captions is not None
        if example.text is None or not example.text.strip():
            return None, ["empty captions"]
        return self.captions.read(example.text)
