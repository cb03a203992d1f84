"""Sets that do not fit on a device: batch i is still a function of (seed, i), read and decoded on the host.

Which images make up a batch is what `ArraySource` would choose, and what happens to an image is drawn from a generator
seeded by (seed, i, place in the batch). Grain only runs this function ahead of time, in threads: it holds no state that
a resumed run would need. Pixels travel as bytes and are normalised on the device.
"""

import io
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fdg_jax.data.augment import normalise
from fdg_jax.data.shuffle import shuffled
from fdg_jax.data.source import Array, Batch, chosen, whole_batches

SAMPLE = 512  # images whose mean and deviation stand for those of the whole set
EVALUATION_MARGIN = 256 / 224  # the shorter side before the centre is cut out, in sides of the crop


class Records(Protocol):
    """Random access to {"image": encoded bytes or (h, w, C) uint8, "label": whole number}, from any thread."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class StreamSource:
    """Images read when they are wanted; the same interface as `ArraySource`.

    Attributes:
        name: of the data set.
        num_classes: labels are 0 .. num_classes - 1.
        image_shape: (H, W, C) of an image in a batch, with C 1 or 3.
        train, test: the stored images.
        resized: stored images are of any size. A training image is a random part of one, 8 to 100 % of its area with
            sides 3:4 to 4:3 (Szegedy et al. 2015, section 6), brought to H x W; a test image is the centre of one
            whose shorter side was brought to 256/224 of the crop's. Otherwise all are stored as H x W.
        mean, std: per channel, of the normalisation (pixel - mean) / std; where they are None, those of 512 training
            images, the same always.
        crop_padding: where images are not resized, pixels by which a training image is shifted at most.
        flip: whether one training image in two is mirrored from left to right.
        kept: numbers of the training images that take part; all where it is None.
        num_threads: that read and decode, each a batch of its own; so many batches wait in memory. One a core, 16 at
            most, where it is None.
        image_device, label_device: where batches are put; JAX's default device where they are None.

    Raises:
        ValueError: an empty split. Later: an image that does not decode or is not of the shape, a label out of range.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    train: Records
    test: Records
    resized: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_padding: int = 0
    flip: bool = False
    kept: np.ndarray | None = None
    num_threads: int | None = None
    image_device: jax.Device | None = None
    label_device: jax.Device | None = None

    def __post_init__(self):
        for split, records in (("train", self.train), ("test", self.test)):
            if not len(records):
                raise ValueError(f"{self.name}, {split} split: it is empty")

    @property
    def num_train(self) -> int:
        return len(self.train) if self.kept is None else len(self.kept)

    @property
    def num_test(self) -> int:
        return len(self.test)

    def limited(self, num: int) -> "StreamSource":
        """With only `num` of the training images, the same random ones always. The test images stay."""
        kept = np.sort(_first(min(num, self.num_train), self.num_train))
        return replace(self, kept=kept if self.kept is None else self.kept[kept])

    def augmented(self, crop_padding: int, flip: bool) -> "StreamSource":
        """With training images mirrored or not, and shifted by up to `crop_padding` pixels where none is resized."""
        return replace(self, crop_padding=crop_padding, flip=flip)

    def placed(self, image_device: jax.Device, label_device: jax.Device) -> "StreamSource":
        """The same, with batches put on these devices."""
        return replace(self, image_device=image_device, label_device=label_device)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training images; those left over are dropped, other ones in every epoch.

        Raises:
            ValueError: there is not one whole batch.
        """
        return whole_batches(self, batch_size)

    def batch(self, seed: int, i: int, batch_size: int) -> Batch:
        """Images (B, H, W, C) float32 and labels (B,) int32 of training batch i: a function of its arguments alone."""
        self.steps_per_epoch(batch_size)
        return self._on_devices(*self._train_batch(seed, i, batch_size))

    def batches(self, seed: int, batch_size: int, start: int = 0) -> Generator[Batch, None, None]:
        """Batch `start` and those that follow, without end, read ahead; closing the iterator ends the reading."""
        self.steps_per_epoch(batch_size)
        for batch in self._ahead(lambda i: self._train_batch(seed, i, batch_size), start, 2**31 - 1):
            yield self._on_devices(*batch)

    def test_batches(self, batch_size: int) -> Iterator[tuple[Array, np.ndarray, np.ndarray]]:
        """(images, labels, mask (B,)): every test image once; what fills the last batch up is masked out."""

        def read(i):
            index = np.arange(i * batch_size, (i + 1) * batch_size)
            return *self._gather("test", index % self.num_test), index < self.num_test

        for images, labels, mask in self._ahead(read, 0, math.ceil(self.num_test / batch_size)):
            yield self._normalised(images), labels, mask

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation per channel, (C,) float32, in units of a pixel."""
        channels = self.image_shape[-1]
        mean, std = np.zeros(channels), np.ones(channels)
        if self.mean is None or self.std is None:
            sample = _first(min(SAMPLE, self.num_train), self.num_train)
            parts = self._ahead(lambda j: self._gather("train", sample[j::16])[0], 0, min(16, len(sample)))
            pixels = np.concatenate([part.reshape(-1, channels) for part in parts])
            mean, std = pixels.mean(0, dtype=np.float64), np.maximum(pixels.std(0, dtype=np.float64), 1e-3)
        mean = mean if self.mean is None else np.broadcast_to(self.mean, channels)
        std = std if self.std is None else np.broadcast_to(self.std, channels)
        return mean.astype(np.float32), std.astype(np.float32)

    def _train_batch(self, seed: int, i: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        seed &= 0xFFFFFFFF
        with jax.default_device(_host()):
            index = np.asarray(_chosen(np.uint32(seed), np.uint32(i), size=self.num_train, batch_size=batch_size))
        return self._gather("train", index, lambda place: np.random.default_rng((seed, i, place)))

    def _gather(
        self, split: str, index: np.ndarray, generator: Callable[[int], np.random.Generator] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, H, W, C) uint8 and labels (B,) int32; a generator for a place is what makes it augmented."""
        images = np.empty((len(index), *self.image_shape), np.uint8)
        labels = np.empty(len(index), np.int32)
        for place, number in enumerate(index):
            number = int(number if split == "test" or self.kept is None else self.kept[number])
            record = (self.test if split == "test" else self.train)[number]
            try:
                images[place] = self._seen(record["image"], generator and generator(place))
            except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for data of several kinds of wrong
                raise ValueError(f"{self.name}, {split} split, image {number}: {error}") from None
            labels[place] = record["label"]
            if not 0 <= labels[place] < self.num_classes:
                raise ValueError(
                    f"{self.name}, {split} split, image {number}: labels must lie in 0..{self.num_classes - 1}; "
                    f"got {labels[place]}"
                )
        return images, labels

    def _seen(self, image: bytes | np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """What the network sees of a stored image, in training where a generator is given."""
        if self.resized:
            whole = decoded(image, self.image_shape[-1])
            part = centre(whole, self.image_shape[:2]) if rng is None else random_part(whole, self.image_shape[:2], rng)
            pixels = np.asarray(part).reshape(self.image_shape)
        else:
            pixels = exact_pixels(image, self.image_shape)
            if rng is not None and self.crop_padding:
                pixels = shifted(pixels, rng.integers(-self.crop_padding, self.crop_padding, 2, endpoint=True))
        return pixels[:, ::-1] if rng is not None and self.flip and rng.random() < 0.5 else pixels

    def _ahead(self, read: Callable[[int], Any], start: int, stop: int) -> Generator[Any, None, None]:
        """read(start), read(start + 1), .. to stop, in order, computed by threads some steps ahead."""
        import grain

        def tried(i):
            try:
                return read(i)
            except ValueError as error:  # Grain would add lines of its own to what is raised in its threads
                return error

        threads = self.num_threads or min(16, os.cpu_count() or 1)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        iterator = iter(grain.MapDataset.range(start, stop).map(tried).to_iter_dataset(options))
        try:
            for result in iterator:
                if isinstance(result, ValueError):
                    raise result
                yield result
        finally:
            iterator.close()  # else its threads read on what is in the queue

    def _on_devices(self, images: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return self._normalised(images), jax.device_put(labels, self.label_device)

    def _normalised(self, images: np.ndarray) -> jax.Array:
        return _normalise(*jax.device_put((images, *self.moments), self.image_device))


_normalise = jax.jit(normalise)
_chosen = jax.jit(chosen, static_argnames=("size", "batch_size"))


def _first(num: int, size: int) -> np.ndarray:
    """The same `num` of 0 .. size - 1 always, at random."""
    return np.asarray(shuffled(0, 0, jnp.arange(num), size))


def _host() -> jax.Device:
    """Where numbers are computed without a queue of work before them; JAX_PLATFORMS may leave the CPU out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def decoded(image: bytes | np.ndarray, channels: int) -> Image.Image:
    """The image, grey where `channels` is 1, coloured where it is 3."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[..., 0] if channels == 1 else image)
    with Image.open(io.BytesIO(image)) as file:
        return file.convert({1: "L", 3: "RGB"}[channels])


def exact_pixels(image: bytes | np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The pixels (H, W, C) uint8 of an image that is stored in this shape.

    Raises:
        ValueError: it is of another.
    """
    pixels = np.asarray(image if isinstance(image, np.ndarray) else decoded(image, shape[-1]))
    if pixels.shape[:2] != shape[:2]:
        raise ValueError(
            f"images must be of one size, {shape[0]} x {shape[1]}; got {pixels.shape[0]} x {pixels.shape[1]}"
        )
    return pixels.reshape(shape)


def random_part(image: Image.Image, size: Sequence[int], rng: np.random.Generator) -> Image.Image:
    """A part of 8 to 100 % of the area with sides 3:4 to 4:3, brought to `size` (H, W); the centre if none fits."""
    width, height = image.size
    for _ in range(10):
        area = rng.uniform(0.08, 1) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, (width - w, height - h), endpoint=True)
            box = (int(left), int(top), int(left) + w, int(top) + h)
            return image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    return centre(image, size)


def centre(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """The middle `size` (H, W) of the image, brought to where its shorter side has 256/224 of the crop's."""
    height, width = size
    scale = EVALUATION_MARGIN * max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def shifted(pixels: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """`pixels` (H, W, C) from row shift[0] and column shift[1] on, with zeros where there are none."""
    padding = int(np.abs(shift).max())
    rows, columns = shift + padding
    padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)))
    return padded[rows : rows + pixels.shape[0], columns : columns + pixels.shape[1]]
