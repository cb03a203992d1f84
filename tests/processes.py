"""Runs of the command line as processes that can be killed, forked where everything is imported already."""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fdg_jax import main as cli
from fdg_jax.checkpoint import load_weights

ROOT = Path(__file__).parents[1]
LONG = 60  # seconds after which something that must happen counts as not happening
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["fdg_jax.main"])


class Life:
    """One process of a run.

    Args:
        folder: for what it prints.
        arguments: of the command line.
        prepare: called in it before anything else, say to put a fault in.
        cache: folder of compiled programs, or None to compile.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        prepare: Callable[[], None] | None = None,
        cache: Path | None = None,
    ):
        number = next(self._numbers)
        self._files = [folder / f"{name}-{number}" for name in ("stdout", "stderr")]
        for path in self._files:
            path.touch()
        self._process = FORKSERVER.Process(
            target=_live, args=(self._files, list(arguments), prepare, cache), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        return self._files[0].read_text()

    def when(self, happens: Callable[[], Any]) -> None:
        """Returns as soon as something has happened."""
        deadline = time.monotonic() + LONG
        while not happens():
            assert self._process.is_alive(), f"it ended before: {self.end()}"
            assert time.monotonic() < deadline, f"it did not happen; {self.stdout}"
            time.sleep(3e-3)

    def when_it_says(self, text: str) -> None:
        self.when(lambda: text in self.stdout)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """As the machine does it that has run out of memory."""
        self._process.kill()
        assert self.end()[0] == -signal.SIGKILL

    def end(self, seconds: float = LONG) -> tuple[int, str, str]:
        """Status, stdout and stderr, once it has ended by itself."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"it did not end within {seconds} s; {self.stdout}")
        return self._process.exitcode, self.stdout, self._files[1].read_text()


def _live(files: list[Path], arguments: list[str], prepare: Callable[[], None] | None, cache: Path | None) -> None:
    for descriptor, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections' business
    os.chdir(ROOT)
    if prepare is not None:
        prepare()
    sys.argv = ["fdg_jax", *arguments]  # where ml_collections looks for overrides
    sys.exit(cli.main(cli.parse_flags(sys.argv)))


def assert_same_weights(workdir: Path, expected: Path) -> None:
    weights, others = (jax.tree.leaves(load_weights(folder / "params")) for folder in (workdir, expected))
    assert len(weights) == len(others) > 0
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_same_run(workdir: Path, expected: Path) -> None:
    """The bits of the final weights, and all metrics but those of the clock."""
    assert_same_weights(workdir, expected)
    assert _metrics(workdir) == _metrics(expected)


def _metrics(workdir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = {"time_s", "train/images_per_s"}
    return [{tag: value for tag, value in line.items() if tag not in clock} for line in lines]
