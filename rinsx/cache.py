"""Caches of keys and values for decoding: which slots the rounds of a loop share, and what a block attends with.

A cache rides in the state. A block takes it out with [`rinsx.cache.open`][], attends, and closes it again; in training the same
code meets plain attention.
"""

from ._cache import Cache as Cache
from ._handle import AbstractHandle as AbstractHandle, open as open, Plain as Plain, Stream as Stream
from ._loop import with_policy as with_policy
from ._make_cache import make as make
from ._policy import (
    AbstractPolicy as AbstractPolicy,
    Every as Every,
    First as First,
    Last as Last,
    PerVisit as PerVisit,
)


__all__ = [
    "AbstractHandle",
    "AbstractPolicy",
    "Cache",
    "Every",
    "First",
    "Last",
    "make",
    "open",
    "PerVisit",
    "Plain",
    "Stream",
    "with_policy",
]
