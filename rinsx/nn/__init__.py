"""Parts that models are made of.

Arrays are batched: a state has the shape `[batch, t, width]`. Weights are float32, and cast to the dtype of what they act on.
"""

from .._attend import attention as attention
from .._stack import Stack as Stack
from ._attention import Attention as Attention
from ._contrastive import sigmoid_loss as sigmoid_loss, softmax_loss as softmax_loss
from ._cross_entropy import cross_entropy as cross_entropy
from ._linear import Embedding as Embedding, LayerNorm as LayerNorm, Linear as Linear, RMSNorm as RMSNorm
from ._patches import patches as patches, sincos as sincos
from ._pool import AttentionPool as AttentionPool
from ._rotary import Rotary as Rotary, rotary as rotary, rotate as rotate
from ._transformer import MLP as MLP, TransformerLayer as TransformerLayer


__all__ = [
    "Attention",
    "attention",
    "AttentionPool",
    "cross_entropy",
    "Embedding",
    "LayerNorm",
    "Linear",
    "MLP",
    "patches",
    "RMSNorm",
    "rotary",
    "Rotary",
    "rotate",
    "sigmoid_loss",
    "sincos",
    "softmax_loss",
    "Stack",
    "TransformerLayer",
]
