"""Images in folders: one folder for each class, or captions in files beside the images."""

import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from ._images import AbstractImages, Example, hash_examples, rows_of, to_names


# What Pillow reads everywhere, by the ends of names.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_folder(
    path: str | os.PathLike, *, captions: bool | None = None, names: Sequence[str] | None = None
) -> AbstractImages:
    """Images that are files in folders. Two layouts are read.

    - *Classes*: each folder in `path` is a class, and all images below it are of that class. Labels count the folders,
        sorted by name.
    - *Captions*: beside an image lies its caption, UTF-8, under the same name with the suffix `.txt`, as in `a.jpg` and
        `a.txt`. A file is one caption, of as many lines as it has. An image without one has no caption, which
        [`rinsx.data.Pairs`][] counts.

    Images are files that end in `.bmp`, `.gif`, `.jpeg`, `.jpg`, `.pgm`, `.png`, `.ppm`, `.tif`, `.tiff` or `.webp`, in small or
    capital letters, sorted by path. Left out are other files, and all whose names, or those of their folders, begin with a dot.
    Links to folders are followed.

    !!! example

        ```python
        import pathlib
        import tempfile
        import numpy as np
        import rinsx as rx
        from PIL import Image

        with tempfile.TemporaryDirectory() as folder:
            for name in ("cat", "dog"):
                pathlib.Path(folder, name).mkdir()
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(pathlib.Path(folder, name, "1.png"))
            source = rx.data.image_folder(folder)
            print(source.names, source.example(1).label)  # ("cat", "dog") 1
        ```

    **Arguments:**

    - `path`: the folder.
    - `captions`: whether the layout is that of captions. By default it is if there is a `.txt` file under the name of some image.
    - `names`: for classes, the names of the folders in the order of their labels; one of them can be missing, as in a part
        of a data set.

    **Returns:**

    A [`rinsx.data.AbstractImages`][].

    **Raises:**

    `FileNotFoundError` if the folder is missing, has no images, or has a class without images. `ValueError` if an image
    lies outside of the classes, no image has a caption, a caption has no image, or several, or a folder holds a link to one
    that it lies in.
    """
    path, names = pathlib.Path(path), to_names(names)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    files = _walk(path)
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        raise FileNotFoundError(f"the folder {path} has no images: no files that end in {', '.join(SUFFIXES)}")
    texts = {file for file in files if file.suffix == ".txt"}
    if captions is None:
        captions = any(image.with_suffix(".txt") in texts for image in images)
    if not captions:
        return _classes(path, images, names)
    if names is not None:
        raise ValueError(f"{path} is read with captions, which have no classes; got names={list(names)}")
    wanted = Counter(image.with_suffix(".txt") for image in images)
    for image in images:
        text = image.with_suffix(".txt")
        if text in texts and wanted[text] > 1:
            raise ValueError(f"{path / image}: another image has the same caption {path / text}")
    if alone := sorted(texts - wanted.keys()):
        raise ValueError(f"{path / alone[0]}: there is no image beside this caption")
    if not texts:
        raise ValueError(
            f"{path / images[0]}: there is no caption {images[0].stem}.txt beside it, nor beside any image"
        )
    return _Folder(path, tuple(images), None, None, frozenset(texts))


def _walk(path: pathlib.Path) -> list[pathlib.Path]:
    """All files below a folder, by their paths from there, sorted. Links to folders are followed."""
    found: list[pathlib.Path] = []
    # The folders that are still to be read, each with those that it lies in, by what they are on the disk.
    left: list[tuple[pathlib.Path, dict[tuple[int, int], pathlib.Path]]] = [(pathlib.Path(), {})]
    while left:
        below, above = left.pop()
        stat = os.stat(path / below)
        itself = stat.st_dev, stat.st_ino
        if itself in above:
            raise ValueError(
                f"by a link, {path / below} is {path / above[itself]} again, which it lies in: its files would have no end"
            )
        with os.scandir(path / below) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                if entry.is_dir():
                    left.append((below / entry.name, {**above, itself: below}))
                else:
                    found.append(below / entry.name)
    return sorted(found, key=lambda file: file.parts)


def _classes(path: pathlib.Path, images: list[pathlib.Path], names: tuple[str, ...] | None) -> "_Folder":
    for image in images:
        if len(image.parts) == 1:
            raise ValueError(f"{path / image}: an image must lie in the folder of its class, below {path}")
    found = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and folder.name[0] != ".")
    with_images = {image.parts[0] for image in images}
    for name in found:
        if names is None and name not in with_images:
            raise FileNotFoundError(f"the folder {path / name} has no images, and would be a class without any")
        if names is not None and name in with_images and name not in names:
            raise ValueError(f"the folder {path / name} is none of the classes {list(names)}")
    names = tuple(found) if names is None else names
    if len(set(names)) < len(names):
        raise ValueError(f"`names` are names of folders, each once; got {list(names)}")
    labels = np.array([names.index(image.parts[0]) for image in images], np.int32)
    return _Folder(path, tuple(images), labels, names)


@final
@dataclass(frozen=True, eq=False, repr=False)
class _Folder(AbstractImages):
    path: pathlib.Path
    images: tuple[pathlib.Path, ...]
    labels: np.ndarray | None
    names: tuple[str, ...] | None
    captions: frozenset[pathlib.Path] = frozenset()

    def __repr__(self) -> str:
        return f"image_folder({self.path})"

    def __len__(self) -> int:
        return len(self.images)

    def example(self, index: int) -> Example:
        image = (self.path / self.images[index]).read_bytes()
        if self.labels is not None:
            return Example(image, label=int(self.labels[index]))
        return Example(image, text=self._text(index))

    def texts(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[str | None]:
        return map(self._text, rows_of(self, indices))

    def _text(self, index: int) -> str | None:
        text = self.images[index].with_suffix(".txt")
        if text not in self.captions:
            return None
        # What is no UTF-8 becomes halves of surrogate pairs, which `Captions` replaces and counts.
        return (self.path / text).read_bytes().decode("utf-8", "surrogateescape")

    def fingerprint(self) -> str:
        return hash_examples("image_folder", map(self.example, range(len(self))), self.names)

    def place(self, index: int) -> str:
        return str(self.path / self.images[index])
