"""One GPU: our engines and PyTorch in turns, the host's share, and where the time goes in each stage.

    python -m benchmarks.gpu

Wants jax for the GPU, flax, optax and rich, and torch for the comparison with PyTorch, which is left out without it.
ResNet-20, ResNet-56 and WRN-28-10 in bfloat16 (parameters float32), batch 128, random images that live on the device.
Sides are processes that take turns (see `interleaved`); figures are ratios of medians:

8. images per second of BP and FDG on the fused engine against PyTorch's BP: the same network, channels last, bfloat16
   autocast, `torch.compile` in its default mode, and once more with its CUDA graphs ("reduce-overhead").
9. the engine of many devices with four stages on this one GPU against the fused one; and the host's time a tick, from
   the call to its return with a queue that is empty at first, against the time of a tick.
10. Per stage, in percent of the tick: *compute*, its program called alone on an idle device, from the return of the
   call until the result is there; *transfer*, what it reads of other devices moved alone; *dispatch*, the host's time
   of its jitted call; *imbalance*, what the slowest stage computes longer; *idle*, what is left of the tick. Stages
   that share a device work one after another: idle is then the device's, and imbalance what a stage would wait for on
   a device of its own.

First the losses of FDG over two stages are compared with those on the CPU in float32, batch by batch: at most 1e-3 off
in float32 at the highest precision, 0.1 in bfloat16. Without a GPU it says so, and ends; `--tiny` runs all of it on
what there is, with a network of seconds.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share the GPU

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import plain
from benchmarks.interleaved import ROOT, Side, ratio, rounds, serve
from fdg_jax import Pipeline, State, methods, softmax_cross_entropy

RESULTS = ROOT / "benchmarks" / "results"
BP, FDG2, FDG4, MPMD4 = "fused BP", "fused FDG K=2", "fused FDG K=4", "mpmd FDG K=4"
OURS = {BP: ("fused", 1), FDG2: ("fused", 2), FDG4: ("fused", 4), MPMD4: ("mpmd", 4)}
TORCH, GRAPHS = "PyTorch BP", "PyTorch BP, CUDA graphs"
TORCHS = {TORCH: "default", GRAPHS: "reduce-overhead"}
TINY = {"networks": ["resnet8"], "batch_size": 4, "images": 32, "pixels": 8, "batches": 2, "rounds": 1}
# target, above, below, at most, all of seconds a batch; None is not asked for
LINES = [
    (8, BP, TORCH, 1.0),
    (8, FDG2, BP, 1.10),
    (8, FDG4, BP, 1.10),
    (9, MPMD4, FDG4, 1.15),
    (None, BP, GRAPHS, None),
]
AHEAD = 6  # batches that the host sends without waiting; fewer than it may run ahead


class Training:
    """A pipeline at work on random images.

    Args:
        spec: network, batch_size, images, pixels; dtype.
        engine: of the pipeline.
        num_stages: K; 1 is BP.
        device: all that it may use; every device by default.
    """

    def __init__(self, spec: dict[str, Any], engine: str, num_stages: int, device: jax.Device | None = None):
        layers = plain.build(spec["network"], spec["dtype"], spec["pixels"])
        self.pipe = Pipeline(
            layers,
            loss=softmax_cross_entropy,
            optimizer=plain.optimizer(),
            method=methods.fdg(plain.BETA) if num_stages > 1 else methods.bp(),
            num_stages=num_stages,
            cuts=plain.published_cuts(spec["network"], num_stages) or "layers",
            engine=engine,
            devices=[device] if device else None,
        )
        source = plain.random_source(spec["images"], spec["pixels"])
        self.feed = source.placed(self.pipe.devices[0], self.pipe.devices[0]).feed(0, spec["batch_size"])
        shape = (spec["batch_size"], spec["pixels"], spec["pixels"], 3)
        self.state: State = self.pipe.init(jax.random.key(0), jax.ShapeDtypeStruct(shape, np.float32))
        self.num_stages = num_stages

    def send(self, num_batches: int) -> Any:
        """Trains on so many batches; their metrics. Does not wait."""
        self.state, metrics = self.pipe.run(self.state, self.feed, num_batches)
        return metrics

    def run(self, num_batches: int) -> None:
        """The same, and waits."""
        jax.block_until_ready((self.send(num_batches), jax.tree.leaves(self.state)))

    def warm_up(self, num_batches: int) -> None:
        """Fills the pipeline, and compiles what a full one runs."""
        for _ in range(2):
            self.run(max(num_batches, 4 * self.num_stages))

    def host_seconds(self) -> float:
        """A batch, of the host alone, whose queue is empty at first."""
        start = time.perf_counter()
        self.send(AHEAD)
        host = time.perf_counter() - start
        self.run(0)
        return host / AHEAD


def work_of_ours(spec: dict[str, Any]) -> None:
    """The process of one of `OURS`."""
    training = Training(spec, *OURS[spec["side"]])
    training.warm_up(spec["batches"])

    def run(num_batches: int) -> None:
        training.run(num_batches)

    num_params = sum(leaf.size for leaf in jax.tree.leaves(training.pipe.params(training.state)))
    host = [training.host_seconds() for _ in range(5)]
    serve(run, {"num_params": num_params, "cuts": training.pipe.cuts, "host_s": statistics.median(host)})


def work_of_torch(spec: dict[str, Any]) -> None:
    """The process of one of `TORCHS`."""
    from benchmarks import torch_models

    source = plain.random_source(spec["images"], spec["pixels"])
    data = source.train_images, source.train_labels
    mode = "" if spec["tiny"] else TORCHS[spec["side"]]
    loop = torch_models.Loop(spec["network"], *data, spec["batch_size"], mode)
    loop.run(max(spec["batches"], 10))
    serve(loop.run, {"num_params": loop.num_params})


def work_of_check(spec: dict[str, Any]) -> None:
    """The process that compares values: the greatest relative difference of a loss."""
    serve(lambda num_batches: None, check(spec))


def check(spec: dict[str, Any], num_batches: int = 6) -> dict[str, float]:
    """Of float32 and bfloat16 on the first device, against float32 on the CPU."""
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    spec = {**spec, "batch_size": min(16, spec["batch_size"])}

    def losses(dtype: str, device: jax.Device) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            training = Training({**spec, "dtype": dtype}, "fused", 2, device)
            metrics = training.send(num_batches)
            training.state, rest = training.pipe.drain(training.state)
        return np.array([*metrics["loss"], *(each["loss"] for each in rest)])

    right = losses("float32", cpu)
    return {dtype: float(np.max(np.abs(losses(dtype, device) / right - 1))) for dtype in ("float32", "bfloat16")}


def work_of_breakdown(spec: dict[str, Any]) -> None:
    """The process that says where the time goes."""
    serve(lambda num_batches: None, breakdown(spec))


def breakdown(spec: dict[str, Any], num_stages: int = 4, repeats: int = 5) -> dict[str, Any]:
    """Seconds of a tick, and of each stage in it; see the top."""
    training = Training(spec, "mpmd", num_stages)
    training.warm_up(spec["batches"])
    ticks = [_timed(lambda: training.run(spec["batches"])) / spec["batches"] for _ in range(repeats)]
    transfer = _transfers(training, repeats)
    compute, dispatch = _alone(training, repeats * 2)
    devices = [str(device) for device in training.pipe.devices]
    tick = statistics.median(ticks)
    return {"tick": tick, "devices": devices, "stages": shares(tick, compute, transfer, dispatch, devices)}


def shares(
    tick: float, compute: Sequence[float], transfer: Sequence[float], dispatch: Sequence[float], devices: Sequence[str]
) -> list[dict[str, float]]:
    """Percent of the tick, an entry a stage; arguments are seconds, by stage."""
    busy: dict[str, float] = defaultdict(float)
    for device, *seconds in zip(devices, compute, transfer, strict=True):
        busy[device] += sum(seconds)
    parts = []
    for k, device in enumerate(devices):
        waits = max(compute) - compute[k]
        alone = devices.count(device) == 1
        idle = tick - busy[device] - (waits if alone else 0)
        own = {"compute": compute[k], "transfer": transfer[k], "dispatch": dispatch[k], "imbalance": waits}
        parts.append({name: 100 * seconds / tick for name, seconds in {**own, "idle": idle}.items()})
    return parts


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _transfers(training: Training, repeats: int) -> list[float]:
    """Seconds to move what each stage reads in a tick, alone."""
    seconds = []
    for k, device in enumerate(training.pipe.devices):
        sent = [jax.tree.leaves(value) for (_, reader, _), value in training.state.outbox.items() if reader == k]
        values = [leaf for leaves in sent for leaf in leaves if leaf.devices() != {device}]
        move = lambda values=values, device=device: jax.block_until_ready(jax.device_put(values, device))  # noqa: E731
        seconds.append(statistics.median(_timed(move) for _ in range(repeats)))
    return seconds


def _alone(training: Training, num_batches: int) -> tuple[list[float], list[float]]:
    """Seconds of each stage's program on an idle device, and of the host for its call."""
    times: dict[int, list[tuple[float, float]]] = defaultdict(list)

    def waiting(call: Callable, k: int, *args: Any) -> Any:
        start = time.perf_counter()
        result = call(*args)
        called = time.perf_counter()
        jax.block_until_ready(result)
        times[k].append((time.perf_counter() - called, called - start))
        return result

    programs = list(training.pipe._engine.programs.items())  # type: ignore[union-attr]
    compiled = [program.compiled for _, program in programs]
    for (key, program), call in zip(programs, compiled, strict=True):
        program.compiled = partial(waiting, call, key[0])
    training.run(num_batches)
    for (_, program), call in zip(programs, compiled, strict=True):
        program.compiled = call
    compute, dispatch = zip(*(map(statistics.median, zip(*times[k], strict=True)) for k in sorted(times)), strict=True)
    return list(compute), list(dispatch)


WORK = {
    **dict.fromkeys(OURS, work_of_ours),
    **dict.fromkeys(TORCHS, work_of_torch),
    "check": work_of_check,
    "breakdown": work_of_breakdown,
}


def start(args: argparse.Namespace, network: str, name: str) -> Side:
    """The process of a side, warmed up."""
    spec = {key: getattr(args, key) for key in ("batch_size", "images", "pixels", "batches", "dtype", "tiny")}
    spec |= {"network": network, "side": name}
    return Side(name, [sys.executable, "-m", "benchmarks.gpu", "--work", json.dumps(spec)], {})


def ask(args: argparse.Namespace, network: str, name: str) -> dict[str, Any]:
    """What the process of a side says of itself, and no more."""
    side = start(args, network, name)
    side.close()
    return side.about


def measure(args: argparse.Namespace, network: str, console: Console) -> dict[str, Any]:
    """All of one network, shown and as JSON."""
    say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    check = ask(args, network, "check")
    right = check["float32"] <= 1e-3 and check["bfloat16"] <= 0.1
    say(f"{network}: losses off those of the CPU by at most {check}: {'as wanted' if right else 'TOO FAR'}")
    names = [*(TORCHS if args.torch else ()), *OURS]
    sides = []
    try:
        for name in names:
            sides.append(start(args, network, name))
        rounds(sides, args.batches, args.rounds)
    finally:
        for side in sides:
            side.close()
    if len(counts := {side.about["num_params"] for side in sides}) > 1:
        raise RuntimeError(f"{network} has {counts} parameters: the sides do not train the same network")
    show(console, network, sides, args.batch_size)
    found = lines(sides)
    for line in found:
        say(line["text"])
    result: dict[str, Any] = {"check": check, "lines": found, "sides": {side.name: described(side) for side in sides}}
    if network == args.networks[-1]:
        result["breakdown"] = ask(args, network, "breakdown")
        show_breakdown(console, network, result["breakdown"])
    return result


def described(side: Side) -> dict[str, Any]:
    """Of a side, as JSON."""
    return {"median_s": side.median, "seconds": side.times(), **side.about}


def lines(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """What is asked of the sides of a network, each with a line to print."""
    by_name, found = {side.name: side for side in sides}, []
    for target, above, below, at_most in LINES:
        if {above, below} <= set(by_name):
            found.append(_line(target, f"{above} / {below}", at_most, ratio(by_name[above], by_name[below])))
    if MPMD4 in by_name:
        share = by_name[MPMD4].about["host_s"] / by_name[MPMD4].median
        found.append(_line(9, f"host time of {MPMD4} / its tick", 0.25, {"ratio": share}))
    return found


def _line(target: int | None, name: str, at_most: float | None, figures: dict[str, float]) -> dict[str, Any]:
    value = figures["ratio"]
    spread = f" ({figures['least']:.3f} to {figures['greatest']:.3f})" if "least" in figures else ""
    wanted = f"; wanted at most {at_most:.2f}: {'yes' if value <= at_most else 'NO'}" if at_most else ""
    text = f"{f'{target}.' if target else '  '} {name}: {value:.3f}{spread}{wanted}"
    return {"target": target, "name": name, "at_most": at_most, **figures, "text": text}


def show(console: Console, network: str, sides: Sequence[Side], batch_size: int) -> None:
    """A table with a line a side."""
    table = Table("", "ms a batch", "images/s", "host ms a batch", box=None, title=network)
    for side in sides:
        host = f"{1e3 * side.about['host_s']:.2f}" if "host_s" in side.about else ""
        table.add_row(side.name, f"{1e3 * side.median:.2f}", f"{batch_size / side.median:,.0f}", host)
    console.print(table)


def show_breakdown(console: Console, network: str, result: dict[str, Any]) -> None:
    """A table with a line a stage."""
    title = f"10. {network}, FDG K=4, percent of a tick of {1e3 * result['tick']:.2f} ms"
    table = Table("stage", "device", *result["stages"][0], box=None, title=title)
    for k, (device, parts) in enumerate(zip(result["devices"], result["stages"], strict=True)):
        table.add_row(str(k), device, *(f"{percent:.1f}" for percent in parts.values()))
    console.print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; `--tiny` sets the sizes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    networks = ["resnet20", "resnet56", "wrn28_10"]
    add("--networks", nargs="+", choices=plain.NETWORKS, default=networks, help="%(default)s; the last is taken apart")
    add("--batch_size", type=int, default=128, help="images a batch (%(default)s)")
    add("--batches", type=int, default=50, help="a turn (%(default)s)")
    add("--rounds", type=int, default=7, help="in which every side takes its turn (%(default)s)")
    add("--images", type=int, default=50000, help="that live on the device (%(default)s)")
    add("--pixels", type=int, default=plain.SIDE, help="of a side of an image (%(default)s)")
    add("--dtype", default="bfloat16", help="of our computation (%(default)s)")
    add("--tiny", action="store_true", help="networks of seconds, on any device")
    add("--out", type=Path, default=RESULTS / "gpu.json", help="where the result goes as JSON (%(default)s)")
    add("--work", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    vars(args).update(TINY if args.tiny else {})
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 it was measured, or there is no GPU; 130 Ctrl-C."""
    args, console = parse(argv), Console()
    if args.work:
        WORK[args.work["side"]](args.work)
        return 0
    if jax.default_backend() == "cpu" and not args.tiny:
        console.print("there is no GPU that JAX can use: nothing is measured; --tiny tries the script on the CPU")
        return 0
    args.torch = find_spec("torch") is not None
    if not args.torch:
        console.print("torch is not installed: the comparison with PyTorch is left out")
    device = jax.devices()[0].device_kind
    results: dict[str, Any] = {"settings": {**vars(args), "out": str(args.out)}, "jax": jax.__version__, "on": device}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for network in args.networks:
            results[network] = measure(args, network, console)
            args.out.write_text(json.dumps(results) + "\n")
    except KeyboardInterrupt:
        return 130
    console.print(f"written to {args.out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
