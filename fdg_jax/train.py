"""The loop of a run: initialise, feed, log, evaluate, save."""

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from rich.console import Console

from fdg_jax.build import build, example_images
from fdg_jax.checkpoint import Weights, save_weights
from fdg_jax.config import ConfigError, Settings
from fdg_jax.console import RunDisplay
from fdg_jax.data import Source
from fdg_jax.engine.base import State
from fdg_jax.metrics import MetricWriter, masked_sums
from fdg_jax.pipeline import Pipeline

T = TypeVar("T")


class RunFailed(Exception):
    """A run that cannot go on; one line that says where it stands."""


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
        metrics: the last test metrics, by tag.
        seconds: of the training, compilation and evaluations included.
        stopped_by: the signal that ended the run early, or None.
    """

    metrics: dict[str, float]
    seconds: float
    stopped_by: int | None


def train_and_evaluate(settings: Settings, workdir: Path, console: Console) -> Result:
    """Trains as the settings say and leaves in `workdir` the settings, the metrics and the final weights.

    Args:
        settings: from `config.resolve`.
        workdir: made here; it must not hold a run already.
        console: for what is printed.

    Raises:
        ConfigError: the settings do not fit one another, or the workdir is taken. Nothing has been written.
        RunFailed: the loss is no longer finite. What was written stays.
    """
    pipe, source = build(settings, console)
    try:
        state = pipe.init(jax.random.key(settings.seed), example_images(settings, source))
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    _make_workdir(workdir, settings)
    _announce(settings, pipe, source, workdir, console)
    with closing(MetricWriter(workdir)) as writer, _signals(console) as received:
        run = _Run(settings, pipe, source, writer, console)
        state, metrics = run.train(state, received)
    save_weights(workdir / "params", Weights(pipe.params(state), pipe.module_state(state)))
    return Result(metrics, run.seconds, received[0] if received else None)


def _make_workdir(workdir: Path, settings: Settings) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if (workdir / "config.json").exists() or (workdir / "metrics.jsonl").exists():
            raise ConfigError(f"{workdir} holds a run already, and nothing is overwritten: choose another --workdir")
        (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write to --workdir={workdir}: {error.strerror}; choose another") from error


def _announce(settings: Settings, pipe: Pipeline, source: Source, workdir: Path, console: Console) -> None:
    steps = source.steps_per_epoch(settings.batch_size)
    dropped = source.num_train - steps * settings.batch_size
    shape = "x".join(map(str, source.image_shape))
    lines = [
        f"{source.name}: {source.num_train:,} training and {source.num_test:,} test images of {shape}, "
        f"{source.num_classes} classes",
        f"{settings.epochs} epoch{'s' if settings.epochs > 1 else ''} of {steps} batches of {settings.batch_size}"
        + (f"; {dropped} images left over are dropped, others in every epoch" if dropped else ""),
        f"{settings.model.name} of depth {settings.model.depth} and width {settings.model.width}, {settings.dtype}; "
        f"{settings.optim.name}, learning rate {settings.optim.learning_rate:g} ({settings.optim.schedule})",
        "",
        pipe.show(),
        "",
        f"writing to {workdir}",
    ]
    if pipe.method.beta == 0:
        lines.append("beta 0: only the last stage learns from the loss; the others move by weight decay alone")
    if pipe.method.beta < 1 and settings.optim.name != "sgd":
        lines.append(f"beta {pipe.method.beta:g} hardly acts: {settings.optim.name} ignores the scale of gradients")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _signals(console: Console) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM so that the loop can stop between batches; a second one acts at once."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])
        console.print("stopping after this batch; press Ctrl-C again to stop at once", style="yellow")

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
    """The state of the loop that is not the pipeline's: clocks and the latest numbers."""

    def __init__(self, settings: Settings, pipe: Pipeline, source: Source, writer: MetricWriter, console: Console):
        self.settings, self.pipe, self.source, self.writer = settings, pipe, source, writer
        self.per_epoch = source.steps_per_epoch(settings.batch_size)
        self.num_steps = settings.epochs * self.per_epoch
        self.display = RunDisplay(self.num_steps, settings.epochs, console)
        self.metrics: dict[str, float] = {}
        self.started = time.perf_counter()
        self.seconds = 0.0
        self.last_log, self.last_log_at = 0, self.started

    def train(self, state: State, received: list[int]) -> tuple[State, dict[str, float]]:
        """Feeds all batches, or those until a signal arrives; everything fed is answered at the end."""
        settings = self.settings
        with self.display, closing(self.source.batches(settings.seed, settings.batch_size)) as batches:
            for step, batch in zip(range(1, self.num_steps + 1), _readable(batches), strict=False):
                state, _ = self.pipe.step(state, batch)
                self.display.advance()
                ends = step == self.num_steps or bool(received)
                epoch_ends = ends or step % self.per_epoch == 0
                if epoch_ends or step % settings.log_every_steps == 0:
                    jax.block_until_ready(state)  # the one place where the loop waits for the devices
                    seconds = time.perf_counter() - self.last_log_at
                    if ends:
                        state, _ = self.pipe.drain(state)
                    state = self.log(state, step, seconds, evaluates=epoch_ends)
                if ends:
                    break
        return state, self.metrics

    def log(self, state: State, step: int, seconds: float, evaluates: bool) -> State:
        """Reports the means of the `seconds` since the last log; in a run's first, they are mostly compilation."""
        state, means = self.pipe.read_metrics(state)
        if not means.pop("batches"):
            return state
        if not math.isfinite(means["loss"]):
            ticks = self.last_log * self.pipe.schedule.period, step * self.pipe.schedule.period - 1
            raise RunFailed(
                f"the loss is {means['loss']}: it stopped being finite between steps {self.last_log + 1} and {step} "
                f"(ticks {ticks[0]} to {ticks[1]}); the metrics before are kept; "
                "try a smaller config.optim.learning_rate or some warm-up"
            )
        values = {f"train/{name}": value for name, value in sorted(means.items(), reverse=True)}
        images = (step - self.last_log) * self.settings.batch_size
        values["train/images_per_s"] = images / seconds
        if evaluates:
            self.metrics = evaluate(self.pipe, state, self.source, self.settings.batch_size)
            values |= self.metrics
        self.seconds = time.perf_counter() - self.started
        self.writer.write(step, step / self.per_epoch, self.seconds, values)
        self.display.report(step, step / self.per_epoch, values)
        if not math.isfinite(self.metrics.get("test/loss", 0.0)):
            raise RunFailed(
                f"the test loss after step {step} is {self.metrics['test/loss']}; the metrics are kept; try a smaller "
                "config.optim.learning_rate or some warm-up"
            )
        self.last_log, self.last_log_at = step, time.perf_counter()
        return state


def _readable(batches: Iterator[T]) -> Iterator[T]:
    """The same, but a batch that cannot be read fails the run in one line."""
    try:
        yield from batches
    except ValueError as error:
        raise RunFailed(f"{error}; the metrics before are kept") from error


def evaluate(pipe: Pipeline, state: State, source: Source, batch_size: int) -> dict[str, float]:
    """Means over the test images on the weights of the moment, each image once: "test/loss" and the loss's metrics."""
    sums: dict[str, float] = {}
    for images, labels, mask in _readable(source.test_batches(batch_size)):
        outputs = pipe.predict(state, images)
        for name, value in masked_sums(pipe.loss, outputs, np.asarray(labels), mask).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    count = sums.pop("count")
    return {f"test/{name}": value / count for name, value in sorted(sums.items(), reverse=True)}
