"""Probes against plain JAX on saved weights, the methods' own promises, and a run that must not notice them."""

import dataclasses
import io
import signal
from itertools import pairwise

import jax
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from helpers import assert_trees_close, feed_of, host, make_pipeline, tiny_batches
from PIL import Image
from rich.console import Console

from fdg_jax import methods, optim
from fdg_jax.checkpoint import load_weights
from fdg_jax.config import (
    ConfigError,
    DataSettings,
    MethodSettings,
    ModelSettings,
    OptimSettings,
    Settings,
    default_config,
    differences,
    resolve,
)
from fdg_jax.corrections import SwitchToSynchronous
from fdg_jax.metrics import read_lines
from fdg_jax.pipeline import Pipeline
from fdg_jax.probe import Figures, Probe
from fdg_jax.staleness import draw, probed, tagged
from fdg_jax.train import train_and_evaluate

POLICIES = ["stash", "current", "recompute"]
BATCHES = tiny_batches(12)
CUTS = (1, 2)  # the network's four layers in three stages: the last has two


def probes(numbers, batches=BATCHES, **kwargs):
    """The figures of these batches."""
    pipe = make_pipeline(**{"cuts": CUTS, **kwargs})
    state, probe, found = pipe.init(jax.random.key(0), batches[0][0]), Probe(pipe), []
    for i in range(max(numbers) + 1):
        if i in numbers:
            found.append(probe.measure(state, batches[i]))
        state, _ = pipe.step(state, batches[i])
    return found


# The oracle: Algorithm 1 with all that it does written down


class Diary(oracle.Module):
    """A module that notes its weights before every update, and the gradients that it makes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.versions, self.forwards, self.gradients = [self.params], [], []

    def forward(self, x):
        self.forwards.append(len(self.versions) - 1)  # the number of updates that made its weights
        return super().forward(x)

    def backward(self, cotangent):
        gradients, sent = super().backward(cotangent)
        self.gradients.append(gradients)
        return gradients, sent

    def update(self, gradients):
        super().update(gradients)
        self.versions.append(self.params)


def diaries(policy, beta=0.5):
    """Every stage's, after all batches, from the weights of the tiny network."""
    pipe = make_pipeline(cuts=CUTS)
    params = pipe.params(pipe.init(jax.random.key(0), BATCHES[0][0]))
    layers = [*[oracle.hidden_layer()] * 3, oracle.linear_layer()]
    bounds, optimizer = (0, *CUTS, 4), optim.sgd(0.05, 0.9, 1e-2)
    stages = [(layers[i:j], params[i:j]) for i, j in pairwise(bounds)]
    modules = [Diary(*stage, optimizer, policy) for stage in stages]
    for _ in oracle.fdg(modules, BATCHES[:8], beta):
        pass
    return modules


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def fresh_gradients(modules, i):
    """Of all stages, for batch i, when each has learnt from the batches before it."""
    x, labels = BATCHES[i]

    def loss(params):
        outputs = x
        for module, p in zip(modules, params, strict=True):
            outputs = oracle.run_module(module.layers, p, outputs)[-1][-1]
        return oracle.cross_entropy(outputs, labels)

    return jax.jit(jax.grad(loss))([module.versions[i] for module in modules])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_five_figures_are_what_plain_jax_says(policy):
    modules, numbers = diaries(policy), (1, 7)  # while the pipeline fills, and afterwards
    for i, found in zip(numbers, probes(numbers, method=methods.fdg(0.5, policy)), strict=True):
        for k, (own, module, fresh) in enumerate(zip(found, modules, fresh_gradients(modules, i), strict=True)):
            then, now = flat(module.versions[module.forwards[i]]), flat(module.versions[i])
            g, h = flat(module.gradients[i]), flat(fresh)
            assert own.delay == i - module.forwards[i] == min(i, max(0, 2 * (2 - k) - 1))
            assert own.factor == 0.5 ** (2 - k)
            expected = (
                np.linalg.norm(now - then) / np.linalg.norm(now),
                np.linalg.norm(g),
                g @ h / np.linalg.norm(g) / np.linalg.norm(h),
            )
            np.testing.assert_allclose((own.distance, own.gradient_norm, own.cosine), expected, rtol=1e-5, atol=1e-7)
    assert min(own.cosine for own in found) < 0.9995  # what was compared are different gradients


# What methods promise


def test_weights_that_stay_are_at_no_distance_and_their_gradients_are_fresh():
    """With the dropout masks and the statistics of the batch, in training form."""
    random = nnx.Rngs(0)
    network = [nnx.Linear(6, 8, rngs=random), nnx.BatchNorm(8, rngs=random), nnx.Dropout(0.5, rngs=random)]
    network.append(nnx.Linear(8, 3, rngs=random))
    (found,) = probes([6], layers=network, cuts=(1, 3), optimizer=optax.sgd(0.0))
    assert [own.delay for own in found] == [3, 1, 0]
    assert [own.distance for own in found] == [0.0] * 3
    np.testing.assert_allclose([own.cosine for own in found], 1, atol=1e-6)


@pytest.mark.parametrize("method", [methods.gpipe(2), methods.dgl("linear")], ids=str)
def test_without_delay_the_gradient_is_the_fresh_one(method):
    (found,) = probes([5], method=method)
    for own in found:
        assert (own.delay, own.distance, own.factor) == (0, 0.0, 1.0)
        assert own.cosine == pytest.approx(1, abs=1e-6)


def test_a_predicted_gradient_is_compared_with_the_true_one():
    (found,) = probes([5], method=methods.dni("linear"))
    assert [(own.delay, own.distance, own.factor) for own in found] == [(0, 0.0, 1.0)] * 3
    assert found[2].cosine == pytest.approx(1, abs=1e-6)  # of the loss
    assert all(abs(own.cosine) < 0.99 for own in found[:2])


SWITCH = methods.fdg(0.5).with_corrections(SwitchToSynchronous(6))
CASES = [
    ("mpmd", methods.adl(2, 0.5), [(2, 0.25), (1, 0.5), (0, 1)]),
    ("mpmd", methods.pipedream(vertical_sync=True), [(2, 1), (2, 1), (2, 1)]),
    ("mpmd", SWITCH, [(3, 0.25), (1, 0.5), (0, 1)]),
    ("fused", methods.fdg(0.5), [(3, 0.25), (1, 0.5), (0, 1)]),
    ("fused", methods.bp(), [(0, 1), (0, 1), (0, 1)]),
]


@pytest.mark.parametrize(("engine", "method", "expected"), CASES, ids=[f"{e}-{m}" for e, m, _ in CASES])
def test_a_run_does_not_notice_probes(engine, method, expected):
    """Losses and the whole state, in flight and drained, bit for bit; and each batch's own delay and shrinking."""
    pipe, probed = make_pipeline(cuts=CUTS, method=method, engine=engine), {}
    feed, probe, ends = feed_of(BATCHES), Probe(pipe), []
    for marks in ((0, 4, 5, 8, 12), (0, 12)):
        state, losses = pipe.init(jax.random.key(0), BATCHES[0][0]), []
        for start, end in pairwise(marks):
            if start > 0:
                probed[start] = probe.measure(state, BATCHES[start])
            state, metrics = pipe.run(state, feed, end - start)
            losses += [] if metrics is None else np.asarray(metrics["loss"]).tolist()
        left = host((state.inbox, state.outbox, state.memos))
        state, _ = pipe.drain(state)
        ends.append((losses, left, host([own._replace(key=0) for own in state.stages])))
    assert_trees_close(ends[0], ends[1], 0)
    assert [(own.delay, own.factor) for own in probed[4]] == expected
    for own in (*probed[4], *probed[8]):
        assert (own.distance > 0) == (own.delay > 0)
    if method is SWITCH or method.name == "bp":
        assert [(own.delay, own.factor, round(own.cosine, 5)) for own in probed[8]] == [(0, 1, 1)] * 3


# In a run

RUN = Settings(
    seed=3,
    epochs=2,
    batch_size=256,
    log_every_steps=4,
    probe_every_steps=2,
    model=ModelSettings(name="mlp", depth=2, width=16),
    data=DataSettings(source="digits"),
    method=MethodSettings(beta=0.5),
    optim=OptimSettings(learning_rate=0.05, schedule="constant"),
)
QUANTITIES = ("delay", "distance", "gradient_norm", "cosine", "factor")


def train(settings, workdir):
    text = io.StringIO()
    train_and_evaluate(settings, workdir, Console(file=text, width=200))
    return read_lines(workdir / "metrics.jsonl"), text.getvalue()


def without_times(lines):
    return [
        {key: value for key, value in line.items() if key not in ("time_s", "train/images_per_s")} for line in lines
    ]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with probes that was stopped after seven of its ten steps, and went on."""
    workdir, whole = tmp_path_factory.mktemp("runs") / "probed", Pipeline.step

    def step(self, state, batch):
        state, metrics = whole(self, state, batch)
        if state.fed == 7:  # the last log was at 5, the last probe at 6
            signal.raise_signal(signal.SIGINT)
        return state, metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "step", step)
        train(RUN, workdir)
    return workdir, train(RUN, workdir)[0]


def test_a_run_with_probes_stops_goes_on_and_ends_like_one_without(stopped, tmp_path):
    workdir, lines = stopped
    plain, _ = train(dataclasses.replace(RUN, probe_every_steps=0), tmp_path)
    found = probed(lines)
    assert without_times(line for line in lines if line not in found) == without_times(plain)
    assert_trees_close(load_weights(workdir / "params"), load_weights(tmp_path / "params"), 0)
    assert not (tmp_path / "staleness.png").exists()


def test_probes_leave_lines_events_and_a_picture(stopped):
    workdir, lines = stopped
    found = probed(lines)
    assert [line["step"] for line in found] == [2, 4, 6, 8]  # after ten steps there is no batch to follow
    tags = {f"staleness/stage{k}/{name}" for k in (0, 1) for name in QUANTITIES}
    assert all(set(line) == {"step", "epoch", "time_s", *tags} for line in found)
    assert [line["staleness/stage0/delay"] for line in found] == [1] * 4
    events = b"".join(path.read_bytes() for path in workdir.glob("events*"))
    assert all(tag.encode() in events for tag in tags)
    with Image.open(workdir / "staleness.png") as picture:
        assert picture.size == (1600, 1280)


def test_the_fused_engine_is_probed_at_the_same_steps_with_the_same_figures(stopped, tmp_path):
    lines, _ = train(dataclasses.replace(RUN, engine="fused", epochs=1), tmp_path)
    found, expected = probed(lines), probed(stopped[1])
    assert [line["step"] for line in found] == [2, 4]
    for one, other in zip(found, expected[:2], strict=True):
        for tag in (tag for tag in one if tag.startswith("staleness/")):
            assert one[tag] == pytest.approx(other[tag], rel=1e-4), tag


def test_a_probe_for_which_there_is_no_memory_costs_the_run_nothing(tmp_path, monkeypatch):
    def refuse(self, state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")

    monkeypatch.setattr(Probe, "measure", refuse)
    lines, told = train(dataclasses.replace(RUN, epochs=1), tmp_path / "run")
    assert "no more probes: the one after step 2 failed: RESOURCE_EXHAUSTED: Out of memory" in told
    assert told.count("no more probes") == 1
    assert lines[-1]["step"] == 5


def test_the_cadence_is_checked_and_may_change_in_a_run_that_goes_on():
    config = default_config()
    assert resolve(config).probe_every_steps == 0
    config.probe_every_steps = -1
    with pytest.raises(ConfigError, match=r"config\.probe_every_steps must be finite and at least 0; got -1"):
        resolve(config)
    assert differences(dataclasses.asdict(RUN), dataclasses.replace(RUN, probe_every_steps=5)) == []


# The picture


def line(step, **values):
    figures = [Figures(3 - k, 0.1 * step, 1.0, 0.5, 0.5**k) for k in range(9)]
    return {"step": step, "train/loss": 1.0, **tagged(figures), **values}


def test_the_picture_has_a_panel_a_quantity_and_a_line_a_stage():
    gap = {"staleness/stage2/cosine": None}
    figure = draw([{"step": 1, "train/loss": 2.0}, line(2), line(4, **gap), line(6)])
    panels = figure.axes[:5]
    assert [len(axes.lines) for axes in panels] == [9] * 5
    distance, cosine = panels[1].lines[3], panels[2].lines[2]
    np.testing.assert_allclose(distance.get_xydata(), [(2, 0.2), (4, 0.4), (6, 0.6)])
    np.testing.assert_array_equal(cosine.get_ydata(), [0.5, np.nan, 0.5])
    looks = {(each.get_color(), each.get_linestyle()) for each in panels[0].lines}
    assert len(looks) == 9  # no two stages look alike
    assert [text.get_text() for text in figure.axes[5].get_legend().get_texts()] == [f"stage {k}" for k in range(9)]


def test_where_nothing_was_probed_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match=r"no probes to draw: train with --config\.probe_every_steps"):
        draw([{"step": 1, "train/loss": 2.0}])
