import dataclasses
import io
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fdg_jax import schedule
from fdg_jax.build import build, make_optimizer
from fdg_jax.checkpoint import Weights, load_weights
from fdg_jax.config import (
    ConfigError,
    DataSettings,
    MethodSettings,
    ModelSettings,
    OptimSettings,
    Settings,
    make_method,
)
from fdg_jax.data import ArraySource, digits
from fdg_jax.metrics import softmax_cross_entropy
from fdg_jax.pipeline import Pipeline
from fdg_jax.train import RunFailed, _signals, evaluate, train_and_evaluate

SMALL = Settings(
    seed=3,
    epochs=2,
    batch_size=256,
    log_every_steps=2,
    model=ModelSettings(name="mlp", depth=2, width=16),
    data=DataSettings(source="digits"),
    method=MethodSettings(beta=0.5),
    optim=OptimSettings(learning_rate=0.05, schedule="constant"),
)
TRAIN_TAGS = {"train/loss", "train/accuracy", "train/images_per_s"}
TEST_TAGS = {"test/loss", "test/accuracy"}


def train(settings, workdir):
    text = io.StringIO()
    result = train_and_evaluate(settings, workdir, Console(file=text, width=200))
    return result, text.getvalue()


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "small"
    return workdir, *train(SMALL, workdir)


def test_a_run_leaves_settings_metrics_events_and_weights(finished):
    workdir, result, _ = finished
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(SMALL)))
    left = {path.name.split(".")[0] for path in workdir.iterdir()}
    assert left == {"config", "metrics", "events", "params", "checkpoints", "run"}
    (start,) = json.loads((workdir / "run.json").read_text())
    assert start["devices"] == {"cpu": 2}
    lines = read_lines(workdir)
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10]  # every second step, and the ends of two epochs of 5
    assert [line["epoch"] for line in lines] == [0.4, 0.8, 1.0, 1.2, 1.6, 2.0]
    for line in lines:
        measured = TRAIN_TAGS | (TEST_TAGS if line["step"] % 5 == 0 else set())
        assert set(line) == {"step", "epoch", "time_s"} | measured
    assert result.metrics == {tag: lines[-1][tag] for tag in TEST_TAGS}
    assert result.stopped_by is None


def test_the_weights_left_behind_are_those_that_were_tested(finished):
    workdir, result, _ = finished
    pipe, source = build(dataclasses.replace(SMALL, num_stages=1))
    images, _, _ = next(source.test_batches(source.num_test))
    state = pipe.init(jax.random.key(1), images)
    loaded = load_weights(workdir / "params", Weights(pipe.params(state), pipe.module_state(state)))
    state = pipe.init(jax.random.key(1), images, loaded.params, loaded.module_state)
    loss, metrics = softmax_cross_entropy(pipe.predict(state, images), source.test_labels)
    assert result.metrics["test/accuracy"] == pytest.approx(float(metrics["accuracy"]), abs=1e-6)
    assert result.metrics["test/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert evaluate(pipe, state, source, 7)["test/loss"] == pytest.approx(float(loss), rel=1e-5)  # 360 = 51 * 7 + 3


def test_a_run_says_first_what_it_will_do(finished):
    workdir, result, text = finished
    told = text[: text.index("\nepoch ")]
    for part in (
        "digits: 1,437 training and 360 test images of 8x8x1, 10 classes",
        "157 images left over are dropped",
        "fdg(beta=0.5, policy=stash), 2 stages",
        " 2    B0 U F2     F1 B1 U",
        "stage  layers",
        "old weights",
        f"writing to {workdir}",
    ):
        assert part in told, part
    lines = [line for line in text.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 6
    assert f"test accuracy {100 * result.metrics['test/accuracy']:.2f} %" in lines[-1]
    assert "images/s" in lines[-1]


def test_signals_are_handled_during_a_run_only(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(dataclasses.replace(SMALL, epochs=1), tmp_path / "run")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.fixture
def interrupts():
    """Python's own handler, also where a shell began the tests in the background, and deaf to interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_first_interrupt_is_collected_and_a_second_acts():
    console = Console(file=io.StringIO(), width=200)
    with _signals(console) as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "stopping after this batch to save it; press Ctrl-C again to stop at once" in console.file.getvalue()


def rates(settings, steps_per_epoch, epochs, num):
    """What `num` updates of a weight 2 subtract for a gradient 1."""
    optimizer = make_optimizer(settings, steps_per_epoch, epochs)
    weight = jnp.full(1, 2.0)
    state, taken = optimizer.init(weight), []
    for _ in range(num):
        update, state = optimizer.update(jnp.ones(1), state, weight)
        taken.append(-float(update[0]))
    return taken


def test_settings_count_epochs_and_optimizers_updates():
    plain = OptimSettings(learning_rate=0.1, momentum=0.0, weight_decay=0.0)
    piecewise = dataclasses.replace(plain, schedule="piecewise", milestones=(1, 2), warmup_epochs=0.5)
    expected = [0.01] * 2 + [0.1] * 2 + [0.01] * 4 + [0.001] * 4
    np.testing.assert_allclose(rates(piecewise, 4, 3, 12), expected, rtol=1e-5)
    cosine = dataclasses.replace(plain, schedule="cosine", weight_decay=0.5)  # 1 + 0.5 * 2 is the gradient then
    expected = [0.2 * 0.5 * (1 + np.cos(np.pi * i / 8)) for i in range(9)]
    np.testing.assert_allclose(rates(cosine, 4, 2, 9), expected, atol=1e-6)
    nesterov = dataclasses.replace(plain, schedule="constant", momentum=0.5, nesterov=True)
    np.testing.assert_allclose(rates(nesterov, 4, 2, 2), [0.1 * 1.5, 0.1 * 1.75], rtol=1e-6)


def test_every_setting_reaches_its_place():
    method = make_method(MethodSettings(beta=0.3, policy="current", order="forward_first"))
    assert (method.beta, method.policy) == (0.3, "current")
    assert method.schedule(3) == schedule.fdg(3, "forward_first")
    kernels = []
    for seed in (0, 1):
        pipe, source = build(dataclasses.replace(SMALL, seed=seed, dtype="bfloat16"))
        state = pipe.init(jax.random.key(0), source.batch(0, 0, 8)[0])
        assert pipe._started().plan.shapes[1].dtype == "bfloat16"
        kernels.append(jax.tree.leaves(pipe.params(state))[-1])
    assert (kernels[0] != kernels[1]).any()


def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
    workdir, _, _ = finished
    train(SMALL, tmp_path / "again")
    times = {"time_s", "train/images_per_s"}
    without_times = [
        [{k: v for k, v in line.items() if k not in times} for line in read_lines(w)]
        for w in (workdir, tmp_path / "again")
    ]
    assert without_times[0] == without_times[1]


def test_logging_is_the_mean_of_every_batch_once(finished):
    """The means of the logs, weighted by the batches that left the last stage in each, are the mean over all ten; the
    last log holds what draining added."""
    workdir, _, _ = finished
    counts = [1, 2, 1, 1, 2, 3]
    lines = read_lines(workdir)
    pipe, source = build(SMALL)
    state = pipe.init(jax.random.key(SMALL.seed), source.batch(0, 0, 256)[0])
    losses = []
    for i in range(10):
        state, metrics = pipe.step(state, source.batch(SMALL.seed, i, 256))
        losses += [metrics] if metrics else []
    losses = [float(m["loss"]) for m in losses + pipe.drain(state)[1]]
    assert sum(counts) == len(losses) == 10
    ends = np.cumsum(counts)
    for line, start, end in zip(lines, ends - counts, ends, strict=True):
        assert line["train/loss"] == pytest.approx(np.mean(losses[start:end]), rel=1e-5)


def test_a_loss_that_is_no_longer_finite_stops_the_run(tmp_path):
    workdir = tmp_path / "nan"
    settings = dataclasses.replace(SMALL, optim=dataclasses.replace(SMALL.optim, learning_rate=1e9), epochs=4)
    with pytest.raises(
        RunFailed, match=r"the loss is .*: it stopped being finite between steps 3 and 4 \(ticks 2 to 3\)"
    ) as caught:
        train(settings, workdir)
    assert "\n" not in str(caught.value)
    assert [line["step"] for line in read_lines(workdir)] == [2]
    assert not (workdir / "params").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_one_file_of_a_run_is_enough_to_be_left_alone(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="holds a run already"):
        train(SMALL, tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to --workdir"):
        train(SMALL, tmp_path / "file" / "run")


def pictures(folder):
    """Two classes of four training images and two test images, 8 x 8."""
    for split, count in (("train", 4), ("test", 2)):
        for number, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (100 * number + i,) * 3).save(folder / split / name / f"{i}.png")
    return folder


def test_a_folder_is_read_limited_and_cut_where_published(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    of_data = DataSettings(source="folder", path=str(pictures(tmp_path / "pictures")), limit=6)
    model = ModelSettings(name="resnet_cifar", depth=20, width=16)
    pipe, source = build(dataclasses.replace(SMALL, model=model, data=of_data, batch_size=2, cuts="published"))
    assert pipe.cuts == (5,)
    assert (source.num_train, source.num_test, source.num_classes) == (6, 4, 2)
    assert (source.crop_padding, source.flip) == (4, True)
    assert source.image_device, source.label_device == pipe.devices


def test_arrays_are_read_and_cut_by_measurement(tmp_path):
    images, labels = np.zeros((8, 2, 2), np.uint8), np.arange(8) % 4
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    of_data = DataSettings(source="arrays", path=str(tmp_path / "set.npz"), crop_padding=1)
    settings = dataclasses.replace(SMALL, data=of_data, batch_size=4, cuts="balanced")
    text = io.StringIO()
    pipe, source = build(settings, Console(file=text, width=200))
    assert source.image_shape == (2, 2, 1)
    assert f"cuts {pipe.cuts} balanced by measurement: " in text.getvalue()
    with pytest.raises(ConfigError, match=r"crop_padding must be at most 2, the side of an image; got 3"):
        build(dataclasses.replace(settings, data=dataclasses.replace(of_data, crop_padding=3)))


def test_a_set_of_tfds_is_asked_for_by_its_name(monkeypatch):
    asked = []
    monkeypatch.setattr("fdg_jax.data.tfds.tfds", lambda *args: asked.append(args) or digits())
    for path in ("", "/data"):
        build(dataclasses.replace(SMALL, data=DataSettings(source="tfds", name="cifar100", path=path)))
    assert asked == [("cifar100", None), ("cifar100", "/data")]


def test_a_batch_that_cannot_be_read_fails_the_run_in_one_line(tmp_path, monkeypatch):
    def broken(self, seed, batch_size, start=0):
        yield self.batch(seed, 0, batch_size)
        raise ValueError("digits, train split, image 7 does not decode")

    monkeypatch.setattr(ArraySource, "batches", broken)
    with pytest.raises(RunFailed, match="digits, train split, image 7 does not decode; the metrics before are kept"):
        train(SMALL, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_stages": 9}, "num_stages must lie in 1..4"),
        ({"cuts": (9,)}, r"cuts must lie in 1..3 for 4 layers; got \(9,\)"),
        ({"batch_size": 2000}, "batch_size must be at most 1437"),
        ({"model": ModelSettings(name="resnet_cifar", depth=9)}, "did you mean 8"),
    ],
)
def test_settings_that_do_not_fit_leave_nothing_behind(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(SMALL, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "optimizer", "words"),
    [
        (MethodSettings(beta=0.0), "sgd", "beta 0: only the last stage learns from the loss"),
        (MethodSettings(name="bp"), "adamw", "bp, 2 stages"),
    ],
)
def test_what_may_surprise_is_said(method, optimizer, words, tmp_path):
    optim = dataclasses.replace(SMALL.optim, name=optimizer, learning_rate=1e-3)
    settings = dataclasses.replace(SMALL, method=method, optim=optim, epochs=1)
    told = train(settings, tmp_path / "run")[1]
    assert words in told
    assert ("beta 0:" in told) == (method.beta == 0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_gradients_are_not_shrunk_for_an_optimizer_that_ignores_their_scale(optimizer, tmp_path):
    optim = OptimSettings(optimizer, 1e-3, weight_decay=0.0, schedule="constant")
    adam = dataclasses.replace(SMALL, optim=optim, epochs=1)
    with pytest.raises(ConfigError, match=r"shrinking gradients .* use LearningRateShrinking .* or") as e:
        train(adam, tmp_path / "run")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()
    damped = MethodSettings(corrections="learning_rate_shrinking(beta=0.5)")
    assert "LearningRateShrinking(beta=0.5)" in train(dataclasses.replace(adam, method=damped), tmp_path / "run")[1]


def test_the_fused_engine_writes_the_metrics_of_mpmd(finished, tmp_path, monkeypatch):
    """Logs, evaluations and checkpoints fall on the same steps, however many batches a call takes."""
    one = dataclasses.replace(SMALL, engine="fused", checkpoint=dataclasses.replace(SMALL.checkpoint, every_steps=3))
    calls, run = [], Pipeline.run
    monkeypatch.setattr(Pipeline, "run", lambda pipe, *args: calls.append(args[-1]) or run(pipe, *args))
    train(one, tmp_path / "run")
    lines, expected = read_lines(tmp_path / "run"), read_lines(finished[0])
    for line, other in zip(lines, expected, strict=True):
        assert set(line) == set(other)
        assert line["step"] == other["step"]
        for tag in TRAIN_TAGS | TEST_TAGS:
            if tag in line and tag != "train/images_per_s":
                assert line[tag] == pytest.approx(other[tag], rel=1e-4)
    assert sum(calls) == 10
    assert max(calls) > 1
