"""Images in tables: parquet files and Hugging Face datasets."""

import itertools
import json
import os
import pathlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np

from .._check import at_least
from .._hash import hash_file
from ._hub import load
from ._images import AbstractImages, Example, hash_examples, rows_of, to_labels, to_names, to_text
from ._sources import find, hash_parts, shown


# How many texts are read at once.
_BLOCK = 1024


def image_parquet(
    *paths: str | os.PathLike,
    image: str = "image",
    text: str | None = None,
    label: str | None = None,
    names: Sequence[str] | None = None,
    row_groups: int = 4,
) -> AbstractImages:
    """Parquet files: each row has an encoded image, and a caption, a label, or both.

    A file is read by its row groups, and those that were used last stay in memory. A row of another group costs the reading
    of that whole group: in a shuffled order over many more groups than `row_groups`, nearly every row does. Then write
    small row groups (a hundred images, say), or take [`rinsx.data.image_huggingface`][], which maps its files into memory
    and reads single rows. Labels are read when the source is made, and stay in memory.

    Needs `pip install 'rinsx[vision]'`.

    !!! example

        ```python
        import io
        import pathlib
        import tempfile
        import pyarrow as pa
        import pyarrow.parquet
        import rinsx as rx
        from PIL import Image

        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "PNG")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "a.parquet")
            table = pa.table({"image": [{"bytes": picture.getvalue(), "path": "a.png"}], "label": [1]})
            pa.parquet.write_table(table, path)
            source = rx.data.image_parquet(path, label="label", names=["cat", "dog"])
            print(source.example(0).label)  # 1
        ```

    **Arguments:**

    - `paths`: files, folders and patterns. A folder stands for all files below it that end in `.parquet`.
    - `image`: the column of the images: binary, or the struct `{bytes, path}` of Hugging Face. Where `bytes` is null, the file
        `path` is read, from the folder of the parquet file.
    - `text`: the column of the captions: text, or lists of texts where images have several. Null is an empty caption. By
        default there are none.
    - `label`: the column of the labels, integers or names of classes. By default there are none.
    - `names`: the names of the classes, in the order of the labels. By default those that Hugging Face has written into the
        files, which must be the same in all; where labels are names, these, sorted.
    - `row_groups`: how many row groups stay in memory.

    **Returns:**

    A [`rinsx.data.AbstractImages`][].

    **Raises:**

    `FileNotFoundError` if a file is missing. `ValueError` if a file is no parquet or lacks a column, there are no rows, a
    label is null or out of range, or files have other names of classes than the first; `TypeError` if a column is of another
    type. They name the file, and the row where there is one.
    """
    at_least(1, row_groups=row_groups)
    _check_names(names, label)
    found = find(paths, ".parquet")
    groups: list[tuple[int, int]] = []
    starts = [0]
    edges = [0]
    values: list[Any] = []
    written = None
    for number, path in enumerate(found):
        with _open(path) as file:
            _check_columns(path, file.schema_arrow, image, text, label)
            if names is None and label is not None:
                here = _written_names(file.schema_arrow, label)
                written = here if number == 0 else written
                if here != written:
                    say = lambda classes: "no names" if classes is None else list(classes)
                    raise ValueError(
                        f"a label is not the same class in all files: {found[0]} has {say(written)}, and {path} has {say(here)}; "
                        "read them apart, or give `names`, which holds for all"
                    )
            for group in range(file.metadata.num_row_groups):
                groups.append((number, group))
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
                if label is not None:
                    values += _read_group(file, path, group, [label]).column(label).to_pylist()
        edges.append(starts[-1])
    if not starts[-1]:
        raise ValueError(f"{shown(found)}: there are no images: no file has a row")
    files, rows = np.array(edges), np.array(starts)
    source = _Parquet(found, image, text, tuple(groups), files, rows, None, None, _Groups(row_groups))
    if label is None:
        return source
    labels, classes = to_labels(values, written if names is None else names, source.place)
    return _Parquet(found, image, text, tuple(groups), files, rows, labels, classes, _Groups(row_groups))


def image_huggingface(
    name: Any,
    split: str | None = None,
    *,
    image: str = "image",
    text: str | None = None,
    label: str | None = None,
    names: Sequence[str] | None = None,
    **kwargs: Any,
) -> AbstractImages:
    """A dataset of the `datasets` library: each row has an image, and a caption, a label, or both.

    Its files are mapped into memory, so that single rows are read in any order. Images are decoded here, not by the
    library. Labels are read when the source is made, and stay in memory. Needs `pip install 'rinsx[hub,vision]'`.

    !!! example

        ```python
        import datasets
        import numpy as np
        import rinsx as rx

        dataset = datasets.Dataset.from_dict(
            {"image": [np.zeros((8, 8, 3), np.uint8)], "caption": ["black"]},
            features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
        )
        source = rx.data.image_huggingface(dataset, text="caption")
        print(source.example(0).text)  # black
        ```

    **Arguments:**

    - `name`, `split`, `kwargs`: as in [`rinsx.data.huggingface`][].
    - `image`: the column of the images: the feature `datasets.Image`, or binary.
    - `text`: the column of the captions: text, or lists of texts where images have several. Null is an empty caption. By
        default there are none.
    - `label`: the column of the labels, integers or names of classes. By default there are none.
    - `names`: the names of the classes, in the order of the labels. By default those of the feature `ClassLabel`; where
        labels are names, these, sorted.

    **Returns:**

    A [`rinsx.data.AbstractImages`][].

    **Raises:**

    `ValueError` if the split or a column does not exist, there are no rows, or a label is null or out of range;
    `TypeError` if a column is of another type.
    """
    _check_names(names, label)
    dataset, called = load("image_huggingface", name, split, kwargs)
    import datasets
    import pyarrow as pa

    columns = dict.fromkeys([image, *([] if text is None else [text]), *([] if label is None else [label])])
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"{called}: there is no column {column!r}; the columns are {dataset.column_names}")
    dataset = dataset.select_columns(list(columns)).with_format(None)
    feature = dataset.features[image]
    if isinstance(feature, datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    _check_columns(called, pa.schema(dataset.features.arrow_schema), image, text, label)
    if not len(dataset):
        raise ValueError(f"{called}: there are no images: it has no rows")
    rows = dataset.select_columns([image] if text is None else [image, text])
    source = _HuggingFace(rows, image, text, called, None, None)
    if label is None:
        return source
    if names is None and isinstance(dataset.features[label], datasets.ClassLabel):
        names = dataset.features[label].names
    values = list(dataset.select_columns([label])[:][label])
    labels, classes = to_labels(values, names, source.place)
    return _HuggingFace(rows, image, text, called, labels, classes)


def _check_names(names: Sequence[str] | None, label: str | None) -> None:
    if names is not None and label is None:
        raise ValueError(f"`label` must say in which column the labels are that have the names {list(names)}")


def _open(path: pathlib.Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("rx.data.image_parquet needs the `pyarrow` library: pip install 'rinsx[vision]'") from error
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from None


def _read_group(file: Any, path: pathlib.Path, group: int, columns: Sequence[str]) -> Any:
    import pyarrow as pa

    try:
        return file.read_row_group(group, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}, row group {group}: cannot be read: {error}") from None


def _check_columns(path: Any, schema: Any, image: str, text: str | None, label: str | None) -> None:
    """Refuses a table that lacks a column, or has one of another type."""
    import pyarrow as pa

    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    string = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    for column, tests, wanted in (
        (image, binary, "binary, or a struct of binary `bytes` and text `path`"),
        (text, string, "text, or lists of texts"),
        (label, (pa.types.is_integer, *string), "integers, or the names of classes"),
    ):
        if column is None:
            continue
        if column not in schema.names:
            raise ValueError(f"{path}: there is no column {column!r}; the columns are {schema.names}")
        kind = schema.field(column).type
        inner = kind.value_type if pa.types.is_dictionary(kind) else kind
        if column == image and pa.types.is_struct(kind):
            fields = {field.name: field.type for field in kind}
            inner = fields.get("bytes")
        if column == text and _is_list(kind):
            inner = kind.value_type
        if inner is None or not any(test(inner) for test in tests):
            raise TypeError(f"{path}: the column {column!r} must be {wanted}; it is {kind}")


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests)


def _written_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """The names of classes that Hugging Face writes into the file."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None:
        return None
    try:
        return to_names(json.loads(written)["info"]["features"][label].get("names"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _bytes(value: Any, folder: pathlib.Path, place: str) -> bytes:
    """The bytes of an image. None at all are a broken image, so they are data."""
    if not isinstance(value, dict):
        return value or b""
    if value["bytes"] is not None or value.get("path") is None:
        return value["bytes"] or b""
    path = folder / value["path"]
    if not path.is_file():
        raise FileNotFoundError(f"{place}: there is no file {path}, and the row has no bytes of the image")
    return path.read_bytes()


@final
class _Groups:
    """The row groups that were used last."""

    def __init__(self, size: int):
        self._size = size
        self._tables: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Groups, (self._size,)

    def get(self, index: int, read: Any) -> Any:
        # One thread reads at a time, else several would read the same group. The library reads with threads of its own.
        with self._lock:
            if index not in self._tables:
                # Room is made first, so that there are never more than the bound.
                while len(self._tables) >= self._size:
                    self._tables.popitem(last=False)
                self._tables[index] = read()
            self._tables.move_to_end(index)
            return self._tables[index]


@final
@dataclass(frozen=True, eq=False, repr=False)
class _Parquet(AbstractImages):
    paths: tuple[pathlib.Path, ...]
    image: str
    text: str | None
    groups: tuple[tuple[int, int], ...]
    # The rows at which files and row groups begin, and the number of all.
    files: np.ndarray
    rows: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...] | None
    cache: _Groups

    def __repr__(self) -> str:
        return f"image_parquet({shown(self.paths)})"

    def __len__(self) -> int:
        return int(self.rows[-1])

    def example(self, index: int) -> Example:
        group = int(np.searchsorted(self.rows, index, "right")) - 1
        columns = [self.image] if self.text is None else [self.image, self.text]
        table = self.cache.get(group, lambda: self._read(group, columns))
        row = index - int(self.rows[group])
        path = self.paths[self.groups[group][0]]
        image = _bytes(table.column(self.image)[row].as_py(), path.parent, self.place(index))
        text = None if self.text is None else to_text(table.column(self.text)[row].as_py())
        return Example(image, text, None if self.labels is None else int(self.labels[index]))

    def texts(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[str | tuple[str, ...] | None]:
        before, table = -1, cast(Any, None)
        for index in rows_of(self, indices):
            if self.text is None:
                yield None
                continue
            group = int(np.searchsorted(self.rows, index, "right")) - 1
            if group != before:
                before, table = group, self._read(group, [self.text])
            yield to_text(table.column(self.text)[index - int(self.rows[group])].as_py())

    def _read(self, group: int, columns: Sequence[str]) -> Any:
        number, inside = self.groups[group]
        with _open(self.paths[number]) as file:
            return _read_group(file, self.paths[number], inside, columns)

    def fingerprint(self) -> str:
        labels = "" if self.labels is None else str(self.labels.tolist())
        how = (self.image, repr(self.text), repr(self.names), labels)
        return hash_parts("image_parquet", *how, *map(hash_file, self.paths))

    def place(self, index: int) -> str:
        number = int(np.searchsorted(self.files, index, "right")) - 1
        return f"{self.paths[number]}, row {index - self.files[number]}"


@final
@dataclass(frozen=True, eq=False, repr=False)
class _HuggingFace(AbstractImages):
    dataset: Any
    image: str
    text: str | None
    name: str
    labels: np.ndarray | None
    names: tuple[str, ...] | None

    def __repr__(self) -> str:
        return f"image_huggingface({self.name})"

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, index: int) -> Example:
        row = self.dataset[index]
        image = _bytes(row[self.image], pathlib.Path(), self.place(index))
        text = None if self.text is None else to_text(row[self.text])
        return Example(image, text, None if self.labels is None else int(self.labels[index]))

    def texts(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[str | tuple[str, ...] | None]:
        index = np.arange(len(self)) if indices is None else np.asarray(indices, np.int64)
        if self.text is None:
            yield from itertools.repeat(None, len(index))
            return
        column = self.dataset.select_columns([self.text])
        for low in range(0, len(index), _BLOCK):
            yield from map(to_text, column[index[low : low + _BLOCK].tolist()][self.text])

    def fingerprint(self) -> str:
        return hash_examples("image_huggingface", map(self.example, range(len(self))), self.names)

    def place(self, index: int) -> str:
        return f"{self.name}, row {index}"
