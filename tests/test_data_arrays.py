import re

import numpy as np
import pytest

from fdg_jax.data.arrays import arrays


def given(**changes):
    """Five training and three test images of 4 x 6 pixels in two channels; a change of None leaves a key out."""
    rng = np.random.default_rng(0)
    values = {
        "train_images": rng.integers(0, 256, (5, 4, 6, 2), dtype=np.uint8),
        "train_labels": np.array([0, 2, 1, 3, 0]),
        "test_images": rng.integers(0, 256, (3, 4, 6, 2), dtype=np.uint8),
        "test_labels": np.array([1, 3, 0]),
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def saved(path, values):
    np.savez(path, **values)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_file_and_a_mapping_give_the_arrays_as_they_are(tmp_path, dtype):
    values = given()
    values |= {key: values[key].astype(dtype) for key in ("train_images", "test_images")}
    for source in (arrays(values, "mine"), arrays(saved(tmp_path / "a.npz", values), "mine")):
        assert (source.name, source.num_classes) == ("mine", 4)  # one more than the largest label
        for key, value in values.items():
            np.testing.assert_array_equal(getattr(source, key), value)
            assert getattr(source, key).dtype == value.dtype
        assert (source.mean, source.std) == (None, None)


def test_images_without_channels_get_one_and_floats_become_float32():
    images = {"train_images": np.arange(40.0).reshape(5, 4, 2), "test_images": np.arange(24.0).reshape(3, 4, 2)}
    source = arrays(given(**images))
    assert source.image_shape == (4, 2, 1)
    assert source.train_images.dtype == source.test_images.dtype == np.float32
    np.testing.assert_array_equal(source.train_images[..., 0], images["train_images"])


def test_classes_and_normalisation_can_be_given(tmp_path):
    values = given(num_classes=7, mean=[1.0, 2.0], std=4)
    for source in (arrays(values), arrays(saved(tmp_path / "a.npz", values))):
        assert (source.num_classes, source.mean, source.std) == (7, (1.0, 2.0), (4.0,))
        images, _, _ = next(source.test_batches(3))
        np.testing.assert_allclose(images, (values["test_images"] - np.array([1.0, 2.0])) / 4, rtol=1e-6)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("the pickle was run",)


def test_pickles_are_refused_unopened(tmp_path):
    path = saved(tmp_path / "a.npz", given(train_images=np.array([Trap()], object)))
    with pytest.raises(ValueError, match=r"a\.npz: train_images holds Python objects, whose pickle could run any code"):
        arrays(path)
    with pytest.raises(ValueError, match="arrays: test_labels holds Python objects"):
        arrays(given(test_labels=np.array([1, None, 2], object)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_labels": None, "test_images": None},
            "it has no train_labels and no test_images (keys: train_images, te",
        ),
        ({"train_images": [[1.0], [1.0, 2.0]]}, "train_images cannot be read: "),
        ({"train_images": np.full((5, 4, 6), np.nan)}, "train_images must be finite in float32"),
        ({"test_images": np.full((3, 4, 6), 1e300)}, "test_images must be finite in float32"),
        (
            {"train_images": np.array(1.0)},
            "train split: images must be (N, H, W, C) of uint8 or float32; got float32[1]",
        ),
        ({"train_images": np.zeros((5, 4, 6, 2), int)}, "images must be (N, H, W, C) of uint8 or float32; got int64"),
        ({"test_images": np.zeros((0, 4, 6, 2)), "test_labels": np.zeros(0, int)}, "test split: it is empty"),
        ({"test_labels": np.array([0, 1])}, "labels must be one whole number an image; got int64[2] for 3 images"),
        ({"test_labels": np.array(["cat", "dog", "cat"])}, "labels must be one whole number an image"),
        ({"train_labels": np.array([0, -1, 0, 3, 0])}, "labels must lie in 0..3; 1 do not, -1 among them"),
        ({"num_classes": 3}, "train split: labels must lie in 0..2; 1 do not, 3 among them"),
        ({"test_labels": np.array([1, 4, 0])}, "test_labels go up to 4, train_labels to 3: give num_classes where"),
        (
            {"train_labels": np.array([0, 9, 1, 2, 0])},
            "train_labels go up to 9, of 5 images: classes are numbered from 0",
        ),
        ({"train_labels": np.full(5, 2**63, np.uint64)}, "train_labels go up to 9223372036854775808, of 5 images"),
        ({"num_classes": 0}, "num_classes must be one whole number, at least 1; got 0"),
        ({"num_classes": 4.5}, "num_classes must be one whole number, at least 1; got 4.5"),
        ({"mean": [1, 2, 3]}, "mean must be finite, one number or one for each of 2 channels; got [1, 2, 3]"),
        ({"mean": "bright"}, "mean must be finite, one number"),
        ({"std": [1.0, 0.0]}, "std must be positive, finite, one number or one for each of 2 channels; got [1.0, 0.0]"),
        ({"std": np.inf}, "std must be positive, finite"),
    ],
)
def test_wrong_values_get_one_line(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        arrays(given(**changes))
    assert "\n" not in str(error.value)


def test_wrong_files_get_one_line(tmp_path):
    values = given()
    whole = saved(tmp_path / "whole.npz", values).read_bytes()
    at = whole.index(values["test_images"].tobytes())
    for name, content, message in (
        ("text.npz", b"train_images", "is not an .npz file"),
        ("empty.npz", b"", "is not an .npz file"),
        ("half.npz", whole[: len(whole) // 2], "is not an .npz file"),
        ("flipped.npz", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], "test_images cannot be read: "),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
            arrays(path)
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(ValueError, match=r"one\.npy is not an \.npz file"):
        arrays(tmp_path / "one.npy")
    with pytest.raises(ValueError, match=r"there is no file .*missing\.npz"):
        arrays(str(tmp_path / "missing.npz"))
    with pytest.raises(ValueError, match="is no file"):
        arrays(tmp_path)
