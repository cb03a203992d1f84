"""One stage's training as pure functions: forward, backward and update, put together into the program of a visit."""

from collections.abc import Collection
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.backward import Memo, Trace
from fdg_jax.corrections import correct_gradient, cotangent_factor, forward_weights
from fdg_jax.engine.base import (
    COTANGENTS,
    INPUTS,
    NO_FAULT,
    TARGETS,
    Metrics,
    Plan,
    PyTree,
    StageState,
    Synthesis,
)
from fdg_jax.local import synthesis_loss, synthesise
from fdg_jax.metrics import call_loss
from fdg_jax.schedule import BACKWARD, FORWARD, SYNTHESIS, UPDATE, Visit, delay
from fdg_jax.stage import describe

MEMO = "memo"
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
    """What a visit reads of one batch, by the kinds of messages, and MEMO; None is what its pattern does not read."""

    inputs: PyTree = None
    targets: PyTree = None
    cotangents: list[jax.Array] | None = None
    memo: Memo | None = None


class Departure(NamedTuple):
    """What a visit leaves of one batch; None is what its pattern does not make."""

    outputs: PyTree = None
    weights: PyTree = None  # of the forward, where they are others than the stage's
    cotangents: list[jax.Array] | None = None
    saved: list[jax.Array] | None = None
    metrics: Metrics | None = None


class Worker:
    """One stage of a plan, traced once for the shapes at hand.

    Args:
        plan: of the run.
        k: the stage.
        own: the stage's state; its values do not matter.
        targets: arrays or shapes; only a stage with a loss reads them.

    Raises:
        ValueError: the policy is *current* and a parameter cannot be refreshed, or the loss function gives no scalar.
    """

    def __init__(self, plan: Plan, k: int, own: StageState, targets: PyTree = None):
        self._plan, self._k, self._stage = plan, k, plan.stages[k]
        self._is_last, self._head, self._synthesiser = k == plan.last, plan.head(k), plan.synthesiser(k)
        self._has_loss = self._is_last or self._head is not None
        self._optimizer, self._corrections = plan.optimizers[k], plan.method.corrections
        policy, stale = plan.method.policy, plan.method.staleness(plan.schedule)[k] > 0
        # Where no update falls between forward and backward the policies coincide, and need no weights of old.
        self.todays_weights = policy != "stash" or not stale
        self._compares = not self.todays_weights and any(each.compares_weights for each in self._corrections)
        self.trace = Trace(
            self._train,
            own.params,
            plan.shapes[k],
            own.state,
            own.key,
            own.batch,
            targets if self._has_loss else None,
            remat=policy == "recompute" and delay(plan.schedule)[k] > 0,
            todays_weights=self.todays_weights,
            holds_params=self._compares,
            holds_outputs=self._has_loss and delay(plan.schedule)[k] > 0,
            differentiate_inputs=k > 0 and plan.schedule.sends_back,
        )
        if policy == "current" and stale:
            self._refuse_hidden(own.params)

    def _train(self, params, inputs, state, key, batch, targets):
        """(loss, or outputs where there is none, (module state, metrics, outputs to send beside a loss))."""
        groups, key = len(self._stage.groups), jax.random.fold_in(key, batch)
        outputs, new = self._stage.apply(params[:groups], state[:groups], inputs, key, train=True)
        if not self._has_loss:
            return outputs, (new, {}, None)
        sent = None
        if self._head:
            sent = outputs
            outputs, aux = self._head.apply(params[groups], state[groups], outputs, key, True)
            new = [*new, aux]
        loss, reported = call_loss(self._plan.loss, outputs, targets)
        return loss, (new, {name: value.astype(jnp.float32) for name, value in reported.items()}, sent)

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
        update = ("params", "opt_state", *(["previous"] if self._plan.num_previous(self._k) else []))
        return (
            *(update if UPDATE in kinds else ()),
            *(forward if FORWARD in kinds else ()),
            *(["accumulated"] if self._accumulates and kinds & {BACKWARD, UPDATE} else ()),
            *(["synthesis"] if self._synthesiser and kinds & {FORWARD, SYNTHESIS} else ()),
            "counts",
        )

    def reads(self, pattern: Pattern) -> tuple[str, ...]:
        """The fields that a visit of this pattern needs, whether it replaces them or not."""
        predicting = ("opt_state",) if self._predicts else ()
        counting = ("accumulated",) if self._predicts or self._plan.schedule.double_buffered else ()
        kinds = {kind for kind, _ in pattern}
        forwards = ("state", "key", *predicting, *counting)
        forward = forwards if FORWARD in kinds else ("key",) if SYNTHESIS in kinds else ()
        return ("params", "previous", "counts", *forward)

    def receives(self, kinds: Collection[str]) -> list[str]:
        """What operations of these kinds on one batch read, as `Arrival` names it."""
        forward, answers = FORWARD in kinds, BACKWARD in kinds and not (self._has_loss or self._synthesiser)
        wanted = {
            INPUTS: forward,
            TARGETS: forward and self._k in self._plan.with_targets,
            COTANGENTS: answers or SYNTHESIS in kinds,
            MEMO: not forward and not {BACKWARD, SYNTHESIS}.isdisjoint(kinds),
        }
        return [name for name, reads in wanted.items() if reads]

    @property
    def _accumulates(self) -> bool:
        return self._plan.schedule.group > 1

    @property
    def _predicts(self) -> bool:
        return any(each.predicts for each in self._corrections)

    def visit(self, pattern: Pattern, own: StageState, arrivals: list[Arrival]) -> tuple[StageState, list[Departure]]:
        """Runs the operations of one visit in order. Pure; `own.opt_state` may be None where the pattern has no update.

        Args:
            pattern: of the visit; its numbers are indices into `arrivals` and the departures.
            own: the stage's state.
            arrivals: what the visit reads, one entry a batch.
        """
        return self.answer(pattern, own, arrivals)[:2]

    def answer(
        self, pattern: Pattern, own: StageState, arrivals: list[Arrival]
    ) -> tuple[StageState, list[Departure], dict[int, PyTree]]:
        """As `visit`, and the gradients with which it answers batches, as updates or accumulators get them."""
        arrivals, local, gradients = list(arrivals), dict[int, Memo](), dict[int, PyTree]()
        departures = [Departure() for _ in arrivals]
        answer: tuple = ()
        for kind, n in pattern:
            if kind == FORWARD:
                own, local[n], departures[n] = self._forward(own, arrivals[n], kept=(BACKWARD, n) not in pattern)
                if self._synthesiser:
                    own, arrivals[n] = self._synthesise(own, arrivals[n], departures[n])
            elif kind == SYNTHESIS:
                own = self._learn(own, arrivals[n])
            elif kind == BACKWARD:
                memo = local.get(n) or arrivals[n].memo
                assert memo is not None  # the pattern says so
                own, departures[n], answer = self._backward(own, memo, arrivals[n], departures[n])
                gradients[n] = answer[0]
                if self._accumulates:
                    own = own._replace(accumulated=self._accumulate(own.accumulated, *answer))
            elif self._accumulates:
                own = self._update(own, *self._sum_up(own.accumulated))
                own = own._replace(accumulated=jax.tree.map(jnp.zeros_like, own.accumulated))
            else:
                own = self._update(own, *answer)
        return own, departures, gradients

    def _forward(self, own: StageState, arrival: Arrival, kept: bool) -> tuple[StageState, Memo, Departure]:
        inputs, weights = arrival.inputs, self.weights(own)
        outputs, (state, metrics, sent), saved = self.trace.forward(
            weights, inputs, own.state, own.key, own.batch, arrival.targets if self._has_loss else None
        )
        memo = self.trace.memo(saved, weights, inputs, own.state, outputs)
        if self._plan.skip_nonfinite:
            state = _choose(all_finite(state), state, own.state)
        departure = Departure(
            outputs=outputs if sent is None else sent,
            weights=weights if self._predicts and kept and not self.todays_weights else None,
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

    def memo(self, arrival: Arrival, departure: Departure, own: StageState, older: bool, state: PyTree) -> Memo | None:
        """What the stage keeps of a batch after a visit; None where nothing.

        Args:
            arrival, departure: of the batch.
            own: the stage's, at the forward, whose parameters the memo may refer to.
            older: whether the forward used previous ones; see `Plan.takes_older`.
            state: before the visit.
        """
        if self._synthesiser and departure.outputs is not None:
            return Memo([], jax.tree.leaves((departure.outputs, arrival.targets)))
        if departure.saved is None:
            return None
        weights = own.previous[-1] if older else own.params
        used = weights if departure.weights is None else departure.weights
        return self.trace.memo(departure.saved, used, arrival.inputs, state, departure.outputs)

    def memo_shapes(self, targets: PyTree) -> Memo:
        """Of memos that outlast a visit, where a batch has targets of these shapes."""
        if self._synthesiser is None:
            return Memo(self.trace.saved, self.trace.held_shapes)
        read = targets if self._k in self._plan.with_targets else None
        return Memo([], jax.tree.leaves((self.trace.outputs, read)))

    def _synthesise(self, own: StageState, arrival: Arrival, departure: Departure) -> tuple[StageState, Arrival]:
        """The error gradient of a batch as the synthesiser predicts it, in place of one that arrives."""
        assert self._synthesiser
        (outputs,), labels = jax.tree.leaves(departure.outputs), jax.tree.leaves(arrival.targets)
        if len(labels) > 1:
            raise ValueError(
                f"label context reads targets that are one array; got {describe(arrival.targets)}: "
                "use methods.dni(context=False)"
            )
        params, state, opt_state = own.synthesis
        label = labels[0] if labels else None
        estimate, new = synthesise(self._synthesiser[0], params, state, outputs, label, own.key)
        if self._plan.skip_nonfinite:
            new = _choose(all_finite(new), new, state)
        own = own._replace(synthesis=Synthesis(params, new, opt_state))
        return own, arrival._replace(cotangents=[estimate])

    def _learn(self, own: StageState, arrival: Arrival) -> StageState:
        """One step of the synthesiser, by what the next stage made of a batch that was kept."""
        assert self._synthesiser
        assert arrival.memo  # the pattern says so
        assert arrival.cotangents
        layer, optimizer = self._synthesiser
        params, state, opt_state = own.synthesis
        (outputs, *labels), (cotangent,) = arrival.memo.held, arrival.cotangents
        label = labels[0] if labels else None

        def loss(params):
            return synthesis_loss(layer, params, state, outputs, label, cotangent, own.key)

        gradients = jax.grad(loss)(params)
        updates, new = optimizer.update(gradients, opt_state, params)
        moved = optax.apply_updates(params, updates), new
        if self._plan.skip_nonfinite:
            moved = _choose(all_finite(gradients), moved, (params, opt_state))
        return own._replace(synthesis=Synthesis(moved[0], state, moved[1]))

    def weights(self, own: StageState) -> PyTree:
        """What a forward uses: today's parameters, older ones, or predicted ones."""
        if self._plan.schedule.double_buffered:
            return _choose(self._updates(own)[1] > 0, own.params, own.previous[0])
        if own.previous:
            return own.previous[-1]
        if not self._predicts:
            return own.params
        tau = self._updates(own)[1].astype(jnp.int32)
        return forward_weights(self._corrections, self._optimizer, own.params, own.opt_state, tau)

    def _updates(self, own: StageState) -> tuple[jax.Array, jax.Array]:
        """Of the stage, () uint32: those made, and those to come before what it forwards next is answered.

        Counted from the last update, since a group begins with any batch where a run begins with it or was drained.
        """
        forwarded, answered, group = own.counts[0], own.counts[1], self._plan.schedule.group
        begun = own.accumulated["number"].astype(answered.dtype) if self._accumulates else 0
        # Rounded up: the last group before a drain may have been incomplete, and was an update none the less.
        return (answered - begun + group - 1) // group, (forwarded - answered + begun) // group

    def _backward(
        self, own: StageState, memo: Memo, arrival: Arrival, departure: Departure
    ) -> tuple[StageState, Departure, tuple[PyTree, jax.Array]]:
        """The stage, what leaves, and what an update wants: the gradients, and whether all that was met is finite."""
        gradients, sent = self.trace.backward(own.params, memo, self.cotangents(own, arrival))
        loss = self.trace.outputs_then(memo) if self._has_loss else []
        if departure.metrics:  # the forward is in the same visit
            loss = [departure.metrics["loss"]]
        if self._compares:
            then = self.trace.params_then(own.params, memo)
            gradients = correct_gradient(self._corrections, gradients, own.params, then)
        finite = all_finite((gradients, arrival.cotangents, loss))  # what is sent is judged by its reader
        if self._plan.skip_nonfinite:
            sent = [jnp.where(finite, cotangent, jnp.nan) for cotangent in sent]
        own = own._replace(counts=_count_answer(own.counts, finite))
        departure = departure._replace(cotangents=sent if self._plan.schedule.sends_back else None)
        return own, departure, (gradients, finite)

    def _accumulate(self, accumulated: PyTree, gradients: PyTree, finite: jax.Array) -> PyTree:
        """One gradient more. The update is judged by the sum, so one that must not count makes it NaN."""
        if self._plan.skip_nonfinite:
            gradients = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.nan), gradients)
        added = jax.tree.map(jnp.add, accumulated["gradients"], gradients)
        return {"number": accumulated["number"] + 1, "gradients": added}

    def _sum_up(self, accumulated: PyTree) -> tuple[PyTree, jax.Array]:
        """The gradients of a group, averaged or summed, and whether they are finite."""
        gradients = accumulated["gradients"]
        if self._plan.method.average:
            gradients = jax.tree.map(lambda leaf: leaf / accumulated["number"].astype(leaf.dtype), gradients)
        return gradients, all_finite(gradients)

    def _update(self, own: StageState, gradients: PyTree, finite: jax.Array) -> StageState:
        updates, opt_state = self._optimizer.update(gradients, own.opt_state, own.params)
        params = optax.apply_updates(own.params, updates)
        if self._plan.skip_nonfinite:
            params, opt_state = _choose(finite, (params, opt_state), (own.params, own.opt_state))
        previous = (own.params, *own.previous[:-1]) if own.previous else own.previous
        return own._replace(params=params, opt_state=opt_state, previous=previous)

    def cotangents(self, own: StageState, arrival: Arrival) -> list[jax.Array]:
        """The error gradient of the stage's outputs: of a loss of its own, else received and shrunk (equation 7)."""
        if self._has_loss:
            return [jnp.ones((), self.trace.outputs.dtype)]
        factor = cotangent_factor(self._corrections, self._k, self._plan.last + 1, self._updates(own)[0])
        beta, received = self._plan.method.beta, arrival.cotangents or []
        if isinstance(factor, jax.Array):
            return [(beta * factor).astype(cotangent.dtype) * cotangent for cotangent in received]
        return received if beta * factor == 1 else [beta * factor * cotangent for cotangent in received]

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
