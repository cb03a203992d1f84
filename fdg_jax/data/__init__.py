"""Data sets: what training asks of a `Source`, and where sources come from.

Those that need nothing but NumPy are here. `data.folder.folder` needs Pillow, `data.tfds.tfds` tensorflow-datasets, and
Grain for sets that do not fit in memory.
"""

from fdg_jax.data.arrays import arrays
from fdg_jax.data.digits import digits
from fdg_jax.data.source import ArraySource, Feed, Source

__all__ = ["ArraySource", "Feed", "Source", "arrays", "digits"]
