"""The benchmarks run, and what they report hangs together; how fast or how large anything is, is not asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close
from rich.console import Console

from benchmarks import bounded, dispatch, gpu, memory, overnight, plain, saving, simulated, speed, tracing
from benchmarks.interleaved import Side, ratio, rounds
from fdg_jax import Pipeline, methods, softmax_cross_entropy
from fdg_jax.config import DataSettings, ModelSettings, Settings
from fdg_jax.layers import Conv
from fdg_jax.stage import as_layers

ROOT = Path(__file__).parents[1]


@pytest.fixture
def compiled_before(monkeypatch):
    """Children share the compiled programs of the tests."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_goes_on_from_its_newest_checkpoint(compiled_before, tmp_path, capsys):
    arguments = (
        "--minutes 0.01 --save_every_s 0.1 --kill_every_s 1 --settle_s 0 --allowed_mib 512 --sample_every_s 0.02"
    )
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


def test_the_cost_of_a_recorder_is_measured(monkeypatch, tmp_path, capsys):
    small = Settings(batch_size=8, model=ModelSettings(name="mlp", depth=2, width=16), data=DataSettings("digits"))
    monkeypatch.setitem(tracing.CASES, "digits", lambda folder: small)
    sizes = "--cases digits --rounds 2 --batches 2"
    assert tracing.main([*sizes.split(), "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())["digits"]
    assert result["rounds"] == 2
    assert min(result[f"{turn} ms"] for turn in tracing.TURNS) > 0
    assert result["ratio"]["of medians"] == pytest.approx(result["with ms"] / result["without ms"])
    for name in ("ratio", "noise", "cpu", "cpu noise"):
        assert result[name]["lower quartile"] <= result[name]["upper quartile"]
    assert "recorded / not: " in capsys.readouterr().out


def test_memory_is_measured(tmp_path, capsys):
    size = "--depth 8 --width 2 --side 8 --batch_size 4 --stages 2 --steps 1 --rounds 2"
    cases = ["--cases", "stash, full", "recompute"]
    assert memory.main([*size.split(), *cases, "--out", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [results[name]["activations_a_block"] for name in ("stash, full", "recompute")] == [1, 0]
    for result in results.values():
        assert len(result["stages"]) == 2
        assert all(stage["peak"] > stage["held"] > 0 < stage["scratch"] for stage in result["stages"])
        assert result["seconds"] > 0
    assert "forecasts are" in capsys.readouterr().out
    assert memory.main(["--stages", "99"]) == 1


def test_the_hosts_ticks_are_measured(tmp_path, capsys):
    arguments = ["--depths", "8", "--num_stages", "3", "--ticks", "4", "--out", str(tmp_path / "out.json")]
    assert dispatch.main(arguments) == 0
    result = json.loads((tmp_path / "out.json").read_text())["resnet8"]
    assert [call[0] for call in result["calls"]] == [*(f"call of stage {k}" for k in range(3)), "device_put"]
    assert result["calls"][-1][1:] == [6, 6]  # inputs, targets, two activations, two error gradients
    assert set(result["parts_ms"]) == {*(call[0] for call in result["calls"]), "rest", "release"}
    assert 0 < result["least_ms"] <= result["tenth_ms"] <= result["median_ms"]
    assert result["ticks"] >= 4
    assert "ms a tick" in capsys.readouterr().out


TINY = {"network": "resnet8", "batch_size": 4, "images": 16, "pixels": 8, "batches": 2, "dtype": "float32"}


def test_the_steps_written_by_hand_are_those_of_the_pipeline():
    feed = plain.random_source(16, 8).feed(0, 4)
    for network in ("resnet8", "wrn10_1"):
        own, flax = (plain.build(network, side=8) for _ in range(2))
        pipe = Pipeline(own, loss=softmax_cross_entropy, optimizer=plain.optimizer(), method=methods.bp(), num_stages=1)
        state = pipe.init(jax.random.key(0), jax.ShapeDtypeStruct((4, 8, 8, 3), np.float32))
        _, metrics = pipe.run(state, feed, 6)
        for layers in (own, list(map(plain.of_flax, flax))):
            losses = np.array(plain.Plain(layers, feed).run(6))
            assert_trees_close(losses, np.array(metrics["loss"]), 1e-5)


def test_flax_layers_are_flaxs():
    network = plain.Network(list(map(plain.of_flax, plain.build("wrn10_1", side=8))))
    convolutions = [type(module) for _, module in nnx.iter_modules(network) if isinstance(module, nnx.Conv | Conv)]
    assert convolutions == [nnx.Conv] * 9


class Recorded(Side):
    """A side that has answered already: seconds a batch of every turn."""

    def __init__(self, name, seconds, **about):
        self.name, self.about = name, {"cuts": [1], **about}
        self.turns = [{"seconds": s, "cores": 1.0, "faults": 0.0, "rss_mib": 1.0} for s in seconds]
        self.idle_s, self.idle_cpu_s = 1.0, 0.0


def test_ratios_are_of_medians_and_name_their_targets(capsys):
    sides = [Recorded(speed.FDG, [1, 2, 9]), Recorded("BP on one core", [4, 5, 5]), Recorded("fused BP", [4, 4, 4])]
    assert ratio(sides[0], sides[1]) == {"ratio": 2 / 5, "least": 1 / 4, "greatest": 9 / 5}
    found = speed.lines(sides)
    assert [(line["target"], line["at_most"]) for line in found] == [(1, 0.5), (None, None)]
    for line in found:
        speed.show_line(Console(), line)
    speed.show_line(Console(), {**found[0], "ratio": 0.51})
    met, beside, missed = capsys.readouterr().out.splitlines()
    assert met.endswith("0.400 (0.250 to 1.800); wanted at most 0.50: yes")
    assert beside.endswith("0.500 (0.250 to 2.250)")
    assert missed.endswith("NO")


def test_sides_take_turns_there_and_back():
    order = []
    sides = [Recorded(name, []) for name in "abc"]
    for side in sides:
        side.take_turn = lambda num_batches, name=side.name: order.append((name, num_batches))
    rounds(sides, 5, 3)
    assert order == [(name, 5) for name in "abccbaabc"]


def test_every_line_is_of_sides_that_exist():
    for line in speed.LINES:
        assert any({line.above, line.below} <= set(group) for group in speed.GROUPS), line
    assert {name for group in speed.GROUPS for name in group} == set(speed.CASES)
    assert set(speed.BOTH_WAYS) <= set(speed.CASES)
    assert {name for line in gpu.LINES for name in line[1:3]} <= {*gpu.OURS, *gpu.TORCHS}
    assert set(gpu.WORK) == {*gpu.OURS, *gpu.TORCHS, "check", "breakdown"}


def test_speed_is_measured(compiled_before, tmp_path, capsys):
    sizes = "--networks resnet8 --batch_size 4 --images 16 --side 8 --batches 2 --rounds 2 --only_turns"
    which = ["--sides", "by hand", "fused BP", "--memory", speed.GIVEN_BACK]
    assert speed.main([*sizes.split(), *which, "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())["resnet8"]
    (result,) = result[speed.GIVEN_BACK]
    assert [(line["target"], line["above"], line["below"]) for line in result["lines"]] == [(3, "fused BP", "by hand")]
    for side in result["sides"].values():
        assert len(side["seconds"]) == 2
        assert side["kept"] is False
    assert "3. fused BP / by hand: " in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes have no affinity here")
def test_one_core_is_one_core():
    code = (
        "import os; from benchmarks.speed import hold_to_one_core as hold; hold(); print(len(os.sched_getaffinity(0)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout == b"1\n"


def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 0
    assert "no GPU" in capsys.readouterr().out


def test_shares_of_a_tick():
    """Three stages of 2, 4 and 1 s of compute in a tick of 10 s, on devices of their own and on one."""
    times = [2, 4, 1], [1, 0, 1], [0.1, 0.1, 0.1]
    alone = gpu.shares(10, *times, ["a", "b", "c"])
    assert [part["imbalance"] for part in alone] == [20, 0, 30]
    for part in alone:
        assert part["compute"] + part["transfer"] + part["imbalance"] + part["idle"] == 100
        assert part["dispatch"] == 1
    shared = gpu.shares(10, *times, ["a", "a", "a"])
    assert {part["idle"] for part in shared} == {100 - 10 * (2 + 4 + 1 + 1 + 1)}


def test_the_cpu_agrees_with_itself():
    off = gpu.check(TINY, num_batches=3)
    assert off["float32"] == 0
    assert 0 < off["bfloat16"] < 0.1


def test_a_pipeline_is_taken_apart():
    parts = gpu.breakdown(TINY, num_stages=3, repeats=2)
    assert len(parts["stages"]) == len(parts["devices"]) == 3
    for part in parts["stages"]:
        assert set(part) == {"compute", "transfer", "dispatch", "imbalance", "idle"}
        assert min(part["compute"], part["dispatch"], part["transfer"]) > 0
    assert min(part["imbalance"] for part in parts["stages"]) == 0


def test_the_gpu_benchmark_needs_little():
    """What a machine with a GPU may not have is not imported."""
    missing = ["ml_collections", "grain", "tensorflow_datasets", "tensorboardX", "PIL", "absl.app", "torch", "requests"]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import benchmarks.gpu"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_networks_in_pytorch_are_as_large():
    torch_models = pytest.importorskip("benchmarks.torch_models", reason="torch is no dependency", exc_type=ImportError)
    for network in plain.NETWORKS:
        ours = sum(layer.num_params for layer in as_layers(plain.build(network)))
        assert sum(parameter.numel() for parameter in torch_models.build(network).parameters()) == ours


def test_the_package_knows_nothing_of_them():
    code = "import sys, fdg_jax.main; assert not any(name.split('.')[0] == 'benchmarks' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prediction_is_that_of_the_simulator(tmp_path, monkeypatch):
    """FDG takes what its slower stage takes, BP the sum and two messages; the times are those of other processes."""

    class Told:
        visits: ClassVar = {"0 F": 1.0, "0 BU": 2.0, "1 FBU": 4.0}

        def __init__(self, name, command, environment):
            self.name, self.about, self.turns = name, {"message_s": 0.5}, []

        def take_turn(self, num_batches):
            self.turns.append({"seconds": 5.0, "visits": self.visits})

        def times(self):
            return [turn["seconds"] for turn in self.turns]

        def close(self):
            self.median = 5.0

    monkeypatch.setattr(simulated, "Side", Told)
    out = tmp_path / "simulated.json"
    assert simulated.main(["--rounds", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["methods"]
    assert found["fdg"]["predicted_s"] == pytest.approx(4.0)
    assert found["bp"]["predicted_s"] == pytest.approx(1 + 2 + 4 + 2 * 0.5)
    assert found["bp"]["measured_s"] == 5


def test_memory_is_read_and_does_not_grow(tmp_path):
    """Two readings of each engine, equal to the array; asserts no size."""
    out = tmp_path / "bounded.json"
    assert bounded.main(["--ticks", "160", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [len(samples) for samples in found.values()] == [bounded.SAMPLES] * 2
