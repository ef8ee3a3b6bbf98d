"""Sources: where documents come from. The abstract class, documents in memory, and text files."""

import abc
import codecs
import glob
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from .._hash import hash_file


class AbstractSource(abc.ABC):
    """A corpus: documents, each a `str`, in an order that does not change.

    A source of your own is a subclass with these three methods. It is read from the beginning whenever `documents` is
    called, and one document at a time is held in memory.
    """

    @abc.abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents, in order, from the first one."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal SHA-256 over the content and over how it is read. It does not depend on names of files. Where
        it differs, tokens that were cached are not used."""

    @abc.abstractmethod
    def place(self, index: int) -> str:
        """Where a document stands, for messages: a file, with a line or row where it holds several documents.

        **Arguments:**

        - `index`: the number of the document, counted from 0.
        """


def documents(texts: Sequence[str]) -> AbstractSource:
    """Documents that are in memory.

    !!! example

        ```python
        import rinsx as rx

        source = rx.data.documents(["one document", "another"])
        list(source.documents())  # ["one document", "another"]
        ```

    **Arguments:**

    - `texts`: the documents.

    **Returns:**

    A [`rinsx.data.AbstractSource`][].

    **Raises:**

    `TypeError` if one of them is no `str`, `ValueError` if there is none.
    """
    if isinstance(texts, str):
        raise TypeError(f"`texts` must be a list of documents, not one text; got {texts[:40]!r}. Write [text].")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"document {index} must be a `str`; got {type(text).__name__}: {text!r}")
    if len(texts) == 0:
        raise ValueError("the corpus is empty: `texts` holds no documents")
    return _Documents(tuple(texts))


def text(*paths: str | os.PathLike, encoding: str = "utf-8") -> AbstractSource:
    """Text files, one document a file.

    The text is kept as it is, line ends included.

    !!! example

        ```python
        import pathlib
        import tempfile
        import rinsx as rx

        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "a.txt").write_text("one document")
            pathlib.Path(folder, "b.txt").write_text("another")
            source = rx.data.text(folder)
            print(list(source.documents()))
        ```

    **Arguments:**

    - `paths`: files, folders and patterns such as `"books/*.txt"`. A folder stands for all files below it, except those that
        begin with a dot, sorted by path; a pattern for what matches, sorted.
    - `encoding`: how all files are encoded. For UTF-8 with a byte order mark it is `"utf-8-sig"`.

    **Returns:**

    A [`rinsx.data.AbstractSource`][].

    **Raises:**

    `FileNotFoundError` if a file is missing, or a folder or pattern has no files. `ValueError` when the documents are read,
    if a file is not encoded so; it names the file and the byte.
    """
    try:
        encoding = codecs.lookup(encoding).name
    except LookupError:
        raise ValueError(f"`encoding` must be one that Python knows, such as 'utf-8'; got {encoding!r}") from None
    return _Text(find(paths, ""), encoding)


@final
@dataclass(frozen=True, repr=False)
class _Documents(AbstractSource):
    texts: tuple[str, ...]

    def __repr__(self) -> str:
        return f"documents({len(self.texts)} texts)"

    def documents(self) -> Iterator[str]:
        return iter(self.texts)

    def fingerprint(self) -> str:
        return hash_texts("documents", self.texts)

    def place(self, index: int) -> str:
        return f"document {index} of {self!r}"


@final
@dataclass(frozen=True, repr=False)
class _Text(AbstractSource):
    paths: tuple[pathlib.Path, ...]
    encoding: str

    def __repr__(self) -> str:
        return f"text({shown(self.paths)})"

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            yield decode(path.read_bytes(), self.encoding, str(path))

    def fingerprint(self) -> str:
        return hash_parts("text", self.encoding, *map(hash_file, self.paths))

    def place(self, index: int) -> str:
        return str(self.paths[index])


def decode(raw: bytes, encoding: str, place: str) -> str:
    """Decodes bytes, or says where they cannot be decoded."""
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: not {encoding}: byte {error.start} ({raw[error.start : error.start + 1].hex(' ') or 'the end'}) "
            f"cannot be decoded ({error.reason}). Convert the file, or say how it is encoded where there is `encoding=`."
        ) from None


def find(paths: Iterable[str | os.PathLike], suffixes: str | tuple[str, ...]) -> tuple[pathlib.Path, ...]:
    """The files that paths, folders and patterns stand for. In folders, those whose names have one of the suffixes."""
    found: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            below = (p.relative_to(path) for p in path.rglob("*"))
            names = (p for p in below if p.name.endswith(suffixes) and not any(part[0] == "." for part in p.parts))
            files = sorted(path / name for name in names if (path / name).is_file())
            missing = f"the folder {path} has no files" + (f" that end in {' or '.join(suffixes)}" if suffixes else "")
        elif path.exists() or not glob.has_magic(str(path)):
            files = [path] if path.exists() else []
            missing = f"there is no file {path}"
        else:
            files = sorted(p for p in map(pathlib.Path, glob.glob(str(path), recursive=True)) if p.is_file())
            missing = f"no file matches {path}"
        if not files:
            raise FileNotFoundError(missing)
        found += files
    if not found:
        raise ValueError("the corpus is empty: no paths were given")
    seen: set[pathlib.Path] = set()
    for path in found:
        if path in seen:
            raise ValueError(f"the file {path} is named twice; a mixture can give it more weight")
        seen.add(path)
    return tuple(found)


def hash_parts(*parts: str) -> str:
    """A hash of texts that tells `("a", "b")` from `("ab",)`."""
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()


def hash_texts(kind: str, texts: Iterable[str]) -> str:
    """A hash of documents, of which one at a time is held in memory."""
    digest = hashlib.sha256(kind.encode())
    for text in texts:
        # A text with half a surrogate pair has a hash too: the error that names its place comes from elsewhere.
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def shown(paths: Sequence[pathlib.Path]) -> str:
    """The name of a source of files."""
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
