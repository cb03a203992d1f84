"""Data sets: what `ArraySource` asks for, and where it comes from."""

from fdg_jax.data.digits import digits
from fdg_jax.data.source import ArraySource

__all__ = ["ArraySource", "digits"]
