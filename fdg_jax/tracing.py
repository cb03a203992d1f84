"""The window of a run that is traced: what is measured in it, what was to be expected, and the files that tell both."""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, takewhile
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from rich.console import Console

from fdg_jax.build import example_images
from fdg_jax.config import ConfigError, Settings
from fdg_jax.console import say, warn
from fdg_jax.data import Source
from fdg_jax.engine.base import State
from fdg_jax.flops import layer_flops
from fdg_jax.pipeline import Pipeline
from fdg_jax.plots import save
from fdg_jax.recorder import Recorder
from fdg_jax.schedule import BACKWARD, FORWARD, SYNTHESIS, UPDATE, Op, Schedule, row
from fdg_jax.sealed import replace_text
from fdg_jax.timeline import Box, Link, Message, StageCost, plan
from fdg_jax.trace import Timeline, chrome_trace, draw, shares

KINDS = (FORWARD, BACKWARD, UPDATE, SYNTHESIS)
SETTLED = 64  # periods, after which a planned pipeline does in every one the same


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


def stage_costs(measured: Timeline, num_stages: int) -> list[StageCost]:
    """Seconds of every stage's operations and messages, from medians over its visits of equal operations.

    A visit is one program, so that only sums of its operations are known: these are met by least squares, with as many
    votes as there were visits. Where forward, backward and update are never seen apart, each gets a third of the
    visit. Messages count in seconds, for a link that moves one unit a second.
    """
    visits: dict[int, dict[tuple[str, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for box in measured.boxes:
        visits[box.stage][tuple(op.kind for op in box.ops)].append(box.end - box.start)
    moves: dict[tuple[int | None, int], list[float]] = defaultdict(list)
    for message in measured.messages:
        moves[message.sender, message.reader].append(message.arrived - message.sent)

    def cost(k: int) -> StageCost:
        forward, backward, update, synthesis = _least_squares(visits[k])
        down, up = (statistics.median(moves.get((k, reader)) or [0.0]) for reader in (k + 1, k - 1))
        return StageCost(forward, backward, update, down, up, synthesis)

    return [cost(k) for k in range(num_stages)]


def _least_squares(visits: dict[tuple[str, ...], list[float]]) -> list[float]:
    """Seconds of each of KINDS, none of them negative."""
    votes = np.sqrt([len(each) for each in visits.values()])
    counts = np.array([[kinds.count(kind) for kind in KINDS] for kinds in visits]).reshape(-1, len(KINDS))
    medians = np.array([statistics.median(each) for each in visits.values()])
    found, *_ = np.linalg.lstsq(votes[:, None] * counts, votes * medians, rcond=None)
    return [max(0.0, float(seconds)) for seconds in found]


def planned(
    schedule: Schedule, costs: Sequence[StageCost], devices: Sequence[int], first: Box, num_ticks: int
) -> Timeline:
    """What the schedule comes to in a window of ticks that begins with the one of a box, with its numbers of batches.

    A window late in a run is planned as the same one of a run that has gone on for SETTLED periods.
    """
    late = max(0, (first.tick - schedule.span) // schedule.period - SETTLED)
    begin = first.tick - late * schedule.period
    number = row(schedule, begin)[first.stage][0].batch  # of what the box bears as its first
    added = first.ops[0].batch - number
    messages: list[Message] = []
    boxes = plan(schedule, costs, None, Link(bandwidth=1.0), devices, messages=messages)
    until = list(takewhile(lambda box: box.tick < begin + num_ticks, boxes))
    inside = [box for box in until if box.tick >= begin]
    read = {(box.stage, op) for box in inside for op in box.ops}

    def numbered(op: Op) -> Op:
        return op._replace(batch=op.batch + added)

    return Timeline(
        "planned",
        tuple(box._replace(tick=box.tick + first.tick - begin, ops=tuple(map(numbered, box.ops))) for box in inside),
        tuple(m._replace(op=numbered(m.op)) for m in messages if (m.reader, m.op) in read),
        {box.device: box.end for box in until if box.tick < begin},
    ).shifted()


def follows(timeline: Timeline, schedule: Schedule) -> bool:
    """Whether every visit has the operations that the schedule has in its place."""
    return all(
        [op.kind for op in box.ops] == [op.kind for op in row(schedule, box.tick)[box.stage]] for box in timeline.boxes
    )


class Tracing:
    """Traces the window that the settings name, writes it, and tells where the time went. A context.

    Args:
        settings: of the run.
        pipe, source: of the run.
        workdir: where trace.json, trace.png and the folder profile are written.
        console: where to tell.
        step: at which the run begins or goes on.
    """

    def __init__(self, settings: Settings, pipe: Pipeline, source: Source, workdir: Path, console: Console, step: int):
        self._images = example_images(settings, source)
        self._pipe, self._workdir, self._console, self._profiles = pipe, workdir, console, settings.profile
        self._first, num_steps = settings.trace.first_step, settings.trace.num_steps
        self._end = self._first + num_steps
        self._recorder: Recorder | None = None
        self._begun: tuple[int, float] | None = None  # the window: its first step, and when
        self._pauses: list[tuple[int, float]] = []  # within the window: after how many steps, seconds
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
            self._recorder.abandon()
            self._pipe.observe(None)
        if self._begun and self._profiles:
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
    def paused(self, state: State, step: int) -> Iterator[None]:
        """What the loop does within is no training: the window leaves it out. Waits for the state of the run before."""
        recorder = self._recorder
        if self._over or not (recorder or self._begun):
            yield
            return
        jax.block_until_ready(state)
        before = time.perf_counter()
        if recorder:
            recorder.pause()
        try:
            yield
        finally:
            if recorder:
                recorder.resume()
            if self._begun:
                self._pauses.append((step, time.perf_counter() - before))

    def _begin(self, state: State, step: int) -> None:
        """A step before the window the recorder begins, to know since when devices are free."""
        if self._recorder is None and self._pipe.engine != "fused":
            self._recorder = Recorder(self._pipe.devices, self._pipe.schedule)
            self._pipe.observe(self._recorder)
        if step < self._first or self._begun:
            return
        if self._recorder:
            self._recorder.mark()
        else:
            jax.block_until_ready(state)
        self._begun = step, time.perf_counter()
        if self._profiles:
            self._start_profile()

    def _start_profile(self) -> None:
        try:
            jax.profiler.start_trace(self._workdir / "profile")
        except (OSError, RuntimeError) as error:  # two at a time are refused
            self._profiles = False
            warn(self._console, f"there is no profile: {error}")

    def _finish(self, state: State, step: int) -> None:
        self._over = True
        begun, self._begun = self._begun, None
        recorder, self._recorder = self._recorder, None
        if recorder:
            self._pipe.observe(None)
        if not begun or begun[0] == step:
            if recorder:
                recorder.abandon()
            return
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begun[1] - sum(each for _, each in self._pauses)
        try:
            if self._profiles:
                jax.profiler.stop_trace()
            timelines = self._measured(recorder) if recorder else [self._guessed(seconds, begun[0], step)]
            self._write(timelines)
        except (OSError, RuntimeError) as error:
            warn(self._console, f"the trace is not written: {error}; training goes on")
            return
        self._tell(timelines, begun[0], step)

    def _measured(self, recorder: Recorder) -> list[Timeline]:
        measured, schedule = recorder.stop(), self._pipe.schedule
        first = measured.boxes[0]
        num_ticks = max(box.tick for box in measured.boxes) - first.tick + 1
        if self._pipe.method.reuse or not follows(measured, schedule):  # but another, to which the method has switched
            return [measured]
        costs = stage_costs(measured, schedule.num_stages)
        return [planned(schedule, costs, recorder.devices, first, num_ticks), measured]

    def _guessed(self, seconds: float, first: int, end: int) -> Timeline:
        """The plan of the fused engine: the time of the window, divided among the stages by their arithmetic."""
        pipe, schedule = self._pipe, self._pipe.schedule
        flops = layer_flops(pipe.layers, self._images)
        work = [sum(flops[i:j]) for i, j in pairwise((0, *pipe.cuts, len(flops)))]
        batches = (end - first) * pipe.method.micro_batches
        costs = [StageCost(each / 3, 2 * each / 3) for each in (seconds / batches * w / sum(work) for w in work)]
        tick, num_ticks = first * pipe.ticks_per_batch, (end - first) * pipe.ticks_per_batch
        stage, visit = next((k, visit) for k, visit in enumerate(row(schedule, tick)) if visit)
        return planned(schedule, costs, [0] * len(costs), Box(stage, 0, tick, visit, 0.0, 0.0), num_ticks)

    def _write(self, timelines: Sequence[Timeline]) -> None:
        replace_text(self._workdir / "trace.json", json.dumps(chrome_trace(timelines)) + "\n")
        save(draw(timelines), self._workdir / "trace.png")

    def _tell(self, timelines: Sequence[Timeline], first: int, end: int) -> None:
        steps = f"the steps {first} to {end - 1}{left_out([pause for pause in self._pauses if pause[0] < end])}"
        say(self._console, f"traced {steps}; where the time of every device goes, in percent:")
        say(self._console, table(timelines))
        files = [self._workdir / name for name in ("trace.png", "trace.json")]
        more = f"; {self._workdir / 'profile'}, whose making slowed the run" if self._profiles else ""
        say(self._console, f"{files[0]}; {files[1]}, for https://ui.perfetto.dev{more}")


def left_out(pauses: Sequence[tuple[int, float]]) -> str:
    """Words for pauses within a window, of which each has its step and seconds: those of one step are one."""
    num = len({step for step, _ in pauses})
    seconds = sum(each for _, each in pauses)
    return f" without {num} pause{'s' if num > 1 else ''} of {seconds:.2f} s in all" if num else ""


def table(timelines: Sequence[Timeline]) -> str:
    """A line a device of every timeline, with its `Shares`."""
    lines = [f"{'':10}device  stages    compute  transfer   waiting  imbalance"]
    for timeline in timelines:
        for device, parts in shares(timeline).items():
            stages = ",".join(str(k) for k in sorted({box.stage for box in timeline.lanes[device]}))
            figures = "".join(f"{part:10.1f}" for part in parts)
            lines.append(f"{timeline.name:10}{device:<8}{stages:8}{figures[1:]}")
    return "\n".join(lines)
