"""Which slot of a cache the rounds of a loop write and read."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp

from ._check import at_least


class AbstractPolicy(eqx.Module):
    """Maps each round of a loop to the slot that its visits write to and read from.

    A policy is **parallel** if what a round reads was written by the same round or an earlier one of the same token: then a
    whole prompt at once, token by token and training compute the same. It is **sequential** if later rounds of earlier tokens
    are read: then only token by token is what the policy says.
    """

    parallel: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def slots(self, rounds: Any) -> Any:
        """How many slots so many rounds use; `None`, of a number of rounds without a limit, where that has none either."""

    @abc.abstractmethod
    def slot(self, i: Any) -> Any:
        """The slot that round `i`, counted from 0, writes and reads."""

    @abc.abstractmethod
    def writes(self, i: Any) -> Any:
        """Whether round `i` writes its keys and values; if not, it reads what an earlier round has written."""

    def kept(self, i: Any) -> Any:
        """The slot whose content a sequence that stopped before round `i` has in the slot of that round."""
        return self.slot(i - 1)


class PerVisit(AbstractPolicy):
    """One slot for each round: nothing is shared. This is the default, and plain attention in training.

    !!! example

        ```python
        import rinsx as rx

        rx.cache.PerVisit().slots(4)  # 4
        ```
    """

    parallel: ClassVar[bool] = True

    def slots(self, rounds):
        return rounds

    def slot(self, i):
        return i

    def writes(self, i):
        return True


class Every(AbstractPolicy):
    """Every `k`-th round writes a slot, and the `k - 1` rounds behind it read it. Parallel.

    A loop of `r` rounds has `ceil(r / k)` slots. The keys and values of the other rounds are kept nowhere: not computed where rounds
    are unrolled; computed and dropped where they are rolled up, or a run-time number, since one program serves every round then.

    !!! example

        ```python
        import rinsx as rx

        policy = rx.cache.Every(2)
        [policy.slot(i) for i in range(5)]  # [0, 0, 1, 1, 2]
        ```
    """

    k: int = eqx.field(static=True)
    parallel: ClassVar[bool] = True

    def __init__(self, k: int):
        """**Arguments:**

        - `k`: at least 1; at 1 this is [`rinsx.cache.PerVisit`][].
        """
        at_least(1, k=k)
        self.k = k

    def slots(self, rounds):
        return None if rounds is None else -(-rounds // self.k)

    def slot(self, i):
        return i // self.k

    def writes(self, i):
        return i % self.k == 0


class First(AbstractPolicy):
    """The first round's keys and values serve all rounds: a loop has the cache of a plain model. Parallel.

    !!! example

        ```python
        import rinsx as rx

        rx.cache.First().slots(4)  # 1
        ```
    """

    parallel: ClassVar[bool] = True

    def slots(self, rounds):
        return 1

    def slot(self, i):
        return 0

    def writes(self, i):
        return i == 0


class Last(AbstractPolicy):
    """Slots of the last `k` rounds: round `i` writes slot `i % k`, over what round `i - k` has written. **Sequential**.

    With `k=1`, a token attends to the last round's keys and values of the tokens before it, whatever round it is in itself. A
    prompt that is run at once attends to those of the same round instead: that is an approximation, for
    which `prefill="parallel"` of [`rinsx.generate.tokens`][] has to be asked by name.

    !!! example

        ```python
        import rinsx as rx

        policy = rx.cache.Last(2)
        [policy.slot(i) for i in range(5)]  # [0, 1, 0, 1, 0]
        ```
    """

    k: int = eqx.field(static=True)
    parallel: ClassVar[bool] = False

    def __init__(self, k: int = 1):
        """**Arguments:**

        - `k`: how many rounds are kept, at least 1.
        """
        at_least(1, k=k)
        self.k = k

    def slots(self, rounds):
        if rounds is None:
            return self.k
        return min(rounds, self.k) if isinstance(rounds, int) else jnp.minimum(rounds, self.k)

    def slot(self, i):
        return i % self.k

    def writes(self, i):
        return True

    def kept(self, i):
        # From round k on, what stands there is one of its own last rounds.
        if isinstance(i, int):
            return i - 1 if i < self.k else self.slot(i)
        return jnp.where(i < self.k, i - 1, self.slot(i))
