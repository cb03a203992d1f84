"""The window of a run that is traced: when it begins and ends, the files that tell of it, and what is said."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import jax
import jax.numpy as jnp
from rich.console import Console

from fdg_jax.build import example_images
from fdg_jax.config import ConfigError, Settings
from fdg_jax.console import SILENT, JsonLines, say, warn
from fdg_jax.data import Source
from fdg_jax.engine.base import State
from fdg_jax.expected import divided_costs, follows, measured_costs, planned
from fdg_jax.pauses import Pause, left_out, total
from fdg_jax.pipeline import Pipeline
from fdg_jax.plots import save
from fdg_jax.recorder import Recorder
from fdg_jax.schedule import row
from fdg_jax.sealed import free_name, replace_text
from fdg_jax.timeline import Box
from fdg_jax.trace import Timeline, by_device, chrome_trace, table
from fdg_jax.trace_picture import draw


def check_window(settings: Settings, num_steps: int) -> None:
    """Refuses a window that the run never reaches.

    Raises:
        ConfigError: with the cure.
    """
    window = settings.trace
    if window.num_steps and window.first_step >= num_steps:
        raise ConfigError(
            f"config.trace.first_step={window.first_step} is beyond the run, whose steps are 0 to {num_steps - 1}; "
            f"try --config.trace.first_step={num_steps // 2}"
        )


class Tracing:
    """Traces the window that the settings name, writes it, and tells where the time went. A context.

    Args:
        settings: of the run.
        pipe, source: of the run.
        workdir: where trace.json, trace.png and the folder profile are written.
        console, lines: where to tell people, and machines.
        step: at which the run begins or goes on.
    """

    def __init__(
        self,
        settings: Settings,
        pipe: Pipeline,
        source: Source,
        workdir: Path,
        console: Console,
        step: int,
        lines: JsonLines = SILENT,
    ):
        self._settings, self._pipe, self._source, self._workdir = settings, pipe, source, workdir
        self._console, self._lines, self._profiles = console, lines, settings.profile
        self._first, num_steps = settings.trace.first_step, settings.trace.num_steps
        self._end = self._first + num_steps
        self._recorder: Recorder | None = None
        self._begun: int | None = None  # the first step of the window
        self._over = not num_steps or step >= self._end
        if num_steps and self._over:
            warn(console, f"the run goes on at step {step}, after the window of config.trace: nothing is traced")
        if not self._over and pipe.engine == "fused":
            more = "" if settings.profile else "; --config.profile=true shows what the device does"
            cure = "--config.engine=mpmd measures it"
            say(console, f"the fused engine has no visits to see, so that the trace is the plan alone; {cure}{more}")

    def __enter__(self) -> "Tracing":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over = True
        if self._recorder:
            self._observe(None)
            self._recorder.abandon()
        if self._recorder and self._begun is not None and self._profiles:
            jax.profiler.stop_trace()

    def marks(self) -> list[int]:
        """The steps at which `watch` has something to do."""
        return [] if self._over else [self._first - 1, self._first, self._end]

    def watch(self, state: State, step: int, is_last: bool = False) -> float:
        """Begins or ends the window where it is due before step `step`; the seconds for which that held the run up.

        Args:
            state: of the run, which is waited for where the window ends.
            step: the number of the next one.
            is_last: whether no other follows, so that a window that is open ends.
        """
        before = time.perf_counter()
        if self._over:
            return 0.0
        if is_last or step >= self._end:
            self._finish(state, step)
        elif step >= self._first - 1:
            self._begin(state, step)
        return time.perf_counter() - before

    @contextmanager
    def paused(self, state: State) -> Iterator[None]:
        """What the loop does within is no training: the window leaves it out. Waits for the state of the run before."""
        recorder = self._recorder
        if not recorder:
            yield
            return
        jax.block_until_ready(state)
        recorder.pauses.begin()
        try:
            yield
        finally:
            recorder.pauses.end()

    def _observe(self, recorder: Recorder | None) -> None:
        if self._pipe.engine != "fused":  # of which the recorder sees nothing but the clock and its pauses
            self._pipe.observe(recorder)

    def _begin(self, state: State, step: int) -> None:
        """A step before the window the recorder begins, to know since when devices are free."""
        if self._recorder is None:
            self._recorder = Recorder(self._pipe.devices, self._pipe.schedule)
            self._observe(self._recorder)
        if step >= self._first and self._begun is None:
            if self._pipe.engine == "fused":
                jax.block_until_ready(state)
            if self._profiles:
                self._start_profile()
            self._recorder.mark()
            self._begun = step
        self._recorder.fetch()

    def _start_profile(self) -> None:
        try:
            jax.profiler.start_trace(self._workdir / "profile")
        except (OSError, RuntimeError) as error:  # two at a time are refused
            self._profiles = False
            warn(self._console, f"there is no profile: {error}")

    def _finish(self, state: State, step: int) -> None:
        self._over = True
        recorder, self._recorder = self._recorder, None
        if not recorder:
            return
        self._observe(None)
        if self._begun in (None, step):
            recorder.abandon()
            return
        jax.block_until_ready(state)
        try:
            measured = self._stop(recorder)
            if measured.boxes:
                timelines = self._beside_plan(measured, recorder.devices)
            else:
                timelines = [self._guessed(recorder.seconds, step)]
            self._write(timelines)
        except (OSError, RuntimeError) as error:
            warn(self._console, f"the trace is not written: {error}; training goes on")
            return
        self._tell(timelines, recorder.left_out, step)

    def _stop(self, recorder: Recorder) -> Timeline:
        try:
            return recorder.stop()
        finally:
            if self._profiles:
                jax.profiler.stop_trace()

    def _beside_plan(self, measured: Timeline, devices: Sequence[int]) -> list[Timeline]:
        schedule, first = self._pipe.schedule, measured.boxes[0]
        num_ticks = max(box.tick for box in measured.boxes) - first.tick + 1
        if self._pipe.method.reuse or not follows(measured, schedule):
            why = "repeats batches of a buffer" if self._pipe.method.reuse else "switches within the window"
            say(self._console, f"no timeline is planned beside the measured one, for the method {why}")
            return [measured]
        costs = measured_costs(measured, schedule.num_stages)
        return [planned(schedule, costs, devices, first, num_ticks), measured]

    def _guessed(self, seconds: float, end: int) -> Timeline:
        """The plan of the fused engine: the time of the window, divided among the stages by their operations."""
        pipe, first = self._pipe, self._begun or 0
        labels = jax.ShapeDtypeStruct((self._settings.batch_size,), jnp.int32)
        images, classes = example_images(self._settings, self._source), self._source.num_classes
        costs = divided_costs(pipe, images, labels, classes, seconds / (end - first))
        tick, num_ticks = first * pipe.ticks_per_batch, (end - first) * pipe.ticks_per_batch
        stage, visit = next((k, visit) for k, visit in enumerate(row(pipe.schedule, tick)) if visit)
        return planned(pipe.schedule, costs, [0] * len(costs), Box(stage, 0, tick, visit, 0.0, 0.0), num_ticks)

    def _write(self, timelines: Sequence[Timeline]) -> None:
        self._keep_earlier()
        replace_text(self._workdir / "trace.json", json.dumps(chrome_trace(timelines)) + "\n")
        save(draw(timelines), self._workdir / "trace.png")

    def _keep_earlier(self) -> None:
        """A run that goes on may have traced a window before, or the first part of this one."""
        paths = [path for path in (self._workdir / "trace.png", self._workdir / "trace.json") if path.exists()]
        if paths:
            suffixes = [path.suffix for path in paths]
            kept = free_name(paths[0].with_suffix(""), lambda stem: any(stem.with_suffix(s).exists() for s in suffixes))
            for path in paths:
                path.rename(kept.with_suffix(path.suffix))
            say(self._console, f"the earlier trace is kept as {' and '.join(kept.name + each for each in suffixes)}")

    def _tell(self, timelines: Sequence[Timeline], pauses: Sequence[Pause], end: int) -> None:
        first, files = self._begun or 0, [self._workdir / name for name in ("trace.png", "trace.json")]
        steps = f"step {first}" if end == first + 1 else f"the steps {first} to {end - 1}"
        more = f"{_short(first, end, self._first, self._end)}{left_out(pauses)}"
        say(self._console, f"traced {steps}{more}; where the time of every device goes, in percent:")
        say(self._console, table(timelines))
        more = f"; {self._workdir / 'profile'}, whose making slowed the run" if self._profiles else ""
        say(self._console, f"{files[0]}; {files[1]}, for https://ui.perfetto.dev{more}")
        facts = {
            "first_step": first,
            "steps": end - first,
            "asked_steps": self._settings.trace.num_steps,
            "pause_s": float(total(pauses, compiles=False)),
            "compilation_s": float(total(pauses, compiles=True)),
            "files": [str(path) for path in files],
        }
        self._lines.write("trace", facts | {timeline.name: by_device(timeline) for timeline in timelines})


def _short(first: int, end: int, asked_first: int, asked_end: int) -> str:
    """Words for a window that is not the one that was asked for."""
    why = [f"the run went on at step {first}"] if first > asked_first else []
    why += [f"it stopped after step {end - 1}"] if end < asked_end else []
    num = asked_end - asked_first
    return f" ({end - first} of the {num} asked for, since {' and '.join(why)})" if why else ""
