"""What a stage holds, against what `Pipeline.show()` says beforehand, and what holding less costs.

    python -m benchmarks.memory

A ResNet for CIFAR trains with FDG over as many CPU devices as stages: with every policy, and under *stash* with every
`remat`. Reported of each: how many activations a basic block adds to a memo (four with "none", two with "convs", one
with "full"; none under *recompute*), and seconds a batch over those of stash with "none", medians of turns that
alternate. And of every stage, in MiB: `held`, arrays on its device after a step of the steady state; `peak`, the most
of them during a visit, when what it reads and what it has made lie side by side; the forecast of each over what was
measured, which should lie within 10 % of one. `scratch` is what XLA sets aside inside the visit's program beside all
arrays (gradients, activations on their way, what is computed again), as its analysis of the compiled program has it,
for the platform at hand: XLA:CPU orders operations for concurrency and not for memory.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from fdg_jax import Pipeline, State, methods, models, softmax_cross_entropy
from fdg_jax.allocator import keep_memory
from fdg_jax.engine.mpmd import Mpmd

RESULTS = Path(__file__).parent / "results"
WANTED = 0.1  # by which a forecast may be wrong
BASE = "stash"
CASES = {
    BASE: ("stash", "none"),
    "stash, convs": ("stash", "convs"),
    "stash, full": ("stash", "full"),
    "current": ("current", "none"),
    "recompute": ("recompute", "none"),
}
Batch = tuple[np.ndarray, np.ndarray]
Sizes = dict[jax.Device, int]


@dataclass
class StageMemory:
    """Bytes of one stage, and its forecasts over them."""

    held: int
    peak: int
    scratch: int
    held_ratio: float
    peak_ratio: float


class Watch:
    """A compiled function that looks at its device when its results are there, and its arguments still are."""

    def __init__(self, compiled: Any, device: jax.Device):
        self.compiled, self.device, self.peak = compiled, device, 0
        self._shapes: Any = None

    def __call__(self, *args: Any) -> Any:
        self._shapes = jax.tree.map(_shape, args)
        results = jax.block_until_ready(self.compiled(*args))
        self.peak = max(self.peak, live_bytes().get(self.device, 0))
        return results

    @property
    def scratch(self) -> int:
        """What was compiled when it was called is found again here, at no cost."""
        return self.compiled.lower(*self._shapes).compile().memory_analysis().temp_size_in_bytes if self.peak else 0


def _shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=leaf.aval.weak_type)


def live_bytes() -> Sizes:
    """Of all arrays, by device; two that share a buffer count once."""
    gc.collect()
    buffers = {}
    for array in jax.live_arrays():
        if not array.is_deleted():
            for shard in array.addressable_shards:
                buffers[shard.device, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    sizes: Sizes = {}
    for (device, _), size in buffers.items():
        sizes[device] = sizes.get(device, 0) + size
    return sizes


@contextmanager
def settled() -> Iterator[None]:
    """Collections of garbage pass over what lives by now, so that one a visit costs next to nothing."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def measure(pipe: Pipeline, batches: list[Batch]) -> tuple[State, list[StageMemory]]:
    """A state in which the pipeline is full, and its memory during the last two steps to it.

    Args:
        pipe: of the engine "mpmd", every stage on a device of its own.
        batches: taken in turn.
    """
    before = live_bytes()
    state = train(pipe, pipe.init(jax.random.key(0), batches[0][0]), batches, pipe.schedule.span + 1)
    engine = pipe._started()
    assert isinstance(engine, Mpmd)
    watches = {key: Watch(program.compiled, pipe.devices[key[0]]) for key, program in engine.programs.items()}
    held: Sizes = {}
    for key, watch in watches.items():
        engine.programs[key].compiled = watch
    with settled():
        for batch in batches[:2]:
            state, _ = pipe.step(state, batch)  # nobody may refer to an earlier state: its memos would count
            held = {device: max(held.get(device, 0), size) for device, size in live_bytes().items()}
    for key, watch in watches.items():
        engine.programs[key].compiled = watch.compiled
    stages = []
    for k, (device, forecast) in enumerate(zip(pipe.devices, pipe._forecasts, strict=True)):
        own = held[device] - before.get(device, 0)
        peak = max(watch.peak for (stage, _), watch in watches.items() if stage == k) - before.get(device, 0)
        scratch = max(watch.scratch for (stage, _), watch in watches.items() if stage == k)
        stages.append(StageMemory(own, peak, scratch, forecast.total / own, forecast.peak / peak))
    return state, stages


def make(args: argparse.Namespace, depth: int, policy: str, remat: str, **cut: Any) -> Pipeline:
    """The pipeline of a case."""
    layers = models.resnet_cifar(depth, width=args.width, in_shape=(args.side, args.side, 3), rngs=nnx.Rngs(0))
    return Pipeline(
        layers,
        loss=softmax_cross_entropy,
        optimizer=optax.sgd(0.1, momentum=0.9),
        method=methods.fdg(0.5, policy),
        remat=remat,
        **cut,
    )


def activations_a_block(args: argparse.Namespace, policy: str, remat: str) -> float:
    """Of the first group: the bytes by which one more block makes a memo larger, over those of an activation.

    A little more than a whole number: the statistics of two normalisations are small vectors.
    """
    sizes = []
    for depth in (args.depth, args.depth + 6):
        pipe = make(args, depth, policy, remat, cuts=((depth - 2) // 6 + 1,))
        pipe.init(jax.random.key(0), jax.ShapeDtypeStruct((args.batch_size, args.side, args.side, 3), np.float32))
        forecast = pipe._forecasts[0]
        sizes.append(forecast.memos // forecast.num_memos)
    return (sizes[1] - sizes[0]) / (args.batch_size * args.side**2 * args.width * 4)


def make_batches(args: argparse.Namespace, number: int) -> list[Batch]:
    """Random ones."""
    rng = np.random.default_rng(0)
    shape = (args.batch_size, args.side, args.side, 3)
    labels = [rng.integers(0, 10, args.batch_size).astype(np.int32) for _ in range(number)]
    return [(rng.normal(size=shape).astype(np.float32), y) for y in labels]


def run(args: argparse.Namespace) -> dict[str, dict]:
    """All cases: first their memory, one after another, then their time, in turns."""
    batches = make_batches(args, 4)
    results: dict[str, dict] = {}
    running: dict[str, tuple[Pipeline, State]] = {}
    for name in args.cases:
        policy, remat = CASES[name]
        blocks = activations_a_block(args, policy, remat)
        pipe = make(args, args.depth, policy, remat, num_stages=args.stages)
        state, stages = measure(pipe, batches)
        running[name] = pipe, state
        del state  # the next step replaces it
        results[name] = {"activations_a_block": blocks, "stages": [asdict(stage) for stage in stages]}
    for name, seconds in times(running, batches, args).items():
        results[name]["seconds"] = seconds
    return results


def train(pipe: Pipeline, state: State, batches: list[Batch], steps: int) -> State:
    """So many steps, waited for."""
    for step in range(steps):
        state, _ = pipe.step(state, batches[step % len(batches)])
    return jax.block_until_ready(state)


def times(
    running: dict[str, tuple[Pipeline, State]], batches: list[Batch], args: argparse.Namespace
) -> dict[str, float]:
    """Median seconds a batch; every round goes through the cases, every other one backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for number in range(args.rounds):
        for name in list(running) if number % 2 == 0 else reversed(running):
            pipe, state = running[name]
            start = time.perf_counter()
            running[name] = pipe, train(pipe, state, batches, args.steps)
            seconds[name].append((time.perf_counter() - start) / args.steps)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(results: dict[str, dict], console: Console) -> None:
    """A line a case, a line a stage of each, and how well the forecasts did."""
    base = results.get(BASE, next(iter(results.values())))["seconds"]
    table = Table("policy, remat", "activations a block", "seconds a batch", "ratio", box=None)
    for name, result in results.items():
        seconds = result["seconds"]
        table.add_row(name, f"{result['activations_a_block']:.2f}", f"{seconds:.3f}", f"{seconds / base:.2f}")
    console.print(table)
    table = Table("", "stage", "held MiB", "forecast", "peak MiB", "forecast", "scratch MiB", box=None)
    for name, result in results.items():
        for k, s in enumerate(result["stages"]):
            held, peak, scratch = (f"{s[key] / 2**20:.2f}" for key in ("held", "peak", "scratch"))
            table.add_row(name, str(k), held, f"{s['held_ratio']:.3f}", peak, f"{s['peak_ratio']:.3f}", scratch)
    console.print(table)
    ratios = [s[key] for r in results.values() for s in r["stages"] for key in ("held_ratio", "peak_ratio")]
    worst = max(abs(ratio - 1) for ratio in ratios)
    console.print(f"forecasts are {'within' if worst <= WANTED else 'NOT within'} 10 %: the worst is {worst:.1%} off")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="policies and remats (all)")
    add("--depth", type=int, default=20, help="of the network, 6n + 2 (20)")
    add("--width", type=int, default=16, help="of its first group (16)")
    add("--side", type=int, default=32, help="of an image (32)")
    add("--batch_size", type=int, default=128, help="(128)")
    add("--stages", type=int, default=3, help="and devices (3)")
    add("--steps", type=int, default=4, help="batches of a turn (4)")
    add("--rounds", type=int, default=8, help="turns of each case (8)")
    add("--out", type=Path, default=RESULTS / "memory.json", help="where the result goes as JSON (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 it was measured, 1 there are fewer devices than stages, 130 Ctrl-C."""
    args, console = parse(argv), Console()
    keep_memory()  # or times would be of page faults, of which those have most that keep most
    if len(jax.devices()) < args.stages:
        console.print(f"--stages {args.stages} needs as many devices; there are {len(jax.devices())}", soft_wrap=True)
        return 1
    try:
        results = run(args)
    except KeyboardInterrupt:
        return 130
    show(results, console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"arguments": {**vars(args), "out": str(args.out)}, "cases": results}) + "\n")
    console.print(f"written to {args.out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", parse(None).stages)
    sys.exit(main())
