"""Tokens of a corpus: in memory, or in a file that is mapped into memory."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from jaxtyping import Int32, Int64, Integer

from ._tokenizers import AbstractTokenizer


_BLOCK = 2**22


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tokens:
    """The tokens of a corpus, as spans of one array. Made by [`rinsx.data.tokenize`][], [`rinsx.data.split`][] and `Tokens.of`.

    A span is a whole document, its `end` token included, or a piece of one that a split has left. Spans are views: nothing
    is copied. `len(tokens)` is the number of spans, `tokens[i]` are the tokens of one.

    !!! example

        ```python
        import numpy as np
        import rinsx as rx

        tokens = rx.data.tokenize(rx.data.documents(["one", "two"]), rx.data.Bytes())
        len(tokens), tokens.number_of_tokens, tokens.number_of_bytes  # (2, 8, 6)
        tokens[1]  # array([116, 119, 111, 256], dtype=uint16)

        # Integers that were tokenised elsewhere.
        tokens = rx.data.Tokens.of([np.array([3, 1, 256]), np.array([2, 256])], rx.data.Bytes())
        ```

    **Attributes:**

    - `tokens`: the array, mapped into memory where it is a file: unsigned integers.
    - `spans`: int64 `[n, 2]`, where each span starts and stops in the array. None is empty.
    - `documents`: int64 `[n]`, the number of the document that each span comes from.
    - `starts`: int64, where each document starts in the array, those of which no span is left included.
    - `vocab_size`, `end`, `bytes_per_token`: those of the tokeniser.
    - `name`: what the tokens are of, for messages.
    """

    tokens: Integer[np.ndarray, " tokens"]
    spans: Int64[np.ndarray, "spans 2"]
    documents: Int64[np.ndarray, " spans"]
    starts: Int64[np.ndarray, " documents"]
    vocab_size: int
    end: int
    bytes_per_token: Int32[np.ndarray, " vocab"]
    name: str

    @classmethod
    def of(cls, ids: Sequence[Any], tokenizer: AbstractTokenizer, name: str = "the tokens") -> "Tokens":
        """Tokens that were made elsewhere, held in memory.

        **Arguments:**

        - `ids`: for each document an array of integers, at least one. They are taken as they are: where a document ends with
            `end`, that is in the array. They are not compared with the vocabulary here; [`rinsx.data.Windows`][] does that.
        - `tokenizer`: what made them.
        - `name`: what they are, for messages.

        **Returns:**

        `Tokens`.
        """
        arrays = [np.asarray(array) for array in ids]
        if not arrays:
            raise ValueError(f"{name}: the corpus is empty: `ids` holds no documents")
        for index, array in enumerate(arrays):
            if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
                raise ValueError(
                    f"{name}: document {index} must be an array of one or more integers, with one axis; got {array.dtype} of "
                    f"shape {array.shape}"
                )
        return cls.contiguous(np.concatenate(arrays), np.cumsum([0, *map(len, arrays)]), tokenizer, name)

    @classmethod
    def contiguous(cls, tokens: np.ndarray, offsets: np.ndarray, tokenizer: AbstractTokenizer, name: str) -> "Tokens":
        """Documents that fill an array one after the other.

        **Arguments:**

        - `tokens`: the array.
        - `offsets`: integers `[n + 1]`, where each of `n` documents starts, and the end of the last.
        - `tokenizer`: what made them.
        - `name`: what they are, for messages.

        **Returns:**

        `Tokens`.
        """
        offsets = np.asarray(offsets, np.int64)
        spans = np.stack([offsets[:-1], offsets[1:]], axis=1)
        which = np.arange(len(spans), dtype=np.int64)
        bytes_per_token = np.asarray(tokenizer.bytes_per_token, np.int32)
        return cls(tokens, spans, which, offsets[:-1], tokenizer.vocab_size, tokenizer.end, bytes_per_token, name)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> np.ndarray:
        start, stop = self.spans[index]
        return self.tokens[start:stop]

    def __repr__(self) -> str:
        return f"Tokens({self.name}: {self.number_of_tokens} tokens in {len(self)} spans)"

    @functools.cached_property
    def offsets(self) -> Int64[np.ndarray, " edges"]:
        """int64 `[n + 1]`: where each span starts when all are laid end to end, and the length of the whole."""
        lengths = self.spans[:, 1] - self.spans[:, 0]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    @property
    def number_of_tokens(self) -> int:
        """How many tokens there are in all spans, `end` tokens included."""
        return int(self.offsets[-1])

    @functools.cached_property
    def number_of_bytes(self) -> int:
        """How many UTF-8 bytes of text the tokens stand for. Reads them all, the first time."""
        total = 0
        # Documents side by side are one run: a corpus of a million documents is read in large blocks.
        edges = np.flatnonzero(self.spans[1:, 0] != self.spans[:-1, 1]) + 1
        runs = zip(self.spans[np.concatenate([[0], edges]), 0], self.spans[np.concatenate([edges, [len(self)]]) - 1, 1])
        for start, stop in runs:
            for low in range(start, stop, _BLOCK):
                ids = self.tokens[low : min(low + _BLOCK, stop)]
                total += int(self.bytes_per_token[ids].sum(dtype=np.int64))
        return total

    def subset(self, indices: Any) -> "Tokens":
        """Some of the spans.

        **Arguments:**

        - `indices`: their numbers, in the order wanted.

        **Returns:**

        `Tokens` over the same array.
        """
        indices = np.asarray(indices, np.int64)
        return dataclasses.replace(self, spans=self.spans[indices], documents=self.documents[indices])
