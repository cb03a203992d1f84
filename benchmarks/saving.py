"""What a save costs the pipeline that goes on beside it.

    python -m benchmarks.saving

A network trains with FDG over two CPU devices, just as a run does it, but for the log; every so many batches its state
is saved, while it trains on. A thread waits for each loss, so that a tick is the time from one batch's leaving the last
stage to the next one's. Measured in one run, with saves and without in turn: the median tick without a save; the
median, mean and longest tick during a save, that is the ticks that touch the time from the call of `pipe.snapshot` to
the end of the thread that writes, and their ratios to the former, which should be at most 1.2; how many ticks a save
spans, and how many ticks' time one costs in all; its seconds and bytes; the milliseconds for which the loop itself is
held up. Networks: the one of the digits (batch 64), and ResNet-20 on random images of CIFAR's shape (batch 128).
"""

import argparse
import json
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import cifar10_resnet20, digits
from fdg_jax.build import build, example_images
from fdg_jax.checkpoint import Checkpoints
from fdg_jax.config import Settings, resolve

RESULTS = Path(__file__).parent / "results"
WANTED = 1.2  # ticks during a save, over the median tick without


class Timed(Checkpoints):
    """Knows when the last save ended."""

    ended = 0.0

    def _save(self, *args: object) -> None:
        super()._save(*args)  # type: ignore[arg-type]
        self.ended = time.perf_counter()


class Clock:
    """Notes when each of the arrays that it is given is ready, in order, without holding up who gives them."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._arrays: queue.Queue[jax.Array | None] = queue.Queue()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def add(self, array: jax.Array) -> None:
        self._arrays.put(array)

    def stop(self) -> None:
        """Returns when the last array is ready."""
        self._arrays.put(None)
        self._thread.join()

    def _wait(self) -> None:
        while (array := self._arrays.get()) is not None:
            jax.block_until_ready(array)
            self.times.append(time.perf_counter())


@dataclass
class Save:
    """Moments of one: the calls of `snapshot` and `save`, when the loop went on, when the thread ended; and bytes."""

    begun: float
    taken: float
    left: float
    ended: float
    num_bytes: int


def digits_settings(folder: Path) -> Settings:
    """Of the experiment of the digits."""
    return resolve(digits.get_config())


def resnet20_settings(folder: Path) -> Settings:
    """Of the experiment of ResNet-20, with random images that are put into `folder`."""
    rng = np.random.default_rng(0)
    path = folder / "random.npz"
    images = rng.integers(0, 256, (1024, 32, 32, 3), np.uint8)
    labels = np.arange(1024) % 10
    np.savez(path, train_images=images, train_labels=labels, test_images=images[:128], test_labels=labels[:128])
    config = cifar10_resnet20.get_config()
    config.data.update({"source": "arrays", "path": str(path)})
    return resolve(config)


CASES: dict[str, Callable[[Path], Settings]] = {"digits": digits_settings, "resnet20": resnet20_settings}


def run(settings: Settings, folder: Path, saves: int, between: int) -> tuple[list[float], list[Save]]:
    """Trains and saves: when each batch left the last stage, and the saves, but for a first one that warms up.

    Args:
        settings: of the run.
        folder: for its checkpoints.
        saves: how many to measure.
        between: batches from the end of a save to the next.
    """
    pipe, source = build(settings)
    state = pipe.init(jax.random.key(settings.seed), example_images(settings, source))
    checkpoints, clock, done, quiet = Timed(folder), Clock(), list[Save](), 0
    for step, batch in enumerate(source.batches(settings.seed, settings.batch_size), 1):
        state, metrics = pipe.step(state, batch)
        if metrics:
            clock.add(metrics["loss"])
        if checkpoints.busy:
            continue
        if quiet == 0 and done:
            done[-1].ended = checkpoints.ended
        quiet += 1
        if quiet > between:
            if len(done) > saves:
                break
            begun = time.perf_counter()
            snapshot = pipe.snapshot(state)
            taken = time.perf_counter()
            checkpoints.save(step, snapshot, {})
            size = sum(array.nbytes for array in snapshot.arrays)
            done.append(Save(begun, taken, time.perf_counter(), 0.0, size))
            quiet = 0
            del snapshot
    clock.stop()
    for outcome in checkpoints.outcomes():
        assert outcome.error is None, outcome
    return clock.times, done[1:]


def summary(times: list[float], saves: list[Save]) -> dict[str, float | int]:
    """What is reported of a run; milliseconds unless the name says otherwise."""
    ends = np.array(times)
    ticks = np.diff(ends)
    touched = np.zeros(len(ticks), int)  # 0 for none, else the number of the save
    for number, save in enumerate(saves, 1):
        touched[(ends[1:] > save.begun) & (ends[:-1] < save.ended)] = number
    # What comes before the first save is compilation and the one that warms up.
    without = ticks[(touched == 0) & (ends[:-1] > saves[0].begun)]
    during = ticks[touched > 0]
    median = float(np.median(without))
    spans = [int(np.sum(touched == number)) for number in range(1, len(saves) + 1)]
    mean_ms = lambda values: 1e3 * statistics.mean(values)  # noqa: E731
    return {
        "saves": len(saves),
        "ticks_without": len(without),
        "ticks_during": len(during),
        "median_without_ms": 1e3 * median,
        "mean_without_ms": mean_ms(without),
        "longest_without_ms": 1e3 * float(without.max()),
        "median_during_ms": 1e3 * float(np.median(during)),
        "mean_during_ms": mean_ms(during),
        "longest_during_ms": 1e3 * float(during.max()),
        "median_ratio": float(np.median(during)) / median,
        "mean_ratio": statistics.mean(during) / median,
        "mean_ratio_of_means": statistics.mean(during) / statistics.mean(without),
        "longest_ratio": float(during.max()) / median,
        "ticks_a_save": statistics.mean(spans),
        "cost_in_ticks": float(during.sum() - len(during) * without.mean()) / float(without.mean()) / len(saves),
        "save_s": statistics.median(save.ended - save.begun for save in saves),
        "mib": saves[-1].num_bytes / 2**20,
        "snapshot_ms": mean_ms([save.taken - save.begun for save in saves]),
        "held_up_ms": mean_ms([save.left - save.begun for save in saves]),
        "longest_held_up_ms": 1e3 * max(save.left - save.begun for save in saves),
    }


def show(results: dict[str, dict], console: Console) -> None:
    """The figures of every network side by side."""
    table = Table("", *results, box=None)
    for key in next(iter(results.values())):
        table.add_row(
            key.replace("_", " "), *(f"{result[key]:,.2f}".removesuffix(".00") for result in results.values())
        )
    console.print(table)
    for name, result in results.items():
        wanted = max(result["median_ratio"], result["mean_ratio"]) <= WANTED
        console.print(
            f"{name}: ticks during a save are {'at most' if wanted else 'MORE than'} {WANTED} times the others"
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saving", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="networks (all)")
    add("--saves", type=int, default=20, help="to measure, of each network (20)")
    add("--between", type=int, default=20, help="batches from the end of a save to the next (20)")
    add("--out", type=Path, default=RESULTS / "saving.json", help="where the result goes as JSON (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 it was measured, 130 Ctrl-C."""
    args, console = parse(argv), Console()
    results = {}
    try:
        for name in args.cases:
            with tempfile.TemporaryDirectory() as folder:
                settings = CASES[name](Path(folder))
                times, saves = run(settings, Path(folder) / "checkpoints", args.saves, args.between)
            results[name] = summary(times, saves) | {"settings": asdict(settings)}
    except KeyboardInterrupt:
        return 130
    show({name: {k: v for k, v in r.items() if k != "settings"} for name, r in results.items()}, console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results) + "\n")
    console.print(f"written to {args.out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    sys.exit(main())
