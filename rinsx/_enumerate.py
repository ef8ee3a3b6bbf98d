"""All signatures within bounds."""

from collections.abc import Iterator

from ._signature import Signature
from ._tree import MAX_TERMS


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def enumerate_signatures(blocks: int, visits: int, degree: int = 2) -> Iterator[Signature]:
    """All signatures within bounds that differ by more than the names of their blocks,
    each once.

    They are ordered by the number of visits, then alphabetically by the visits spelled
    out. Blocks are called A, B, C, ... in the order of their first visits, exponents
    are integers, and what is written is the normal form. The number of signatures grows
    exponentially with `visits`, so they are made one at a time.

    Two blocks and at most 6 visits make 57 signatures, two of them of degree 2.

    !!! example

        ```python
        import rinsx as rx

        [str(s) for s in rx.enumerate_signatures(blocks=2, visits=3)]
        # ['A B', 'A^2 B', 'A B A', 'A B^2']
        ```

    **Arguments:**

    - `blocks`: how many different blocks are visited, from 1 to 26.
    - `visits`: the most visits in all, from `blocks` to 256.
    - `degree`: the largest degree of the normal form, at least 0.

    **Returns:**

    An iterator over [`rinsx.Signature`][]s.

    **Raises:**

    `ValueError` for bounds out of range.
    """
    _check("blocks", blocks, 1, len(_LETTERS))
    _check("visits", visits, blocks, MAX_TERMS)
    _check("degree", degree, 0, None)
    return _enumerate(blocks, visits, degree)


def _enumerate(blocks: int, visits: int, degree: int) -> Iterator[Signature]:
    for length in range(blocks, visits + 1):
        for word in _words("", blocks, length, degree):
            normal = Signature(str(Signature(word)))
            if normal.degree <= degree:
                yield normal


def _words(word: str, blocks: int, length: int, degree: int) -> Iterator[str]:
    """The words of a length that begin with `word` and have `blocks` different letters,
    each used for the first time after the ones before it in the alphabet."""
    # A repeat stays a repeat whatever follows. Not so for higher degrees.
    if degree == 0 and word and Signature(word).degree > 0:
        return
    if len(word) == length:
        yield word
        return
    used = len(set(word))
    # Only new letters, once there is just enough room for all that are missing.
    first = used if length - len(word) == blocks - used else 0
    for letter in _LETTERS[first : min(used + 1, blocks)]:
        yield from _words(word + letter, blocks, length, degree)


def _check(name: str, value: int, least: int, most: int | None) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {bounds}; got {value}")
