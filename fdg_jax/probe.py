"""What a delay does, measured: how far weights move between forward and answer, and what late gradients are worth.

A *probe* follows one batch i through a copy of the pipeline, which is then drained and let go: no batch after i has a
part in its answers. So training takes the very steps that it takes without, on both engines, and pays only while a
probe is at work. Where a method splits a batch, its first micro-batch is followed.

Stage k forwards batch i with weights theta_(t-tau). When it is about to answer it, it has learnt from all batches (or
groups of them) before i, and from no other: these are its weights of today, theta_t. Measured for every stage:

* delay: tau, the updates between these weights. Fewer than the schedule's tau_k while the pipeline fills;
* distance: ||theta_t - theta_(t-tau)|| / ||theta_t||;
* gradient_norm: ||g||, where g is what the update, or the accumulator, gets for this batch: late, shrunk and corrected,
  but without weight decay. Divided by the factor it is the norm before shrinking;
* cosine: <g, h> / (||g|| ||h||), where h is the gradient of the same batch at today's weights: backpropagation through
  theta_t of all stages, with the batch's own dropout masks and statistics. It is what an exact method would take. The
  last stage has no delay, and yet falls short of 1: what it reads was made by older weights of the stages before;
* factor: by how much the error gradients that lead to g were shrunk, from the last stage on: beta^(K-1-k).

Without a delay, as in bp, they are 0, 0, ||h||, 1, 1. With local losses (dgl) h is the gradient of the stage's own
loss; with predicted error gradients (dni) it is the true gradient, and the cosine says what the prediction is worth. A
number is NaN, null in `metrics.jsonl`, where it is 0 / 0: beta is 0, or a stage has no parameters.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.engine.base import Plan, PyTree, StageState, State, split
from fdg_jax.engine.mpmd import Mpmd, Program, Walk
from fdg_jax.engine.worker import Arrival, Pattern, Worker
from fdg_jax.pipeline import Pipeline
from fdg_jax.schedule import BACKWARD, FORWARD, stalenesses

Batch = tuple[PyTree, PyTree]


class Figures(NamedTuple):
    """Of one stage and the batch that a probe followed; see above."""

    delay: int
    distance: float
    gradient_norm: float
    cosine: float
    factor: float


class Probe:
    """Measures staleness. What it compiles, about as much as the pipeline has, is kept for the next time.

    Args:
        pipe: of which states will be given.

    Raises:
        ValueError: its stages do not all meet every batch.
    """

    def __init__(self, pipe: Pipeline):
        if pipe.method.reuse:
            raise ValueError(f"a probe follows a batch from stage to stage, and with {pipe.method} some are left out")
        self._pipe = pipe
        self.jitted = cache(lambda function, *fixed: jax.jit(partial(function, *fixed)))

    def measure(self, state: State, batch: Batch) -> tuple[Figures, ...]:
        """The figures of every stage for a batch. Waits for the devices, which hold a second state meanwhile.

        Args:
            state: before the batch; not changed, and usable afterwards.
            batch: the next one, as `Pipeline.step` would get it.
        """
        engine = self._pipe._started().at(state)
        assert isinstance(engine, Mpmd)  # as all are that walk
        follower = _Follower(self, engine, state, batch)
        shadow = _Shadow(engine, follower)
        answering, _ = shadow.step(_copied(state), *batch)
        if not follower.done:
            shadow.drain(answering)
        return follower.figures()


def _copied(tree: PyTree) -> PyTree:
    """The same in memory of its own; what is shared in it stays shared, as old weights under *stash* are."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    once = {id(leaf): leaf for leaf in arrays if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)}
    copies = jax.device_put([*once.values()], [leaf.sharding for leaf in once.values()], may_alias=False)
    found = dict(zip(once, copies, strict=True))
    return jax.tree.unflatten(treedef, [found.get(id(leaf), leaf) for leaf in leaves])


class _Shadow(Mpmd):
    """An engine with its compiled programs, whose ticks a follower sees before they run."""

    def __init__(self, engine: Mpmd, follower: "_Follower"):
        vars(self).update(vars(engine))
        self.observer, self._follower = None, follower

    def walk(self, state: State) -> Walk:
        return _Watched(self, state, self._follower)


class _Watched(Walk):
    def __init__(self, engine: Mpmd, state: State, follower: "_Follower"):
        super().__init__(engine, state)
        self._follower = follower

    def tick(self, tick: int, num_batches: int) -> None:
        self._deliver()
        answered, calls = self.engine.row(tick, num_batches)
        for program, batches, *_ in calls:
            numbers = [self.origin + answered + batch for batch in batches]
            if self._follower.number in numbers:
                waiting = self.inbox.copy(), self.memos.copy()
                received = zip(numbers, program.receives, strict=True)
                arrivals = [self._receive(program.k, number, kinds) for number, kinds in received]
                self.inbox, self.memos = waiting
                self._follower.look(program, numbers, self.stages[program.k], arrivals)
        super().tick(tick, num_batches)


class _Answer(NamedTuple):
    """What is seen when a stage is about to answer."""

    params: PyTree
    state: PyTree
    key: jax.Array
    gradients: PyTree
    factor: jax.Array  # which multiplies the error gradients that arrive


class _Follower:
    """What is seen of one batch on its way."""

    def __init__(self, probe: "Probe", engine: Mpmd, state: State, batch: Batch):
        self._jitted, self._engine, self._plan = probe.jitted, engine, engine.plan
        self.number, self._place = state.fed, state.fed - state.origin
        self._inputs, self._targets = (split(tree, engine.plan.method.micro_batches)[0] for tree in batch)
        self._weights: dict[int, PyTree] = {}  # of the forward, by stage
        self._answers: dict[int, _Answer] = {}

    @property
    def done(self) -> bool:
        return len(self._answers) > self._plan.last

    def look(self, program: Program, numbers: list[int], own: StageState, arrivals: list[Arrival]) -> None:
        """Before a visit in which a stage forwards the batch, or answers it, or both."""
        k, n = program.k, numbers.index(self.number)
        weights, gradients, factor = self._jitted(_replay, program.worker, program.pattern)(own, arrivals)
        if (FORWARD, n) in program.pattern:
            self._weights[k] = weights[n]
        if (BACKWARD, n) in program.pattern:
            params, state = _copied((own.params, own.state))
            self._answers[k] = _Answer(params, state, own.key, gradients[n], factor)

    def figures(self) -> tuple[Figures, ...]:
        """Of all stages, once every one has answered."""
        fresh, factor, found = self._fresh(), 1.0, []
        measured = {
            k: {**_compared(answer.params, self._weights[k], answer.gradients, fresh[k]), "factor": answer.factor}
            for k, answer in self._answers.items()
        }
        for k, values in sorted(jax.device_get(measured).items(), reverse=True):
            numbers = {name: float(value) for name, value in values.items()}
            factor = numbers.pop("factor") * (1.0 if self._plan.schedule.local else factor)
            found.append(Figures(delay=_delay(self._plan, k, self._place), factor=factor, **numbers))
        return tuple(reversed(found))

    def _fresh(self) -> dict[int, PyTree]:
        """h of every stage; each computes where it is."""
        devices, workers = self._engine.devices, [worker for _, worker in sorted(self._engine.workers.items())]
        inputs, passes = self._inputs, []
        for k, worker in enumerate(workers):
            params, state, key, *_ = self._answers[k]
            targets = jax.device_put(self._targets, devices[k]) if k in self._plan.with_loss else None
            inputs = jax.device_put(inputs, devices[k])
            passes.append((params, inputs, state, key, np.uint32(self.number), targets))
            inputs = self._jitted(_forward, worker)(*passes[k])
        gradients: dict[int, PyTree] = {}
        cotangents: list[jax.Array] = []
        for k, worker in reversed([*enumerate(workers)]):
            has_loss = k in self._plan.with_loss
            arrived = [jnp.ones((), worker.trace.outputs.dtype)] if has_loss else cotangents
            arrived = jax.device_put(arrived, devices[k])
            gradients[k], cotangents = self._jitted(_backward, worker)(arrived, *passes[k])
        return gradients


def _delay(plan: Plan, k: int, batch: int) -> int:
    """tau of a batch, counted from the pipeline's filling: updates before there were any do not count."""
    steady = stalenesses(plan.schedule)[k][batch % plan.schedule.group]
    if plan.method.vertical_sync:
        steady = plan.method.staleness(plan.schedule)[k]
    return min(steady, batch // plan.schedule.group)


def _replay(worker: Worker, pattern: Pattern, own: StageState, arrivals: list[Arrival]) -> tuple:
    """What a visit uses and finds: weights by batch forwarded, gradients by batch answered, what multiplies cotangents.

    It returns no argument as it is, since the visit proper overwrites them.
    """
    weights = {
        n: jax.tree.map(jnp.copy, worker.weights(worker.visit(pattern[:place], own, arrivals)[0]))
        for place, (kind, n) in enumerate(pattern)
        if kind == FORWARD
    }
    (factor,) = worker.cotangents(own, Arrival(cotangents=[jnp.ones(())]))
    return weights, worker.answer(pattern, own, arrivals)[2], factor


def _forward(worker: Worker, *args: Any) -> PyTree:
    """What a stage sends on, for arguments as its trace takes them."""
    outputs, (_, _, sent), _ = worker.trace.forward(*args)
    return outputs if sent is None else sent


def _backward(worker: Worker, cotangents: list[jax.Array], params: PyTree, *args: Any) -> tuple[PyTree, list]:
    """Gradients of the parameters and cotangents of the inputs, all with the same weights."""
    inputs, state, *_ = args
    outputs, _, saved = worker.trace.forward(params, *args)
    return worker.trace.backward(params, worker.trace.memo(saved, params, inputs, state, outputs), cotangents)


@jax.jit
def _compared(now: PyTree, then: PyTree, used: PyTree, fresh: PyTree) -> dict[str, jax.Array]:
    """Distance, norm and cosine of a stage's trees, in float32 or better."""
    norm = _norm(used)
    return {
        "distance": _norm(jax.tree.map(jnp.subtract, now, then)) / _norm(now),
        "gradient_norm": norm,
        "cosine": jnp.clip(_inner(used, fresh) / norm / _norm(fresh), -1, 1),
    }


def _norm(tree: PyTree) -> jax.Array:
    return jnp.sqrt(_inner(tree, tree))


def _inner(a: PyTree, b: PyTree) -> jax.Array:
    def product(x, y):
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.sum(x.astype(dtype) * y.astype(dtype))

    return sum(jax.tree.leaves(jax.tree.map(product, a, b)), jnp.zeros(()))
