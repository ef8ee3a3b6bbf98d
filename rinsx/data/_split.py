"""Splitting a corpus into a part to train on and a part that is held out."""

import dataclasses
from fractions import Fraction
from typing import Any, cast, Literal, TypeVar

import numpy as np

from .._check import rational
from ._images import AbstractImages
from ._pairs import Pairs
from ._tokens import Tokens


_Rows = TypeVar("_Rows", Tokens, AbstractImages, Pairs)


def split(
    tokens: _Rows,
    fraction: Fraction | int | float | str = "1/20",
    *,
    by: Literal["document"] | int = "document",
    seed: int = 0,
) -> tuple[_Rows, _Rows]:
    """Splits a corpus, or images, in two. Every token is in exactly one part, and nothing is copied.

    - `by="document"`: each document is wholly in one part. Held out are `fraction` of the documents, rounded, and at least one.
        Which ones depends on `seed` and on the number of documents.
    - `by=n`: each document is cut into chunks of `n` tokens, the last one shorter, and loses `fraction` of them. Where that is no
        integer, it is rounded up or down at random, so that the expected number is exact: a document of 50 chunks loses 1%
        of them as one chunk with probability 1/2. Which ones depends on `seed` and on the document's number and length,
        not on other documents. Chunks side by side stay one piece. A piece is a span of its own: no
        window crosses the hole beside it, and its first token is predicted from `end`.

    Images, whether a source or pairs, are split like documents: by row. What is split can be in classes; their shares are
    not kept exact.

    A part can be split again, into training, validation and test: documents that it has pieces of stay together.

    !!! example

        ```python
        import rinsx as rx

        tokens = rx.data.tokenize(rx.data.documents(["one " * 50, "two " * 50, "three " * 50]), rx.data.Bytes())
        train, held_out = rx.data.split(tokens, "1/3")
        len(train), len(held_out)  # (2, 1)
        train, held_out = rx.data.split(tokens, "1/10", by=16)
        train.number_of_tokens + held_out.number_of_tokens == tokens.number_of_tokens  # True
        ```

    **Arguments:**

    - `tokens`: the [`rinsx.data.Tokens`][], or a [`rinsx.data.AbstractImages`][], or [`rinsx.data.Pairs`][].
    - `fraction`: how much is held out, above 0 and below 1.
    - `by`: `"document"`, or a number of tokens; for images only the first, which is a row.
    - `seed`: an integer from 0; the same one gives the same split.

    **Returns:**

    The part to train on, and the part that is held out: two [`rinsx.data.Tokens`][] over the same array, or two sources or
    pairs over the same images.

    **Raises:**

    `ValueError` if either part would be empty.
    """
    share = rational("fraction", fraction)
    if not 0 < share < 1:
        raise ValueError(f"`fraction` must be above 0 and below 1; got {fraction!r}")
    if seed < 0:
        raise ValueError(f"`seed` must be an integer from 0; got {seed}")
    if isinstance(tokens, AbstractImages | Pairs):
        if by != "document":
            raise ValueError(f"images are split by row; got by={by!r}, leave it out")
        held_out = _held_out(np.arange(len(tokens)), share, seed, f"{tokens!r}: {len(tokens)} row(s)", "")
        return tokens.subset(np.flatnonzero(~held_out)), tokens.subset(np.flatnonzero(held_out))
    if by == "document":
        return cast(Any, _by_document(tokens, share, seed))
    if isinstance(by, str) or by < 1:
        raise ValueError(f"`by` must be 'document' or a number of tokens, at least 1; got {by!r}")
    return cast(Any, _by_chunk(tokens, share, by, seed))


def _by_document(tokens: Tokens, share: Fraction, seed: int) -> tuple[Tokens, Tokens]:
    documents = np.unique(tokens.documents)
    what = f"{tokens.name}: {len(documents)} document(s)"
    held_out = documents[_held_out(documents, share, seed, what, "; split by chunks, by=n")]
    mask = np.isin(tokens.documents, held_out)
    return tokens.subset(np.flatnonzero(~mask)), tokens.subset(np.flatnonzero(mask))


def _held_out(rows: np.ndarray, share: Fraction, seed: int, what: str, advice: str) -> np.ndarray:
    """Which rows are held out, as a mask."""
    count = max(1, round(len(rows) * share))
    if count == len(rows):
        raise ValueError(f"{what} cannot be split so that {share} are held out and some are left{advice}")
    chosen = np.random.default_rng([seed, 0]).choice(len(rows), count, replace=False)
    mask = np.zeros(len(rows), bool)
    mask[chosen] = True
    return mask


def _by_chunk(tokens: Tokens, share: Fraction, length: int, seed: int) -> tuple[Tokens, Tokens]:
    counts = -(-(tokens.spans[:, 1] - tokens.spans[:, 0]) // length)
    span = np.repeat(np.arange(len(tokens)), counts)
    within = np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = tokens.spans[span, 0] + within * length
    stop = np.minimum(start + length, tokens.spans[span, 1])
    document = tokens.documents[span]

    order = np.argsort(document, kind="stable")
    numbers, first = np.unique(document[order], return_index=True)
    out = np.zeros(len(span), bool)
    for number, chunks in zip(numbers.tolist(), np.split(order, first[1:])):
        random = np.random.default_rng([seed, 1, number])
        whole, rest = divmod(len(chunks) * share.numerator, share.denominator)
        count = whole + int(random.integers(share.denominator) < rest)
        out[random.choice(chunks, count, replace=False)] = True

    parts = []
    for mask, what in ((~out, "left to train on"), (out, "held out")):
        chosen = np.flatnonzero(mask)
        if not chosen.size:
            raise ValueError(
                f"{tokens.name}: with chunks of {length} tokens and a fraction of {share}, nothing is {what}, of "
                f"{tokens.number_of_tokens} tokens; take another fraction or shorter chunks"
            )
        # A piece begins where the chunk before it went to the other part, or belongs to another span.
        begins = np.ones(len(chosen), bool)
        begins[1:] = (np.diff(chosen) > 1) | (np.diff(span[chosen]) > 0)
        ends = np.append(begins[1:], True)
        spans = np.stack([start[chosen[begins]], stop[chosen[ends]]], axis=1)
        parts.append(dataclasses.replace(tokens, spans=spans, documents=document[chosen[begins]]))
    return parts[0], parts[1]
