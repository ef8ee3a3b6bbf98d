"""Ranking: what embeddings are nearest to."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int


# Of scores at once.
_PIECE = 2**26


class Recall(NamedTuple):
    """What [`rinsx.transfer.retrieval`][] returns.

    **Attributes:**

    - `image_to_text`: for each k, the fraction of images of which one of their texts is among the k best texts.
    - `text_to_image`: for each k, the fraction of texts of which their image is among the k best images.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


# Here and below vectors are annotated without axes: shapes are checked inside, in words.
def classifier(vectors: Float[Array | np.ndarray, "..."]) -> Float[np.ndarray, "classes d"]:
    """The weights of a zero-shot classifier, from embeddings of the names of classes in several templates, as CLIP makes them
    ([Radford et al.](https://arxiv.org/abs/2103.00020)): unit vectors, their mean over the templates, made a unit vector again.

    !!! example

        ```python
        import numpy as np
        import rinsx as rx

        rx.transfer.classifier(np.array([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [0.0, 1.0]]]))
        # [[0.71, 0.71], [0, 1]]
        ```

    **Arguments:**

    - `vectors`: the embeddings, `[classes, templates, d]`, of any length but zero.

    **Returns:**

    Unit vectors, float32 `[classes, d]`, for [`rinsx.transfer.zero_shot`][].

    **Raises:**

    `ValueError` where `vectors` are of another rank, and, with the number of the class, where an embedding or the mean is zero or
    not finite.
    """
    wide = np.asarray(vectors, np.float64)
    check_axes("vectors", wide, "[classes, templates, d]; add an axis for one template")
    if 0 in wide.shape[:2]:
        raise ValueError(f"there must be at least one class and one template; got the shape {wide.shape}.")
    mean = np.mean(_unit(wide, "an embedding"), axis=1)
    # Unit vectors that cancel leave no more than their rounding.
    mean[np.linalg.norm(mean, axis=-1) < 1e-6] = 0
    return _unit(mean, "the mean embedding").astype(np.float32)


def zero_shot(
    images: Float[Array | np.ndarray, "..."],
    weights: Float[Array | np.ndarray, "..."],
    labels: Int[Array | np.ndarray, " labels"],
    k: int = 1,
) -> Bool[np.ndarray, " n"]:
    """Whether the right class of each image is among the `k` whose weights have the largest dot product with it.

    Dot products are taken in float64 and compared as float32. Ties count against the model: a class that scores as much as the
    right one is taken to come before it, and so is one whose score is not a number.

    !!! example

        ```python
        import numpy as np
        import rinsx as rx

        images = np.array([[1.0, 0.0], [0.6, 0.8]])
        rx.transfer.zero_shot(images, np.eye(2), np.array([0, 0]))  # [True, False]
        ```

    **Arguments:**

    - `images`: their embeddings, `[n, d]`, taken as they are.
    - `weights`: a vector for each class, `[classes, d]`, such as [`rinsx.transfer.classifier`][] makes.
    - `labels`: the right class of each, `[n]`.
    - `k`: how many guesses there are.

    **Returns:**

    For each image, whether it is right. The mean is the accuracy at `k`.

    **Raises:**

    `ValueError` where shapes do not fit each other, where a label is no class, and where `k` is less than 1 or more than the
    classes.
    """
    images, weights, labels = np.asarray(images), np.asarray(weights), np.asarray(labels)
    check_axes("images", images, "[n, d]")
    check_axes("weights", weights, "[classes, d]")
    check_widths(images=images, weights=weights)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"there must be one label an image, {len(images)}; got the shape {labels.shape}.")
    classes = len(weights)
    _within(labels, classes, "label", "classes")
    check_k(k, classes, "classes")
    return _places(images, weights, labels, np.arange(classes)) <= k


def retrieval(
    images: Float[Array | np.ndarray, "..."],
    texts: Float[Array | np.ndarray, "..."],
    owners: Int[Array | np.ndarray, " owners"] | None = None,
    at: Sequence[int] = (1, 5, 10),
) -> Recall:
    """Recall at k both ways. Of all texts, is one that belongs to the image among the k with the largest dot product? Of all
    images, is the one that the text belongs to?

    Dot products are taken in float64, a part of the pairs at a time, and compared as float32. Ties count against the model: whatever
    scores as much as what is right, and is wrong, is taken to come before it, and so is what has a score that is not a number.

    !!! example

        ```python
        import numpy as np
        import rinsx as rx

        images = np.eye(3)
        texts = np.array([[1.0, 0, 0], [0, 1, 0.5], [0, 1, 0], [0, 0.5, 0.4]])
        recall = rx.transfer.retrieval(images, texts, owners=np.array([0, 1, 1, 2]), at=(1, 2))
        recall.image_to_text  # {1: 2/3, 2: 1.0}: the third image prefers the second text
        recall.text_to_image  # {1: 3/4, 2: 1.0}: the last text prefers the second image
        ```

    **Arguments:**

    - `images`, `texts`: their embeddings, `[images, d]` and `[texts, d]`, taken as they are.
    - `owners`: the image that each text belongs to. Each image has at least one text. By default text `j` belongs to image `j`.
    - `at`: the numbers k.

    **Returns:**

    A [`rinsx.transfer.Recall`][].

    **Raises:**

    `ValueError` where shapes do not fit each other, where a text belongs to no image or an image has no text, and where a k is
    less than 1 or more than the images or the texts.
    """
    images, texts = np.asarray(images), np.asarray(texts)
    check_axes("images", images, "[images, d]")
    check_axes("texts", texts, "[texts, d]")
    check_widths(images=images, texts=texts)
    if owners is None and len(images) != len(texts):
        raise ValueError(
            f"text j belongs to image j unless `owners` says otherwise; got {len(images)} images and {len(texts)} texts."
        )
    owners = np.arange(len(texts)) if owners is None else np.asarray(owners)
    if owners.shape != texts.shape[:1]:
        raise ValueError(f"there must be one owner a text, {len(texts)}; got the shape {owners.shape}.")
    _within(owners, len(images), "owner", "images")
    alone = np.setdiff1d(np.arange(len(images)), owners)
    if alone.size > 0:
        raise ValueError(f"each image must have a text; {alone.size} have none, the first of them image {alone[0]}.")
    if len(at) == 0:
        raise ValueError(f"`at` must hold at least one number; got {at!r}.")
    for k in at:
        check_k(k, len(texts), "texts")
        check_k(k, len(images), "images")
    ids = np.arange(len(images))
    of_images, of_texts = _places(images, texts, ids, owners), _places(texts, images, owners, ids)
    share = lambda places: {operator.index(k): float(np.mean(places <= k)) for k in at}
    return Recall(image_to_text=share(of_images), text_to_image=share(of_texts))


def _places(queries, candidates, wanted, names) -> Int[np.ndarray, " queries"]:
    """The place, from 1, of the best candidate whose name is wanted, those that tie with it going first."""
    places = np.zeros(len(queries), np.int64)
    others = np.asarray(candidates, np.float64).T
    length = max(_PIECE // (8 * max(len(candidates), 1)), 1)
    for start in range(0, len(queries), length):
        part = slice(start, start + length)
        # Of equal vectors a library may make dot products that differ in the last bits: in float32 they are equal.
        scores = (np.asarray(queries[part], np.float64) @ others).astype(np.float32)
        own = wanted[part, None] == names
        best = np.max(np.where(own, scores, -np.inf), axis=1, keepdims=True)
        places[part] = 1 + np.sum(~own & ~(scores < best), axis=1)
    return places


def _unit(x, what: str):
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    bad = np.argwhere(~(np.isfinite(norms) & (norms > 0)))
    if len(bad) > 0:
        place = f"class {bad[0][0]}" + (f", template {bad[0][1]}" if x.ndim == 3 else "")
        raise ValueError(f"{what} must have a finite length that is not 0; got {norms[tuple(bad[0])]} of {place}.")
    return x / norms


def _within(numbers, count: int, name: str, of: str) -> None:
    bad = np.flatnonzero((numbers < 0) | (numbers >= count))
    if bad.size > 0:
        raise ValueError(f"each {name} must be one of the {count} {of}; got {numbers[bad[0]]} at {bad[0]}.")


def check_axes(name: str, x: np.ndarray, wanted: str) -> None:
    """`wanted` begins with the axes in brackets."""
    if x.ndim != wanted.partition("]")[0].count(",") + 1:
        raise ValueError(f"`{name}` must be {wanted}; got the shape {x.shape}.")


def check_widths(**vectors: np.ndarray) -> None:
    if len({x.shape[-1] for x in vectors.values()}) > 1:
        shapes = " and ".join(f"`{name}` of the shape {x.shape}" for name, x in vectors.items())
        raise ValueError(f"vectors must be of one width, that of the last axis; got {shapes}.")


def check_k(k: int, count: int, of: str) -> None:
    if not 1 <= operator.index(k) <= count:
        raise ValueError(f"k must be from 1 to the number of {of}, {count}; got {k}.")
