"""What training needs of a data set: its shape, batch i as a function of (seed, i), and its test images once each.

A set that fits on a device lives there: choosing, cropping, mirroring and normalising the images of a batch is one
jitted function of (seed, i), and the host sends an integer.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.data.augment import crop_and_flip, normalise
from fdg_jax.data.shuffle import shuffled

Array = jax.Array | np.ndarray
Batch = tuple[Array, Array]  # images (B, H, W, C) float32, labels (B,) int32


@dataclass(frozen=True)
class Feed:
    """Training batches as a pure function of their number, for an engine that makes them inside its own program.

    Attributes:
        data: arrays that the function reads; all on one device.
        at: `(data, i) -> (inputs, targets)` of batch i, () uint32; jittable. Programs are compiled once for each that
            is not equal to another, so that a module's function serves better than a new lambda in every call.
    """

    data: Any
    at: Callable[[Any, jax.Array], tuple[Any, Any]]

    def batch(self, i: int) -> tuple[Any, Any]:
        """Batch i, for an engine that is given its batches."""
        return _batch(self.at, self.data, np.uint32(i))


@partial(jax.jit, static_argnums=0)
def _batch(at, data, i):
    return at(data, i)


class Source(Protocol):
    """What training asks of a data set, however it is stored; `ArraySource` says what each of these is."""

    @property
    def name(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def image_shape(self) -> tuple[int, int, int]: ...
    @property
    def num_train(self) -> int: ...
    @property
    def num_test(self) -> int: ...
    def limited(self, num: int) -> "Source": ...
    def augmented(self, crop_padding: int, flip: bool) -> "Source": ...
    def placed(self, image_device: jax.Device, label_device: jax.Device) -> "Source": ...
    def steps_per_epoch(self, batch_size: int) -> int: ...
    def batch(self, seed: int, i: int, batch_size: int) -> Batch: ...
    def batches(self, seed: int, batch_size: int, start: int = 0) -> Generator[Batch, None, None]: ...
    def test_batches(self, batch_size: int) -> Iterator[tuple[Array, np.ndarray, np.ndarray]]: ...


@dataclass(frozen=True)
class ArraySource:
    """Images and labels that fit in memory.

    Attributes:
        name: of the data set.
        num_classes: labels are 0 .. num_classes - 1.
        train_images, test_images: (N, H, W, C) uint8, or float32.
        train_labels, test_labels: (N,) whole numbers.
        mean, std: per channel, of the normalisation (pixel - mean) / std. Where they are None, those of the training
            images if pixels are uint8, else none.
        crop_padding: pixels by which a training image is shifted at most, with zeros where it has left.
        flip: whether one training image in two is mirrored from left to right.
        image_device, label_device: where batches are made; JAX's default device where they are None.

    Raises:
        ValueError: arrays that do not fit one another, an empty split, a label out of range.
    """

    name: str
    num_classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_padding: int = 0
    flip: bool = False
    image_device: jax.Device | None = None
    label_device: jax.Device | None = None

    def __post_init__(self):
        for split, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            where = f"{self.name}, {split} split:"
            if not len(images):
                raise ValueError(f"{where} it is empty")
            if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
                raise ValueError(
                    f"{where} images must be (N, H, W, C) of uint8 or float32; got {images.dtype}{list(images.shape)}"
                )
            if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(
                    f"{where} labels must be one whole number an image; got {labels.dtype}{list(labels.shape)} "
                    f"for {len(images)} images"
                )
            wrong = labels[(labels < 0) | (labels >= self.num_classes)]
            if len(wrong):
                raise ValueError(
                    f"{where} labels must lie in 0..{self.num_classes - 1}; {len(wrong)} do not, {wrong[0]} among them"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            shapes = self.train_images.shape[1:], self.test_images.shape[1:]
            raise ValueError(f"{self.name}: training and test images must be of one shape; got {shapes}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.train_images.shape[1:]

    @property
    def num_train(self) -> int:
        return len(self.train_images)

    @property
    def num_test(self) -> int:
        return len(self.test_images)

    def limited(self, num: int) -> "ArraySource":
        """With only `num` of the training images, the same random ones always. The test images stay."""
        kept = np.sort(np.asarray(shuffled(0, 0, jnp.arange(min(num, self.num_train)), self.num_train)))
        return replace(self, train_images=self.train_images[kept], train_labels=self.train_labels[kept])

    def augmented(self, crop_padding: int, flip: bool) -> "ArraySource":
        """With training images shifted by up to `crop_padding` pixels, and mirrored or not."""
        return replace(self, crop_padding=crop_padding, flip=flip)

    def placed(self, image_device: jax.Device, label_device: jax.Device) -> "ArraySource":
        """The same, with batches made on these devices."""
        return replace(self, image_device=image_device, label_device=label_device)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training images; those left over are dropped, other ones in every epoch.

        Raises:
            ValueError: there is not one whole batch.
        """
        return whole_batches(self, batch_size)

    def batch(self, seed: int, i: int, batch_size: int) -> Batch:
        """Images (B, H, W, C) float32 and labels (B,) int32 of training batch i: a function of its arguments alone.

        Every epoch visits the images in an order of its own.
        """
        self.steps_per_epoch(batch_size)
        numbers = np.uint32(seed & 0xFFFFFFFF), np.uint32(i)
        augmentation = {"padding": self.crop_padding, "flip": self.flip}
        images = _train_images(*numbers, *self._on_image_device["train"], batch_size=batch_size, **augmentation)
        return images, _train_labels(*numbers, self._labels_on_device, batch_size=batch_size)

    def feed(self, seed: int, batch_size: int) -> Feed:
        """The batches of `batch` as a function of their number alone; the labels go to the images' device."""
        self.steps_per_epoch(batch_size)
        labels = jax.device_put(self._labels_on_device, self.image_device)
        at = _TrainBatch(seed & 0xFFFFFFFF, batch_size, self.crop_padding, self.flip)
        return Feed((*self._on_image_device["train"], labels), at)

    def batches(self, seed: int, batch_size: int, start: int = 0) -> Generator[Batch, None, None]:
        """Batch `start` and those that follow, without end."""
        i = start
        while True:
            yield self.batch(seed, i, batch_size)
            i += 1

    def test_batches(self, batch_size: int) -> Iterator[tuple[Array, np.ndarray, np.ndarray]]:
        """(images, labels, mask (B,)): every test image once; what fills the last batch up is masked out."""
        for start in range(0, self.num_test, batch_size):
            index = np.arange(start, start + batch_size)
            images = _test_images(index % self.num_test, *self._on_image_device["test"])
            yield images, self.test_labels[index % self.num_test].astype(np.int32), index < self.num_test

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation per channel, (C,) float32, in units of a pixel."""
        channels = self.image_shape[-1]
        if self.train_images.dtype == np.uint8:
            counts = np.stack([np.bincount(self.train_images[..., c].ravel(), minlength=256) for c in range(channels)])
            shares = counts / counts.sum(1, keepdims=True)
            mean = shares @ np.arange(256)
            std = np.sqrt(np.maximum(shares @ np.arange(256) ** 2 - mean**2, 1e-6))
        else:
            mean, std = np.zeros(channels), np.ones(channels)
        mean = mean if self.mean is None else np.broadcast_to(self.mean, channels)
        std = std if self.std is None else np.broadcast_to(self.std, channels)
        return mean.astype(np.float32), std.astype(np.float32)

    @cached_property
    def _on_image_device(self) -> dict[str, Any]:
        train = jax.device_put((self.train_images, *self.moments), self.image_device)
        return {"train": train, "test": (jax.device_put(self.test_images, self.image_device), *train[1:])}

    @cached_property
    def _labels_on_device(self) -> jax.Array:
        return jax.device_put(self.train_labels.astype(np.int32), self.label_device)


def whole_batches(source: Source, batch_size: int) -> int:
    """How many there are in the training images; ValueError where there is none."""
    steps = source.num_train // batch_size
    if not steps:
        raise ValueError(
            f"batch_size must be at most {source.num_train}, the training images of {source.name}; got {batch_size}"
        )
    return steps


def chosen(seed: jax.Array, i: jax.Array, size: int, batch_size: int) -> jax.Array:
    """Numbers (B,) of the training images in batch i."""
    epoch, place = jnp.divmod(i, jnp.uint32(size // batch_size))
    return shuffled(seed, epoch, place * jnp.uint32(batch_size) + jnp.arange(batch_size, dtype=jnp.uint32), size)


@partial(jax.jit, static_argnames=("batch_size", "padding", "flip"))
def _train_images(seed, i, images, mean, std, *, batch_size, padding, flip):
    index = chosen(seed, i, len(images), batch_size)
    if not padding and not flip:
        return normalise(images[index], mean, std)
    key = jax.random.fold_in(jax.random.key(seed), i)
    return normalise(crop_and_flip(images, index, key, padding, flip), mean, std)


@partial(jax.jit, static_argnames="batch_size")
def _train_labels(seed, i, labels, *, batch_size):
    return labels[chosen(seed, i, len(labels), batch_size)]


@dataclass(frozen=True)
class _TrainBatch:
    """Batch i of a resident set; equal where its numbers are, so that equal feeds share their programs."""

    seed: int
    batch_size: int
    padding: int
    flip: bool

    def __call__(self, data: Any, i: jax.Array) -> Batch:
        images, mean, std, labels = data
        seed, size = jnp.uint32(self.seed), self.batch_size
        pixels = _train_images(seed, i, images, mean, std, batch_size=size, padding=self.padding, flip=self.flip)
        return pixels, _train_labels(seed, i, labels, batch_size=size)


@jax.jit
def _test_images(index, images, mean, std):
    return normalise(images[index], mean, std)
