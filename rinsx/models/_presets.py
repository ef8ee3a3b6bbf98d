"""Shapes by name."""

from ._decoder import DecoderConfig
from ._siglip import SigLIPConfig
from ._text import TextConfig
from ._vit import ViTConfig


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

vit_presets: dict[str, ViTConfig] = {
    "nano": ViTConfig(32, patch=4, width=64, layers=4, heads=4, dtype="float32"),
    "S/16": ViTConfig(224, patch=16, width=384, layers=12, heads=6),
    "B/16": ViTConfig(224, patch=16, width=768, layers=12, heads=12),
    "So400m/14": ViTConfig(224, patch=14, width=1152, layers=27, heads=16, hidden=4304),
}
"""Shapes of image towers by name: `nano` for images of 32 x 32 pixels, and the published `S/16`, `B/16` and `So400m/14`."""

siglip_presets: dict[str, SigLIPConfig] = {
    "nano": SigLIPConfig(
        vit_presets["nano"], TextConfig(257, context=32, width=64, layers=4, heads=4, dtype="float32")
    ),
    "S/16": SigLIPConfig(vit_presets["S/16"], TextConfig(32_000, context=64, width=384, layers=12, heads=6)),
    "B/16": SigLIPConfig(vit_presets["B/16"], TextConfig(32_000, context=64, width=768, layers=12, heads=12)),
    "So400m/14": SigLIPConfig(
        vit_presets["So400m/14"], TextConfig(32_000, context=64, width=1152, layers=27, heads=16, hidden=4304)
    ),
}
"""Shapes of both towers by name: `nano` over bytes, and `S/16`, `B/16` and `So400m/14` over 32,000 tokens."""
