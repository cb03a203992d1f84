"""Every method against its own equations, batch by batch, in float64; what is equal to what; and what is refused.

FDG itself is in the battery.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle_methods as equations
import pytest
from flax import nnx
from helpers import assert_trees_close, feed_of, host, in_float64, make_pipeline, tiny_batches, tiny_mlp
from oracle_methods import Equations, Stage

from fdg_jax import layers, methods, optim
from fdg_jax.corrections import (
    DelayCompensation,
    LearningRateDamping,
    LinearPrediction,
    Nesterov,
    Shrink,
    SpikeCompensation,
    WeightPrediction,
)
from fdg_jax.engine.base import Fault
from fdg_jax.methods import Method
from fdg_jax.snapshot import Snapshot

EXACT, CLOSE = 1e-9, 1e-6
RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-2
WIDTHS = (6, 5, 5, 5, 3)
CUTS: dict[int, tuple[int, ...]] = {1: (), 2: (2,), 3: (2, 3)}  # stage 0 is of two layers, for policies to differ
NUM_BATCHES, ALL_BATCHES = 7, 13  # 7 fills no groups of two or three


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


# Updates that stage k has made after step i


def flushed(i, k, last):
    return i + 1


def locked(i, k, last):
    """The forward lock: a step is one passage down."""
    return max(0, i + 1 - (last - k))


def taking_turns(i, k, last):
    """Two ticks a step, in which a batch goes one stage down or up a tick; the last stage does both in one."""
    return max(0, i + 1 - (last - k // 2 if k < last else last // 2))


def a_tick(i, k, last):
    """One tick a step: a batch reaches the last stage in tick i + K-1 and stage k again K-1-k ticks later."""
    return max(0, i + 1 - (2 * last - k))


def in_groups(done, group):
    return lambda i, k, last: done(i, k, last) // group


def two_buffers(i, k, last):
    """The answers of a group cross into the next step, but for those of two stages' last one."""
    return i + 1 - (2 * last - k + (k < last) > 1)


def greedy(i, k, last):
    return max(0, i + 1 - k)


@dataclass(frozen=True)
class Case:
    """A method, its equations, and when it makes its updates; by default three stages of SGD."""

    method: Method
    equations: Equations | None  # None for greedy learning
    done: Callable[[int, int, int], int]
    optimizer: Any = field(default_factory=lambda: optim.sgd(RATE, MOMENTUM, DECAY))
    step: Callable[[int], Callable] = lambda late: equations.sgd(lambda n: RATE, MOMENTUM, DECAY)
    kept: str = ""  # what a prediction keeps of the last step
    num_stages: int = 3
    knows_drains: bool = True  # a new beginning is one for the equations too
    tolerance: float = EXACT

    @property
    def network(self):
        bounds = pairwise((0, *CUTS[self.num_stages], len(WIDTHS) - 1))
        heads = [WIDTHS[-1:]] * (self.num_stages - 1) + [()] if self.equations is None else [()] * self.num_stages
        widths = [(*WIDTHS[i : j + 1], *head) for (i, j), head in zip(bounds, heads, strict=True)]
        return [Stage(each, plain=each[-1] == WIDTHS[-1]) for each in widths]

    def follow(self, batches, start):
        """The run that the equations make of batches."""
        steps = [self.step(self.num_stages - 1 - k) for k in range(self.num_stages)]
        if self.equations is None:
            return equations.train_greedily(self.network, steps, batches, start)
        num = self.method.micro_batches
        pieces = [piece for x, y in batches for piece in zip(np.split(x, num), np.split(y, num), strict=True)]
        return equations.train(self.network, steps, pieces, self.equations, start)


def damped(late, power=0.5, fade=4):
    """Forward first, so tau = 2 late."""
    tau = max(1, 2 * late)
    return equations.sgd(lambda n: RATE / tau ** (power * (1 - min(n / fade, 1))), MOMENTUM, DECAY)


def ramp(count):
    return jnp.where(count < 4, 0.25, 0.75)


def step(count):
    """Of updates, not of batches."""
    return jnp.where(count < 3, 0.25, 0.75)


FORWARD_FIRST = equations.fdg("forward_first")
UPDATE_FIRST = equations.fdg("update_first")
CASES = {
    "gpipe": Case(methods.gpipe(2), Equations(equations.synchronous(2), group=2), flushed),
    "one_f_one_b": Case(methods.one_f_one_b(4), Equations(equations.synchronous(4), group=4), flushed),
    "ddg": Case(methods.ddg(), Equations(equations.ddg), locked),
    "ddg-adam": Case(
        methods.ddg("current"),
        Equations(equations.ddg, "current"),
        locked,
        optax.adam(0.02),
        lambda late: equations.adam(0.02),
        num_stages=2,
    ),
    "features_replay": Case(methods.features_replay(), Equations(equations.ddg, "recompute"), locked),
    "adl-sum": Case(
        methods.adl(2),
        Equations(equations.fdg("update_first", 2), group=2, average=False),
        in_groups(a_tick, 2),
        num_stages=2,
    ),
    "adl-average": Case(
        methods.adl(3, 0.5, "current", "forward_first", average=True).with_corrections(Shrink(step)),
        Equations(equations.fdg("forward_first", 3), "current", group=3, shrink=lambda k, n: 0.5 * step(n)),
        in_groups(a_tick, 3),
    ),
    "pipelined_bp": Case(methods.pipelined_bp(), Equations(FORWARD_FIRST, "current"), a_tick),
    "pipelined_bp-velocity": Case(
        methods.pipelined_bp(corrections=(SpikeCompensation(), LinearPrediction())),
        Equations(FORWARD_FIRST, "current", predict=equations.linear("velocity", 1.0)),
        a_tick,
        step=lambda late: equations.sgd(lambda n: RATE, MOMENTUM, DECAY, spike=2 * late),
        kept="velocity",
    ),
    "pipelined_bp-weights": Case(
        methods.pipelined_bp("stash", (LinearPrediction("weights", 1.5), SpikeCompensation())),
        Equations(FORWARD_FIRST, predict=equations.linear("weights", 1.5)),
        a_tick,
        step=lambda late: equations.sgd(lambda n: RATE, MOMENTUM, DECAY, spike=2 * late),
        kept="step",
        num_stages=2,
    ),
    "pipedream": Case(methods.pipedream(), Equations(equations.ddg), taking_turns),
    "pipedream-vertical": Case(methods.pipedream(vertical_sync=True), Equations(equations.vertical_sync), taking_turns),
    "pipedream_2bw": Case(
        methods.pipedream_2bw(4),
        Equations(equations.double_buffered(4), group=4),
        two_buffers,
        knows_drains=False,
    ),
    "dgl": Case(methods.dgl("linear"), None, greedy, tolerance=1e-5),
    "prediction-zero": Case(
        methods.fdg(order="forward_first").with_corrections(WeightPrediction(), DelayCompensation(0.5)),
        Equations(FORWARD_FIRST, predict=equations.own_steps("zero"), strength=0.5),
        a_tick,
        num_stages=2,
    ),
    "prediction-held": Case(
        methods.fdg(policy="recompute", order="forward_first").with_corrections(WeightPrediction("held")),
        Equations(FORWARD_FIRST, "recompute", predict=equations.own_steps("held")),
        a_tick,
        optax.adam(0.02),
        lambda late: equations.adam(0.02),
        kept="gradient",
        num_stages=2,
    ),
    "adl-prediction": Case(
        methods.adl(3, order="forward_first", average=True).with_corrections(WeightPrediction("held")),
        Equations(equations.fdg("forward_first", 3), group=3, predict=equations.own_steps("held")),
        in_groups(a_tick, 3),
        kept="gradient",
        num_stages=2,
    ),
    "delay_compensation": Case(
        methods.fdg(0.5, order="forward_first").with_corrections(DelayCompensation(0.5)),
        Equations(FORWARD_FIRST, shrink=lambda k, n: 0.5, strength=0.5),
        a_tick,
        num_stages=2,
    ),
    "damping": Case(
        methods.fdg(order="forward_first").with_corrections(LearningRateDamping(0.5, fade=4)),
        Equations(FORWARD_FIRST),
        a_tick,
        step=damped,
        num_stages=2,
        tolerance=CLOSE,  # optax's schedules are float32
    ),
    "shrink": Case(
        methods.fdg(0.5).with_corrections(Shrink((0.25, ramp))),
        Equations(UPDATE_FIRST, shrink=lambda k, n: 0.5 * (0.25 if k == 0 else 0.25 if n < 4 else 0.75)),
        a_tick,
    ),
    "nesterov": Case(
        methods.fdg().with_corrections(Nesterov(0.9, low=0.5)),
        Equations(UPDATE_FIRST),
        a_tick,
        optim.sgd(RATE, 0.0),
        lambda late: equations.nesterov(RATE, min(0.9, 0.5 + max(0, 2 * late - 1) * 0.4 / 3)),
    ),
}


def make(method, num_stages=3, engine="mpmd", network=None, **kwargs):
    given = in_float64(tiny_mlp(3, dtype="float64")) if network is None else network
    kwargs = {"optimizer": optim.sgd(RATE, MOMENTUM, DECAY), **kwargs}
    where = {"cuts": CUTS[num_stages]} if network is None and num_stages > 1 else {"num_stages": num_stages}
    return make_pipeline(given, method=method, engine=engine, devices=jax.devices()[:1], stack=False, **where, **kwargs)


@functools.cache
def pipeline(name, engine="mpmd"):
    case = CASES[name]
    return make(case.method, case.num_stages, engine, optimizer=case.optimizer)


@functools.cache
def batches(num=ALL_BATCHES):
    return [(x.astype(np.float64), y) for x, y in tiny_batches(num)]


def begin(pipe):
    return pipe.init(jax.random.key(0), batches()[0][0])


def vector(trees):
    """Weights, or what an optimizer keeps of their shapes, in the order of the oracle."""
    pairs = [tree.get("linear", tree) for tree in trees]
    return np.concatenate([np.ravel(part) for p in pairs for part in (p["kernel"], p["bias"])])


def compare(case, state, run, counts):
    """Parameters and optimizer state of every stage with those after so many updates."""
    for k, (own, n) in enumerate(zip(state.stages, counts, strict=True)):
        wanted = run.states[k][n]
        assert_trees_close(vector(own.params), run.weights[k][n], case.tolerance)
        names = ("mu", "nu") if optax.tree.get(own.opt_state, "nu") is not None else ("trace",)
        for name in names:
            assert_trees_close(vector(optax.tree.get(own.opt_state, name)), wanted[name], case.tolerance)
        if "nu" in names:
            assert int(optax.tree.get(own.opt_state, "count")) == wanted["count"]
        if case.kept and k < case.num_stages - 1:
            assert_trees_close(vector(optax.tree.get(own.opt_state, "last")), wanted[case.kept], case.tolerance)


@pytest.mark.parametrize("name", CASES)
def test_a_method_is_its_equations(name):
    """After every batch, after draining, incomplete groups included, and after a second filling and draining."""
    case, pipe = CASES[name], pipeline(name)
    state, last = begin(pipe), case.num_stages - 1
    start = equations.begin([vector(own.params) for own in state.stages])
    run = case.follow(batches()[:NUM_BATCHES], start)
    for i, batch in enumerate(batches()[:NUM_BATCHES]):
        state, _ = pipe.step(state, batch)
        compare(case, state, run, [case.done(i, k, last) for k in range(last + 1)])
    state, _ = pipe.drain(state)
    compare(case, state, run, [-1] * (last + 1))
    _, means = pipe.read_metrics(state)
    assert means["batches"] == len(run.losses)
    assert means["loss"] == pytest.approx(np.mean(run.losses), rel=CLOSE)
    for batch in batches()[NUM_BATCHES:]:
        state, _ = pipe.step(state, batch)
    state, _ = pipe.drain(state)
    again = case.follow(batches()[NUM_BATCHES:], run) if case.knows_drains else case.follow(batches(), start)
    compare(case, state, again, [-1] * (last + 1))


LOOPED = (
    *("gpipe", "one_f_one_b", "ddg", "features_replay", "adl-sum", "pipelined_bp-velocity", "pipedream"),
    *("pipedream-vertical", "pipedream_2bw", "dgl", "prediction-zero", "refreshed"),
)


@pytest.mark.parametrize("name", LOOPED)
def test_the_fused_engine_does_the_same(name):
    """Filling, loops, and steps between them; those of fdg and bp are in `test_fused`, those of dni in `test_dni`."""
    refreshed = Case(methods.pipedream("current", vertical_sync=True), None, taking_turns)
    case, states = CASES.get(name, refreshed), []
    for engine in ("mpmd", "fused"):
        pipe = pipeline(name, engine) if name in CASES else make(refreshed.method, 2, engine)
        state = begin(pipe)
        for num in (1, ALL_BATCHES - 1):
            state, _ = pipe.run(state, feed_of(batches()), num)
        states.append(in_flight(state))
        state, _ = pipe.drain(state)
        states.append(in_flight(state))
    assert_trees_close(states[2:], states[:2], case.tolerance)


def in_flight(state):
    """All of a state, by its names."""
    stages = [own._replace(key=jax.random.key_data(own.key)) for own in state.stages]
    return host((stages, state.inbox, state.outbox, state.memos))


@pytest.mark.parametrize("name", CASES)
def test_a_snapshot_in_flight_goes_on_with_the_same_bits(name):
    """Gradients accumulated so far, older weights and what predictions keep are part of it."""
    pipe = pipeline(name)
    state = begin(pipe)
    for batch in batches()[:5]:
        state, _ = pipe.step(state, batch)
    snapshot = pipe.snapshot(state)
    snapshot = Snapshot(host(snapshot.arrays), json.loads(json.dumps(snapshot.record)))
    restored = pipe.restore(begin(pipe), snapshot)
    assert_trees_close(in_flight(restored), in_flight(state), 0)
    ends = []
    for one in (state, restored):
        for batch in batches()[5:NUM_BATCHES]:
            one, _ = pipe.step(one, batch)
        ends.append(in_flight(pipe.drain(one)[0]))
    assert_trees_close(*ends, 0)


def test_the_equations_differ():
    """Otherwise the agreement above would prove little."""
    ends = {}
    for name in CASES:
        case = replace(CASES[name], num_stages=3)
        start = equations.begin([np.random.default_rng(0).normal(0, 0.5, size) for size in (65, 30, 18)])
        if case.equations:
            ends[name] = np.concatenate([own[-1] for own in case.follow(batches()[:6], start).weights])
    for a, b in combinations(ends, 2):
        same = {a, b} in ({"gpipe", "one_f_one_b"}, {"ddg", "pipedream"})
        assert (np.abs(ends[a] - ends[b]).max() < 1e-12) == same, (a, b)


def end(pipe, num=NUM_BATCHES):
    """All weights of the network after draining."""
    state = begin(pipe)
    for batch in batches()[:num]:
        state, _ = pipe.step(state, batch)
    return vector(pipe.params(pipe.drain(state)[0]))


# What is equal to what


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
def test_micro_batches_add_up_to_backpropagation(name):
    """Of the undivided batches: without BatchNorm nothing depends on the division."""
    pipe = pipeline(name)
    start = equations.begin([vector(own.params) for own in begin(pipe).stages])
    case = replace(CASES[name], method=methods.bp(), equations=Equations(equations.synchronous()))
    run = case.follow(batches()[:NUM_BATCHES], start)
    assert_trees_close(end(pipe), np.concatenate([of_stage[-1] for of_stage in run.weights]), EXACT)


def steps(pipe):
    """Per stage, all versions of its weights in order."""
    state = begin(pipe)
    seen = [[vector(own.params)] for own in state.stages]
    for batch in batches()[:NUM_BATCHES]:
        state, _ = pipe.step(state, batch)
        for versions, own in zip(seen, state.stages, strict=True):
            now = vector(own.params)
            if (now != versions[-1]).any():
                versions.append(now)
    return seen


def test_ddg_is_pipedream_step_for_step():
    """Under stash what a stage does, in order, is the same; only the ticks are not."""
    for one, other in zip(steps(pipeline("ddg")), steps(pipeline("pipedream")), strict=True):
        assert min(len(one), len(other)) > NUM_BATCHES - 3
        for a, b in zip(one, other, strict=False):
            assert_trees_close(a, b, EXACT)


def test_adl_of_one_batch_is_fdg():
    one, other = (end(make(method)) for method in (methods.adl(1, 0.5), methods.fdg(0.5)))
    np.testing.assert_array_equal(one, other)


def test_pipelined_backpropagation_without_corrections_is_fdg_forward_first():
    other = end(make(methods.fdg(policy="current", order="forward_first")))
    np.testing.assert_array_equal(end(pipeline("pipelined_bp")), other)


ALONE = [
    methods.bp(),
    methods.one_f_one_b(2),
    methods.ddg(),
    methods.features_replay(),
    methods.fdg(0.5, "current"),
    methods.adl(1),
    methods.pipelined_bp(corrections=(SpikeCompensation(), LinearPrediction())),
    methods.pipedream(vertical_sync=True),
    methods.dgl(),
    methods.fdg().with_corrections(WeightPrediction("held"), DelayCompensation(), LearningRateDamping()),
]


@pytest.mark.parametrize("method", ALONE, ids=str)
def test_one_stage_is_backpropagation(method):
    """Nothing is late there, so that no correction changes a thing. (2BW is late by definition, ADL sums.)"""
    pipe = make(method, num_stages=1)
    case = Case(method, Equations(equations.synchronous()), flushed, num_stages=1)
    state = begin(pipe)
    run = replace(case, method=methods.bp()).follow(batches()[:3], equations.begin([vector(state.stages[0].params)]))
    for i, batch in enumerate(batches()[:3]):
        state, _ = pipe.step(state, batch)
        compare(case, state, run, [i + 1])


def test_greedy_stages_do_not_depend_on_those_that_follow():
    """Weights, head included, and optimizer state, to the bit; here a stage is gone and the classes come sooner."""
    network = in_float64(tiny_mlp(3, dtype="float64"))
    ends = []
    for given, cuts in ((network, (2, 3)), ([*network[:2], network[-1]], (2,))):
        pipe = make_pipeline(given, method=methods.dgl("linear"), stack=False, cuts=cuts)
        state = begin(pipe)
        for batch in batches()[:4]:
            state, _ = pipe.step(state, batch)
        first = state.stages[0]
        ends.append(host((first.params, first.opt_state, first.state)))
    assert len(ends[0][0]) == 3
    assert_trees_close(*ends, 0)


# Numbers that are not finite


def spoilt(number, how, num=6):
    """Batches one of which has an input that is NaN, or targets at which the loss is infinite and its gradient not."""
    found = [(x.copy(), np.zeros_like(y)) for x, y in batches()[:num]]
    x, y = found[number]
    if how == "input":
        x[0] = np.nan
    else:
        y[:] = 9
    return found


def infinite_at_nine(outputs, targets):
    return jnp.mean(outputs**2) + jax.lax.stop_gradient(jnp.where(targets[0] > 8, jnp.inf, 0.0))


@functools.cache
def careful(method):
    return make(method, 2, loss=infinite_at_nine, optimizer=optax.adam(0.02), skip_nonfinite=True)


@pytest.mark.parametrize("how", ["input", "loss"])
def test_a_bad_micro_batch_drops_its_batch(how):
    """And leaves nothing behind: the run goes on as if the batch had not been."""
    pipe = careful(methods.gpipe(2))
    given, ends = spoilt(2, how), []
    for kept in (given, given[:2] + given[3:]):
        state = begin(pipe)
        for batch in kept:
            state, _ = pipe.step(state, batch)
        ends.append(host([(own.params, own.opt_state) for own in state.stages]))
        assert any(fault.count for fault in pipe.faults(state)) == (kept is given)
    assert_trees_close(*ends, 0)


@pytest.mark.parametrize("how", ["input", "loss"])
def test_a_bad_batch_drops_the_update_of_its_group(how):
    pipe = careful(methods.adl(2))
    state, seen = begin(pipe), []
    for batch in spoilt(2, how, 8):
        state, _ = pipe.step(state, batch)
        seen.append(vector(state.stages[1].params))
    state, _ = pipe.drain(state)
    assert [int(optax.tree.get(own.opt_state, "count")) for own in state.stages] == [3, 3]
    assert pipe.faults(state) == [Fault(1, 2)] * 2
    moved = [i for i in range(1, 8) if (seen[i] != seen[i - 1]).any()]
    assert moved == [i for i in range(8) if a_tick(i, 1, 1) in (2, 6)]  # by groups 0 and 2, not 1


def test_a_compensated_gradient_that_overflows_is_dropped():
    """g is finite, g g is not."""
    method = methods.fdg(order="forward_first").with_corrections(DelayCompensation())
    loss = lambda outputs, targets: jnp.mean(outputs) * jnp.where(targets[0] > 8, 1e200, 1.0)  # noqa: E731
    network = in_float64([layers.Linear(6, 3, rngs=nnx.Rngs(0), dtype="float64"), lambda x: 2 * x])
    pipe = make(method, num_stages=2, network=network, loss=loss, skip_nonfinite=True)
    state = begin(pipe)
    for i, (x, y) in enumerate(batches()[:6]):
        state, _ = pipe.step(state, (x, np.full_like(y, 9 if i == 3 else 0)))
    state, _ = pipe.drain(state)
    assert np.isfinite(vector(state.stages[0].params)).all()
    assert pipe.faults(state)[0] == Fault(1, 3)


def test_batches_of_one_example_take_the_steps_of_batches_that_repeat_it():
    """Pipelined backpropagation is meant for batch size 1; the loss is a mean, so that copies change nothing."""
    method = methods.pipelined_bp(corrections=(SpikeCompensation(), LinearPrediction()))
    ends = []
    for copies in (1, 4):
        given = [(np.repeat(x[:1], copies, 0), np.repeat(y[:1], copies, 0)) for x, y in batches()]
        pipe = make(method)
        state = pipe.init(jax.random.key(0), given[0][0])
        for batch in given:
            state, _ = pipe.step(state, batch)
        ends.append(pipe.params(pipe.drain(state)[0]))
    assert_trees_close(ends[1], ends[0], 1e-6)


# What is refused


@pytest.mark.parametrize(
    ("method", "kwargs", "words"),
    [
        (methods.gpipe(3), {}, "a batch of 4 does not make 3 equal micro-batches; choose a divisor"),
        (methods.fdg(0.5), {"optimizer": optax.adam(0.1)}, "use LearningRateShrinking .* or LearningRateDamping"),
        (methods.ddg().with_corrections(SpikeCompensation()), {"optimizer": optax.adam(0.1)}, "or WeightPrediction"),
        (methods.ddg("current").with_corrections(DelayCompensation()), {}, "with 'stash', as ddg or fdg, or Wei"),
        (methods.dgl().with_corrections(DelayCompensation()), {}, "ends a delay, and dgl has none; leave it out"),
        (methods.dni().with_corrections(Shrink(0.5)), {}, r"Shrink \(shrink in a config\) corrects .* dni has none"),
        (methods.pipedream_2bw(2), {}, "at least num_stages=3 micro-batches; got 2"),
        (methods.pipedream_2bw(4).with_corrections(WeightPrediction()), {}, "use pipedream"),
        (methods.pipedream(vertical_sync=True).with_corrections(LinearPrediction()), {}, "use pipedream"),
    ],
    ids=lambda value: str(value) if isinstance(value, Method) else "",
)
def test_what_does_not_go_together_gets_one_line(method, kwargs, words):
    with pytest.raises(ValueError, match=words) as caught:
        begin(make(method, **kwargs))
    assert "\n" not in str(caught.value)


def test_the_optimizer_that_makes_the_steps_is_judged():
    """Which Nesterov puts in the place of the run's."""
    adam, plain = Nesterov(build=lambda gamma: optax.nadamw(0.1, b1=gamma)), Nesterov(build=partial(optim.sgd, RATE))
    with pytest.raises(ValueError, match="ignores their scale"):
        make(methods.fdg(0.5).with_corrections(adam))
    make(methods.fdg(0.5).with_corrections(plain), optimizer=optax.adam(0.1))


def test_what_is_added_is_shown_apart():
    """And the staleness is the method's, which vertical sync makes that of stage 0."""
    pipe = make(methods.dgl("linear"))
    assert pipe.show(1).count("  at init  ") == 3
    begin(pipe)
    shown = [line for line in pipe.show(1).splitlines() if " ticks" in line]
    assert [f" {pipe.extra_params[k]} " in line for k, line in enumerate(shown)] == [True] * 3
    assert pipe.extra_params == (18, 18, 0)
    vertical = make(methods.pipedream(vertical_sync=True)).show(1)
    assert "added" not in vertical
    assert vertical.count("2 updates") == 3


def test_heads_draw_from_keys_of_their_own(monkeypatch):
    """Which are no layer's: stage 0's head and the first layer would begin alike."""
    seen, drawn = [], jax.random.fold_in
    monkeypatch.setattr(jax.random, "fold_in", lambda key, number: seen.append((key, number)) or drawn(key, number))
    begin(make(methods.dgl("linear")))
    keys = [drawn(key, number) for key, number in seen if not isinstance(number, jax.core.Tracer)]
    assert len({tuple(np.ravel(jax.random.key_data(key))) for key in keys}) == len(keys) > 4


def test_beta_is_allowed_where_it_does_nothing():
    make(methods.fdg(0.5), num_stages=1, optimizer=optax.adam(0.1))
    make(methods.fdg(0.0), optimizer=optax.adam(0.1))


# What is kept


@pytest.mark.parametrize("method", [methods.pipedream_2bw(4), methods.pipedream(vertical_sync=True)], ids=str)
def test_memos_refer_to_the_versions_that_forwards_used(method):
    """Two of them with two buffers, at every tick; with vertical sync those of other batches in flight besides."""
    pipe = make(method)
    state = begin(pipe)
    for batch in batches():
        state, _ = pipe.step(state, batch)
        for k, own in enumerate(state.stages):
            kept = [list(map(id, jax.tree.leaves(params))) for params in (own.params, *own.previous)]
            held = [set(map(id, memo.held)) for (stage, _), memo in state.memos.items() if stage == k]
            versions = [[held & set(ids) for ids in kept] for held in held]
            if method.name == "pipedream_2bw":
                both = 1 + (kept[0] == kept[1])  # they are one before the first update
                assert all(sum(map(bool, found)) == both for found in versions)
            elif k and versions:
                assert versions[-1][k]
