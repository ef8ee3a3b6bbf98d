"""Sources that hold many documents in a file: JSON lines and parquet."""

import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from .._hash import hash_file
from ._sources import AbstractSource, decode, find, hash_parts, shown


_LINES = tuple(f".{name}{packed}" for name in ("jsonl", "ndjson") for packed in ("", ".gz", ".xz", ".zst"))


def jsonl(*paths: str | os.PathLike, field: str = "text") -> AbstractSource:
    """JSON lines: each line an object, one field of which is a document.

    Files are plain, or compressed where the name ends in `.gz`, `.xz` or `.zst`; for the last, `pip install 'rinsx[text]'`.
    They are UTF-8.

    !!! example

        ```python
        import pathlib
        import tempfile
        import rinsx as rx

        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "a.jsonl")
            path.write_text('{"text": "one document"}\\n{"text": "another"}\\n')
            print(list(rx.data.jsonl(path).documents()))
        ```

    **Arguments:**

    - `paths`: files, folders and patterns, as in [`rinsx.data.text`][]. In folders, files that end in `.jsonl` or
        `.ndjson`, compressed or not.
    - `field`: the key of the document.

    **Returns:**

    A [`rinsx.data.AbstractSource`][].

    **Raises:**

    `FileNotFoundError` if a file is missing. When the documents are read: `ValueError` if a line is broken, empty, or lacks
    the field, and `TypeError` if the field is no text. Both name the file and the line.
    """
    return _Jsonl(find(paths, _LINES), field)


def parquet(*paths: str | os.PathLike, column: str = "text") -> AbstractSource:
    """Parquet files: each row of one column is a document. Needs `pip install 'rinsx[text]'`.

    !!! example

        ```python
        import pathlib
        import tempfile
        import pyarrow as pa
        import pyarrow.parquet
        import rinsx as rx

        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "a.parquet")
            pa.parquet.write_table(pa.table({"text": ["one document", "another"]}), path)
            print(list(rx.data.parquet(path).documents()))
        ```

    **Arguments:**

    - `paths`: files, folders and patterns, as in [`rinsx.data.text`][]. In folders, files that end in `.parquet`.
    - `column`: the name of the column.

    **Returns:**

    A [`rinsx.data.AbstractSource`][].

    **Raises:**

    `FileNotFoundError` if a file is missing. When the documents are read: `ValueError` if a file is no parquet, or lacks
    the column, and `TypeError` if a row is no text. Both name the file.
    """
    return _Parquet(find(paths, ".parquet"), column)


@final
@dataclass(frozen=True, repr=False)
class _Jsonl(AbstractSource):
    paths: tuple[pathlib.Path, ...]
    field: str

    def __repr__(self) -> str:
        return f"jsonl({shown(self.paths)})"

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            for number, line in enumerate(_lines(path), 1):
                yield _document(line, self.field, f"{path}, line {number}")

    def fingerprint(self) -> str:
        return hash_parts("jsonl", self.field, *map(hash_file, self.paths))

    def place(self, index: int) -> str:
        for path in self.paths:
            lines = sum(1 for _ in _lines(path))
            if index < lines:
                return f"{path}, line {index + 1}"
            index -= lines
        raise IndexError(f"{self!r} has no such document")


@final
@dataclass(frozen=True, repr=False)
class _Parquet(AbstractSource):
    paths: tuple[pathlib.Path, ...]
    column: str

    def __repr__(self) -> str:
        return f"parquet({shown(self.paths)})"

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            with _open_parquet(path) as file:
                names = file.schema_arrow.names
                if self.column not in names:
                    raise ValueError(f"{path}: there is no column {self.column!r}; the columns are {names}")
                rows = itertools.count()
                for batch in file.iter_batches(batch_size=256, columns=[self.column]):
                    for value, row in zip(batch.column(0).to_pylist(), rows):
                        if not isinstance(value, str):
                            raise TypeError(
                                f"{path}, row {row}: the column {self.column!r} must be text; got {type(value).__name__}: "
                                f"{value!r}"
                            )
                        yield value

    def fingerprint(self) -> str:
        return hash_parts("parquet", self.column, *map(hash_file, self.paths))

    def place(self, index: int) -> str:
        for path in self.paths:
            with _open_parquet(path) as file:
                rows = file.metadata.num_rows
            if index < rows:
                return f"{path}, row {index}"
            index -= rows
        raise IndexError(f"{self!r} has no such document")


def _lines(path: pathlib.Path) -> Iterator[bytes]:
    """The lines of a file, unpacked as its name says."""
    number = 0
    try:
        with _open(path) as file:
            for line in file:
                yield line
                number += 1
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, _Damaged) as error:
        raise ValueError(f"{path}: cannot be unpacked after line {number}: {error}") from None


def _open(path: pathlib.Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(f"{path}: .zst needs the `zstandard` library: pip install 'rinsx[text]'") from error
        return io.BufferedReader(_Zst(zstandard, open(path, "rb")), 2**20)
    return open(path, "rb")


class _Damaged(Exception):
    """A compressed file does not hold what it should."""


class _Zst(io.RawIOBase):
    """Unpacks a `.zst` file. The library's own reader takes a file that is cut off for one that ends there."""

    def __init__(self, library: Any, file: io.BufferedReader):
        self._library = library
        self._file = file
        self._frame: Any = None
        self._packed = b""
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._left:
            self._packed = self._packed or self._file.read(2**16)
            if not self._packed:
                if self._frame is not None:
                    raise _Damaged("the file is cut off")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._left = self._frame.decompress(self._packed)
            except self._library.ZstdError as error:
                raise _Damaged(str(error)) from None
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._left))
        buffer[:n] = self._left[:n]
        self._left = self._left[n:]
        return n

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _document(line: bytes, field: str, place: str) -> str:
    """The document of one line."""
    text = decode(line, "utf-8", place)
    if not text.strip():
        raise ValueError(f"{place}: the line is empty; there must be a JSON object on every line")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: broken JSON ({error}): {_brief(text)}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place}: there must be a JSON object with the field {field!r}; got {_brief(text)}")
    if field not in record:
        raise ValueError(f"{place}: there is no field {field!r}; the fields are {list(record)}")
    if not isinstance(record[field], str):
        value = record[field]
        raise TypeError(f"{place}: the field {field!r} must be text; got {type(value).__name__}: {_brief(repr(value))}")
    return record[field]


def _brief(text: str) -> str:
    return text.strip() if len(text) < 80 else f"{text.strip()[:80]}..."


@contextlib.contextmanager
def _open_parquet(path: pathlib.Path) -> Iterator[Any]:
    """A parquet file; what the library finds wrong with it is an error with its name."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("rx.data.parquet needs the `pyarrow` library: pip install 'rinsx[text]'") from error
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from None
