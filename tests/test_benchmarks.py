"""The benchmarks run, and what they report hangs together; how fast or how large anything is, is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import overnight, saving

ROOT = Path(__file__).parents[1]


@pytest.fixture
def compiled_before(monkeypatch):
    """Children share the compiled programs of the tests."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_goes_on_from_its_newest_checkpoint(compiled_before, tmp_path, capsys):
    arguments = "--minutes 0.01 --save_every_s 0.1 --kill_every_s 1 --settle_s 0 --sample_every_s 0.02"
    config = "--config experiments/digits.py:smoke"
    folders = ["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out.json")]
    assert overnight.main([*arguments.split(), *config.split(), *folders]) == 0, capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["checks"].values()) == {None}
    assert result["kills"] == 1
    assert [life["ended_by"] for life in result["lives"]] == [-9, 143]
    first, second = result["lives"]
    assert first["went_on_after"] is None
    assert second["went_on_after"] == second["newest"] > 0
    assert result["files"]["event files"] == 2
    assert second["memory"]["max_mib"] > 0
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_a_check_finds(tmp_path):
    lives = [overnight.Life(None), overnight.Life(4, went_on_after=2)]
    run = overnight.Run(overnight.parse([]), tmp_path, None, "life")
    run.lives = lives
    assert "went on after 2; the newest checkpoint was 4" in overnight.check_restarts(run)
    (tmp_path / "config.json").write_text(json.dumps({"log_every_steps": 2, "num_stages": 2}))
    lines = [{"step": step, "epoch": step / 4} for step in (2, 4, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert overnight.check_metrics(tmp_path) == "3 lines, 4 due; the first that differs: 6"
    assert overnight.check_checkpoints(run) == "none is left"
    assert overnight.check_files({"checkpoints": 4, "damaged": 1}, keep=3) == "1 damaged, 4 checkpoints"
    grows = overnight.Life(None, first_log_s=0, samples=[(60.0 * t, (100 + 50 * t) << 20, 1, 1) for t in range(9)])
    assert overnight.memory(grows, 0)["slope_mib_per_min"] == pytest.approx(50)
    assert "MiB in the last" in overnight.check_memory([grows], overnight.parse([]))


def test_ticks_are_sorted_by_the_save_that_they_touch():
    """Two saves, of one and two ticks; ticks take 1 s, those during a save 3 s."""
    saves = [saving.Save(1.5, 1.6, 1.7, 3.5, 2**20), saving.Save(6.5, 6.6, 6.7, 11.5, 2**20)]
    summary = saving.summary([0, 1, 4, 5, 6, 9, 12, 13, 14], saves)
    assert summary["ticks_during"] == 3
    assert summary["ticks_without"] == 4
    assert summary["mean_ratio"] == summary["median_ratio"] == 3
    assert summary["ticks_a_save"] == 1.5
    assert summary["cost_in_ticks"] == 3


def test_saves_are_measured(tmp_path, capsys):
    assert (
        saving.main(["--cases", "digits", "--saves", "2", "--between", "3", "--out", str(tmp_path / "out.json")]) == 0
    )
    result = json.loads((tmp_path / "out.json").read_text())["digits"]
    assert result["saves"] == 2
    assert result["ticks_without"] > 0
    assert result["ticks_during"] > 0
    assert result["mib"] > 1
    assert result["settings"]["batch_size"] == 64
    assert "median ratio" in capsys.readouterr().out


def test_the_package_knows_nothing_of_them():
    code = "import sys, fdg_jax.main; assert not any(name.split('.')[0] == 'benchmarks' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
