"""Large blocks of memory stay with the process: glibc, as it comes, gives them back and gets them anew in every step.

XLA:CPU asks malloc for the temporaries and the results of every call. To glibc a block of many megabytes is a mapping
of its own, undone when the block is freed; the next step then pays a page fault for each of its 4 KiB. The three
options below make of the heap one that only grows: to the most that the run needs at a time, and some fragments. Each
is needed for the effect. What a run used at its peak is not free for other processes until it ends.
"""

import ctypes
import os
import pkgutil

SWITCH = "FDG_JAX_KEEP_MEMORY"  # "0" in the environment turns it off
# Names and numbers of glibc's malloc.h.
OPTIONS = {
    "M_MMAP_MAX": (-4, 0),  # no block is a mapping of its own,
    "M_TRIM_THRESHOLD": (-1, -1),  # the end of the heap is never given back,
    "M_ARENA_MAX": (-8, 1),  # and XLA's threads share it, since heaps of threads are small and given back
}


def keep_memory() -> bool:
    """Keeps freed memory for the next step, on Linux with glibc; elsewhere does nothing. Whether it did.

    Nor does it do anything where JAX has a plugin for an accelerator that it may use: the host's memory then holds
    batches on their way, read by many threads. Call it before there are threads: one that has allocated before leaves a
    heap of its own, which others then share.
    Children made by `fork` inherit it, programs that they become do not.
    """
    if os.environ.get(SWITCH) == "0" or not _has_glibc() or _has_accelerator():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(number, value) == 1 for number, value in OPTIONS.values()]
    return all(done)


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # no POSIX, another libc
        return False


def _has_accelerator() -> bool:
    """Whether a plugin of JAX's is installed, and the environment does not ask for the CPU."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    try:
        import jax_plugins  # type: ignore[import-not-found]
    except ImportError:
        return False
    return any(True for _ in pkgutil.iter_modules(jax_plugins.__path__))
