"""An overnight in miniature: a run that saves itself every few seconds and is killed every minute.

    python -m benchmarks.overnight --minutes 30 --save_every_s 5 --kill_every_s 60 --compare

`fdg_jax.main` trains on the digits as a child process, gets SIGKILL at moments spread over the saves, is started again
with the same command, and in the end gets SIGTERM. What is measured: kills survived, that is restarts which went on
from the newest complete checkpoint on disk; the resident memory of each life of the process over time, which on CPU
devices holds their arrays too, with its threads and open files; whether `metrics.jsonl` has each step once and in
order; whether every checkpoint is as it was written; which files are left. With --compare both this run and one that
nobody disturbed are then brought to the end of the same epoch: their weights and numbers must agree to the bit, and
the undisturbed one is a long life in which memory that grows would show. Exit status 1 where a check fails.

Linux only, since it reads /proc.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fdg_jax.checkpoint import Checkpoints, load_weights
from fdg_jax.metrics import read_lines
from fdg_jax.sealed import PARTIAL, REMOVED, Damaged, verify

RESULTS = Path(__file__).parent / "results"
ENDLESS = 10**6  # epochs
MIB = 2**20
PLAIN: dict[str, bool] = {"highlight": False, "markup": False, "soft_wrap": True}
TIMES = ("time_s", "train/images_per_s")  # of a line of the metrics, what two equal runs need not share


class Failed(Exception):
    """The benchmark cannot go on; one line that says why."""


@dataclass
class Life:
    """One process of the run, from its start to its end.

    Attributes:
        newest: step of the newest complete checkpoint on disk when it started, None where there was none.
        went_on_after: the step that it says itself, None where it says none.
        first_log_s: seconds from its start to its first log: imports, the checkpoint, compilation.
        seconds: it lived.
        ended_by: its exit status, negative for a signal.
        while_saving: whether its end left a checkpoint half written.
        last_step: of its last log.
        samples: (seconds since the start, resident bytes, threads, open files).
    """

    newest: int | None
    went_on_after: int | None = None
    first_log_s: float | None = None
    seconds: float = 0.0
    ended_by: int | None = None
    while_saving: bool = False
    last_step: int = 0
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)


class Process:
    """A child that trains; its output is read beside, and it never outlives the context."""

    def __init__(self, command: list[str], newest: int | None):
        self.life, self.tail = Life(newest), deque[str](maxlen=20)
        self._started = time.monotonic()
        # A session of its own, so that a Ctrl-C reaches it only as SIGKILL from here.
        self._child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exception: object) -> None:
        self.end(signal.SIGKILL)

    def _read(self) -> None:
        for line in self._child.stdout or ():
            self.tail.append(line.rstrip())
            if found := re.match(r"going on after step (\d+)", line):
                self.life.went_on_after = int(found[1])
            elif found := re.match(r"epoch .*?step +(\d+)", line):
                self.life.last_step = int(found[1])
                self.life.first_log_s = self.life.first_log_s or self.age

    @property
    def age(self) -> float:
        return time.monotonic() - self._started

    @property
    def lives(self) -> bool:
        return self._child.poll() is None

    def sample(self) -> None:
        """Adds a sample, where it still lives."""
        proc = Path(f"/proc/{self._child.pid}")
        with contextlib.suppress(OSError, IndexError):  # it may go at any moment
            resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            threads, files = (len(os.listdir(proc / name)) for name in ("task", "fd"))
            if resident:
                self.life.samples.append((self.age, resident, threads, files))

    def end(self, number: int) -> None:
        """Sends a signal, if need be, and waits for the end."""
        if self.life.ended_by is None:
            if self.lives:
                self._child.send_signal(number)
            self.life.ended_by = self._child.wait()
            self.life.seconds = self.age
            self._reader.join()
            if self._child.stdout:
                self._child.stdout.close()


class Run:
    """A workdir, and the lives of the processes that trained there."""

    def __init__(self, args: argparse.Namespace, workdir: Path, console: Console, name: str):
        self.args, self.workdir, self.console, self.name = args, workdir, console, name
        self.checkpoints = Checkpoints(workdir / "checkpoints")
        self.lives: list[Life] = []

    def newest(self) -> int | None:
        paths = self.checkpoints.complete()
        return int(paths[-1].name.removeprefix("step_")) if paths else None

    def live(self, until: Callable[[Process], bool], number: int = signal.SIGKILL, epochs: int = ENDLESS) -> Life:
        """Starts a process, samples it until it ends or is to end, and sends it a signal.

        Raises:
            Failed: it ended by itself with another status than 0.
        """
        with Process(self._command(epochs), self.newest()) as process:
            self.lives.append(life := process.life)
            while process.lives and not until(process):
                process.sample()
                time.sleep(self.args.sample_every_s)
            process.end(number)
        life.while_saving = any((self.workdir / "checkpoints").glob(f"*{PARTIAL}"))
        self.console.print(f"{self.name} {len(self.lives):3d}: {describe(life, self.args.settle_s)}", **PLAIN)
        if life.ended_by not in (0, -signal.SIGKILL, 128 + signal.SIGTERM):
            raise Failed(f"training ended by itself with status {life.ended_by}:\n" + "\n".join(process.tail))
        return life

    def _command(self, epochs: int) -> list[str]:
        return [
            *(sys.executable, "-m", "fdg_jax.main", "--config", self.args.config, f"--workdir={self.workdir}"),
            f"--config.epochs={epochs}",
            "--config.optim.schedule=constant",  # which does not depend on the number of epochs
            f"--config.checkpoint.every_minutes={self.args.save_every_s / 60}",
        ]


def disturbed(args: argparse.Namespace, workdir: Path, console: Console) -> Run:
    """The run with its kills, and with the signal at the end that asks it to stop and save itself."""
    run, rng, started = Run(args, workdir, console, "life"), random.Random(0), time.monotonic()
    ends = started + 60 * args.minutes
    while (left := ends - time.monotonic()) > args.kill_every_s or not run.lives:
        # Anywhere between two saves, or within one. A life that has saved nothing yet is spared until it has.
        deadline = min(args.kill_every_s + rng.uniform(0, args.save_every_s), max(left, 0))
        begun_with = run.newest()
        run.live(lambda process, d=deadline, b=begun_with: process.age > d and run.newest() != b)
    run.live(lambda process: time.monotonic() > ends and process.life.first_log_s is not None, number=signal.SIGTERM)
    return run


def steady(life: Life, settle_s: float) -> list[tuple[float, int, int, int]]:
    """The samples from `settle_s` after the first log on."""
    return [s for s in life.samples if life.first_log_s is not None and s[0] >= life.first_log_s + settle_s]


def slope(samples: list[tuple[float, int, int, int]]) -> float | None:
    """MiB a minute, by least squares; None of less than three samples."""
    if len(samples) < 3:
        return None
    times, sizes = np.array([(s[0], s[1]) for s in samples]).T
    return float(np.polyfit(times / 60, sizes / MIB, 1)[0])


def memory(life: Life, settle_s: float) -> dict[str, float | None]:
    """Resident MiB at the beginning and the end of the steady part of a life, and how they grew in between."""
    samples = steady(life, settle_s)
    tenth = max(1, len(samples) // 10)
    median = lambda part: statistics.median(s[1] for s in part) / MIB if part else None  # noqa: E731
    return {
        "minutes": (samples[-1][0] - samples[0][0]) / 60 if samples else 0.0,
        "start_mib": median(samples[:tenth]),
        "end_mib": median(samples[-tenth:]),
        "max_mib": max((s[1] for s in life.samples), default=0) / MIB,
        "slope_mib_per_min": slope(samples),
        "slope_last_half_mib_per_min": slope(samples[len(samples) // 2 :]),
        "threads": samples[-1][2] if samples else None,
        "open_files": samples[-1][3] if samples else None,
    }


def describe(life: Life, settle_s: float) -> str:
    """A life in a line."""
    begin = "began at step 0" if life.went_on_after is None else f"went on after step {life.went_on_after}"
    first = "no log" if life.first_log_s is None else f"first log after {life.first_log_s:.1f} s"
    end = {0: "finished", -signal.SIGKILL: "killed"}.get(life.ended_by or 0, "stopped")
    numbers = memory(life, settle_s)
    grew = ""
    if numbers["slope_mib_per_min"] is not None:
        grew = (
            f"; {numbers['start_mib']:.0f} -> {numbers['end_mib']:.0f} MiB ({numbers['slope_mib_per_min']:+.1f} a "
            f"minute), {numbers['threads']} threads, {numbers['open_files']} files"
        )
    saving = " while saving" if life.while_saving else ""
    return f"{begin}, {first}, {end}{saving} after {life.seconds:.1f} s, step {life.last_step}{grew}"


def files_left(workdir: Path) -> dict[str, int]:
    """How many files and folders of each kind a workdir holds, and bytes in all."""
    files = {"metrics.jsonl": "metrics", "config.json": "config", "run.json": "starts"}
    known = {**files, "params": "params", "lock": "lock"}
    counts: Counter[str] = Counter()
    for path in [*workdir.iterdir(), *(workdir / "checkpoints").glob("*")]:
        if path.name.endswith((PARTIAL, REMOVED)):
            counts["half written or removed"] += 1
        elif ".damaged" in path.name:
            counts["damaged"] += 1
        elif re.fullmatch(r"step_\d+", path.name):
            counts["checkpoints"] += 1
        elif "tfevents" in path.name:
            counts["event files"] += 1
        elif path.name != "checkpoints":
            counts[known.get(path.name, "others")] += 1
    counts["bytes"] = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())
    return dict(counts)


def check_restarts(run: Run) -> str | None:
    """What is wrong, in words, or None; so too below."""
    for number, life in enumerate(run.lives[1:], 2):
        if not life.newest or life.went_on_after != life.newest:
            return f"life {number} went on after {life.went_on_after}; the newest checkpoint was {life.newest}"
    return None


def check_metrics(workdir: Path) -> str | None:
    """Whether each step at which a log is due has its one line, in order."""
    lines, settings = read_lines(workdir / "metrics.jsonl"), json.loads((workdir / "config.json").read_text())
    if not lines:
        return "no line"
    steps = [line["step"] for line in lines]
    every, per_epoch = settings["log_every_steps"], round(lines[-1]["step"] / lines[-1]["epoch"])
    # Before step K no batch has left the last stage, and there is nothing to tell.
    due = [s for s in range(settings["num_stages"], steps[-1] + 1) if s % every == 0 or s % per_epoch == 0]
    if steps != due:
        return (
            f"{len(steps)} lines, {len(due)} due; the first that differs: {min(set(steps) ^ set(due), default='twice')}"
        )
    return None


def check_checkpoints(run: Run) -> str | None:
    """Whether each is as it was written."""
    for path in run.checkpoints.complete():
        try:
            verify(path)
        except Damaged as damage:
            return str(damage)
    return None if run.newest() else "none is left"


def check_files(files: dict[str, int], keep: int) -> str | None:
    """Whether the workdir holds `keep` checkpoints at most and nothing that has no place there."""
    wrong = [kind for kind in ("half written or removed", "damaged", "others", "lock") if files.get(kind)]
    if files["checkpoints"] > keep:
        wrong.append("checkpoints")
    return ", ".join(f"{files[kind]} {kind}" for kind in wrong) or None


def check_memory(lives: list[Life], args: argparse.Namespace) -> str | None:
    """Neither within the longest steady life, over its last half, nor from life to life."""
    longest = max((memory(life, args.settle_s) for life in lives), key=lambda numbers: numbers["minutes"] or 0)
    grown = (longest["slope_last_half_mib_per_min"] or 0) * (longest["minutes"] or 0) / 2
    if grown > args.allowed_mib:
        return f"{grown:.1f} MiB in the last {longest['minutes'] / 2:.1f} minutes of the longest life"
    starts = [start for life in lives if (start := memory(life, args.settle_s)["start_mib"])]
    quarter = max(1, len(starts) // 4)
    between = statistics.median(starts[-quarter:]) - statistics.median(starts[:quarter]) if starts else 0.0
    return f"{between:.1f} MiB more in late lives than in early ones" if between > args.allowed_mib else None


def compare(run: Run, workdir: Path) -> tuple[Run, str | None]:
    """Brings the run, and one that nobody disturbs, to the end of the same epoch; how they differ, in words."""
    last = read_lines(run.workdir / "metrics.jsonl")[-1]
    epochs = int(last["epoch"]) + 2  # beyond the signal
    run.live(lambda process: False, epochs=epochs)
    straight = Run(run.args, workdir, run.console, "undisturbed")
    straight.live(lambda process: False, epochs=epochs)
    ours, theirs = (
        [{tag: value for tag, value in line.items() if tag not in TIMES} for line in read_lines(w / "metrics.jsonl")]
        for w in (run.workdir, workdir)
    )
    if ours != theirs:
        step = next((a["step"] for a, b in zip(ours, theirs, strict=False) if a != b), "the end")
        return straight, f"the metrics differ from step {step} on"
    ours, theirs = (_bytes(load_weights(w / "params")) for w in (run.workdir, workdir))
    return straight, None if ours == theirs else "the weights differ"


def _bytes(tree: object) -> object:
    if isinstance(tree, dict):
        return {key: _bytes(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_bytes(value) for value in tree]
    array = np.asarray(tree)
    return str(array.dtype), array.shape, array.tobytes()


def measure(args: argparse.Namespace, workdir: Path, console: Console) -> dict:
    """Everything, as JSON."""
    run = disturbed(args, workdir, console)
    files, keep = files_left(workdir), 3  # the two newest and the best, by default
    checks = {
        "every restart goes on from the newest complete checkpoint": check_restarts(run),
        "each step is in metrics.jsonl once and in order": check_metrics(workdir),
        "every checkpoint is as it was written": check_checkpoints(run),
        "nothing else is left": check_files(files, keep),
    }
    lives = list(run.lives)
    undisturbed: Run | None = None
    if args.compare:
        undisturbed, checks["an undisturbed run ends with the same bits"] = compare(
            run, workdir.with_name(workdir.name + "_undisturbed")
        )
        lives += undisturbed.lives
    checks["memory does not grow"] = check_memory(lives, args)
    killed = [life for life in run.lives if life.ended_by == -signal.SIGKILL]
    report = lambda life: {**asdict(life), "memory": memory(life, args.settle_s)}  # noqa: E731
    return {
        "args": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "kills": len(killed),
        "kills_while_saving": sum(life.while_saving for life in killed),
        "last_step": max(life.last_step for life in run.lives),
        "files": files,
        "checks": checks,
        "lives": [report(life) for life in run.lives],
        "undisturbed": [report(life) for life in undisturbed.lives] if undisturbed else None,
    }


def show(result: dict, console: Console) -> None:
    """The figures and the checks, for a terminal."""
    numbers = [life["memory"] for life in result["lives"] + (result["undisturbed"] or [])]
    table = Table("resident memory", "minutes", "start", "end", "max", "MiB/min", "last half", box=None)
    named = {"shortest": min(numbers, key=lambda n: n["minutes"]), "longest": max(numbers, key=lambda n: n["minutes"])}
    shown = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
    for name, n in named.items():
        sizes = [shown(n[key], ".0f") for key in ("start_mib", "end_mib", "max_mib")]
        slopes = [shown(n[key], "+.2f") for key in ("slope_mib_per_min", "slope_last_half_mib_per_min")]
        table.add_row(f"{name} life", f"{n['minutes']:.1f}", *sizes, *slopes)
    console.print(table)
    console.print(
        f"{result['kills']} kills, {result['kills_while_saving']} of them while saving; step {result['last_step']}; "
        f"left: {', '.join(f'{count} {kind}' for kind, count in result['files'].items())}",
        **PLAIN,
    )
    for name, wrong in result["checks"].items():
        console.print(f"{'FAILED' if wrong else 'passed'}: {name}{f': {wrong}' if wrong else ''}", **PLAIN)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overnight", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30, help="of training with kills (30)")
    add("--save_every_s", type=float, default=5, help="seconds between the saves of a life (5)")
    add("--kill_every_s", type=float, default=60, help="seconds between start and SIGKILL, up to a save later (60)")
    add("--compare", action="store_true", help="train as many epochs undisturbed afterwards, and compare")
    add("--config", default="experiments/digits.py", help="the experiment (experiments/digits.py)")
    add("--workdir", type=Path, help="of the run, new, and kept; by default a temporary one, which is not")
    add("--out", type=Path, default=RESULTS / "overnight.json", help="where the result goes as JSON (%(default)s)")
    add("--settle_s", type=float, default=10, help="seconds after a life's first log until its memory counts (10)")
    add("--sample_every_s", type=float, default=0.25, help="seconds between samples of the memory (0.25)")
    add("--allowed_mib", type=float, default=32, help="growth that is noise (32)")
    args = parser.parse_args(argv)
    if args.workdir and args.workdir.exists():
        parser.error(f"--workdir={args.workdir} exists; name a new folder")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all checks passed, 1 one failed, 2 wrong arguments, 130 Ctrl-C."""
    args, console = parse(argv), Console()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            result = measure(args, args.workdir or Path(temporary) / "run", console)
    except KeyboardInterrupt:
        console.print("stopped; the child is killed")
        return 130
    except Failed as failure:
        console.print(str(failure), markup=False, style="red")
        return 1
    show(result, console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n")
    console.print(f"written to {args.out}", **PLAIN)
    return 1 if any(result["checks"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
