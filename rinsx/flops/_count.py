"""Counts the FLOPs of a function by walking its jaxpr."""

import functools as ft
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from .._declare import counted_trips, Declared, declared, loops_of, place
from ._cost import Amount, Cost, exact
from ._rules import CALLS, COMBINERS, CONTRACTIONS, ELEMENTWISE


# As in `Cost`, but relative to the equation that holds the jaxpr: the scope goes on
# from its scope, and a phase of `None` is its phase.
_Table = dict[tuple[tuple[str, ...], str | None, str, str], Amount]
_Live = tuple[bool, ...]
_Parts = Sequence[tuple[_Table, Amount]]


def count(
    fn: Callable,
    /,
    *args: Any,
    trips: Mapping[str, int] | None = None,
    rules: Mapping[str, Callable[[JaxprEqn], Any]] | None = None,
    **kwargs: Any,
) -> Cost:
    """Counts the FLOPs of `fn(*args, **kwargs)` exactly, from shapes alone. Nothing is
    compiled, allocated or run, so that shapes may be of any size.

    A FLOP is one operation on floating-point numbers. Work on integers, booleans and
    PRNG keys, and moving data, count nothing.

    - Contractions, the kind `"matmul"`, take 2 per multiply-add (8 if complex). A
        convolution has a multiply-add only where a position of the kernel meets an
        element of the input, not where it meets padding or the holes of a dilation.
    - Everything else is the kind `"elementwise"`. It takes one per element of the
        output for arithmetic, for comparisons and for each transcendental function
        (`exp`, `tanh`, `erf`, `rsqrt`, ...); `integer_pow` one per multiplication; a
        reduction the number of its inputs less that of its outputs; a sort of `n`
        numbers `n * ceil(log2(n))`. Complex additions take 2 and products 6.
    - Dense linear algebra and Fourier transforms are counted to leading order:
        `n^3 / 3` for Cholesky, `2 n^3 / 3` for LU, `4 n^3 / 3` for each factor of QR,
        `n^2` per right-hand side of a triangular solve, `5 n ceil(log2(n))` for an FFT.
    - A `scan` takes its length times its body, a `cond` its most expensive branch or
        what [`rinsx.flops.branches`][] declares, a `while` what
        [`rinsx.flops.trips`][] declares. (A `fori_loop` with constant bounds needs no
        declaration.) `shard_map` takes its body once per device.
    - What no result depends on is not counted: compilers drop it. Common
        subexpressions are counted as often as they are written.

    !!! example

        ```python
        import jax
        import jax.numpy as jnp
        import rinsx as rx

        x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
        w = jax.ShapeDtypeStruct((32, 64), jnp.float32)
        rx.flops.count(jnp.matmul, x, w)  # 65536 = 2 * 16 * 32 * 64
        ```

    **Arguments:**

    - `fn`: a function, or an Equinox module.
    - `*args`, `**kwargs`: its arguments: arrays, `jax.ShapeDtypeStruct`s, Equinox
        modules or pytrees of those. Every other leaf is static. If `fn` has a keyword
        argument called `trips` or `rules`, wrap it in a `lambda`.
    - `trips`: the number of each name that [`rinsx.flops.trips`][] has declared.
    - `rules`: a mapping from the name of a primitive to a function of its
        `jax.extend.core.JaxprEqn`, which returns the FLOPs: an exact number of kind
        `"elementwise"`, or a pair `(matmul, elementwise)`. These go before the rules
        that are built in.

    **Returns:**

    A [`rinsx.flops.Cost`][]. A `ValueError` names every primitive that has no rule,
    every `while` loop whose trips are not known, and every name missing from `trips` or
    unknown in it, and says where they stand.
    """
    closed, *_ = eqx.filter_make_jaxpr(_call)(fn, args, kwargs)
    numbers = {name: operator.index(n) for name, n in (trips or {}).items()}
    if min(numbers.values(), default=0) < 0:
        raise ValueError(f"`trips` must not be negative; got {numbers}.")
    jaxpr = _open(closed)
    walker = _Walker(numbers, dict(rules or {}))
    table, _ = walker.walk(jaxpr, (True,) * len(jaxpr.outvars), Declared())
    walker.complain()
    cost = {}
    for (scope, phase, primitive, kind), amount in table.items():
        key = ("/".join(scope), phase or "forward", primitive, kind)
        cost[key] = cost.get(key, 0) + amount
    return Cost(cost)


def _call(fn, args, kwargs):
    # Whatever else is returned costs nothing, and need not be comparable.
    return eqx.filter(fn(*args, **kwargs), eqx.is_array)


class _Walker:
    """One walk over a program: backward through each jaxpr, so that it is known which
    results are used."""

    def __init__(self, trips: dict[str, int], rules: dict[str, Callable]):
        self.trips = trips
        self.rules = rules
        self.memo = {}
        self.path: list[JaxprEqn] = []
        self.named: set[str] = set()
        # Loops of rinsx that are met, some of at most one round, which leaves no `while`.
        self.met: set[str] = set()
        self.missing: dict[str, str] = {}
        # By the `id` of the equation, which may be visited again when more of its results turn out to be used.
        self.unknown: dict[str, dict[int, str]] = {}
        self.endless: dict[int, str] = {}

    def walk(self, jaxpr: Jaxpr, live: _Live, outer: Declared) -> tuple[_Table, _Live]:
        """The table of a jaxpr, and which of its inputs are used, given which of its
        outputs are."""
        key = (id(jaxpr), live, outer)
        if key in self.memo:
            return self.memo[key][1:]
        used = _used(jaxpr.outvars, live)
        table: _Table = {}
        for eqn in reversed(jaxpr.eqns):
            live_outs = tuple(v in used for v in eqn.outvars)
            if not (any(live_outs) or _has_effects(eqn)):
                continue
            stack = str(eqn.source_info.name_stack)
            scope, phase = place(stack)
            self.met |= loops_of(stack)
            self.path.append(eqn)
            parts, live_ins = self._equation(eqn, live_outs, declared(stack, outer))
            self.path.pop()
            for part, factor in parts:
                for (inner, inner_phase, name, kind), amount in part.items():
                    row = (scope + inner, inner_phase or phase, name, kind)
                    table[row] = table.get(row, 0) + factor * amount
            used |= _used(eqn.invars, live_ins)
        live_ins = tuple(v in used for v in jaxpr.invars)
        # The jaxpr is kept, for its `id` to stay its own.
        self.memo[key] = (jaxpr, table, live_ins)
        return table, live_ins

    def _equation(self, eqn: JaxprEqn, live: _Live, here: Declared) -> tuple[_Parts, Sequence[bool]]:
        name, params = eqn.primitive.name, eqn.params
        everything = (True,) * len(eqn.invars)
        if name in self.rules:
            return [(_row(name, self.rules[name](eqn)), 1)], everything
        if name in CONTRACTIONS:
            return [(_row(name, (CONTRACTIONS[name](eqn), 0)), 1)], everything
        if name in ELEMENTWISE:
            return [(_row(name, ELEMENTWISE[name](eqn)), 1)], everything
        if name in COMBINERS:
            times = COMBINERS[name](eqn)
            inner = {key: params[key] for key in times if params[key] is not None}
            parts = [(self._all(j, here), times[key]) for key, j in inner.items()]
            return parts, everything
        if name == "scan":
            return self._scan(eqn, live)
        if name == "while":
            return self._while(eqn, live, here)
        if name == "cond":
            return self._cond(eqn, live, here)
        if name == "custom_linear_solve":
            return [(self._all(params["jaxprs"].solve, here), 1)], everything
        if name in CALLS:
            keys = ("jaxpr", "call_jaxpr", "call", "fwd_jaxpr")
            (inner,) = (params[key] for key in keys if key in params)
            return self._call(_open(inner), eqn, live, here)
        if name == "call_hi_primitive":
            # JAX writes these out only when it lowers them.
            write_out = ft.partial(eqn.primitive.to_lojax, **params)
            avals: list[Any] = [v.aval for v in eqn.invars]
            structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
            inner = jax.make_jaxpr(write_out)(*structs)
            return self._call(_open(inner), eqn, live, here)
        self.unknown.setdefault(name, {})[id(eqn)] = self._where()
        return [], everything

    def _all(self, jaxpr, here: Declared) -> _Table:
        jaxpr = _open(jaxpr)
        return self.walk(jaxpr, (True,) * len(jaxpr.outvars), here)[0]

    def _call(self, inner: Jaxpr, eqn: JaxprEqn, live: _Live, here: Declared) -> tuple[_Parts, _Live]:
        table, live_ins = self.walk(inner, live, here)
        return [(table, _devices(eqn))], live_ins

    def _scan(self, eqn: JaxprEqn, live: _Live) -> tuple[_Parts, _Live]:
        body = _open(eqn.params["jaxpr"])
        # How many are carried is told by shapes, because how JAX keeps the number has
        # changed: what is stacked has an axis more outside the body than inside.
        num_carry = _same_ranks(eqn.outvars, body.outvars)
        num_consts = _same_ranks(eqn.invars, body.invars) - num_carry
        ends = num_consts + num_carry
        carry, stacked = live[:num_carry], live[num_carry:]
        while True:
            table, live_ins = self.walk(body, carry + stacked, Declared())
            grown = _either(carry, live_ins[num_consts:ends])
            if grown == carry:
                break
            carry = grown
        live_ins = live_ins[:num_consts] + carry + live_ins[ends:]
        return [(table, eqn.params["length"])], live_ins

    def _while(self, eqn: JaxprEqn, live: _Live, here: Declared) -> tuple[_Parts, _Live]:
        num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        condition = _open(eqn.params["cond_jaxpr"])
        body = _open(eqn.params["body_jaxpr"])
        condition_table, condition_live = self.walk(condition, (True,), Declared())
        carry = _either(live, condition_live[num_cond:])
        while True:
            table, live_ins = self.walk(body, carry, Declared())
            grown = _either(carry, live_ins[num_body:])
            if grown == carry:
                break
            carry = grown
        # A loop over integers costs nothing, however often it runs.
        free = not (any(table.values()) or any(condition_table.values()))
        trips = self._trips(eqn, here, free)
        live_ins = condition_live[:num_cond] + live_ins[:num_body] + carry
        return [(condition_table, trips + 1), (table, trips)], live_ins

    def _trips(self, eqn: JaxprEqn, here: Declared, free: bool) -> int:
        if here.trips is None:
            trips = 0 if free else counted_trips(eqn)
            if trips is None:
                self.endless[id(eqn)] = self._where()
            return trips or 0
        value, minus, most = here.trips
        if value.isdecimal():
            trips = int(value)
        else:
            self.named.add(value)
            if value not in self.trips:
                self.missing.setdefault(value, self._where())
            trips = self.trips.get(value, 0)
        trips = max(0, trips - minus)
        return trips if most is None else min(trips, most)

    def _cond(self, eqn: JaxprEqn, live: _Live, here: Declared) -> tuple[_Parts, _Live]:
        branches = [_open(branch) for branch in eqn.params["branches"]]
        index, *_ = eqn.invars
        weights = here.branches
        if isinstance(index, Literal):
            branches = [branches[min(max(0, int(index.val)), len(branches) - 1)]]
            weights = (1,)
        inner = here._replace(branches=None)
        tables, lives = zip(*(self.walk(branch, live, inner) for branch in branches))
        live_ins = (True, *map(any, zip(*lives)))
        if weights is None:
            return [(max(tables, key=lambda table: sum(table.values())), 1)], live_ins
        if len(weights) != len(branches):
            raise ValueError(
                f"`flops.branches` declares {len(weights)} probabilities for a `cond` "
                f"of {len(branches)} branches, {self._where()}."
            )
        return list(zip(tables, weights)), live_ins

    def _where(self) -> str:
        """Where the equation that is visited stands, in the user's terms."""
        stacks = [str(eqn.source_info.name_stack) for eqn in self.path]
        scope = "/".join(name for stack in stacks for name in place(stack)[0])
        where = [f'in scope "{scope}"'] if scope else []
        # What JAX traces once and keeps has no frame of the user's, but its caller has.
        for eqn in reversed(self.path):
            for frame in getattr(eqn.source_info.traceback, "frames", ()):
                if not frame.file_name.startswith(_LIBRARIES):
                    where.append(f"at {frame.file_name}:{frame.line_num}")
                    return ", ".join(where)
        return ", ".join(where or ["in no scope"])

    def complain(self) -> None:
        lines = []
        for name, places in sorted(self.unknown.items()):
            first, *rest = places.values()
            more = f" (and {len(rest)} more)" if rest else ""
            lines.append(f"no rule for the primitive `{name}`, {first}{more}")
        if self.unknown:
            name = min(self.unknown)
            lines.append(
                f'Pass `rules={{"{name}": lambda eqn: flops}}`, which returns FLOPs or a pair (matmul, elementwise).'
            )
        lines += [f"a `while` loop whose trips are not known, {w}" for w in self.endless.values()]
        if self.endless:
            lines.append(
                "Run it within `flops.trips(8)`, or within `flops.trips('n')` and pass "
                "`trips={'n': 8}`. Loops within loops are declared one by one."
            )
        for name, where in self.missing.items():
            lines.append(f"no number in `trips` for the loop named '{name}', {where}")
        for name in sorted(self.trips.keys() - self.named):
            if name not in self.met:
                lines.append(f"no loop that is counted is named '{name}', as in `trips`")
            elif self.trips[name] != 1:
                lines.append(
                    f"of the loop named '{name}' at most one round is counted, since its max is 1 or no result depends on "
                    f"it; got {self.trips[name]} in `trips`"
                )
        if lines:
            raise ValueError("FLOPs cannot be counted:\n  " + "\n  ".join(lines))


_LIBRARIES = tuple(
    os.path.dirname(path) + os.sep for path in (str(jax.__file__), str(eqx.__file__), os.path.dirname(__file__))
)


def _open(jaxpr: Any) -> Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _used(atoms, live: Sequence[bool]) -> set[Var]:
    # Strictly: a call whose operands are not those of its jaxpr would be miscounted.
    pairs = zip(atoms, live, strict=True)
    return {x for x, is_live in pairs if is_live and not isinstance(x, Literal)}


def _has_effects(eqn: JaxprEqn) -> bool:
    # That an axis is named within `shard_map` is recorded as an effect, but has none.
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def _same_ranks(outer, inner) -> int:
    rank = lambda var: len(getattr(var.aval, "shape", ()))
    return sum(rank(x) == rank(y) for x, y in zip(outer, inner))


def _either(a: _Live, b: _Live) -> _Live:
    return tuple(x or y for x, y in zip(a, b))


def _devices(eqn: JaxprEqn) -> int:
    if eqn.primitive.name != "shard_map":
        return 1
    axes = eqn.params["newly_manual_axes"]
    return math.prod(eqn.params["mesh"].shape[axis] for axis in axes)


def _row(name: str, flops: Any) -> _Table:
    matmul, elementwise = flops if isinstance(flops, tuple) else (0, flops)
    amounts = {
        "matmul": _number(name, matmul),
        "elementwise": _number(name, elementwise),
    }
    return {((), None, name, kind): n for kind, n in amounts.items() if n != 0}


def _number(name: str, flops: Any) -> Amount:
    if isinstance(flops, Fraction):
        return exact(flops)
    try:
        return operator.index(flops)
    except TypeError:
        raise TypeError(
            f"The rule for `{name}` must return an exact number, or a pair of them; got {flops!r}."
        ) from None
