"""Recursion operators: they take blocks and return a block."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, final

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._cache import Cache
from ._handle import Stream
from ._lines import check_layout
from ._loop import Loop, Rounds
from ._new_cache import new_cache
from ._policy import PerVisit
from ._program import Builder, origin, Program
from ._run import run
from ._signature import Signature
from ._tree import Node
from ._visit import as_state


@final
class Recursion(eqx.Module):
    """A block made of blocks: the result of [`rinsx.compose`][], [`rinsx.recur`][] and [`rinsx.chain`][].

    Holds every block once, however often it is visited, so the gradients of all its visits meet in the same leaves.
    """

    blocks: dict[str, Callable]
    """The blocks by their names in the signature."""
    loops: dict[str, Loop]
    """The loops by the names of their exponents."""
    signature: Signature = eqx.field(static=True)
    """Which block is visited when."""
    # Signatures are equal by meaning; programs that are compiled must tell `A^r A` from `A A^r`, whose adapters differ.
    tree: Node = eqx.field(static=True)

    def __call__(self, state: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        """Visits the blocks in the order of the signature.

        **Arguments:**

        - `state`: any pytree of arrays, whose structure, shapes and dtypes every block keeps.
        - `args`, `kwargs`: side inputs, passed to every visit as they are. A `key=` is folded for each visit with
            the block and the number of its earlier visits.

        **Returns:**

        The state after the last visit.

        **Raises:**

        `ValueError` if a block changes the structure, a shape or a dtype of the state, and if a number of rounds is
        out of range. For a traced number of rounds the range is checked when the program runs.
        """
        builder = Builder()
        program = splice(self, builder)
        state = as_state(state)
        shares = [loop for loop in builder.loops if loop.cache is not None and not isinstance(loop.cache, PerVisit)]
        if isinstance(state, Stream) or not shares:
            return _run(program, builder, state, args, kwargs)
        for loop in shares:
            if not loop.cache.parallel:  # pyright: ignore[reportOptionalMemberAccess]
                raise ValueError(
                    f"{loop.name} has the policy {loop.cache}, which is sequential: it is defined token by token, with a cache of "
                    "rx.cache.make. A forward pass of all positions, as in training, needs a parallel one, such as rx.cache.First()"
                )
        # Rounds share keys and values: a cache of this pass alone brings them from round to round.
        cache = new_cache(builder, program, state, None, args, kwargs, whole=True, aligned=True, trusted=True)
        t: Any = cache.capacity
        return _run(program, builder, Stream(state, cache.begin(t)), args, kwargs).x


def _run(program: Program, builder: Builder, state: PyTree, args: tuple, kwargs: dict[str, Any]) -> PyTree:
    if isinstance(state, Stream) and not isinstance(state.cache, Cache):
        raise ValueError(
            "a recursion inside a block was given the state of the block, with a cache: compose it with the others, so that its "
            "visits have slots too, or call it on the x of x, cache = rx.cache.open(state)"
        )
    env = builder.env(args, kwargs, state.cache.layout if isinstance(state, Stream) else None)
    check_layout(program, env)
    return run(program, state, origin(env), env)


def splice(recursion: Recursion, builder: Builder, prefix: str = "") -> Program:
    """The program of a recursion, with those of its blocks that are recursions themselves spliced in."""

    def leaf(name: str) -> Program:
        block = recursion.blocks[name]
        if isinstance(block, Recursion):
            return splice(block, builder, f"{prefix}{name}.")
        return builder.block(block, prefix + name)

    return builder.add(recursion.tree, recursion.loops, leaf)


def compose(signature: str | Signature, blocks: Mapping[str, Callable], **loops: Loop | Rounds) -> Recursion:
    """Composes blocks into one block that visits them in the order of a signature.

    !!! example

        ```python
        import equinox as eqx
        import jax.numpy as jnp
        import jax.random as jr
        import rinsx as rx

        key_a, key_b = jr.split(jr.key(0))
        blocks = {"A": eqx.nn.MLP(4, 4, 8, 1, key=key_a), "B": eqx.nn.MLP(4, 4, 8, 1, key=key_b)}
        model = rx.compose("A^r B", blocks, r=3)
        model(jnp.ones(4))
        ```

    ??? cite "Reference"

        `A^r B`, run with `r > 1`, is Recursive INference Scaling: Alabdulmohsin and Zhai, "Recursive Inference Scaling",
        arXiv 2502.07503.

    **Arguments:**

    - `signature`: which block is visited when, such as `"A^r B"`; see [`rinsx.Signature`][].
    - `blocks`: a block for each capital letter of the signature. A block is a callable
        `block(state, *args, **kwargs) -> state` that keeps the state's structure, shapes and dtypes.
    - `loops`: for each named exponent, a number of rounds or a [`rinsx.Loop`][].

    **Returns:**

    A block.

    **Raises:**

    `ValueError` if blocks or exponents are missing or superfluous, or if the same module stands under two names.
    """
    signature = Signature(signature)
    _match("block", set(signature.blocks), set(blocks), signature, "give it in blocks=")
    bound = bind(signature, loops)
    for name, block in blocks.items():
        if not callable(block):
            raise TypeError(f"block {name} is not callable: {block!r}")
    refuse_shared({**blocks, **bound})
    return Recursion(dict(blocks), bound, signature, signature.tree)


def recur(block: Callable, loop: Loop | Rounds, name: str = "r") -> Recursion:
    """Repeats a block: `rx.recur(block, rx.Loop(3))` is `rx.compose("A^r", {"A": block}, r=rx.Loop(3))`.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        model = rx.recur(rx.lift(jnp.sin), 3)
        model(jnp.ones(2))
        rx.with_rounds(model, r=5)(jnp.ones(2))
        ```

    **Arguments:**

    - `block`: a block.
    - `loop`: a number of rounds or a [`rinsx.Loop`][].
    - `name`: the name of the loop, one small letter, under which [`rinsx.with_rounds`][] finds it.

    **Returns:**

    A block.
    """
    return compose(f"A^{name}", {"A": block}, **{name: loop})


def chain(*blocks: Callable) -> Recursion:
    """Applies blocks one after the other: `rx.chain(a, b)` is `rx.compose("A B", {"A": a, "B": b})`.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        model = rx.chain(rx.recur(rx.lift(jnp.sin), 3), rx.lift(jnp.cos))
        model(jnp.ones(2))
        ```

    **Arguments:**

    - `blocks`: at least one block. They are named `A`, `B`, ..., `Z`, `A1`, `B1`, ...

    **Returns:**

    A block.
    """
    if not blocks:
        raise ValueError("chain needs at least one block")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = [letters[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(len(blocks))]
    return compose(" ".join(names), dict(zip(names, blocks)))


def bind(signature: Signature, loops: Mapping[str, Loop | Rounds]) -> dict[str, Loop]:
    """A loop for each named exponent of the signature, told its name."""
    _match("exponent", set(signature.exponents), set(loops), signature, "bind it, as in r=3 or r=rx.Loop(3)")
    bound = {}
    for name, given in loops.items():
        loop = given if isinstance(given, Loop) else Loop(given)
        if loop.name not in (None, name):
            raise ValueError(f"a loop named {loop.name} cannot be bound to the exponent {name}")
        bound[name] = dataclasses.replace(loop, name=name)
    return bound


def _match(kind: str, wanted: set[str], given: set[str], signature: Signature, remedy: str) -> None:
    if missing := sorted(wanted - given):
        raise ValueError(
            f"signature {str(signature)!r} has the {kind} {', '.join(missing)}, which was not given: {remedy}"
        )
    if extra := sorted(given - wanted):
        raise ValueError(
            f"{kind} {', '.join(extra)} was given, but signature {str(signature)!r} has only {', '.join(sorted(wanted)) or 'none'}"
        )


def refuse_shared(parts: Mapping[str, PyTree]) -> None:
    """Two names for one module would become two copies, whose gradients no longer meet."""
    owners: dict[int, str] = {}
    for name, part in parts.items():
        for leaf in jtu.tree_leaves(eqx.filter(part, eqx.is_inexact_array)):
            if owners.setdefault(id(leaf), name) != name:
                raise ValueError(
                    f"{owners[id(leaf)]} and {name} hold the same array, {eqx.tree_pformat(leaf)}: a pytree would turn "
                    "it into two copies that train apart. Use one name for one module: 'A B A' visits A twice"
                )
