"""The layers of a model, as a recursion in the order of a signature."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray

from .._loop import Loop, Rounds
from .._recur import compose, Recursion
from .._signature import Signature
from .._stack import Stack
from ..gradient import AbstractStorage
from ..nn import Linear


def make_body(
    signature: Signature,
    layers: int,
    layer: Callable[[str, PRNGKeyArray], Callable],
    *,
    split: Sequence[int] | None,
    gradient: AbstractStorage | None,
    unroll: bool | None,
    key: PRNGKeyArray,
    loops: Mapping[str, Loop | Rounds],
) -> Recursion:
    """Blocks of the signature, each a stack of layers.

    Layer `i`, counted over all blocks, depends on the key and on `i` alone, so that models of one shape and different signatures
    start from the same weights.

    **Arguments:**

    - `layers`: how many there are in all blocks together.
    - `layer`: makes one, of the name of its block and a key.
    """
    keys = jr.split(key, layers)
    blocks, start = {}, 0
    for name, depth in zip(signature.blocks, shares(layers, signature, split)):
        # Bound now: the loop goes on before the layers of the next block are made.
        make = lambda key, name=name: layer(name, key)
        blocks[name] = Stack.make(make, depth, key=keys[start : start + depth], gradient=gradient, unroll=unroll)
        start += depth
    return compose(signature, blocks, **loops)


def shares(layers: int, signature: Signature, split: Sequence[int] | None) -> tuple[int, ...]:
    """How many layers each block has."""
    blocks = signature.blocks
    if split is None:
        if layers % len(blocks) != 0:
            raise ValueError(
                f"{layers} layers cannot be shared equally by the {len(blocks)} blocks of {str(signature)!r}: give "
                f"`split`, a number of layers for each of {', '.join(blocks)}."
            )
        return (layers // len(blocks),) * len(blocks)
    split = tuple(operator.index(depth) for depth in split)
    if len(split) != len(blocks) or min(split) < 1 or sum(split) != layers:
        raise ValueError(
            f"`split` gives each block of {str(signature)!r}, {', '.join(blocks)}, at least one of {layers} layers; got {split}."
        )
    return split


def computing_in(dtype: Any, body: Recursion) -> Recursion:
    """The layers with their matrices cast, once for all visits. Norms and adapters cast as they go."""
    cast = lambda node: jtu.tree_map(lambda w: w.astype(dtype), node) if isinstance(node, Linear) else node
    blocks = jtu.tree_map(cast, body.blocks, is_leaf=lambda node: isinstance(node, Linear))
    return dataclasses.replace(body, blocks=blocks)


def check_dtype(dtype: str) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"`dtype` must be 'float32' or 'bfloat16'; got {dtype!r}.")
