"""Which runs stand in one figure of betas or of stages: those of which nothing else differs."""

import json

from made_runs import make_run

from fdg_jax import comparisons
from fdg_jax.results import find
from fdg_jax.tally import by_task


def made(folder, method, beta, num_epochs, num_stages=2):
    stages = num_stages if method == "fdg" else 1
    name = folder / f"{method}_{beta}_{num_epochs}_{stages}"
    return make_run(name, tuple(20.0 - 5 * n for n in range(num_epochs)), method, beta, stages)


def drawn(folder):
    """The pictures by their names, and whether they differ."""
    ((task, groups),) = by_task(find([folder])).items()
    return {picture.name: picture for picture in comparisons.draw(3, task, groups)}, comparisons.differ(groups)


def test_bars_and_curves_hold_runs_that_differ_in_nothing_else(tmp_path):
    for stages in (2, 3):
        for beta, epochs in ((0.5, 2), (0.5, 3), (1.0, 2), (1.0, 3)):
            made(tmp_path, "fdg", beta, epochs, stages)
    made(tmp_path, "bp", 1.0, 2)
    made(tmp_path, "bp", 1.0, 4)
    pictures, differ = drawn(tmp_path)
    assert differ
    assert set(pictures) == {
        *("betas_3_K2", "betas_3_K2_1", "betas_3_K3", "betas_3_K3_1"),
        *("stages_3_beta1", "stages_3_beta1_1", "stages_3_beta0.5", "stages_3_beta0.5_1"),
    }
    for name, picture in pictures.items():
        assert ("epochs 2" in picture.alt) != ("epochs 3" in picture.alt)
        if name.startswith("betas"):
            assert picture.alt.count("beta 0.5") == 1
            assert ("epochs 2" in picture.alt) == picture.alt.endswith("BP 15.00 %.")
            assert ("epochs 3" in picture.alt) == picture.alt.endswith("BP not run.")
        else:
            assert ("epochs 2" in picture.alt) == ("BP, epochs 2 ends" in picture.alt)


def test_warm_up_and_cuts_belong_to_the_number_of_stages(tmp_path):
    """The papers' recipe warms up where K is more than 2."""
    for stages, warmup in ((1, 0), (2, 0), (3, 3)):
        folder = made(tmp_path, "fdg" if stages > 1 else "bp", 1.0, 2, stages)
        settings = json.loads((folder / "config.json").read_text())
        settings |= {"optim": {"warmup_epochs": warmup}, "cuts": list(range(1, stages))}
        (folder / "config.json").write_text(json.dumps(settings))
    pictures, differ = drawn(tmp_path)
    assert not differ
    assert "K = 1 1 s, K = 2 1 s, K = 3 1 s" in pictures["stages_3_beta1"].alt
