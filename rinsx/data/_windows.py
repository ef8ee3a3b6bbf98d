"""Windows: a corpus cut into rows of one length, each element computed from its number alone."""

import operator
from collections.abc import Sequence
from typing import final, SupportsIndex

import numpy as np

from ._tokens import Tokens


Batch = dict[str, np.ndarray]


@final
class Windows:
    """All tokens of a corpus, cut into windows of `length` predictions: a sequence with random access.

    The spans of the corpus are laid end to end and cut every `length` tokens, so that every token is the target of
    exactly one prediction. The input of a target is the token before it in its span; that of a span's first token is
    `end`. So a document begins with `end` as an input, and closes with `end` as a target, which stands for no bytes.

    Element `i` is a dict of arrays `[length]`:

    - `tokens`, int32: the inputs.
    - `targets`, int32: what is to be predicted.
    - `segments`, int32: the number of the span within the window, from 0. Attention is only within equal segments.
    - `positions`, int32: the place within the span, counted from its start or from that of the window, whichever is later.
    - `weights`, float32: 1 where the target counts, 0 where it is padding.

    !!! example

        ```python
        import rinsx as rx

        tokens = rx.data.tokenize(rx.data.documents(["abc", "de"]), rx.data.Bytes())
        windows = rx.data.Windows(tokens, 5, drop_last=False)
        len(windows)  # 2, for 7 tokens
        windows[0]["tokens"]  # array([256, 97, 98, 99, 256])
        windows[0]["targets"]  # array([97, 98, 99, 256, 100])
        windows[0]["segments"]  # array([0, 0, 0, 0, 1])
        windows[1]["weights"]  # array([1., 1., 0., 0., 0.])
        ```

    **Attributes:**

    - `tokens`: the [`rinsx.data.Tokens`][].
    - `length`: how many predictions a window has.
    - `vocab_size`, `end`: those of the tokeniser.
    """

    def __init__(self, tokens: Tokens, length: int, *, drop_last: bool = True):
        """**Arguments:**

        - `tokens`: the [`rinsx.data.Tokens`][].
        - `length`: how many predictions a window has.
        - `drop_last`: whether the tokens after the last full window are left out, as in training. Otherwise, as
            in evaluation, they are a window filled up with targets of weight 0.

        **Raises:**

        `ValueError` if the corpus is shorter than one window, with `drop_last`. When an element is made that has a
        token beyond the vocabulary, a `ValueError` that names its document and place.
        """
        if length < 1:
            raise ValueError(f"`length` must be at least 1; got {length}")
        total = tokens.number_of_tokens
        if total < length and drop_last:
            raise ValueError(
                f"{tokens.name}: the corpus has {total} tokens, fewer than one window of {length}; take shorter windows, more "
                "text, or drop_last=False"
            )
        self.tokens = tokens
        self.length = length
        self.vocab_size = tokens.vocab_size
        self.end = tokens.end
        self._count = total // length if drop_last else -(-total // length)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"Windows({self._count} of {self.length} tokens, {self.tokens.name})"

    def __getitem__(self, index: SupportsIndex) -> Batch:
        return {key: value[0] for key, value in self.take([operator.index(index)]).items()}

    def take(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Several windows at once.

        **Arguments:**

        - `indices`: `n` numbers of windows, from 0 to below `len(windows)`.

        **Returns:**

        A dict of arrays `[n, length]`.
        """
        index = np.asarray(indices, np.int64)
        wrong = index[(index < 0) | (index >= self._count)]
        if wrong.size:
            raise IndexError(f"window {wrong[0]} of {self._count}; they are numbered from 0 to {self._count - 1}")
        source, offsets = self.tokens, self.tokens.offsets
        total = offsets[-1]
        begin = index * self.length
        # The window's first span, and those that start within the window.
        low = np.searchsorted(offsets, begin, "right")
        starting = np.maximum(np.searchsorted(offsets, np.minimum(begin + self.length, total), "left") - low, 0)
        rows = np.repeat(np.arange(len(index)), starting)
        starts = np.arange(starting.sum()) + np.repeat(low - np.cumsum(starting) + starting, starting)
        segments = np.zeros((len(index), self.length), np.int32)
        segments[rows, offsets[starts] - begin[rows]] = 1
        place = begin[:, None] + np.arange(self.length)
        padding = place >= total
        # Padding is a segment of its own, so that nothing attends to it.
        segments[np.arange(len(index))[:, None], np.argmax(padding, axis=1)[:, None]] |= padding.any(axis=1)[:, None]
        np.cumsum(segments, axis=1, out=segments)
        span = np.minimum(low[:, None] - 1 + segments, len(source) - 1)
        inside = np.minimum(place, total - 1) - offsets[span]
        begins = (inside == 0) | padding
        where = source.spans[span, 0] + inside
        targets, inputs = source.tokens[where], source.tokens[np.maximum(where - 1, 0)]
        self._check(targets, ~padding, span, inside)
        self._check(inputs, ~begins, span, inside - 1)
        first = np.where(padding, total, np.maximum(offsets[span], begin[:, None]))
        return {
            "tokens": np.where(begins, source.end, inputs).astype(np.int32),
            "targets": np.where(padding, source.end, targets).astype(np.int32),
            "segments": segments,
            "positions": (place - first).astype(np.int32),
            "weights": (~padding).astype(np.float32),
        }

    def _check(self, ids: np.ndarray, used: np.ndarray, span: np.ndarray, inside: np.ndarray) -> None:
        """Finds a token beyond the vocabulary, in arrays `[n, length]` of tokens and their places in the spans."""
        wrong = np.argwhere(((ids < 0) | (ids >= self.tokens.vocab_size)) & used)
        if wrong.size:
            at = tuple(wrong[0])
            document = self.tokens.documents[span[at]]
            # Counted from the start of the document, even where the span is a piece of it.
            offset = self.tokens.spans[span[at], 0] + inside[at] - self.tokens.starts[document]
            raise ValueError(
                f"{self.tokens.name}: token {offset} of document {document} is {ids[at]}, beyond the vocabulary of "
                f"{self.tokens.vocab_size} tokens"
            )
