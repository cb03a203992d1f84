"""Stages that wait for nobody: the algorithm in plain lists, to the bit what must be equal, by name, and refused."""

import functools
import json
from itertools import islice

import jax
import numpy as np
import pytest
from helpers import assert_trees_close, feed_of, host, in_float64, make_pipeline, tiny_batches, tiny_mlp
from oracle import Module, hidden_layer, linear_layer
from oracle_local import Added, asynchronous_dgl, linear_head

from fdg_jax import methods, optim
from fdg_jax.config import ConfigError, default_config, make_method, resolve, resolve_comparison
from fdg_jax.corrections import LearningRateDamping
from fdg_jax.engine.base import INPUTS, FirstFault
from fdg_jax.methods_table import describe
from fdg_jax.planning import Planner
from fdg_jax.probe import Probe
from fdg_jax.recorder import Recorder
from fdg_jax.schedule import Op
from fdg_jax.snapshot import Snapshot

STEPS = [[hidden_layer()], [hidden_layer()], [hidden_layer(), linear_layer()]]  # of three stages
BATCHES = tiny_batches(6)
FAST_FIRST, MIXED, SLOW_FIRST = (1, 3, 2), (2, 1, 3), (4, 1, 1)


def dgl(buffer, slowdown=(), max_uses=0):
    return methods.dgl("linear", buffer, max_uses, slowdown)


@functools.cache
def pipeline(method, num_devices=3):
    return make_pipeline(method=method, stack=False, cuts=(1, 2), devices=jax.devices()[:num_devices])


def begin(pipe):
    return pipe.init(jax.random.key(0), BATCHES[0][0])


def walked(pipe, state, batches):
    """The state after some steps, and every loss."""
    losses = []
    for batch in batches:
        state, left = pipe._engine.step(state, *batch)
        losses += [float(metrics["loss"]) for metrics in left]
    return state, losses


def owned(state):
    """What the stages have learnt, and how often they did."""
    return host([(own.params, own.opt_state, own.counts, own.totals) for own in state.stages])


@pytest.mark.parametrize("method", [dgl(1), dgl(1, (1, 1, 1)), dgl(3, max_uses=2)], ids=str)
def test_stages_of_equal_speed_are_dgl_to_the_bit(method):
    ends = []
    for each in (methods.dgl("linear"), method):
        pipe = pipeline(each)
        state, losses = walked(pipe, begin(pipe), BATCHES)
        moving = owned(state)
        state, drained = pipe.drain(state)
        assert len(drained) == 2
        state, more = walked(pipe, state, BATCHES[:3])  # fills anew
        ends.append((moving, owned(state), losses, [float(each["loss"]) for each in drained], more))
    assert_trees_close(*ends, 0)


@pytest.mark.parametrize(
    ("slowdown", "size", "max_uses"),
    [(FAST_FIRST, 1, 0), (FAST_FIRST, 3, 0), (MIXED, 2, 0), (SLOW_FIRST, 2, 2), (SLOW_FIRST, 1, 1)],
)
def test_it_is_the_algorithm(slowdown, size, max_uses):
    """Losses of the last stage in order, all weights in flight, and when what is left has been used."""
    with jax.enable_x64(True):
        batches = [(x.astype(np.float64), y) for x, y in BATCHES]
        given = in_float64(tiny_mlp(3, dtype="float64"))
        pipe = make_pipeline(given, method=dgl(size, slowdown, max_uses), stack=False, cuts=(1, 2))
        state = pipe.init(jax.random.key(0), batches[0][0])
        start = host([own.params for own in state.stages])
        optimizer = optim.sgd(0.05, 0.9, 1e-2)
        layers = [tree[:-1] if k < 2 else tree for k, tree in enumerate(start)]
        modules = [Module(steps, p, optimizer, "stash") for steps, p in zip(STEPS, layers, strict=True)]
        heads = [Added(linear_head, tree[-1], optimizer) for tree in start[:2]]
        algorithm = asynchronous_dgl(modules, heads, batches, slowdown, size, max_uses)

        def compare(losses, ticks):
            wanted = [float(each[-1]) for each in ticks if each[-1] is not None]
            np.testing.assert_allclose(losses, wanted, rtol=1e-6)  # which are float32
            heads_now = [[head.params] for head in heads] + [[]]
            expected = [[*module.params, *head] for module, head in zip(modules, heads_now, strict=True)]
            assert_trees_close([own.params for own in state.stages], expected, 1e-9)

        state, losses = walked(pipe, state, batches)
        compare(losses, list(islice(algorithm, len(batches) * slowdown[0])))
        state, drained = pipe.drain(state)
        compare([float(metrics["loss"]) for metrics in drained], list(algorithm))
        assert not state.inbox | state.outbox


def test_stages_do_not_depend_on_those_that_follow():
    """Neither on how fast they are, nor on whether they are there; heads and optimizers included, to the bit."""
    short = make_pipeline(
        [*tiny_mlp()[:2], tiny_mlp()[-1]], method=dgl(2, MIXED[:2]), stack=False, cuts=(1,), devices=jax.devices()[:2]
    )
    ends = []
    for pipe in (pipeline(dgl(2, MIXED)), pipeline(dgl(2, (2, 1, 1))), short):
        state, _ = walked(pipe, begin(pipe), BATCHES)
        ends.append(owned(state))
    assert_trees_close(ends[0][:2], ends[1][:2], 0)
    assert_trees_close(ends[0][0], ends[2][0], 0)
    assert ends[0][2][2][0] < ends[1][2][2][0], "visits of the last stage"


@pytest.mark.parametrize("num_devices", [1, 3])
def test_a_snapshot_in_flight_goes_on_with_the_same_bits(num_devices):
    """Buffers and what is on its way included, in another process too, which has to find out who has used what."""
    pipe, fresh = (
        pipeline(dgl(2, MIXED)),
        make_pipeline(method=dgl(2, MIXED), stack=False, cuts=(1, 2), devices=jax.devices()[:num_devices]),
    )
    state, _ = pipe.step(begin(pipe), BATCHES[0])
    state, _ = walked(pipe, state, BATCHES[1:3])
    taken = pipe.snapshot(state)
    assert {message["kind"] for message in taken.record["outbox"]} == {"inputs", "targets"}
    taken = Snapshot([np.array(leaf) for leaf in taken.arrays], json.loads(json.dumps(taken.record)))
    state, losses = walked(pipe, state, BATCHES[3:])
    again, losses_again = walked(fresh, fresh.restore(begin(fresh), taken), BATCHES[3:])
    assert losses_again == losses
    assert_trees_close(owned(again), owned(state), 0)
    assert_trees_close(owned(fresh.drain(again)[0]), owned(pipe.drain(state)[0]), 0)
    _, losses_again = walked(pipe, pipe.restore(begin(pipe), taken), BATCHES[3:])
    assert losses_again == losses


def test_many_steps_in_a_call_are_the_steps():
    pipe = pipeline(dgl(2, MIXED))
    state, losses = walked(pipe, begin(pipe), BATCHES)
    run, metrics = pipe.run(begin(pipe), feed_of(BATCHES), 6)
    assert_trees_close(owned(run), owned(state), 0)
    assert metrics["loss"].tolist() == losses
    assert pipe.ticks_per_batch == 2
    assert [int(own.counts[1]) for own in run.stages] == [6, 11, 4], "visits of 12 ticks"


def test_a_step_without_a_visit_of_the_last_stage_has_no_metrics_and_one_with_several_their_mean():
    pipe = pipeline(dgl(1, (3, 1, 1)))
    state, first = pipe.step(begin(pipe), BATCHES[0])
    _, losses = walked(pipe, begin(pipe), BATCHES[:2])
    assert first["loss"] == losses[0]
    _, second = pipe.step(state, BATCHES[1])
    assert len(losses) == 4
    assert float(second["loss"]) == pytest.approx(np.mean(losses[1:]))
    slow = pipeline(dgl(2, (1, 1, 4)))
    state, metrics = begin(slow), []
    for batch in BATCHES:
        state, left = slow.step(state, batch)
        metrics.append(left is not None)
    assert metrics == [False, False, True, False, False, False]


def test_what_waits_in_buffers_is_forecast():
    pipe = pipeline(dgl(3, SLOW_FIRST))
    state, most = begin(pipe), [0, 0, 0]
    for batch in BATCHES:
        state, _ = pipe.step(state, batch)
        for k in range(3):
            held = [tree.nbytes for (kind, reader, _), tree in state.inbox.items() if (kind, reader) == (INPUTS, k)]
            most[k] = max(most[k], sum(held))
    assert most == [0, 3 * 80, 2 * 80], "(4, 5) float32; of stage 2 the third is on its way after every tick"
    assert [forecast.messages for forecast in pipe.forecasts] == [80, 3 * 80 + 80, 3 * 80]


def test_the_picture_is_what_the_stages_do():
    shown = pipeline(dgl(1, (2, 1, 3))).show(5).splitlines()[2:8]
    assert [line.split() for line in shown[1:]] == [
        ["0", "F0", "B0", "U"],
        ["1", "F0", "B0", "U"],
        ["2", "F1", "B1", "U", "F0", "B0", "U", "F0", "B0", "U"],
        ["3", "F1", "B1", "U"],
        ["4", "F2", "B2", "U", "F1", "B1", "U"],
    ]


def test_visits_are_seen():
    pipe = pipeline(dgl(2, MIXED))
    recorder = Recorder(pipe.devices, pipe.schedule)
    state = begin(pipe)
    pipe.observe(recorder)
    state, _ = walked(pipe, state, BATCHES[:3])
    pipe.observe(None)
    boxes = recorder.stop().boxes
    assert [(box.stage, box.tick) for box in boxes if box.stage != 1] == [(0, 0), (0, 2), (2, 2), (0, 4), (2, 5)]
    assert [box.ops[0] for box in boxes if box.stage == 1] == [Op("F", sent) for sent in (0, 0, 2, 2, 4)]
    assert len({int(own.counts[1]) for own in state.stages}) == 3


def test_a_fault_has_the_tick_of_its_visit():
    pipe = pipeline(dgl(2, MIXED))
    spoilt = [(np.where(number == 2, np.nan, x), y) for number, (x, y) in enumerate(BATCHES)]
    state, _ = walked(pipe, begin(pipe), spoilt)
    assert pipe.first_fault(state) == FirstFault(stage=0, batch=2, tick=4)
    assert [fault.first_batch for fault in pipe.faults(state)] == [2, 4, 2], "visits: of stage 2 that of tick 8"
    assert [pipe._engine.tick_of_answer(k, n) for k, n in ((1, 4), (2, 2))] == [5, 8]


# By name


def made(**given):
    config = default_config()
    config.method.update({"name": "dgl", **given})
    return resolve(config)


def test_a_config_has_it_by_name():
    assert make_method(made(buffer=4, max_uses=2, slowdown=(1, 2)).method) == methods.dgl("mlp_sr", 4, 2, (1, 2))
    assert make_method(made().method) == methods.dgl()
    config = default_config()
    config.methods, config.seeds = "dgl, dgl(buffer=4, slowdown=(1, 2)), bp", (0,)
    found = {name: make_method(settings.method) for (name, _), settings in resolve_comparison(config).items()}
    assert found["dgl(buffer=4, slowdown=(1, 2))"] == methods.dgl(buffer=4, slowdown=(1, 2))
    assert len(found) == 3
    assert describe(dgl(4), 3).label == "dgl, buffer=4"
    assert describe(dgl(4), 3)[1:] == describe(methods.dgl(), 3)[1:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dgl(-1), "buffer must be a whole number, 0 or more; got -1"),
        (lambda: dgl(1, max_uses=-2), "max_uses must be a whole number, 0 or more; got -2"),
        (lambda: dgl(0, (1, 2)), "set buffer to 1 or more; got 0"),
        (lambda: dgl(2, (1, 0)), r"slowdown must hold a number of ticks, at least 1, for every stage; got \(1, 0\)"),
        (lambda: made(buffer=-1), "buffer must be a whole number"),
        (lambda: made(name="fdg", buffer=2), "fdg has no buffer, it takes beta, policy, order: leave buffer at 0"),
        (lambda: resolve({"probe_every_steps": 5, "method": {"name": "dgl", "buffer": 1}}), "no probe can follow"),
        (lambda: Probe(pipeline(dgl(1))), "a probe follows a batch from stage to stage"),
        (lambda: make_pipeline(method=dgl(1, (1, 2))), r"for each of the 3 stages, or none at all; got \(1, 2\)"),
        (lambda: make_pipeline(method=dgl(1), engine="fused"), "use engine='mpmd'"),
        (
            lambda: make_pipeline(method=dgl(1).with_corrections(LearningRateDamping())),
            r"LearningRateDamping \(learning_rate_damping in a config\) .* a delay, and dgl has none",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_plan_is_of_stages_in_lock_step():
    config = default_config()
    config.method.update({"name": "dgl", "buffer": 2})
    config.model.update({"name": "mlp", "depth": 2, "width": 4})
    settings = resolve(config)
    with pytest.raises(ConfigError, match=r"ask for one with --config\.method\.buffer=0"):
        Planner(settings).plan(settings)
