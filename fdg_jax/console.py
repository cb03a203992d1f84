"""What a run says while it works: to people, a live bar on a terminal and plain lines elsewhere; to machines, JSON.

People read the console, to which `--quiet` leaves warnings and the last word. Machines read `JsonLines` on stdout, and
then the console is on stderr. `docs/logs.md` lists the keys.
"""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LOG_FORMATS = ("text", "json")
WINDOW = 20  # logs over which the pace is taken
WIDE, NARROW = 110, 90  # columns of a terminal from which on there is a long bar, and one at all


class JsonLines:
    """One JSON object a line; none where there is no file.

    Args:
        file: where they go, as soon as they are written.
        common: what every line says.
    """

    def __init__(self, file: TextIO | None = None, common: Mapping[str, Any] | None = None):
        self._file, self._common = file, dict(common or {})
        self._out = Console(file=file)  # which flushes, and knows what to do where nobody reads any more

    def within(self, common: Mapping[str, Any]) -> "JsonLines":
        """The same file, with more that every line says."""
        return JsonLines(self._file, {**self._common, **common})

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """What happened and what there is to tell of it; numbers that are not finite become null.

        Raises:
            SystemExit: with status 1, as for text: nobody reads any more.
        """
        if self._file is not None:
            line = {"event": event, **self._common, **_finite(values)}
            self._out.out(json.dumps(line, allow_nan=False), highlight=False)

    def alone(self) -> AbstractContextManager[Any]:
        """Within it, what anything else prints goes to stderr, where the lines are on stdout."""
        return redirect_stdout(sys.stderr) if self._file is not None else nullcontext()


SILENT = JsonLines()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def voices(log_format: str, quiet: bool) -> tuple[Console, JsonLines]:
    """Where a run speaks to people, and to machines; no bar is drawn where both would share a terminal."""
    if log_format == "text":
        return Console(quiet=quiet), SILENT
    shared = sys.stdout.isatty()
    return Console(stderr=True, quiet=quiet, force_terminal=False if shared else None), JsonLines(sys.stdout)


def say(console: Console, text: str) -> None:
    """As it is, without wrapping or markup; nothing on a quiet console."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def insist(console: Console, text: str, style: str | None = None) -> None:
    """The same on a quiet console too: warnings, and the last word."""
    quiet, console.quiet = console.quiet, False
    try:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
    finally:
        console.quiet = quiet


def warn(console: Console, text: str) -> None:
    """What a quiet console shows as well."""
    insist(console, text, style="yellow")


@contextmanager
def telling(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Says that something takes a while, and by a function how far it is: in place on a terminal, else in lines."""
    if console.is_terminal:
        with console.status(what) as status:
            yield lambda text: status.update(f"{what}: {text}")
    else:
        say(console, what)
        yield lambda text: say(console, f"{what}: {text}")


class RunDisplay:
    """Use as a context; `advance` after batches, `report` once a log.

    Args:
        num_steps: batches of the whole run.
        num_epochs: of the whole run.
        console: for people; `rich` decides whether it is a terminal.
        step: batches fed before, of a run that goes on.
        lines: for machines.
        balance: work of every stage as a share of the slowest's.
        clock: seconds.
    """

    def __init__(
        self,
        num_steps: int,
        num_epochs: int,
        console: Console,
        step: int = 0,
        lines: JsonLines = SILENT,
        balance: Sequence[float] = (),
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.console, self.lines, self._clock = console, lines, clock
        self._num_steps, self._num_epochs, self._step = num_steps, num_epochs, step
        bar = 20 if console.width >= WIDE else 6 if console.width >= NARROW else 0
        columns = (
            TextColumn("{task.fields[latest]}", markup=False),
            *([BarColumn(bar)] if bar else []),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", markup=False),  # rich's own would count what compiles
        )
        self._progress = Progress(*columns, console=console, disable=not _draws(console))
        self._width = len(str(num_steps))
        self._room = console.width - bar - (2 * self._width + 1) - len("100:00:00 left") - 3
        self._marks: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # batches fed, and when
        self._logs = 0
        self._tested: dict[str, float] = {}
        told = [describe_balance(balance), f"stages {100 * min(balance):.0f}-100 %"] if len(balance) > 1 else [""]
        self._balance = next((each for each in told if len(each) <= self._room), told[-1])
        latest, left = _in_lines(["compiling", self._balance], self._room), _time_left(None)
        self._task = self._progress.add_task("", total=num_steps, completed=step, latest=latest, left=left)

    def __enter__(self) -> "RunDisplay":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, num: int) -> None:
        self._step += num
        if not self._marks:  # what was before this was mostly compilation
            self._marks.append((self._step, self._clock()))
        elif not self._logs:
            self._progress.update(self._task, latest=_in_lines(["training", self._balance], self._room))
        self._progress.advance(self._task, num)

    def report(self, step: int, epoch: float, time_s: float, values: Mapping[str, float]) -> None:
        """Shows the latest numbers, by tag; where an epoch was evaluated its line stays beside a bar."""
        left = self._seconds_left(step)
        ordered = sorted(values.items(), key=lambda item: item[0].endswith("skipped"))  # what is rare, last
        trained, tested = ({t: v for t, v in ordered if t.startswith(split)} for split in ("train/", "test/"))
        log = {tag: value for tag, value in ordered if tag not in tested}  # what a probe found too
        self._tested = tested or self._tested
        parts = [*_parts(trained), self._balance, *_parts(self._tested, "accuracy")]
        latest = _in_lines(["  ".join(parts[:2]), *parts[2:]], self._room)  # loss and accuracy in one in any case
        self._progress.update(self._task, latest=latest, left=_time_left(left), refresh=True)  # not older than the line
        if not _draws(self.console) or tested:
            head = f"epoch {epoch:6.2f}/{self._num_epochs}  step {step:{self._width}d}"
            time_left = [] if left is None else [_time_left(left)]
            say(self.console, "  ".join([head, *_parts(trained), *time_left, *_parts(tested)]))
        when = {"step": step, "epoch": round(epoch, 4), "time_s": round(time_s, 3)}
        self.lines.write("log", {**when, "time_left_s": None if left is None else round(left, 1), **log})
        if tested:
            self.lines.write("evaluation", {**when, **tested})

    def _seconds_left(self, step: int) -> float | None:
        """At the mean pace of the last logs, evaluations and saves included; None before there is a pace.

        The first log knows its own batches but the first; compilation, which may still be in them, is forgotten after.
        """
        now = self._clock()
        known = [mark for mark in self._marks if mark[0] < step]
        self._logs += 1
        if self._logs == 1:
            self._marks.clear()
        self._marks.append((step, now))
        if not known:
            return 0.0 if step == self._num_steps else None
        return (self._num_steps - step) * (now - known[0][1]) / (step - known[0][0])


def _draws(console: Console) -> bool:
    """Whether there is a live bar."""
    return console.is_terminal and not console.quiet


def _in_lines(parts: Sequence[str], width: int) -> str:
    """The parts, wrapped between them; the first may be longer than the width."""
    lines = [parts[0]]
    for part in filter(None, parts[1:]):
        if len(lines[-1]) + 2 + len(part) <= max(width, len(lines[0])):
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return "\n".join(lines)


def _time_left(seconds: float | None) -> str:
    """`26:03:09 left`, in hours, minutes and seconds."""
    if seconds is None:
        return "-:--:-- left"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"


def describe_balance(shares: Sequence[float]) -> str:
    """`stages 100/83/91 %`: the work of every stage as a share of the slowest's."""
    return f"stages {'/'.join(f'{100 * share:.0f}' for share in shares)} %"


def describe_metrics(values: Mapping[str, float]) -> str:
    """`loss 0.0312  accuracy 99.10 %  8,123 images/s  test accuracy 98.33 %`."""
    return "  ".join(_parts(values))


def _parts(values: Mapping[str, float], only: str = "") -> list[str]:
    """A text a value, of those whose name ends with `only`."""
    parts = []
    for tag, value in values.items():
        split, _, name = tag.partition("/")
        name = ("" if split == "train" else f"{split} ") + name.replace("_", " ")
        if not name.endswith(only):
            continue
        if name.endswith("accuracy"):
            parts.append(f"{name} {100 * value:.2f} %")
        elif name.endswith("images per s"):
            parts.append(f"{value:,.0f} images/s")
        elif name == "skipped":
            parts.append(f"{name} {value:.0f}")
        else:
            parts.append(f"{name} {value:.4f}")
    return parts
