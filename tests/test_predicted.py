"""The arithmetic behind the predicted speed-ups; how near the published ones they come is not asserted."""

import json

import pytest

from benchmarks import predicted
from fdg_jax.timeline import FREE


@pytest.fixture(scope="module")
def counted():
    return predicted.forward_flops()


def test_operations_of_wrn_28_10(counted):
    """Two a weight and pixel: 3x3 kernels, a 1x1 where the shape changes, 1024, 256 and 64 pixels."""
    flops, outputs = counted
    assert flops[0] == 2 * 1024 * 9 * 3 * 16
    assert flops[1] == 2 * 1024 * (9 * (16 * 160 + 160 * 160) + 16 * 160)
    assert flops[2:5] == [2 * 1024 * 2 * 9 * 160 * 160] * 3
    assert flops[5] == 2 * 256 * (9 * (160 * 320 + 320 * 320) + 160 * 320)
    assert flops[12] == flops[6] == flops[2], "twice the width, a quarter of the pixels"
    assert flops[13] == 2 * 640 * 10
    assert (outputs[1], outputs[5], outputs[13]) == (1024 * 160, 256 * 320, 10)


def test_costs_add_up_to_the_published_bp(counted):
    costs = predicted.stage_costs(*counted, cuts=(5, 9))
    assert predicted.BATCHES * sum(cost.forward + cost.backward for cost in costs) == pytest.approx(219.1)
    assert costs[1].backward == pytest.approx(2 * costs[1].forward)
    assert costs[0].activations == costs[1].cotangents == 4 * 128 * 1024 * 160
    assert costs[0].cotangents == 0


@pytest.mark.parametrize(("num_stages", "cuts"), [(2, (7,)), (3, (5, 9)), (4, (4, 7, 10))])
def test_fdg_is_predicted_to_take_its_dearest_stage(counted, num_stages, cuts):
    result = predicted.predict(*counted, num_stages, FREE)
    dearest = max(cost.forward + cost.backward for cost in predicted.stage_costs(*counted, cuts))
    assert result["cuts"] == cuts
    assert result["fdg_s_an_epoch"] == pytest.approx(predicted.BATCHES * dearest)
    assert result["fdg"] == pytest.approx(219.1 / predicted.BATCHES / dearest)
    assert result["ddg_locked"] < result["ddg"] <= result["fdg"] * (1 + 1e-9)
    assert result["gpipe"] < result["fdg"] < num_stages


def test_published_speed_ups():
    """1.85, 2.45 and 2.96 (README of ZHUANGHP/FDG)."""
    bp, fdg = predicted.PUBLISHED["bp"][1], predicted.PUBLISHED["fdg"]
    assert [round(bp / fdg[num_stages], 2) for num_stages in (2, 3, 4)] == [1.85, 2.45, 2.96]


def test_the_script_prints_and_writes_the_table(tmp_path, capsys):
    out = tmp_path / "predicted.json"
    assert predicted.main(["--stages", "2", "8", "--bandwidth", "1e10", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert set(results) == {"2", "8"}
    assert results["8"]["published_fdg"] is None
    assert len(results["8"]["cuts"]) == 7
    assert "published fdg" in capsys.readouterr().out
