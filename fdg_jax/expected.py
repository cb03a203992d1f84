"""The plan of a window of a run: what was to be expected of it, of costs that are measured or divided by arithmetic."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from fdg_jax import estimates
from fdg_jax.engine.base import PyTree
from fdg_jax.flops import backward_flops, layer_flops
from fdg_jax.pipeline import Pipeline
from fdg_jax.schedule import BACKWARD, FORWARD, SYNTHESIS, UPDATE, Op, Schedule, row
from fdg_jax.timeline import Box, Link, Message, StageCost, plan
from fdg_jax.trace import Timeline

KINDS = (FORWARD, BACKWARD, UPDATE, SYNTHESIS)
SETTLED = 64  # periods, after which a planned pipeline does in every one the same


def measured_costs(measured: Timeline, num_stages: int) -> list[StageCost]:
    """Seconds of every stage's operations and messages, from medians over its visits of equal operations.

    A visit is one program, so that only sums of its operations are known: these are met by least squares, with as many
    votes as there were visits. Where forward, backward and update are never seen apart, each gets a third of the
    visit. Messages count in seconds, for a link that moves one unit a second.
    """
    visits: dict[int, dict[tuple[str, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for box in measured.boxes:
        visits[box.stage][tuple(op.kind for op in box.ops)].append(box.end - box.start)
    moves: dict[tuple[int | None, int], list[float]] = defaultdict(list)
    for message in measured.messages:
        moves[message.sender, message.reader].append(message.arrived - message.sent)

    def cost(k: int) -> StageCost:
        forward, backward, update, synthesis = _least_squares(visits[k])
        down, up = (statistics.median(moves.get((k, reader)) or [0.0]) for reader in (k + 1, k - 1))
        return StageCost(forward, backward, update, down, up, synthesis)

    return [cost(k) for k in range(num_stages)]


def _least_squares(visits: dict[tuple[str, ...], list[float]]) -> list[float]:
    """Seconds of each of KINDS, none of them negative."""
    votes = np.sqrt([len(each) for each in visits.values()])
    counts = np.array([[kinds.count(kind) for kind in KINDS] for kinds in visits]).reshape(-1, len(KINDS))
    medians = np.array([statistics.median(each) for each in visits.values()])
    found, *_ = np.linalg.lstsq(votes[:, None] * counts, votes * medians, rcond=None)
    return [max(0.0, float(seconds)) for seconds in found]


def planned(
    schedule: Schedule, costs: Sequence[StageCost], devices: Sequence[int], first: Box, num_ticks: int
) -> Timeline:
    """What the schedule comes to in a window of ticks that begins with the one of a box, with its numbers of batches.

    A window late in a run is planned as the same one of a run that has gone on for SETTLED periods.
    """
    late = max(0, (first.tick - schedule.span) // schedule.period - SETTLED)
    begin = first.tick - late * schedule.period
    number = row(schedule, begin)[first.stage][0].batch  # of what the box bears as its first
    added = first.ops[0].batch - number
    messages: list[Message] = []
    boxes = plan(schedule, costs, None, Link(bandwidth=1.0), devices, messages=messages)
    until = list(takewhile(lambda box: box.tick < begin + num_ticks, boxes))
    inside = [box for box in until if box.tick >= begin]
    read = {(box.stage, op) for box in inside for op in box.ops}

    def numbered(op: Op) -> Op:
        return op._replace(batch=op.batch + added)

    return Timeline(
        "planned",
        tuple(box._replace(tick=box.tick + first.tick - begin, ops=tuple(map(numbered, box.ops))) for box in inside),
        tuple(m._replace(op=numbered(m.op)) for m in messages if (m.reader, m.op) in read),
        {box.device: box.end for box in until if box.tick < begin},
    ).shifted()


def follows(timeline: Timeline, schedule: Schedule) -> bool:
    """Whether every visit has the operations that the schedule has in its place."""
    return all(
        [op.kind for op in box.ops] == [op.kind for op in row(schedule, box.tick)[box.stage]] for box in timeline.boxes
    )


def divided_costs(pipe: Pipeline, images: PyTree, labels: PyTree, num_classes: int, seconds: float) -> list[StageCost]:
    """Of every stage, where only the seconds of a batch on one device are known: divided by operations.

    Args:
        pipe: after `init`.
        images, labels: shapes of a batch.
        num_classes: of the labels.
        seconds: of a batch, on all stages.
    """
    engine, forward = pipe._started(), layer_flops(pipe.layers, images)
    added = estimates.added_flops(pipe.method, engine, num_classes, labels)
    work = estimates.stage_costs(pipe, engine, forward, backward_flops(forward), added)
    whole = pipe.method.micro_batches * sum(each.forward + each.backward + each.synthesis for each in work)
    share = seconds / whole if whole else 0.0
    return [StageCost(share * each.forward, share * each.backward, synthesis=share * each.synthesis) for each in work]
