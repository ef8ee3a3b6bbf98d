"""How much of a loop is rolled and how much unrolled, where nobody has said: what measures best on the backend."""

import jax
import jax.tree_util as jtu
from jaxtyping import PyTree


# Measured on CPU (docs/results/operators.md): a loop of a few visits is fastest unrolled with everything stored, a longer one
# only as long as what it stores is small: above 32 MiB the memory of a call is fresh from the system each time, page by
# page. Beyond that, rolled with the input of each visit stored is as fast or faster, many times smaller, and compiles in
# constant time.
_FEW = 4
_MANY = 16
_CACHE = 2**20


def unrolls(visits: int, state: PyTree) -> bool:
    """Whether a loop with so many visits in all is unrolled by default.

    **Arguments:**

    - `visits`: the number of layers that the unrolled program would hold.
    - `state`: the state that the loop carries.
    """
    if jax.default_backend() != "cpu":
        return False
    saved = visits * sum(leaf.size * leaf.dtype.itemsize for leaf in jtu.tree_leaves(state))
    return visits <= _FEW or (visits <= _MANY and saved <= _CACHE)


def kept(rounds: int, visits: int) -> int:
    """How many of the last rounds of a rolled loop are unrolled behind it by default, with everything stored.

    One takes no more memory than the same model without recursion.

    **Arguments:**

    - `rounds`: the number of rounds, of at least 2.
    - `visits`: the number of layers that a round visits.
    """
    few = _FEW // max(visits, 1) if jax.default_backend() == "cpu" else 0
    return min(max(few, 1), rounds - 1)
