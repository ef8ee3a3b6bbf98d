"""Captions: texts as tokens of one length, and captions made from the names of classes."""

from collections.abc import Sequence
from typing import final

import numpy as np
from jaxtyping import Int32

from ._images import to_names
from ._tokenizers import AbstractTokenizer


@final
class Captions:
    """Turns captions into rows of `context` tokens: the text, then the tokeniser's `end` up to the end of the row.

    The last token is always `end`: of a longer caption the first `context - 1` tokens are kept. Halves of surrogate pairs, which
    are no UTF-8, become U+FFFD.

    With `templates` captions are made from classes: the name stands where the template has `{}`. In training one template is
    drawn for each row, in evaluation it is the first.

    !!! example

        ```python
        import rinsx as rx

        captions = rx.data.Captions(rx.data.Bytes(), 24, templates=("a photo of a {}.", "a {}."), names=("cat", "dog"))
        captions("a").tolist()[:3]  # [97, 256, 256]
        captions.classes().shape  # (2, 2, 24): for zero-shot classification
        ```

    **Attributes:**

    - `tokenizer`, `context`, `templates`, `names`: as given.
    - `vocab_size`, `end`: those of the tokeniser.
    """

    def __init__(
        self,
        tokenizer: AbstractTokenizer,
        context: int,
        templates: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ):
        """**Arguments:**

        - `tokenizer`: a [`rinsx.data.AbstractTokenizer`][].
        - `context`: how many tokens a row has, at least 2.
        - `templates`: texts with one `{}` each, such as `"a photo of a {}."`. By default captions are the texts of the source.
        - `names`: what stands in the templates, in the order of the labels; by default the names that the source has. A
            class can have another name in captions than in the source.

        **Raises:**

        `ValueError` if a template has not one `{}`, a name is blank, or a number is out of range.
        """
        if context < 2:
            raise ValueError(f"`context` must be at least 2: a token and `end`; got {context}")
        check_templates(templates)
        if names is not None and templates is None:
            raise ValueError(f"`names` stand in `templates`, of which there are none; got {list(names)}")
        self.tokenizer = tokenizer
        self.context = context
        self.templates = None if templates is None else tuple(templates)
        self.names = to_class_names(names)
        self.vocab_size = tokenizer.vocab_size
        self.end = tokenizer.end

    def __repr__(self) -> str:
        return f"Captions({self.tokenizer!r}, {self.context}, templates={self.templates})"

    def __call__(self, text: str) -> Int32[np.ndarray, " context"]:
        """The tokens of one caption.

        **Arguments:**

        - `text`: the caption.

        **Returns:**

        int32 `[context]`.
        """
        return self.read(text)[0]

    def read(self, text: str) -> tuple[Int32[np.ndarray, " context"], list[str]]:
        """The tokens of one caption, and what was met, as kinds to count."""
        found = []
        whole = to_utf8(text)
        if whole != text:
            found.append("captions not UTF-8")
        ids = self.tokenizer.encode(whole)
        if len(ids) >= self.context:
            found.append("captions cut off")
        row = np.full(self.context, self.end, np.int32)
        kept = ids[: self.context - 1]
        row[: len(kept)] = kept
        return row, found

    def classes(self, names: Sequence[str] | None = None) -> Int32[np.ndarray, "classes templates context"]:
        """The tokens of every class in every template, as for zero-shot classification.

        **Arguments:**

        - `names`: the names of the classes; by default those that were given.

        **Returns:**

        int32 `[classes, templates, context]`.

        **Raises:**

        `ValueError` if there are no templates or no names, or a name is blank.
        """
        return self.read_classes(names)[0]

    def read_classes(
        self, names: Sequence[str] | None = None
    ) -> tuple[Int32[np.ndarray, "classes templates context"], list[list[list[str]]]]:
        """The tokens of every class in every template, and for each what was met, as kinds to count."""
        names = self.names if names is None else to_class_names(names)
        if self.templates is None:
            raise ValueError("`templates` are needed to make captions of classes; these captions have none")
        if names is None:
            raise ValueError("`names` are needed to make captions of classes: neither source nor captions have any")
        rows = [[self.read(fill(template, name)) for template in self.templates] for name in names]
        return np.array([[ids for ids, _ in row] for row in rows], np.int32), [[f for _, f in row] for row in rows]


def to_utf8(text: str) -> str:
    """A text in which halves of surrogate pairs, which are no UTF-8, are U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def fill(template: str, name: str) -> str:
    return template.replace("{}", name)


def check_templates(templates: Sequence[str] | None) -> None:
    """Refuses templates that are none; `None` is for the captions of the source."""
    if isinstance(templates, str):
        raise TypeError(f"`templates` must be several texts; got {templates!r}. Write ({templates!r},).")
    if templates is not None and not len(templates):
        raise ValueError("`templates` must hold at least one text, or be None for the captions of the source")
    for template in templates or ():
        if template.count("{}") != 1:
            raise ValueError(f"a template must have one {{}}, where the name of the class stands; got {template!r}")


def to_class_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names that can stand in captions: a blank one would make a caption of nothing."""
    found = to_names(names)
    for index, name in enumerate(found or ()):
        if not name.strip():
            raise ValueError(
                f"the names of classes that stand in templates must not be blank; name {index} is {name!r}"
            )
    return found
