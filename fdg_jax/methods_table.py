"""All methods in one table: what each unlocks, how late it answers, what it holds. `python -m fdg_jax.methods`.

It is Table 1 of the FDG text with more rows and columns. Nothing in it is typed in: every entry is read off a method
and its schedule.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fdg_jax.methods import PRESETS, Method, fdg, pipedream
from fdg_jax.schedule import BACKWARD, FORWARD, Op, Schedule, delay, depth, stalenesses, tick_of
from fdg_jax.timeline import StageCost, steady

HEADS = (
    "method",
    "breaks",
    "D_k",
    "tau_k",
    "answers with",
    "memos",
    "of",
    "versions",
    "added",
    "forwards again",
    "used",
)
LEGEND = """\
breaks: forward (F), backward (B) and update (U) lock. D_k: ticks from a batch's forward on stage k to its backward. A
batch enters every tick in fdg, adl and pipelined_bp, whose D_k are batches too; every second in pipedream, and every K
in ddg and features_replay, where they are K-1-k batches, rounded down.
tau_k: updates of the stage's weights between the two. Answers with: the weights of the forward, or today's. Memos:
what a stage holds of forwards for their backwards at most, the one at work included, and what they are made of.
Versions: of the weights that a stage holds, today's included. Added: networks for a local loss or predictions, which
are extra parameters; no other method has any. Forwards again: of every batch. Used: the share of its time in which a
device does what backpropagation does too, if all stages take as long, backward twice as long as forward, and neither
messages nor added networks take any."""


class Locks(NamedTuple):
    """Which of the three locks of backpropagation a method breaks."""

    forward: bool
    backward: bool
    update: bool

    def __str__(self) -> str:
        return " ".join(name if broken else "-" for name, broken in zip("FBU", self, strict=True))


class Row(NamedTuple):
    """A method with K stages; tuples have an entry a stage.

    Attributes:
        label: the preset, and what is not its default.
        locks: that it breaks.
        delay: D_k in ticks, the longest in a group.
        stalenesses: the least and the greatest tau_k in a group.
        answers_with: the weights of the backward.
        memos: at most, the one at work included.
        memo: what it holds.
        versions: of the weights.
        heads: networks added, for a local loss or for predictions.
        forwards_again: for a batch.
        utilisation: see LEGEND.
    """

    label: str
    locks: Locks
    delay: tuple[int, ...]
    stalenesses: tuple[tuple[int, int], ...]
    answers_with: str
    memos: tuple[int, ...]
    memo: str
    versions: tuple[int, ...]
    heads: tuple[int, ...]
    forwards_again: tuple[int, ...]
    utilisation: float


def catalogue(num_stages: int) -> Iterator[Method]:
    """Every preset, and the variants of them that differ in the table; micro-batches are as many as stages, 4 or more.

    Args:
        num_stages: K.
    """
    for preset in PRESETS.values():
        splits = "micro_batches" in inspect.signature(preset).parameters
        yield preset(micro_batches=max(4, num_stages)) if splits else preset()
        if preset is fdg:
            yield from (fdg(policy="current"), fdg(policy="recompute"))
        if preset is pipedream:
            yield pipedream(vertical_sync=True)


def describe(method: Method, num_stages: int) -> Row:
    """The method's row.

    Raises:
        ValueError: the method cannot have so many stages.
    """
    schedule = method.schedule(num_stages)
    delays, late = delay(schedule), _stalenesses(method, schedule)
    again = tuple(int(method.policy == "recompute" and ticks > 0) for ticks in delays)
    locks = locks_broken(method.schedule(max(3, num_stages)))  # with fewer some schedules coincide
    answers_with = "the forward's" if method.policy == "stash" else "today's"
    return Row(
        label=_label(method, schedule),
        locks=locks,
        delay=delays,
        stalenesses=late,
        answers_with=answers_with if any(most for _, most in late) else "the same",
        memos=depth(schedule),
        memo="inputs" if method.policy == "recompute" else "activations",
        versions=tuple(_versions(method, k, most) for k, (_, most) in enumerate(late)),
        heads=tuple(int(bool(method.head or method.synthesiser) and k < num_stages - 1) for k in range(num_stages)),
        forwards_again=again,
        utilisation=_utilisation(schedule, locks, again),
    )


def locks_broken(schedule: Schedule) -> Locks:
    """Which locks a schedule breaks, for three stages or more.

    Forward: a batch enters the network before the one before it has reached the last stage. Backward: before it is
    answered, unless every stage answers by itself. Update: weights move meanwhile. Where stages answer several batches
    at once, a batch is all of these.
    """
    group, last = schedule.group, schedule.num_stages - 1
    far = -(-schedule.span // schedule.period)  # a group in the steady state
    enters = tick_of(schedule, 0, Op(FORWARD, (far + 1) * group))
    end = (far + 1) * group - 1
    unanswered = tick_of(schedule, 0, Op(BACKWARD, end)) > enters
    return Locks(
        forward=tick_of(schedule, last, Op(FORWARD, end)) >= enters,
        backward=schedule.local or unanswered,
        update=schedule.local or any(max(taus) for taus in stalenesses(schedule)),
    )


def _label(method: Method, schedule: Schedule) -> str:
    usual = PRESETS[method.name]().policy if method.name in PRESETS else "stash"
    facts = [method.policy] if method.policy != usual else []
    facts += [f"M = {schedule.group}"] if schedule.group > 1 else []
    facts += ["vertical sync"] if method.vertical_sync else []
    facts += [str(method.reuse)] if method.reuse else []
    return ", ".join([method.name, *facts])


def _stalenesses(method: Method, schedule: Schedule) -> tuple[tuple[int, int], ...]:
    if method.vertical_sync:
        return tuple((tau, tau) for tau in method.staleness(schedule))
    return tuple((min(taus), max(taus)) for taus in stalenesses(schedule))


def _versions(method: Method, k: int, tau: int) -> int:
    """Of stage k's weights: today's, those that memos refer to, and those that forwards will use."""
    if method.policy == "stash":
        return 1 + tau
    return 1 + (k if method.vertical_sync else 0)


def _utilisation(schedule: Schedule, locks: Locks, forwards_again: Sequence[int]) -> float:
    costs = [StageCost(forward=1.0, backward=2.0 + again) for again in forwards_again]
    # Where nothing in the stages' order holds the forward lock, the stages hold it by waiting for one another.
    joined = locks.backward and not locks.forward
    return 3.0 / steady(schedule, costs, barrier=joined).batch_seconds


def table(num_stages: int) -> str:
    """The rows of `catalogue` as text, an entry a stage where a column has several.

    Raises:
        ValueError: there are no such stages.
    """
    rows = [_cells(describe(method, num_stages)) for method in catalogue(num_stages)]
    widths = [max(map(len, column)) for column in zip(HEADS, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [HEADS, *rows]
    )


def _cells(row: Row) -> tuple[str, ...]:
    late = [str(most) if least == most else f"{least}-{most}" for least, most in row.stalenesses]
    return (
        row.label,
        str(row.locks),
        _each(row.delay),
        " ".join(late),
        row.answers_with,
        _each(row.memos),
        row.memo,
        _each(row.versions),
        _each(row.heads),
        _each(row.forwards_again),
        f"{100 * row.utilisation:.0f} %",
    )


def _each(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers)) if any(numbers) else "0"


def main() -> None:
    """Prints the table for the stages that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m fdg_jax.methods", description="The methods in one table.")
    parser.add_argument("--num_stages", type=int, default=3, help="K, 3 by default")
    num_stages = parser.parse_args().num_stages
    try:
        print(f"{table(num_stages)}\n\n{LEGEND}", flush=True)
    except ValueError as error:
        sys.exit(f"fdg_jax: {error}")
    except BrokenPipeError:  # the reader, `head` for one, has enough; at its end Python would write again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
