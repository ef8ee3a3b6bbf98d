"""A loop: one exponent of a signature with its options, and the number of its rounds as a choice at run time."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Int, PyTree

from ._policy import AbstractPolicy
from .adapters import AbstractAdapter
from .gradient import AbstractGradient
from .start import AbstractStart


Rounds = int | Int[Array, ""] | jax.ShapeDtypeStruct


class Loop(eqx.Module):
    """One exponent of a signature, with everything that can be said about its rounds.

    In every round of the loop, the state first takes in the loop's input (`inject`), then passes the adapter, then visits
    the blocks of the group. All three are absent by default, and then cost nothing.

    !!! example

        ```python
        import jax
        import rinsx as rx

        block = rx.lift(lambda x: jax.numpy.tanh(2 * x))
        model = rx.recur(block, rx.Loop(3, max=8))
        model(jax.numpy.ones(4))
        ```
    """

    rounds: Rounds
    adapter: Callable | None
    inject: Callable | None
    start: AbstractStart | Callable | None
    gradient: AbstractGradient | None
    cache: AbstractPolicy | None
    max: int | None = eqx.field(static=True)
    on: Callable[[Any], PyTree] | None = eqx.field(static=True)
    unroll: bool | None = eqx.field(static=True)
    name: str | None = eqx.field(static=True)

    def __init__(
        self,
        rounds: Rounds,
        *,
        max: int | None = None,
        adapter: Callable | None = None,
        inject: Callable | None = None,
        start: Callable | None = None,
        gradient: AbstractGradient | None = None,
        cache: AbstractPolicy | None = None,
        on: Callable[[Any], PyTree] | None = None,
        unroll: bool | None = None,
        name: str | None = None,
    ):
        """**Arguments:**

        - `rounds`: how many rounds, at least 1. A Python integer is compiled in; an integer scalar of JAX is a run-time value that
            runs in one executable.
        - `max`: the largest number of rounds that reverse mode can record when `rounds` is traced: it sizes the tape of
            saved states. Not needed for Python integers, nor for inference without a cache. A cache has slots for
            so many rounds.
        - `adapter`: `(state, round) -> state`, one of [`rinsx.adapters`][] or your own; `round` counts from 0.
        - `inject`: `(state, input, round) -> state`, one of [`rinsx.injection`][] or your own; `input` is the state with which
            the loop was entered.
        - `start`: `(input, key) -> state`, one of [`rinsx.start`][] or your own: the state that the first round starts from.
            By default the loop's input, or zeros where `inject` brings the input in.
        - `gradient`: one of [`rinsx.gradient`][]; by default chosen with the form of the loop.
        - `cache`: one of the policies of [`rinsx.cache`][]: which keys and values the rounds share. By default each has its own.
        - `on`: which part of the state `adapter`, `inject` and `start` act on, such as `lambda state: state.x`. By default
            all of it.
        - `unroll`: `True` repeats the program for every round, `False` rolls it into a loop. By default chosen
            by backend and size.
        - `name`: set by [`rinsx.compose`][] from the signature.
        """
        self.rounds = checked_rounds(rounds, "rounds")
        if max is not None:
            if isinstance(max, bool) or not isinstance(max, int) or max < 1:
                raise ValueError(f"Loop(max=...) is an integer of at least 1, got {max!r}")
        for label, option in (("adapter", adapter), ("inject", inject), ("start", start), ("on", on)):
            if not (option is None or callable(option)):
                raise TypeError(f"Loop({label}=...) is a function, got {option!r}")
        if not (gradient is None or isinstance(gradient, AbstractGradient)):
            raise TypeError(f"Loop(gradient=...) is one of rx.gradient, such as rx.gradient.Remat(), got {gradient!r}")
        if not (cache is None or isinstance(cache, AbstractPolicy)):
            raise TypeError(f"Loop(cache=...) is a policy of rx.cache, such as rx.cache.First(), got {cache!r}")
        if not (unroll is None or isinstance(unroll, bool)):
            raise TypeError(f"Loop(unroll=...) is True, False or None, got {unroll!r}")
        if on is not None and adapter is None and inject is None and start is None:
            raise ValueError("Loop(on=...) says where adapter, inject and start act, but none of them is given")
        self.adapter = adapter
        self.inject = inject
        self.start = start
        self.gradient = gradient
        self.cache = cache
        self.max = max
        self.on = on
        self.unroll = unroll
        self.name = name
        check_limit(self)

    @property
    def static(self) -> bool:
        """Whether the number of rounds is a Python integer, known when the program is compiled."""
        return isinstance(self.rounds, int)


def checked_rounds(rounds: Any, label: str) -> Rounds:
    """`rounds` as a Python integer of at least 1, or as an integer scalar that is only known at run time."""
    if isinstance(rounds, jax.ShapeDtypeStruct | jax.Array):
        if rounds.shape != () or not jnp.issubdtype(rounds.dtype, jnp.integer):
            raise ValueError(
                f"{label} must be an integer scalar, got {rounds.dtype}{list(rounds.shape)}: one number of rounds serves a "
                "whole batch, since a number per example would save nothing"
            )
        return rounds
    try:
        if isinstance(rounds, bool | np.bool_):
            raise TypeError
        value = operator.index(rounds)
    except TypeError:
        raise TypeError(f"{label} must be an integer or an integer scalar array, got {rounds!r}") from None
    if value < 1:
        raise ValueError(f"{label} must be at least 1, got {value}")
    return value


def limit(loop: Loop) -> int | None:
    """The most rounds that the loop's adapter can serve, `None` without a limit."""
    return loop.adapter.limit if isinstance(loop.adapter, AbstractAdapter) else None


def check_limit(loop: Loop) -> None:
    """Refuses a static number of rounds that the loop's adapter cannot serve."""
    most = limit(loop)
    if most is not None and isinstance(loop.rounds, int) and loop.rounds > most:
        raise ValueError(
            f"{loop.name or 'a loop'} of {loop.rounds} rounds runs past its adapter, which has weights for {most} rounds; "
            "give the adapter more rounds=, or past='last' or past='identity'"
        )


def map_loops(fn: Callable[[Loop], Loop], tree: PyTree) -> PyTree:
    """`tree` with `fn` applied to every loop at any level, also to loops inside another loop's adapter."""

    def inner(node):
        if not isinstance(node, Loop):
            return node
        parts = lambda loop: (loop.adapter, loop.inject, loop.start)
        return fn(eqx.tree_at(parts, node, map_loops(fn, parts(node)), is_leaf=lambda x: x is None))

    return jtu.tree_map(inner, tree, is_leaf=lambda node: isinstance(node, Loop))


def with_rounds(model: PyTree, **rounds: Rounds) -> PyTree:
    """Returns the model with the named loops set to new numbers of rounds; the weights are the same arrays.

    Reaches every loop of that name at any level of any model: composed, rewired, or your own module with recursions inside.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        model = rx.compose("A^r B", {"A": rx.lift(jnp.sin), "B": rx.lift(jnp.cos)}, r=3)
        shallow = rx.with_rounds(model, r=1)
        shallow(jnp.ones(2))
        ```

    **Arguments:**

    - `model`: any pytree with loops inside.
    - `rounds`: for each name, a Python integer, which is compiled in, or an integer scalar of JAX, which is a run-time value.

    **Returns:**

    A model of the same structure.

    **Raises:**

    `ValueError` for a name that no loop has, for less than 1 round, and for more than a loop's adapter can serve.
    """
    wanted = {name: checked_rounds(value, f"with_rounds({name}=...)") for name, value in rounds.items()}
    names: set[str] = set()

    def set_rounds(loop: Loop) -> Loop:
        if loop.name is not None:
            names.add(loop.name)
        if loop.name not in wanted:
            return loop
        loop = eqx.tree_at(lambda loop: loop.rounds, loop, wanted[loop.name])
        check_limit(loop)
        return loop

    out = map_loops(set_rounds, model)
    if unknown := sorted(set(wanted) - names):
        known = f"its loops are named {', '.join(sorted(names))}" if names else "it has no named loop"
        raise ValueError(f"no loop of this model is named {', '.join(unknown)}: {known}")
    return out


def with_policy(model: PyTree, **policies: AbstractPolicy | None) -> PyTree:
    """Returns the model with the named loops set to new cache policies; the weights are the same arrays.

    !!! example

        ```python
        import jax.random as jr
        import rinsx as rx

        model = rx.models.DecoderLM(rx.models.presets["nano"], "A^r B", r=3, key=jr.key(0))
        cheap = rx.cache.with_policy(model, r=rx.cache.First())
        ```

    **Arguments:**

    - `model`: any pytree with loops inside.
    - `policies`: for each name of a loop, a policy of [`rinsx.cache`][], or `None` for one slot a visit.

    **Returns:**

    A model like `model`. What it computes is what it was trained for only if it was trained under the same policies.

    **Raises:**

    `ValueError` for a name that no loop has.
    """
    names = {loop.name for loop in loops_of(model)}
    if unknown := sorted(set(policies) - names):
        known = ", ".join(sorted(name for name in names if name is not None)) or "none"
        raise ValueError(f"no loop of this model is named {', '.join(unknown)}: its loops are {known}")
    put = lambda loop: dataclasses.replace(loop, cache=policies[loop.name]) if loop.name in policies else loop
    return map_loops(put, model)


def with_room(model: PyTree, **most: int) -> PyTree:
    """Returns the model with the named loops' `max` at least so large, for the slots of its caches."""
    put = lambda loop: dataclasses.replace(loop, max=max(most[loop.name], loop.max or 0)) if loop.name in most else loop
    return map_loops(put, model)


def forward_only(model: PyTree) -> PyTree:
    """The model with loops that may run any number of rounds, where no gradient is taken: what is stored for gradients, and
    whether rounds are unrolled, binds training only."""
    return map_loops(lambda loop: dataclasses.replace(loop, gradient=None, unroll=None), model)


def loops_of(model: PyTree) -> list[Loop]:
    """All loops of a model."""
    leaves = jtu.tree_leaves(model, is_leaf=lambda node: isinstance(node, Loop))
    return [leaf for leaf in leaves if isinstance(leaf, Loop)]
