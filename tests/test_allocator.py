"""Freed memory stays with the process where that was asked for, and goes back to the system where it was not."""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from fdg_jax import allocator, main
from fdg_jax.console import voices

needs_glibc = pytest.mark.skipif(not allocator._has_glibc(), reason="mallopt is glibc's")
# Blocks of 64 MiB, written, freed and taken again, on the main thread and on another: faults of the last few rounds.
SCRIPT = """
import ctypes, resource, sys, threading
from fdg_jax.allocator import keep_memory
print(keep_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def rounds(count, size=2**26):
    for _ in range(count):
        block = libc.malloc(ctypes.c_size_t(size))
        ctypes.memset(block, 1, size)
        libc.free(block)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    rounds(2)
    before = faults()
    rounds(4)
    print(faults() - before)
work()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
PAGES = 4 * 2**26 // os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0  # that four rounds write


def run(switch: str) -> tuple[str, list[int]]:
    """What `keep_memory` returned, and the page faults of four rounds on two threads."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment[allocator.SWITCH] = switch
    script = [sys.executable, "-c", SCRIPT]
    kept, *counts = subprocess.run(script, env=environment, text=True, capture_output=True, check=True).stdout.split()
    return kept, [int(count) for count in counts]


@needs_glibc
def test_kept_blocks_are_not_faulted_in_again():
    kept, counts = run("1")
    assert kept == "True"
    assert max(counts) < PAGES / 1000


@needs_glibc
def test_the_switch_leaves_glibc_as_it_is():
    kept, counts = run("0")
    assert kept == "False"
    assert min(counts) > PAGES / 1000  # of huge pages a fault may bring 512 small ones


def test_other_libcs_are_left_alone(monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("it was called"))
    monkeypatch.setattr(allocator.os, "confstr", unknown)
    assert not allocator.keep_memory()
    monkeypatch.delattr(allocator.os, "confstr")
    assert not allocator.keep_memory()


def test_a_run_asks_for_it_before_it_starts_threads(monkeypatch):
    order = []
    monkeypatch.setattr(main, "keep_memory", lambda: order.append("kept"))
    monkeypatch.setattr(main, "_ending_at_once", lambda console: order.append("threads") or nullcontext())
    monkeypatch.setattr(main, "_voices", lambda: voices("text", quiet=False))
    monkeypatch.setattr(main, "_main", lambda argv, console, lines: 0)
    assert main.main([]) == 0
    assert order == ["kept", "threads"]


@pytest.mark.parametrize(("platforms", "kept"), [("", False), ("cpu", True)])
def test_with_an_accelerator_it_is_left_alone(tmp_path, monkeypatch, platforms, kept):
    """JAX finds accelerators as modules in the namespace package `jax_plugins`."""
    (tmp_path / "jax_plugins" / "some_gpu").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "jax_plugins", SimpleNamespace(__path__=[str(tmp_path / "jax_plugins")]))
    (tmp_path / "jax_plugins" / "some_gpu" / "__init__.py").touch()
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert allocator._has_accelerator() == (not kept)
