import numpy as np
import pytest
from sklearn.datasets import load_digits

from fdg_jax.data import ArraySource, digits


@pytest.fixture(scope="module")
def source() -> ArraySource:
    return digits()


def test_the_digits_are_scikit_learns(source):
    original = load_digits()
    held_out = np.arange(1797) % 5 == 0
    np.testing.assert_array_equal(source.test_images[..., 0], original.images[held_out] / 8 - 1)
    np.testing.assert_array_equal(source.train_images[..., 0], original.images[~held_out] / 8 - 1)
    np.testing.assert_array_equal(source.test_labels, original.target[held_out])
    np.testing.assert_array_equal(source.train_labels, original.target[~held_out])
    assert (len(source.train_images), len(source.test_images)) == (1437, 360)
    assert source.train_images.dtype == np.float32
    assert source.train_labels.dtype == np.int32
    assert set(source.test_labels) == set(range(source.num_classes))


def numbered(num=10):
    """A source whose images are their own numbers."""
    images = np.arange(num, dtype=np.float32).reshape(num, 1, 1, 1)
    labels = np.arange(num, dtype=np.int32)
    return ArraySource("numbered", num, images, labels, images[:7], labels[:7])


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
