"""Runs on disk: checkpoints written by Orbax beside the training, complete or not there at all, and trained weights.

Every folder is sealed (see `sealed`), and what is damaged never reaches Orbax. Nothing is unpickled.
"""

import json
import logging
import math
import operator
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as orbax

from fdg_jax.agreement import fit, named_leaves
from fdg_jax.sealed import Damaged, free_name, remove, seal, sweep, verify
from fdg_jax.snapshot import Snapshot

PyTree = Any
RECORD, ARRAYS, WEIGHTS = "record.json", "arrays", "weights"
PACKED = "packed"  # the one array of a checkpoint


class Weights(NamedTuple):
    """A trained network: what `Pipeline.params` and `Pipeline.module_state` give, one tree a layer."""

    params: list[PyTree]
    module_state: list[PyTree]


def save_weights(folder: str | os.PathLike, weights: Weights) -> None:
    """Writes the weights into a new folder.

    Raises:
        ValueError: the folder exists; nothing is overwritten.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} already exists, and nothing is overwritten")
    host = jax.tree.map(np.asarray, weights._asdict())
    seal(folder, lambda inside: _save_tree(inside / WEIGHTS, host))


def load_weights(folder: str | os.PathLike, like: Weights | None = None) -> Weights:
    """Reads what `save_weights` wrote.

    Args:
        folder: the one given to `save_weights`.
        like: weights of the same network, of which only structure and shapes matter; without it the keys of dicts come
            back as strings.

    Raises:
        Damaged: it is not there, or not as it was written.
        Mismatch: it holds another network's weights.
        OSError: it cannot be read.
    """
    folder = Path(folder)
    verify(folder)
    try:
        with _quiet():
            found = orbax.load((folder / WEIGHTS).absolute())
        loaded = Weights(found["params"], found["module_state"])
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise Damaged(f"{folder} cannot be read: {_first_line(error)}") from error
    if like is None:
        return loaded
    by_name = ([dict(named_leaves(tree)) for tree in trees] for trees in loaded)
    return Weights(*(fit(*of) for of in zip(("params", "state"), by_name, like, strict=True)))


def read_checkpoint(folder: str | os.PathLike) -> tuple[Snapshot, dict[str, Any]]:
    """A snapshot, its arrays on the host, and what was noted with it.

    Raises:
        Damaged: the folder is not as it was written.
        OSError: it cannot be read.
    """
    folder = Path(folder)
    verify(folder)
    try:
        record = json.loads((folder / RECORD).read_text())
        shapes = [np.empty(a["shape"], np.dtype(a["dtype"])) for a in record["snapshot"]["arrays"]]
        with _quiet():
            found = orbax.load((folder / ARRAYS).absolute(), {PACKED: _room(shapes)})
        return Snapshot(_views(found[PACKED], shapes), record["snapshot"]), record["notes"]
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise Damaged(f"{folder} cannot be read: {_first_line(error)}") from error


@dataclass(frozen=True)
class Outcome:
    """How the writing of a checkpoint ended: `error` is None where it is complete."""

    step: int
    folder: Path
    error: str | None


class Checkpoints:
    """The checkpoints of one run, written in the background, the newest `keep_last` and the best kept.

    Args:
        folder: made with the first checkpoint.
        keep_last: how many of the newest to keep.
        keep_best: and how many of those with the lowest "test_error" in their notes.

    Raises:
        ValueError: keep_last is below 1, or keep_best below 0.
    """

    def __init__(self, folder: str | os.PathLike, keep_last: int = 2, keep_best: int = 0):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last must be at least 1, keep_best at least 0; got {keep_last} and {keep_best}")
        self.folder, self._keep_last, self._keep_best = Path(folder), keep_last, keep_best
        self._thread: threading.Thread | None = None
        self._made = False
        self._outcomes: list[Outcome] = []

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step_{step:09d}"

    def complete(self) -> list[Path]:
        """Folders of the complete checkpoints, oldest first."""
        paths = [path for path in self.folder.glob("step_*") if re.fullmatch(r"step_\d{9,}", path.name)]
        return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))

    def sweep(self) -> None:
        """Removes what a killed run left half written or half removed. Only its owner may call this."""
        sweep(self.folder)

    def set_aside(self, path: Path) -> None:
        """Renames a damaged checkpoint, so that it counts no more; nothing is deleted."""
        path.rename(free_name(path.with_name(f"{path.name}.damaged")))

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self,
        step: int,
        snapshot: Snapshot,
        notes: Mapping[str, Any],
        unfit: Callable[[Snapshot], bool] = lambda snapshot: False,
        in_background: bool = True,
    ) -> None:
        """Begins to write a checkpoint; `outcomes` tells how it went. Waits for the one before.

        Before the program ends, `wait` for the last: what is half written then is not a checkpoint.

        Args:
            step: batches fed so far.
            snapshot: from `snapshot.take`.
            notes: JSON, given back by `read_checkpoint`.
            unfit: looks at the snapshot when it is on the host; one that it refuses is silently not written.
            in_background: whether training goes on meanwhile and comes first, where the cores are too few for both.

        Raises:
            ValueError, TypeError: step is no whole number from 0 on, or notes are not JSON.
        """
        if operator.index(step) < 0:
            raise ValueError(f"step must be at least 0; got {step}")
        notes = json.loads(json.dumps(dict(notes)))  # as they come back, and as they are now
        self.wait()
        # A daemon, since Python waits for others before it exits: a second Ctrl-C must not wait for a disk.
        args = step, [snapshot], notes, unfit, in_background
        self._thread = threading.Thread(target=self._save, args=args, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def outcomes(self) -> list[Outcome]:
        """Of the checkpoints that ended since the last call."""
        ended, self._outcomes = self._outcomes, []
        return ended

    def _save(self, step: int, snapshots: list[Snapshot], notes: dict, unfit: Callable, in_background: bool) -> None:
        if in_background:
            _step_back()
        snapshot = snapshots.pop()  # the only reference: the copies on the devices go as soon as they are on the host
        folder = self.path(step)
        error = None
        try:
            packed, arrays = _packed(jax.device_get(snapshot.arrays))
            if unfit(snapshot := Snapshot(arrays, snapshot.record)):
                return

            def write(inside: Path) -> None:
                _save_tree(inside / ARRAYS, {PACKED: packed})
                (inside / RECORD).write_text(json.dumps({"snapshot": snapshot.record, "notes": notes}))

            self.folder.mkdir(parents=not self._made, exist_ok=True)  # a tree that has vanished is not made again
            self._made = True
            seal(folder, write, packed.nbytes)
            with suppress(OSError):  # what cannot be removed now is removed after the next
                self._retire()
        except Exception as failure:  # whatever it is, training need not end for it
            error = _first_line(failure)
        self._outcomes.append(Outcome(step, folder, error))

    def _retire(self) -> None:
        paths = self.complete()
        kept = set(paths[-self._keep_last :])
        if self._keep_best:
            errors = [(error, path) for path in paths if (error := _test_error(path)) is not None]
            kept.update(path for _, path in sorted(errors)[: self._keep_best])
        for path in paths:
            if path not in kept:
                remove(path)


def _step_back() -> None:
    """Leaves training most of the cores: without this, ticks during a save took 1.5 times as long."""
    if sys.platform == "linux":  # elsewhere a priority is a whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _test_error(folder: Path) -> float | None:
    try:
        error = float(json.loads((folder / RECORD).read_text())["notes"]["test_error"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if math.isnan(error) else error


def _packed(arrays: Sequence[Any]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Arrays copied into one of bytes, and as views of it: Orbax takes most of a millisecond of a core for each."""
    packed = _room(arrays)
    views = _views(packed, arrays)
    for view, array in zip(views, arrays, strict=True):
        view[...] = array
    return packed, views


def _room(arrays: Sequence[Any]) -> np.ndarray:
    return np.zeros(sum(_padded(array) for array in arrays), np.uint8)


def _views(packed: np.ndarray, arrays: Sequence[Any]) -> list[np.ndarray]:
    """The parts of an array of bytes, with the shapes and dtypes of the given arrays."""
    begins = accumulate(map(_padded, arrays), initial=0)
    return [
        packed[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        for begin, array in zip(begins, arrays, strict=False)
    ]


def _padded(array: Any) -> int:
    """Its bytes, and a few more, so that what comes behind it is as aligned as NumPy wants it."""
    return -(-array.nbytes // 64) * 64


def _save_tree(folder: Path, tree: PyTree) -> None:
    context = orbax.Context()
    context.array.saving.use_compression = False  # took nine tenths of the time, and saved a tenth of the bytes
    with context, _quiet():
        orbax.save(folder.absolute(), tree)


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs an error once a thread; the caller tells it in one line."""
    logger = logging.getLogger("absl")
    drop = lambda record: False  # noqa: E731
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"\[os_error_code='(\d+)'\]", str(error)):  # TensorStore's, behind many paths
        return os.strerror(int(code[1]))
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.split(" [tensorstore_spec=")[0]  # a page of JSON
