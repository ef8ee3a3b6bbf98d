"""What each array of a model is, by its place in the modules."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._loop import Loop
from .._stack import Stack
from ..adapters import AbstractAdapter


ROLES = ("matrix", "embedding", "vector", "norm", "adapter")


def roles(model: PyTree) -> PyTree[str | None]:
    """Says of each floating array in a model what it is, so that optimisers can treat matrices, norms, ... apart.

    The first rule that holds decides:

    - `"adapter"`: below a [`rinsx.adapters.AbstractAdapter`][], or below `adapter`, `inject` or `start` of a [`rinsx.Loop`][].
    - `"norm"`: below a module whose class has a name that ends in `Norm`.
    - `"embedding"`: below a module whose class is named `Embedding`; and the weight of an output head, that is a module in an
        attribute named `head`, whose class is named `Linear`.
    - `"vector"`: an array named `bias`, or of fewer than two axes.
    - `"matrix"`: anything else.

    The first axis of arrays in a [`rinsx.nn.Stack`][] is the number of the layer and does not count as an axis. Layers that were
    stacked in another way (`eqx.filter_vmap`) have one axis more than this can know.

    !!! example

        ```python
        import equinox as eqx
        import jax.random as jr
        import rinsx as rx

        mlp = eqx.nn.MLP(4, 4, 8, depth=1, key=jr.key(0))
        rx.train.roles(mlp).layers[0].weight  # 'matrix'
        rx.train.roles(mlp).layers[0].bias  # 'vector'
        ```

    **Arguments:**

    - `model`: any pytree, of arrays or of shapes; also its floating part, `eqx.filter(model, eqx.is_inexact_array)`.

    **Returns:**

    A pytree like `eqx.filter(model, eqx.is_inexact_array)`, with strings in place of arrays.
    """
    return _walk(model, inherited=None, head=False, name=None, stacked=0)


def axes(model: PyTree) -> PyTree[int | None]:
    """How many leading axes of each floating array number layers of stacks around it."""
    return _walk(model, inherited=None, head=False, name=None, stacked=0, count=True)


def _walk(node: Any, *, inherited: str | None, head: bool, name: str | None, stacked: int, count: bool = False) -> Any:
    children, structure = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if len(children) == 1 and children[0][0] == ():
        if not (hasattr(node, "dtype") and jnp.issubdtype(node.dtype, jnp.inexact)):
            return None
        if count:
            return min(stacked, node.ndim)
        if inherited is not None:
            return inherited
        if name == "bias" or node.ndim - stacked < 2:
            return "vector"
        return "embedding" if head else "matrix"
    kind = type(node).__name__
    if inherited is None:
        if isinstance(node, AbstractAdapter):
            inherited = "adapter"
        elif kind.endswith("Norm"):
            inherited = "norm"
        elif kind == "Embedding":
            inherited = "embedding"
    head = head or (name == "head" and kind == "Linear")
    found = []
    for path, child in children:
        below = getattr(path[0], "name", None)
        found.append(
            _walk(
                child,
                inherited="adapter"
                if isinstance(node, Loop) and below in ("adapter", "inject", "start")
                else inherited,
                head=head,
                # Containers pass the name on: the items of a list named `head` are not heads, but biases in it are biases.
                name=below if below is not None else (name if name == "bias" else None),
                stacked=stacked + (isinstance(node, Stack) and below == "layers"),
                count=count,
            )
        )
    return jtu.tree_unflatten(structure, found)
