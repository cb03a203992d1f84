"""One run at a time in a folder: who is refused, whose lock is stale, and what is left behind."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from processes import FORKSERVER, LONG, Life
from rich.console import Console

from fdg_jax.config import ConfigError, Settings
from fdg_jax.lock import Locked, is_locked, locked
from fdg_jax.main import default_workdir
from fdg_jax.resume import Progress
from fdg_jax.saving import RunFailed
from fdg_jax.train import train_and_evaluate

RUN = (
    "--config=experiments/digits.py",
    "--config.model.name=mlp",
    "--config.model.depth=2",
    "--config.data.limit=64",
    "--config.optim.schedule=constant",
)
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def owner_of(folder):
    return json.loads((folder / "lock").read_text())


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_refuses_others_while_it_lives_and_its_lock_is_stale_when_it_was_killed(tmp_path, cache):
    workdir = tmp_path / "run"
    endless, command = "--config.epochs=1000000", (*RUN, f"--workdir={workdir}")
    first = Life(tmp_path, (*command, endless), cache=cache)
    first.when_it_says("epoch")
    assert owner_of(workdir) == {"pid": first.pid, "host": HOST}
    before = (workdir / "config.json").stat()
    status, stdout, stderr = Life(tmp_path, command, cache=cache).end()
    assert (status, stdout) == (2, "")
    assert stderr == (
        f"fdg_jax: {workdir} is in use by process {first.pid} on {HOST}: "
        "wait for it, stop it, or choose another --workdir\n"
    )
    assert (workdir / "config.json").stat() == before
    first.kill()
    assert (workdir / "lock").exists()
    second = Life(tmp_path, (*command, endless), cache=cache)
    second.when_it_says("  step ")  # of its first log: before the loop a signal ends it at once
    assert f"{workdir} was locked by process {first.pid} on {HOST}, which is gone\n" in second.stdout
    assert owner_of(workdir)["pid"] == second.pid
    second.send(signal.SIGINT)
    assert second.end()[0] == 130
    assert not (workdir / "lock").exists()


SMALL = Settings(epochs=1)


@pytest.mark.parametrize("failure", [None, RunFailed("it failed"), KeyboardInterrupt()])
def test_the_lock_is_gone_when_a_run_ends(failure, tmp_path, monkeypatch):
    seen = []

    def body(*args):
        seen.append(owner_of(tmp_path)["pid"])
        if failure is not None:
            raise failure

    monkeypatch.setattr("fdg_jax.train.find", body)
    monkeypatch.setattr("fdg_jax.train.begin", lambda *args: (None,) * 5)
    monkeypatch.setattr("fdg_jax.train._done", lambda *args: "done")
    with pytest.raises(type(failure)) if failure else nullcontext():
        assert train_and_evaluate(SMALL, tmp_path, Console(quiet=True)) == "done"
    assert seen == [os.getpid()]
    assert not list(tmp_path.iterdir())


def test_a_folder_is_locked_from_the_first_moment_to_the_last(tmp_path):
    assert not is_locked(tmp_path)
    with locked(tmp_path) as before:
        assert before is None
        assert owner_of(tmp_path) == {"pid": os.getpid(), "host": HOST}
        assert is_locked(tmp_path)
        with (
            pytest.raises(Locked, match=f"is in use by process {os.getpid()} on {HOST}: wait for it"),
            locked(tmp_path),
        ):
            pass
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    assert not list(tmp_path.iterdir())


def race(folder, barrier, outcomes, release):
    barrier.wait()
    try:
        with locked(folder):
            outcomes.put("won")
            release.wait(LONG)
    except Locked as refusal:
        outcomes.put(str(refusal))


def test_of_processes_that_race_for_a_folder_exactly_one_wins(tmp_path):
    """Each round where the round before left a lock: nothing, a stale one, garbage."""
    racers = 3
    for number, left in enumerate([None, json.dumps({"pid": dead_pid(), "host": HOST}), "{"] * 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        if left is not None:
            (folder / "lock").write_text(left)
        barrier, outcomes, release = FORKSERVER.Barrier(racers), FORKSERVER.Queue(), FORKSERVER.Event()
        processes = [FORKSERVER.Process(target=race, args=(folder, barrier, outcomes, release)) for _ in range(racers)]
        for process in processes:
            process.start()
        told = [outcomes.get(timeout=LONG) for _ in range(racers)]
        release.set()
        for process in processes:
            process.join(LONG)
        assert told.count("won") == 1
        assert sum("is in use by" in line for line in told) == racers - 1
        assert not list(folder.iterdir())


def test_a_lock_that_its_holder_removes_while_it_is_taken_is_made_anew(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def removed_before(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / "lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with locked(tmp_path):
        assert owner_of(tmp_path) == {"pid": os.getpid(), "host": HOST}
    assert len(calls) == 2


@pytest.fixture
def without_kernel_locks(monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


LIVING = os.getppid()
LEFT = [
    ({"pid": LIVING, "host": HOST}, "lives"),
    ({"pid": 1, "host": HOST}, "lives"),  # another user's, mostly
    ({"pid": "dead", "host": HOST}, "stale"),
    ({"pid": "dead", "host": "another.host"}, "lives"),
    ({"pid": os.getpid(), "host": HOST}, "stale"),  # of a container before this one
]


@pytest.mark.usefixtures("without_kernel_locks")
@pytest.mark.parametrize(("owner", "verdict"), LEFT)
def test_where_the_file_system_has_no_locks_the_word_of_the_file_counts(owner, verdict, tmp_path):
    owner = {"pid": dead_pid() if owner["pid"] == "dead" else owner["pid"], "host": owner["host"]}
    text = json.dumps(owner)
    (tmp_path / "lock").write_text(text)
    described = f"process {owner['pid']} on {owner['host']}"
    assert is_locked(tmp_path) == (verdict == "lives")
    if verdict == "lives":
        with pytest.raises(Locked, match=described), locked(tmp_path):
            pass
        assert (tmp_path / "lock").read_text() == text
    else:
        with locked(tmp_path) as before:
            assert before == described
            assert owner_of(tmp_path)["pid"] == os.getpid()
        assert not (tmp_path / "lock").exists()


GARBAGE = [b"", b"{", b"7", b"[]", b"null", b"\xff\x00", b'{"pid": "x", "host": 1}', b'{"pid": 3}', b"[" * 4000]
GARBAGE += [b'{"pid": %s, "host": "%s"}' % (pid, HOST.encode()) for pid in (b"-1", b"0", b"Infinity", b"9" * 30)]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_the_file_is_no_lock(garbage, kernel, tmp_path, request):
    if not kernel:
        request.getfixturevalue("without_kernel_locks")
    (tmp_path / "lock").write_bytes(garbage)
    assert not is_locked(tmp_path)
    with locked(tmp_path) as before:
        assert before is None
        assert owner_of(tmp_path) == {"pid": os.getpid(), "host": HOST}


def test_a_lock_that_became_another_runs_is_left_alone(tmp_path):
    with locked(tmp_path):
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").write_text("another's")
    assert (tmp_path / "lock").read_text() == "another's"


def test_a_folder_that_is_gone_or_read_only_at_the_end_is_no_error(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder):
        (folder / "lock").unlink()
        folder.rmdir()

    def read_only(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.unlink", read_only)
        with locked(tmp_path):
            pass
    assert not is_locked(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", "another's", "holds a run already"),
        ("config.json", json.dumps(asdict(SMALL)), "another run has begun in"),
    ],
)
def test_a_folder_that_another_run_filled_while_this_one_was_built_is_left_alone(
    name, text, message, tmp_path, monkeypatch
):
    """Both found no folder, and the other one has ended when this one comes to lock it."""
    workdir = tmp_path / "run"

    def build_slowly(*args):
        workdir.mkdir()
        (workdir / name).write_text(text)
        return None, SimpleNamespace(steps_per_epoch=lambda batch_size: 1), None, Progress(), None

    monkeypatch.setattr("fdg_jax.train.begin", build_slowly)
    with pytest.raises(ConfigError, match=message):
        train_and_evaluate(SMALL, workdir, Console(quiet=True))
    assert {path.name: path.read_text() for path in workdir.iterdir()} == {name: text}


def test_a_default_workdir_is_this_very_run_unfinished_or_a_free_name(tmp_path):
    base = tmp_path / "digits"
    assert default_workdir(base, SMALL) == base
    unfinished = json.dumps({"epochs": 1})
    for name, config in (("digits", None), ("digits-2", json.dumps({"seed": 5})), ("digits-3", "{")):
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(config)
    assert default_workdir(base, SMALL) == tmp_path / "digits-4"
    for name in ("digits-4", "digits-5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(unfinished)
    assert default_workdir(base, SMALL) == tmp_path / "digits-4"
    with locked(tmp_path / "digits-4"):
        assert default_workdir(base, SMALL) == tmp_path / "digits-5"
    (tmp_path / "digits-4" / "params").mkdir()
    assert default_workdir(base, SMALL) == tmp_path / "digits-5"
    (tmp_path / "digits-5" / "lock").write_text(json.dumps({"pid": dead_pid(), "host": HOST}))
    assert default_workdir(base, SMALL) == tmp_path / "digits-5"
