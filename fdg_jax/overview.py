"""What a pipeline is about to do, before it does it: the text of `Pipeline.show()`."""

from collections.abc import Sequence
from itertools import groupby, islice, pairwise

import jax

from fdg_jax.forecast import Forecast
from fdg_jax.methods import Method
from fdg_jax.schedule import Schedule, delay, picture
from fdg_jax.stage import Layer


def overview(
    method: Method,
    schedule: Schedule,
    layers: Sequence[Layer],
    bounds: Sequence[int],
    devices: Sequence[jax.Device],
    forecasts: Sequence[Forecast] | None,
    added: Sequence[int] | None,
    ticks: int,
) -> str:
    """The method in a line, the schedule's picture for some ticks, and two tables with a line a stage.

    Args:
        method, schedule: of the pipeline.
        layers: of the network.
        bounds: number of the first layer of every stage, then the number of layers.
        devices: of every stage.
        forecasts: of every stage, None before the shapes are known.
        added: parameters of heads or synthesisers, likewise.
        ticks: rows of the picture.
    """
    rows = islice(method.rows(schedule), ticks)
    parts = [f"{method}, {schedule.num_stages} stages", picture(rows, schedule.num_stages)]
    adds = method.head is not None or method.synthesiser is not None
    heads = ("stage", "layers", "", "parameters", *(["added"] if adds else []), "delay", "staleness", "device")
    table: list[tuple[str, ...]] = [heads]
    for k, (start, stop) in enumerate(pairwise(bounds)):
        own = layers[start:stop]
        counts = [layer.num_params for layer in own if layer.num_params is not None]
        table.append(
            (
                str(k),
                f"{start}-{stop - 1}" if stop - start > 1 else str(start),
                named(own),
                f"{sum(counts):,}" if len(counts) == len(own) else "at init",
                *(["at init" if added is None else f"{added[k]:,}"] if adds else []),
                counted(delay(schedule)[k], "tick"),
                counted(method.staleness(schedule)[k], "update"),
                f"{devices[k].platform}:{devices[k].id}",
            )
        )
    parts.append(columns(table))
    if len(set(devices)) < len(devices):
        parts.append(f"{len(devices)} stages share {len(set(devices))} device(s)")
    if forecasts:
        kinds = ("stage", "weights", "optimizer", "old weights", "memos", "messages", "total MiB", "peak MiB")
        memory: list[tuple[str, ...]] = [kinds]
        for k, f in enumerate(forecasts):
            memory.append(
                (
                    str(k),
                    *(_mib(size) for size in (f.weights, f.optimizer, f.old_weights)),
                    f"{f.num_memos} x {_mib(f.memos // max(1, f.num_memos))}",
                    *(_mib(size) for size in (f.messages, f.total, f.peak)),
                )
            )
        parts.append(columns(memory))
    return "\n\n".join(parts)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def named(layers: Sequence[Layer]) -> str:
    """Of a stage: "Conv, 2 x Block"."""
    runs = [(name, len(list(run))) for name, run in groupby(layer.name for layer in layers)]
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in runs)


def counted(number: int, noun: str) -> str:
    """`1 tick`, `2 ticks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def columns(table: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)
