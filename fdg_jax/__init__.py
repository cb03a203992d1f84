"""Asynchronous, delayed-gradient training of Flax networks cut over devices."""

from fdg_jax import methods, models
from fdg_jax.engine.base import State
from fdg_jax.metrics import softmax_cross_entropy
from fdg_jax.pipeline import Pipeline

__all__ = ["Pipeline", "State", "methods", "models", "softmax_cross_entropy"]
__version__ = "0.1.0"
