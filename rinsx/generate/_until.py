"""Rounds until the state, or the prediction, no longer changes."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._check import at_least


class AbstractCriterion(eqx.Module):
    """Says of each sequence whether a round has changed little enough to stop."""

    predicts: eqx.AbstractClassVar[bool]
    """Whether it compares logits, for which what comes behind the loop must run after every round; if not, it compares states."""

    @abc.abstractmethod
    def __call__(self, before: Float[Array, "batch ..."], after: Float[Array, "batch ..."]) -> Bool[Array, " batch"]:
        """Whether each sequence has converged, from the states (or logits) before and after a round."""


class StateChange(AbstractCriterion):
    """The state has changed by less than `tolerance` of its size, in the Euclidean norm.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        x = jnp.ones((2, 1, 8))
        rx.generate.StateChange(0.01)(x, 1.001 * x)  # both have
        ```
    """

    tolerance: float | int = eqx.field(static=True)
    predicts: ClassVar[bool] = False

    def __check_init__(self):
        _positive(self.tolerance)

    def __call__(self, before, after):
        norm = lambda x: jnp.linalg.norm(x.reshape(x.shape[0], -1).astype(jnp.float32), axis=-1)
        return norm(after - before) < self.tolerance * norm(after)


class KL(AbstractCriterion):
    """The divergence of the prediction from that of the round before is less than `tolerance` nats.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        logits = jnp.array([[0.0, 1.0], [0.0, 5.0]])
        rx.generate.KL(0.01)(logits, logits)  # both have
        ```
    """

    tolerance: float | int = eqx.field(static=True)
    predicts: ClassVar[bool] = True

    def __check_init__(self):
        _positive(self.tolerance)

    def __call__(self, before, after):
        p, q = jax.nn.log_softmax(after), jax.nn.log_softmax(before)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1) < self.tolerance


class EntropyChange(AbstractCriterion):
    """The entropy of the prediction has changed by less than `tolerance` nats.

    !!! example

        ```python
        import jax.numpy as jnp
        import rinsx as rx

        logits = jnp.array([[0.0, 1.0], [0.0, 5.0]])
        rx.generate.EntropyChange(0.01)(logits, logits + 1)  # both have
        ```
    """

    tolerance: float | int = eqx.field(static=True)
    predicts: ClassVar[bool] = True

    def __check_init__(self):
        _positive(self.tolerance)

    def __call__(self, before, after):
        def entropy(logits):
            p = jax.nn.log_softmax(logits)
            return -jnp.sum(jnp.exp(p) * p, axis=-1)

        return jnp.abs(entropy(after) - entropy(before)) < self.tolerance


class Until(eqx.Module):
    """As many rounds of a loop as it takes each token to converge.

    Rounds run until every sequence of the batch has converged, or `most` have run. A sequence that has converged keeps its
    state, and its keys and values, so that what it computes does not depend on the batch; but it saves nothing
    until the last one is done. How many rounds each token took comes back with the text.

    !!! example

        ```python
        import rinsx as rx

        rounds = rx.generate.Until(rx.generate.StateChange(0.05), least=2, most=8)
        ```
    """

    criterion: AbstractCriterion
    least: int = eqx.field(static=True)
    most: int = eqx.field(static=True)
    loop: str = eqx.field(static=True)

    def __init__(self, criterion: AbstractCriterion, *, least: int = 1, most: int, loop: str = "r"):
        """**Arguments:**

        - `criterion`: one of [`rinsx.generate.StateChange`][], [`rinsx.generate.KL`][], [`rinsx.generate.EntropyChange`][],
            or your own.
        - `least`, `most`: bounds on the number of rounds. The first round is compared with nothing.
        - `loop`: the name of the loop, which no other loop is around.
        """
        at_least(1, least=least, most=most)
        if least > most:
            raise ValueError(f"`least` is at most `most`; got least={least} and most={most}.")
        self.criterion = criterion
        self.least = least
        self.most = most
        self.loop = loop


def _positive(tolerance: Any) -> None:
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be positive; got {tolerance!r}.")
