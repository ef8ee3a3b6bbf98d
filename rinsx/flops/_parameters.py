"""Parameters: how many there are, and how many a model without sharing would need."""

import dataclasses
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._loop import Loop
from .._program import Builder, Program, tally
from .._recur import Recursion, splice
from .._rewire import Rewired


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How many parameters a model has: what [`rinsx.flops.parameters`][] returns."""

    unique: int
    """Numbers stored: elements of floating arrays, however often they are visited. An array that stands at two places of a tree
    counts twice, whether it is given as an array or as a shape: training makes two of it."""
    visited: int
    """Numbers used: the parameters of a block as often as it is visited, everything else, loops' own parts included, once."""
    adapters: int
    """Numbers stored in the adapters of loops."""

    @property
    def adapter_share(self) -> Fraction:
        """The share of the adapters in all parameters."""
        return Fraction(self.adapters, self.unique) if self.unique else Fraction(0)


def parameters(model: PyTree) -> Parameters:
    """Counts the parameters of any model with recursions inside, from shapes alone.

    !!! example

        ```python
        import equinox as eqx
        import jax.random as jr
        import rinsx as rx

        block = eqx.nn.Linear(8, 8, key=jr.key(0))
        count = rx.flops.parameters(rx.recur(block, rx.Loop(3, adapter=rx.adapters.FiLM(8))))
        assert (count.unique, count.visited, count.adapters) == (72 + 16, 3 * 72 + 16, 16)
        ```

    **Arguments:**

    - `model`: any pytree, of arrays or of `jax.ShapeDtypeStruct`s.

    **Returns:**

    A [`rinsx.flops.Parameters`][], with `unique`, `visited`, `adapters` and `adapter_share`.

    **Raises:**

    `ValueError` if a number of rounds is traced, since how often a block is visited is then not known.
    """
    return Parameters(_size(model), _visited(model), sum(_size(loop.adapter) for loop in _loops(model)))


def _loops(tree: PyTree) -> list[Loop]:
    is_loop = lambda node: isinstance(node, Loop)
    return [node for node in jtu.tree_leaves(tree, is_leaf=is_loop) if isinstance(node, Loop)]


def _of_loops(tree: PyTree) -> int:
    """The parameters that belong to loops rather than blocks: of adapters, injections and starts."""
    return sum(_size(loop) for loop in _loops(tree))


def _size(tree: PyTree) -> int:
    arrays = (leaf for leaf in jtu.tree_leaves(tree) if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct))
    return sum(leaf.size for leaf in arrays if jnp.issubdtype(leaf.dtype, jnp.inexact))


def _program(node: Recursion | Rewired) -> tuple[Builder, Program]:
    if isinstance(node, Rewired):
        return node.program()
    builder = Builder()
    return builder, splice(node, builder)


def _visited(tree: PyTree) -> int:
    """The parameters of a tree, those of blocks as often as they are visited."""
    is_recursion = lambda node: isinstance(node, Recursion | Rewired)
    total = 0
    for node in jtu.tree_leaves(tree, is_leaf=is_recursion):
        if not is_recursion(node):
            total += _size(node)
            continue
        builder, program = _program(node)
        for loop in builder.loops:
            if not loop.static:
                raise ValueError(
                    f"how often blocks are visited is not known while the rounds of loop {loop.name} are traced: "
                    f"use rx.with_rounds(model, {loop.name}=...) with a Python integer"
                )
        env = builder.env((), {})
        visits: Any = tally(program, env).visits
        for times, block in zip(visits, builder.blocks):
            once = _of_loops(block)
            total += times * (_visited(block) - once) + once
        total += sum(_of_loops(loop) for loop in builder.loops)
    return total
