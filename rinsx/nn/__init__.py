"""Parts that models are made of."""

from .._stack import Stack as Stack


__all__ = ["Stack"]
