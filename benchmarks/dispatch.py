"""What a tick costs the host that drives K devices: the dispatch alone.

    python -m benchmarks.dispatch

ResNet-56 and ResNet-110 in four stages on four CPU devices train with FDG on the engine `mpmd`. They have one channel,
images of 4 x 4 pixels and batches of two: what the host does depends on how many arrays there are, and they are as many
as in the real network. A gate keeps the devices' work out of the clock: ahead of every few ticks one device stops, and
everything that is dispatched then waits for it, as in training it waits for the batch before. The clock is the
processor time of the host's thread, so that what others take does not count either; caches that they emptied do, so
that a busy machine may double it: then look at the least.

A tick is the call of `pipe.step` and the letting go of the state before. Its parts are the calls of the K programs, the
one `jax.device_put`, the release of the old state, and the rest: Python, and the release of the memos that were used.
The aim is less than 1 ms.
"""

import argparse
import json
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from rich.console import Console
from rich.table import Table

from fdg_jax import Pipeline, State, methods, models, optim, softmax_cross_entropy
from fdg_jax.backward import POLICIES

RESULTS = Path(__file__).parent / "results"
WANTED_MS = 1.0  # a tick, at most
SHAPE = (4, 4, 3)
AT_ONCE = 4  # ticks behind one gate; the engine itself waits when it is further ahead than `mpmd.RUN_AHEAD`


class Gate:
    """A callback on the first device, for which everything dispatched between `shut` and `open` waits."""

    def __init__(self) -> None:
        self._reached, self._opened = threading.Event(), threading.Event()
        self._work = jax.jit(self._multiply)
        self._stop = jax.jit(lambda x: jax.pure_callback(self._wait, jax.ShapeDtypeStruct((), np.uint32), x))
        self._add = jax.jit(jnp.add)
        self._opened.set()
        self._stop(self._work()).block_until_ready()  # compiled now, or the work would be done before it is

    @staticmethod
    def _multiply() -> jax.Array:
        return lax.fori_loop(0, 256, lambda _, x: x @ x, jnp.eye(128))[0, 0]

    def _wait(self, _: Any) -> np.ndarray:
        self._reached.set()
        self._opened.wait()
        return np.zeros((), np.uint32)

    def shut(self, state: State) -> State:
        """The same state, all of whose stages wait."""
        self._reached.clear()
        self._opened.clear()
        # What waits for no work XLA:CPU runs at once, on the thread of the host, which would then wait for itself.
        zero = self._stop(self._work())
        stages = [
            own._replace(counts=self._add(own.counts, jax.device_put(zero, own.counts.device))) for own in state.stages
        ]
        self._reached.wait()  # until then the work keeps a core busy
        return replace(state, stages=tuple(stages))

    def open(self) -> None:
        self._opened.set()


class Bench:
    """A tiny ResNet in its steady state."""

    def __init__(self, depth: int, num_stages: int, policy: str):
        layers = models.resnet_cifar(depth, width=1, in_shape=SHAPE, rngs=nnx.Rngs(0))
        self.pipe = Pipeline(
            layers,
            loss=softmax_cross_entropy,
            optimizer=optim.sgd(0.1, 0.9, 1e-4),
            method=methods.fdg(0.5, policy),
            num_stages=num_stages,
            engine="mpmd",
        )
        self.batch = np.ones((2, *SHAPE), np.float32), np.arange(2, dtype=np.int32)
        self.state = self.pipe.init(jax.random.key(0), self.batch[0])
        self.gate = Gate()
        for _ in range(4 * num_stages):
            self.step()

    def step(self) -> None:
        self.state, _ = self.pipe.step(self.state, self.batch)

    def ticks(self) -> list[dict[str, float]]:
        """Seconds of a few ticks and of their parts, while the devices wait."""
        self.state = self.gate.shut(self.state)
        found = []
        for _ in range(AT_ONCE):
            parts: dict[str, float] = defaultdict(float)
            with self.watched(partial(_timed, parts)):
                wall, start = perf_counter(), thread_time()
                new, _ = self.pipe.step(self.state, self.batch)
                stepped = thread_time()
                self.state = new  # nothing else refers to the old one
                end, wall = thread_time(), perf_counter() - wall
            rest = stepped - start - sum(parts.values())
            found.append({**parts, "rest": rest, "release": end - stepped, "tick": end - start, "wall": wall})
        self.gate.open()
        jax.block_until_ready(self.state)
        return found

    def calls(self) -> list[tuple[str, int, int]]:
        """What a tick calls: the name, and how many arrays go in and come out."""
        seen: list[tuple[str, int, int]] = []
        with self.watched(partial(_counted, seen)):
            self.step()
        return sorted(seen)

    @contextmanager
    def watched(self, watch: Callable[[str, Callable], Callable]) -> Iterator[None]:
        """Puts `watch` around what a step calls."""
        programs = self.pipe._started().programs  # type: ignore[attr-defined]  # the engine is mpmd
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(jax, "device_put", watch("device_put", jax.device_put)))
            for (k, _), program in programs.items():
                watching = watch(f"call of stage {k}", program.compiled)
                stack.enter_context(mock.patch.object(program, "compiled", watching))
            yield


def _timed(spent: dict[str, float], name: str, function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        start = thread_time()
        result = function(*args)
        spent[name] += thread_time() - start
        return result

    return call


def _counted(seen: list[tuple[str, int, int]], name: str, function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        given = args[:1] if name == "device_put" else args  # the others are devices
        num_given, result = len(jax.tree.leaves(given)), function(*args)
        seen.append((name, num_given, len(jax.tree.leaves(result))))
        return result

    return call


def measure(depth: int, num_stages: int, policy: str, num_ticks: int) -> dict[str, Any]:
    """Figures of one network."""
    bench, ticks = Bench(depth, num_stages, policy), list[dict[str, float]]()
    bench.ticks()
    while len(ticks) < num_ticks:
        ticks += bench.ticks()
    return {**summary(ticks), "calls": bench.calls()}


def summary(ticks: list[dict[str, float]]) -> dict[str, Any]:
    """Milliseconds of a tick: its median, a tenth of all, the least; the median time that passed; medians of parts."""
    figures = {name: 1e3 * np.array([tick[name] for tick in ticks]) for name in ticks[0]}
    tick, wall = figures.pop("tick"), figures.pop("wall")
    return {
        "ticks": len(ticks),
        "median_ms": float(np.median(tick)),
        "tenth_ms": float(np.quantile(tick, 0.1)),
        "least_ms": float(tick.min()),
        "wall_ms": float(np.median(wall)),
        "parts_ms": {name: float(np.median(part)) for name, part in sorted(figures.items())},
    }


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """The figures of every network side by side."""
    table = Table("", *results, box=None)
    for key in ("ticks", "median_ms", "tenth_ms", "least_ms", "wall_ms"):
        table.add_row(key.replace("_", " "), *(f"{r[key]:,.3f}".removesuffix(".000") for r in results.values()))
    first = next(iter(results.values()))
    for name in first["parts_ms"]:
        table.add_row(f"  {name}", *(f"{r['parts_ms'][name]:.3f}" for r in results.values()))
    for i, (name, _, _) in enumerate(first["calls"]):
        table.add_row(f"arrays: {name}", *("{1} in, {2} out".format(*r["calls"][i]) for r in results.values()))
    console.print(table)
    for name, result in results.items():
        median = result["median_ms"]
        console.print(
            f"{name}: {median:.2f} ms a tick, {'less' if median < WANTED_MS else 'NOT LESS'} than {WANTED_MS}"
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dispatch", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--depths", nargs="+", type=int, default=[56, 110], help="of the ResNets (56 110)")
    add("--num_stages", type=int, default=4, help="K (4)")
    add("--policy", choices=POLICIES, default="stash", help="which weights answer (stash)")
    add("--ticks", type=int, default=800, help="to measure, of each network (800)")
    add("--out", type=Path, default=RESULTS / "dispatch.json", help="where the result goes as JSON (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 it was measured, 130 Ctrl-C."""
    args, console = parse(argv), Console()
    try:
        results = {f"resnet{n}": measure(n, args.num_stages, args.policy, args.ticks) for n in args.depths}
    except KeyboardInterrupt:
        return 130
    show(results, console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results) + "\n")
    console.print(f"written to {args.out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    sys.exit(main())
