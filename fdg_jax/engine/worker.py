"""One stage's training as pure functions: forward, backward and update, put together into the program of a visit."""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.backward import Memo, Trace
from fdg_jax.engine.base import NO_FAULT, Metrics, Plan, PyTree, StageState
from fdg_jax.metrics import call_loss
from fdg_jax.schedule import BACKWARD, FORWARD, UPDATE, Visit, delay, staleness

Pattern = tuple[tuple[str, int], ...]


def pattern(visit: Visit) -> Pattern:
    """The visit with its batches renumbered 0, 1, .. in order of appearance: equal patterns share a program."""
    seen: dict[int, int] = {}
    return tuple((op.kind, seen.setdefault(op.batch, len(seen))) for op in visit)


def updates_first(visit: Visit | Pattern) -> bool:
    """Whether what a visit forwards meets the weights of its own update."""
    kinds = [kind for kind, _ in visit]
    return FORWARD in kinds and UPDATE in kinds[: kinds.index(FORWARD)]


class Arrival(NamedTuple):
    """What a visit reads of one batch; None is what its pattern does not read."""

    inputs: PyTree = None
    targets: PyTree = None
    cotangents: list[jax.Array] | None = None
    memo: Memo | None = None


class Departure(NamedTuple):
    """What a visit leaves of one batch; None is what its pattern does not make."""

    outputs: PyTree = None
    cotangents: list[jax.Array] | None = None
    saved: list[jax.Array] | None = None
    metrics: Metrics | None = None


class Worker:
    """One stage of a plan, traced once for the shapes at hand.

    Args:
        plan: of the run.
        k: the stage.
        own: the stage's state; its values do not matter.
        targets: arrays or shapes; only the last stage reads them.

    Raises:
        ValueError: the policy is *current* and a parameter cannot be refreshed, or the loss function gives no scalar.
    """

    def __init__(self, plan: Plan, k: int, own: StageState, targets: PyTree = None):
        self._plan, self._k, self._stage = plan, k, plan.stages[k]
        self._is_last = k == plan.last
        policy, stale = plan.method.policy, staleness(plan.schedule)[k] > 0
        # Where no update falls between forward and backward the policies coincide, and need no weights of old.
        self.todays_weights = policy != "stash" or not stale
        self.trace = Trace(
            self._train,
            own.params,
            plan.shapes[k],
            own.state,
            own.key,
            own.batch,
            targets,
            remat=policy == "recompute" and delay(plan.schedule)[k] > 0,
            todays_weights=self.todays_weights,
            differentiate_inputs=k > 0,
        )
        if policy == "current" and stale:
            self._refuse_hidden(own.params)

    def _train(self, params, inputs, state, key, batch, targets):
        outputs, state = self._stage.apply(params, state, inputs, jax.random.fold_in(key, batch), train=True)
        if not self._is_last:
            return outputs, (state, {})
        loss, reported = call_loss(self._plan.loss, outputs, targets)
        return loss, (state, {name: value.astype(jnp.float32) for name, value in reported.items()})

    def _refuse_hidden(self, params):
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for i in self.trace.hidden_params():
            group, *inside = paths[i]
            number = self._stage.start + sum(self._stage.groups[: group.idx])
            layer = self._stage.layers[number - self._stage.start]
            name = jax.tree_util.keystr(tuple(inside), simple=True, separator=".")
            raise ValueError(
                f"policy 'current' cannot refresh {name} of layer {number} ({layer.name}): its backward reads a copy "
                "made in the forward; use the layers of fdg_jax.layers, or policy 'stash' or 'recompute'"
            )

    def changes(self, pattern: Pattern) -> tuple[str, ...]:
        """The fields of the stage's state that a visit of this pattern replaces."""
        kinds = {kind for kind, _ in pattern}
        forward = ("state", *(["totals"] if self._is_last else []))
        update = ("params", "opt_state")
        return (*(update if UPDATE in kinds else ()), *(forward if FORWARD in kinds else ()), "counts")

    def visit(self, pattern: Pattern, own: StageState, arrivals: list[Arrival]) -> tuple[StageState, list[Departure]]:
        """Runs the operations of one visit in order. Pure; `own.opt_state` may be None where the pattern has no update.

        Args:
            pattern: of the visit; its numbers are indices into `arrivals` and the departures.
            own: the stage's state.
            arrivals: what the visit reads, one entry a batch.
        """
        local: dict[int, Memo] = {}
        departures = [Departure() for _ in arrivals]
        answer: tuple = ()
        for kind, n in pattern:
            if kind == FORWARD:
                own, local[n], departures[n] = self._forward(own, arrivals[n], kept=(BACKWARD, n) not in pattern)
            elif kind == BACKWARD:
                memo = local.get(n) or arrivals[n].memo
                assert memo is not None  # the pattern says so
                own, departures[n], answer = self._backward(own, memo, arrivals[n], departures[n])
            else:
                own = self._update(own, *answer)
        return own, departures

    def _forward(self, own: StageState, arrival: Arrival, kept: bool) -> tuple[StageState, Memo, Departure]:
        inputs = arrival.inputs
        outputs, (state, metrics), saved = self.trace.forward(
            own.params, inputs, own.state, own.key, own.batch, arrival.targets
        )
        memo = self.trace.memo(saved, own.params, inputs, own.state, outputs)
        if self._plan.skip_nonfinite:
            state = _choose(all_finite(state), state, own.state)
        departure = Departure(
            outputs=None if self._is_last else outputs,
            saved=saved if kept else None,
            metrics=metrics if self._is_last else None,
        )
        own = own._replace(state=state, counts=own.counts.at[0].add(1))
        if self._is_last:
            counted = {"batches": jnp.ones((), jnp.float32), **metrics}
            totals = jax.tree.map(jnp.add, own.totals, counted)
            if self._plan.skip_nonfinite:
                totals = _choose(all_finite(metrics["loss"]), totals, own.totals)
            own = own._replace(totals=totals)
        return own, memo, departure

    def _backward(
        self, own: StageState, memo: Memo, arrival: Arrival, departure: Departure
    ) -> tuple[StageState, Departure, tuple[PyTree, jax.Array]]:
        """The stage, what leaves, and what an update wants: the gradients, and whether all that was met is finite."""
        gradients, sent = self.trace.backward(own.params, memo, self._cotangents(arrival))
        loss = departure.metrics["loss"] if departure.metrics else None  # the last stage forwards in the same visit
        finite = all_finite((gradients, arrival.cotangents, loss))  # what is sent is judged by its reader
        if self._plan.skip_nonfinite:
            sent = [jnp.where(finite, cotangent, jnp.nan) for cotangent in sent]
        own = own._replace(counts=_count_answer(own.counts, finite))
        return own, departure._replace(cotangents=sent), (gradients, finite)

    def _update(self, own: StageState, gradients: PyTree, finite: jax.Array) -> StageState:
        updates, opt_state = self._plan.optimizer.update(gradients, own.opt_state, own.params)
        params = optax.apply_updates(own.params, updates)
        if self._plan.skip_nonfinite:
            params, opt_state = _choose(finite, (params, opt_state), (own.params, own.opt_state))
        return own._replace(params=params, opt_state=opt_state)

    def _cotangents(self, arrival: Arrival) -> list[jax.Array]:
        """The error gradient of the stage's outputs: of the loss itself on the last stage, else shrunk (equation 7)."""
        if self._is_last:
            return [jnp.ones((), self.trace.outputs.dtype)]
        beta, received = self._plan.method.beta, arrival.cotangents or []
        return received if beta == 1 else [beta * cotangent for cotangent in received]

    @property
    def total_names(self) -> list[str]:
        """What the last stage sums over batches."""
        return ["batches", *self.trace.aux[1]] if self._is_last else []


def all_finite(tree: PyTree) -> jax.Array:
    """() bool: whether no number of the tree is infinite or NaN; whole numbers never are.

    By `isfinite`, because a sum of squares overflows, and XLA:CPU's maximum over many numbers may pass over a NaN.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in leaves], jnp.array(True))


def _choose(condition: jax.Array, one: PyTree, other: PyTree) -> PyTree:
    """`one` where the condition holds, else `other`, bit for bit."""
    return jax.tree.map(partial(jnp.where, condition), one, other)


def _count_answer(counts: jax.Array, finite: jax.Array) -> jax.Array:
    """The stage's counts after one more answer. Answers come in the order of the batches, so their number is a name."""
    forwarded, answered, faults, first = counts
    first = jnp.minimum(first, jnp.where(finite, NO_FAULT, answered))
    return jnp.stack([forwarded, answered + 1, faults + ~finite, first])
