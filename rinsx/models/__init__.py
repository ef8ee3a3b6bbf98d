"""Reference models: short files made of public parts, to be read, copied and changed."""

from ._decoder import DecoderConfig as DecoderConfig, DecoderLM as DecoderLM
from ._presets import presets as presets


__all__ = ["DecoderConfig", "DecoderLM", "presets"]
