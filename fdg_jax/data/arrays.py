"""Anyone's arrays as a source: an .npz, read without pickle, or a mapping in memory."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fdg_jax.data.source import ArraySource

KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def arrays(path_or_mapping: str | os.PathLike | Mapping[str, Any], name: str = "arrays") -> ArraySource:
    """The source of these arrays.

    Args:
        path_or_mapping: an .npz file (as `np.savez` writes it), or a mapping, with
            train_images, test_images: (N, H, W, C), or (N, H, W) of one channel; uint8, or floats, made float32.
            train_labels, test_labels: (N,) whole numbers from 0.
            num_classes: optional; by default one more than the largest label.
            mean, std: optional, one number or one a channel; see `ArraySource`.
            Other keys are not read.
        name: of the data set.

    Raises:
        ValueError: no such file, no .npz, keys missing, pickled objects, values that `ArraySource` refuses.
    """
    if isinstance(path_or_mapping, Mapping):
        return _source(path_or_mapping, name, name)
    path = Path(path_or_mapping).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {path}" if not path.exists() else f"{path} is no file")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError(f"{path} is not an .npz file: np.savez(file, train_images=.., ..) writes one")
            file.seek(0)
            with np.load(file, allow_pickle=False) as loaded:
                return _source(loaded, name, str(path))
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _source(given: Mapping[str, Any], name: str, where: str) -> ArraySource:
    missing = [key for key in KEYS if key not in given]
    if missing:
        raise ValueError(
            f"{where} must hold {', '.join(KEYS)}; it has no {' and no '.join(missing)} "
            f"(keys: {', '.join(map(str, given)) or 'none'})"
        )
    values = {key: _array(given, key, where) for key in (*KEYS, "num_classes", "mean", "std") if key in given}
    train_images, test_images = (_images(values, key, where) for key in ("train_images", "test_images"))
    channels = train_images.shape[-1] if train_images.ndim == 4 else 1
    return ArraySource(
        name=name,
        num_classes=_num_classes(values, where),
        train_images=train_images,
        train_labels=values["train_labels"],
        test_images=test_images,
        test_labels=values["test_labels"],
        mean=_per_channel(values, "mean", channels, where),
        std=_per_channel(values, "std", channels, where),
    )


def _array(given: Mapping[str, Any], key: str, where: str) -> np.ndarray:
    try:
        value = np.asarray(given[key])
    except Exception as error:  # a pickled array, a damaged file, a list of lists of different lengths
        if "Object arrays" not in str(error):
            raise ValueError(f"{where}: {key} cannot be read: {error}") from None
        value = np.empty(0, object)
    if value.dtype.hasobject:
        raise ValueError(
            f"{where}: {key} holds Python objects, whose pickle could run any code when it is loaded; "
            "save an array of numbers"
        )
    return value


def _images(values: Mapping[str, np.ndarray], key: str, where: str) -> np.ndarray:
    images = np.atleast_1d(values[key])
    if np.issubdtype(images.dtype, np.floating):
        with np.errstate(over="ignore"):
            images = images.astype(np.float32, copy=False)
        if not np.isfinite(images).all():
            raise ValueError(f"{where}: {key} must be finite in float32; some pixels are not")
    return images[..., None] if images.ndim == 3 else images


def _num_classes(values: Mapping[str, np.ndarray], where: str) -> int:
    if "num_classes" in values:
        number = values["num_classes"]
        if number.size != 1 or not np.issubdtype(number.dtype, np.integer) or number.item() < 1:
            raise ValueError(f"{where}: num_classes must be one whole number, at least 1; got {number.tolist()!r:.60}")
        return number.item()
    largest = {key: _largest(values[key]) for key in ("train_labels", "test_labels")}
    if largest["test_labels"] > largest["train_labels"]:
        raise ValueError(
            f"{where}: test_labels go up to {largest['test_labels']}, train_labels to {largest['train_labels']}: "
            "give num_classes where that is right"
        )
    if largest["train_labels"] > values["train_labels"].size:
        raise ValueError(
            f"{where}: train_labels go up to {largest['train_labels']}, of {values['train_labels'].size} images: "
            "classes are numbered from 0, and num_classes says how many there are where that is right"
        )
    return 1 + largest["train_labels"]


def _largest(labels: np.ndarray) -> int:
    """0 where the labels are no whole numbers, of which the source complains."""
    return int(labels.max()) if labels.size and np.issubdtype(labels.dtype, np.integer) else 0


def _per_channel(values: Mapping[str, np.ndarray], key: str, channels: int, where: str) -> tuple[float, ...] | None:
    if key not in values:
        return None
    numbers = np.atleast_1d(values[key])
    right = numbers.shape in ((1,), (channels,)) and np.issubdtype(numbers.dtype, np.number)
    if not right or not np.isfinite(numbers).all() or (key == "std" and not (numbers > 0).all()):
        positive = "positive, " if key == "std" else ""
        raise ValueError(
            f"{where}: {key} must be {positive}finite, one number or one for each of {channels} channels; "
            f"got {values[key].tolist()!r:.60}"
        )
    return tuple(float(number) for number in numbers)
