"""Any image classification set of TensorFlow Datasets (TFDS) by its name, read without TensorFlow.

TFDS reads what was prepared as array_record without TensorFlow, but its own builders prepare only with it. CIFAR-10 and
CIFAR-100 are therefore prepared by `cifar`.
"""

import importlib.util
import os
from typing import Any

import numpy as np

from fdg_jax.data import cifar
from fdg_jax.data.cifar import first_line
from fdg_jax.data.source import ArraySource
from fdg_jax.data.stream import StreamSource, exact_pixels
from fdg_jax.names import check_name

TEST_SPLITS = ("test", "validation")  # the first that has labels: those of imagenet2012's test images are hidden


def tfds(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    resident_bytes: int = 2 * 2**30,
) -> ArraySource | StreamSource:
    """A set of TFDS: resident where its images are of one size and fit, else streamed.

    Args:
        name: as TFDS has it, such as "cifar10" or "imagenet_resized/32x32".
        data_dir: where TFDS keeps prepared sets; TFDS's own default, ~/tensorflow_datasets, where it is None. CIFAR is
            prepared there when it is not there yet, other sets where TensorFlow is installed.
        image_size: side in pixels of what is cut out of images of many sizes, 224 where it is None; given one, images
            of one size are streamed and cut, too.
        train_split, test_split: in TFDS's notation, such as "train[:90%]"; where `test_split` is None, "test", or
            "validation" where the test labels are hidden.
        resident_bytes: of decoded pixels, up to which a set is resident.

    Raises:
        ValueError: no such set, or none of images with one label each, or it cannot be had; says what to do.
    """
    builder = _prepared(name, os.path.expanduser(data_dir) if data_dir else None)
    test_split = test_split or _labelled_split(builder)
    train, test = (_records(builder, split) for split in (train_split, test_split))
    height, width, channels = builder.info.features["image"].shape
    num_classes = builder.info.features["label"].num_classes
    if height is None or width is None or image_size is not None:
        side = image_size or 224
        return StreamSource(name, num_classes, (side, side, channels), train, test, flip=True)
    shape = (height, width, channels)
    if (len(train) + len(test)) * height * width * channels > resident_bytes:
        return StreamSource(name, num_classes, shape, train, test, resized=False)
    return ArraySource(
        name, num_classes, *_arrays(name, train_split, train, shape), *_arrays(name, test_split, test, shape)
    )


def tfds_shape(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[tuple[int, int, int], int]:
    """(H, W, C) of the images that `tfds` would give, and the number of classes; downloads and prepares nothing.

    Raises:
        ValueError: no such set, or none of images with one label each.
    """
    features = _builder(name, os.path.expanduser(data_dir) if data_dir else None).info.features
    _check_features(name, features)
    height, width, channels = features["image"].shape
    return (height or 224, width or 224, channels), features["label"].num_classes


def _prepared(name: str, data_dir: str | None) -> Any:
    """TFDS's builder of a set that lies prepared, after preparing it where that can be done here."""
    import tensorflow_datasets

    if data_dir and os.path.isfile(data_dir):
        raise ValueError(f"data_dir must be a folder, in which TFDS keeps its sets; {data_dir} is a file")
    builder = _builder(name, data_dir)
    _check_features(name, builder.info.features)
    if builder.data_path.exists():  # TFDS prepares under another name, and renames what is complete
        return builder
    config = tensorflow_datasets.download.DownloadConfig(
        try_download_gcs=False, force_checksums_validation=builder.name in cifar.NAMES
    )
    if builder.name in cifar.NAMES:
        cifar.prepare(builder, config)
    elif importlib.util.find_spec("tensorflow"):
        try:
            builder.download_and_prepare(file_format="array_record", download_config=config)
        except (AssertionError, OSError, ValueError, RuntimeError) as error:  # what TFDS raises, in many lines
            raise ValueError(f"TFDS could not prepare {name!r}: {first_line(error)}; {_catalogue(name)}") from error
    else:
        raise ValueError(_needs_tensorflow(name, builder.data_dir_root))
    return _builder(name, data_dir)


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets

    base = name.split("/")[0].split(":")[0]
    try:
        return tensorflow_datasets.builder(name, data_dir=data_dir)
    except tensorflow_datasets.core.registered.DatasetNotFoundError:
        check_name("TFDS data set", base, tensorflow_datasets.list_builders(with_community_datasets=False))
        raise
    except (ImportError, OSError) as error:  # builders of sound or text import more than TFDS brings
        raise ValueError(
            f"TFDS cannot describe {name!r} on this machine: {first_line(error.__cause__ or error)}"
        ) from None
    except (AssertionError, ValueError) as error:  # a name that does not parse, an unknown version or variant
        if "/" in name and base in tensorflow_datasets.list_builders(with_community_datasets=False):
            variants = tensorflow_datasets.builder_cls(base).builder_configs
            if not variants:
                raise ValueError(f"{base!r} of TFDS has no variants; got {name!r}") from None
            check_name(f"variant of {base!r}", name.split("/")[1].split(":")[0], variants)
        raise ValueError(f"TFDS has no {name!r}: {first_line(error)}") from None


def _check_features(name: str, features: Any) -> None:
    """Refuses what is not one image of bytes and one label each."""
    from tensorflow_datasets import features as kinds

    wanted = {"image": kinds.Image, "label": kinds.ClassLabel}
    if not all(key in features and isinstance(features[key], kind) for key, kind in wanted.items()):
        raise ValueError(
            f"{name!r} is not a set for image classification: it must have the features image and label; "
            f"it has {', '.join(features)}"
        )
    image = features["image"]
    if image.np_dtype != np.uint8 or image.shape[-1] not in (1, 3):
        raise ValueError(
            f"images of {name!r} must be of 1 or 3 channels of uint8; they are {np.dtype(image.np_dtype)}"
            f"{list(image.shape)}"
        )


def _labelled_split(builder: Any) -> str:
    for split in TEST_SPLITS:
        if split in builder.info.splits and _records(builder, split)[0]["label"] >= 0:
            return split
    raise ValueError(
        f"{builder.name!r} has no test split with labels, only {', '.join(builder.info.splits)}; "
        "name parts of one, such as train_split='train[:90%]', test_split='train[90%:]'"
    )


def _records(builder: Any, split: str) -> Any:
    """Random access to {"image": encoded bytes, "label": whole number, ..}; safe to use from any thread."""
    from tensorflow_datasets import decode

    try:
        return builder.as_data_source(split, decoders={"image": decode.SkipDecoding()})
    except NotImplementedError:
        raise ValueError(
            f"{builder.data_path} holds {builder.info.file_format.value}, which cannot be read at random: name another "
            "data_dir, or remove it and prepare the set again with --file_format=array_record"
        ) from None
    except ValueError as error:
        raise ValueError(f"{builder.name!r} has no split {split!r}: {first_line(error)}") from None


def _arrays(name: str, split: str, records: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """All images (N, H, W, C) uint8 and labels (N,) int32."""
    images, labels = np.empty((len(records), *shape), np.uint8), np.empty(len(records), np.int32)
    for start in range(0, len(records), 1000):
        numbers = range(start, min(start + 1000, len(records)))
        for number, record in zip(numbers, records.__getitems__(numbers), strict=True):
            try:
                images[number] = exact_pixels(record["image"], shape)
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{name}, {split} split, image {number}: {error}") from None
            labels[number] = record["label"]
    return images, labels


def _needs_tensorflow(name: str, data_dir: Any) -> str:
    where = f" --data_dir={data_dir}" if data_dir else ""
    return (
        f"{name!r} is not prepared{f' in {data_dir}' if data_dir else ''}, and TensorFlow, which prepares it, is not "
        f"installed: pip install tensorflow && tfds build {name} --file_format=array_record{where} "
        f"(once, on any machine); {_catalogue(name)}"
    )


def _catalogue(name: str) -> str:
    return f"see https://www.tensorflow.org/datasets/catalog/{name.split('/')[0].split(':')[0]}"
