"""Shapes of decoders by name."""

from ._decoder import DecoderConfig


# The paper names its language models by their parameters (300M, 600M, 1B), a vocabulary of 32k and sequences of 1024 tokens.
# Their widths and depths are not known to us: those below are ours.
presets: dict[str, DecoderConfig] = {
    "nano": DecoderConfig(257, width=48, layers=4, heads=3, context=128, dtype="float32"),
    "tiny": DecoderConfig(257, width=256, layers=6, heads=4, context=512),
    "small": DecoderConfig(257, width=512, layers=8, heads=8, context=1024),
    "rins-300m": DecoderConfig(32_768, width=1024, layers=22, heads=16),
    "rins-600m": DecoderConfig(32_768, width=1536, layers=20, heads=16),
    "rins-1b": DecoderConfig(32_768, width=2048, layers=20, heads=16),
}
"""Shapes by name: `nano`, `tiny` and `small` over bytes, `rins-300m`, `rins-600m` and `rins-1b` over 32,768 tokens."""
