"""The loop of a run: begin or go on, feed, log, evaluate, save."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from fdg_jax.announce import announce
from fdg_jax.build import described
from fdg_jax.checkpoint import Checkpoints, Weights, save_weights
from fdg_jax.config import ConfigError, Settings
from fdg_jax.console import SILENT, JsonLines, RunDisplay, say, warn
from fdg_jax.data import Source
from fdg_jax.engine.base import State
from fdg_jax.feeding import Feeding
from fdg_jax.lock import Locked, locked
from fdg_jax.metrics import MetricWriter, masked_sums, read_lines
from fdg_jax.pipeline import Pipeline
from fdg_jax.plots import save as save_picture
from fdg_jax.probe import Probe
from fdg_jax.provenance import note_start
from fdg_jax.resume import Progress, begin, find
from fdg_jax.saving import RunFailed, Saving
from fdg_jax.sealed import free_name, replace_text
from fdg_jax.staleness import draw, probed, tagged
from fdg_jax.tracing import Tracing, check_window


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
        metrics: the last test metrics, by tag.
        seconds: of the training, compilation and evaluations included, those before an interruption too.
        stopped_by: the signal that ended the run early, or None.
        summary: where it ended and what is where, in a line.
        pipe: of the run.
    """

    metrics: dict[str, float]
    seconds: float
    stopped_by: int | None
    summary: str
    pipe: Pipeline


def train_and_evaluate(settings: Settings, workdir: Path, console: Console, lines: JsonLines = SILENT) -> Result:
    """Trains as the settings say and leaves in `workdir` the settings, the metrics, checkpoints and the final weights.

    A workdir in which a run of these settings was stopped is where it goes on, to the same bits as if it never was.

    Args:
        settings: from `config.resolve`.
        workdir: made here.
        console: for what is printed.
        lines: for machines, see docs/logs.md.

    Raises:
        ConfigError: the settings fit neither one another nor the run in the workdir, or another process runs there.
            Nothing has been written.
        RunFailed: the loss is no longer finite, or what must be written cannot be. What was written stays.
    """
    checkpoints = Checkpoints(workdir / "checkpoints", settings.checkpoint.keep_last, settings.checkpoint.keep_best)
    with ExitStack() as stack:
        if there := os.path.isdir(workdir):  # False, not an error, where it may not be looked at
            stack.enter_context(_owned(workdir, console))
            checkpoints.sweep()
        found = find(settings, workdir, checkpoints, console) if there else None
        pipe, source, state, progress, line = begin(settings, found, console)
        if done := _done(settings, pipe, source, workdir, progress, found.differences if found else ()):
            return done
        num_steps = settings.epochs * source.steps_per_epoch(settings.batch_size)
        check_window(settings, num_steps)
        if not there:
            stack.enter_context(_owned(workdir, console))
            if found is None and find(settings, workdir, checkpoints, console):
                raise ConfigError(f"another run has begun in {workdir} meanwhile: try again")
        if line:
            say(console, line)
        writer = stack.enter_context(
            closing(_writer(workdir, settings, pipe, progress.step, _last_written(progress) if found else None))
        )
        balance = announce(settings, pipe, source, workdir, console, lines, progress.step)
        display = RunDisplay(num_steps, settings.epochs, console, progress.step, lines, balance)
        received = stack.enter_context(_signals(console))
        try:
            return _Run(settings, pipe, source, workdir, writer, checkpoints, progress, display).train(state, received)
        except RunFailed:
            checkpoints.wait()  # nothing may be written once the folder is let go
            raise


@contextmanager
def _owned(workdir: Path, console: Console) -> Iterator[None]:
    """The workdir, made where it is not there, and locked."""
    with ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stale = stack.enter_context(locked(workdir))
        except OSError as error:
            raise ConfigError(f"cannot write to --workdir={workdir}: {error.strerror}; choose another") from error
        except Locked as error:
            raise ConfigError(str(error)) from error
        if stale:
            warn(console, f"{workdir} was locked by {stale}, which is gone")
        yield


def _done(
    settings: Settings, pipe: Pipeline, source: Source, workdir: Path, progress: Progress, differences: Sequence[str]
) -> Result | None:
    """What a run ended with that has nothing more to do.

    Raises:
        ConfigError: it went further than it is asked to, or is to go on with other settings and has no steps left.
    """
    num_steps = settings.epochs * source.steps_per_epoch(settings.batch_size)
    if progress.step > num_steps:
        raise ConfigError(
            f"the run in {workdir} has taken {progress.step} steps, and config.epochs={settings.epochs} makes "
            f"{num_steps}: ask for more epochs, or choose another --workdir"
        )
    if progress.step < num_steps or not (workdir / "params").is_dir():
        return None
    if differences:
        raise ConfigError(f"the run in {workdir} has no steps left: ask for more config.epochs")
    measured = [line for line in read_lines(workdir / "metrics.jsonl") if "test/loss" in line]
    metrics = {tag: value for tag, value in measured[-1].items() if tag.startswith("test/")} if measured else {}
    more = "ask for more config.epochs"
    if settings.optim.schedule == "cosine":  # which more epochs would stretch
        more += " and --config.checkpoint.resume=params"
    summary = f"finished already; {more}, or choose another --workdir than {workdir}"
    return Result(metrics, progress.seconds, None, summary, pipe)


def _last_written(progress: Progress) -> int:
    """The step up to which the numbers of a run that goes on stand: the others it measures again."""
    return max(progress.last_log, progress.step if progress.logged else progress.step - 1)


def _writer(workdir: Path, settings: Settings, pipe: Pipeline, step: int, last_step: int | None) -> MetricWriter:
    try:
        if last_step is not None and (workdir / "params").exists():  # of a run that this one carries on
            (workdir / "params").rename(free_name(workdir / f"params_of_step_{step}"))
        replace_text(workdir / "config.json", json.dumps(asdict(settings), indent=2) + "\n")
        writer = MetricWriter(workdir, last_step)
        note_start(workdir, pipe.devices)  # last: a start that fails is none
        return writer
    except OSError as error:
        raise ConfigError(f"cannot write to --workdir={workdir}: {error.strerror}; choose another") from error


@contextmanager
def _signals(console: Console) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM so that the loop can stop between batches; a second one acts at once."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)
        with suppress(RuntimeError):  # where the signal fell into a print that waits for its reader
            warn(console, "stopping after this batch to save it; press Ctrl-C again to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Run:
    """The state of the loop that is not the pipeline's: where it stands, clocks and the latest numbers."""

    def __init__(
        self,
        settings: Settings,
        pipe: Pipeline,
        source: Source,
        workdir: Path,
        writer: MetricWriter,
        checkpoints: Checkpoints,
        progress: Progress,
        display: RunDisplay,
    ):
        self.settings, self.pipe, self.source, self.workdir = settings, pipe, source, workdir
        self.writer, self.checkpoints, self.progress, self.display = writer, checkpoints, progress, display
        self.per_epoch = source.steps_per_epoch(settings.batch_size)
        self.num_steps = settings.epochs * self.per_epoch
        self.data = described(source, settings)
        self.probe = Probe(pipe) if settings.probe_every_steps else None
        now = time.perf_counter()
        self.started, self.last_log_at = now - progress.seconds, now - progress.seconds_since_log
        self.tracing = Tracing(settings, pipe, source, workdir, display.console, progress.step, display.lines)
        stops = settings.on_nan == "stop"
        self.saving = Saving(
            settings.checkpoint,
            checkpoints,
            progress.step,
            lambda snapshot: stops and snapshot.faults > 0,
            display.console,
            display.lines,
        )

    def train(self, state: State, received: list[int]) -> Result:
        """Feeds all batches and answers them; or stops, with everything in flight, when a signal arrives."""
        settings, first = self.settings, self.progress.step
        feeding = Feeding(self.pipe, self.source, settings.seed, settings.batch_size, first)
        with self.display, feeding, self.tracing:
            if not self.progress.logged and first < self.num_steps:
                state = self.end_step(state, received)
            while self.progress.step < self.num_steps and not received:
                self.last_log_at += self.tracing.watch(state, self.progress.step)
                with _readable():
                    state, num = feeding.advance(state, self.steps_until_due())
                self.progress = replace(self.progress, step=self.progress.step + num, logged=False)
                self.display.advance(num)
                if self.progress.step < self.num_steps and not received:
                    state = self.end_step(state, received)
            self.last_log_at += self.tracing.watch(state, self.progress.step, is_last=True)
            if not received:
                state = self.finish(state, received)
        return self.stopped(state, received[0]) if received else self.finished(state)

    def steps_until_due(self) -> int:
        """How many steps may follow one another before `end_step` has something to do; at least one."""
        step, every = self.progress.step, self.settings.checkpoint.every_steps
        marks = [self.num_steps]
        cadences = self.per_epoch, self.settings.log_every_steps, self.settings.probe_every_steps
        marks += [step + n - step % n for n in cadences if n]
        marks += [max(step + 1, self.saving.step + every)] if every else []
        return min([*marks, *(mark for mark in self.tracing.marks() if mark > step)]) - step

    def end_step(self, state: State, received: list[int]) -> State:
        """Logs, evaluates and saves what is due after a step. Cut short by a signal, it leaves the log to be done."""
        step = self.progress.step
        epoch_ends = step % self.per_epoch == 0
        is_best = False
        if epoch_ends or step % self.settings.log_every_steps == 0:
            jax.block_until_ready(state)  # the one place where a loop that is not traced waits for the devices
            before = self.progress.best_error
            with self.tracing.paused(state):
                state = self.log(state, time.perf_counter() - self.last_log_at, epoch_ends, received)
            if received:
                return state
            is_best = self.progress.best_error != before
        if self.probe and step % self.settings.probe_every_steps == 0:
            with self.tracing.paused(state):
                self.measure(state, self.probe)
        self.progress = replace(self.progress, logged=True)
        if self.saving.due(step) or (is_best and self.settings.checkpoint.keep_best):
            with self.tracing.paused(state):
                self.save(state, error=_test_error(self.progress.metrics) if epoch_ends else None)
        self.saving.watch()
        return state

    def finish(self, state: State, received: list[int]) -> State:
        """Answers what is in flight, after saving it, so that a run of more epochs can go on from here."""
        if self.saving.step < self.progress.step:
            self.save(state, in_background=False)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - self.last_log_at
        state, _ = self.pipe.drain(state)
        return self.log(state, seconds, True, received)

    def log(self, state: State, seconds: float, evaluates: bool, received: list[int]) -> State:
        """Reports the means of the `seconds` since the last log; in a run's first, they are mostly compilation."""
        step, epoch = self.progress.step, self.progress.step / self.per_epoch
        logged, means = self.pipe.read_metrics(state)
        batches = means.pop("batches")
        values = {f"train/{name}": value for name, value in sorted(means.items(), reverse=True)}
        if self.settings.on_nan == "skip":
            values["train/skipped"] = float(max(fault.count for fault in self.pipe.faults(state)))
        else:
            self.refuse_nonfinite(state, means.get("loss", 0.0))
        if not batches and not values.get("train/skipped"):
            return state
        values["train/images_per_s"] = (step - self.progress.last_log) * self.settings.batch_size / seconds
        if evaluates:
            tested = evaluate(self.pipe, logged, self.source, self.settings.batch_size, received)
            if received:
                return state
            values |= tested
            errors = [e for e in (self.progress.best_error, _test_error(tested)) if e is not None]
            self.progress = replace(self.progress, metrics=tested, best_error=min(errors, default=None))
        self.write(step, epoch, values)
        if not math.isfinite(self.progress.metrics.get("test/loss", 0.0)):
            raise RunFailed(
                f"the test loss after step {step} is {self.progress.metrics['test/loss']}; {self.kept()}; "
                "try a smaller config.optim.learning_rate or some warm-up"
            )
        self.progress, self.last_log_at = replace(self.progress, last_log=step), time.perf_counter()
        return logged

    def refuse_nonfinite(self, state: State, loss: float) -> None:
        """Fails the run where the loss since the last log, or a gradient, was not finite."""
        first = self.pipe.first_fault(state)
        if math.isfinite(loss) and first is None:
            return
        period, last_log, step = self.pipe.ticks_per_batch, self.progress.last_log, self.progress.step
        what = f"the loss is {loss}: it" if not math.isfinite(loss) else f"the loss is {loss:.4g}, but a gradient"
        where = (
            f"; gradients were first not finite on stage {first.stage}, in tick {first.tick}, for batch {first.batch}"
            if first
            else ""
        )
        raise RunFailed(
            f"{what} stopped being finite between steps {last_log + 1} and {step} (ticks "
            f"{last_log * period} to {step * period - 1}){where}; {self.kept()}; try a smaller "
            "config.optim.learning_rate, some warm-up, or config.on_nan=skip"
        )

    def measure(self, state: State, probe: Probe) -> None:
        """Probes the batch that comes next; its time is not counted as the training's."""
        jax.block_until_ready(state)
        began, step, settings = time.perf_counter(), self.progress.step, self.settings
        try:
            with _readable():
                values = tagged(probe.measure(state, self.source.batch(settings.seed, step, settings.batch_size)))
        except jax.errors.JaxRuntimeError as error:  # a device without room for a second state, above all
            reason = str(error).splitlines()[0]
            warn(self.display.console, f"no more probes: the one after step {step} failed: {reason}")
            self.probe = None
            return
        time_s = self.record(step, step / self.per_epoch, values)
        self.display.lines.write("probe", {"step": step, "time_s": round(time_s, 3), **values})
        self.last_log_at += time.perf_counter() - began

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        time_s = self.record(step, epoch, values)
        self.display.report(step, epoch, time_s, values)

    def record(self, step: int, epoch: float, values: dict[str, float]) -> float:
        """Writes a line of metrics; the seconds at which it stands."""
        time_s = time.perf_counter() - self.started
        try:
            self.writer.write(step, epoch, time_s, values)
        except OSError as error:
            raise RunFailed(f"the metrics cannot be written: {error.strerror}; {self.kept()}") from error
        return time_s

    def save(self, state: State, error: float | None = None, in_background: bool = True) -> None:
        """Begins to write a checkpoint; `error` is that of an evaluation of these very weights."""
        now = time.perf_counter()
        self.progress = replace(self.progress, seconds=now - self.started, seconds_since_log=now - self.last_log_at)
        notes = {
            "progress": asdict(self.progress),
            "settings": asdict(self.settings),
            "data": self.data,
            "test_error": error,
        }
        self.saving.save(self.progress.step, self.pipe.snapshot(state), notes, in_background)

    def kept(self) -> str:
        """What is not lost when the run fails, in words."""
        self.checkpoints.wait()
        return f"{self.saving.newest}, and the metrics before are kept"

    def finished(self, state: State) -> Result:
        self.saving.close()
        weights, folder = Weights(self.pipe.params(state), self.pipe.module_state(state)), self.workdir / "params"
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)  # should it have vanished
            save_weights(folder, weights)
        except (OSError, ValueError) as error:
            raise RunFailed(f"the weights cannot be written to {folder}: {error}; {self.saving.newest}") from error
        _draw_probes(self.workdir, self.display.console)
        left = "weights and metrics are in {}"
        if not (self.workdir / "metrics.jsonl").exists():
            left = "the weights are in {}, whose metrics are gone"
        summary = f"after {self.seconds:.1f} s; {left.format(self.workdir)}"
        return Result(self.progress.metrics, self.seconds, None, summary, self.pipe)

    def stopped(self, state: State, number: int) -> Result:
        step = self.progress.step
        if self.saving.step < step:
            self.save(state, in_background=False)
        self.saving.close()
        if (path := self.checkpoints.path(step)).is_dir():
            where = f"saved in {path}: the same command goes on from there"
        else:
            next_time = "goes on from there" if self.checkpoints.complete() else "begins again"
            where = f"which is not saved; {self.saving.newest}: the same command {next_time}"
        summary = f"stopped after step {step} of {self.num_steps}, {where}"
        return Result(self.progress.metrics, self.seconds, number, summary, self.pipe)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


def _draw_probes(workdir: Path, console: Console) -> None:
    """Leaves a picture of the probes, where there were any."""
    try:
        if found := probed(read_lines(workdir / "metrics.jsonl")):
            save_picture(draw(found), workdir / "staleness.png")
    except OSError as error:
        warn(console, f"the picture of the probes cannot be written to {workdir}: {error.strerror}")


def _test_error(metrics: dict[str, float]) -> float | None:
    return 1 - metrics["test/accuracy"] if "test/accuracy" in metrics else None


@contextmanager
def _readable() -> Iterator[None]:
    """A batch that cannot be read fails the run in one line."""
    try:
        yield
    except ValueError as error:
        raise RunFailed(f"{error}; the metrics before are kept") from error


def evaluate(
    pipe: Pipeline, state: State, source: Source, batch_size: int, received: Sequence[int] = ()
) -> dict[str, float]:
    """Means over the test images on the weights of the moment, each image once: "test/loss" and the loss's metrics.

    A signal in `received` ends it early, and the means are then of no use.
    """
    sums: dict[str, float] = {}
    with _readable():
        for images, labels, mask in source.test_batches(batch_size):
            if received:
                break
            outputs = pipe.predict(state, images)
            for name, value in masked_sums(pipe.loss, outputs, np.asarray(labels), mask).items():
                sums[name] = sums.get(name, 0.0) + float(value)
    count = sums.pop("count", math.nan)
    return {f"test/{name}": value / count for name, value in sorted(sums.items(), reverse=True)}
