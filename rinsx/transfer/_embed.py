"""Embeddings of a whole data set, at every depth of interest."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..train import evaluate


class Embeddings(NamedTuple):
    """What [`rinsx.transfer.embed`][] returns.

    **Attributes:**

    - `vectors`: the embeddings at each depth: for each combination of rounds, a tuple in the order of their names, float32 `[n, d]`.
    - `labels`: int32 `[n]`, or `None` where batches have none.
    """

    vectors: dict[tuple[int, ...], Float[np.ndarray, "n d"]]
    labels: Int[np.ndarray, " n"] | None


def embed(
    model: PyTree,
    fn: Callable[[Any, Any, Any], Any],
    batches: Iterable[PyTree],
    *,
    rounds: Mapping[str, Sequence[int]] | None = None,
    key: PRNGKeyArray | None = None,
    mesh: Mesh | None = None,
) -> Embeddings:
    """Embeds every row of the batches, at each number of rounds asked for. It is [`rinsx.train.evaluate`][] that runs: one compiled
    program serves every depth, and each batch is read once.

    !!! example

        ```python
        import jax.random as jr
        import numpy as np
        import rinsx as rx

        model = rx.recur(rx.nn.MLP(4, 8, key=jr.key(0)), rx.Loop(2), name="r")
        batches = [{"images": np.ones((3, 4), np.float32), "labels": np.arange(3), "weights": np.array([1, 1, 0])}]
        found = rx.transfer.embed(model, lambda model, batch, key: model(batch["images"]), batches, rounds={"r": [1, 2]})
        found.vectors[(2,)].shape  # (2, 4): at r=2, and without the row of weight 0
        found.labels  # [0, 1]
        ```

    **Arguments:**

    - `model`: a model.
    - `fn`: `(model, batch, key) -> [rows, d]`, such as `lambda model, batch, key: model.embed_images(batch["images"])`. A function
        that is given again is not compiled again.
    - `batches`: batches of one shape, dicts of arrays. Rows whose `batch["weights"]` is 0, if there are weights, are left out.
        `batch["labels"]`, if there, are collected: integers, taken as int32.
    - `rounds`, `key`, `mesh`: as [`rinsx.train.evaluate`][] takes them.

    **Returns:**

    [`rinsx.transfer.Embeddings`][], rows in the order of the batches.

    **Raises:**

    `ValueError` where `fn` does not return a row for each weight and label, and what [`rinsx.train.evaluate`][] raises.
    """
    found = evaluate(model, _Rows(fn), batches, rounds=rounds, key=key, mesh=mesh)
    vectors, labels = {}, None
    for depth, (rows, facts) in found.items():
        facts = facts.reshape(-1, facts.shape[-1])
        keep = facts[:, 0] != 0
        vectors[depth] = rows.reshape(-1, rows.shape[-1])[keep]
        if facts.shape[1] == 3:
            high, low = facts[keep, 1:].astype(np.int32).T
            labels = (high << 16) | low
    return Embeddings(vectors, labels)


class _Rows(eqx.Module):
    """A loss whose total is the embeddings, and whose weight is what else is known of each row: its weight and its label."""

    fn: Callable

    def __call__(self, model, batch, key) -> tuple[Array, Array]:
        if not isinstance(batch, Mapping):
            raise TypeError(f"a batch must be a dict of arrays; got {type(batch).__name__}.")
        vectors = jnp.asarray(self.fn(model, batch, key))
        if vectors.ndim != 2 or not jnp.issubdtype(vectors.dtype, jnp.floating):
            raise ValueError(
                f"`fn` must return floating-point embeddings, [rows, d]; got {vectors.dtype}{list(vectors.shape)}."
            )
        rows = vectors.shape[:1]
        weights = jnp.asarray(batch.get("weights", jnp.ones(rows)))
        facts = {"weights": weights != 0}
        if "labels" in batch:
            labels = jnp.asarray(batch["labels"])
            if not jnp.issubdtype(labels.dtype, jnp.integer):
                raise TypeError(f'batch["labels"] must be integers; got {labels.dtype}.')
            labels = labels.astype(jnp.int32)
            # Every int32 in float32, which holds 24 bits.
            facts |= {"labels": labels >> 16, "the lower half": labels & 0xFFFF}
        for name, fact in facts.items():
            if fact.shape != rows:
                raise ValueError(
                    f"`fn` must return a row for each of batch[{name!r}]; got {rows[0]} rows, and the shape {fact.shape}."
                )
        return vectors, jnp.stack([fact.astype(jnp.float32) for fact in facts.values()], axis=1)
