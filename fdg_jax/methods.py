"""A method is an answer to four questions; everything else is shared. Named presets build it.

When does a stage do what (`schedule`), which weights answer a late gradient (`policy`), where the error gradient comes
from and what happens to it (`head`, `synthesiser`, `beta`), and what makes up for the delay (`average`, `corrections`).
"""

import runpy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fdg_jax import schedule as schedules
from fdg_jax.backward import POLICIES
from fdg_jax.corrections import Correction, SwitchToSynchronous
from fdg_jax.names import check_name
from fdg_jax.reuse import Buffering
from fdg_jax.schedule import BACKWARD, FORWARD, ORDERS, UPDATE, Op, Row, Schedule, staleness, unroll


@dataclass(frozen=True)
class Synthesiser:
    """What predicts the error gradient of a stage's outputs, and how it learns to (see `local`).

    Attributes:
        kind: "deep" or "linear".
        context: whether it reads the targets too: integers are labels, floating point numbers are taken as they are.
        learning_rate: of its optimizer, Adam. The run's trains the stages alone; SGD does not converge here.
        width: channels of the hidden layers.
    """

    kind: str = "deep"
    context: bool = True
    learning_rate: float = 1e-4
    width: int = 128

    def __str__(self) -> str:
        context = "context" if self.context else "no context"
        return f"{self.kind}, {context}, learning_rate={self.learning_rate:g}, width={self.width}"


@dataclass(frozen=True)
class Method:
    """What distinguishes one way of training K stages from another.

    Attributes:
        name: of the preset.
        schedule: K -> Schedule.
        policy: "stash", "current" or "recompute" (see `backward`).
        beta: every stage but the last multiplies the error gradient it receives by it, so that stage k feels
            beta^(K-1-k). Only the loss gradient shrinks; weight decay does not.
        micro_batches: M, into which a batch is split; each travels by itself, and the schedule counts them.
        average: whether the gradients between two updates are averaged, or summed.
        vertical_sync: whether a batch meets, on every stage, the weights that are as old as stage 0's are.
        head: of a local loss on every stage but the last, "mlp_sr" or "linear" (see `local`); None where error
            gradients come from the next stage.
        synthesiser: of the error gradient on every stage but the last; None where it is not predicted.
        reuse: of batches, by stages that wait for nobody; None where every stage answers each of them once.
        corrections: of the delay (see `corrections`).
    """

    name: str
    schedule: Callable[[int], Schedule]
    policy: str = "stash"
    beta: float = 1.0
    micro_batches: int = 1
    average: bool = True
    vertical_sync: bool = False
    head: str | None = None
    synthesiser: Synthesiser | None = None
    reuse: Buffering | None = None
    corrections: tuple[Correction, ...] = ()

    def __post_init__(self) -> None:
        given = self.corrections
        if not isinstance(given, tuple) or not all(isinstance(each, Correction) for each in given):
            raise TypeError(f"corrections must be objects, as (corrections.Shrink(0.5),); got {given!r:.80}")

    def __str__(self) -> str:
        facts = [f"beta={self.beta:g}"] if self.name in BETA else []
        facts += [f"policy={self.policy}"] if self.name in POLICY else []
        facts += [f"micro_batches={self.micro_batches}"] if self.micro_batches > 1 else []
        facts += ["sum"] if not self.average else []
        facts += ["vertical_sync"] if self.vertical_sync else []
        facts += [f"head={self.head}"] if self.head else []
        facts += [str(self.synthesiser)] if self.synthesiser else []
        facts += [str(self.reuse)] if self.reuse else []
        facts += map(str, self.corrections)
        return f"{self.name}({', '.join(facts)})" if facts else self.name

    def staleness(self, schedule: Schedule) -> tuple[int, ...]:
        """tau_k of its schedule; with vertical sync all stages are as stale as stage 0."""
        taus = staleness(schedule)
        return (taus[0],) * len(taus) if self.vertical_sync else taus

    def rows(self, schedule: Schedule) -> Iterator[Row]:
        """What the stages do, tick by tick, for ever; where batches are used again they come again."""
        if self.reuse is None:
            yield from unroll(schedule)
            return
        reuse = self.reuse.start(schedule.num_stages)
        while True:
            reuse, uses = reuse.step()
            visits = ([Op(kind, use.batch) for kind in (FORWARD, BACKWARD, UPDATE)] if use else [] for use in uses)
            yield tuple(map(tuple, visits))

    @property
    def switch_after(self) -> int | None:
        """Batches after which there is no delay any more; None where it never ends."""
        return next((each.after for each in self.corrections if isinstance(each, SwitchToSynchronous)), None)

    def with_corrections(self, *corrections: Correction) -> "Method":
        """The same method with these corrections of its delay too."""
        return replace(self, corrections=(*self.corrections, *corrections))


BETA = ("fdg", "adl")  # methods that shrink gradients
POLICY = ("ddg", "fdg", "adl", "pipelined_bp", "pipedream")  # and those that leave the weights of the answer open


def bp() -> Method:
    """Backpropagation: exact, and one stage at work at a time."""
    return Method("bp", schedules.bp)


def gpipe(micro_batches: int = 4) -> Method:
    """GPipe (Huang et al. 2019): backpropagation over M micro-batches in a row, whose gradients are averaged. Exact.

    BatchNorm normalises a micro-batch at a time, which is not what it does on the batch.
    """
    return Method(
        "gpipe", partial(schedules.gpipe, group=_count("micro_batches", micro_batches)), micro_batches=micro_batches
    )


def one_f_one_b(micro_batches: int = 4) -> Method:
    """1F1B with flush (Narayanan et al. 2021): the gradients of `gpipe`, with fewer memos."""
    schedule = partial(schedules.one_f_one_b, group=_count("micro_batches", micro_batches))
    return Method("one_f_one_b", schedule, micro_batches=micro_batches)


def ddg(policy: str = "stash") -> Method:
    """Decoupled parallel backpropagation (Huo et al. 2018): stages go backward at once, K-1-k batches late.

    A batch enters every K ticks, so that this is D_k = (K+1)(K-1-k) ticks: K for each batch, and the K-1-k in which its
    error gradient comes down.
    """
    return Method("ddg", schedules.ddg, _policy(policy))


def features_replay() -> Method:
    """Features Replay (Huo, Gu, Huang 2018): the schedule of `ddg`, the forward done again on the weights of today."""
    return Method("features_replay", schedules.ddg, "recompute")


def fdg(beta: float = 1.0, policy: str = "stash", order: str = "update_first") -> Method:
    """Fully decoupled learning with delayed gradients (Zhuang, Wang, Liu, Lin; arXiv 1906.09108).

    Args:
        beta: gradient shrinking factor in (0, 1], equation 7. 0 is allowed for study: every stage but the last then
            moves by weight decay alone.
        policy: "stash" is the paper's theory, "current" what the released code computes, "recompute" the least memory.
        order: "update_first" (Algorithm 1) or "forward_first", one update staler.

    Raises:
        ValueError: a value outside these.
    """
    return Method("fdg", partial(schedules.fdg, order=_order(order)), _policy(policy), _beta(beta))


def adl(
    steps: int = 4, beta: float = 1.0, policy: str = "stash", order: str = "update_first", average: bool = False
) -> Method:
    """Accumulated decoupled learning (Zhuang et al. 2021): FDG that updates after every M = `steps` gradients.

    Args:
        steps: M batches whose gradients an update applies, so that it is about D_k / M updates stale.
        beta, policy, order: as for `fdg`.
        average: of the gradients; they are summed as published, which makes the learning rate M times as large.
    """
    schedule = partial(schedules.adl, group=_count("steps", steps), order=_order(order))
    return Method("adl", schedule, _policy(policy), _beta(beta), average=average)


def pipelined_bp(policy: str = "current", corrections: Sequence[Correction] = ()) -> Method:
    """Pipelined backpropagation (Kosson et al. 2021): FDG's delays, forward first, and corrections instead of beta.

    Theirs are `corrections.SpikeCompensation()` and `corrections.LinearPrediction()`; the batch size was one.
    """
    schedule = partial(schedules.fdg, order="forward_first")
    given = tuple(corrections) if isinstance(corrections, Sequence) else corrections
    return Method("pipelined_bp", schedule, _policy(policy), corrections=given)


def pipedream(policy: str = "stash", vertical_sync: bool = False) -> Method:
    """PipeDream (Narayanan et al. 2019): 1F1B without flush, the weights of the forward stashed.

    Args:
        policy: which weights answer.
        vertical_sync: a batch meets weights of one age on all stages, that of stage 0's; stage k keeps k older ones.
    """
    return Method("pipedream", schedules.pipedream, _policy(policy), vertical_sync=vertical_sync)


def pipedream_2bw(micro_batches: int = 4) -> Method:
    """PipeDream-2BW (Narayanan et al. 2021): two versions of the weights, and every gradient one update late.

    W_{t+1} = W_t - rate * grad f(W_{t-1}), over a batch of M >= K micro-batches.
    """
    schedule = partial(schedules.pipedream_2bw, group=_count("micro_batches", micro_batches))
    return Method("pipedream_2bw", schedule, "stash", micro_batches=micro_batches)


def dgl(head: str = "mlp_sr", buffer: int = 0, max_uses: int = 0, slowdown: Sequence[int] = ()) -> Method:
    """Decoupled greedy learning (Belilovsky et al. 2020): a head and a loss on every stage, and nothing sent back.

    Args:
        head: "mlp_sr" or "linear".
        buffer: 0 for stages in lock-step. With more none waits for another (section 3.3): each keeps so many of the
            messages that it was sent, trains on one in every turn, again where no new one has come, and never on some
            where more have come than it has turns. See `reuse`.
        max_uses: of a message; 0 for as many as it takes.
        slowdown: stage k has a turn in every slowdown[k]-th tick; empty where all are equally fast.

    Raises:
        ValueError: a value outside these, or one that says something about a buffer where there is none.
    """
    check_name("head", head, ("mlp_sr", "linear"))
    for name, number in (("buffer", buffer), ("max_uses", max_uses)):
        if not hasattr(number, "__index__") or number < 0:
            raise ValueError(f"{name} must be a whole number, 0 or more; got {number!r}")
    if not buffer and (max_uses or slowdown):
        raise ValueError("max_uses and slowdown are of stages with a buffer: set buffer to 1 or more; got 0")
    reuse = Buffering(buffer, max_uses or None, tuple(slowdown)) if buffer else None
    return Method("dgl", schedules.local, head=head, reuse=reuse)


def dni(kind: str = "deep", context: bool = True, learning_rate: float = 1e-4, width: int = 128) -> Method:
    """Decoupled neural interfaces (Jaderberg et al. 2017): stages go by predicted error gradients, which learn.

    Args:
        kind, context, learning_rate, width: of the synthesisers; see `Synthesiser`.
    """
    check_name("synthesiser", kind, ("deep", "linear"))
    if not hasattr(learning_rate, "__float__") or not learning_rate >= 0:
        raise ValueError(f"learning_rate of the synthesisers must be a number and not negative; got {learning_rate!r}")
    synthesiser = Synthesiser(kind, context, learning_rate, _count("width", width))
    return Method("dni", schedules.dni, synthesiser=synthesiser)


PRESETS: dict[str, Callable[..., Method]] = {
    preset.__name__: preset
    for preset in (
        bp,
        gpipe,
        one_f_one_b,
        ddg,
        features_replay,
        fdg,
        adl,
        pipelined_bp,
        pipedream,
        pipedream_2bw,
        dgl,
        dni,
    )
}


def _beta(beta: float) -> float:
    if not hasattr(beta, "__float__") or not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in (0, 1], or be 0 to freeze every stage but the last for study; got {beta!r}")
    return float(beta)


def _policy(policy: str) -> str:
    check_name("policy", policy, POLICIES)
    return policy


def _order(order: str) -> str:
    check_name("order", order, ORDERS)
    return order


def _count(name: str, number: int) -> int:
    if not hasattr(number, "__index__") or number < 1:
        raise ValueError(f"{name} must be a whole number, at least 1; got {number!r}")
    return number


if __name__ == "__main__":  # prints the table of all methods
    runpy.run_module("fdg_jax.methods_table", run_name="__main__")
