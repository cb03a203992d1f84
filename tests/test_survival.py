"""Runs that are killed, stopped, or lose their disk: nothing saved is lost, and going on gives the same bits."""

import contextlib
import ctypes
import dataclasses
import errno
import functools
import io
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import LONG, ROOT, Life, assert_same_run, assert_same_weights
from rich.console import Console

from fdg_jax import checkpoint, sealed, train
from fdg_jax.checkpoint import Checkpoints
from fdg_jax.config import (
    CheckpointSettings,
    ConfigError,
    DataSettings,
    MethodSettings,
    ModelSettings,
    OptimSettings,
    Settings,
)
from fdg_jax.console import RunDisplay
from fdg_jax.data import ArraySource
from fdg_jax.metrics import MetricWriter
from fdg_jax.pipeline import Pipeline
from fdg_jax.saving import RunFailed
from fdg_jax.sealed import PARTIAL, verify

SECONDS_TO_STOP = 10

RUN = (
    "--config=experiments/digits.py",
    "--config.model.name=mlp",
    "--config.model.depth=2",
    "--config.model.width=8",
    "--config.num_stages=3",
    "--config.data.limit=512",
    "--config.batch_size=64",
    "--config.epochs=12",
    "--config.log_every_steps=1",
)
SAVED_OFTEN = (*RUN, "--config.checkpoint.every_steps=1", "--config.checkpoint.keep_last=3")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs for the processes here alone: one that is killed may leave a torn one."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("undisturbed")
    workdir = folder / "run"
    status, _, stderr = Life(folder, (*RUN, f"--workdir={workdir}"), cache=cache).end()
    assert (status, stderr) == (0, "")
    return workdir


def every_step_is_saved():
    """However fast the steps are: a process gets as far as its checkpoints."""
    Checkpoints.busy = property(lambda self: False)


def text_of(path):
    return path.read_text() if path.exists() else ""


def complete(workdir):
    return Checkpoints(workdir / "checkpoints").complete()


def half_written(workdir):
    return list((workdir / "checkpoints").glob(f"*{PARTIAL}"))


def wait_for(moment, life, workdir, saved_before):
    def new():
        return len(set(complete(workdir)) - set(saved_before))

    if moment == "starting":
        life.when(lambda: f'"pid": {life.pid},' in text_of(workdir / "lock"))
    else:
        life.when_it_says("writing to")
    life.when(
        {"saving": lambda: half_written(workdir), "saved": lambda: new() >= 1, "saved twice": lambda: new() >= 2}.get(
            moment, lambda: True
        )
    )


def test_a_run_that_is_killed_at_twenty_moments_ends_with_the_same_bits(tmp_path, cache, undisturbed):
    workdir = tmp_path / "run"
    command = (*SAVED_OFTEN, f"--workdir={workdir}")
    chance = random.Random(0)
    moments = ["starting", "going on"] * 3 + ["saving", "saved"] * 5 + ["saved twice"] * 4
    chance.shuffle(moments)
    inside_a_save = 0
    for moment in moments:
        before = complete(workdir)
        life = Life(tmp_path, command, every_step_is_saved, cache)
        wait_for(moment, life, workdir, before)
        time.sleep(chance.uniform(0, 0.05))
        life.kill()
        inside_a_save += bool(half_written(workdir))
        for path in complete(workdir):
            verify(path)
        if before and moment != "starting":
            assert f"from {before[-1]}\n" in life.stdout
    assert inside_a_save > 0
    newest = complete(workdir)[-1]
    status, stdout, stderr = Life(tmp_path, command, cache=cache).end()
    assert (status, stderr) == (0, "")
    assert f"from {newest}\n" in stdout
    assert not half_written(workdir)
    assert_same_run(workdir, undisturbed)


def start(arguments, cache):
    """A process as a user starts it, whose output waits in a pipe that holds some forty lines until it is read."""
    said = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "PYTHONUNBUFFERED")
    environment = {key: value for key, value in os.environ.items() if key not in said}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = (sys.executable, "-m", "fdg_jax.main", *arguments)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe, pipesize=4096)


def waits_for_a_reader(process):
    """Whether it is in a system call on its stdout; write, which alone is used, returns at once while there is room."""
    call = Path(f"/proc/{process.pid}/syscall").read_text().split()
    return call[1:2] == ["0x1"]


def checkpoint_named(stdout, workdir):
    """The checkpoint in which a run says that it saved itself, from where the same command goes on."""
    says = r"stopped after step (\d+) of 96, saved in (\S+): the same command goes on from there"
    step, path = re.fullmatch(says, stdout.splitlines()[-1]).groups()
    assert path == str(Checkpoints(workdir / "checkpoints").path(int(step))) == str(complete(workdir)[-1])
    return path


def assert_goes_on_to_the_same_bits(command, workdir, cache, undisturbed, checkpoint):
    status, stdout, stderr = Life(workdir.parent, command, cache=cache).end()
    assert (status, stderr) == (0, "")
    assert f"from {checkpoint}\n" in stdout
    assert_same_run(workdir, undisturbed)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_run_also_where_nobody_reads_what_it_prints(number, status, tmp_path, cache, undisturbed):
    command = (*RUN, f"--workdir={tmp_path}/run")
    process = start(command, cache)
    for line in process.stdout:
        if line.startswith("epoch"):  # it is training
            break
    deadline = time.monotonic() + LONG
    while not waits_for_a_reader(process):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=SECONDS_TO_STOP)
    assert (process.returncode, stderr) == (status, "")
    checkpoint = checkpoint_named(stdout, tmp_path / "run")
    assert not (tmp_path / "run" / "lock").exists()
    assert_goes_on_to_the_same_bits(command, tmp_path / "run", cache, undisturbed, checkpoint)


def evaluating_without_end(marker):
    test_batches = ArraySource.test_batches

    def again_and_again(self, batch_size):
        marker.touch()
        while True:
            yield from test_batches(self, batch_size)

    ArraySource.test_batches = again_and_again


def compiling(marker):
    step = Pipeline.step

    def marked(self, state, batch):
        marker.touch()
        return step(self, state, batch)

    Pipeline.step = marked


@pytest.mark.parametrize("during", [evaluating_without_end, compiling])
def test_a_signal_is_heard_during(during, tmp_path, cache, undisturbed):
    command = (*RUN, f"--workdir={tmp_path}/run")
    compiled = cache if during is evaluating_without_end else None
    life = Life(tmp_path, command, functools.partial(during, tmp_path / "marker"), compiled)
    life.when((tmp_path / "marker").exists)
    life.send(signal.SIGINT)
    status, stdout, stderr = life.end(SECONDS_TO_STOP)
    assert (status, stderr) == (130, "")
    assert "stopping after this batch" in stdout
    checkpoint = checkpoint_named(stdout, tmp_path / "run")
    assert_goes_on_to_the_same_bits(command, tmp_path / "run", cache, undisturbed, checkpoint)


def checkpoints_that_hang(marker):
    fsync = os.fsync

    def hang(descriptor):
        if threading.current_thread() is threading.main_thread():
            return fsync(descriptor)
        marker.touch()
        threading.Event().wait()

    os.fsync = hang


def compiler_that_hangs(marker):
    """In C, where Python does not hear signals."""

    def hang(self, state, batch):
        marker.touch()
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

    Pipeline.step = hang


def is_pending(pid, number):
    masks = re.findall(r"^S\w+Pnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_a_second_interrupt_does_not_wait_for_a_checkpoint(tmp_path, cache, undisturbed):
    workdir = tmp_path / "run"
    command = (*SAVED_OFTEN, f"--workdir={workdir}")
    life = Life(tmp_path, command, functools.partial(checkpoints_that_hang, tmp_path / "marker"), cache)
    life.when((tmp_path / "marker").exists)
    life.send(signal.SIGINT)
    life.when_it_says("stopping after this batch")
    life.send(signal.SIGINT)
    status, _, stderr = life.end(SECONDS_TO_STOP)
    assert (status, stderr) == (130, "fdg_jax: stopped at once; what was written before is kept\n")
    assert half_written(workdir)
    assert not complete(workdir)
    saved_seldom = (*RUN, f"--workdir={workdir}")  # so that no new checkpoint takes the place of the half written one
    status, _, stderr = Life(tmp_path, saved_seldom, cache=cache).end()
    assert (status, stderr) == (0, "")
    assert not half_written(workdir)
    assert_same_run(workdir, undisturbed)


def test_a_second_signal_does_not_wait_for_a_compiler(tmp_path, cache):
    command = (*RUN, f"--workdir={tmp_path}/run")
    life = Life(tmp_path, command, functools.partial(compiler_that_hangs, tmp_path / "marker"), cache)
    life.when((tmp_path / "marker").exists)
    life.send(signal.SIGINT)
    life.when(lambda: not is_pending(life.pid, signal.SIGINT))  # else the two would count as one
    life.send(signal.SIGINT)
    status, _, stderr = life.end(SECONDS_TO_STOP)
    assert (status, stderr) == (130, "fdg_jax: stopped at once; what was written before is kept\n")


SMALL = Settings(
    num_stages=3,
    epochs=2,
    batch_size=32,
    log_every_steps=2,
    model=ModelSettings(name="mlp", depth=2, width=8),
    data=DataSettings(limit=128, crop_padding=0, flip=False),
    method=MethodSettings(beta=0.5),
    optim=OptimSettings(schedule="constant"),
    checkpoint=CheckpointSettings(every_steps=1, every_minutes=0, keep_last=9, keep_best=0),
)
NUM_STEPS = 8
REQUIRED = dataclasses.replace(SMALL, checkpoint=dataclasses.replace(SMALL.checkpoint, required=True))


def train_here(settings, workdir):
    """In this process: the result, or the reason of failing, and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    try:
        result = train.train_and_evaluate(settings, workdir, console)
    except RunFailed as failure:
        result = failure
    return result, console.file.getvalue()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train_here(SMALL, workdir)
    return workdir


def call_first(monkeypatch, owner, name, action):
    """Has `action(number of the call)` run before a function."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        action(calls[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def raise_signal(at):
    return lambda number: signal.raise_signal(signal.SIGTERM) if number == at else None


@pytest.mark.parametrize(
    ("owner", "name", "at", "step"),
    [
        (RunDisplay, "__enter__", 1, 0),
        (Pipeline, "step", 1, 1),
        (Pipeline, "step", 5, 5),
        (Pipeline, "predict", 1, 4),
        (Checkpoints, "save", 1, 1),
        (Pipeline, "drain", 1, 8),
        (Pipeline, "predict", 13, 8),  # twelve batches of test images, then of the last evaluation
    ],
)
def test_a_signal_at_any_place_is_survived(owner, name, at, step, tmp_path, monkeypatch, straight):
    with monkeypatch.context() as patched:
        call_first(patched, owner, name, raise_signal(at))
        result, _ = train_here(SMALL, tmp_path / "run")
    assert result.stopped_by == signal.SIGTERM
    path = tmp_path / "run" / "checkpoints" / f"step_{step:09d}"
    assert result.summary == (
        f"stopped after step {step} of {NUM_STEPS}, saved in {path}: the same command goes on from there"
        if step
        else "stopped after step 0 of 8, which is not saved; there is no complete checkpoint: the same command begins "
        "again"
    )
    assert not (tmp_path / "run" / "params").exists()
    result, _ = train_here(SMALL, tmp_path / "run")
    assert result.stopped_by is None
    assert_same_run(tmp_path / "run", straight)


def test_a_signal_while_the_final_weights_are_written_lets_the_run_end(tmp_path, monkeypatch, straight):
    call_first(monkeypatch, train, "save_weights", raise_signal(1))
    result, _ = train_here(SMALL, tmp_path / "run")
    assert result.stopped_by is None
    assert_same_run(tmp_path / "run", straight)


def test_a_thread_that_is_not_the_main_one_can_train(tmp_path, straight):
    thread = threading.Thread(target=train_here, args=(SMALL, tmp_path / "run"))
    thread.start()
    thread.join(LONG)
    assert_same_run(tmp_path / "run", straight)


@pytest.fixture
def saved_every_step(monkeypatch):
    """However fast the steps are: a checkpoint that is being written is waited for."""
    monkeypatch.setattr(Checkpoints, "busy", False)


def break_disk(monkeypatch, steps, error=errno.ENOSPC, owner=checkpoint, name="_save_tree"):
    """Has a function fail inside the saving of some steps, after it has done its work."""
    seal, original = checkpoint.seal, getattr(owner, name)
    broken = threading.local()

    def watched(folder, *args):
        broken.now = int(folder.name.removeprefix("step_")) in steps if folder.name.startswith("step_") else False
        seal(folder, *args)

    def failing(*args, **kwargs):
        result = original(*args, **kwargs)
        if getattr(broken, "now", False):
            broken.now = False
            raise OSError(error, os.strerror(error))
        return result

    monkeypatch.setattr(owner, name, failing)
    monkeypatch.setattr(checkpoint, "seal", watched)


def lines_about_checkpoints(text):
    return [line for line in text.splitlines() if "the checkpoint of" in line or "checkpoints are" in line]


@pytest.mark.usefixtures("saved_every_step")
@pytest.mark.parametrize(
    ("error", "owner", "name"),
    [
        (errno.ENOENT, Path, "mkdir"),
        (errno.EACCES, shutil, "disk_usage"),
        (errno.ENOSPC, checkpoint, "_save_tree"),
        (errno.EROFS, sealed, "_measure"),
    ],
)
def test_a_checkpoint_that_fails_is_told_of_once_and_training_goes_on(
    error, owner, name, tmp_path, monkeypatch, capfd, straight
):
    workdir = tmp_path / "run"
    break_disk(monkeypatch, (3, 4, 5), error, owner, name)
    _, text = train_here(SMALL, workdir)
    folder = workdir / "checkpoints"
    assert lines_about_checkpoints(text) == [
        f"the checkpoint of step 3 could not be written: {os.strerror(error)}; "
        f"the newest complete checkpoint is {folder}/step_000000002; training goes on",
        f"checkpoints are written again: {folder}/step_000000006",
    ]
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:09d}" for step in (1, 2, 6, 7, 8)]
    for path in complete(workdir):
        verify(path)
    assert_same_run(workdir, straight)


@pytest.mark.usefixtures("saved_every_step")
@pytest.mark.parametrize(
    ("broken", "fails_at"), [((3,), None), ((7,), None), ((2, 4, 6), None), ((3, 4), 4), ((8,), 8)]
)
def test_where_checkpoints_are_required_two_in_a_row_or_the_last_fail_the_run(
    broken, fails_at, tmp_path, monkeypatch, straight
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        break_disk(patched, broken)
        result, _ = train_here(REQUIRED, workdir)
    if fails_at is None:
        assert result.stopped_by is None
    else:
        newest = workdir / "checkpoints" / f"step_{min(broken) - 1:09d}"
        assert str(result) == (
            f"the checkpoint of step {fails_at} could not be written: No space left on device; "
            f"the newest complete checkpoint is {newest}"
        )
        assert not (workdir / "params").exists()
        train_here(REQUIRED, workdir)
    assert_same_run(workdir, straight)


def test_a_stop_that_cannot_be_saved_says_so(tmp_path, monkeypatch, straight):
    settings = dataclasses.replace(SMALL, checkpoint=dataclasses.replace(SMALL.checkpoint, every_steps=2))
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        break_disk(patched, (3,))
        call_first(patched, Pipeline, "step", raise_signal(3))
        result, text = train_here(settings, workdir)
    newest = f"the newest complete checkpoint is {workdir}/checkpoints/step_000000002"
    assert lines_about_checkpoints(text) == [
        f"the checkpoint of step 3 could not be written: No space left on device; {newest}"
    ]
    assert result.summary == (
        f"stopped after step 3 of 8, which is not saved; {newest}: the same command goes on from there"
    )
    train_here(settings, workdir)
    assert_same_run(workdir, straight)


def test_metrics_that_cannot_be_written_fail_the_run_in_one_line(tmp_path, monkeypatch, straight):
    workdir = tmp_path / "run"
    init = MetricWriter.__init__
    with open("/dev/full", "a") as full, monkeypatch.context() as patched:

        def on_a_full_disk(self, *args):
            init(self, *args)
            os.dup2(full.fileno(), self._lines.fileno())

        patched.setattr(MetricWriter, "__init__", on_a_full_disk)
        result, _ = train_here(SMALL, workdir)
    assert str(result) == (
        "the metrics cannot be written: No space left on device; the newest complete checkpoint is "
        f"{complete(workdir)[-1]}, and the metrics before are kept"
    )
    train_here(SMALL, workdir)
    assert_same_run(workdir, straight)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_what_is_rewritten_when_a_run_goes_on_is_not_damaged_by_a_full_disk(name, tmp_path, monkeypatch, straight):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    for path in (workdir / "params", *complete(workdir)[-3:]):
        shutil.rmtree(path)
    before = {path: path.read_bytes() for path in workdir.glob("*.json*")}
    write_text = Path.write_text

    def write_half(self, text, **kwargs):
        write_text(self, text[: len(text) // 2] if self.name.startswith(name) else text, **kwargs)
        if self.name.startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", write_half)
        with pytest.raises(ConfigError, match="cannot write to --workdir"):
            train_here(SMALL, workdir)
    assert {path: path.read_bytes() for path in workdir.glob("*.json*")} == before
    train_here(SMALL, workdir)
    assert_same_run(workdir, straight)


@pytest.mark.usefixtures("saved_every_step")
def test_a_workdir_that_vanishes_costs_its_content_alone(tmp_path, monkeypatch, straight):
    workdir = tmp_path / "run"
    save = Checkpoints.save

    def vanishing(self, step, *args):
        if step == 4:
            self.wait()
            shutil.rmtree(workdir)
        save(self, step, *args)

    monkeypatch.setattr(Checkpoints, "save", vanishing)
    result, text = train_here(SMALL, workdir)
    assert lines_about_checkpoints(text) == [
        "the checkpoint of step 4 could not be written: No such file or directory; there is no complete checkpoint; "
        "training goes on"
    ]
    assert result.summary.endswith(f"the weights are in {workdir}, whose metrics are gone")
    assert [path.name for path in workdir.iterdir()] == ["params"]
    assert_same_weights(workdir, straight)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def filled(folder, free):
    """While no more than `free` bytes are left; what is being written may need a second and a third try."""
    with open(folder / "filler", "wb") as filler:
        size = 0
        while (more := shutil.disk_usage(folder).free - free) > 0:
            with contextlib.suppress(OSError):
                os.posix_fallocate(filler.fileno(), size, more)
                size += more
        yield
    (folder / "filler").unlink()


def every_step_is_saved_blindly():
    every_step_is_saved()
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40)


@pytest.mark.parametrize(("prepare", "free"), [(every_step_is_saved, 2**19), (every_step_is_saved_blindly, 2**14)])
def test_on_a_disk_that_is_full_for_a_while_training_goes_on(prepare, free, tmp_path, small_disk, cache):
    workdir = small_disk / "run"
    one_by_one = ("--config.batch_size=1", "--config.data.limit=0", "--config.optim.learning_rate=1e-3")
    unlogged = "--config.log_every_steps=100000"  # before the end of an epoch of 1437 steps
    command = (*SAVED_OFTEN, *one_by_one, unlogged, f"--workdir={workdir}")
    life = Life(tmp_path, command, prepare, cache)
    life.when(lambda: len(complete(workdir)) == 3)
    with filled(small_disk, free):
        life.when_it_says("could not be written: No space left on device")
        life.when(lambda: not half_written(workdir))
    life.when_it_says("checkpoints are written again: ")
    life.send(signal.SIGTERM)
    status, stdout, stderr = life.end(SECONDS_TO_STOP)
    assert (status, stderr) == (143, "")
    assert stdout.count("could not be written") == 1
    for path in complete(workdir):
        verify(path)


def test_a_run_that_a_full_disk_ended_goes_on_when_there_is_room(tmp_path, small_disk, cache, undisturbed):
    workdir = small_disk / "run"
    command = (*SAVED_OFTEN, f"--workdir={workdir}")
    life = Life(tmp_path, command, every_step_is_saved, cache)
    life.when(lambda: len(complete(workdir)) == 3)
    with filled(small_disk, 0):
        status, stdout, stderr = life.end()
        assert status == 1
        newest = complete(workdir)[-1]
        assert stderr == (
            "fdg_jax: the metrics cannot be written: No space left on device; "
            f"the newest complete checkpoint is {newest}, and the metrics before are kept\n"
        )
        assert stdout.count("could not be written") <= 1
        settings = (workdir / "config.json").read_text()
        again, _, stderr = Life(tmp_path, command, cache=cache).end()
        refusal = f"fdg_jax: cannot write to --workdir={workdir}: No space left on device; choose another\n"
        assert (again, stderr) == (2, refusal)
        assert (workdir / "config.json").read_text() == settings
    status, stdout, stderr = Life(tmp_path, command, cache=cache).end()
    assert (status, stderr) == (0, "")
    assert f"from {newest}\n" in stdout
    assert_same_run(workdir, undisturbed)


def without_privileges():
    """Permissions count for root, too."""
    if os.geteuid() == 0:
        version, this_thread, none = 0x20080522, 0, bytes(24)
        assert ctypes.CDLL(None).capset(struct.pack("Ii", version, this_thread), none) == 0


@pytest.mark.parametrize("name", ["closed", "closed/run", "hidden/run"])
def test_a_workdir_without_permission_is_refused_in_one_line(name, tmp_path, cache):
    modes = {tmp_path / "closed": 0o555, tmp_path / "hidden": 0o000}
    for folder, mode in modes.items():
        folder.mkdir()
        folder.chmod(mode)
    command = (*RUN, f"--workdir={tmp_path}/{name}")
    status, _, stderr = Life(tmp_path, command, without_privileges, cache).end()
    for folder in modes:
        folder.chmod(0o755)
        assert not any(folder.iterdir())
    message = f"fdg_jax: cannot write to --workdir={tmp_path}/{name}: Permission denied; choose another\n"
    assert (status, stderr) == (2, message)
