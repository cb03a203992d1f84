"""When each stage does what: a schedule is a small table of integers, and no arrays appear here.

A *tick* is a row of the schedule's picture, a *visit* is what one stage does in one tick. `Slot(kind, offset)` says
that a stage performs `kind` for batch i in tick `i * period + offset`; a stage's slots stand in the order in which they
run where several fall into one visit. A message sent in tick t can be read from tick t + 1 on.

`row`, and `unroll` which goes from row to row, are the only reading of that table: engines, `validate`, `show`,
`delay`, `staleness` and `depth` all use them. Letters: K stages, k = 0..K-1 from the input (papers count 1..K), i a
batch, t a tick.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fdg_jax.names import check_name

FORWARD, BACKWARD, UPDATE = "F", "B", "U"
KINDS = (FORWARD, BACKWARD, UPDATE)
ORDERS = ("update_first", "forward_first")


class Slot(NamedTuple):
    """Batch i has its `kind` (F forward, B backward, U update) in tick `i * period + offset`."""

    kind: str
    offset: int


class Op(NamedTuple):
    """One operation on one batch, as an engine meets it."""

    kind: str
    batch: int

    def __str__(self) -> str:
        return UPDATE if self.kind == UPDATE else f"{self.kind}{self.batch}"


Visit = tuple[Op, ...]
Row = tuple[Visit, ...]


@dataclass(frozen=True)
class Schedule:
    """A schedule for `num_stages` stages: one batch enters every `period` ticks, `stages[k]` lists stage k's slots."""

    name: str
    period: int
    stages: tuple[tuple[Slot, ...], ...]

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def span(self) -> int:
        """Ticks from a batch's first operation to its last, both counted."""
        return 1 + max(slot.offset for slots in self.stages for slot in slots)


def bp(num_stages: int) -> Schedule:
    """Backpropagation: a batch travels down and back up before the next one enters; one stage works at a time."""
    last = _last_stage(num_stages)
    stages = [(Slot("F", k), Slot("B", 2 * last - k), Slot("U", 2 * last - k)) for k in range(num_stages)]
    return Schedule("bp", 2 * last + 1, tuple(stages))


def fdg(num_stages: int, order: str = "update_first") -> Schedule:
    """Fully decoupled learning with delayed gradients (Zhuang et al., Algorithm 1): every stage works in every tick.

    In tick t the last stage does forward, backward and update of batch t - (K-1), and stage k < K-1 answers batch
    t - 2(K-1) + k and forwards batch t - k: D_k = 2(K-1-k) ticks.

    Args:
        num_stages: K >= 1.
        order: "update_first" (the paper's) gives a staleness of max(0, D_k - 1) updates; "forward_first" forwards on
            the weights from before the update and gives D_k.
    """
    last = _last_stage(num_stages)
    check_name("order", order, ORDERS)
    stages = []
    for k in range(last):
        forward = Slot("F", k)
        answer = (Slot("B", 2 * last - k), Slot("U", 2 * last - k))
        stages.append((*answer, forward) if order == "update_first" else (forward, *answer))
    stages.append((Slot("F", last), Slot("B", last), Slot("U", last)))
    return Schedule("fdg", 1, tuple(stages))


def _last_stage(num_stages: int) -> int:
    if num_stages < 1:
        raise ValueError(f"a schedule needs at least one stage; got num_stages={num_stages}")
    return num_stages - 1


def row(schedule: Schedule, tick: int, num_batches: int | None = None) -> Row:
    """What every stage does in `tick`, of the batches 0 .. num_batches-1 (all batches when None)."""

    def visit(slots: tuple[Slot, ...]) -> Visit:
        ops = []
        for kind, offset in slots:
            batch, phase = divmod(tick - offset, schedule.period)
            if phase == 0 and batch >= 0 and (num_batches is None or batch < num_batches):
                ops.append(Op(kind, batch))
        return tuple(ops)

    return tuple(visit(slots) for slots in schedule.stages)


def unroll(schedule: Schedule, num_batches: int | None = None) -> Iterator[Row]:
    """The schedule's rows from tick 0 until `num_batches` batches are answered (for ever when None)."""
    if num_batches is None:
        return (row(schedule, tick) for tick in itertools.count())
    return (row(schedule, tick, num_batches) for tick in range(num_ticks(schedule, num_batches)))


def num_ticks(schedule: Schedule, num_batches: int) -> int:
    """Ticks until `num_batches` batches are answered, from an empty pipeline to an empty one."""
    return (num_batches - 1) * schedule.period + schedule.span if num_batches else 0


def tick_of(schedule: Schedule, k: int, op: Op) -> int:
    """The tick in which stage k performs `op`, counted from the one in which batch 0 enters."""
    return op.batch * schedule.period + dict(schedule.stages[k])[op.kind]


def validate(schedule: Schedule) -> None:
    """Checks that every operation finds its input, and that every batch is answered exactly once by every stage.

    Raises:
        ValueError: naming the stage, the operation and the tick.
    """
    last = schedule.num_stages - 1
    num_batches = schedule.span + 2  # enough for the steady state to appear between filling and draining
    done: dict[tuple[int, Op], int] = {}
    for tick, stages in enumerate(unroll(schedule, num_batches)):
        for k, visit in enumerate(stages):
            for op in visit:
                where = f"{schedule.name}: stage {k} runs {op.kind}{op.batch} in tick {tick}"
                if (k, op) in done:
                    raise ValueError(f"{where}, and did so before in tick {done[k, op]}")
                for source, needed in _inputs(op, k, last):
                    ready = done.get((source, needed), tick + 1) + (source != k)
                    if ready > tick:
                        raise ValueError(f"{where}, before stage {source}'s {needed.kind}{needed.batch} can be read")
                done[k, op] = tick
    for k, kind, batch in itertools.product(range(last + 1), KINDS, range(num_batches)):
        if (k, Op(kind, batch)) not in done:
            raise ValueError(f"{schedule.name}: stage {k} never runs {kind}{batch}")


def _inputs(op: Op, k: int, last: int) -> list[tuple[int, Op]]:
    """The operations, as (stage, op), whose results `op` reads on stage k."""
    forward, backward = Op(FORWARD, op.batch), Op(BACKWARD, op.batch)
    if op.kind == FORWARD:
        return [(k - 1, forward)] if k > 0 else []
    if op.kind == BACKWARD:
        return [(k, forward)] + ([(k + 1, backward)] if k < last else [])
    return [(k, backward)]


def show(schedule: Schedule, ticks: int, num_batches: int | None = None) -> str:
    """The schedule's picture: rows are ticks, columns stages, a cell the operations of one visit in order."""
    rows = itertools.islice(unroll(schedule, num_batches), ticks)
    cells = [[" ".join(map(str, visit)) for visit in stages] for stages in rows]
    heads = [f"stage {k}" for k in range(schedule.num_stages)]
    width = max(len(text) for texts in [heads, *cells] for text in texts) + 5
    lines = ["tick  " + "".join(head.ljust(width) for head in heads)]
    lines += [f"{t:2d}".ljust(6) + "".join(cell.ljust(width) for cell in line) for t, line in enumerate(cells)]
    return "\n".join(line.rstrip() for line in lines)


def delay(schedule: Schedule) -> tuple[int, ...]:
    """D_k: ticks between a batch's forward and its backward, per stage."""
    return tuple(life[-1][0] - life[0][0] for life in _lives(schedule))


def staleness(schedule: Schedule) -> tuple[int, ...]:
    """tau_k: updates of stage k's weights between a batch's forward and its backward, in the steady state."""
    return tuple(sum(op.kind == UPDATE for _, op in life) for life in _lives(schedule))


def depth(schedule: Schedule) -> tuple[int, ...]:
    """Memos that stage k holds at most, the one at work included: forwards up to the backward of the first of them."""
    return tuple(sum(op.kind == FORWARD for _, op in life) for life in _lives(schedule))


def _lives(schedule: Schedule) -> list[list[tuple[int, Op]]]:
    """Per stage, its operations with their ticks from the forward of a batch in the steady state to its backward."""
    batch = schedule.span
    rows = list(unroll(schedule, 2 * batch + 1))
    lives = []
    for k in range(schedule.num_stages):
        ops = [(tick, op) for tick, stages in enumerate(rows) for op in stages[k]]
        place = {op: n for n, (_, op) in enumerate(ops)}
        lives.append(ops[place[Op(FORWARD, batch)] : place[Op(BACKWARD, batch)] + 1])
    return lives
