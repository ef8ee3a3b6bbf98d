"""Parts that models are made of.

Arrays are batched: a state has the shape `[batch, t, width]`. Weights are float32, and cast to the dtype of what they act on.
"""

from .._causal import causal_attention as causal_attention
from .._stack import Stack as Stack
from ._attention import Attention as Attention
from ._cross_entropy import cross_entropy as cross_entropy
from ._linear import Embedding as Embedding, Linear as Linear, RMSNorm as RMSNorm
from ._rotary import Rotary as Rotary, rotary as rotary, rotate as rotate
from ._transformer import MLP as MLP, TransformerLayer as TransformerLayer


__all__ = [
    "Attention",
    "causal_attention",
    "cross_entropy",
    "Embedding",
    "Linear",
    "MLP",
    "RMSNorm",
    "rotary",
    "Rotary",
    "rotate",
    "Stack",
    "TransformerLayer",
]
