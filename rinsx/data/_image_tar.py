"""Images in tar shards, as webdataset writes them, read in place."""

import json
import os
import pathlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from .._hash import hash_file
from ._image_folder import SUFFIXES
from ._images import AbstractImages, Example, rows_of, to_labels, to_text
from ._sources import find, hash_parts, shown


_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# The members that webdataset keeps for itself.
_META = re.compile(r"(^|/)__[^/]*__($|/)")


def image_tar(
    *paths: str | os.PathLike,
    image: str | None = None,
    text: str | None = None,
    label: str | None = None,
    names: Sequence[str] | None = None,
) -> AbstractImages:
    """Tar shards as webdataset writes them: members that are side by side and have the same key are a sample.

    The key is the path up to the first dot of the name, what follows is the extension: `part/0001.jpg`, `part/0001.txt` and
    `part/0001.cls` are a sample. Shards are read in place, with random access. To find the members, all headers are read
    once, when the source is made; so are the labels, and JSON. Nothing is unpacked, and a shard that is compressed is
    refused. Left out are members that are not asked for, folders, names that begin with a dot, and those like `__meta__`.

    !!! example

        ```python
        import io
        import pathlib
        import tarfile
        import tempfile
        import rinsx as rx
        from PIL import Image

        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "PNG")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "00000.tar")
            with tarfile.open(path, "w") as tar:
                for name, raw in {"0.png": picture.getvalue(), "0.json": b'{"caption": "black"}'}.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))
            source = rx.data.image_tar(path, text="json:caption")
            print(source.example(0).text)  # black
        ```

    **Arguments:**

    - `paths`: files, folders and patterns such as `"shards/*.tar"`. A folder stands for all files below it that end in `.tar`.
    - `image`: the extension of the image, such as `"jpg"` or `"seg.png"`. By default the one member that ends as images do
        (see [`rinsx.data.image_folder`][]), without another dot.
    - `text`: where the caption is: an extension, such as `"txt"`, or a field of a JSON member, such as `"json:caption"`,
        which can be a list of several. A member `"txt"` is one caption, of as many lines as it has. By default none is read.
    - `label`: where the label is, in the same way: `"cls"`, `"json:label"`. It is an integer or the name of a class.
    - `names`: the names of the classes, in the order of the labels. Where labels are names, by default these, sorted.

    **Returns:**

    A [`rinsx.data.AbstractImages`][].

    **Raises:**

    `FileNotFoundError` if a file is missing. `ValueError` with shard and sample if a shard is compressed, cut off, or no
    tar, if a sample lacks a member, has it twice, or has several images, or if a label is out of range.
    """
    if names is not None and label is None:
        raise ValueError(f"`label` must say where the labels are that have the names {list(names)}")
    found = find(paths, ".tar")
    fields = (("text", text), ("label", label))
    extensions = {name: value.partition(":")[0] for name, value in fields if value is not None}
    samples: list[tuple[int, str]] = []
    spans: list[tuple[tuple[int, int], ...]] = []
    for number, path in enumerate(found):
        for key, members in _samples(path):
            samples.append((number, key))
            spans.append(_choose(f"{path}, sample {key!r}", members, image, extensions))
    if not samples:
        raise ValueError(f"{shown(found)}: there are no images: the shards have no samples")
    columns = np.array(spans, np.int64).reshape(len(samples), 1 + len(extensions), 2)
    source = _Tar(found, tuple(samples), columns, image, text, label, None, None)
    if text is not None and ":" in text:
        for index in range(len(source)):
            value = source.json(index, 1, text)
            if not all(isinstance(part, str | None) for part in (value if isinstance(value, list) else [value])):
                raise TypeError(
                    f"{source.place(index)}: {text!r} must be text, or a list of texts; got {type(value).__name__}: {value!r}"
                )
    if label is None:
        return source
    values = source.label_values()
    labels, classes = to_labels(values, names, source.place)
    return _Tar(found, source.samples, columns, image, text, label, labels, classes)


def _samples(path: pathlib.Path) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """The samples of a shard: a key, and for each member extension, offset and size."""
    with open(path, "rb") as file:
        magic = file.read(8)
    for start, packed in _PACKED.items():
        if magic.startswith(start):
            raise ValueError(
                f"{path} is compressed ({packed}), so its members cannot be read in place; unpack it to a plain .tar"
            )
    seen: set[str] = set()
    current: str | None = None
    members: list[tuple[str, int, int]] = []
    for name, offset, size in _members(path):
        folder, slash, base = name.rpartition("/")
        if base.startswith(".") or _META.search(name):
            continue
        stem, _, extension = base.partition(".")
        key = folder + slash + stem
        if key != current:
            if current is not None:
                yield current, members
            if key in seen:
                raise ValueError(f"{path}, sample {key!r}: its members are not side by side")
            seen.add(key)
            current, members = key, []
        members.append((extension, offset, size))
    if current is not None:
        yield current, members


def _members(path: pathlib.Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the files in a shard."""
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # It would pile up the headers of all members, a kilobyte each. Not all type stubs know the list.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                end = member.offset_data
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(f"{path}, member {member.name!r}: it must be a plain file, no link and not sparse")
                # Contents fill whole blocks.
                end += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                yield member.name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise ValueError(f"{path}: cannot be read as tar: {error}") from None
    with open(path, "rb") as file:
        file.seek(end)
        # Python takes a shard that is cut off between two members, or in the last one, for one that ends there.
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{path}: cannot be read as tar: it is cut off: no empty block follows the last member")


def _choose(
    place: str, members: list[tuple[str, int, int]], image: str | None, extensions: dict[str, str]
) -> tuple[tuple[int, int], ...]:
    """Where the members stand that are asked for: image, text, label."""
    there = [extension for extension, _, _ in members]
    pictures = [name for name in there if f".{name.lower()}" in SUFFIXES] if image is None else [image]
    if len(pictures) > 1:
        raise ValueError(f"{place}: there are several images, {pictures}; say which, as in image={pictures[0]!r}")
    if not pictures:
        raise ValueError(f"{place}: there is no image; its members are {there}")
    found = []
    for wanted in (*pictures, *extensions.values()):
        spans = [(offset, size) for extension, offset, size in members if extension == wanted]
        if len(spans) != 1:
            raise ValueError(f"{place}: there must be one member {wanted!r}, and are {len(spans)}; it has {there}")
        found.append(spans[0])
    return tuple(found)


@final
@dataclass(frozen=True, eq=False, repr=False)
class _Tar(AbstractImages):
    paths: tuple[pathlib.Path, ...]
    samples: tuple[tuple[int, str], ...]
    # [samples, members, 2]: offset and size of image, text and label, of which those are there that are read.
    spans: np.ndarray
    image: str | None
    text: str | None
    label: str | None
    labels: np.ndarray | None
    names: tuple[str, ...] | None

    def __repr__(self) -> str:
        return f"image_tar({shown(self.paths)})"

    def __len__(self) -> int:
        return len(self.samples)

    def example(self, index: int) -> Example:
        label = None if self.labels is None else int(self.labels[index])
        if self.text is None:
            return Example(self._read(index, 0)[0], None, label)
        image, raw = self._read(index, 0, 1)
        return Example(image, self._to_text(index, raw), label)

    def texts(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[str | tuple[str, ...] | None]:
        return map(self._text, rows_of(self, indices))

    def _text(self, index: int) -> str | tuple[str, ...] | None:
        return None if self.text is None else self._to_text(index, self._read(index, 1)[0])

    def _to_text(self, index: int, raw: bytes) -> str | tuple[str, ...]:
        assert self.text is not None
        if ":" in self.text:
            return to_text(self._field(index, raw, self.text))
        # What is no UTF-8 becomes halves of surrogate pairs, which `Captions` replaces and counts.
        return raw.decode("utf-8", "surrogateescape")

    def _read(self, index: int, *members: int) -> list[bytes]:
        path = self.paths[self.samples[index][0]]
        found = []
        # Opened anew each time: then threads need no lock, and nothing is left open.
        with open(path, "rb") as file:
            for offset, size in self.spans[index, list(members)].tolist():
                file.seek(offset)
                found.append(file.read(size))
                if len(found[-1]) < size:
                    raise ValueError(f"{self.place(index)}: the shard is cut off, or has changed since it was opened")
        return found

    def json(self, index: int, member: int, wanted: str) -> Any:
        """A field of a JSON member."""
        return self._field(index, self._read(index, member)[0], wanted)

    def _field(self, index: int, raw: bytes, wanted: str) -> Any:
        name, _, field = wanted.partition(":")
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.place(index)}: the member {name!r} is broken JSON: {error}") from None
        if not isinstance(record, dict) or field not in record:
            has = f"the fields {list(record)}" if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{self.place(index)}: the member {name!r} has no field {field!r}; it is {has}")
        return record[field]

    def label_values(self) -> list[Any]:
        """The labels as they are in the shards, names or integers."""
        assert self.label is not None
        member = self.spans.shape[1] - 1
        if ":" in self.label:
            return [self.json(index, member, self.label) for index in range(len(self))]
        texts = [self._read(i, member)[0].decode("utf-8", "replace").strip() for i in range(len(self))]
        numbers = all(re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII) for text in texts)
        return [int(text) for text in texts] if numbers else texts

    def fingerprint(self) -> str:
        how = (repr(self.image), repr(self.text), repr(self.label), repr(self.names))
        return hash_parts("image_tar", *how, *map(hash_file, self.paths))

    def place(self, index: int) -> str:
        number, key = self.samples[index]
        return f"{self.paths[number]}, sample {key!r}"
