"""Lifts a plain function of the state to a block."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from ._handle import open


class Lifted(eqx.Module):
    """A block that calls `fn` with its state, and of the side inputs only with those it was told to keep."""

    fn: Callable
    keep: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, state: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        if missing := [name for name in self.keep if name not in kwargs]:
            raise TypeError(f"lift({self.fn!r}, keep={list(self.keep)}) was called without {', '.join(missing)}")
        x, cache = open(state)
        return cache.close(self.fn(x, **{name: kwargs[name] for name in self.keep}))


def lift(fn: Callable[..., PyTree], keep: Sequence[str] = ()) -> Lifted:
    """Turns a function of the state into a block, which accepts the side inputs that every visit is given and drops them.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        block = rx.lift(jnp.sin)
        block(jnp.ones(2), key=None)

        masked = rx.lift(lambda x, mask: jnp.where(mask, x, 0), keep=["mask"])
        masked(jnp.ones(2), mask=jnp.array([True, False]), key=None)
        ```

    **Arguments:**

    - `fn`: a function, or a module, from state to state. In decoding it is given the next positions only, without the cache, so
        it must act on each position alone. Arrays in a module are weights like any other. Arrays that a plain
        function closes over are none, and must not be differentiated where rounds are traced: make them side inputs.
    - `keep`: the names of the keyword side inputs that are passed on to `fn`.

    **Returns:**

    A block.
    """
    if not callable(fn):
        raise TypeError(f"lift takes a function, got {fn!r}")
    if isinstance(keep, str):
        raise TypeError(f"lift(keep=...) is a sequence of names, got the text {keep!r}: write [{keep!r}]")
    return Lifted(fn, tuple(keep))
