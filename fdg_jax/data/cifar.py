"""CIFAR-10 and CIFAR-100, prepared for TensorFlow Datasets (TFDS) without TensorFlow.

The archive is the one that TFDS's download manager fetches and verifies, the directory the one that TFDS itself would
have written: plain `tensorflow_datasets.data_source("cifar10")` reads it too.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("cifar10", "cifar100")


def prepare(builder: Any, config: Any) -> None:
    """Writes the directory that TFDS's own `builder` of CIFAR reads; an interruption leaves none.

    Args:
        builder: of "cifar10" or "cifar100", with its data_dir.
        config: TFDS's DownloadConfig.

    Raises:
        ValueError: the archive is not the registered one, or cannot be had.
    """
    import requests
    import tensorflow_datasets
    from tensorflow_datasets.core.download import download_manager

    class Cifar(type(builder), skip_registration=True):  # type: ignore[misc, call-arg]
        """The stock builder but for its use of TensorFlow: to unpack the archive and to encode the images."""

        name = builder.name
        url_infos = type(builder).url_infos  # the registered checksums, which TFDS looks for beside the class

        def _split_generators(self, dl_manager):
            files = self._cifar_info
            with tarfile.open(dl_manager.download(files.url)) as archive:

                def read(path: str) -> bytes:
                    return archive.extractfile(files.prefix + path).read()  # type: ignore[union-attr]

                for key, path in zip(files.label_keys, files.label_files, strict=True):
                    self.info.features[key].names = [name for name in read(path).decode().split("\n") if name]
                train, test = (b"".join(map(read, paths)) for paths in (files.train_files, files.test_files))
            return {"train": self._generate_examples("train_", train), "test": self._generate_examples("test_", test)}

        def _generate_examples(self, prefix, data):
            keys = self._cifar_info.label_keys
            for index, (labels, png) in enumerate(rows(data, len(keys))):
                yield index, {"id": f"{prefix}{index:05d}", "image": png} | dict(zip(keys, labels, strict=True))

    cifar = Cifar(data_dir=builder.data_dir_root, file_format="array_record")
    url = cifar._cifar_info.url
    downloads = Path(builder.data_dir_root) / "downloads"
    archive = downloads / "manual" / url.split("/")[-1]
    try:
        if not any(downloads.rglob(f"*{archive.name.removesuffix('.tar.gz')}*")):
            # TFDS would go on trying for minutes where there is no network
            requests.get(url, stream=True, timeout=20).close()
        cifar.download_and_prepare(download_config=config)
    except download_manager.NonMatchingChecksumError as error:
        raise ValueError(f"{first_line(error)} remove that file and start again") from None
    except (tensorflow_datasets.download.DownloadError, OSError) as error:
        raise ValueError(
            f"{builder.name} could not be had from {url} ({first_line(error)}); where there is no network, put the "
            f"archive at {archive}"
        ) from error


def rows(data: bytes, num_labels: int) -> Iterator[tuple[Sequence[int], bytes]]:
    """Labels and PNG of each record of CIFAR's binary format: labels, 32 x 32 red, green and blue, a byte each."""
    for row in np.frombuffer(data, np.uint8).reshape(-1, num_labels + 3 * 32 * 32):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(row[num_labels:].reshape(3, 32, 32).transpose(1, 2, 0))).save(file, "png")
        yield row[:num_labels].tolist(), file.getvalue()


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
