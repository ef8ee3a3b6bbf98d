"""Zero-shot classification of a whole data set, at every depth of interest."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from ._embed import embed
from ._rank import check_axes, check_k, classifier, zero_shot


def _embed_images(model, batch, key) -> Array:
    return model.embed_images(batch["images"])


def _embed_texts(model, batch, key) -> Array:
    return model.embed_texts(batch["tokens"])


def evaluate_zero_shot(
    model: PyTree,
    batches: Iterable[PyTree],
    tokens: Int[Array | np.ndarray, "..."],
    *,
    rounds: Mapping[str, Sequence[int]] | None = None,
    k: int = 1,
    images: Callable[[Any, Any, Any], Any] = _embed_images,
    texts: Callable[[Any, Any, Any], Any] = _embed_texts,
    batch_size: int = 256,
    key: PRNGKeyArray | None = None,
    mesh: Mesh | None = None,
) -> dict[tuple[int, ...], Bool[np.ndarray, " n"]]:
    """Tells the class of every image by the captions of all classes, at each number of rounds asked for: images and captions
    are embedded at the same rounds. It is [`rinsx.transfer.embed`][], [`rinsx.transfer.classifier`][] and
    [`rinsx.transfer.zero_shot`][] in one.

    !!! example

        ```python
        import jax.random as jr
        import numpy as np
        import rinsx as rx

        config = rx.models.siglip_presets["nano"]
        image = rx.models.ViT(config.image, "A^r B", r=2, key=jr.key(0))
        model = rx.models.SigLIP(image, rx.models.TextEncoder(config.text, key=jr.key(1)))

        captions = rx.data.Captions(rx.data.Bytes(), config.text.context, templates=("a {}.", "one {}."), names=("cat", "dog"))
        batches = [{"images": np.ones((3, 32, 32, 3), np.float32), "labels": np.array([0, 1, 1])}]
        right = rx.transfer.evaluate_zero_shot(model, batches, captions.classes(), rounds={"r": [1, 2]})
        right[(2,)].mean()  # the accuracy at r=2
        ```

    **Arguments:**

    - `model`: a model, such as a [`rinsx.models.SigLIP`][].
    - `batches`: batches of images as [`rinsx.transfer.embed`][] takes them, with `labels`.
    - `tokens`: the captions of all classes, `[classes, templates, context]`, such as `rx.data.Captions.classes` makes. Every
        process gives all of them.
    - `rounds`, `key`, `mesh`: as [`rinsx.train.evaluate`][] takes them.
    - `k`: how many guesses there are.
    - `images`, `texts`: `(model, batch, key) -> [rows, d]`, for batches with `images` and batches with `tokens`. By default
        `model.embed_images(batch["images"])` and `model.embed_texts(batch["tokens"])`, without a key.
    - `batch_size`: the most captions that are embedded at once, by all processes together: a multiple of the devices of the mesh.
        What is made of them, a vector a caption and depth, is held on the host.

    **Returns:**

    For each combination of rounds, a tuple in the order of the names, whether each image is right, in the order of the batches
    and without rows of weight 0. The mean is the accuracy at `k`. Without `rounds` there is one, `()`.

    **Raises:**

    `ValueError` where `tokens` are of another rank, where batches have no labels, and what the three functions raise.
    """
    tokens = np.asarray(tokens)
    check_axes("tokens", tokens, "[classes, templates, context]; add an axis for one template")
    classes, templates, context = tokens.shape
    if classes * templates == 0:
        raise ValueError(f"there must be at least one class and one template; got the shape {tokens.shape}.")
    check_k(k, classes, "classes")
    devices = 1 if mesh is None else mesh.size
    if batch_size < 1 or batch_size % devices != 0:
        raise ValueError(
            f"`batch_size` must be a positive multiple of the number of devices of the mesh, {devices}; got {batch_size}."
        )
    same: dict[str, Any] = {"rounds": rounds, "key": key, "mesh": mesh}
    told = embed(model, texts, _captions(tokens.reshape(-1, context), batch_size, devices), **same)
    ensemble = lambda vectors: classifier(vectors.reshape(classes, templates, -1))
    weights = {depth: ensemble(vectors) for depth, vectors in told.vectors.items()}
    seen = embed(model, images, batches, **same)
    if seen.labels is None:
        raise ValueError('the batches must have "labels", the number of the right class of each image.')
    return {depth: zero_shot(vectors, weights[depth], seen.labels, k) for depth, vectors in seen.vectors.items()}


def _captions(rows: np.ndarray, batch_size: int, devices: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of this process's part of the captions, the last one filled up with rows of weight 0."""
    size = min(batch_size, -(-len(rows) // devices) * devices)
    process, processes = jax.process_index(), jax.process_count()
    for start in range(0, len(rows), size):
        numbers = start + np.arange(process * size // processes, (process + 1) * size // processes)
        yield {
            "tokens": rows[np.minimum(numbers, len(rows) - 1)],
            "weights": (numbers < len(rows)).astype(np.float32),
        }
