"""Parameters on disk, by Orbax. Resuming a run from the middle of its pipeline is still to come."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as orbax

PyTree = Any


class Weights(NamedTuple):
    """A trained network: what `Pipeline.params` and `Pipeline.module_state` give, one tree a layer."""

    params: list[PyTree]
    module_state: list[PyTree]


def save_weights(folder: Path, weights: Weights) -> None:
    """Writes the weights into a new folder.

    Raises:
        ValueError: the folder exists; nothing is overwritten.
    """
    if folder.exists():
        raise ValueError(f"{folder} already exists, and nothing is overwritten")
    orbax.save(folder.absolute(), jax.tree.map(np.asarray, weights._asdict()))


def load_weights(folder: Path, like: Weights | None = None) -> Weights:
    """Reads what `save_weights` wrote.

    Args:
        folder: the one given to `save_weights`.
        like: weights of the same network, of which only structure and shapes matter; without it the keys of dicts come
            back as strings.
    """
    return Weights(**orbax.load(folder.absolute(), like._asdict() if like else None))
