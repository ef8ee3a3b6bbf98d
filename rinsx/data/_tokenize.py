"""Tokenising a corpus once, into a file that is mapped into memory.

The file: a header of 4096 bytes, the tokens, zeros up to a multiple of 8, and the offsets of the documents (int64). The header: a
magic word, the SHA-256 of what follows in the header, and JSON, filled up with blanks.
"""

import array
import hashlib
import io
import json
import logging
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ._sources import AbstractSource
from ._tokenizers import AbstractTokenizer, utf8
from ._tokens import Tokens


_MAGIC = b"rinsxtok"
_VERSION = 1
_HEADER = 4096
_BLOCK = 2**24
_logger = logging.getLogger("rinsx.data")


def tokenize(source: AbstractSource, tokenizer: AbstractTokenizer, folder: str | os.PathLike | None = None) -> Tokens:
    """Tokenises a corpus, once: where `folder` holds the tokens of the same content by the same tokeniser, they are used.

    Each document is followed by the `end` token. One document at a time is held in memory.

    The file is named by the fingerprints of the source and of the tokeniser, so one folder serves many corpora. Its
    header has both in full, with the dtype, the counts and checksums. A file that is stale, cut off, damaged or foreign
    does not agree with them, and is never used: the corpus is tokenised anew, and the logger `rinsx.data` says why. The
    file is written under another name and then renamed, so that several processes may do this at once. Opening it reads
    the source and the tokens once, to check them.

    !!! example

        ```python
        import tempfile
        import rinsx as rx

        source = rx.data.documents(["one document", "another"])
        with tempfile.TemporaryDirectory() as folder:
            tokens = rx.data.tokenize(source, rx.data.Bytes(), folder)  # writes the file
            tokens = rx.data.tokenize(source, rx.data.Bytes(), folder)  # maps it
            del tokens
        ```

    **Arguments:**

    - `source`: the corpus, such as [`rinsx.data.stdlib`][]`()`.
    - `tokenizer`: [`rinsx.data.Bytes`][], [`rinsx.data.BPE`][] or one of your own.
    - `folder`: where the file is kept; made if it is missing. `None` keeps the tokens in memory.

    **Returns:**

    [`rinsx.data.Tokens`][], of the smallest unsigned integer type that holds the vocabulary.

    **Raises:**

    `ValueError` if the corpus is empty, and what the source raises where it cannot be read. If the tokeniser gives a token
    beyond its own vocabulary, a `ValueError` with the place of the document.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")
    if folder is None:
        parts: list[np.ndarray] = []
        offsets = array.array("q", [0])
        for ids in _encoded(source, tokenizer):
            parts.append(ids.astype(dtype))
            offsets.append(offsets[-1] + len(ids))
        return Tokens.contiguous(np.concatenate(parts), np.array(offsets, np.int64), tokenizer, repr(source))
    expected = {
        "version": _VERSION,
        "source": source.fingerprint(),
        "tokenizer": tokenizer.fingerprint(),
        "dtype": dtype.str,
    }
    path = pathlib.Path(folder, f"{expected['source'][:16]}-{expected['tokenizer'][:16]}.tokens")
    try:
        tokens, offsets = _read(path, expected)
    except FileNotFoundError:
        _logger.info("tokenising %r into %s", source, path)
    except _Unusable as reason:
        _logger.warning("%s is not used: %s; tokenising %r anew", path, reason, source)
    else:
        return Tokens.contiguous(tokens, offsets, tokenizer, f"{source!r} in {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, expected, dtype, _encoded(source, tokenizer))
    tokens, offsets = _read(path, expected)
    return Tokens.contiguous(tokens, offsets, tokenizer, f"{source!r} in {path}")


class _Unusable(Exception):
    """Why a file is not used."""


def _encoded(source: AbstractSource, tokenizer: AbstractTokenizer) -> Iterator[np.ndarray]:
    """The tokens of each document, with `end`."""
    empty = True
    for index, text in enumerate(source.documents()):
        utf8(text, source, index)
        ids = np.append(tokenizer.encode(text).astype(np.int64), tokenizer.end)
        wrong = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
        if wrong.size:
            raise ValueError(
                f"{source.place(index)}: token {wrong[0]} of the document is {ids[wrong[0]]}, beyond the vocabulary of "
                f"{tokenizer!r}, which has {tokenizer.vocab_size} tokens"
            )
        empty = empty and len(ids) == 1
        yield ids
    if empty:
        raise ValueError(f"the corpus is empty: {source!r} has no text")


def _write(path: pathlib.Path, expected: dict[str, Any], dtype: np.dtype, documents: Iterator[np.ndarray]) -> None:
    """Writes the file under another name, and renames it when it is whole."""
    offsets = array.array("q", [0])
    checksum = 0
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".partial", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(b"\0" * _HEADER)
            for ids in documents:
                raw = ids.astype(dtype).tobytes()
                checksum = zlib.crc32(raw, checksum)
                file.write(raw)
                offsets.append(offsets[-1] + len(ids))
            tail = b"\0" * (-file.tell() % 8) + np.array(offsets, "<i8").tobytes()
            checksum = zlib.crc32(tail, checksum)
            file.write(tail)
            counts = {"tokens": offsets[-1], "documents": len(offsets) - 1, "checksum": checksum}
            body = json.dumps({**expected, **counts}).encode().ljust(_HEADER - len(_MAGIC) - 32)
            file.seek(0)
            file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: pathlib.Path, expected: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and offsets of a file, once everything in it is found to agree."""
    # Mapped through the same open file that is checked: another process may replace it in between.
    with open(path, "rb") as file:
        header = file.read(_HEADER)
        body = header[len(_MAGIC) + 32 :]
        if len(header) < _HEADER or not header.startswith(_MAGIC):
            raise _Unusable("it is no file of tokens")
        if header[len(_MAGIC) :][:32] != hashlib.sha256(body).digest():
            raise _Unusable("its header is damaged")
        found = json.loads(body)
        for key, value in expected.items():
            if found[key] != value:
                raise _Unusable(f"its {key} is {found[key]}, not {value}")
        dtype = np.dtype(found["dtype"])
        end = _HEADER + found["tokens"] * dtype.itemsize
        start = end + -end % 8
        size = start + 8 * (found["documents"] + 1)
        if os.fstat(file.fileno()).st_size != size:
            raise _Unusable(f"it has {os.fstat(file.fileno()).st_size} bytes, not {size}")
        if _checksum(file) != found["checksum"]:
            raise _Unusable("its checksum is wrong")
        tokens = np.memmap(file, dtype, "r", offset=_HEADER, shape=(found["tokens"],))
        offsets = np.memmap(file, "<i8", "r", offset=start, shape=(found["documents"] + 1,))
        return tokens, np.array(offsets, np.int64)


def _checksum(file: io.BufferedReader) -> int:
    checksum = 0
    file.seek(_HEADER)
    while block := file.read(_BLOCK):
        checksum = zlib.crc32(block, checksum)
    return checksum
