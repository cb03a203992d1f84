"""When each stage does what: a schedule is a small table of integers, and no arrays appear here.

A *tick* is a row of the schedule's picture, a *visit* is what one stage does in one tick. `Slot(kind, offset)` says
that a stage performs `kind` for batch i in tick `i * period + offset`; a stage's slots stand in the order in which they
run where several fall into one visit. A message sent in tick t can be read from tick t + 1 on.

Where a stage updates once for several of what travels through it, these form a *group* of M: the micro-batches of a
batch, or the batches whose gradients are accumulated. A group enters every `period` ticks, and
`Slot(kind, offset, micro)` stands for number g * M + micro in tick `g * period + offset`. An update carries
micro = M - 1 and applies what the backwards since the last update have accumulated. All numbers of batches below count
what travels, micro-batches where there are any.

`row`, and `unroll` which goes from row to row, are the only reading of that table: engines, `validate`, `show`,
`delay`, `staleness` and `depth` all use them. Letters: K stages, k = 0..K-1 from the input (papers count 1..K), i a
batch, t a tick, g a group, m = 0..M-1 the place in it. D_k and tau_k are the tick delay and the staleness of stage k.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from fdg_jax.names import check_name

FORWARD, BACKWARD, UPDATE, SYNTHESIS = "F", "B", "U", "S"
ORDERS = ("update_first", "forward_first")


class Slot(NamedTuple):
    """Batch g * M + micro has its `kind` in tick `g * period + offset`: F forward, B backward, U update, S synthesis.

    In S a stage that answers with predicted error gradients learns from the true one what it should have predicted.
    """

    kind: str
    offset: int
    micro: int = 0


class Op(NamedTuple):
    """One operation on one batch, as an engine meets it; an update bears the number of the last batch in it."""

    kind: str
    batch: int

    def __str__(self) -> str:
        return UPDATE if self.kind == UPDATE else f"{self.kind}{self.batch}"


Visit = tuple[Op, ...]
Row = tuple[Visit, ...]


@dataclass(frozen=True)
class Schedule:
    """A schedule for `num_stages` stages: a group enters every `period` ticks, `stages[k]` lists stage k's slots.

    Attributes:
        group: M, how many batches an update answers.
        local: a backward waits for no other stage; each has a loss, or a predicted error gradient, of its own.
        double_buffered: forwards of group g use the weights that the update of group g - 2 made, also where the one of
            group g - 1 is done by then: the whole group has one version, on every stage.
    """

    name: str
    period: int
    stages: tuple[tuple[Slot, ...], ...]
    group: int = 1
    local: bool = False
    double_buffered: bool = False

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def span(self) -> int:
        """Ticks from a group's first operation to its last, both counted."""
        return 1 + max(slot.offset for slots in self.stages for slot in slots)

    @property
    def sends_back(self) -> bool:
        """Whether backwards send error gradients: not where stages have losses of their own and learn no prediction."""
        return not self.local or any(map(self.synthesises, range(self.num_stages)))

    def synthesises(self, k: int) -> bool:
        """Whether stage k learns to predict its error gradients, and answers with the prediction."""
        return any(slot.kind == SYNTHESIS for slot in self.stages[k])


def bp(num_stages: int) -> Schedule:
    """Backpropagation: a batch travels down and back up before the next one enters; one stage works at a time."""
    last = _last_stage(num_stages)
    stages = [(Slot("F", k), Slot("B", 2 * last - k), Slot("U", 2 * last - k)) for k in range(num_stages)]
    return Schedule("bp", 2 * last + 1, tuple(stages))


def gpipe(num_stages: int, group: int) -> Schedule:
    """GPipe (Huang et al. 2019): all M forwards, all M backwards, one update, and the pipeline is empty again.

    D_k = 2(K-1-k) + M - 1 ticks, tau_k = 0: exact. A stage holds M memos. The paper draws the backwards in reverse
    order; here the first micro-batch goes first, as in `one_f_one_b`, so that both add up in the same order. The last
    stage has no forward to send on, and starts its backwards in the visit of its last forward, so that M = 1 is `bp`.
    """
    last, group = _last_stage(num_stages), _check_group(group)
    stages = [
        _slots([k + m for m in range(group)], [group - 1 + 2 * last - k + m for m in range(group)])
        for k in range(num_stages)
    ]
    return Schedule("gpipe", 2 * (last + group) - 1, tuple(stages), group)


def one_f_one_b(num_stages: int, group: int) -> Schedule:
    """1F1B with flush (Narayanan et al., PipeDream-Flush): after K - k forwards a stage takes turns, B F B F.

    tau_k = 0: exact. It lasts as long as `gpipe`, but a stage holds n = min(M, K - k) memos only, and D_k is
    2(K-1-k) + n - 1 ticks at most. The last stage does forward and backward in one visit. M = 1 is `bp`.
    """
    last, group = _last_stage(num_stages), _check_group(group)
    turn = min(2, num_stages)  # ticks from one backward of a stage to the next; a lone stage has none to wait for
    stages = []
    for k in range(num_stages):
        backwards = [2 * last - k + turn * m for m in range(group)]
        forwards = [k + m if m < num_stages - k else 2 * m + k - 1 for m in range(group)]
        stages.append(_slots(forwards if k < last else backwards, backwards))
    return Schedule("one_f_one_b", 2 * last + turn * (group - 1) + 1, tuple(stages), group)


def ddg(num_stages: int) -> Schedule:
    """Decoupled parallel backprop (Huo et al. 2018): forward through all stages, then all go backward at once.

    In the tick in which batch i reaches the last stage, stage k answers batch i - (K-1-k) and updates. D_k is K-1-k
    batches (of K ticks, plus K-1-k), tau_k = K-1-k. The period of K ticks is the forward lock, drawn as it is meant:
    the next batch enters when this one is through. What a stage does, in order, is what it does in `pipedream`; so the
    values are the same, and an engine whose stages wait for messages only is as fast.

    Features Replay (Huo et al. 2018) uses it too, and differs in the weights that answer.
    """
    last = _last_stage(num_stages)
    ends = [(last - k) * num_stages + last for k in range(num_stages)]
    stages = [(Slot("F", k), Slot("B", end), Slot("U", end)) for k, end in enumerate(ends)]
    return Schedule("ddg", num_stages, tuple(stages))


def pipedream(num_stages: int) -> Schedule:
    """1F1B without flush (PipeDream, Narayanan et al. 2019): every stage takes turns, F B F B, and never drains.

    D_k = 2(K-1-k) + 1 ticks, which is K-1-k batches, and 0 on the last stage, which does forward and backward in one
    visit; tau_k = K-1-k, with K - k batches in flight. K = 1 is `bp`.
    """
    return _turns("pipedream", num_stages, 1)


def pipedream_2bw(num_stages: int, group: int) -> Schedule:
    """1F1B without flush, an update every M micro-batches, two buffers of weights (Narayanan et al. 2021).

    W(g+1) = W(g) - lr * grad f(W(g-1)): D_k as in `pipedream`, tau_k = 1 on all stages, the last included.

    Raises:
        ValueError: M < K, for which two versions are too few.
    """
    schedule = _turns("pipedream_2bw", num_stages, group)
    if group < num_stages:
        raise ValueError(f"two buffers need a group of at least num_stages={num_stages} micro-batches; got {group}")
    return replace(schedule, double_buffered=True)


def local(num_stages: int) -> Schedule:
    """Local losses (DGL, Belilovsky et al. 2020): forward, backward, update in one visit.

    Stage k has batch t - k in tick t, and waits for no error gradient: D_k = tau_k = 0.
    """
    _last_stage(num_stages)
    return Schedule("local", 1, tuple(_slots([k], [k]) for k in range(num_stages)), local=True)


def dni(num_stages: int) -> Schedule:
    """Synthetic gradients (DNI, Jaderberg et al. 2017): `local`, and what a stage answered with is judged later.

    Stage k < K-1 answers batch t - k in tick t, by a prediction, and before that learns from the error gradient of
    batch t - k - 2, which stage k+1 found in tick t - 1. D_k = tau_k = 0; a stage keeps its outputs for two batches.
    """
    stages = local(num_stages).stages
    judged = [(Slot(SYNTHESIS, k + 2), *slots) for k, slots in enumerate(stages[:-1])]
    return Schedule("dni", 1, (*judged, stages[-1]), local=True)


def fdg(num_stages: int, order: str = "update_first") -> Schedule:
    """Fully decoupled learning with delayed gradients (Zhuang et al., Algorithm 1): every stage works in every tick.

    In tick t the last stage does forward, backward and update of batch t - (K-1), and stage k < K-1 answers batch
    t - 2(K-1) + k and forwards batch t - k: D_k = 2(K-1-k) ticks.

    Args:
        num_stages: K >= 1.
        order: "update_first" (the paper's) gives a staleness of max(0, D_k - 1) updates; "forward_first" forwards on
            the weights from before the update and gives D_k.
    """
    return replace(adl(num_stages, 1, order), name="fdg")


def adl(num_stages: int, group: int, order: str = "update_first") -> Schedule:
    """Accumulated decoupled learning (Zhuang et al. 2021): `fdg` with an update after every M backwards only.

    D_k = 2(K-1-k) ticks. tau_k depends on the batch's place in the group: D_k / M, rounded up for some and down for the
    others, with "forward_first" (the paper's table of staleness); (D_k - 1) / M likewise with "update_first", the
    default of the released code.
    """
    last, group = _last_stage(num_stages), _check_group(group)
    check_name("order", order, ORDERS)
    stages = []
    for k in range(num_stages):
        forwards = [k + m for m in range(group)]
        slots = _slots(forwards, [2 * last - k + m for m in range(group)])
        answers_first = order == "update_first" and k < last
        stages.append(slots[group:] + slots[:group] if answers_first else slots)
    return Schedule("adl", group, tuple(stages), group)


def _turns(name: str, num_stages: int, group: int) -> Schedule:
    """1F1B without flush: a forward every other tick, and backwards between them."""
    last, group = _last_stage(num_stages), _check_group(group)
    turn = min(2, num_stages)  # ticks from one forward of a stage to the next
    stages = []
    for k in range(num_stages):
        forwards = [turn * m + k for m in range(group)]
        stages.append(_slots(forwards, [tick + 2 * (last - k) + (k < last) for tick in forwards]))
    return Schedule(name, turn * group, tuple(stages), group)


def _slots(forwards: list[int], backwards: list[int]) -> tuple[Slot, ...]:
    """A stage's slots from the ticks of its forwards and its backwards, and the update with the last of these."""
    answers = [Slot("B", tick, m) for m, tick in enumerate(backwards)]
    return (*(Slot("F", tick, m) for m, tick in enumerate(forwards)), *answers, answers[-1]._replace(kind="U"))


def _last_stage(num_stages: int) -> int:
    if num_stages < 1:
        raise ValueError(f"a schedule needs at least one stage; got num_stages={num_stages}")
    return num_stages - 1


def _check_group(group: int) -> int:
    if group < 1:
        raise ValueError(f"an update needs at least one batch; got group={group}")
    return group


def row(schedule: Schedule, tick: int, num_batches: int | None = None) -> Row:
    """What every stage does in `tick`, of the batches 0 .. num_batches-1 (all batches when None).

    The last group may be incomplete: its update has its usual tick, and applies what is there.
    """
    end = math.inf if num_batches is None else num_batches

    def visit(slots: tuple[Slot, ...]) -> Visit:
        ops = []
        for kind, offset, micro in slots:
            number, phase = divmod(tick - offset, schedule.period)
            first = number * schedule.group
            if phase == 0 and first >= 0 and first + (0 if kind == UPDATE else micro) < end:
                ops.append(Op(kind, int(min(first + micro, end - 1))))
        return tuple(ops)

    return tuple(visit(slots) for slots in schedule.stages)


def unroll(schedule: Schedule, num_batches: int | None = None) -> Iterator[Row]:
    """The schedule's rows from tick 0 until `num_batches` batches are answered (for ever when None)."""
    if num_batches is None:
        return (row(schedule, tick) for tick in itertools.count())
    return (row(schedule, tick, num_batches) for tick in range(num_ticks(schedule, num_batches)))


def num_ticks(schedule: Schedule, num_batches: int) -> int:
    """Ticks until `num_batches` batches are answered, from an empty pipeline to an empty one."""
    return (num_batches - 1) // schedule.group * schedule.period + schedule.span if num_batches else 0


def tick_of(schedule: Schedule, k: int, op: Op) -> int:
    """The tick in which stage k performs `op`, counted from the one in which batch 0 enters."""
    number, micro = divmod(op.batch, schedule.group)
    wanted = (op.kind, schedule.group - 1 if op.kind == UPDATE else micro)
    return number * schedule.period + next(s.offset for s in schedule.stages[k] if (s.kind, s.micro) == wanted)


def takes_older_weights(schedule: Schedule, k: int, batch: int) -> bool:
    """Whether, with two buffers of weights, stage k forwards the batch on the older: the newer are one update ahead."""
    first = batch // schedule.group * schedule.group
    if not schedule.double_buffered or first == 0:
        return schedule.double_buffered
    forward, update = Op(FORWARD, batch), Op(UPDATE, first - 1)
    ticks = [tick_of(schedule, k, op) for op in (update, forward)]
    visit = row(schedule, ticks[0])[k]
    return ticks[0] < ticks[1] or (ticks[0] == ticks[1] and visit.index(update) < visit.index(forward))


def validate(schedule: Schedule) -> None:
    """Checks that every operation finds its input, and that every batch is answered exactly once by every stage.

    Raises:
        ValueError: naming the stage, the operation and the tick.
    """
    group = range(schedule.group)
    wanted = [*itertools.product((FORWARD, BACKWARD), group), (UPDATE, group[-1])]
    for k, (kind, micro) in itertools.product(range(schedule.num_stages), wanted):
        if not any((slot.kind, slot.micro) == (kind, micro) for slot in schedule.stages[k]):
            raise ValueError(f"{schedule.name}: stage {k} never runs {kind}{micro}")
    num_batches = (schedule.span // schedule.period + 3) * len(group)  # the steady state appears between fill and drain
    done: dict[tuple[int, Op], int] = {}
    for tick, stages in enumerate(unroll(schedule, num_batches)):
        for k, visit in enumerate(stages):
            for op in visit:
                where = f"{schedule.name}: stage {k} runs {op.kind}{op.batch} in tick {tick}"
                if (k, op) in done:
                    raise ValueError(f"{where}, and did so before in tick {done[k, op]}")
                for source, needed in _inputs(schedule, k, op):
                    ready = done.get((source, needed), tick + 1) + (source != k)
                    if ready > tick:
                        raise ValueError(f"{where}, before stage {source}'s {needed.kind}{needed.batch} can be read")
                done[k, op] = tick


def _inputs(schedule: Schedule, k: int, op: Op) -> list[tuple[int, Op]]:
    """The operations, as (stage, op), whose results `op` reads on stage k."""
    first = op.batch // schedule.group * schedule.group  # of the group
    needed = []
    if op.kind == FORWARD:
        if k > 0:
            needed.append((k - 1, Op(FORWARD, op.batch)))
        if schedule.double_buffered and first > schedule.group:  # the older of the two versions must be there
            needed.append((k, Op(UPDATE, first - schedule.group - 1)))
    elif op.kind == BACKWARD:
        needed.append((k, Op(FORWARD, op.batch)))
        if k < schedule.num_stages - 1 and not schedule.local:
            needed.append((k + 1, Op(BACKWARD, op.batch)))
        if first > 0:  # else its gradient would go into the update of the group before
            needed.append((k, Op(UPDATE, first - 1)))
    elif op.kind == SYNTHESIS:
        needed += [(k, Op(FORWARD, op.batch)), (k + 1, Op(BACKWARD, op.batch))]
    else:
        needed += [(k, Op(BACKWARD, batch)) for batch in range(first, op.batch + 1)]
    return needed


def show(schedule: Schedule, ticks: int, num_batches: int | None = None) -> str:
    """The schedule's picture: rows are ticks, columns stages, a cell the operations of one visit in order."""
    return picture(itertools.islice(unroll(schedule, num_batches), ticks), schedule.num_stages)


def picture(rows: Iterable[Row], num_stages: int) -> str:
    """The same of rows, from tick 0 on."""
    cells = [[" ".join(map(str, visit)) for visit in stages] for stages in rows]
    heads = [f"stage {k}" for k in range(num_stages)]
    width = max(len(text) for texts in [heads, *cells] for text in texts) + 5
    lines = ["tick  " + "".join(head.ljust(width) for head in heads)]
    lines += [f"{t:2d}".ljust(6) + "".join(cell.ljust(width) for cell in line) for t, line in enumerate(cells)]
    return "\n".join(line.rstrip() for line in lines)


def delay(schedule: Schedule) -> tuple[int, ...]:
    """D_k: ticks between a batch's forward and its backward, per stage; the longest in a group."""
    return tuple(max(life[-1][0] - life[0][0] for life in lives) for lives in _lives(schedule))


def staleness(schedule: Schedule) -> tuple[int, ...]:
    """tau_k: updates of stage k's weights between a batch's forward and its backward, in the steady state.

    The most in a group; `stalenesses` has all.
    """
    return tuple(map(max, stalenesses(schedule)))


def stalenesses(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """Per stage, the staleness of every batch of a group in the steady state."""
    if schedule.double_buffered:  # by its definition, wherever the update falls
        return ((1,) * schedule.group,) * schedule.num_stages
    return tuple(tuple(_count(UPDATE, life) for life in lives) for lives in _lives(schedule))


def depth(schedule: Schedule) -> tuple[int, ...]:
    """Memos that stage k holds at most, the one at work included: forwards up to the backward of the first of them.

    A stage that predicts keeps its outputs up to the synthesis.
    """
    return tuple(max(_count(FORWARD, life) for life in lives) for lives in _lives(schedule, judged=True))


def _count(kind: str, life: list[tuple[int, Op]]) -> int:
    return sum(op.kind == kind for _, op in life)


def _lives(schedule: Schedule, judged: bool = False) -> list[list[list[tuple[int, Op]]]]:
    """Per stage and batch of a group in the steady state: all that runs from its forward to its backward, and when.

    With `judged` up to the synthesis, on stages that have it.
    """
    number = -(-schedule.span // schedule.period)
    rows = list(unroll(schedule, (2 * number + 1) * schedule.group))
    lives = []
    for k in range(schedule.num_stages):
        ops = [(tick, op) for tick, stages in enumerate(rows) for op in stages[k]]
        place = {op: n for n, (_, op) in enumerate(ops)}
        group = range(number * schedule.group, (number + 1) * schedule.group)
        end = SYNTHESIS if judged and schedule.synthesises(k) else BACKWARD
        lives.append([ops[place[Op(FORWARD, i)] : place[Op(end, i)] + 1] for i in group])
    return lives
