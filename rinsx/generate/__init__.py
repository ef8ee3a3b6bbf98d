"""Text from a model with recursion: depth and cache are chosen when it runs.

A model is anything with the methods `cache`, `decode` and `logits` of [`rinsx.models.DecoderLM`][].
"""

from ._sampler import Sampler as Sampler
from ._speculate import speculate as speculate, Speculation as Speculation
from ._sweep import sweep as sweep
from ._tokens import Generation as Generation, stream as stream, to_right as to_right, Token as Token, tokens as tokens
from ._until import (
    AbstractCriterion as AbstractCriterion,
    EntropyChange as EntropyChange,
    KL as KL,
    StateChange as StateChange,
    Until as Until,
)


__all__ = [
    "AbstractCriterion",
    "EntropyChange",
    "Generation",
    "KL",
    "Sampler",
    "Speculation",
    "StateChange",
    "Token",
    "Until",
    "speculate",
    "stream",
    "sweep",
    "to_right",
    "tokens",
]
