"""Which batch every stage trains on where stages of different speed wait for nobody: buffers, and batches used again.

Asynchronous decoupled greedy learning (Belilovsky et al. 2020, section 3.3): stage k > 0 keeps the last M messages of
stage k - 1 in a ring. In each of its visits it trains on one of them, the least used, among these the newest, and sends
its outputs on; what is not chosen in time is overwritten, and never trained on. With M = 1 and equal speeds this is
lock-step DGL.

The published experiments draw at random whose turn it is. Here the pattern is fixed: stage k works in every
`slowdown[k]`-th tick, from tick k on. So a run can be repeated, and what an engine has to do in a tick is a function of
the tick's number, which no array enters (no jax here, as in `schedule`). An engine needs, beside the visits of
`schedule.local`, three things: it starts from `Reuse.start(...)`, reads the visits of a tick off `step`, and keeps a
message, by its sender's tick, until `resident` no longer lists it. A visit is "F B U" of the batch named there and
has one program; only which inputs and targets it is given differs. The state is K - 1 small tuples, and a checkpoint
needs none of it: a run that goes on takes `start` through as many steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


class Entry(NamedTuple):
    """A message: the tick in which it was sent (a name, as a sender sends one a tick), its batch, and past uses."""

    sent: int
    batch: int
    uses: int = 0


@dataclass(frozen=True)
class Buffer:
    """The last `size` messages that a stage received, oldest first; nobody trains on one more than `max_uses` times."""

    size: int
    max_uses: int | None = None
    entries: tuple[Entry, ...] = ()

    def __post_init__(self):
        for name, value in (("size", self.size), ("max_uses", self.max_uses)):
            if value is not None and value < 1:
                raise ValueError(f"a buffer's {name} must be at least 1; got {value}")

    def put(self, entry: Entry) -> "Buffer":
        """With the new message, the oldest overwritten where there are `size` already."""
        return replace(self, entries=(*self.entries, entry)[-self.size :])

    def take(self) -> tuple["Buffer", Entry | None]:
        """The least used message, the newest of these, with its use counted; None where there is nothing to use."""
        usable = [entry for entry in self.entries if self.max_uses is None or entry.uses < self.max_uses]
        if not usable:
            return self, None
        chosen = min(usable, key=lambda entry: (entry.uses, -entry.sent))
        used = chosen._replace(uses=chosen.uses + 1)
        return replace(self, entries=tuple(used if entry is chosen else entry for entry in self.entries)), used


@dataclass(frozen=True)
class Buffering:
    """Of a method: what `Reuse.start` wants, whatever the number of stages is.

    Attributes:
        size: M, messages that a stage keeps.
        max_uses: of a message; None for as many as it takes.
        slowdown: of every stage; empty where all are equally fast.
    """

    size: int
    max_uses: int | None = None
    slowdown: tuple[int, ...] = ()

    def __post_init__(self):
        self.start(len(self.slowdown) or 1)

    def __str__(self) -> str:
        facts = [f"buffer={self.size}"]
        facts += [f"max_uses={self.max_uses}"] if self.max_uses else []
        facts += [f"slowdown={','.join(map(str, self.slowdown))}"] if self.slowdown else []
        return ", ".join(facts)

    @property
    def period(self) -> int:
        """Ticks from one fresh batch to the next."""
        return self.slowdown[0] if self.slowdown else 1

    def start(self, num_stages: int) -> "Reuse":
        """Empty buffers for K stages.

        Raises:
            ValueError: a number is less than 1, or `slowdown` is of other stages.
        """
        slowdown = self.slowdown or (1,) * num_stages
        if len(slowdown) != num_stages:
            raise ValueError(
                f"slowdown must hold a number of ticks for each of the {num_stages} stages, or none at all; "
                f"got {slowdown}"
            )
        return Reuse.start(slowdown, self.size, self.max_uses)


@dataclass(frozen=True)
class Reuse:
    """What lies between the stages before tick `tick`.

    Attributes:
        slowdown: stage k works in the ticks k, k + slowdown[k], k + 2 slowdown[k], ... (before k it has no message).
        buffers: of stages 1 .. K-1. Stage 0 trains on a fresh batch in each of its visits.
        tick: the next to come.
        fed: batches that stage 0 has taken.
        sent: the messages of the last tick, by reader, on their way.
    """

    slowdown: tuple[int, ...]
    buffers: tuple[Buffer, ...]
    tick: int = 0
    fed: int = 0
    sent: tuple[Entry | None, ...] = ()

    @classmethod
    def start(cls, slowdown: Sequence[int], size: int, max_uses: int | None = None) -> "Reuse":
        """Empty buffers of M = `size` for len(slowdown) stages.

        Raises:
            ValueError: a number is less than 1.
        """
        if not slowdown or min(slowdown) < 1:
            raise ValueError(f"slowdown must hold a number of ticks, at least 1, for every stage; got {slowdown}")
        return cls(tuple(slowdown), (Buffer(size, max_uses),) * (len(slowdown) - 1))

    def step(self, feeds: bool = True) -> tuple["Reuse", tuple[Entry | None, ...]]:
        """The state after the next tick, and what every stage trains on in it; None is a stage that does nothing.

        Args:
            feeds: whether there are fresh batches. Without them the stages train only on what they have not used yet.
        """
        arrived = [
            buffer.put(entry) if entry else buffer
            for buffer, entry in zip(self.buffers, self.sent or (None,) * len(self.buffers), strict=True)
        ]
        if not feeds:
            arrived = [replace(buffer, max_uses=1) for buffer in arrived]
        works = [(self.tick - k) % every == 0 and (k > 0 or feeds) for k, every in enumerate(self.slowdown)]
        uses: list[Entry | None] = [Entry(self.tick, self.fed, 1) if works[0] else None]
        buffers = []
        for buffer, at_work in zip(arrived, works[1:], strict=True):
            left, use = buffer.take() if at_work else (buffer, None)
            buffers.append(left)
            uses.append(use)
        sent = tuple(Entry(self.tick, use.batch) if use else None for use in uses[:-1])
        fed = self.fed + works[0]
        return replace(self, buffers=tuple(buffers), tick=self.tick + 1, fed=fed, sent=sent), tuple(uses)

    @property
    def unused(self) -> bool:
        """Whether a stage holds, or is sent, what it has not trained on."""
        return any(self.sent) or any(entry.uses == 0 for buffer in self.buffers for entry in buffer.entries)

    @property
    def resident(self) -> tuple[frozenset[int], ...]:
        """Per stage from 1 on, the messages that it may still use, by the tick in which they were sent."""
        coming = self.sent or (None,) * len(self.buffers)
        return tuple(
            frozenset(entry.sent for entry in (buffer.put(new) if new else buffer).entries)
            for buffer, new in zip(self.buffers, coming, strict=True)
        )
