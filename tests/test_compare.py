"""Comparisons of methods: what runs, what is kept, what goes on, what is printed."""

import dataclasses
import importlib.util
import io
import json
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import Life
from rich.console import Console

from fdg_jax import compare, methods
from fdg_jax.build import build
from fdg_jax.compare import Outcome, table
from fdg_jax.config import ConfigError, default_config, resolve_comparison
from fdg_jax.pipeline import Pipeline
from fdg_jax.sealed import PARTIAL

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("compare_*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(methods="bp, fdg(beta=0.5)", seeds=(0, 1), **changes):
    """A comparison of five steps a run."""
    config = default_config()
    config.update({"methods": methods, "seeds": seeds, "num_stages": 2, "epochs": 1, "batch_size": 256})
    config.model.update({"name": "mlp", "depth": 2, "width": 8})
    config.optim.update({"learning_rate": 0.05, "schedule": "constant"})
    config.update(changes)
    return resolve_comparison(config)


def run(runs, workdir):
    text = io.StringIO()
    stopped_by = compare.compare(runs, workdir, Console(file=text, width=200))
    return stopped_by, text.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compare") / "all"
    return workdir, *run(small(), workdir)


def results(workdir):
    return {path.parent.relative_to(workdir).as_posix(): path for path in sorted(workdir.rglob("result.json"))}


def test_every_method_runs_with_every_seed_and_is_kept(finished):
    workdir, stopped_by, told = finished
    assert stopped_by is None
    kept = results(workdir)
    assert list(kept) == [f"{method}/seed_{seed}" for method in ("bp", "fdg_beta=0.5") for seed in (0, 1)]
    for name, path in kept.items():
        outcome = Outcome(**json.loads(path.read_text())["outcome"])
        lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        assert outcome.test_error == 1 - lines[-1]["test/accuracy"]
        assert outcome.failed is None
        assert outcome.extra_params == 0
        seed = name[-1]
        label = "bp" if name.startswith("bp") else "fdg(beta=0.5)"
        assert f"/4  {label}, seed {seed}: test error {100 * outcome.test_error:.2f} %\n" in told
    assert told.index("bp, seed 1") < told.index("fdg(beta=0.5), seed 0")
    assert "fdg(beta=0.5, policy=stash), 2 stages" in (workdir / "fdg_beta=0.5" / "seed_0" / "log.txt").read_text()


def test_the_memory_is_the_forecast_and_heads_are_counted(tmp_path):
    (key, settings), *_ = small("dgl(head=linear)", (3,)).items()
    run({key: settings}, tmp_path)
    (path,) = results(tmp_path).values()
    outcome = Outcome(**json.loads(path.read_text())["outcome"])
    pipe, source = build(settings)
    pipe.init(jax.random.key(0), source.batch(0, 0, settings.batch_size)[0])
    totals = [forecast.total for forecast in pipe.forecasts]
    assert outcome.bytes_held == [sum(totals), max(totals)]
    assert outcome.extra_params == 8 * 10 + 10  # one linear head
    assert settings.seed == 3


def test_a_comparison_that_is_finished_trains_nothing(finished, monkeypatch):
    workdir, _, told = finished
    monkeypatch.setattr(Pipeline, "init", lambda *_: pytest.fail("it trains"))
    assert run(small(), workdir) == (None, told)
    selected = run(small("fdg(beta=0.5)", (1,)), workdir)[1]
    assert selected.startswith("  1/1  fdg(beta=0.5), seed 1: test error")
    assert "\nbp " not in selected


def test_a_comparison_that_was_stopped_goes_on(finished, tmp_path, monkeypatch):
    """In the middle of a run, and without the runs before it."""
    calls, step = [], Pipeline.step

    def stopping(self, state, batch):
        calls.append(state)
        if len(calls) == 8:  # the third step of the second run
            signal.raise_signal(signal.SIGINT)
        return step(self, state, batch)

    monkeypatch.setattr(Pipeline, "step", stopping)
    stopped_by, told = run(small(), tmp_path)
    assert stopped_by == signal.SIGINT
    assert f"stopped in {tmp_path / 'bp' / 'seed_1'}: the same command goes on from there" in told
    assert list(results(tmp_path)) == ["bp/seed_0"]
    stopped_by, told = run(small(), tmp_path)
    assert stopped_by is None
    assert len(calls) == 4 * 5
    for name, path in results(tmp_path).items():
        own, other = (json.loads(each.read_text())["outcome"] for each in (path, finished[0] / name / "result.json"))
        assert own["test_error"] == other["test_error"]


def test_a_run_that_fails_is_a_result(tmp_path):
    runs = small("fdg, bp", (0,), epochs=2, log_every_steps=1)
    wild = dataclasses.replace(runs["fdg", 0].optim, learning_rate=1e9)
    runs["fdg", 0] = dataclasses.replace(runs["fdg", 0], optim=wild)
    for _ in range(2):  # the second time from what is kept
        told = run(runs, tmp_path)[1]
        assert re.search(r"fdg, seed 0: the loss is .* stopped being finite between steps", told)
        assert "bp, seed 0: test error" in told
        assert re.search(r"^fdg +0 of 1 +failed$", told, re.MULTILINE)


def test_runs_of_other_settings_are_not_taken_for_these(finished):
    with pytest.raises(ConfigError, match=r"holds a run of other settings: config.batch_size was 256, is 128"):
        run(small(batch_size=128), finished[0])


def test_the_table_has_median_and_spread():
    held = (3 * 2**20, 2**20)
    outcomes = {("a", seed): Outcome(error, 2e-3, held, 1234) for seed, error in enumerate((0.3, 0.1, 0.2))}
    outcomes |= {("b(c=1)", 0): Outcome(0.5, 1e-3, (2**20, 2**19), 0), ("b(c=1)", 1): Outcome(np.nan, failed="why")}
    assert table(outcomes).splitlines() == [
        "method  seeds   test error  least - greatest  ms a batch  MiB   largest stage  extra params",
        "a       3       20.00 %     10.00 - 30.00     2.00        3.00  1.00           1,234",
        "b(c=1)  1 of 2  50.00 %     50.00 - 50.00     1.00        1.00  0.50           0",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "bp, fgd"}, "unknown method 'fgd'; did you mean 'fdg'"),
        ({"methods": "fdg(bta=1)"}, "unknown config key 'method.bta'; did you mean 'method.beta'"),
        ({"methods": "fdg(beta='x')"}, "config.method.beta must be of type float; got 'x'"),
        ({"methods": "bp(beta=0.5)"}, "bp has no beta"),
        ({"methods": "bp, bp"}, "config.methods and config.seeds must name some, each once"),
        ({"methods": ""}, "config.methods and config.seeds must name some"),
        ({"seeds": (1, 1)}, "config.methods and config.seeds must name some, each once"),
        ({"methods": "bp; fdg"}, "config.methods: 'bp; fdg' must be names with arguments between commas"),
        ({"methods": "open('x')"}, "must be names with arguments between commas"),
        ({"methods": 3}, "config.methods must be of type str; got 3"),
        ({"seeds": ("a",)}, "config.seeds must be whole numbers"),
    ],
)
def test_what_is_typed_is_checked_before_anything_runs(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


def test_corrections_reach_their_method():
    (settings,) = small("pipelined_bp(corrections='spike_compensation, linear_prediction(horizon=2)')", (0,)).values()
    pipe, _ = build(settings)
    assert str(pipe.method).startswith("pipelined_bp(policy=current, SpikeCompensation(), LinearPrediction(")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_compares_every_method_with_three_seeds(path):
    module = load(path)
    runs = resolve_comparison(module.get_config())
    assert {settings.method.name for settings in runs.values()} == set(methods.PRESETS)
    names = {name for name, _ in runs}
    assert len(runs) == 3 * len(names)
    assert len({(settings.epochs, settings.batch_size) for settings in runs.values()}) == 1
    smoke = resolve_comparison(module.get_config("smoke"))
    assert {name for name, _ in smoke} == names
    assert {settings.data.source for settings in smoke.values()} == {"digits"}
    assert len(smoke) == len(names)


SMOKE = resolve_comparison(load(EXPERIMENTS[0]).get_config("smoke"))


@pytest.mark.parametrize("method", [name for name, _ in SMOKE])
def test_every_method_of_the_experiments_trains(method):
    settings = SMOKE[method, 0]
    mlp = dataclasses.replace(settings.model, name="mlp", depth=2, width=8, pool_window=0)
    pipe, source = build(dataclasses.replace(settings, model=mlp))
    state = pipe.init(jax.random.key(0), source.batch(0, 0, settings.batch_size)[0])
    for i in range(2):
        state, _ = pipe.step(state, source.batch(0, i, settings.batch_size))
    state, _ = pipe.drain(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pipe.params(state)))


def test_the_command_line_selects_and_stops(tmp_path):
    arguments = (
        *("--config=experiments/compare_digits.py", f"--workdir={tmp_path / 'all'}"),
        *("--config.methods=bp, fdg(beta=0.5)", "--config.seeds=4,", "--config.num_stages=2", "--config.engine=mpmd"),
        *("--config.model.name=mlp", "--config.model.depth=2", "--config.model.width=8", "--config.epochs=400"),
    )
    life = Life(tmp_path, arguments)
    folder = tmp_path / "all" / "bp" / "seed_4"
    life.when(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text())
    life.send(signal.SIGINT)
    status, stdout, stderr = life.end()
    assert (status, stderr) == (130, "")
    assert f"stopped in {folder}: the same command goes on from there" in stdout
    assert not list(folder.rglob(f"*{PARTIAL}"))
    typo = Life(tmp_path, (*arguments, "--config.methods=bpp")).end()
    assert typo[0] == 2
    assert "fdg_jax: unknown method 'bpp'; did you mean 'bp'" in typo[2]
    ordinary = Life(tmp_path, ("--config=experiments/digits.py", "--config.methods=bp")).end()
    assert ordinary[0] == 2
    assert ordinary[2].count("\n") == 1
