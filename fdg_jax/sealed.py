"""Folders that are there complete or not at all, and that are known to be as they were written.

A folder is filled under another name, its files are hashed and forced to the disk, and only then does it get its own
name. Reading begins with `verify`: a file that is missing, cut short, changed or added is found before anything
interprets it. Links are refused, and no file is opened because a name in another one says so.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MANIFEST = "manifest.json"
PARTIAL, REMOVED = ".partial", ".removed"  # endings of the names of folders that are being written and removed


class Damaged(ValueError):
    """A folder that is not as it was written; one line with its path and the reason."""


def seal(folder: Path, fill: Callable[[Path], None], num_bytes: int = 0) -> None:
    """Writes a folder; one of this name that is there already is replaced once the new one is complete.

    Args:
        folder: in a folder that exists.
        fill: writes the files into the folder that it is given.
        num_bytes: that there must be room for.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        free = shutil.disk_usage(partial).free
        if free < num_bytes + 2**20:
            raise OSError(f"No space left on device: {num_bytes / 2**20:.1f} MiB to write, {free / 2**20:.1f} MiB free")
        fill(partial)
        files = {str(path.relative_to(partial)): _measure(path, sync=True) for path in _files(partial)}
        (partial / MANIFEST).write_text(json.dumps({"files": files}))
        _measure(partial / MANIFEST, sync=True)
        for inside in (*filter(Path.is_dir, partial.rglob("*")), partial):
            _sync_names(inside)
        with _out_of_the_way(folder):
            partial.rename(folder)
        _sync_names(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Writes a file; one that is there already is replaced once the new one is complete.

    Raises:
        OSError: it cannot be written; the one before is as it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def remove(folder: Path) -> None:
    """Takes a folder away, whose name is free from the first moment on, however long that takes."""
    with _out_of_the_way(folder):
        pass


@contextmanager
def _out_of_the_way(folder: Path) -> Iterator[None]:
    """Frees the name of a folder, if there is one, and removes it afterwards; it comes back if that is cut off."""
    removed = folder.with_name(folder.name + REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    try:
        if folder.exists():
            folder.rename(removed)
        yield
    except BaseException:
        if removed.exists() and not folder.exists():
            removed.rename(folder)
        raise
    shutil.rmtree(removed, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Removes what is left in a folder of sealing and removing that were cut off."""
    for removed in parent.glob(f"*{REMOVED}"):
        folder = removed.with_name(removed.name.removesuffix(REMOVED))
        if not folder.exists() and folder.with_name(folder.name + PARTIAL).exists():
            removed.rename(folder)  # it was to be replaced, and its successor did not come
    for ending in (PARTIAL, REMOVED):
        for path in parent.glob(f"*{ending}"):
            shutil.rmtree(path, ignore_errors=True)


def free_name(path: Path, taken: Callable[[Path], bool] = Path.exists) -> Path:
    """The path, or the next like it that is not taken: runs/digits, runs/digits-2, .."""
    candidate, number = path, 2
    while taken(candidate):
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def verify(folder: Path) -> None:
    """Checks every file of a sealed folder.

    Raises:
        Damaged: it is not there, not sealed, or not as it was written.
        OSError: it cannot be read.
    """
    if not folder.is_dir():
        raise Damaged(f"there is no folder {folder}")
    try:
        files = {str(path.relative_to(folder)): path for path in _files(folder)}
        if MANIFEST not in files:
            raise Damaged(f"{folder} is damaged, or none of ours: it has no {MANIFEST}")
        listed = _manifest(files.pop(MANIFEST))
        for name in sorted(files.keys() ^ listed.keys()):
            raise Damaged(f"{folder} is damaged: {name} {'is missing' if name in listed else 'does not belong to it'}")
        for name, path in files.items():
            size, digest = _measure(path)
            if [size, digest] != listed[name]:
                raise Damaged(
                    f"{folder} is damaged: {name} {'is cut short' if size < listed[name][0] else 'has changed'}"
                )
    except FileNotFoundError as error:
        raise Damaged(f"{folder} is damaged, or was removed: {error.filename} is missing") from error


def _manifest(path: Path) -> dict[str, list]:
    """Size and SHA-256 of every file, by name."""
    try:
        listed = json.loads(path.read_text())["files"]
        if not all(type(size) is int and type(digest) is str for size, digest in listed.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{path.parent} is damaged: {MANIFEST} cannot be read") from None
    return listed


def _files(folder: Path) -> list[Path]:
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise Damaged(f"{folder} is refused: {path.relative_to(folder)} is a link, or no file")
        if path.is_file():
            files.append(path)
    return files


def _sync_names(folder: Path) -> None:
    """Forces to the disk what files a folder has, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _measure(path: Path, sync: bool = False) -> list:
    """Size in bytes and SHA-256 of a file; forced to the disk if `sync`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size, digest]
