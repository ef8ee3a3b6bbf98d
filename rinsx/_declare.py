"""What name scopes carry: declarations of loops and branches, the user's scope, the
phase.

Name scopes are the one annotation that survives everything JAX does to a function
(differentiation, transposition, rematerialisation, batching), so declarations travel in
them, as text.
"""

import contextlib
import functools as ft
import operator
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var


_TRIPS = re.compile(r"rx\.trips\[(\w+),(\d+),(\d*)\]")
_LOOPS = re.compile(r"rx\.loops\[([\w,]*)\]")
_BRANCHES = re.compile(r"rx\.branches\[([\d:,]*)\]")
_WRAPPER = re.compile(r"(?:^|(?<=/))(?:jvp|transpose|vmap)\(")
_REMAT = "rematted_computation"


def trips(value: int | str, minus: int = 0, most: int | None = None) -> contextlib.AbstractContextManager[Any]:
    """Declares how often the `while` loops directly inside it run:
    `value - minus` times, but at least 0 times and at most `most` times.

    A `while` loop has no trip count that can be read off the program. The declaration
    holds for the loops in its scope, within `jax.jit`, `jax.checkpoint`, custom
    derivatives and the branches of a `lax.cond` too, but not for a loop inside the body
    of another: that is declared there. The innermost declaration wins. It changes
    nothing about what is computed.

    !!! example

        ```python
        import jax.lax as lax
        import jax.numpy as jnp
        import rinsx as rx

        def f(x, r):
            with rx.flops.trips("r"):
                return lax.fori_loop(0, r, lambda i, x: jnp.sin(x), x)

        rx.flops.count(f, jnp.ones(8), jnp.array(5), trips={"r": 5}).total  # 40
        ```

    **Arguments:**

    - `value`: a number, or a name that [`rinsx.flops.count`][] is told the number of.
    - `minus`: how many of these trips run elsewhere.
    - `most`: the largest number of trips. By default, there is none.

    **Returns:**

    A context manager.
    """
    numbers = [minus, 0 if most is None else most]
    if isinstance(value, str):
        # A digit in front would make it a number.
        if not re.fullmatch(r"[^\W\d]\w*", value):
            raise ValueError(f"A name of trips must be an identifier; got {value!r}.")
    else:
        numbers.append(value)
    if any(operator.index(number) < 0 for number in numbers):
        raise ValueError(f"`value`, `minus` and `most` must not be negative; got {value}, {minus} and {most}.")
    return jax.named_scope(f"rx.trips[{value},{minus},{'' if most is None else most}]")


def branches(*weights: Fraction | int | str) -> contextlib.AbstractContextManager[Any]:
    """Declares with which probability each branch of the `lax.cond`s and `lax.switch`es
    directly inside it is taken. Without, the most expensive branch is counted.

    It reaches as far as [`rinsx.flops.trips`][] does, but not into the branches of
    another `cond`.

    !!! example

        ```python
        import jax.lax as lax
        import jax.numpy as jnp
        import rinsx as rx

        def f(skip, x):
            with rx.flops.branches("1/4", "3/4"):
                return lax.cond(skip, lambda x: x, lambda x: jnp.sin(x), x)

        rx.flops.count(f, jnp.array(True), jnp.ones(8)).total  # 2
        ```

    **Arguments:**

    - `*weights`: the probabilities, which sum to one, in the order of the branches of
        `lax.switch(index, branches, ...)`. So a `lax.cond(pred, true_fun, false_fun,
        ...)` takes the probability of false first.

    **Returns:**

    A context manager.
    """
    weights = tuple(Fraction(weight) for weight in weights)
    if min(weights, default=Fraction(0)) < 0 or sum(weights) != 1:
        listed = ", ".join(map(str, weights))
        raise ValueError(
            f"The probabilities of branches must not be negative and must sum to one; got {listed or 'none'}."
        )
    # Not in the usual notation, because a slash separates scopes.
    listed = ",".join(f"{w.numerator}:{w.denominator}" for w in weights)
    return jax.named_scope(f"rx.branches[{listed}]")


def loops(names: Iterable[str]) -> contextlib.AbstractContextManager[Any]:
    """Says which loops of a traced number of rounds are inside it, since one of at most one round leaves no `while` loop."""
    return jax.named_scope(f"rx.loops[{','.join(names)}]")


@ft.lru_cache(maxsize=4096)
def loops_of(stack: str) -> frozenset[str]:
    """The names of the loops that a name stack says it is inside of."""
    return frozenset(name for names in _LOOPS.findall(stack) for name in names.split(","))


class Declared(NamedTuple):
    """The declarations in force at an equation."""

    trips: tuple[str, int, int | None] | None = None
    branches: tuple[Fraction, ...] | None = None


@ft.lru_cache(maxsize=4096)
def declared(stack: str, outer: Declared) -> Declared:
    for value, minus, most in _TRIPS.findall(stack)[-1:]:
        trips = (value, int(minus), int(most) if most else None)
        outer = outer._replace(trips=trips)
    for listed in _BRANCHES.findall(stack)[-1:]:
        weights = (Fraction(w.replace(":", "/")) for w in listed.split(","))
        outer = outer._replace(branches=tuple(weights))
    return outer


@ft.lru_cache(maxsize=4096)
def place(stack: str) -> tuple[tuple[str, ...], str | None]:
    """The user's scope, and the phase if this name stack tells one.

    The stack of an equation within a sub-jaxpr goes on from that of the equation that
    holds the sub-jaxpr. So `None` is a phase to be inherited.
    """
    # What was transposed last, or is recomputed, is further in, hence further right.
    transposed, recomputed = stack.rfind("transpose("), stack.rfind(_REMAT)
    phase = None
    if max(transposed, recomputed) >= 0:
        phase = "backward" if transposed > recomputed else "remat"
    path = _LOOPS.sub("", _BRANCHES.sub("", _TRIPS.sub("", stack)))
    while (wrapper := _WRAPPER.search(path)) is not None:
        start, close = wrapper.end(), _closing(path, wrapper.end())
        path = path[: wrapper.start()] + path[start:close] + path[close + 1 :]
    scopes = [s for s in path.split("/") if s not in ("", "checkpoint", _REMAT)]
    # The backward pass of a checkpointed function carries its scope twice,
    # `transpose(jvp(loss))/block/jvp(loss)/block`.
    half = len(scopes) // 2
    twice = re.search(r"transpose\(.*/(?:vmap\()*jvp\(", stack) is not None
    if twice and scopes[:half] == scopes[half:]:
        scopes = scopes[:half]
    return tuple(scopes), phase


def _closing(path: str, start: int) -> int:
    """Where the parenthesis that was opened just before `start` is closed."""
    depth = 1
    for i in range(start, len(path)):
        depth += {"(": 1, ")": -1}.get(path[i], 0)
        if depth == 0:
            return i
    return len(path)


def counted_trips(eqn: JaxprEqn) -> int | None:
    """The number of trips of a `while` loop that compares a counter with a bound, where
    both start from literals and each trip adds literals to them. `None` otherwise.

    This is the form of a `lax.fori_loop` whose bounds are concrete arrays. (One whose
    bounds are Python integers is a `scan`.)
    """
    condition = getattr(eqn.params["cond_jaxpr"], "jaxpr", eqn.params["cond_jaxpr"])
    if len(condition.eqns) != 1 or condition.eqns[0].outvars != condition.outvars:
        return None
    (compare,) = condition.eqns
    name = compare.primitive.name
    if name not in ("lt", "le", "gt", "ge"):
        return None
    left, right = (_line(eqn, condition, atom) for atom in compare.invars)
    if left is None or right is None:
        return None
    (start, step), (bound, drift) = left, right
    gap, speed = bound - start, step - drift
    if name in ("gt", "ge"):
        gap, speed = -gap, -speed
    if name in ("le", "ge"):
        gap += 1
    if gap <= 0:
        return 0
    return -(-gap // speed) if speed > 0 else None


def _line(eqn: JaxprEqn, condition: Jaxpr, atom: Var | Literal) -> tuple[int, int] | None:
    """Where a variable of the condition starts, and what a trip adds to it."""
    body = getattr(eqn.params["body_jaxpr"], "jaxpr", eqn.params["body_jaxpr"])
    if isinstance(atom, Literal):
        return _pair(atom, 0)
    if atom not in condition.invars:
        return None
    index, num_body = condition.invars.index(atom), eqn.params["body_nconsts"]
    carry = index - eqn.params["cond_nconsts"]
    if carry < 0:
        return _pair(eqn.invars[index], 0)
    start = eqn.invars[index + num_body]
    before, after = body.invars[carry + num_body], body.outvars[carry]
    if before is after:
        return _pair(start, 0)
    for update in body.eqns:
        if update.outvars[0] is after and update.primitive.name in ("add", "sub"):
            x, y = update.invars
            if x is before:
                return _pair(start, y, -1 if update.primitive.name == "sub" else 1)
            if y is before and update.primitive.name == "add":
                return _pair(start, x)
    return None


def _pair(start: Any, step: Any, sign: int = 1) -> tuple[int, int] | None:
    start, step = (x.val if isinstance(x, Literal) else x for x in (start, step))
    try:
        return operator.index(start), sign * operator.index(step)
    except TypeError:
        # A variable, or a floating-point number.
        return None
