"""How gradients flow through the rounds of one loop, as an object chosen apart from the recursion.

Two questions are answered here. How much of a visit is *stored* for the backward pass: everything
([`rinsx.gradient.Full`][]) or only its input ([`rinsx.gradient.Remat`][]). And how many rounds are differentiated at
all: every round, or the last few ([`rinsx.gradient.Last`][]).
"""

import abc
from collections.abc import Callable

import equinox as eqx


__all__ = ["AbstractGradient", "AbstractStorage", "Full", "Last", "Remat"]


class AbstractGradient(eqx.Module):
    """The abstract base class of everything that `rx.Loop(..., gradient=...)` accepts."""

    @property
    @abc.abstractmethod
    def storage(self) -> "AbstractStorage | None":
        """What is stored of each visit; `None` leaves the choice to the loops around, and then to the backend."""

    @property
    @abc.abstractmethod
    def last(self) -> int | None:
        """How many rounds, counted from the end, are differentiated; `None` is all of them."""


class AbstractStorage(AbstractGradient):
    """What is stored of each visit for the backward pass. Every round is differentiated."""

    @abc.abstractmethod
    def wrap(self, visit: Callable, rolled: bool) -> Callable:
        """Returns `visit`, a function from state to state, with its residuals under control.

        **Arguments:**

        - `visit`: a function from state to state.
        - `rolled`: whether the visit stands in the body of a loop.

        **Returns:**

        A function from state to state of the same value.
        """

    @property
    def storage(self):
        return self

    @property
    def last(self):
        return None


class Full(AbstractStorage):
    """Stores every residual of every visit: a gradient step costs three forward passes.

    Memory grows with the number of rounds times the residuals of a visit. Needs rounds given as Python integers.

    !!! example

        ```python
        import rinsx as rx

        loop = rx.Loop(3, gradient=rx.gradient.Full())
        ```
    """

    def wrap(self, visit, rolled):
        return visit


class Remat(AbstractStorage):
    """Stores the input of each visit and computes the visit again when its gradient is due.

    A gradient step costs four forward passes; memory grows with the number of rounds times the size of the state, plus
    the residuals of a single visit.

    !!! example

        ```python
        import jax
        import rinsx as rx

        loop = rx.Loop(3, gradient=rx.gradient.Remat(jax.checkpoint_policies.dots_saveable))
        ```
    """

    policy: Callable | None = eqx.field(static=True, default=None)

    def wrap(self, visit, rolled):
        # In the body of a loop XLA cannot merge the second computation with the first, so nothing need prevent it.
        return eqx.filter_checkpoint(visit, policy=self.policy, prevent_cse=not rolled)


Remat.__init__.__doc__ = """**Arguments:**

- `policy`: which residuals to store all the same, one of `jax.checkpoint_policies`. With a traced number of rounds only the
    default (none) is possible.
"""


class Last(AbstractGradient):
    """Differentiates the last `k` rounds only: truncated backpropagation.

    Earlier rounds run without storing anything, so memory really falls. What enters the last `k` rounds counts as
    a constant: no gradient reaches the loop's input through the state, but an injection carries it in anew each round. With
    `k` rounds or fewer nothing is cut.

    ??? cite "Reference"

        Truncated backpropagation through the depth of a language model: Geiping et al., "Scaling up Test-Time
        Compute with Latent Reasoning", arXiv 2502.05171.

    !!! example

        ```python
        import rinsx as rx

        loop = rx.Loop(32, gradient=rx.gradient.Last(8))
        ```
    """

    k: int = eqx.field(static=True)
    store: AbstractStorage | None = None

    def __check_init__(self):
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"gradient.Last needs a number of rounds of at least 1, got {self.k!r}")
        if not (self.store is None or isinstance(self.store, AbstractStorage)):
            raise TypeError(f"gradient.Last(store=...) is Full() or Remat(), got {self.store!r}")

    @property
    def storage(self):
        return self.store

    @property
    def last(self):
        return self.k


Last.__init__.__doc__ = """**Arguments:**

- `k`: how many rounds, counted from the end, are differentiated; at least 1.
- `store`: what is stored of each visit in those rounds: [`rinsx.gradient.Full`][] or [`rinsx.gradient.Remat`][].
"""
