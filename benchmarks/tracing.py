"""What it costs to measure a timeline without a profiler.

    python -m benchmarks.tracing

A network trains with FDG over two CPU devices, just as a run does it, but for the log; turns of so many batches with
the recorder and without follow one another in one process and one run, in changing order, and end when the devices are
done. Reported are the ratio of the medians of seconds a batch, which should be at most 1.03, and the quartiles of the
ratios of turns that were neighbours; beside it what the same comparison says of turns without the recorder, which is
how far the figure can be trusted; and both for CPU seconds, which other work on the machine disturbs less. Networks:
the one of the digits (batch 64), and ResNet-20 on random images of CIFAR's shape (batch 128).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks.saving import CASES, RESULTS
from fdg_jax.allocator import keep_memory
from fdg_jax.build import build, example_images
from fdg_jax.config import Settings
from fdg_jax.pipeline import Pipeline
from fdg_jax.recorder import Recorder

WANTED = 1.03
TURNS = ("with", "without", "again")  # the last two are the same


Seconds = dict[str, list[float]]  # a batch, of every turn


def measure(settings: Settings, rounds: int, batches: int) -> tuple[Seconds, Seconds]:
    """By the clock, and of CPU."""
    pipe, source = build(settings)
    state = pipe.init(jax.random.key(settings.seed), example_images(settings, source))
    feed = cycle(list(islice(source.batches(settings.seed, settings.batch_size), 16)))
    wall, cpu = ({turn: list[float]() for turn in TURNS} for _ in range(2))
    for turn in _turns(rounds):
        recorder = Recorder(pipe.devices, pipe.schedule) if turn == "with" else None
        pipe.observe(recorder)
        begun, spent = time.perf_counter(), time.process_time()
        state = _train(pipe, state, islice(feed, batches))
        wall[turn].append((time.perf_counter() - begun) / batches)
        cpu[turn].append((time.process_time() - spent) / batches)
        if recorder:
            recorder.stop()
    first = 1  # compiles
    return {turn: each[first:] for turn, each in wall.items()}, {turn: each[first:] for turn, each in cpu.items()}


def _turns(rounds: int) -> Iterator[str]:
    """In all orders, so that none of them always comes after the same."""
    for number in range(rounds + 1):
        first = number % 3
        yield from (*TURNS[first:], *TURNS[:first])[:: 1 if number % 2 == 0 else -1] if number else TURNS


def _train(pipe: Pipeline, state: Any, batches: Iterator[Any]) -> Any:
    for batch in batches:
        state, _ = pipe.step(state, batch)
    return jax.block_until_ready(state)


def summary(wall: Seconds, cpu: Seconds) -> dict[str, Any]:
    """Medians in milliseconds, and ratios to the turns without."""

    def ratio(seconds: Seconds, turn: str) -> dict[str, float]:
        each = [a / b for a, b in zip(seconds[turn], seconds["without"], strict=True)]
        low, _, high = statistics.quantiles(each, n=4)
        medians = statistics.median(seconds[turn]) / statistics.median(seconds["without"])
        return {"of medians": medians, "lower quartile": low, "upper quartile": high}

    found: dict[str, Any] = {f"{turn} ms": 1e3 * statistics.median(each) for turn, each in wall.items()}
    ratios = {"ratio": ratio(wall, "with"), "noise": ratio(wall, "again")}
    ratios |= {"cpu": ratio(cpu, "with"), "cpu noise": ratio(cpu, "again")}
    return {**found, "rounds": len(wall["with"]), **ratios}


def show(name: str, result: dict[str, Any], console: Console) -> None:
    """A line a comparison."""
    console.print(f"{name}: {result['without ms']:.2f} ms a batch, {result['with ms']:.2f} recorded", highlight=False)
    lines = {"ratio": "recorded / not", "noise": "not / not"}
    for key, words in {**lines, "cpu": "CPU, recorded / not", "cpu noise": "CPU, not / not"}.items():
        medians, low, high = result[key].values()
        wanted = f"; wanted at most {WANTED}: {'yes' if medians <= WANTED else 'NO'}" if key == "ratio" else ""
        console.print(f"  {words}: {medians:.3f} (quartiles {low:.3f} to {high:.3f}){wanted}", highlight=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tracing", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="networks (all)")
    add("--rounds", type=int, default=30, help="each of three turns (30)")
    add("--batches", type=int, default=20, help="a turn (20)")
    add("--out", type=Path, default=RESULTS / "tracing.json", help="where the result goes as JSON (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 it was measured, 130 Ctrl-C."""
    args, console, results = parse(argv), Console(), {}
    try:
        for name in args.cases:
            with tempfile.TemporaryDirectory() as folder:
                results[name] = summary(*measure(CASES[name](Path(folder)), args.rounds, args.batches))
            show(name, results[name], console)
    except KeyboardInterrupt:
        return 130
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results) + "\n")
    console.print(f"written to {args.out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    keep_memory()
    jax.config.update("jax_num_cpu_devices", 2)
    sys.exit(main())
