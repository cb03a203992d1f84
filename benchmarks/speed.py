"""The engines against one another, against backpropagation on fewer cores, and against a step written by hand.

    python -m benchmarks.speed

ResNet-20 and WRN-16-4, float32, batch 128, random images of CIFAR's shape that live on the device. Every side is a
process (see `interleaved`); they take turns, and a figure is a ratio of the medians of seconds a batch:

1. FDG over two CPU devices against BP on one device, held to one core: what a second core brings, at best 0.5.
2. The same against BP on one device that uses both cores: what the pipeline brings where XLA could also split each
   operation among them.
3. The fused engine, whose loop keeps its memory, against a step written by hand; FDG against BP on it.
4. The engine of many devices with one stage, which is BP, against the same step.
5. What the host spends on a tick: `benchmarks.dispatch`.
6. What memos, and stages, hold under each policy and remat: `benchmarks.memory`.
7. Ten thousand ticks leave memory as it was: `benchmarks.bounded`.

FDG is cut where it is fastest: of the cut balanced by measurement, its neighbours and the published one. All is
measured with freed memory kept, as `fdg_jax.main` does, and as glibc comes; the last lines compare the two. BP on one
core is held to it by the process's affinity; the column "cores" is processor time over time, for all sides.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import plain
from benchmarks.interleaved import ROOT, Side, ratio, rounds, serve
from fdg_jax import Pipeline, methods, softmax_cross_entropy
from fdg_jax.allocator import SWITCH, keep_memory
from fdg_jax.balance import balanced_cuts
from fdg_jax.data import Feed

OTHERS = {5: "dispatch", 6: "memory", 7: "bounded"}  # the numbers of what has a command of its own
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Case:
    """What a side trains with.

    Attributes:
        engine: of the pipeline, or "own" and "flax" for a step written by hand with those layers.
        num_stages: K; K = 1 is BP.
        policy: of FDG.
        devices: CPU devices.
        one_core: whether the process is held to the first core that it may use.
    """

    engine: str
    num_stages: int = 1
    policy: str = "stash"
    devices: int = 1
    one_core: bool = False


FDG = "FDG K=2 on two devices"
CASES = {
    FDG: Case("mpmd", num_stages=2, devices=2),
    "BP on one core": Case("mpmd", one_core=True),
    "BP on both cores": Case("mpmd"),
    "by hand": Case("own"),
    "by hand, Flax's layers": Case("flax"),
    "fused BP": Case("fused"),
    "fused FDG K=4, stash": Case("fused", num_stages=4),
    "fused FDG K=4, current": Case("fused", num_stages=4, policy="current"),
}


@dataclass(frozen=True)
class Line:
    """A ratio of two sides and what is wanted of it; `target` is the issue's number of it, None for those beside."""

    target: int | None
    above: str
    below: str
    at_most: float | None = None


# Sides of one interleaved run; not all at once, since they would want 26 GB for WRN-16-4.
GROUPS = [
    [FDG, "BP on one core", "BP on both cores", "by hand", "by hand, Flax's layers", "fused BP"],
    ["fused BP", "fused FDG K=4, stash", "fused FDG K=4, current"],
]
LINES = [
    Line(1, FDG, "BP on one core", 0.50),
    Line(2, FDG, "BP on both cores", 0.70),
    Line(3, "fused BP", "by hand", 0.90),
    Line(3, "fused FDG K=4, stash", "fused BP", 1.10),
    Line(3, "fused FDG K=4, current", "fused BP", 1.10),
    Line(4, "BP on both cores", "by hand", 1.03),
    Line(None, FDG, "fused BP"),
    Line(None, "fused BP", "by hand, Flax's layers"),
    Line(None, "BP on both cores", "by hand, Flax's layers"),
]
BOTH_WAYS = (FDG, "BP on both cores", "by hand", "fused BP")  # compared with and without kept memory
KEPT, GIVEN_BACK = "kept", "given back"


def work(spec: dict[str, Any]) -> None:
    """The process of a side, which says in `spec` its network, batch size, case and cuts."""
    case = Case(**spec["case"])
    kept = keep_memory()
    if case.one_core:
        hold_to_one_core()
    jax.config.update("jax_num_cpu_devices", case.devices)
    source = plain.random_source(spec["images"], spec["side"])
    feed = source.feed(0, spec["batch_size"])
    run, about = (by_hand if case.engine in ("own", "flax") else by_engine)(case, spec, feed)
    for num_batches in (4 * case.num_stages, spec["batches"]):  # fills the pipeline, then compiles for a full one
        run(num_batches)
    serve(run, {**about, "kept": kept})


def hold_to_one_core() -> None:
    """Before JAX starts. Affinity is what holds, since all threads inherit it; XLA also sizes its pool by it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["PJRT_NPROC"] = "1"


def by_hand(case: Case, spec: dict[str, Any], feed: Feed) -> tuple[Callable[[int], None], dict]:
    """The step written by hand, and nothing to say."""
    layers = plain.build(spec["network"], side=spec["side"])
    loop = plain.Plain(layers if case.engine == "own" else list(map(plain.of_flax, layers)), feed)
    return lambda num_batches: jax.block_until_ready((loop.run(num_batches), loop.params)) and None, {}


def by_engine(case: Case, spec: dict[str, Any], feed: Feed) -> tuple[Callable[[int], None], dict]:
    """A pipeline in training, and its cuts."""
    layers = plain.build(spec["network"], side=spec["side"])
    images = jax.ShapeDtypeStruct((spec["batch_size"], spec["side"], spec["side"], 3), np.float32)
    cuts: Any = spec["cuts"] or "layers"
    if cuts == "balanced":
        cuts = balanced_cuts(layers, images, case.num_stages).cuts
    pipe = Pipeline(
        layers,
        loss=softmax_cross_entropy,
        optimizer=plain.optimizer(),
        method=methods.fdg(plain.BETA, case.policy) if case.num_stages > 1 else methods.bp(),
        num_stages=case.num_stages,
        cuts=cuts,
        engine=case.engine,
    )
    state = pipe.init(jax.random.key(0), images)

    def run(num_batches: int) -> None:
        nonlocal state
        state, metrics = pipe.run(state, feed, num_batches)
        jax.block_until_ready((jax.tree.leaves(state), metrics))

    return run, {"cuts": list(pipe.cuts), "layers": len(layers)}


def start(args: argparse.Namespace, network: str, name: str, memory: str, cuts: Any = None) -> Side:
    """The process of a side, warmed up."""
    spec = {key: getattr(args, key) for key in ("batch_size", "batches", "images", "side")}
    spec |= {"network": network, "case": vars(CASES[name]), "cuts": cuts}
    command = [sys.executable, "-m", "benchmarks.speed", "--work", json.dumps(spec)]
    side = Side(name, command, {SWITCH: "1" if memory == KEPT else "0"})
    if memory == KEPT and not side.about["kept"]:
        side.close()
        raise RuntimeError("freed memory is not kept here (it wants glibc): add --memory 'given back'")
    return side


def fastest_cuts(args: argparse.Namespace, network: str, memory: str) -> tuple[list[int], dict[str, float]]:
    """The cut of FDG over two stages, of the balanced one, its neighbours and the published one; seconds of each."""
    sides = [start(args, network, FDG, memory, "balanced")]
    try:
        (cut,), layers = sides[0].about["cuts"], sides[0].about["layers"]
        others = {cut - 1, cut + 1, *plain.published_cuts(network, 2)} - {0, cut, layers}
        sides += [start(args, network, FDG, memory, [other]) for other in sorted(others)]
        rounds(sides, args.batches, args.rounds)
    finally:
        for side in sides:
            side.close()
    best = min(sides, key=lambda side: side.median)
    return best.about["cuts"], {str(side.about["cuts"]): side.median for side in sides}


def compare(args: argparse.Namespace, network: str, pairs: Sequence[tuple[str, str]], cuts: list[int]) -> list[Side]:
    """Sides by name and way with memory, in one interleaved run."""
    sides = []
    try:
        for name, memory in pairs:
            sides.append(start(args, network, name, memory, cuts if name == FDG else None))
        rounds(sides, args.batches, args.rounds)
    finally:
        for side in sides:
            side.close()
    return sides


def described(side: Side) -> dict[str, Any]:
    """Of a side, as JSON: seconds a batch of every turn, and what the process needed."""
    return {
        "median_s": side.median,
        "seconds": side.times(),
        "cores": float(np.median(side.times("cores"))),
        "faults": float(np.median(side.times("faults"))),
        "rss_mib": [side.turns[0]["rss_mib"], side.turns[-1]["rss_mib"]],
        "idle_cores": side.idle_cpu_s / side.idle_s if side.idle_s else 0.0,
        **side.about,
    }


def lines(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """What is asked of the sides of one run."""
    by_name = {side.name: side for side in sides}
    asked = [line for line in LINES if {line.above, line.below} <= set(by_name)]
    return [{**vars(line), **ratio(by_name[line.above], by_name[line.below])} for line in asked]


def show(console: Console, title: str, sides: Sequence[Side]) -> None:
    """A table with a line a side; RSS is that after its first and its last turn."""
    table = Table(box=None, title=title)
    for heading in ("", "ms/batch", "cores", "faults/batch", "RSS, MiB"):
        table.add_column(heading, no_wrap=True)
    for side in sides:
        about = described(side)
        name = f"{side.name}, cut {about['cuts']}" if side.name == FDG else side.name
        first, last = about["rss_mib"]
        row = [f"{1e3 * about['median_s']:,.1f}", f"{about['cores']:.2f}", f"{about['faults']:,.0f}"]
        table.add_row(name, *row, f"{first:,.0f} - {last:,.0f}")
    console.print(table)
    if busy := [side.name for side in sides if described(side)["idle_cores"] > 0.02]:
        console.print(f"not idle between their turns, which disturbs the others: {', '.join(busy)}", soft_wrap=True)


def show_line(console: Console, line: dict[str, Any]) -> None:
    """One line: what is compared, the ratio, of single rounds the least and the greatest, what is wanted."""
    wanted = ""
    if line["at_most"]:
        wanted = f"; wanted at most {line['at_most']:.2f}: {'yes' if line['ratio'] <= line['at_most'] else 'NO'}"
    number = f"{line['target']}." if line["target"] else "  "
    spread = f"{line['least']:.3f} to {line['greatest']:.3f}"
    text = f"{number} {line['above']} / {line['below']}: {line['ratio']:.3f} ({spread}){wanted}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def measure(args: argparse.Namespace, network: str, console: Console) -> dict[str, Any]:
    """All of one network, shown and as JSON."""
    result: dict[str, Any] = {}
    cuts: list[int] = []
    if FDG in args.sides:
        cuts, result["cuts_tried"] = fastest_cuts(args, network, args.memory[0])
        tried = ", ".join(f"{cut} {1e3 * seconds:.1f}" for cut, seconds in result["cuts_tried"].items())
        console.print(f"{network}: ms a batch of FDG K=2 by cut: {tried}", highlight=False, soft_wrap=True)
    for memory in args.memory:
        result[memory] = []
        for group in GROUPS:
            asked = [(name, memory) for name in group if name in args.sides]
            if len(asked) > 1:
                sides = compare(args, network, asked, cuts)
                found = lines(sides)
                show(console, f"{network}, freed memory {memory}", sides)
                for line in found:
                    show_line(console, line)
                result[memory].append({"sides": {side.name: described(side) for side in sides}, "lines": found})
    if len(args.memory) == 2:
        result["allocator"] = [both_ways(args, network, name, cuts) for name in BOTH_WAYS if name in args.sides]
        for line in result["allocator"]:
            show_line(console, line)
    return result


def both_ways(args: argparse.Namespace, network: str, name: str, cuts: list[int]) -> dict[str, Any]:
    """A side with kept memory against itself without."""
    sides = compare(args, network, [(name, memory) for memory in (KEPT, GIVEN_BACK)], cuts)
    about = {"target": None, "above": f"{name}, freed memory {KEPT}", "below": GIVEN_BACK, "at_most": None}
    return {**about, **ratio(*sides), "sides": [described(side) for side in sides]}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--networks", nargs="+", choices=plain.NETWORKS, default=["resnet20", "wrn16_4"], help="%(default)s")
    add("--sides", nargs="+", choices=CASES, default=list(CASES), help="all")
    add("--memory", nargs="+", choices=(KEPT, GIVEN_BACK), default=[KEPT, GIVEN_BACK], help="both ways")
    add("--batch_size", type=int, default=128, help="images a batch (%(default)s)")
    add("--batches", type=int, default=8, help="a turn (%(default)s)")
    add("--rounds", type=int, default=7, help="in which every side takes its turn (%(default)s)")
    add("--images", type=int, default=4096, help="that live on the device (%(default)s)")
    add("--side", type=int, default=plain.SIDE, help="pixels of a side of an image (%(default)s)")
    add("--only_turns", action="store_true", help=f"leave out {', '.join(OTHERS.values())}, which take no turns")
    add("--out", type=Path, default=RESULTS / "speed.json", help="where the result goes as JSON (%(default)s)")
    add("--work", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 it was measured, 130 Ctrl-C."""
    args, console = parse(argv), Console()
    if args.work:
        work(args.work)
        return 0
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        console.print(f"the load is {load:.1f} already: the figures will not be right", highlight=False)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    results: dict[str, Any] = {"settings": {**vars(args), "out": str(args.out)}, "jax": jax.__version__, **machine}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for network in args.networks:
            results[network] = measure(args, network, console)
            args.out.write_text(json.dumps(results) + "\n")
        for target, name in OTHERS.items() if not args.only_turns else ():
            console.print(f"{target}. python -m benchmarks.{name}", highlight=False)
            path = args.out.with_name(f"{args.out.stem}_{name}.json").absolute()
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--out", str(path)], cwd=ROOT, check=False)
            results[name] = json.loads(path.read_text()) if path.exists() else None
            args.out.write_text(json.dumps(results) + "\n")
    except KeyboardInterrupt:
        return 130
    console.print(f"written to {args.out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
