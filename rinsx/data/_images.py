"""Images: the abstract source with random access, its rows, and parts of a source."""

import abc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from ._sources import hash_parts


# How many rows may lack a text before it is said that there are none.
_LOOK = 100


@final
@dataclass(frozen=True, eq=False)
class Example:
    """One row of a source of images.

    !!! example

        ```python
        import numpy as np
        import rinsx as rx

        rx.data.Example(np.zeros((32, 32, 3), np.uint8), text="a black square", label=0)
        ```

    **Attributes:**

    - `image`: the bytes of a file, in any format that Pillow reads; or an array, as [`rinsx.data.Pixels`][] takes it.
    - `text`: the caption, if there is one; or a tuple of several. In training one of them is drawn, in evaluation it is the first.
    - `label`: the number of the class, from 0, if there are classes.
    """

    image: bytes | np.ndarray
    text: str | tuple[str, ...] | None = None
    label: int | None = None


class AbstractImages(abc.ABC):
    """A source of images: a sequence of rows with random access, whose order does not change.

    A source of your own is a subclass with these methods. Several threads can call `example` at once.

    **Attributes:**

    - `names`: the names of the classes, in the order of the labels; `None` where there are none.
    """

    names: tuple[str, ...] | None

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many rows there are."""

    @abc.abstractmethod
    def example(self, index: int) -> Example:
        """One row, its image not decoded. Either all rows have a label or none has.

        **Arguments:**

        - `index`: its number, from 0 to below `len`.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal SHA-256 over the content and over how it is read."""

    @abc.abstractmethod
    def place(self, index: int) -> str:
        """Where a row stands, for messages: a file, with a row where it holds several.

        **Arguments:**

        - `index`: its number.
        """

    def texts(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[str | tuple[str, ...] | None]:
        """The texts of rows, as `example` has them, but without the images.

        A source of your own need not have this method: then rows are read with `example`. With it,
        [`rinsx.data.captions_of`][] is fast where images lie elsewhere.

        **Arguments:**

        - `indices`: the numbers of the rows; by default all, in order.

        **Returns:**

        An iterator: for each row its text, several texts, or `None`.
        """
        for index in rows_of(self, indices):
            yield self.example(index).text

    def subset(self, indices: Any) -> "AbstractImages":
        """Some of the rows. Nothing is copied.

        **Arguments:**

        - `indices`: their numbers, in the order wanted.

        **Returns:**

        A source.
        """
        index = np.asarray(indices)
        if index.ndim != 1 or index.size == 0 or index.dtype.kind not in "iu":
            raise ValueError(
                f"`indices` must be one or more integers, with one axis; got {index.dtype} of shape {index.shape}"
            )
        wrong = index[(index < 0) | (index >= len(self))]
        if wrong.size:
            raise IndexError(f"row {wrong[0]} of {self!r}; the rows are numbered from 0 to {len(self) - 1}")
        return _Subset(self, index.astype(np.int64), self.names)


@final
@dataclass(frozen=True, eq=False, repr=False)
class _Subset(AbstractImages):
    source: AbstractImages
    indices: np.ndarray
    names: tuple[str, ...] | None

    def __repr__(self) -> str:
        return f"{len(self.indices)} rows of {self.source!r}"

    def __len__(self) -> int:
        return len(self.indices)

    def example(self, index: int) -> Example:
        return self.source.example(int(self.indices[index]))

    def texts(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[str | tuple[str, ...] | None]:
        chosen = self.indices if indices is None else self.indices[np.asarray(indices, np.int64)]
        return self.source.texts(chosen)

    def fingerprint(self) -> str:
        chosen = hashlib.sha256(self.indices.astype("<i8").tobytes()).hexdigest()
        return hash_parts("subset", self.source.fingerprint(), chosen)

    def place(self, index: int) -> str:
        return self.source.place(int(self.indices[index]))


def rows_of(source: AbstractImages, indices: Sequence[int] | np.ndarray | None) -> Iterable[int]:
    """The rows that `texts` is asked for."""
    return range(len(source)) if indices is None else map(int, indices)


def captions_in(text: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The captions of a row, without those that are blank."""
    several = () if text is None else (text,) if isinstance(text, str) else text
    if not isinstance(several, tuple | list) or not all(isinstance(caption, str) for caption in several):
        raise TypeError(f"the text of an image must be a `str`, a tuple of these, or None; got {text!r}")
    return tuple(caption for caption in several if caption.strip())


def to_text(value: str | list[str | None] | None) -> str | tuple[str, ...]:
    """A text, or a list of texts, as it stands in a table; null is an empty text."""
    return tuple(part or "" for part in value) if isinstance(value, list) else value or ""


def check_texts(source: AbstractImages) -> None:
    """Refuses a source that looks as if nobody had said where its captions are."""
    # Over all of the source: there can be many images without a caption side by side.
    look = np.unique(np.linspace(0, len(source) - 1, min(len(source), _LOOK)).astype(np.int64))
    if all(text is None for text in source.texts(look)):
        raise ValueError(
            f"{source!r}: none of {len(look)} rows has a text; say where the captions are, or make them from classes, with "
            "`templates`"
        )


def to_labels(
    values: Sequence[Any], names: Sequence[str] | None, place: Callable[[int], str]
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels as integers `[n]`, and the names of the classes, from labels that are numbers or names."""
    names = to_names(names)
    named = bool(values) and isinstance(values[0], str)
    for index, value in enumerate(values):
        if value is None:
            raise ValueError(f"{place(index)}: there is no label; every row needs one where labels are read")
        if isinstance(value, bool) or not isinstance(value, str if named else int):
            wanted = "a name, as in the first row" if named else "an integer, or everywhere a name"
            raise TypeError(f"{place(index)}: the label must be {wanted}; got {type(value).__name__}: {value!r}")
    if named:
        names = tuple(sorted(set(values))) if names is None else names
        numbers = {name: number for number, name in enumerate(names)}
        if len(numbers) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"labels that are names need names that differ; {twice!r} is there more than once")
        for index, value in enumerate(values):
            if value not in numbers:
                raise ValueError(f"{place(index)}: the label {value!r} is none of the names {_brief(names)}")
        values = [numbers[value] for value in values]
    for index, value in enumerate(values):
        check_label(value, names, index, place)
    return np.array(values, np.int32), names


def check_label(label: int, names: tuple[str, ...] | None, index: int, place: Callable[[int], str]) -> None:
    """Refuses a label beyond the names."""
    if not 0 <= label < (2**31 if names is None else len(names)):
        among = "" if names is None else f" There are {len(names)} names: {_brief(names)}."
        raise ValueError(f"{place(index)}: the label {label} is out of range.{among}")


def to_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of classes, or an error that says what is wrong with them."""
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`names` must be the names of the classes, in the order of the labels; got {names!r}")
    if not len(names):
        raise ValueError("`names` must hold at least one name")
    return tuple(names)


def hash_examples(kind: str, examples: Iterable[Example], names: tuple[str, ...] | None) -> str:
    """A hash of rows, of which one at a time is held in memory."""
    digest = hashlib.sha256(hash_parts(kind, *(names or ())).encode())
    for example in examples:
        image = example.image
        shape = "bytes" if isinstance(image, bytes) else f"{image.dtype.str} {image.shape}"
        raw = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
        text = repr(example.text)
        digest.update(f"{shape} {len(raw)} {len(text)} {example.label} ".encode())
        digest.update(raw)
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _brief(names: tuple[str, ...]) -> str:
    return f"{list(names)}" if len(names) <= 12 else f"{list(names[:12])} and {len(names) - 12} more"
