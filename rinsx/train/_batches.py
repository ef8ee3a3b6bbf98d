"""Batches as the training loop takes them: several at a time, of one shape, and with a position to resume from."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from ._mesh import share_out


class Batches:
    """Takes batches, several at a time, and knows the position after the last."""

    def __init__(self, iterator: Iterator[Any], limit: int, accumulate: int, mesh: Mesh | None):
        self.iterator, self.limit, self.accumulate, self.mesh = iterator, limit, accumulate, mesh
        self.shapes: PyTree = None

    @property
    def state(self) -> Any:
        return self.iterator.get_state()  # pyright: ignore[reportAttributeAccessIssue]

    def take(self, count: int, step: int) -> PyTree:
        """`count` batches along a new first axis, which is filled up to the limit so that its length never changes."""
        batches = [self._next(step + i) for i in range(count)]
        batches += [batches[-1]] * (self.limit - count)
        return share_out(jtu.tree_map(lambda *x: np.stack(x), *batches), self.mesh, lead=1)

    def _next(self, step: int) -> PyTree:
        try:
            batch = next(self.iterator)
        except StopIteration:
            raise ValueError(f"the data ends at step {step}: let it repeat, or train for fewer steps.") from None
        batch = jtu.tree_map(lambda x: np.asarray(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)), batch)
        shapes = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        if self.shapes is None:
            rows = {x.shape[:1] for x in jtu.tree_leaves(shapes)}
            if len(rows) != 1 or () in rows or (rows.pop()[0] * jax.process_count()) % self.accumulate != 0:
                raise ValueError(
                    "the arrays of a batch have rows as their first axis, all of them as many, a multiple of accumulate="
                    f"{self.accumulate}; got {eqx.tree_pformat(shapes)}."
                )
            self.shapes = shapes
        elif not eqx.tree_equal(shapes, self.shapes):
            raise ValueError(
                f"batches must be of one shape; got {eqx.tree_pformat(shapes)} at step {step}, and before it "
                f"{eqx.tree_pformat(self.shapes)}."
            )
        return batch
