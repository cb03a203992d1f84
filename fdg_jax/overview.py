"""What a pipeline is about to do, before it does it: the text of `Pipeline.show()` and the memory forecast in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import jax

from fdg_jax.engine.base import StageState
from fdg_jax.engine.worker import Worker
from fdg_jax.methods import Method
from fdg_jax.schedule import Schedule, delay, show, staleness
from fdg_jax.stage import Layer


@dataclass(frozen=True)
class Forecast:
    """Bytes that a stage holds between two ticks of the steady state."""

    weights: int
    optimizer: int
    old_weights: int  # kept for memos under stash, today's not counted
    memos: int  # activations of all memos in flight
    num_memos: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.old_weights + self.memos


def forecast(schedule: Schedule, k: int, own: StageState, worker: Worker | None) -> Forecast:
    """The forecast of stage k; a stage that answers in the visit of the forward keeps no memo and needs no worker."""
    memos = delay(schedule)[k]
    num_memos = -(-memos // schedule.period)
    weights, optimizer = num_bytes((own.params, own.state)), num_bytes(own.opt_state)
    if worker is None or num_memos == 0:
        return Forecast(weights, optimizer, 0, 0, 0)
    held = list(zip(worker.trace.held, worker.trace.held_shapes, strict=True))
    old = num_bytes([shape for source, shape in held if source.tree == "params"])
    kept = num_bytes([shape for source, shape in held if source.tree != "params"]) + num_bytes(worker.trace.saved)
    return Forecast(weights, optimizer, old * staleness(schedule)[k], kept * num_memos, num_memos)


def num_bytes(tree: Any) -> int:
    """Bytes of the arrays, or shapes, of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def overview(
    method: Method,
    schedule: Schedule,
    layers: Sequence[Layer],
    bounds: Sequence[int],
    devices: Sequence[jax.Device],
    forecasts: Sequence[Forecast] | None,
    ticks: int,
) -> str:
    """The method in a line, the schedule's picture for some ticks, and two tables with a line a stage.

    Args:
        method, schedule: of the pipeline.
        layers: of the network.
        bounds: number of the first layer of every stage, then the number of layers.
        devices: of every stage.
        forecasts: of every stage, None before the shapes are known.
        ticks: rows of the picture.
    """
    parts = [f"{method}, {schedule.num_stages} stages", show(schedule, ticks)]
    table: list[tuple[str, ...]] = [("stage", "layers", "", "parameters", "delay", "staleness", "device")]
    for k, (start, stop) in enumerate(pairwise(bounds)):
        own = layers[start:stop]
        names = [(name, len(list(run))) for name, run in groupby(layer.name for layer in own)]
        counts = [layer.num_params for layer in own if layer.num_params is not None]
        table.append(
            (
                str(k),
                f"{start}-{stop - 1}" if stop - start > 1 else str(start),
                ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names),
                f"{sum(counts):,}" if len(counts) == len(own) else "at init",
                f"{delay(schedule)[k]} ticks",
                f"{staleness(schedule)[k]} updates",
                f"{devices[k].platform}:{devices[k].id}",
            )
        )
    parts.append(_columns(table))
    if len(set(devices)) < len(devices):
        parts.append(f"{len(devices)} stages share {len(set(devices))} device(s)")
    if forecasts:
        memory: list[tuple[str, ...]] = [("stage", "weights", "optimizer", "old weights", "memos", "total MiB")]
        for k, f in enumerate(forecasts):
            memory.append(
                (
                    str(k),
                    *(_mib(size) for size in (f.weights, f.optimizer, f.old_weights)),
                    f"{f.num_memos} x {_mib(f.memos // max(1, f.num_memos))}",
                    _mib(f.total),
                )
            )
        parts.append(_columns(memory))
    return "\n\n".join(parts)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def _columns(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)
