"""What an engine owes, and the plan and the state that all engines share.

An engine interprets a schedule. It is made from a `Plan` and offers what `Engine` lists; the functions that it calls on
a stage's device are `Worker`'s, the same for all engines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdg_jax import schedule as schedules
from fdg_jax.backward import Memo
from fdg_jax.data.source import Feed
from fdg_jax.methods import Method
from fdg_jax.schedule import Schedule, Visit
from fdg_jax.stage import Layer, Stage

PyTree = Any
Metrics = dict[str, jax.Array]
Loss = Callable[[PyTree, PyTree], jax.Array | tuple[jax.Array, Metrics]]
INPUTS, TARGETS, COTANGENTS = "inputs", "targets", "cotangents"
NO_FAULT = np.uint32(2**32 - 1)


@dataclass(frozen=True)
class Added:
    """What a method adds to a stage for a loss of its own: a head, or a synthesiser of error gradients (see `local`).

    Attributes:
        layer: the network added, on the stage's outputs.
        optimizer: of a synthesiser. A head has none: its parameters stand behind the stage's own and move with them.
        reads_targets: so that they are sent to the stage.
    """

    layer: Layer
    optimizer: optax.GradientTransformation | None = None
    reads_targets: bool = True


@dataclass(frozen=True)
class Plan:
    """All that is fixed during a run."""

    stages: tuple[Stage, ...]
    shapes: tuple[PyTree, ...]  # of the inputs of every stage
    schedule: Schedule
    method: Method
    loss: Loss
    optimizers: tuple[optax.GradientTransformation, ...]  # of every stage, with the corrections of its delay
    added: tuple[Added | None, ...]  # to every stage
    skip_nonfinite: bool = False

    @property
    def last(self) -> int:
        return len(self.stages) - 1

    @property
    def with_loss(self) -> tuple[int, ...]:
        """The stages that have a loss."""
        return tuple(k for k in range(len(self.stages)) if self.head(k) or k == self.last)

    @property
    def with_targets(self) -> tuple[int, ...]:
        """The stages that read targets."""
        return tuple(k for k, added in enumerate(self.added) if k == self.last or (added and added.reads_targets))

    def head(self, k: int) -> Layer | None:
        """Of a loss on stage k's outputs."""
        added = self.added[k]
        return added.layer if added and added.optimizer is None else None

    def synthesiser(self, k: int) -> tuple[Layer, optax.GradientTransformation] | None:
        """Of the error gradient of stage k's outputs, and its optimizer."""
        added = self.added[k]
        return (added.layer, added.optimizer) if added and added.optimizer else None

    def num_previous(self, k: int) -> int:
        """Older versions of its parameters that stage k's forwards use, today's not counted."""
        if self.schedule.double_buffered:
            return 1
        return k if self.method.vertical_sync else 0

    def takes_older(self, k: int, batch: int) -> bool:
        """Whether the forward of a batch, counted from the pipeline's filling, uses the oldest of the previous ones.

        The host knows it as the program does, so that memos can refer to them: what a program chooses is a copy.
        """
        if self.schedule.double_buffered:
            return schedules.takes_older_weights(self.schedule, k, batch)
        return self.num_previous(k) > 0


class Synthesis(NamedTuple):
    """What a synthesiser owns."""

    params: PyTree
    state: PyTree
    opt_state: PyTree


class StageState(NamedTuple):
    """What a stage owns, on its device."""

    params: list[PyTree]  # one tree a group of layers
    state: list[PyTree]  # module state: BatchNorm statistics and the like
    opt_state: PyTree
    key: jax.Array  # of the run, the same on every stage
    # (4,) uint32: batches forwarded; batches answered; those of them with a number that was not finite; the first of
    # these, or NO_FAULT. One array, because the host pays for each that a call takes.
    counts: jax.Array
    totals: Metrics  # () float32 sums over batches since they were last read; empty but on the last stage
    # What only some methods have; empty with the others.
    accumulated: PyTree = ()  # gradients since the last update, and their number, where an update answers several
    previous: tuple = ()  # parameters before the last updates, the newest first, where forwards use them
    synthesis: Synthesis | tuple = ()

    @property
    def batch(self) -> jax.Array:
        """() uint32: the next batch to forward."""
        return self.counts[0]


@dataclass(frozen=True)
class Fault:
    """Batches on which a stage met a number that was not finite: how many, and the first of them if there is one.

    The numbers are all that the answer to a batch brings together on a stage: the cotangents that it receives (on the
    last stage the loss in their place) and the gradients of its parameters.
    """

    count: int
    first_batch: int | None


class FirstFault(NamedTuple):
    """Where numbers first were not finite: the stage, the batch that it answered, and the tick of the schedule.

    Ticks are counted from the one in which batch 0 entered, as if the pipeline had never been drained but for a switch.
    """

    stage: int
    batch: int
    tick: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything there is: training is a function of it and of the batches to come."""

    # Where the schedule stands
    fed: int  # batches given so far
    origin: int  # the batch with which the pipeline last began to fill
    # What the stages own
    stages: tuple[StageState, ...]
    # In flight; a message's key is (kind, stage that reads it, batch), a memo's (stage, batch)
    inbox: dict[tuple[str, int, int], PyTree]  # on the reader's device
    outbox: dict[tuple[str, int, int], PyTree]  # sent in the last tick, still on the sender's device
    memos: dict[tuple[int, int], Memo]


class Observer(Protocol):
    """Is told of all that an engine dispatches, in that order, while the host waits for it to return.

    It may wait for the arrays later, on threads of its own: nothing overwrites them.
    """

    def begin(self, tick: int) -> None:
        """A tick, counted from the one in which the pipeline last began to fill."""

    def deliver(self, messages: dict[tuple[str, int, int], PyTree]) -> None:
        """Those that move to another device, or from the host; keys as in `State.inbox`."""

    def visit(self, k: int, visit: Visit, ready: jax.Array) -> None:
        """One of stage k; `ready` is there when all that it makes is."""


class Engine(Protocol):
    """What an engine owes to `Pipeline`; it is made from a plan and the device of every stage."""

    plan: Plan
    workers: dict[int, Any]  # `Worker`s traced so far, by stage

    def at(self, state: State) -> "Engine":
        """The engine that works on this state: itself, but where a method switches to another schedule."""

    def init(self, params: list[PyTree], state: list[PyTree], key: jax.Array, first_batch: int = 0) -> State:
        """The state before batch `first_batch`, the first to come; params and state come one tree a layer."""

    def expect(self, state: State, targets: PyTree) -> None:
        """Traces the last stage for targets of these shapes; the first step does so by itself."""

    def step(self, state: State, inputs: PyTree, targets: PyTree) -> tuple[State, list[Metrics]]:
        """Feeds a batch and runs the schedule until the next one is due; metrics of what left the last stage."""

    def run(self, state: State, feed: Feed, num_batches: int) -> tuple[State, Metrics | None]:
        """So many steps, with the batches of the feed; metrics of those that left the last stage, stacked."""

    def drain(self, state: State) -> tuple[State, list[Metrics]]:
        """Answers everything in flight; metrics of the batches that left the last stage, in order."""

    def predict(self, state: State, inputs: PyTree) -> PyTree:
        """Outputs in evaluation form on the weights of the moment."""

    def observe(self, observer: Observer | None) -> None:
        """Tells an observer of every visit from now on, or nobody.

        Raises:
            ValueError: this engine has no visits to see.
        """

    def tick_of_answer(self, k: int, batch: int) -> int:
        """The tick in which stage k answers the batch, counted as in `FirstFault`."""


def split(tree: PyTree, num: int) -> list[PyTree]:
    """A batch in `num` micro-batches of equal length, in order; it must be divisible."""
    if num == 1:
        return [tree]
    return [jax.tree.map(lambda x, m=m: x[m * len(x) // num : (m + 1) * len(x) // num], tree) for m in range(num)]


def join(parts: Sequence[Metrics | None]) -> Metrics | None:
    """Metrics with a leading axis, one after another; None where there are none."""
    found = [each for each in parts if each]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *found) if found else None
