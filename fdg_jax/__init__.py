"""Asynchronous, delayed-gradient training of Flax networks cut over devices."""

import warnings

from fdg_jax import methods, models
from fdg_jax.engine.base import State
from fdg_jax.metrics import softmax_cross_entropy
from fdg_jax.pipeline import Pipeline

# `python -m fdg_jax.methods` prints a table; that the module has been imported here before does no harm.
warnings.filterwarnings("ignore", "'fdg_jax.methods' found in sys.modules", RuntimeWarning)

__all__ = ["Pipeline", "State", "methods", "models", "softmax_cross_entropy"]
__version__ = "0.1.0"
