"""The captions of images on their own: as a corpus, and as batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from ._captions import check_templates, fill, to_class_names, to_utf8
from ._images import AbstractImages, captions_in, check_texts
from ._loader import share
from ._pairs import Pairs
from ._sources import AbstractSource, documents, hash_texts
from ._windows import Batch


def captions_of(
    source: AbstractImages, templates: Sequence[str] | None = None, names: Sequence[str] | None = None
) -> AbstractSource:
    """The captions of images as a corpus, such as to train a tokeniser on: each caption is a document.

    Images are not read where the source can do without, as all of `rx.data` can. Empty captions are left out, and halves of
    surrogate pairs, which are no UTF-8, are U+FFFD, as [`rinsx.data.Captions`][] has them.

    !!! example

        ```python
        import rinsx as rx

        source = rx.data.digits()
        templates = ("a photo of the digit {}.", "a handwritten {}.")
        tokenizer = rx.data.BPE.train(rx.data.captions_of(source, templates), vocab_size=280)
        captions = rx.data.Captions(tokenizer, 24, templates=templates)
        ```

    **Arguments:**

    - `source`: the images.
    - `templates`: texts with one `{}` each, as for [`rinsx.data.Captions`][]. Then the captions are those of the names of all
        classes in all templates, each once. By default they are the texts of the source, all of them where an image has
        several.
    - `names`: the names that stand in the templates; by default those of the source.

    **Returns:**

    A [`rinsx.data.AbstractSource`][].

    **Raises:**

    `ValueError` if the source has no texts, or no names for the templates.
    """
    check_templates(templates)
    if templates is None:
        if names is not None:
            raise ValueError(f"`names` stand in `templates`, of which there are none; got {list(names)}")
        check_texts(source)
        return _CaptionsOf(source)
    names = to_class_names(source.names if names is None else names)
    if names is None:
        raise ValueError(f"{source!r} has no names of classes for the templates; give `names`")
    return documents([to_utf8(fill(template, name)) for name in names for template in templates])


def all_captions(
    pairs: Pairs, batch_size: int, *, shard: tuple[int, int] | None = None, threads: int = 1
) -> list[Batch]:
    """All captions of all images in batches, with the image that each belongs to: what [`rinsx.transfer.retrieval`][] needs where
    images have several captions.

    What [`rinsx.transfer.embed`][] makes of these batches has as its `labels` the `owners` of `retrieval`. They count the images as
    `embed` does with those of [`rinsx.data.evaluation`][]: rows that do not count, which are broken images and images
    without a caption, are left out. To know which these are, images are decoded here too. Nothing is added to
    `pairs.counts`.

    !!! example

        ```python
        import numpy as np
        import rinsx as rx

        class Squares(rx.data.AbstractImages):
            names = None

            def __len__(self):
                return 3

            def example(self, index):
                return rx.data.Example(np.zeros((4, 4), np.uint8), text=("a square", "black")[: index + 1])

            def fingerprint(self):
                return "squares"

            def place(self, index):
                return f"square {index}"

        pairs = rx.data.Pairs(Squares(), rx.data.Pixels(4), rx.data.Captions(rx.data.Bytes(), 12))
        first, second = rx.data.all_captions(pairs, 4)
        first["labels"], second["labels"]  # [0, 1, 1, 2], [2, 0, 0, 0]
        second["weights"]  # [1, 0, 0, 0]
        ```

    **Arguments:**

    - `pairs`: images with captions that are texts of the source.
    - `batch_size`, `shard`: as in [`rinsx.data.batches`][].
    - `threads`: how many threads decode.

    **Returns:**

    A list of dicts of arrays, of one shape: `tokens` int32 `[batch_size // count, context]`; `labels` int32, the number of the image,
    from 0; and `weights` float32, 1, or 0 for what fills up the last batch.

    **Raises:**

    `ValueError` if there are no captions, or they are made by templates: those are of classes, and the same for many images.
    """
    captions = pairs.captions
    if captions is None or captions.templates is not None:
        has = "has none" if captions is None else "makes them from classes, by templates: see `Captions.classes`"
        raise ValueError(f"the captions must be texts of the source; {pairs!r} {has}")
    rows = share(batch_size, shard)
    several = [found for found in pairs.each(lambda row: row.captions if row.counts else (), threads) if found]
    owners = [owner for owner, found in enumerate(several) for _ in found]
    texts = [text for found in several for text in found]
    batches = []
    for low in range(0, len(texts), batch_size):
        here = range(low + rows.start, min(low + rows.stop, len(texts)))
        batch = {
            "tokens": np.full((len(rows), captions.context), captions.end, np.int32),
            "labels": np.zeros(len(rows), np.int32),
            "weights": np.zeros(len(rows), np.float32),
        }
        for row, number in enumerate(here):
            batch["tokens"][row] = captions(texts[number])
            batch["labels"][row] = owners[number]
            batch["weights"][row] = 1
        batches.append(batch)
    return batches


@final
@dataclass(frozen=True, repr=False)
class _CaptionsOf(AbstractSource):
    source: AbstractImages

    def __repr__(self) -> str:
        return f"captions_of({self.source!r})"

    def documents(self) -> Iterator[str]:
        return (text for _, text in self._found())

    def fingerprint(self) -> str:
        return hash_texts("captions_of", self.documents())

    def place(self, index: int) -> str:
        row = next(row for number, (row, _) in enumerate(self._found()) if number == index)
        return self.source.place(row)

    def _found(self) -> Iterator[tuple[int, str]]:
        for row, text in enumerate(self.source.texts()):
            for caption in captions_in(text):
                yield row, to_utf8(caption)
