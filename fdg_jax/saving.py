"""When a run saves itself, and what it says where it cannot."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from fdg_jax.checkpoint import Checkpoints, Outcome
from fdg_jax.config import CheckpointSettings
from fdg_jax.console import SILENT, JsonLines, warn
from fdg_jax.snapshot import Snapshot


class RunFailed(Exception):
    """A run that cannot go on; one line that says where it stands."""


class Saving:
    """Begins to write checkpoints when they are due, and watches what becomes of them.

    Args:
        settings: the cadence, and whether checkpoints are required.
        checkpoints: of the run.
        step: at which it begins, and which is saved already.
        unfit: of snapshots that must not take the place of a good one.
        console: where to tell of what cannot be written.
        lines: for machines, one a checkpoint.
    """

    def __init__(
        self,
        settings: CheckpointSettings,
        checkpoints: Checkpoints,
        step: int,
        unfit: Callable[[Snapshot], bool],
        console: Console,
        lines: JsonLines = SILENT,
    ):
        self._settings, self._checkpoints, self._unfit = settings, checkpoints, unfit
        self._console, self._lines = console, lines
        self.step = step  # the last one saved, or being saved
        self._at = time.monotonic()
        self._failures = 0

    def due(self, step: int) -> bool:
        """Whether to save now; what falls due while a checkpoint is being written waits for its end."""
        settings = self._settings
        by_steps = settings.every_steps and step - self.step >= settings.every_steps
        by_time = settings.every_minutes and time.monotonic() - self._at >= 60 * settings.every_minutes
        return bool(by_steps or by_time) and not self._checkpoints.busy

    def save(self, step: int, snapshot: Snapshot, notes: Mapping[str, Any], in_background: bool = True) -> None:
        """Begins to write, beside the training or alone, when the checkpoint before is complete."""
        self._checkpoints.save(step, snapshot, notes, self._unfit, in_background)
        self.step, self._at = step, time.monotonic()

    def watch(self) -> None:
        """Tells of a checkpoint that could not be written, once.

        Raises:
            RunFailed: checkpoints are required, and two in a row could not be written.
        """
        for outcome in self._checkpoints.outcomes():
            self._judge(outcome)

    def close(self) -> None:
        """Waits for the last checkpoint; tells where it could not be written.

        Raises:
            RunFailed: checkpoints are required, and it could not be written.
        """
        self._checkpoints.wait()
        outcomes = self._checkpoints.outcomes()
        for outcome in outcomes:
            self._judge(outcome, is_last=outcome is outcomes[-1])

    @property
    def newest(self) -> str:
        """The newest complete checkpoint, in words."""
        paths = self._checkpoints.complete()
        return f"the newest complete checkpoint is {paths[-1]}" if paths else "there is no complete checkpoint"

    def _judge(self, outcome: Outcome, is_last: bool = False) -> None:
        what = {"step": outcome.step, "folder": str(outcome.folder), "error": outcome.error}
        self._lines.write("checkpoint", what)
        if outcome.error is None:
            if self._failures:
                warn(self._console, f"checkpoints are written again: {outcome.folder}")
            self._failures = 0
            return
        self._failures += 1
        line = f"the checkpoint of step {outcome.step} could not be written: {outcome.error}; {self.newest}"
        if self._settings.required and (is_last or self._failures > 1):
            raise RunFailed(line)
        if self._failures == 1:
            warn(self._console, line if is_last else f"{line}; training goes on")
