"""Hugging Face datasets as a source."""

import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from ._sources import AbstractSource, hash_texts


def huggingface(name: Any, split: str | None = None, column: str = "text", **kwargs: Any) -> AbstractSource:
    """A dataset of the `datasets` library: each row of one column is a document. Needs `pip install 'rinsx[hub]'`.

    !!! example

        ```python
        import tempfile
        import datasets
        import rinsx as rx

        dataset = datasets.Dataset.from_dict({"text": ["one document", "another"]})
        list(rx.data.huggingface(dataset).documents())  # ["one document", "another"]

        with tempfile.TemporaryDirectory() as folder:
            dataset.save_to_disk(folder)
            source = rx.data.huggingface(folder)
            print(list(source.documents()))
        ```

    **Arguments:**

    - `name`: what `datasets.load_dataset` loads, such as `"roneneldan/TinyStories"`, which downloads it; or a folder that
        `save_to_disk` has written, or a `datasets.Dataset` or `DatasetDict`.
    - `split`: which split, such as `"train"`. Needed where there are several.
    - `column`: the name of the column.
    - `kwargs`: handed to `datasets.load_dataset`.

    **Returns:**

    A [`rinsx.data.AbstractSource`][].

    **Raises:**

    `ValueError` if the split or the column does not exist. When the documents are read, `TypeError` with the row, if it is no text.
    """
    loaded, shown = load("huggingface", name, split, kwargs)
    if column not in loaded.column_names:
        raise ValueError(f"{shown}: there is no column {column!r}; the columns are {loaded.column_names}")
    return _HuggingFace(loaded.select_columns([column]).with_format(None), column, shown)


def load(function: str, name: Any, split: str | None, kwargs: dict[str, Any]) -> tuple[Any, str]:
    """A `datasets.Dataset`, and what it is called in messages."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"rx.data.{function} needs the `datasets` library: pip install 'rinsx[hub]'") from error
    if kwargs.get("streaming"):
        raise ValueError("streaming=True is not possible: rows are read more than once, and images in any order")
    shown, loaded = str(name), name
    if isinstance(name, str | os.PathLike):
        if _saved(pathlib.Path(name)):
            if kwargs:
                raise ValueError(f"{name} is a folder that `save_to_disk` wrote, which takes no {sorted(kwargs)}")
            loaded = datasets.load_from_disk(str(name))
        else:
            # The split is chosen by the library: it can be a slice, such as "train[:1%]".
            loaded = datasets.load_dataset(str(name), split=split, **kwargs)
            if split is not None and isinstance(loaded, datasets.Dataset):
                shown, split = f"{shown}, split {split}", None
    else:
        shown = "the dataset"
        if kwargs:
            raise ValueError(f"a dataset that is loaded takes no {sorted(kwargs)}")
    if isinstance(loaded, datasets.DatasetDict):
        if split is None and len(loaded) == 1:
            split = str(next(iter(loaded)))
        if split not in loaded:
            raise ValueError(f"{shown}: `split` must be one of {list(loaded)}; got {split!r}")
        shown, loaded = f"{shown}, split {split}", loaded[split]
    elif split is not None:
        raise ValueError(f"{shown} has no splits; got split={split!r}")
    if not isinstance(loaded, datasets.Dataset):
        raise TypeError(f"`name` must be a name, a folder, or a `datasets.Dataset`; got {type(loaded).__name__}")
    return loaded, shown


def _saved(path: pathlib.Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


@final
@dataclass(frozen=True, repr=False)
class _HuggingFace(AbstractSource):
    dataset: Any
    column: str
    name: str

    def __repr__(self) -> str:
        return f"huggingface({self.name})"

    def documents(self) -> Iterator[str]:
        row = 0
        for batch in self.dataset.iter(batch_size=256):
            for value in batch[self.column]:
                if not isinstance(value, str):
                    raise TypeError(
                        f"{self.place(row)}: the column {self.column!r} must be text; got {type(value).__name__}: {value!r}"
                    )
                yield value
                row += 1

    def fingerprint(self) -> str:
        # Of the content: the fingerprint that the library keeps depends on how a dataset was made.
        return hash_texts("huggingface", self.documents())

    def place(self, index: int) -> str:
        return f"{self.name}, row {index}"
