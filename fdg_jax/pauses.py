"""When a run does something else than train: it logs, evaluates, saves, compiles.

What compiles is the host's thread, within the very call that dispatches: it sends devices nothing until it is done, and
they run dry. JAX tells how long it took when it is over. Other pauses are announced, and come when devices are done.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax.monitoring

COMPILES = "/jax/core/compile/"  # events of tracing, lowering and compiling begin with it


class Pause(NamedTuple):
    """Seconds of a clock; whether it is compilation; how many turns of the loop were begun before it."""

    begin: float
    end: float
    compiles: bool
    turn: int


class Pauses:
    """Those of a run, in order; compilation from when it is made until `close`, in the thread that made it.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.found: list[Pause] = []
        self.turn = 0
        self._clock, self._thread, self._joins, self._hears = clock, threading.get_ident(), False, True
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def close(self) -> None:
        """Hears of no more."""
        if self._hears:
            jax.monitoring.unregister_event_duration_listener(self._hear)
        self._hears = False

    @property
    def over(self) -> float:
        """When the last one was."""
        return self.found[-1].end if self.found else -math.inf

    def begin_turn(self) -> None:
        """The loop goes on to its next step, or so many as it feeds in one call."""
        self.turn += 1
        self.go_on()

    def go_on(self) -> None:
        """Something was dispatched: what is compiled from now on is another pause."""
        self._joins = False

    def begin(self) -> None:
        """Devices have nothing to do from now on."""
        self.found.append(Pause(self._clock(), math.inf, False, self.turn))

    def end(self) -> None:
        """The loop trains again."""
        self.found[-1] = self.found[-1]._replace(end=self._clock())
        self._joins = False

    def _hear(self, event: str, duration_secs: float, **about: str | int) -> None:
        """A program is compiled in steps, the inner ones of which are told first; what lies between is part of it."""
        if not event.startswith(COMPILES) or threading.get_ident() != self._thread or self.over == math.inf:
            return
        now = self._clock()
        begin = min(now - duration_secs, self.found.pop().begin) if self._joins else now - duration_secs
        self.found.append(Pause(begin, now, True, self.turn))
        self._joins = True


def cut(pauses: Sequence[Pause], work: Iterable[tuple[float, float]] = ()) -> list[Pause]:
    """What is left of them when devices have done all that they had: in compilation they may work on for a while.

    Args:
        pauses: that do not overlap.
        work: when something was dispatched, and when it was done.
    """
    done = list(work)

    def rest(pause: Pause) -> Pause:
        busy = max((end for dispatched, end in done if dispatched <= pause.begin), default=-math.inf)
        return pause._replace(begin=min(pause.end, max(pause.begin, busy)))

    return [rest(pause) if pause.compiles else pause for pause in pauses]


def without(pauses: Sequence[Pause], seconds: float) -> float:
    """What a clock would show that is stopped in pauses."""
    return seconds - sum(max(0.0, min(seconds, pause.end) - pause.begin) for pause in pauses)


def total(pauses: Sequence[Pause], compiles: bool) -> float:
    """Seconds of those that are compilation, or of the others."""
    return round(sum(pause.end - pause.begin for pause in pauses if pause.compiles == compiles), 3)


def left_out(pauses: Sequence[Pause]) -> str:
    """Words for pauses of a window; those between the same two steps are one."""
    parts, num = [], len({pause.turn for pause in pauses if not pause.compiles})
    if num:
        parts.append(f"{num} pause{'s' if num > 1 else ''} of {total(pauses, compiles=False):.2f} s in all")
    if (seconds := total(pauses, compiles=True)) > 0:
        parts.append(f"{seconds:.2f} s of compilation")
    return f" without {' and '.join(parts)}" if parts else ""
