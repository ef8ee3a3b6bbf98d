"""Reference models: short files made of public parts, to be read, copied and changed."""

from ._decoder import DecoderConfig as DecoderConfig, DecoderLM as DecoderLM
from ._presets import presets as presets, siglip_presets as siglip_presets, vit_presets as vit_presets
from ._siglip import SigLIP as SigLIP, SigLIPConfig as SigLIPConfig
from ._text import TextConfig as TextConfig, TextEncoder as TextEncoder
from ._vit import ViT as ViT, ViTConfig as ViTConfig


__all__ = [
    "DecoderConfig",
    "DecoderLM",
    "presets",
    "SigLIP",
    "SigLIPConfig",
    "siglip_presets",
    "TextConfig",
    "TextEncoder",
    "ViT",
    "ViTConfig",
    "vit_presets",
]
