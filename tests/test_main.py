"""The command line as a user meets it: real processes, their output and their exit status."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_console import documented

from fdg_jax import main as cli
from fdg_jax.config import CheckpointSettings, Settings
from fdg_jax.console import voices
from fdg_jax.lock import locked

ROOT = Path(__file__).parents[1]
DIGITS = ("--config", "experiments/digits.py")
QUICK = ("--config.model.name=mlp", "--config.model.depth=2", "--config.epochs=1")


def command(*arguments):
    return [sys.executable, "-m", "fdg_jax.main", *arguments]


def clean_environment():
    """As on a fresh machine: nothing said about devices."""
    return {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}


def start(*arguments, **environment):
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=clean_environment() | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Several runs at once, since starting takes longer than what is tested: {name: (status, stdout, stderr)}."""
    folder = tmp_path_factory.mktemp("main")
    runs = {
        "four": (
            *DIGITS,
            *QUICK,
            "--config.model.depth=3",
            "--config.num_stages=4",
            "--config.method.beta=0.2",
            f"--workdir={folder}/four",
        ),
        "nan": (*DIGITS, *QUICK, "--config.optim.learning_rate=1e9", f"--workdir={folder}/nan", "--quiet"),
        "typo": (*DIGITS, "--config.method.bta=0.2"),
        "huge": (*DIGITS, "--config.num_stages=100000"),
        "one device": (*DIGITS, *QUICK, f"--workdir={folder}/one", "--log_format=json"),
    }
    said = {"one device": {"JAX_NUM_CPU_DEVICES": "1"}}
    processes = {name: start(*arguments, **said.get(name, {})) for name, arguments in runs.items()}
    done = {}
    for name, process in processes.items():
        stdout, stderr = process.communicate(timeout=120)
        done[name] = (process.returncode, stdout, stderr)
    return folder, done


def test_overrides_act_and_stages_get_devices_of_their_own(outcomes):
    folder, done = outcomes
    status, stdout, stderr = done["four"]
    assert (status, stderr) == (0, "")
    assert "fdg(beta=0.2, policy=stash), 4 stages" in stdout
    assert all(f"cpu:{k}\n" in stdout for k in range(4))
    assert "cpu:4" not in stdout
    assert "share" not in stdout
    last = stdout.splitlines()[-1]
    lines = [json.loads(line) for line in (folder / "four" / "metrics.jsonl").read_text().splitlines()]
    assert f"test accuracy {100 * lines[-1]['test/accuracy']:.2f} %" in last
    assert str(folder / "four") in last
    assert json.loads((folder / "four" / "config.json").read_text())["method"]["beta"] == 0.2


def test_what_is_said_about_devices_counts(outcomes):
    status, _, stderr = outcomes[1]["one device"]
    assert status == 0
    assert "2 stages share 1 device(s)" in stderr


def test_with_json_every_line_of_stdout_is_an_object(outcomes):
    folder, done = outcomes
    told = [json.loads(line) for line in done["one device"][1].splitlines()]
    assert [line["event"] for line in told if line["event"] != "checkpoint"] == ["start", "log", "evaluation", "end"]
    assert told[0]["devices"] == ["cpu:0", "cpu:0"]
    end, evaluation = told[-1], next(line for line in told if line["event"] == "evaluation")
    assert set(end) - {"event"} <= documented()["end"]
    assert (end["exit_status"], end["workdir"]) == (0, str(folder / "one"))
    assert end["test/accuracy"] == evaluation["test/accuracy"]
    assert f"test accuracy {100 * end['test/accuracy']:.2f} %" in done["one device"][2].splitlines()[-1]


def test_a_quiet_run_that_fails_leaves_its_reason_alone(outcomes):
    assert outcomes[1]["nan"][1] == ""


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("nan", 1, "it stopped being finite between steps 1 and 22 (ticks 0 to 21)"),
        ("typo", 2, "unknown config key 'method.bta'; did you mean 'method.beta'"),
        ("huge", 2, "num_stages must lie in 1..5, for every stage needs one of the 5 layers; got 100000"),
    ],
)
def test_a_process_ends_with_the_right_status_and_one_line(outcomes, name, status, message):
    actual, _, stderr = outcomes[1][name]
    assert actual == status
    assert message in stderr
    assert stderr.count("\n") == 1, stderr


def outcome_of(arguments):
    """(status, stderr) of the command line, in a process that has just been forked."""
    stderr = io.StringIO()
    sys.argv = ["fdg_jax", *arguments]  # where ml_collections looks for overrides
    with contextlib.redirect_stderr(stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections' business
        try:
            status = cli.main(cli.parse_flags(sys.argv))
        except SystemExit as error:
            status = error.code
    return status, stderr.getvalue()


START = "from fdg_jax.config import default_config\ndef get_config():\n  c = default_config()\n"
WRONG_FILES = [
    ("def get_config(:", "the config file fails: SyntaxError: invalid syntax (config.py, line 1)"),
    ("import nothere", "the config file fails: ModuleNotFoundError: No module named 'nothere' ({path}, line 1)"),
    ("x = 1", "has no attribute 'get_config'"),
    ("def get_config():\n  return 1 / 0", "fails: ZeroDivisionError: division by zero ({path}, line 2)"),
    ("def get_config():\n  raise ValueError('so')", "fails: ValueError: so ({path}, line 2)"),
    (f"{START}  c.epochs = 'many'\n  return c", "the config file fails: "),
    (f"{START}  c.epoch = 3\n  return c", "unknown config key 'epoch'; did you mean 'epochs'?"),
    ("def get_config():\n  return dict(a=1)", "must return a ConfigDict, like default_config()"),
    ("def get_config():\n  return open('gone')", "--config={path} fails: "),
]
WRONG_ARGUMENTS = [
    ((*DIGITS, "--config.method=bp"), "unknown config key 'method'; did you mean 'method.name'"),
    ((*DIGITS, "--config.batch_size=many"), "--config.batch_size=many"),
    ((*DIGITS, "--config.method.beta=2"), "beta must lie in (0, 1]"),
    ((*DIGITS, "--workdir="), "--workdir is empty; name a folder"),
    ((*DIGITS, "--log_format=xml"), "flag --log_format=xml: value should be one of <text|json>"),
    (
        ("--config=experiments/nothing.py",),
        "there is no file --config=experiments/nothing.py; try experiments/digits.py",
    ),
    ((), "--config is missing; try --config experiments/digits.py"),
    ((*DIGITS, "surplus"), "unexpected argument 'surplus'"),
]


def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cases = list(WRONG_ARGUMENTS)
    for number, (text, message) in enumerate(WRONG_FILES):
        path = tmp_path / str(number) / "config.py"
        path.parent.mkdir()
        path.write_text(text)
        cases.append(((f"--config={path}",), message.format(path=path)))
    # A fresh process a case, since flags are global; forked, since importing takes longer than what is tested.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fdg_jax.main"])
    with processes.Pool(2, maxtasksperchild=1) as pool:
        outcomes = pool.map(outcome_of, [arguments for arguments, _ in cases], chunksize=1)
    for (arguments, message), (status, stderr) in zip(cases, outcomes, strict=True):
        assert status == 2, arguments
        assert message in stderr
        assert stderr.count("\n") == 1, stderr


def test_an_interrupt_outside_the_loop_is_no_traceback(monkeypatch, capsys):
    ended = []

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "given_config", interrupted)
    flags = SimpleNamespace(FLAGS={"verbosity": SimpleNamespace(present=True)})
    monkeypatch.setattr(cli, "flags", flags)
    monkeypatch.setattr(cli, "_voices", lambda: voices("text", quiet=False))
    monkeypatch.setattr(cli.os, "_exit", ended.append)
    cli.main(["fdg_jax"])
    assert ended == [130]
    assert capsys.readouterr().err == "fdg_jax: stopped at once; what was written before is kept\n"


def test_a_signal_before_the_loop_is_not_lost_in_a_callback():
    """An exception that a handler raises there is printed and forgotten."""
    script = (
        "import gc, os, signal, sys\n"
        "from rich.console import Console\n"
        "from fdg_jax import main\n"
        "with main._ending_at_once(Console()):\n"
        "    gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT))\n"
        "    gc.collect()\n"
        "print('it went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "fdg_jax: stopped at once; what was written before is kept\n"


def test_a_default_workdir_is_the_next_free_one_or_the_run_to_go_on_with(tmp_path):
    base, settings = tmp_path / "digits", Settings()
    for name in ("digits", "digits-2"):
        assert cli.default_workdir(base, settings) == tmp_path / name
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(dataclasses.asdict(Settings(seed=9))))
    assert cli.default_workdir(base, Settings(seed=9)) == base
    (base / "params").mkdir()  # finished
    assert cli.default_workdir(base, Settings(seed=9)) == tmp_path / "digits-2"
    with locked(tmp_path / "digits-2"):
        assert cli.default_workdir(base, Settings(seed=9)) == tmp_path / "digits-3"
    never = Settings(seed=9, checkpoint=CheckpointSettings(resume="never"))
    assert cli.default_workdir(base, never) == tmp_path / "digits-3"
