"""The speed-ups to expect of WRN-28-10 over K devices, planned from its arithmetic, beside the published ones.

    python -m benchmarks.predicted

Nothing is run or compiled. A stage's seconds are its share of the multiplications of BP, which in the published table
takes 219.1 s an epoch on one GPU (391 batches of 128); a backward is two forwards, but one in the first layer, where
nobody asks for the gradient of the images. The cuts are the published ones for K = 2, 3, 4, and balanced by the same
arithmetic for K = 8. `fdg_jax.timeline` plans FDG, GPipe of four micro-batches and DDG on that, the last as our engine
runs it and with its forward lock, which the published code has; the published times are those of the README of
ZHUANGHP/FDG. What the arithmetic does not know: how fast a device is at which shape,
normalisation, the host, and that the stride of that code's blocks is in their second convolution, which makes the first
block of two groups dearer. Links cost nothing unless told.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from fdg_jax import schedule as schedules
from fdg_jax.models import wrn
from fdg_jax.models.cuts import published_cuts
from fdg_jax.partition import even_cuts
from fdg_jax.timeline import Link, StageCost, steady

RESULTS = Path(__file__).parent / "results"
BATCH = 128
BATCHES = 391  # an epoch of 50,000 images
PUBLISHED = {  # seconds an epoch, by K (the code's README, table of times, WRN-28-10)
    "bp": {1: 219.1},
    "fdg": {2: 118.3, 3: 89.6, 4: 74.1},
    "ddg": {2: 160.3, 3: 139.3, 4: 133.9},
}
MICRO = 4  # micro-batches of GPipe


def forward_flops(depth: int = 28, width: int = 10) -> tuple[list[float], list[int]]:
    """Of every layer of a WRN, for one CIFAR image: operations of its forward, and numbers in its output.

    A weight of a kernel is multiplied and added once for every pixel of the layer's output: in a block of this network
    all convolutions have that resolution.
    """
    flops, outputs, shape = [], [], jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    for layer in nnx.eval_shape(lambda: wrn(depth, width=width, rngs=nnx.Rngs(0))):
        graph, state = nnx.split(layer)
        shape = jax.eval_shape(partial(apply, graph), state, shape)
        kernels = [leaf.size for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)) if leaf.ndim > 1]
        flops.append(2.0 * math.prod(shape.shape[1:-1]) * sum(kernels))
        outputs.append(shape.size)
    return flops, outputs


def apply(graph: nnx.GraphDef, state: nnx.State, inputs: jax.Array) -> jax.Array:
    """What a module makes of its inputs."""
    return nnx.merge(graph, state)(inputs)


def stage_costs(flops: Sequence[float], outputs: Sequence[int], cuts: Sequence[int]) -> list[StageCost]:
    """Of a batch on every stage: seconds such that all together take those of the published BP, bytes of float32."""
    backward = [flops[0], *(2 * count for count in flops[1:])]
    scale = PUBLISHED["bp"][1] / BATCHES / (sum(flops) + sum(backward))
    return [
        StageCost(
            forward=scale * sum(flops[start:stop]),
            backward=scale * sum(backward[start:stop]),
            activations=4.0 * BATCH * outputs[stop - 1],
            cotangents=4.0 * BATCH * outputs[start - 1] if start else 0.0,
        )
        for start, stop in pairwise((0, *cuts, len(flops)))
    ]


def divided(cost: StageCost, parts: int) -> StageCost:
    """The cost of a part of the batch."""
    return StageCost(*(value / parts for value in vars(cost).values()))


def predict(flops: Sequence[float], outputs: Sequence[int], num_stages: int, link: Link) -> dict:
    """Planned and published speed-ups over one device for K stages; idle shares are those of FDG."""
    per_layer = [3 * count for count in flops]
    cuts = published_cuts("wrn", 28, 10, num_stages) if num_stages <= 4 else even_cuts(per_layer, num_stages)
    costs = stage_costs(flops, outputs, cuts)
    fdg, ddg = (steady(make(num_stages), costs, link) for make in (schedules.fdg, schedules.ddg))
    locked = steady(schedules.ddg(num_stages), costs, link, barrier=True)
    gpipe = steady(schedules.gpipe(num_stages, MICRO), [divided(cost, MICRO) for cost in costs], link)
    published = {
        f"published_{name}": PUBLISHED["bp"][1] / PUBLISHED[name][num_stages] if num_stages in PUBLISHED[name] else None
        for name in ("fdg", "ddg")
    }
    return {
        "cuts": cuts,
        "fdg": fdg.speed_up,
        "published_fdg": published["published_fdg"],
        "fdg_s_an_epoch": BATCHES * fdg.batch_seconds,
        "fdg_idle": fdg.idle,
        "fdg_in_flight": fdg.in_flight,
        "gpipe": gpipe.speed_up,
        "ddg": ddg.speed_up,
        "ddg_locked": locked.speed_up,
        "published_ddg": published["published_ddg"],
    }


def show(results: dict[int, dict], console: Console) -> None:
    """A column for every K."""
    table = Table("WRN-28-10", *(f"K = {num_stages}" for num_stages in results), box=None)
    for key in next(iter(results.values())):
        table.add_row(key.replace("_", " "), *(_text(result[key]) for result in results.values()))
    console.print(table)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predicted", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--stages", type=int, nargs="+", default=[2, 3, 4, 8], help="numbers of stages (2 3 4 8)")
    add("--latency", type=float, default=0.0, help="seconds, of a link (0)")
    add("--bandwidth", type=float, default=math.inf, help="bytes a second, of a link (infinite)")
    add("--out", type=Path, default=RESULTS / "predicted.json", help="where the result goes as JSON (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: it was planned."""
    args, console = parse(argv), Console()
    plan_one = partial(predict, *forward_flops(), link=Link(args.latency, args.bandwidth))
    results = {num_stages: plan_one(num_stages) for num_stages in args.stages}
    show(results, console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results) + "\n")
    console.print(f"written to {args.out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
