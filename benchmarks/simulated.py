"""The simulator against what it simulates: FDG over two CPU devices, predicted from its stages' times and measured.

    python -m benchmarks.simulated

The stages' times come from elsewhere than the run that they predict: backpropagation over the same two stages, one
after the other on one device. For FDG in two processes at once, each held to a core of its own, so that a stage is
timed on one core while the other core works as well: they share caches and memory, and alone would be faster. For BP,
whose stages work in turn, in one process that uses both cores. `timeline.steady` makes of these times, and of a link as
fast as `jax.device_put` is here, the time a batch of FDG and of BP over two devices; and beside it stands what these
take. Sides take turns (see `interleaved`).
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import plain
from benchmarks.interleaved import Side, rounds, serve
from benchmarks.speed import RESULTS
from fdg_jax import Pipeline, methods, softmax_cross_entropy
from fdg_jax.allocator import keep_memory
from fdg_jax.timeline import Link, StageCost, steady

WANTED = 0.15  # how far the prediction may be off
METHODS = {"fdg": lambda: methods.fdg(plain.BETA), "bp": methods.bp}


def work(spec: dict[str, Any]) -> None:
    """The process of a side: "stages" on one core, or a method over two devices."""
    keep_memory()
    if spec["core"] is not None:
        os.sched_setaffinity(0, {spec["core"]})
        os.environ["PJRT_NPROC"] = "1"
    jax.config.update("jax_num_cpu_devices", 1 if spec["name"] == "stages" else 2)
    layers = plain.build(spec["network"], side=spec["side"])
    pipe = Pipeline(
        layers,
        loss=softmax_cross_entropy,
        optimizer=plain.optimizer(),
        method=METHODS.get(spec["name"], methods.bp)(),
        cuts=tuple(spec["cuts"]),
        engine="mpmd",
    )
    feed = plain.random_source(spec["images"], spec["side"]).feed(0, spec["batch_size"])
    state = pipe.init(jax.random.key(0), jax.ShapeDtypeStruct((spec["batch_size"], *[spec["side"]] * 2, 3), np.float32))
    seconds: dict[str, list[float]] = {}

    def run(num_batches: int) -> dict[str, Any]:
        nonlocal state
        seconds.clear()
        state, metrics = pipe.run(state, feed, num_batches)
        jax.block_until_ready((jax.tree.leaves(state), metrics))
        return {"visits": {name: statistics.median(each) for name, each in seconds.items()}}

    run(8)
    if spec["name"] == "stages":
        _time_visits(pipe, seconds)
    serve(run, {"message_s": _message_seconds(pipe, state)})


def _time_visits(pipe: Pipeline, seconds: dict[str, list[float]]) -> None:
    """Waits for every visit, and notes its seconds by stage and operations."""
    for (k, pattern), program in pipe._started().programs.items():  # type: ignore[attr-defined]  # the engine is mpmd
        name = f"{k} {''.join(kind for kind, _ in pattern)}"

        def waiting(*args: Any, call: Callable = program.compiled, name: str = name) -> Any:
            start = time.perf_counter()
            result = jax.block_until_ready(call(*args))
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            return result

        program.compiled = waiting


def _message_seconds(pipe: Pipeline, state: Any) -> float:
    """To move one activation between the two devices, alone; 0 where there is one device."""
    shape = pipe._started().plan.shapes[1]
    one, other = pipe.devices
    if one == other:
        return 0.0
    message = jax.device_put(np.ones(shape.shape, shape.dtype), one)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(jax.device_put(message, other))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a batch, predicted and measured, of each method."""
    spec = {key: getattr(args, key) for key in ("network", "batch_size", "images", "side", "cuts")}

    def start(name: str, core: int | None = None) -> Side:
        given = json.dumps({**spec, "name": name, "core": core})
        return Side(name, [sys.executable, "-m", "benchmarks.simulated", "--work", given], {})

    cores = sorted(os.sched_getaffinity(0))[:2]
    timed, free = [start("stages", core) for core in cores], start("stages")
    sides = [start(name) for name in METHODS]
    try:
        for _ in range(args.rounds):
            threads = [threading.Thread(target=side.take_turn, args=(args.batches,)) for side in timed]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rounds([free, *sides], args.batches, 1)
    finally:
        for side in (*timed, free, *sides):
            side.close()
    visits = {"fdg": _visit_seconds(timed), "bp": _visit_seconds([free])}
    message = sides[0].about["message_s"]
    results = {}
    for side in sides:
        seconds = visits[side.name]
        costs = [  # the last stage goes forward and backward in one visit: as one operation here
            StageCost(seconds["0 F"], seconds["0 BU"], activations=1.0),
            StageCost(0.0, seconds["1 FBU"], cotangents=1.0),
        ]
        predicted = steady(METHODS[side.name]().schedule(2), costs, Link(bandwidth=1 / message)).batch_seconds
        results[side.name] = {"predicted_s": predicted, "measured_s": side.median, "turns_s": side.times()}
    return {"visits_s": visits, "message_s": message, "methods": results, **spec}


def _visit_seconds(sides: Sequence[Side]) -> dict[str, float]:
    """Medians over all turns, by stage and operations."""
    visits = [turn["visits"] for side in sides for turn in side.turns]
    return {name: statistics.median(each[name] for each in visits) for name in visits[0]}


def show(results: dict[str, Any], console: Console) -> None:
    """The prediction beside the measurement, and whether it is within WANTED."""
    table = Table("ms a batch, K = 2", "predicted", "measured", "off by", box=None)
    for name, each in results["methods"].items():
        off = each["predicted_s"] / each["measured_s"] - 1
        verdict = "" if abs(off) <= WANTED else f", MORE THAN {WANTED:.0%}"
        table.add_row(
            name, f"{1e3 * each['predicted_s']:.1f}", f"{1e3 * each['measured_s']:.1f}", f"{off:+.1%}{verdict}"
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", choices=plain.NETWORKS, default="resnet20", help="%(default)s")
    add("--cuts", type=int, nargs=1, default=[4], help="first layer of the second stage; %(default)s")
    add("--batch_size", type=int, default=128, help="%(default)s")
    add("--batches", type=int, default=8, help="a turn; %(default)s")
    add("--rounds", type=int, default=5, help="%(default)s")
    add("--images", type=int, default=1024, help="of the data set; %(default)s")
    add("--side", type=int, default=32, help="of an image, in pixels; %(default)s")
    add("--out", type=Path, default=RESULTS / "simulated.json", help="%(default)s")
    add("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(json.loads(args.work))
        return 0
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        print("two cores are needed, and a system that holds a process to one of them", file=sys.stderr)
        return 1
    console = Console()
    results = measure(args)
    show(results, console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
