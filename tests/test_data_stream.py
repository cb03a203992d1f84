import io
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from fdg_jax.data.source import ArraySource
from fdg_jax.data.stream import StreamSource, centre, random_part, shifted


class Counted:
    """Records in memory that know how often they were read."""

    def __init__(self, images, labels):
        self.images, self.labels, self.reads = images, labels, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        self.reads += 1
        return {"image": self.images[number], "label": self.labels[number]}


def numbered(num=11, **fields):
    """A source whose images are their own numbers, in every pixel."""
    images = np.broadcast_to(np.arange(num, dtype=np.uint8)[:, None, None, None], (num, 4, 6, 1))
    train, test = Counted(images, np.arange(num)), Counted(images[:7], np.arange(7))
    fields = {"resized": False, "mean": (0.0,), "std": (1.0,), "num_threads": 2} | fields
    return StreamSource("numbered", num, (4, 6, 1), train, test, **fields)


def photographs(num=6, **fields):
    """Smooth pictures of several sizes, as JPEG."""
    rng = np.random.default_rng(0)
    images = []
    for size in rng.integers(20, 60, (num, 2)):
        file = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize(tuple(size)).save(file, "jpeg")
        images.append(file.getvalue())
    records = Counted(images, np.arange(num))
    fields = {"flip": True, "num_threads": 2} | fields
    return StreamSource("photographs", num, (8, 8, 3), records, records, **fields)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_images_of_a_batch_are_those_of_a_resident_source():
    stream = numbered()
    images = np.stack([stream.train[n]["image"] for n in range(11)])
    resident = ArraySource("resident", 11, images, np.arange(11), images, np.arange(11), mean=(0.0,), std=(1.0,))
    for source, like in ((stream, resident), (stream.limited(5), resident.limited(5))):
        assert source.steps_per_epoch(4) == like.steps_per_epoch(4)
        for seed, i in ((0, 0), (0, 1), (0, 5), (-3, 2)):
            assert_equal(source.batch(seed, i, 4), like.batch(seed, i, 4))


def test_an_epoch_visits_every_image_at_most_once_and_another_in_another_order():
    source = numbered(12)
    epochs = [np.concatenate([source.batch(0, 3 * e + i, 4)[1] for i in range(3)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize("make", [numbered, photographs])
def test_iterating_gives_what_asking_directly_does_from_any_start(make):
    source = make()
    direct = {i: source.batch(7, i, 3) for i in reversed(range(8))}
    for start in (0, 5):
        iterator = source.batches(7, 3, start)
        for i in range(start, 8):
            assert_equal(next(iterator), direct[i])
        iterator.close()
    images, labels = direct[0]
    assert images.shape == (3, *source.image_shape)
    assert (images.dtype, labels.dtype) == (np.float32, np.int32)


def test_an_image_is_seen_differently_in_every_place_batch_and_seed():
    source = photographs(4)
    source.train.images[1:] = source.train.images[:1] * 3  # all are one
    seen = [np.asarray(source.batch(seed, i, 4)[0]) for seed, i in ((0, 0), (0, 1), (1, 0))]
    assert len({image.tobytes() for images in seen for image in images}) == 12


def test_a_limit_leaves_the_test_images():
    source = numbered().limited(5)
    assert (source.num_train, source.num_test) == (5, 7)
    ((_, labels, mask),) = source.test_batches(7)
    assert list(labels[mask]) == list(range(7))
    assert source.limited(3).num_train == 3


def test_augmentation_is_chosen_as_of_a_resident_source():
    source = numbered().augmented(crop_padding=1, flip=True)
    assert (source.crop_padding, source.flip) == (1, True)


def test_test_images_are_seen_once_in_batches_of_one_shape_and_unaltered():
    source = numbered(flip=True, crop_padding=2)
    batches = list(source.test_batches(3))
    assert {images.shape for images, _, _ in batches} == {(3, 4, 6, 1)}
    assert list(np.concatenate([labels[mask] for _, labels, mask in batches])) == list(range(7))
    for images, labels, _ in batches:
        np.testing.assert_array_equal(images, np.broadcast_to(labels[:, None, None, None], images.shape))
    ((_, labels, mask),) = source.test_batches(20)
    assert list(labels[mask]) == list(range(7))


def test_batches_lie_where_they_are_wanted():
    images, labels = numbered().placed(*jax.devices()[1:3]).batch(0, 0, 4)
    assert (images.devices(), labels.devices()) == ({jax.devices()[1]}, {jax.devices()[2]})


def test_moments_are_those_of_the_images():
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), np.uint8)
    records = Counted(images, np.zeros(9, int))
    source = StreamSource("few", 1, (4, 6, 3), records, records, resized=False, std=(2.0,))
    np.testing.assert_allclose(source.moments[0], images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(source.moments[1], [2, 2, 2])
    np.testing.assert_allclose(replace(source, std=None).moments[1], images.std((0, 1, 2)), rtol=1e-6)
    (batch, _, _) = next(source.test_batches(9))
    np.testing.assert_allclose(batch, (images - source.moments[0]) / 2, rtol=1e-5, atol=1e-5)


def test_shifting_is_cropping_from_a_padded_image():
    pixels = np.arange(1, 25, dtype=np.uint8).reshape(4, 6, 1)
    for shift in ((0, 0), (2, -1), (-2, 2)):
        expected = np.zeros_like(pixels)
        for y in range(4):
            for x in range(6):
                if 0 <= y + shift[0] < 4 and 0 <= x + shift[1] < 6:
                    expected[y, x] = pixels[y + shift[0], x + shift[1]]
        np.testing.assert_array_equal(shifted(pixels, np.array(shift)), expected)


def test_flips_and_shifts_come_in_all_kinds():
    images = np.arange(1, 25, dtype=np.uint8).reshape(1, 4, 6, 1)
    records = Counted(images, np.zeros(1, int))
    source = StreamSource("one", 1, (4, 6, 1), records, records, resized=False, flip=True, crop_padding=1)
    source = replace(source, mean=(0.0,), std=(1.0,))
    seen = {np.asarray(source.batch(0, i, 1)[0], np.uint8).tobytes() for i in range(300)}
    shifts = [np.array((y, x)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    moved = [shifted(images[0], shift) for shift in shifts]
    assert seen == {part.tobytes() for whole in moved for part in (whole, whole[:, ::-1])}


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (13, 90)])
def test_the_centre_is_the_middle_at_the_scale_of_the_shorter_side(size):
    """On a ramp from left to right, and one from top to bottom, the grey of a pixel is its place."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    ramps = np.asarray(centre(Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)), (28, 28)))
    step = min(size) / 32  # the shorter side becomes 28 * 256 / 224 = 32
    expected = (np.arange(28) - 13.5) * step
    np.testing.assert_allclose(ramps[10, :, 0], (width - 1) / 2 + expected, atol=1 + step)
    np.testing.assert_allclose(ramps[:, 10, 1], (height - 1) / 2 + expected, atol=1 + step)


def test_a_random_part_keeps_to_its_bounds_of_area_and_shape():
    x, y = np.meshgrid(np.arange(200), np.arange(150))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    rng = np.random.default_rng(0)
    shares, ratios = [], []
    for _ in range(200):
        ramps = np.asarray(random_part(image, (10, 10), rng), float)
        w, h = (ramps[5, -1, 0] - ramps[5, 0, 0]) * 10 / 9, (ramps[-1, 5, 1] - ramps[0, 5, 1]) * 10 / 9
        shares.append(w * h / (200 * 150))
        ratios.append(w / h)
    assert 0.06 < min(shares) < 0.15 < 0.85 < max(shares) < 1.1
    assert 0.7 < min(ratios) < 0.8 < 1.25 < max(ratios) < 1.45


def test_a_strip_out_of_which_no_part_fits_is_seen_by_its_centre():
    image = Image.fromarray(np.arange(0, 250, dtype=np.uint8).reshape(1, 250))
    part = random_part(image, (4, 4), np.random.default_rng(0))
    np.testing.assert_array_equal(part, centre(image, (4, 4)))


def grain_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")}


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_leaving_ends_the_threads_and_the_reading(error):
    source, others = numbered(), grain_threads()

    def leave():
        iterator = source.batches(0, 3)
        next(iterator)
        assert grain_threads() - others
        if error:
            raise error
        iterator.close()

    if error:
        with pytest.raises(error):
            leave()
    else:
        leave()
    for thread in grain_threads() - others:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert source.train.reads <= 3 * (1 + 2 + 1 + 2)  # given, waiting, refilled, in the hands of the threads


def test_images_of_equal_sides_only_where_nothing_is_resized():
    source = numbered()
    source.test.images = [np.zeros((4, 5, 1), np.uint8)] * 7
    with pytest.raises(
        ValueError, match=r"^numbered, test split, image 0: images must be of one size, 4 x 6; got 4 x 5$"
    ):
        next(source.test_batches(1))


def test_what_does_not_decode_is_named():
    source = photographs(mean=(0.0,), std=(1.0,))
    source.train.images[2] = source.train.images[2][:200]
    with pytest.raises(ValueError, match=r"^photographs, test split, image 2: .*[Tt]runcated[^\\n]*$"):
        list(source.test_batches(2))


def test_labels_out_of_range_and_empty_splits_are_refused():
    source = numbered()
    with pytest.raises(ValueError, match=r"^numbered, test split, image 3: labels must lie in 0..2; got 3$"):
        list(replace(source, num_classes=3).test_batches(7))
    with pytest.raises(ValueError, match=r"^numbered, test split: it is empty$"):
        replace(source, test=[])
    with pytest.raises(ValueError, match="batch_size must be at most 11, the training images of numbered; got 12"):
        next(source.batches(0, 12))
