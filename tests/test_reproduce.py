"""Cells of the papers' tables as runs: what each would train, and what happens to finished, failed and stopped ones."""

import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from fdg_jax import jobs as jobs_module
from fdg_jax import models, reproduce
from fdg_jax.config import OptimSettings, resolve
from fdg_jax.data import digits
from fdg_jax.jobs import SCALES, Job, data_keys, make_jobs, name_of, run_process
from fdg_jax.published import TABLES, Key, cells, to_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


def settings_of(command):
    """What `fdg_jax.main` would train, read as it reads its flags, and the experiment's settings without changes."""
    python, *module = command[:3]
    assert (python, module) == (sys.executable, ["-m", "fdg_jax.main"])
    given, read = flags.FlagValues(), []
    file = config_flags.DEFINE_config_file("config", flag_values=given, lock_config=True)
    flags.DEFINE_string("workdir", None, "", flag_values=given)
    for words in (command[3:], command[3:4]):
        with mock.patch("sys.argv", ["fdg_jax", *words]), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections' business
            assert given(sys.argv) == ["fdg_jax"]
        read.append(resolve(file.value))
        given.unparse_flags()
    return read


NETWORKS = {
    "resnet20": ("resnet_cifar", 20, 16),
    "resnet56": ("resnet_cifar", 56, 16),
    "resnet110": ("resnet_cifar", 110, 16),
    "resnet1202": ("resnet_cifar", 1202, 16),
    "resnet18": ("resnet", 18, 64),
    "wrn28_10": ("wrn", 28, 10),
}
SMALLEST = {"resnet_cifar": (8, 4), "resnet": (18, 4), "wrn": (10, 1)}


@pytest.mark.parametrize(("table", "scale"), list(itertools.product(TABLES, SCALES)))
def test_every_command_trains_its_cell(table, scale):
    all_jobs = make_jobs(table, scale, (0, 7), Path("w"), {})
    assert len({job.folder for job in all_jobs}) == len(all_jobs)
    trained = [job for job in all_jobs if not job.timed]
    assert [job.key for job in trained[::2]] == to_run(table)
    for job in trained:
        settings, own = settings_of(job.command)
        key, model = job.key, settings.model
        assert (settings.seed, settings.num_stages, settings.method.name) == (job.seed, key.num_stages, key.method)
        assert settings.method.beta == (1.0 if key.beta is None else key.beta)
        name, depth, width = NETWORKS[key.network]
        assert (model.name, model.depth, model.width) == (
            name,
            *(SMALLEST[name] if scale == "smoke" else (depth, width)),
        )
        warmup = 3 if key.network == "resnet110" or (table == "table4" and key.num_stages > 2) else 0
        if scale == "smoke":
            assert (settings.data.source, settings.data.limit, settings.batch_size) == ("digits", 0, 64)
            assert settings.log_every_steps == digits().num_train // 64  # a point of the loss curve an epoch
        else:
            assert (settings.data.source, settings.data.name) == ("tfds", key.dataset)
            assert models.published_cuts(name, depth, width, key.num_stages) is not None
        share = {"smoke": 12, "short": 24, "full": 300}[scale] / 300
        assert settings.epochs == round(300 * share)
        assert settings.optim == OptimSettings(
            milestones=tuple(round(epoch * share) for epoch in (150, 225, 275)),
            warmup_epochs=pytest.approx(warmup * share),
        )
        if scale == "full":  # the experiment's file but for what makes it this cell, and what is kept on the disk
            changed = {"seed": own.seed, "num_stages": own.num_stages, "checkpoint": own.checkpoint}
            optim = dataclasses.replace(own.optim, warmup_epochs=settings.optim.warmup_epochs)
            assert dataclasses.replace(settings, **changed, method=own.method) == dataclasses.replace(own, optim=optim)


@pytest.mark.parametrize("scale", SCALES)
def test_what_only_a_time_is_published_of_is_run_for_its_time(scale):
    """Table 4's WRN-28-10: every method here and K. Its errors, of K = 2, are cells of Table 2."""
    timed = [job for table in TABLES for job in make_jobs(table, scale, (3, 4), Path("w"), {}) if job.timed]
    places = {("bp", 1), *itertools.product(("ddg", "features_replay", "dgl", "fdg"), (2, 3, 4))}
    assert {(job.key.method, job.key.num_stages) for job in timed} == places
    assert len(timed) == len(places)
    for job in timed:
        settings, own = settings_of(job.command)
        assert job.key[:5] == ("table4", "wrn28_10", "cifar10", settings.method.name, None)
        assert job.folder == Path("w", "table4", f"{name_of(job.key)}_time", "seed0")
        assert (settings.seed, settings.num_stages, settings.model) == (0, job.key.num_stages, own.model)
        assert (settings.epochs, settings.batch_size, settings.optim.warmup_epochs) == (2, own.batch_size, 0)
        num_images = 1437 if scale == "smoke" else 50_000
        assert 2 * num_images // settings.batch_size >= 3 * settings.log_every_steps  # the first log tells no time


def test_a_fraction_of_the_recipe_drops_the_rate_at_whole_epochs():
    for scale in SCALES.values():
        assert all(epoch * scale.epochs % 300 == 0 for epoch in (150, 225, 275))


def test_data_of_ones_own_reach_the_command(tmp_path):
    for name in ("cat", "dog", ".hidden", *"abcdefgh"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (job, *_) = make_jobs("table4", "short", (0,), Path("w"), data_keys(str(tmp_path), "short", "cifar10"))
    assert (settings := settings_of(job.command)[0]).data.source == "folder"
    assert settings.data.path == str(tmp_path)
    file = tmp_path / "all.npz"
    np.savez(file, train_labels=np.array([99, 3]))
    assert data_keys(str(file), "full", "cifar100") == {"data.source": "arrays", "data.path": str(file)}
    with pytest.raises(ValueError, match="must hold the 10 classes of cifar10; it has 100"):
        data_keys(str(file), "short", "cifar10")
    with pytest.raises(ValueError, match="must hold the 100 classes of cifar100; it has 10"):
        data_keys(str(tmp_path), "short", "cifar100")


class Fake:
    """A runner that leaves what a run leaves, or fails, or is told to stop."""

    def __init__(self, fails=(), stops_at=None, errors=None, refuses=()):
        self.fails, self.stops_at, self.errors, self.refuses = fails, stops_at, errors or {}, refuses
        self.begun = []

    def __call__(self, job: Job, received):
        name = f"{job.folder.parent.name}/{job.seed}"
        cell = json.loads((job.folder / "cell.json").read_text())
        assert Key(*(cell[field] for field in Key._fields)) == job.key
        assert shlex.split(cell["command"])[1:] == list(job.command[1:])
        self.begun.append(name)
        if self.stops_at == len(self.begun):
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGINT]
            return "stopped"
        if name in self.refuses:
            raise ValueError(f"{job} is refused: no such images")
        if name in self.fails:
            return "the loss is nan"
        error = self.errors.get(name, 25.0)
        settings = {"epochs": 1, "seed": job.seed, "batch_size": 100, "num_stages": job.key.num_stages}
        settings |= {"method": {"name": job.key.method, "beta": job.key.beta or 1.0}}
        settings |= {"model": {"name": "resnet_cifar"}, "data": {"source": "digits"}}
        (job.folder / "config.json").write_text(json.dumps(settings))
        train = "".join(f'{{"step": 1, "epoch": 0.3, "train/images_per_s": {rate}}}\n' for rate in (5.0, 3000.0))
        line = {"step": 3, "epoch": 1.0, "time_s": 2.0, "test/loss": 1.0, "test/accuracy": 1 - error / 100}
        (job.folder / "metrics.jsonl").write_text(train + json.dumps(line) + "\n")
        for name in ("params", "checkpoints"):
            (job.folder / name).mkdir()
        return None


@pytest.fixture
def pages(monkeypatch):
    """The reports that would be written, as numbers of runs."""
    written = []
    monkeypatch.setattr(reproduce, "write", lambda runs, out: written.append((len(runs), out)) or out / "index.html")
    return written


def call(workdir, runner, *arguments, table="figure4a"):
    return reproduce.main([table, f"--workdir={workdir}", *arguments], runner)


def test_all_cells_run_with_all_seeds_then_nothing_is_missing(tmp_path, pages, capsys):
    errors = {f"resnet20_fdg_beta0.2_K2/{seed}": error for seed, error in enumerate((30.0, 10.0, 0.0))}
    first = Fake(errors=errors)
    assert call(tmp_path, first, "--seeds=0,1,2") == 0
    assert first.begun == [f"{name_of(key)}/{seed}" for key in to_run("figure4a") for seed in (0, 1, 2)]
    told = capsys.readouterr().out
    assert re.search(r"^cell 1 of 6  resnet20_bp_K1, seed 0  \(0:00:00 so far, no estimate yet\)$", told, re.MULTILINE)
    assert re.search(
        r"^cell 6 of 6  resnet20_fdg_beta0.2_K2, seed 2  \(.* so far, about .* left\)$", told, re.MULTILINE
    )
    assert re.search(r"^resnet20_fdg_beta0.2_K2 +3 +10.00 +0.00 - 30.00", told, re.MULTILINE)
    assert "    test error 0.00 % after 0:00:00\n" in told
    assert pages == [(18, tmp_path / "report")]
    assert not list(tmp_path.rglob("checkpoints"))
    again = Fake()
    assert call(tmp_path, again, "--seeds=0,1,2") == 0
    assert again.begun == []
    assert "18 of 18 runs finished already" in capsys.readouterr().out


def test_the_papers_figures_stand_beside_from_their_file(tmp_path, pages, capsys):
    assert call(tmp_path, Fake(), "--only=bp", table="table4") == 0
    told = capsys.readouterr().out
    for key in to_run("table4"):
        (line,) = [line for line in told.splitlines() if re.match(rf"{re.escape(name_of(key))} +\d", line)]
        assert ("not run" in line) == (key.method != "bp")
        for cell in cells("table4"):
            assert cell.key != key or cell.error is None or f"{cell.error:.2f} ({cell.reported_by}" in line
    assert told.count("(scale smoke, not the papers' task)") == 2  # errors and times
    assert "no such method here: resnet56 data_parallel K2" in told
    assert "    0.1 s an epoch after 0:00:00\n" in told
    assert re.search(r"^wrn28_10_bp_K1 +0.1 +219.1$", told, re.MULTILINE)
    assert re.search(r"^wrn28_10_fdg_K3 +not run +89.6$", told, re.MULTILINE)


def test_a_run_that_fails_is_told_at_the_end_and_the_others_run(tmp_path, pages, capsys):
    failing = Fake(fails=("resnet20_fdg_beta1_K2/0",))
    assert call(tmp_path, failing) == 1
    assert len(failing.begun) == 6
    out, err = capsys.readouterr()
    assert err == "fdg_jax: resnet20_fdg_beta1_K2, seed 0 failed: the loss is nan\n"
    assert "    failed: the loss is nan\n" in out
    assert pages
    mended = Fake()
    assert call(tmp_path, mended) == 0
    assert mended.begun == ["resnet20_fdg_beta1_K2/0"]


def test_a_run_that_is_refused_ends_it(tmp_path, pages, capsys):
    refusing = Fake(refuses=("resnet20_fdg_beta1_K2/0",))
    assert call(tmp_path, refusing) == 2
    assert refusing.begun == ["resnet20_bp_K1/0", "resnet20_fdg_beta1_K2/0"]
    assert pages == []
    assert capsys.readouterr().err == "fdg_jax: resnet20_fdg_beta1_K2, seed 0 is refused: no such images\n"


def test_what_finished_runs_have_lost_is_said(tmp_path, pages, capsys):
    assert call(tmp_path, Fake(), "--seeds=0,1,2", "--only=resnet20_bp_K1") == 0
    assert "no evaluation" not in capsys.readouterr().out
    cut = tmp_path / "figure4a" / "resnet20_bp_K1" / "seed1"
    (cut / "metrics.jsonl").write_text("")
    for table in ("figure4a", "table2"):  # which share the cell
        again = Fake()
        assert call(tmp_path, again, "--seeds=0,1,2", "--only=resnet20_bp_K1", table=table) == 0
        assert again.begun == []
        told = capsys.readouterr().out
        assert re.search(r"^resnet20_bp_K1 +2 of 3 +25.00 ", told, re.MULTILINE)
        assert f"\n{cut}: it has no evaluation\n" in told
    assert call(tmp_path, Fake(), "--only=resnet56_bp", table="table3") == 0
    assert f"{cut}" not in capsys.readouterr().out


def test_a_cell_that_is_begun_and_not_finished_says_so(tmp_path, pages, capsys):
    assert call(tmp_path, Fake(), "--only=resnet20_bp_K1") == 0
    folder = tmp_path / "figure4a" / "resnet20_bp_K1" / "seed0"
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"epochs": 2}))
    capsys.readouterr()
    assert call(tmp_path, Fake(), "--only=resnet20_bp_K1") == 0
    told = capsys.readouterr().out
    assert re.search(r"^resnet20_bp_K1 +0 of 1 +not finished", told, re.MULTILINE)
    assert re.search(r"^resnet20_fdg_beta1_K2 +0 +not run", told, re.MULTILINE)


@pytest.mark.parametrize(
    ("table", "only", "names"),
    [
        ("figure4a", "resnet20_fdg_beta0.2_K2", ["resnet20_fdg_beta0.2_K2"]),
        ("table2", "resnet110_fdg_beta1_K2", ["resnet110_fdg_beta1_K2"]),
        ("table4", "wrn28_10_fdg_K2", ["wrn28_10_fdg_K2_time"]),
        ("table4", "wrn28_10_bp_K1_time", ["wrn28_10_bp_K1_time"]),
        ("table4", "fdg_K", [f"wrn28_10_fdg_K{k}_time" for k in (2, 3, 4)]),
    ],
)
def test_only_takes_one_cell_by_its_name_and_several_by_a_part(table, only, names):
    all_jobs = make_jobs(table, "short", (0,), Path("w"), {})
    assert [job.folder.parent.name for job in reproduce._chosen(all_jobs, only)] == names


def test_the_exact_name_wins_over_longer_ones():
    (job, *_) = make_jobs("figure4a", "smoke", (0, 1), Path("w"), {})
    longer = dataclasses.replace(job, key=job.key._replace(num_stages=12), folder=Path("w/resnet20_bp_K12/seed0"))
    assert reproduce._chosen([job, longer], "resnet20_bp_K1") == [job]
    assert reproduce._chosen([job, longer], "resnet20_bp_K") == [job, longer]


def test_where_all_fail_there_is_no_report(tmp_path, pages, capsys):
    assert call(tmp_path, Fake(fails=("resnet20_bp_K1/0",)), "--only=bp") == 1
    assert pages == []
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupt_ends_it_and_the_same_command_goes_on(tmp_path, pages, capsys):
    stopped = Fake(stops_at=3)
    before = signal.getsignal(signal.SIGINT)
    assert call(tmp_path, stopped) == 130
    assert signal.getsignal(signal.SIGINT) is before
    folder = tmp_path / "figure4a" / stopped.begun[-1].replace("/", "/seed")
    out, err = capsys.readouterr()
    assert out.endswith(f"stopped in {folder}: the same command goes on from there\n")
    assert (err, pages) == ("", [])
    rest = Fake()
    assert call(tmp_path, rest) == 0
    assert rest.begun == [f"{name_of(key)}/0" for key in to_run("figure4a")[2:]]


def test_a_cell_that_two_tables_share_is_run_once(tmp_path, pages):
    assert call(tmp_path, Fake(), "--only=resnet20_fdg_beta1") == 0
    second = Fake()
    assert call(tmp_path, second, "--only=resnet20", "--seeds=0,1", table="table2") == 0
    assert second.begun == [f"resnet20_{rest}" for rest in ("bp_K1/0", "bp_K1/1", "fdg_beta1_K2/1", *BETA_02)]
    assert (tmp_path / "figure4a" / "resnet20_fdg_beta1_K2" / "seed1").is_dir()
    assert not (tmp_path / "table2" / "resnet20_fdg_beta1_K2").exists()
    cifar100 = Fake()
    assert call(tmp_path, Fake(), "--only=resnet56_bp", table="table4") == 0
    assert call(tmp_path, cifar100, "--only=resnet56_bp", table="table3") == 0
    assert cifar100.begun == ["resnet56_bp_K1/0"]


BETA_02 = ("fdg_beta0.2_K2/0", "fdg_beta0.2_K2/1")


def test_a_command_that_was_run_by_hand_fills_its_cell(tmp_path, pages, capsys):
    assert call(tmp_path, Fake(), "--only=bp") == 0
    (cell,) = tmp_path.rglob("cell.json")
    written = cell.read_text()
    cell.unlink()
    assert call(tmp_path, Fake(), "--only=bp") == 0
    assert cell.read_text() == written
    assert re.search(r"^resnet20_bp_K1 +1 +25.00", capsys.readouterr().out.split("already")[1], re.MULTILINE)


def test_dry_runs_print_the_commands_that_are_missing_and_leave_nothing(tmp_path, pages, capsys):
    workdir = tmp_path / "w"
    assert call(workdir, Fake(), "--dry_run", "--scale=full", "--seeds=5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [job.typed for job in make_jobs("figure4a", "full", (5,), workdir, {})]
    assert lines[0].startswith("python -m fdg_jax.main --config=experiments/cifar10_resnet20.py --workdir=")
    assert not workdir.exists()
    assert call(workdir, Fake(), "--only=bp") == 0
    capsys.readouterr()
    assert call(workdir, Fake(), "--only=bp", "--dry_run") == 0
    assert capsys.readouterr().out == ""


def test_the_estimate_goes_by_the_network():
    assert reproduce.time_left([], [("a", 1)]) is None
    done, waiting = [("a", 10.0), ("a", 20.0), ("b", 60.0)], [("a", 1), ("a", 12), ("b", 2), ("c", 2)]
    assert reproduce.time_left(done, waiting) == 15 + 12 * 15 + 2 * 60 + 2 * 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel4"], "unknown table 'tabel4'; did you mean 'table4'"),
        (["table4", "--scale=shrot"], "unknown scale 'shrot'; did you mean 'short' or 'smoke'? (full, short, smoke)"),
        ([], "the following arguments are required: table; --help explains"),
        (["table4", "--sede=1"], "unknown flag 'sede'; did you mean 'seeds'"),
        (["table4", "table2"], "unexpected argument 'table2'; --help explains"),
        (["table4", "--seeds=0,0"], "--seeds must be whole numbers, each once, as 0,1,2; got '0,0'"),
        (["table4", "--seeds=a"], "--seeds must be whole numbers"),
        (["table4", "--only=resnet57"], "--only=resnet57 is in the name of no cell (resnet56_bp_K1, "),
        (["table4", "--data=x"], "--scale smoke runs on the digits of the package: leave out --data=x"),
        (["table4", "--scale=short", "--data=gone"], "--data=gone must be a folder with train/<class>/*.jpg"),
        (["table4", "--workdir=README.md"], "cannot write to --workdir=README.md: Not a directory; choose another"),
        (["table4", "--workdir=/proc/nothing"], "cannot write to --workdir=/proc/nothing: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        raise SystemExit(reproduce.main(arguments, Fake()))
    out, err = capsys.readouterr()
    assert err.startswith(f"fdg_jax: {message}")
    assert (out, err.count("\n")) == ("", 1)


def test_without_tfds_the_data_must_be_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(jobs_module.importlib.util, "find_spec", lambda name: None)
    for table, dataset in (("table4", "cifar10"), ("table3", "cifar100")):
        assert call(tmp_path, Fake(), "--scale=short", table=table) == 2
        assert f"--data is missing: name a folder of the images of {dataset} or an .npz file" in capsys.readouterr().err


def test_scales_do_not_share_a_folder(tmp_path, pages, capsys):
    assert call(tmp_path, Fake(), "--only=bp") == 0
    assert call(tmp_path, Fake(), "--scale=full") == 2
    assert capsys.readouterr().err == (
        f"fdg_jax: {tmp_path} holds runs of scale smoke, not full: choose another --workdir\n"
    )


def test_two_such_commands_do_not_meet(tmp_path, pages, capsys):
    class Second(Fake):
        def __call__(self, job, received):
            assert call(tmp_path, Fake()) == 2
            return super().__call__(job, received)

    assert call(tmp_path, Second(), "--only=bp") == 0
    assert "is in use by process" in capsys.readouterr().err


def job_of(folder, program):
    folder = folder / "table4" / "cell" / "seed0"
    folder.mkdir(parents=True, exist_ok=True)
    return Job(to_run("table4")[0], "smoke", 0, folder, (sys.executable, "-S", "-c", program))


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; print('epoch 1'); sys.exit('fdg_jax: the loss is nan')", "the loss is nan (status 1; {log})"),
        ("import sys; sys.stderr.write('fdg_jax: no\\nlate warning\\n'); sys.exit(3)", "no (status 3; {log})"),
        ("raise KeyError('x')", "KeyError: 'x' (status 1; {log})"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9; {log}"),
    ],
)
def test_why_a_process_failed_is_its_last_word(tmp_path, program, reason):
    job = job_of(tmp_path, program)
    log = job.folder / "log.txt"
    log.write_text("fdg_jax: of an earlier start\n")
    assert run_process(job, []) == reason.format(log=log)


def test_a_process_that_refuses_its_input_is_told_apart(tmp_path):
    job = job_of(tmp_path, "import sys; sys.stderr.write('fdg_jax: there is no folder x\\n'); sys.exit(2)")
    told = f"cell, seed 0 is refused: there is no folder x (status 2; {job.folder / 'log.txt'})"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        run_process(job, [])


def test_a_process_shares_compiled_programs_and_hears_signals(tmp_path):
    program = (
        "import os, signal, sys, time\n"
        "heard = []\n"
        "signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))\n"
        "print(os.environ['JAX_COMPILATION_CACHE_DIR'], os.getpgid(0) == os.getpid(), flush=True)\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "deadline = time.monotonic() + 30\n"
        "while not heard and time.monotonic() < deadline: time.sleep(0.01)\n"
        "sys.exit(130 if heard else 3)\n"
    )
    job = job_of(tmp_path, program)
    with reproduce._signals() as received:
        reason = run_process(job, received)
    assert received == [signal.SIGINT]
    assert "(status 130; " in reason
    said = (job.folder / "log.txt").read_text().split()
    assert said == [os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled")), "True"]


def test_each_signal_is_handed_on_once(tmp_path, monkeypatch):
    """A second one would stop the run without saving it."""
    sent, received = [], []
    polls = iter([[], [signal.SIGINT], [], [], [signal.SIGTERM], [], None])

    def ended(process):
        if (arrived := next(polls)) is None:
            return 0
        received.extend(arrived)
        return None

    monkeypatch.setattr(jobs_module.subprocess, "Popen", lambda *_, **__: SimpleNamespace(send_signal=sent.append))
    monkeypatch.setattr(jobs_module, "_ended", ended)
    assert run_process(job_of(tmp_path, ""), received) is None
    assert sent == [signal.SIGINT, signal.SIGTERM]


def test_a_real_run_fills_its_cell_and_the_page(tmp_path, monkeypatch, capsys):
    """One cell with a network of two hidden layers, one epoch: the process, the summary and the report."""
    changes = ("model.name=mlp", "model.depth=2", "model.pool_window=0", "epochs=1")

    def short(job, received):
        changed = (*job.command, *(f"--config.{change}" for change in changes))
        return run_process(dataclasses.replace(job, command=changed), received)

    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
    status = call(tmp_path, short, "--only=beta0.2_K3", table="table4")
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    folder = tmp_path / "table4" / "resnet56_fdg_beta0.2_K3" / "seed0"
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["num_stages"], settings["method"]["beta"], settings["data"]["source"]) == (3, 0.2, "digits")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    error = f"{100 * (1 - last['test/accuracy']):.2f}"
    assert re.search(rf"^resnet56_fdg_beta0.2_K3 +1 +{re.escape(error)} ", out, re.MULTILINE)
    page = tmp_path / "report" / "index.html"
    assert f"report: {page}" in out
    assert error in page.read_text()
    assert (folder / "params").is_dir()
    assert not (folder / "checkpoints").exists()
