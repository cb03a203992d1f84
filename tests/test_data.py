import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from fdg_jax.data import ArraySource, digits
from fdg_jax.data.augment import crop_and_flip
from fdg_jax.data.shuffle import shuffled


@pytest.fixture(scope="module")
def source() -> ArraySource:
    return digits()


def test_the_digits_are_scikit_learns(source):
    original = load_digits()
    held_out = np.arange(1797) % 5 == 0
    np.testing.assert_array_equal(source.test_images[..., 0], original.images[held_out])
    np.testing.assert_array_equal(source.train_images[..., 0], original.images[~held_out])
    np.testing.assert_array_equal(source.test_labels, original.target[held_out])
    np.testing.assert_array_equal(source.train_labels, original.target[~held_out])
    assert (source.num_train, source.num_test, source.image_shape) == (1437, 360, (8, 8, 1))
    images, labels = source.batch(0, 0, 1437)
    assert (images.dtype, labels.dtype) == (jnp.float32, jnp.int32)
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert set(np.asarray(labels)) == set(range(source.num_classes))


# Orders


@settings(deadline=None, max_examples=12)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_an_order_gives_each_number_once_and_any_part_of_it_by_itself(size, seed, epoch):
    places = np.arange(size)
    whole = np.asarray(shuffled(seed, epoch, places, size))
    assert sorted(whole) == list(places)
    np.testing.assert_array_equal(shuffled(seed, epoch, places[size // 2 :], size), whole[size // 2 :])


def test_every_order_is_about_as_likely_as_any_other():
    """The 24 orders of four, over 2,400 epochs: chi squared with 23 degrees of freedom is beyond 60 once in 10^4."""
    for seed in range(3):
        orders = jax.vmap(lambda epoch, seed=seed: shuffled(seed, epoch, jnp.arange(4), 4))(jnp.arange(2400))
        _, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
        assert len(counts) == 24
        assert ((counts - 100) ** 2 / 100).sum() < 60


def test_a_large_order_has_no_pattern():
    size = 50_000
    one, other = (np.asarray(shuffled(0, epoch, np.arange(size), size), np.int64) for epoch in range(2))
    for a, b in ((one, np.arange(size)), (one, other), (one[1:], one[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / size**0.5  # four standard deviations


# Batches


def numbered(num=10, test=7, **kwargs):
    """A source whose images are their own numbers."""
    images = np.arange(num, dtype=np.float32).reshape(num, 1, 1, 1)
    labels = np.arange(num, dtype=np.int32)
    return ArraySource("numbered", num, images, labels, images[:test], labels[:test], **kwargs)


def test_a_batch_is_a_function_of_seed_and_number():
    one, other = numbered(), numbered()
    forwards = [one.batch(3, i, 4) for i in range(6)]
    backwards = [other.batch(3, i, 4) for i in reversed(range(6))][::-1]
    for (images, labels), (images_again, labels_again) in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(images, images_again)
        np.testing.assert_array_equal(labels, labels_again)
        np.testing.assert_array_equal(images.ravel(), labels)
    assert any((one.batch(4, i, 4)[1] != forwards[i][1]).any() for i in range(6))


def test_an_epoch_visits_every_image_at_most_once_and_another_in_another_order():
    source = numbered(8)
    epochs = [np.concatenate([source.batch(0, 2 * e + i, 4)[1] for i in range(2)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(8))
    assert (epochs[0] != epochs[1]).any()
    assert source.steps_per_epoch(3) == 2  # two images are left over


def test_the_test_set_is_seen_once_in_batches_of_one_shape():
    batches = list(numbered().test_batches(3))
    assert {images.shape[0] for images, _, _ in batches} == {3}
    seen = np.concatenate([labels[mask] for _, labels, mask in batches])
    assert list(seen) == list(range(7))
    ((_, labels, mask),) = numbered().test_batches(20)
    assert list(labels[mask]) == list(range(7))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at most 10, the training images of numbered; got 11"):
        numbered().steps_per_epoch(11)


def test_iteration_from_anywhere_gives_the_same_batches():
    source = numbered()
    for i, (images, labels) in enumerate(itertools.islice(source.batches(3, 4, start=2), 4), start=2):
        assert_trees_close((images, labels), source.batch(3, i, 4), 0)


def test_batches_are_made_where_they_are_wanted():
    first, last = jax.devices()[1:3]
    source = numbered().placed(first, last)
    images, labels = source.batch(0, 0, 4)
    assert (images.device, labels.device) == (first, last)
    assert_trees_close((images, labels), numbered().batch(0, 0, 4), 0)
    assert next(source.test_batches(4))[0].device == first


def test_a_limited_source_is_a_sample():
    source = numbered(100).limited(10)
    assert (source.num_train, source.num_test) == (10, 7)
    assert len(set(source.train_labels)) == 10
    assert source.train_labels.max() > 50  # not the first ten
    np.testing.assert_array_equal(source.train_labels, numbered(100).limited(10).train_labels)
    assert numbered(100).limited(1000).num_train == 100


# Pixels


def transcription(images, index, shifts, mirrored, padding, mean, std):
    """Crop, mirror, normalise, one image and one loop at a time."""
    batch = []
    for number, (down, right), mirror in zip(index, shifts, mirrored, strict=True):
        height, width, channels = images[number].shape
        padded = np.zeros((height + 2 * padding, width + 2 * padding, channels))
        padded[padding : padding + height, padding : padding + width] = images[number]
        crop = padded[padding + down : padding + down + height, padding + right : padding + right + width]
        batch.append((crop[:, ::-1] if mirror else crop) - mean)
    return np.stack(batch) / std


def test_augmentation_is_crop_mirror_and_normalise():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
    labels = np.arange(20) % 4
    source = ArraySource("random", 4, images, labels, images, labels, crop_padding=2, flip=True)
    pixels = images.reshape(-1, 3).astype(np.float64)
    mean, std = pixels.mean(0), pixels.std(0)
    for i in range(3):
        actual, classes = source.batch(7, i, 8)
        plain = ArraySource("random", 20, images, np.arange(20), images, labels)
        index = np.asarray(plain.batch(7, i, 8)[1])
        np.testing.assert_array_equal(classes, labels[index])
        key_shift, key_flip = jax.random.split(jax.random.fold_in(jax.random.key(7), i))
        shifts = np.asarray(jax.random.randint(key_shift, (2, 8, 1), -2, 3))[..., 0].T
        mirrored = np.asarray(jax.random.bernoulli(key_flip, shape=(8, 1)))[:, 0]
        assert_trees_close(actual, np.float32(transcription(images, index, shifts, mirrored, 2, mean, std)), 1e-5)
    tested = np.concatenate([x[mask] for x, _, mask in source.test_batches(8)])
    assert_trees_close(tested, np.float32((images - mean) / std), 1e-5)


def test_every_shift_and_both_sides_occur_equally_often():
    """A lone pixel in the middle of 7 x 7, shifted by up to 2: 25 places, mirrored where the image has two colours."""
    image = np.zeros((1, 7, 7, 1), np.float32)
    image[0, 3, 3], image[0, 3, 4] = 1, 2
    crops = np.asarray(crop_and_flip(jnp.asarray(image), jnp.zeros(5000, int), jax.random.key(0), 2, True))[..., 0]
    ones, twos = (np.argwhere(crops == value)[:, 1:] for value in (1, 2))
    mirrored = twos[:, 1] < ones[:, 1]
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / 5000**0.5
    _, counts = np.unique(np.column_stack([ones, mirrored]), axis=0, return_counts=True)
    assert len(counts) == 50
    assert ((counts - 100) ** 2 / 100).sum() < 100  # chi squared, 49 degrees of freedom
    still = crop_and_flip(jnp.asarray(image), jnp.zeros(3, int), jax.random.key(0), 0, False)
    np.testing.assert_array_equal(still, np.repeat(image, 3, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"test_images": np.zeros((0, 1, 1, 1), np.float32), "test_labels": np.zeros(0, int)},
            "test split: it is empty",
        ),
        ({"train_images": np.zeros((3, 2, 2), np.uint8)}, r"images must be \(N, H, W, C\) .*; got uint8\[3, 2, 2\]"),
        ({"train_labels": np.zeros(9, int)}, r"one whole number an image; got int64\[9\] for 10 images"),
        ({"train_labels": np.zeros(10)}, "one whole number an image; got float64"),
        ({"train_labels": np.arange(10) + 1}, r"labels must lie in 0..9; 1 do not, 10 among them"),
        ({"test_labels": np.arange(7) - 1}, "test split: labels must lie in 0..9; 1 do not, -1 among them"),
        ({"test_images": np.zeros((7, 2, 1, 1), np.float32)}, "training and test images must be of one shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    fields = {name: getattr(numbered(), name) for name in ("name", "num_classes")}
    arrays = {
        name: getattr(numbered(), name) for name in ("train_images", "train_labels", "test_images", "test_labels")
    }
    with pytest.raises(ValueError, match=message) as caught:
        ArraySource(**fields, **{**arrays, **changes})
    assert "\n" not in str(caught.value)
