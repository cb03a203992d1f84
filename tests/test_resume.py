"""Runs that were stopped go on, in this process; `test_survival.py` kills real ones."""

import dataclasses
import io
import json
import signal

import jax
import numpy as np
import pytest
from helpers import assert_trees_close
from rich.console import Console

from fdg_jax.build import build, make_optimizer
from fdg_jax.checkpoint import Checkpoints, load_weights, read_checkpoint
from fdg_jax.config import (
    CheckpointSettings,
    ConfigError,
    DataSettings,
    MethodSettings,
    ModelSettings,
    OptimSettings,
    Settings,
    differences,
)
from fdg_jax.data import ArraySource
from fdg_jax.metrics import read_lines
from fdg_jax.pipeline import Pipeline
from fdg_jax.saving import RunFailed
from fdg_jax.train import train_and_evaluate

SMALL = Settings(  # two epochs of five steps, K = 2, the pipeline never empty between them
    seed=3,
    epochs=2,
    batch_size=256,
    log_every_steps=2,
    model=ModelSettings(name="mlp", depth=2, width=16),
    data=DataSettings(source="digits"),
    method=MethodSettings(beta=0.5),
    optim=OptimSettings(learning_rate=0.05, schedule="constant"),
    checkpoint=CheckpointSettings(keep_last=100, keep_best=0),
)


def train(settings, workdir):
    text = io.StringIO()
    result = train_and_evaluate(settings, workdir, Console(file=text, width=200))
    return result, text.getvalue()


def changed(settings=SMALL, **groups):
    """With some fields of some groups, or of the settings themselves, set to other values."""
    values = {
        name: dataclasses.replace(getattr(settings, name), **value) if isinstance(value, dict) else value
        for name, value in groups.items()
    }
    return dataclasses.replace(settings, **values)


@pytest.fixture
def stop_after(monkeypatch):
    """Lets a signal arrive as soon as `step` batches are fed."""

    def arm(step, number=signal.SIGINT):
        whole = Pipeline.step

        def feed(self, state, batch):
            state, metrics = whole(self, state, batch)
            if state.fed == step:
                signal.raise_signal(number)
            return state, metrics

        monkeypatch.setattr(Pipeline, "step", feed)

    return arm


def measured(workdir):
    """The metrics, without what a clock says."""
    times = {"time_s", "train/images_per_s"}
    return [{k: v for k, v in line.items() if k not in times} for line in read_lines(workdir / "metrics.jsonl")]


def steps(workdir):
    return [int(path.name.removeprefix("step_")) for path in Checkpoints(workdir / "checkpoints").complete()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    return workdir, *train(SMALL, workdir)


def assert_same_end(workdir, other):
    assert_trees_close(load_weights(workdir / "params"), load_weights(other / "params"), 0)
    assert measured(workdir) == measured(other)


@pytest.mark.parametrize("step", [1, 2, 5, 7, 10])  # filling, a log, the end of an epoch, neither, the last
def test_a_run_that_was_stopped_ends_like_one_that_was_not(step, straight, stop_after, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    stop_after(step)
    result, _ = train(SMALL, workdir)
    assert result.stopped_by == signal.SIGINT
    saved = workdir / "checkpoints" / f"step_{step:09d}"
    assert result.summary == f"stopped after step {step} of 10, saved in {saved}: the same command goes on from there"
    assert not (workdir / "params").exists()
    assert all(line["step"] < step for line in read_lines(workdir / "metrics.jsonl"))  # its own log is still to come
    monkeypatch.undo()
    result, told = train(SMALL, workdir)
    assert f"going on after step {step}, with " in told
    assert result.stopped_by is None
    assert result.metrics == straight[1].metrics
    assert len(json.loads((workdir / "run.json").read_text())) == 2  # starts
    assert_same_end(workdir, straight[0])


def test_a_finished_run_is_left_as_it_is(straight):
    workdir, finished, _ = straight
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    result, _ = train(SMALL, workdir)
    assert result.metrics == finished.metrics
    assert result.summary.startswith("finished already; ask for more config.epochs")
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_more_epochs_go_on_where_fewer_ended(straight, stop_after, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    train(changed(epochs=1), workdir)
    shorter = load_weights(workdir / "params")
    stop_after(7)
    _, told = train(SMALL, workdir)
    assert "going on after step 5" in told
    monkeypatch.undo()
    train(SMALL, workdir)
    assert_same_end(workdir, straight[0])
    assert_trees_close(load_weights(workdir / "params_of_step_5"), shorter, 0)
    assert not (workdir / "params_of_step_7").exists()
    with pytest.raises(ConfigError, match=r"has taken 10 steps, and config.epochs=1 makes 5: ask for more epochs"):
        train(changed(epochs=1), workdir)


@pytest.fixture
def patient(monkeypatch):
    """A checkpoint that falls due waits for the one before, so that which are written is no matter of speed."""
    monkeypatch.setattr(Checkpoints, "busy", False)


def test_what_a_trajectory_does_not_depend_on_may_change(straight, stop_after, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    stop_after(3)
    train(SMALL, workdir)
    monkeypatch.undo()
    monkeypatch.setattr(Checkpoints, "busy", False)
    train(changed(log_every_steps=50, on_nan="skip", checkpoint={"every_steps": 2}), workdir)
    rounding = 1e-6  # programs that look for NaN are others, in which XLA may fuse otherwise
    assert_trees_close(load_weights(workdir / "params"), load_weights(straight[0] / "params"), rounding)
    assert steps(workdir) == [3, 5, 7, 9, 10]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_stages": 3}, "config.num_stages was 2, is 3"),
        ({"cuts": (1,)}, "config.cuts was layers, is 1"),
        ({"seed": 4}, "config.seed was 3, is 4"),
        ({"batch_size": 128}, "config.batch_size was 256, is 128"),
        ({"method": {"policy": "current"}}, "config.method.policy was stash, is current"),
        ({"method": {"name": "bp"}}, "config.method.name was fdg, is bp"),
        ({"optim": {"name": "adamw"}}, "config.optim.name was sgd, is adamw"),
        ({"model": {"width": 8}, "seed": 4}, "config.seed was 3, is 4; config.model.width was 16, is 8"),
        ({"data": {"flip": False}}, "config.data.flip was True, is False"),
    ],
)
def test_other_settings_are_refused_and_named(changes, words, straight):
    workdir = straight[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(ConfigError) as caught:
        train(changed(**changes), workdir)
    assert f"holds a run of other settings: {words}; --config.checkpoint.resume=params goes on" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_finished_run_with_other_settings_has_no_steps_left(straight):
    with pytest.raises(ConfigError, match=r"has no steps left: ask for more config.epochs"):
        train(changed(num_stages=1, checkpoint={"resume": "params"}), straight[0])
    assert (straight[0] / "params").is_dir()


def test_where_more_epochs_would_stretch_the_schedule_the_way_out_is_named(tmp_path):
    cosine = changed(epochs=1, optim={"schedule": "cosine"})
    for _ in range(2):
        result, told = train(cosine, tmp_path / "run")
    assert "ask for more config.epochs and --config.checkpoint.resume=params, or choose" in result.summary
    assert "going on" not in told
    longer = changed(cosine, epochs=2, checkpoint={"resume": "params"})
    assert train(longer, tmp_path / "run")[0].stopped_by is None


def test_epochs_may_not_change_where_the_learning_rate_follows_them():
    cosine = changed(optim={"schedule": "cosine"})
    longer = dataclasses.asdict(changed(cosine, epochs=3))
    assert differences(longer, cosine) == ["config.epochs was 3, is 2"]
    assert differences(dataclasses.asdict(changed(epochs=3)), SMALL) == []
    del longer["epochs"]  # a run of before there was such a key
    assert differences(longer, cosine) == ["config.epochs was 300, is 2"]


def test_a_used_workdir_can_be_refused(straight):
    with pytest.raises(ConfigError, match="holds a run already, and nothing is overwritten: choose another --workdir"):
        train(changed(checkpoint={"resume": "never"}), straight[0])


def test_a_run_without_a_checkpoint_begins_again(straight, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(SMALL)))
    (workdir / "metrics.jsonl").write_text('{"step": 2, "train/loss": 7.0}\n{"step": 4, "tra')
    train(SMALL, workdir)
    assert_same_end(workdir, straight[0])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(dataclasses.asdict(changed(seed=9))))
    with pytest.raises(ConfigError, match="holds a run already"):
        train(SMALL, tmp_path / "other")


def test_other_data_under_the_same_name_are_refused(straight, monkeypatch, tmp_path):
    monkeypatch.setattr("fdg_jax.resume.described", lambda *_: {"name": "digits", "training images": 7})
    with pytest.raises(ConfigError, match=r"is of another run: of the data, training images was 1437, is 7; --config"):
        train(SMALL, straight[0])


@pytest.fixture
def stopped(stop_after, patient, tmp_path, monkeypatch):
    """Stopped after step 7, with a checkpoint of every second step."""
    workdir = tmp_path / "run"
    stop_after(7)
    train(changed(checkpoint={"every_steps": 2}), workdir)
    monkeypatch.undo()
    assert steps(workdir) == [2, 4, 6, 7]
    return workdir


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_counts(stopped, straight):
    checkpoints = stopped / "checkpoints"
    record = checkpoints / "step_000000007" / "record.json"
    record.write_bytes(record.read_bytes()[:-1])
    (checkpoints / "step_000000006" / "manifest.json").unlink()
    _, told = train(SMALL, stopped)
    assert f"{record.parent} is damaged: record.json is cut short; going back to step_000000004" in told
    assert "step_000000006 is damaged, or none of ours: it has no manifest.json; going back" in told
    assert "going on after step 4" in told
    assert (checkpoints / "step_000000007.damaged").is_dir()
    assert_same_end(stopped, straight[0])


def test_where_all_are_damaged_nothing_is_begun(stopped):
    for path in Checkpoints(stopped / "checkpoints").complete():
        (path / "record.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"step_000000007 is damaged: record.json is cut short, and there is no other"
    ):
        train(SMALL, stopped)
    assert steps(stopped) == [2, 4, 6, 7]


def test_lines_that_were_cut_off_are_made_again(stopped, straight):
    path = stopped / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "train/loss": 0.5}\n{"step": 9, "train/lo')
    train(SMALL, stopped)
    assert_same_end(stopped, straight[0])


@pytest.mark.parametrize(
    "changes", [{"num_stages": 1}, {"num_stages": 4}, {"optim": {"name": "adamw"}, "method": {"beta": 1.0}}]
)
def test_the_weights_alone_go_on_under_other_settings(changes, stopped):
    """At the same batch, and with the learning rate of that batch."""
    _, notes = read_checkpoint(stopped / "checkpoints" / "step_000000007")
    result, told = train(changed(checkpoint={"resume": "params"}, epochs=2, **changes), stopped)
    assert "going on after step 7 with the weights of" in told
    assert "left: the optimizer's state, 2 memos, 1 activation, 1 cotangent" in told
    logged = [line["step"] for line in read_lines(stopped / "metrics.jsonl")]
    assert [step for step in logged if step != 8] == [
        2,
        4,
        5,
        6,
        10,
    ]  # at 8, of several stages, the pipeline is filling
    assert result.seconds > notes["progress"]["seconds"]
    _, notes = read_checkpoint(stopped / "checkpoints" / "step_000000010")
    assert notes["progress"]["updates_before"] == 7


def test_the_weights_alone_do_not_go_on_with_batches_of_another_size(stopped):
    message = r"counts batches of 256, not of 128: begin anew with its weights, --config.init_from=.*/step_000000007"
    with pytest.raises(ConfigError, match=message):
        train(changed(batch_size=128, checkpoint={"resume": "params"}), stopped)


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(stopped, monkeypatch):
    def fail(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("fdg_jax.checkpoint.verify", fail)
    with pytest.raises(ConfigError, match=r"step_000000007 cannot be read: Permission denied$"):
        train(SMALL, stopped)
    assert steps(stopped) == [2, 4, 6, 7]


@pytest.mark.parametrize("missing", ["progress", "settings", "data"])
def test_a_checkpoint_that_no_run_wrote_is_refused(missing, stopped):
    folder = stopped / "checkpoints" / "step_000000007"
    snapshot, notes = read_checkpoint(folder)
    del notes[missing]
    checkpoints = Checkpoints(stopped / "checkpoints", keep_last=100)
    checkpoints.save(7, snapshot, notes)
    checkpoints.wait()
    with pytest.raises(ConfigError, match=r"step_000000007 was not written by a run"):
        train(SMALL, stopped)


def test_the_weights_alone_are_those_of_the_checkpoint(stopped, stop_after):
    snapshot, _ = read_checkpoint(stopped / "checkpoints" / "step_000000007")
    pipe, source = build(SMALL)
    saved = pipe.restore(pipe.init(jax.random.key(0), source.batch(0, 0, 256)[0]), snapshot)
    settings = changed(num_stages=4, checkpoint={"resume": "params"})
    stop_after(8)
    train(settings, stopped)
    other, _ = build(settings)
    snapshot, _ = read_checkpoint(stopped / "checkpoints" / "step_000000008")
    state = other.restore(other.init(jax.random.key(0), source.batch(0, 0, 256)[0]), snapshot)
    assert (state.fed, state.origin) == (8, 7)
    # A pipeline that has just begun to fill has moved no weights yet.
    assert_trees_close(other.params(state), pipe.params(saved), 0)


def test_the_learning_rate_goes_on_where_it_was():
    settings = OptimSettings(learning_rate=0.1, momentum=0.0, weight_decay=0.0, milestones=(2,))
    weight = {"w": np.zeros((), np.float32)}

    def rates(updates_before, count):
        optimizer = make_optimizer(settings, 3, 4, updates_before)
        state, taken = optimizer.init(weight), []
        for _ in range(count):
            update, state = optimizer.update({"w": np.float32(-1)}, state, weight)
            taken.append(float(update["w"]))
        return taken

    assert rates(4, 4) == rates(0, 8)[4:]


def test_a_run_can_begin_with_the_weights_of_another(stopped, straight, tmp_path):
    for number, (named, path) in enumerate(
        [
            (straight[0], straight[0] / "params"),
            (straight[0] / "params", straight[0] / "params"),
            (stopped, stopped / "checkpoints" / "step_000000007"),
            (stopped / "checkpoints" / "step_000000004", stopped / "checkpoints" / "step_000000004"),
        ]
    ):
        settings = changed(init_from=str(named), num_stages=1, epochs=1, optim={"learning_rate": 0.0, "momentum": 0.0})
        _, told = train(settings, tmp_path / str(number))
        assert f"beginning with the weights of {path}" in told
        assert ("left: the optimizer's state, 2 memos" in told) == (path.name != "params")
    expected = load_weights(straight[0] / "params")
    assert_trees_close(load_weights(tmp_path / "0" / "params").params, expected.params, 0)
    assert_trees_close(load_weights(tmp_path / "1" / "params").params, expected.params, 0)


@pytest.mark.parametrize(
    ("named", "changes", "words"),
    [
        ("nothing", {}, "there is no folder"),
        ("", {}, "none of ours: it has no manifest.json"),
        (
            "straight",
            {"model": {"width": 8}},
            "layer 1's params.linear.bias is float32[16] in the checkpoint, float32[8] here",
        ),
        (
            "straight/checkpoints/step_000000010",
            {"model": {"depth": 3}},
            "the network has 4 layers in the checkpoint, 5 here",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(named, changes, words, straight, tmp_path):
    (tmp_path / "empty").mkdir()
    folder = straight[0].parent / named if named else tmp_path / "empty"
    with pytest.raises(ConfigError) as caught:
        train(changed(init_from=str(folder), **changes), tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_newest_weights_that_are_whole_are_begun_with(stopped, tmp_path):
    (stopped / "checkpoints" / "step_000000007" / "record.json").unlink()
    for number, named in enumerate((stopped, stopped / "checkpoints")):
        _, told = train(changed(init_from=str(named), epochs=1), tmp_path / str(number))
        assert "step_000000007 is damaged: record.json is missing; going back to step_000000006" in told
        assert f"beginning with the weights of {stopped}/checkpoints/step_000000006" in told
    assert steps(stopped) == [2, 4, 6, 7]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    settings = changed(
        epochs=6, checkpoint={"keep_last": 1, "keep_best": 1, "every_steps": 0}, optim={"learning_rate": 0.5}
    )
    train(settings, tmp_path / "run")
    errors = {
        line["step"]: 1 - line["test/accuracy"]
        for line in read_lines(tmp_path / "run" / "metrics.jsonl")
        if "test/accuracy" in line and line["step"] < 30
    }
    best = min(errors, key=errors.get)
    assert steps(tmp_path / "run") == sorted({best, 30})
    _, notes = read_checkpoint(tmp_path / "run" / "checkpoints" / f"step_{best:09d}")
    assert notes["test_error"] == errors[best] == notes["progress"]["best_error"]


def test_cuts_by_measurement_are_found_again(stop_after, tmp_path, monkeypatch):
    stop_after(3)
    train(changed(cuts="balanced"), tmp_path / "run")
    monkeypatch.undo()
    snapshot, _ = read_checkpoint(tmp_path / "run" / "checkpoints" / "step_000000003")
    other = next(cut for cut in (1, 2, 3) if [cut] != snapshot.record["pipeline"]["cuts"])
    monkeypatch.setattr("fdg_jax.build.make_cuts", lambda *_: (other,))
    assert train(changed(cuts="balanced"), tmp_path / "run")[0].stopped_by is None


def test_what_was_borne_is_no_reason_to_stop_later(tmp_path, monkeypatch):
    """A run that dropped a batch goes on under on_nan=stop; the next such batch stops it."""
    whole, bad = ArraySource.batch, {2}

    def batch(self, seed, i, batch_size):
        images, labels = whole(self, seed, i, batch_size)
        return (images.at[0].set(np.nan) if i in bad else images), labels

    monkeypatch.setattr(ArraySource, "batch", batch)
    train(changed(epochs=1, on_nan="skip"), tmp_path / "run")
    train(SMALL, tmp_path / "run")
    bad.add(11)
    with pytest.raises(RunFailed, match=r"gradients were first not finite on stage 1, in tick 12, for batch 11"):
        train(changed(epochs=3), tmp_path / "run")


EXPLODES = {"optim": {"learning_rate": 1e9}, "epochs": 4}


def test_numbers_that_go_wrong_leave_the_last_good_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(RunFailed) as caught:
        train(changed(log_every_steps=5, checkpoint={"every_steps": 1}, **EXPLODES), workdir)
    found = str(caught.value)
    assert "it stopped being finite between steps 1 and 5 (ticks 0 to 4); gradients were first not finite on" in found
    assert f"the newest complete checkpoint is {workdir}/checkpoints/step_" in found
    assert "\n" not in found
    for path in Checkpoints(workdir / "checkpoints").complete():
        snapshot, _ = read_checkpoint(path)
        assert snapshot.faults == 0
        params = [leaf for k in range(2) for _, leaf in snapshot.record["stages"][k]["params"]]
        assert all(np.isfinite(snapshot.arrays[leaf]).all() for leaf in params)


def test_batches_whose_loss_is_not_finite_can_be_dropped(tmp_path, monkeypatch):
    """One image in the eighth batch is not finite: nothing else sees it, and it is counted."""
    whole = ArraySource.batch

    def batch(self, seed, i, batch_size):
        images, labels = whole(self, seed, i, batch_size)
        return (images.at[0].set(np.nan) if i == 7 else images), labels

    monkeypatch.setattr(ArraySource, "batch", batch)
    with pytest.raises(
        RunFailed, match=r"between steps 9 and 10 .*gradients were first not finite on stage 1, in tick 8"
    ):
        train(changed(epochs=3), tmp_path / "stop")
    _, told = train(changed(epochs=3, on_nan="skip"), tmp_path / "skip")
    lines = read_lines(tmp_path / "skip" / "metrics.jsonl")
    assert [line["train/skipped"] for line in lines] == [float(line["step"] > 8) for line in lines]
    assert all(np.isfinite(line["train/loss"]) for line in lines)
    assert "skipped 1  " in told
