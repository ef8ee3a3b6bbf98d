"""The corpus that is on every machine: the text of Python's own standard library."""

import os
import pathlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from .._hash import hash_file
from ._sources import AbstractSource, hash_parts


_FOLDERS = {"__pycache__", "idle_test", "site-packages", "dist-packages", "test", "tests"}
# They hold how this one Python was built.
_MACHINE = ("config-", "_sysconfigdata")


def stdlib() -> "StandardLibrary":
    """The text of Python's own standard library: the default corpus, real text that is on every machine.

    One document is one `.py` file: about 12 MB in some 700 files, sorted by path. Left out are tests, caches, what pip
    installed, and the files that say how this Python was built. A file is skipped if it is empty, cannot be read, or is
    not UTF-8; `.skipped` lists those, each with the reason. The text differs between versions of Python, and so does its fingerprint.

    !!! example

        ```python
        import rinsx as rx

        source = rx.data.stdlib()
        print(len(source.paths), "files,", len(source.skipped), "skipped")
        print(next(source.documents())[:100])
        ```

    **Returns:**

    A [`rinsx.data.AbstractSource`][] with two more attributes. `.paths` are the files that are read, `.skipped` are pairs
    of a file that is not and the reason.

    **Raises:**

    `FileNotFoundError` if this Python has no files of its standard library, as where it runs from an archive.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths: list[pathlib.Path] = []
    skipped: list[tuple[pathlib.Path, str]] = []
    for path in _walk(root):
        try:
            if path.read_bytes().decode("utf-8"):
                paths.append(path)
            else:
                skipped.append((path, "it is empty"))
        except (OSError, UnicodeDecodeError) as error:
            skipped.append((path, str(error)))
    if not paths:
        raise FileNotFoundError(f"there are no readable .py files of Python's standard library in {root}")
    return StandardLibrary(root, tuple(paths), tuple(skipped))


def _walk(root: pathlib.Path) -> list[pathlib.Path]:
    """The files of the standard library, sorted by their path below its root."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _FOLDERS and not name.startswith(_MACHINE)]
        names = [name for name in names if name.endswith(".py") and not name.startswith(_MACHINE)]
        found += [pathlib.Path(folder, name) for name in names]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


@final
@dataclass(frozen=True, repr=False)
class StandardLibrary(AbstractSource):
    """The result of [`rinsx.data.stdlib`][]."""

    root: pathlib.Path
    paths: tuple[pathlib.Path, ...]
    skipped: tuple[tuple[pathlib.Path, str], ...]

    def __repr__(self) -> str:
        return f"stdlib({len(self.paths)} files in {self.root})"

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            yield path.read_bytes().decode("utf-8")

    def fingerprint(self) -> str:
        return hash_parts("stdlib", *map(hash_file, self.paths))

    def place(self, index: int) -> str:
        return str(self.paths[index])
