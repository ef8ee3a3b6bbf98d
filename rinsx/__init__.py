"""Recursion in depth as a first-class operator in JAX."""

from importlib import import_module
from importlib.metadata import version

from . import (
    adapters as adapters,
    cache as cache,
    depth as depth,
    flops as flops,
    generate as generate,
    gradient as gradient,
    injection as injection,
    models as models,
    nn as nn,
    start as start,
)
from ._enumerate import enumerate_signatures as enumerate_signatures
from ._lift import lift as lift
from ._loop import Loop as Loop, with_rounds as with_rounds
from ._recur import chain as chain, compose as compose, recur as recur, Recursion as Recursion
from ._rewire import rewire as rewire
from ._signature import Signature as Signature
from ._trace import Trace as Trace, trace as trace


__version__ = version("rinsx")


def __getattr__(name: str):
    # What needs more than the required dependencies is imported when it is first asked for.
    if name in ("data", "pretrained", "train", "transfer"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
