"""Ten thousand ticks leave memory as it was: on the host, and in JAX's arrays.

    python -m benchmarks.bounded

A tiny perceptron in three stages trains with FDG on both engines. Every tenth of the ticks, when all is done that was
asked for, three numbers are read: the arrays that JAX has alive and their bytes, which must stay exactly what they are,
and the resident memory of the process, which may move by what an allocator keeps in hand.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.interleaved import rss_mib
from benchmarks.speed import RESULTS
from fdg_jax import Pipeline, methods, models, optim, softmax_cross_entropy
from fdg_jax.data import digits

ENGINES = ("mpmd", "fused")
SAMPLES = 10


def measure(engine: str, num_ticks: int) -> list[dict[str, float]]:
    """What is alive after every tenth of the ticks, the pipeline full from the beginning."""
    layers = models.mlp(3, rngs=nnx.Rngs(0), width=16, num_classes=10, in_shape=(8, 8, 1))
    pipe = Pipeline(
        layers,
        loss=softmax_cross_entropy,
        optimizer=optim.sgd(0.01, 0.9),
        method=methods.fdg(0.5),
        num_stages=3,
        engine=engine,
    )
    source, size = digits(), 16
    state, feed = pipe.init(jax.random.key(0), source.batch(0, 0, size)[0]), source.feed(0, size)
    samples = []
    for number in range(SAMPLES + 1):
        state, metrics = pipe.run(state, feed, max(16, num_ticks // SAMPLES))
        jax.block_until_ready((state, metrics))
        assert metrics is not None
        del metrics
        arrays = jax.live_arrays()
        held = {"arrays": len(arrays), "bytes": sum(array.nbytes for array in arrays)}
        samples += [{"ticks": state.fed, **held, "rss_mib": rss_mib()}] if number else []  # the first one compiles
        del arrays
    return samples


def show(results: dict[str, list[dict[str, float]]], console: Console) -> bool:
    """All samples, and whether the arrays stayed as many and as large."""
    table = Table("engine", "ticks", "arrays", "MiB in arrays", "resident MiB", box=None)
    flat = True
    for engine, samples in results.items():
        for each in samples:
            row = f"{each['ticks']:,}", f"{each['arrays']}", f"{each['bytes'] / 2**20:.3f}", f"{each['rss_mib']:.1f}"
            table.add_row(engine, *row)
        flat &= len({(each["arrays"], each["bytes"]) for each in samples}) == 1
    console.print(table)
    console.print(f"arrays and their bytes {'are the same at every reading' if flat else 'GROW OR SHRINK'}")
    return flat


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bounded", description=__doc__.splitlines()[0])
    parser.add_argument("--ticks", type=int, default=10_000, help="%(default)s")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="both")
    parser.add_argument("--out", type=Path, default=RESULTS / "bounded.json", help="%(default)s")
    args = parser.parse_args(argv)
    results: dict[str, Any] = {engine: measure(engine, args.ticks) for engine in args.engines}
    flat = show(results, console := Console())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"written to {args.out}")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
