"""Sides of a comparison as processes that take turns, so that whatever disturbs the machine disturbs them alike.

Every side is a process of its own, because sides differ in cores, devices and allocators, which are settled before JAX
starts. It builds its case, warms up, and says so in a line of JSON; then it trains on as many batches as it is told,
and answers with the seconds. All live at the same time, and wait without work.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Turn = dict[str, float]
_MARK = "benchmark "  # of the lines that are answers: libraries print too


class Side:
    """One process, warmed up, and what it has answered.

    Args:
        name: of the side.
        command: the process.
        environment: added to this one's.

    Attributes:
        about: what the process said of itself when it was ready.
        turns: its answers; "seconds" a batch, "cores" that were at work, "rss_mib" after it.

    Raises:
        RuntimeError: the process ends; what it wrote to stderr is on this one's.
    """

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str]):
        self.name, self.turns = name, list[Turn]()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.about: dict[str, Any] = self._answer()
        self._cpu_s = self._cpu_seconds()
        self.idle_s = self.idle_cpu_s = 0.0  # between turns: how long, and what it spent in that time
        self._since = time.perf_counter()

    def take_turn(self, num_batches: int) -> None:
        """Trains on so many batches, and waits for them."""
        self.idle_s += time.perf_counter() - self._since
        self.idle_cpu_s += self._cpu_seconds() - self._cpu_s
        assert self._process.stdin is not None
        print(num_batches, file=self._process.stdin, flush=True)
        self.turns.append(self._answer())
        self._cpu_s, self._since = self._cpu_seconds(), time.perf_counter()

    def times(self, key: str = "seconds") -> list[float]:
        return [turn[key] for turn in self.turns]

    @property
    def median(self) -> float:
        """Seconds a batch."""
        return statistics.median(self.times())

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Any:
        for line in self._process.stdout:  # type: ignore[union-attr]
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        raise RuntimeError(f"the process of {self.name!r} ended with status {self._process.wait()}")

    def _cpu_seconds(self) -> float:
        path = Path(f"/proc/{self._process.pid}/stat")
        if not path.exists():
            return 0.0
        fields = path.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rounds(sides: list[Side], num_batches: int, num_rounds: int) -> None:
    """Every side takes its turn, `num_rounds` times; every other round backwards."""
    for number in range(num_rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            side.take_turn(num_batches)


def ratio(a: Side, b: Side) -> dict[str, float]:
    """Of the medians, and the least and the greatest of a round."""
    each = [x / y for x, y in zip(a.times(), b.times(), strict=True)]
    return {"ratio": a.median / b.median, "least": min(each), "greatest": max(each)}


def serve(run: Callable[[int], Any], about: Mapping[str, Any]) -> None:
    """What the process of a side does when it is warmed up; ends with its input.

    Args:
        run: trains on so many batches, waits for them, and may return figures of its own by name.
        about: for `Side.about`.
    """
    print(_MARK + json.dumps(about), flush=True)
    for line in sys.stdin:
        num_batches, before = int(line), resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        more = run(num_batches)
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        faults = (after.ru_minflt - before.ru_minflt) / num_batches
        turn = {"seconds": wall / num_batches, "cores": spent / wall, "faults": faults, "rss_mib": rss_mib()}
        print(_MARK + json.dumps({**turn, **(more or {})}), flush=True)


def rss_mib() -> float:
    """Resident memory of this process, 0 where nobody says."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if path.exists() else 0.0
