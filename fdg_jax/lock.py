"""One run at a time in a folder."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Locked(ValueError):
    """Another run lives in the folder; one line that says which."""


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Holds `folder`/lock, which names this process and host; gives what a dead run left in it, in words, or None.

    The kernel lets go of the lock when its process ends, however it ends, so that a lock which can be had is stale
    whatever the file says. Where a file system knows no locks, the file's word counts: a process that is gone from this
    host holds nothing, and one on another host is believed to live.

    Raises:
        Locked: another process holds it.
        OSError: the file cannot be written.
    """
    path = folder / "lock"
    descriptor = _acquire(path)
    try:
        before = _owner(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield _describe(before) if before else None
    finally:
        with suppress(OSError):  # the folder may be gone, or another run's by now
            if _is_at(descriptor, path):
                path.unlink()  # before it is let go: whoever waits for it must find that it is gone
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a run lives in the folder at this moment."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:  # another user's
        return True
    try:
        return not _kernel_lock(descriptor) and _lives(_owner(descriptor))
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _kernel_lock(descriptor) and _lives(_owner(descriptor)):
                raise BlockingIOError
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise Locked(
                f"{path.parent} is in use by {_describe(owner) if owner else 'another run'}: "
                "wait for it, stop it, or choose another --workdir"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it while we opened it


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _kernel_lock(descriptor: int) -> bool:
    """Takes the kernel's lock; False where the file system has none. BlockingIOError: another process has it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: the lock then rests on what the file says
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            return False
        raise
    return True


def _owner(descriptor: int) -> dict | None:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        owner = {"pid": int(owner["pid"]), "host": str(owner["host"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return owner if 0 < owner["pid"] < 2**31 else None  # a number beyond means none or several to the kernel


def _lives(owner: dict | None) -> bool:
    if owner is None or owner["host"] != socket.gethostname():
        return owner is not None
    if owner["pid"] == os.getpid():  # of a container before this one, whose processes are numbered alike
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # it lives and is another user's
        pass
    return True


def _describe(owner: dict) -> str:
    return f"process {owner['pid']} on {owner['host']}"
