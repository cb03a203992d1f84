"""What a pipeline is about to do, before it does it: the text of `Pipeline.show()` and the memory forecast in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import jax

from fdg_jax.engine.base import Plan, StageState
from fdg_jax.engine.worker import Worker
from fdg_jax.methods import Method
from fdg_jax.schedule import BACKWARD, FORWARD, SYNTHESIS, UPDATE, Schedule, Visit, delay, row, show, staleness
from fdg_jax.stage import Layer


@dataclass(frozen=True)
class Forecast:
    """Bytes of the arrays alive on a stage's device in the steady state.

    `total` is what the stage holds after one tick and before the next. During a visit there is more, at most `peak`:
    what arrives and what is made, until what it replaces is let go. XLA's scratch inside a program (gradients,
    activations on their way) is no array and in neither; `benchmarks.memory` reads it off the compiled programs. The
    figures are those of the engine `mpmd`, and of `fused` between its calls: during one it holds memos, and old weights
    under stash, about twice.
    """

    weights: int
    optimizer: int  # and gradients that are accumulated
    old_weights: int  # which forwards still use, or memos under stash; today's not counted
    memos: int  # activations of all memos in flight
    num_memos: int
    messages: int  # sent in the last tick, but for activations that a memo holds too
    visit: int  # what a visit adds

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.old_weights + self.memos + self.messages

    @property
    def peak(self) -> int:
        return self.total + self.visit


def forecast(plan: Plan, k: int, own: StageState, worker: Worker | None) -> Forecast:
    """The forecast of stage k; one that answers in the visit of the forward keeps no memo and needs no worker."""
    ticks = _steady(plan.schedule, k)
    num_memos = max(memos for _, memos in ticks)
    sizes = _sizes(plan, k, worker if num_memos else None)
    weights, state, optimizer = (num_bytes(tree) for tree in (own.params, own.state, own.opt_state))
    added = own.synthesis[:2], own.synthesis[2:]  # parameters and state, and the optimizer's
    # What may live on in a memo is replaced and not overwritten, and for a moment there are two.
    replaced = {FORWARD: state, UPDATE: weights if worker and not worker.todays_weights else 0}
    most = max(sizes.held(visit, memos) for visit, memos in ticks)
    peak = max(
        sizes.held(*before) + sizes.added(visit) + sum(replaced.get(kind, 0) for kind, _ in visit)
        for before, (visit, _) in pairwise(ticks)
    )
    return Forecast(
        weights + state + num_bytes(added[0]),
        optimizer + num_bytes(added[1]),
        old_weights=sizes.old_weights * staleness(plan.schedule)[k],
        memos=num_memos * sizes.memo,
        num_memos=num_memos,
        messages=most - num_memos * sizes.memo,
        visit=max(0, peak - most),
    )


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what one batch brings to a stage and takes from it."""

    inputs: int
    outputs: int  # and their cotangents
    sent_back: int  # cotangents of the inputs
    saved: int  # for a memo, by the forward
    memo: int  # with the inputs and outputs that it refers to, weights aside
    shared: int  # outputs that it refers to
    old_weights: int  # that it refers to

    def held(self, visit: Visit, memos: int) -> int:
        """After a visit: memos, and what it sends."""
        kinds = [kind for kind, _ in visit]
        sent = kinds.count(FORWARD) * (self.outputs - self.shared) + kinds.count(BACKWARD) * self.sent_back
        return memos * self.memo + sent

    def added(self, visit: Visit) -> int:
        """During a visit: what arrives and what is made; a memo made takes the place of the one answered, if any is."""
        kinds = [kind for kind, _ in visit]
        forward, backward = kinds.count(FORWARD), kinds.count(BACKWARD)
        messages = forward * (self.inputs + self.outputs) + backward * (self.outputs + self.sent_back)
        messages += kinds.count(SYNTHESIS) * self.outputs
        return messages + max(0, forward - backward) * self.saved


def _sizes(plan: Plan, k: int, worker: Worker | None) -> _Sizes:
    """Of stage k, without memos where there is no worker."""
    held = list(zip(worker.trace.held, worker.trace.held_shapes, strict=True)) if worker else []
    of = {tree: num_bytes([shape for source, shape in held if source.tree == tree]) for tree in ("params", "outputs")}
    saved = num_bytes(worker.trace.saved) if worker else 0
    inputs, outputs = num_bytes(plan.shapes[k]), num_bytes(plan.shapes[k + 1]) if k < plan.last else 0
    sent_back = inputs if k > 0 and plan.schedule.sends_back else 0
    if plan.synthesiser(k):  # it keeps what it puts out
        return _Sizes(inputs, outputs, sent_back, saved=0, memo=outputs, shared=outputs, old_weights=0)
    return _Sizes(
        inputs,
        outputs,
        sent_back,
        saved=saved,
        memo=saved + num_bytes([shape for _, shape in held]) - of["params"],
        shared=of["outputs"],
        old_weights=of["params"],
    )


def _steady(schedule: Schedule, k: int) -> list[tuple[Visit, int]]:
    """Stage k's visits in a period of the steady state and in the tick before, and the memos in flight after each."""
    ticks, memos = [], 0
    for tick in range(2 * schedule.span + schedule.period):
        visit = row(schedule, tick)[k]
        kinds = [kind for kind, _ in visit]
        memos += kinds.count(FORWARD) - kinds.count(SYNTHESIS if schedule.synthesises(k) else BACKWARD)
        ticks.append((visit, memos))
    return ticks[-schedule.period - 1 :]


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
    parts.append(columns(table))
    if len(set(devices)) < len(devices):
        parts.append(f"{len(devices)} stages share {len(set(devices))} device(s)")
    if forecasts:
        heads = ("stage", "weights", "optimizer", "old weights", "memos", "messages", "total MiB", "peak MiB")
        memory: list[tuple[str, ...]] = [heads]
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


def columns(table: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)
