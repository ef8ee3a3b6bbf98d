"""Puts recursion into a model that others wrote, without editing it."""

import dataclasses
import itertools as it
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import equinox as eqx
import jax.random as jr
from jaxtyping import PyTree

from . import _observe
from ._handle import Stream
from ._loop import Loop, Rounds as LoopRounds
from ._policy import PerVisit
from ._program import Builder, loops_in, opens, origin, Program, Rounds, tally, used, Visit
from ._recur import bind, refuse_shared
from ._run import run
from ._signature import Signature
from ._tree import Node
from ._visit import apply, checked, Opening


class Rewired(eqx.Module):
    """Stands in the place of a sequence of layers. Has its length, and runs further rounds in the last slot of each group.

    The model goes on to iterate over what it takes for its layers, and to hand each its arguments. A loop such
    as `zip(self.layers, jr.split(key, depth))` would silently drop visits of a longer sequence; so the length stays.
    """

    layers: tuple[Callable, ...]
    """The layers, each once."""
    loops: dict[str, Loop]
    """The loops by the names of their exponents."""
    signature: Signature = eqx.field(static=True)
    """Which group is visited when."""
    tree: Node = eqx.field(static=True)
    stops: tuple[int, ...] = eqx.field(static=True)
    """For each block of the signature, in order, the layer behind its last."""

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Callable]:
        return (self._slot(i) for i in range(len(self.layers)))

    @overload
    def __getitem__(self, index: int) -> Callable: ...
    @overload
    def __getitem__(self, index: slice) -> list[Callable]: ...
    def __getitem__(self, index):
        places = range(len(self.layers))[index]
        return self._slot(places) if isinstance(places, int) else [self._slot(i) for i in places]

    def _slot(self, i: int) -> Callable:
        heads, tails = self.edges(i)
        # Where nothing happens before or after a layer, the model meets the layer itself.
        return Slot(self, i) if heads or tails else self.layers[i]

    def program(self) -> tuple[Builder, Program]:
        """The program, its blocks the groups of layers."""
        builder = Builder()

        # The blocks are asked for in order, each once.
        def leaf(name):
            first, stop = self._span(len(builder.blocks))
            return builder.block(Group(self.layers[first:stop]), name)

        return builder, builder.add(self.tree, self.loops, leaf)

    def edges(self, i: int) -> tuple[list[Rounds], list[Rounds]]:
        """The loops whose first round begins before layer `i`, and those whose first round ends behind it, inner first."""
        builder, program = self.program()
        heads, tails = [], []
        for node in loops_in(program):
            blocks = sorted(used(node)[0])
            low, high = self._span(blocks[0])[0], self._span(blocks[-1])[1]
            loop = None if node.loop is None else builder.loops[node.loop]
            if i == low and (opens(loop) or _observe.active()):
                heads.append(node)
            if i == high - 1:
                tails.append(node)
        return heads, tails

    def _span(self, block: int) -> tuple[int, int]:
        """The first layer of a block, and the one behind its last."""
        return (self.stops[block - 1] if block else 0), self.stops[block]


class Group(eqx.Module):
    """Layers one after the other, as a block."""

    layers: tuple[Callable, ...]

    def __call__(self, state: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        key = kwargs.get("key")
        for i, layer in enumerate(self.layers):
            if key is not None:
                kwargs["key"] = jr.fold_in(key, i)
            state = checked(state, layer(state, *args, **kwargs), _layer(layer))
        return state


class Slot(eqx.Module):
    """One layer as the model meets it, and what the loops do before and after its first visit."""

    rewired: Rewired
    index: int = eqx.field(static=True)

    def __call__(self, state: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        if isinstance(state, Stream):
            raise ValueError("a rewired model has no slots for a cache: it keeps its own, or none")
        heads, tails = self.rewired.edges(self.index)
        builder, _ = self.rewired.program()
        for loop in builder.loops:
            _refuse_policy(loop)
        env = builder.env(args, kwargs)
        if env.key is not None:
            # The layer splits the model's own key; further rounds draw from elsewhere, or the two could meet.
            env = dataclasses.replace(env, key=jr.fold_in(env.key, 2**31))
        for node in reversed(heads):
            state = _observe.enter(node, env, state) if _observe.active() else state
            if node.loop is not None and opens(builder.loops[node.loop]):
                state = apply(Visit(None), state, origin(env), env, Opening(node.loop, 0, None))
        layer = self.rewired.layers[self.index]
        state = checked(state, layer(state, *args, **kwargs), _layer(layer))
        for node in tails:
            # The model has run round 0.
            state = _observe.leave(node, env, state) if _observe.active() else state
            place = origin(env).after(tally(node.body, env))
            state = run(Rounds(node.body, node.fixed, node.loop, first=1), state, place, env)
        return state


def _refuse_policy(loop: Loop) -> None:
    if loop.cache is not None and not isinstance(loop.cache, PerVisit):
        raise ValueError(
            f"loop {loop.name} has the policy {loop.cache}, which a rewired model cannot have: its layers attend as they always did, "
            "and know of no cache to share. Use rx.compose on blocks that call rx.cache.open"
        )


def _layer(layer: Callable) -> str:
    return f"rewired layer {type(layer).__name__}"


def rewire(
    model: PyTree,
    where: Callable[[Any], Any],
    signature: str | Signature,
    *,
    split: Sequence[int] | None = None,
    **loops: Loop | LoopRounds,
) -> PyTree:
    """Puts recursion into a model whose forward pass iterates over a list, a tuple or an `eqx.nn.Sequential` of layers.

    The layers are split into a group for each block of the signature. The sequence keeps its length: the model runs each
    layer once, as before, and the last layer of a repeated group goes on to run the further rounds, with the side inputs it was
    given. At one round (and without adapters) the result is the old model, bit for bit.

    !!! example

        ```python
        import equinox as eqx
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        keys = jr.split(jr.key(0), 4)
        model = eqx.nn.Sequential([eqx.nn.MLP(8, 8, 16, 1, key=key) for key in keys])
        deeper = rx.rewire(model, lambda model: model.layers, "A^r B", r=3)
        deeper(jnp.ones(8))
        ```

    !!! warning

        What the model does between layers is not repeated. If it collects the outputs of layers, or adds something to the
        state halfway, it does so once, for the first round. If it hands keys to its layers by position, every further
        round uses the same key as the first; keys handed by name, as `key=`, are folded anew for every visit. The state
        must be the first positional argument of a layer.

    **Arguments:**

    - `model`: an Equinox model, or any pytree.
    - `where`: a function from the model to its sequence of layers.
    - `signature`: such as `"A^r B"` or `"A B^r C"`. Each block stands in it once.
    - `split`: how many layers each block has; by default equal parts.
    - `loops`: for each named exponent, a number of rounds or a [`rinsx.Loop`][], with an adapter if you like.

    **Returns:**

    The model with the sequence replaced; `rx.with_rounds` reaches its loops.

    **Raises:**

    `ValueError` for what cannot be rewired: a signature that names a block twice, a split that does not add up, a loop with an
    injection or a start state, stateful layers; and when the model is called, for layers in repeated groups
    that return anything but their first argument's structure, shapes and dtypes.
    """
    signature = Signature(signature)
    bound = bind(signature, loops)
    refuse_shared(bound)
    found = where(model)
    target = where
    if isinstance(found, eqx.nn.Sequential):
        target = lambda model: where(model).layers
        found = found.layers
    if not isinstance(found, list | tuple):
        raise TypeError(
            f"where must give a list, a tuple or an eqx.nn.Sequential of layers, got {type(found).__name__}"
        )
    layers = tuple(found)
    for i, layer in enumerate(layers):
        if not callable(layer):
            raise TypeError(f"layer {i} of the sequence is not callable: {layer!r}")
        if isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful():
            raise ValueError(
                f"layer {i} ({type(layer).__name__}) is stateful: it returns a second value, which rounds would lose"
            )
    text = [node.name for node in _blocks(signature.tree)]
    if len(text) != len(set(text)):
        raise ValueError(
            f"signature {str(signature)!r} names a block twice; in a rewired model each block stands once, in the order of its "
            "layers, since the model itself runs each layer once"
        )
    for name, loop in bound.items():
        if loop.inject is not None or loop.start is not None:
            raise ValueError(
                f"loop {name} has an injection or a start state, which a rewired model cannot have: its first round is run by the "
                "model, and the state that entered it is gone when the further rounds run. Use rx.compose on the layers"
            )
        _refuse_policy(loop)
    sizes = _split(len(layers), text, split)
    rewired = Rewired(layers, bound, signature, signature.tree, tuple(it.accumulate(sizes)))
    return eqx.tree_at(target, model, rewired, is_leaf=lambda node: node is found)


def _blocks(tree) -> list:
    """The blocks of a signature's tree in the order of the text."""
    if hasattr(tree, "parts"):
        return [block for part in tree.parts for block in _blocks(part)]
    return _blocks(tree.body) if hasattr(tree, "body") else [tree]


def _split(layers: int, names: list[str], split: Sequence[int] | None) -> list[int]:
    if split is None:
        if layers == 0 or layers % len(names):
            raise ValueError(
                f"{layers} layers cannot be split into {len(names)} equal groups ({', '.join(names)}): give split="
            )
        return [layers // len(names)] * len(names)
    sizes = list(split)
    if len(sizes) != len(names) or sum(sizes) != layers or any(size < 1 for size in sizes):
        raise ValueError(
            f"split={tuple(sizes)} must give each of the {len(names)} blocks {', '.join(names)} at least one layer, {layers} in all"
        )
    return sizes
