"""Weights of the transformers library, loaded and saved: SigLIP, its image tower, and ViT."""

from ._config import config as config
from ._load import load as load
from ._save import save as save


__all__ = ["config", "load", "save"]
