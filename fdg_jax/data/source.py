"""What training needs of a data set: its shape, batch i as a function of (seed, i), and its test images once each."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class ArraySource:
    """Images and labels that fit in memory.

    Attributes:
        name: of the data set.
        num_classes: labels are 0 .. num_classes - 1.
        train_images, test_images: (N, H, W, C) float32.
        train_labels, test_labels: (N,) int32.
    """

    name: str
    num_classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training images; those left over are dropped, other ones in every epoch.

        Raises:
            ValueError: there is not one whole batch.
        """
        steps = len(self.train_images) // batch_size
        if not steps:
            total = len(self.train_images)
            raise ValueError(
                f"batch_size must be at most {total}, the training images of {self.name}; got {batch_size}"
            )
        return steps

    def batch(self, seed: int, i: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of training batch i: a function of its arguments alone, in a new order every epoch."""
        epoch, place = divmod(i, self.steps_per_epoch(batch_size))
        order = _order(seed, epoch, len(self.train_images))
        chosen = order[place * batch_size : (place + 1) * batch_size]
        return self.train_images[chosen], self.train_labels[chosen]

    def test_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(images, labels, mask (N,)): every test image once; what fills the last batch up is masked out."""
        total = len(self.test_images)
        for start in range(0, total, batch_size):
            index = np.arange(start, start + batch_size)
            yield self.test_images[index % total], self.test_labels[index % total], index < total


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)
