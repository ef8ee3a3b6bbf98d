"""Looks inside a recursion: the state after each round."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from . import _observe


class Trace(eqx.Module):
    """What [`rinsx.trace`][] saw. The lists run over the rounds in the order in which they ended."""

    output: PyTree
    """What the model returned."""
    rounds: tuple[str, ...] = eqx.field(static=True)
    """Which round, as `"r=1"` for the first round of the loop named r, and `"^3=1"` for that of an exponent 3."""
    states: list[PyTree]
    """The state after each round."""
    drift: list[Array]
    """How far each round has moved the state: the Euclidean norm of the change over that of the state before."""


def trace(model: Callable, *args: Any, **kwargs: Any) -> Trace:
    """Calls a model and returns the states of its recursions after each round, with their drift.

    Works for any model with recursions inside: composed, rewired, or your own; also under its own `vmap` and `jit`, where
    states and drifts are batched. Rounds of nested loops are listed as they end, inner before outer.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        model = rx.recur(rx.lift(jnp.sin), 3)
        seen = rx.trace(model, jnp.ones(2))
        print(dict(zip(seen.rounds, seen.drift)))
        ```

    **Arguments:**

    - `model`: a callable.
    - `args`, `kwargs`: what to call it with.

    **Returns:**

    A `Trace`, with `output`, `rounds`, `states` and `drift`.

    **Raises:**

    `ValueError` if a number of rounds is traced, and if a recursion runs inside a loop of the model, such as a `lax.scan`,
    where its states cannot be told apart.
    """
    with _observe.observing() as marks:
        jaxpr, out_struct, static_out = eqx.filter_make_jaxpr(model)(*args, **kwargs)
    found: dict[str, Array] = {}
    arrays = jtu.tree_leaves(eqx.filter((args, kwargs), eqx.is_array))
    outs = _evaluate(jaxpr.jaxpr, jaxpr.consts, arrays, found)
    output = eqx.combine(jtu.tree_unflatten(jtu.tree_structure(out_struct), outs), static_out)
    missing = [mark.label for mark in marks if not {*_tags(mark.before), *_tags(mark.after)} <= set(found)]
    if missing:
        raise ValueError(
            f"rx.trace cannot see the rounds {', '.join(missing)}: they run inside a loop or a branch of the model "
            "(lax.scan, lax.while_loop, lax.cond), where their states are not arrays of the whole program"
        )
    leaves = lambda seen: [found[tag] for tag in _tags(seen)]
    states = [jtu.tree_unflatten(mark.after.structure, leaves(mark.after)) for mark in marks]
    drift = [_drift(leaves(mark.before), leaves(mark.after), mark.after.ranks) for mark in marks]
    return Trace(output, tuple(mark.label for mark in marks), states, drift)


def _tags(seen: _observe.Seen) -> list[str]:
    return [_observe.tag(seen.number, i) for i in range(len(seen.ranks))]


def _drift(before: list[Array], after: list[Array], ranks: tuple[int, ...]) -> Array:
    """The relative change of a state; axes beyond an array's rank are those of batches, and are kept."""

    def square(leaves):
        total = jnp.zeros(())
        for x, rank in leaves:
            x = jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
            total = total + jnp.sum(jnp.square(x), axis=tuple(range(x.ndim - rank, x.ndim)))
        return total

    floats = [(b, a, rank) for b, a, rank in zip(before, after, ranks) if eqx.is_inexact_array(a)]
    return jnp.sqrt(square([(a - b, rank) for b, a, rank in floats]) / square([(b, rank) for b, _, rank in floats]))


# Equations that stand for a single call of the program they hold, which is therefore safe to evaluate in place.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}


def _evaluate(jaxpr, consts, args, found: dict[str, Array]) -> list:
    """Evaluates a jaxpr, its calls in place, and writes down the arrays that are named."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
    read = lambda atom: atom.val if hasattr(atom, "val") else env[atom]
    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in _CALLS and _CALLS[name] in eqn.params:
            inner = eqn.params[_CALLS[name]]
            closed = getattr(inner, "jaxpr", inner)
            outs = _evaluate(closed, getattr(inner, "consts", ()), values, found)
        else:
            outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
            outs = outs if eqn.primitive.multiple_results else [outs]
        if name == "name":
            if eqn.params["name"] in found and eqn.params["name"].startswith("rx.trace["):
                raise ValueError(
                    "rx.trace cannot tell apart the calls of a jitted function that has a recursion inside and is called more "
                    "than once: trace the function without its jit"
                )
            found[eqn.params["name"]] = outs[0]
        env.update(zip(eqn.outvars, outs))
    return [read(atom) for atom in jaxpr.outvars]
