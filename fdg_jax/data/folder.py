"""A folder of image files, train/<class>/*.jpg and test/<class>/*.jpg, as a source."""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from fdg_jax.data.decode import Progress, cached, decode
from fdg_jax.data.source import ArraySource

SPLITS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_VERSION = 1  # of what the cache holds for a key


def folder(
    path: str | Path,
    *,
    resize: int | None = None,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ArraySource:
    """The images under train/<class>/ and test/<class>/; label c is the c-th class by name. Named as the folder.

    They are decoded to (N, H, W, 3) uint8 once: the array is kept under `cache_dir`, found again by the images' names
    and bytes, and by `resize`. Other files, and names that begin with a dot, do not count.

    Args:
        path: the folder.
        resize, workers, progress: see `decode.decode`; images of different sizes need `resize`.
        cache_dir: by default $XDG_CACHE_HOME/fdg_jax, or ~/.cache/fdg_jax.

    Raises:
        ValueError: no such folder, no train/ or test/, no images in one, a class in one of them only, images that do
            not decode, or of different sizes; arguments out of range.
    """
    for name, value in (("resize", resize), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None; got {value}")
    root = Path(path).expanduser()
    try:
        classes, files = _listing(root)
    except OSError as error:
        raise ValueError(f"{root} cannot be read: {error}") from None
    key = _key(root, files, resize)
    file = (Path(cache_dir).expanduser() if cache_dir else _cache_home()) / f"images-{key}.npz"
    images = cached(file, lambda: decode(root, files, resize, workers, progress))
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[name.split("/")[1]] for name in files], np.int32)
    num_train = sum(name.startswith("train/") for name in files)
    return ArraySource(
        name=root.resolve().name,
        num_classes=len(classes),
        train_images=images[:num_train],
        train_labels=labels[:num_train],
        test_images=images[num_train:],
        test_labels=labels[num_train:],
    )


def _key(root: Path, files: list[str], resize: int | None) -> str:
    """A name for what decoding gives: a hash of the files' names and bytes. Reading is a third of decoding's time."""
    digest = hashlib.blake2b(repr((_VERSION, resize, files)).encode(), digest_size=16)
    for name in files:
        with suppress(OSError):  # a link that leads nowhere, of which `decode` complains
            digest.update(hashlib.blake2b((root / name).read_bytes()).digest())
    return digest.hexdigest()


def _listing(root: Path) -> tuple[list[str], list[str]]:
    """Classes, and files relative to the root in the order of split, class and name."""
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}" if not root.exists() else f"{root} is a file, not a folder")
    found = _folders(root)
    missing = [f"{split}/" for split in SPLITS if split not in found]
    if missing:
        raise ValueError(
            f"{root} must hold train/<class>/ and test/<class>/; it has no {' and no '.join(missing)} "
            f"(folders: {', '.join(found[:5]) or 'none'})"
        )
    train, test = (_folders(root / split) for split in SPLITS)
    for split, classes in (("train", train), ("test", test)):
        if not classes:
            raise ValueError(f"{root / split} has no folders; it must hold one of images for each class")
    for split, classes, others in (("train", train, test), ("test", test, train)):
        alone = [name for name in classes if name not in set(others)]
        if alone:
            other = "test" if split == "train" else "train"
            few = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
            raise ValueError(f"{root}: every class must be in both splits; in {split}/ but not in {other}/: {few}")
    files: list[str] = []
    for split in SPLITS:
        for name in train:
            images = _images(root / split / name)
            if not images:
                raise ValueError(f"{root / split / name} has no images ({', '.join(SUFFIXES)})")
            files += [f"{split}/{name}/{image}" for image in images]
    return train, files


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _images(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if not entry.is_dir() and not entry.name.startswith(".")]
    return sorted(name for name in names if name.lower().endswith(SUFFIXES))


def _cache_home() -> Path:
    """By the XDG base directory specification, which says to ignore relative paths."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "fdg_jax"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "fdg_jax"
