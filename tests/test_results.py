"""Folders of runs read again: what is there, what is missing, what belongs together; and the papers' figures."""

import json

import pytest
from made_runs import make_run

from fdg_jax import published
from fdg_jax.methods import PRESETS
from fdg_jax.published import Key
from fdg_jax.results import find, read
from fdg_jax.tally import Spread, Task, by_task, grouped, of_cell

CELL = ("table4", "resnet56", "cifar10", "fdg", 0.5, 3)


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = read(make_run(tmp_path / "a", (25.0, 12.5), beta=0.5, num_stages=3, cell=CELL))
    assert run.finished
    assert run.notes == ()
    assert run.test_error == [(1.0, 25.0), (2.0, 12.5)]
    assert run.train_loss == [(1.0, 2.0), (2.0, 1.0)]
    assert run.error == 12.5
    assert run.seconds == 14.0
    assert run.images_per_second == 1000.0  # without the first, which compiles
    assert run.seconds_per_epoch == pytest.approx(5 * 200 / 1000)
    assert run.hardware == "3 x H100"
    assert run.command == "python -m fdg_jax.main --config.seed=0"
    assert (run.cell, run.scale) == (Key(*CELL), "full")
    assert run.setting("method.beta") == 0.5
    assert run.setting("method.gamma", "none") == "none"


def test_a_single_log_is_that_of_compilation(tmp_path):
    run = read(make_run(tmp_path / "a", (25.0,)))
    assert run.images_per_second is None
    assert run.seconds_per_epoch is None


def test_a_line_cut_short_by_a_crash_is_left_out_and_noted(tmp_path):
    folder = make_run(tmp_path / "a", (25.0, 12.5))
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    run = read(folder)
    assert run.test_error == [(1.0, 25.0)]
    assert not run.finished
    assert run.notes == (
        "1 of 2 lines of metrics.jsonl are cut short or damaged, and left out",
        "it is not finished: 1 of 2 epochs",
    )


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("config.json", "{", "config.json cannot be read: its settings are not known"),
        ("config.json", "[]", "config.json cannot be read: its settings are not known"),
        ("run.json", None, "there is no run.json: its machine and command are not known"),
        ("run.json", "[", "run.json cannot be read: its machine and command are not known"),
        ("metrics.jsonl", None, "metrics.jsonl is empty or not there: nothing was measured"),
        ("metrics.jsonl", "", "metrics.jsonl is empty or not there: nothing was measured"),
        ("metrics.jsonl", '{"step": 1, "train/loss": null}', "its loss was not finite at some time"),
        ("cell.json", "\x00", "cell.json cannot be read"),
        ("cell.json", '{"table": "table2"}', "cell.json names no cell: it counts for no table"),
    ],
)
def test_what_is_missing_is_said(name, content, note, tmp_path):
    folder = make_run(tmp_path / "a", cell=CELL)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert note in read(folder).notes


@pytest.mark.parametrize("wrong", ['"seed": [1]', '"method": {"name": ["fdg"]}', '"data": 3', '"epochs": "two"'])
def test_settings_of_another_kind_are_not_known(wrong, tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "config.json").write_text(f"{{{wrong}}}")
    (folder / "run.json").write_text('[{"devices": 3}, {"command": "as typed"}]')
    run = read(folder)
    assert run.settings == {}
    assert "config.json is not as a run writes it: its settings are not known" in run.notes
    assert run.starts == [{"command": "as typed"}]
    grouped([run])


def test_runs_below_a_run_are_found_too(tmp_path):
    above, below = make_run(tmp_path / "a"), make_run(tmp_path / "a" / "table4" / "b")
    assert [run.workdir for run in find([above])] == [above, below]


def test_runs_are_found_in_the_order_of_their_names_and_once(tmp_path):
    folders = [make_run(tmp_path / name) for name in ("b/seed_1", "b/seed_0", "a")]
    (folders[0] / "checkpoints" / "step_1").mkdir(parents=True)
    assert [run.workdir for run in find([tmp_path])] == sorted(folders)
    assert [run.workdir for run in find([folders[0], tmp_path / "b"])] == [folders[0], folders[1]]


def test_a_path_without_runs_is_refused(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no run in .*empty: a run has a config.json or a metrics.jsonl"):
        find([tmp_path / "a", tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; name folders of runs"):
        find([tmp_path / "nowhere"])


def test_runs_that_differ_in_their_seed_are_one_group_with_median_and_spread(tmp_path):
    for seed, error in enumerate((8.0, 6.0, 7.5)):
        make_run(tmp_path / f"fdg_{seed}", (30.0, error), seed=seed)
    make_run(tmp_path / "bp", (20.0, 7.0), method="bp", num_stages=1)
    make_run(tmp_path / "unfinished", (31.0,), seed=3, epochs=2)
    bp, fdg = grouped(find([tmp_path]))
    assert (bp.label, fdg.label) == ("BP", "FDG, beta 1, K = 2")
    assert fdg.error == pytest.approx(Spread(median=7.5, least=6.0, greatest=8.0))
    assert fdg.seeds == "3 of 4"
    assert fdg.curve("test_error")[0] == (1.0, pytest.approx(Spread(30.0, 30.0, 30.0)))


def test_a_line_is_of_the_same_seeds_from_end_to_end(tmp_path):
    """One seed has lost its second line; the unfinished ones are far off."""
    for seed, errors in enumerate(((30.0, 20.0, 10.0), (34.0, 24.0, 14.0), (90.0, 80.0), (95.0,))):
        make_run(tmp_path / f"{seed}", errors, seed=seed, epochs=3)
    metrics = tmp_path / "1" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[::2]))
    (group,) = grouped(find([tmp_path]))
    assert group.curve("test_error") == [
        (1.0, pytest.approx(Spread(32.0, 30.0, 34.0))),
        (3.0, pytest.approx(Spread(12.0, 10.0, 14.0))),
    ]
    (unfinished,) = grouped(find([tmp_path / "2", tmp_path / "3"]))
    assert unfinished.curve("test_error") == [(1.0, pytest.approx(Spread(92.5, 90.0, 95.0)))]


def test_a_seed_that_ran_twice_counts_once(tmp_path):
    make_run(tmp_path / "short", (30.0,), epochs=2)
    make_run(tmp_path / "whole", (30.0, 10.0))
    (group,) = grouped(find([tmp_path]))
    assert [run.workdir.name for run in group.runs] == ["whole"]


def test_groups_that_differ_in_more_say_in_what(tmp_path):
    make_run(tmp_path / "short", (10.0,))
    make_run(tmp_path / "long", (10.0, 5.0))
    assert {group.label for group in grouped(find([tmp_path]))} == {
        "FDG, beta 1, K = 2, epochs 1",
        "FDG, beta 1, K = 2, epochs 2",
    }


def test_different_networks_are_different_tasks(tmp_path):
    make_run(tmp_path / "a", depth=20)
    make_run(tmp_path / "b", depth=56)
    make_run(tmp_path / "c", depth=56, cell=CELL, scale="smoke")
    assert {task.title for task in by_task(find([tmp_path]))} == {
        "resnet_cifar, depth 20, width 16 on cifar10",
        "resnet_cifar, depth 56, width 16 on cifar10",
        "ResNet-56 on CIFAR-10, scale smoke: resnet_cifar, depth 56, width 16 on cifar10",
    }
    assert Task("x", "y", ("resnet56", "cifar100"), "full").title == "ResNet-56 on CIFAR-100"


def test_images_of_another_path_are_another_task(tmp_path):
    for name, path in {"a": "/x/images.npz", "b": "/y/images.npz", "c": "/y/images.npz", "d": "/z/others"}.items():
        source = "arrays" if path.endswith("npz") else "folder"
        make_run(tmp_path / name, seed=ord(name), data={"source": source, "path": path})
    tasks = by_task(find([tmp_path]))
    ran = "resnet_cifar, depth 20, width 16 on"
    assert {task.title: [len(group.runs) for group in groups] for task, groups in tasks.items()} == {
        f"{ran} arrays x/images.npz": [1],
        f"{ran} arrays y/images.npz": [2],
        f"{ran} folder others": [1],
    }
    assert len(grouped(find([tmp_path]))) == 3


def test_where_tfds_keeps_its_images_does_not_matter(tmp_path):
    for seed, path in enumerate(("/a/images", "/b/images")):
        make_run(tmp_path / f"{seed}", seed=seed, data={"source": "tfds", "name": "cifar10", "path": path})
    ((group,),) = by_task(find([tmp_path])).values()
    assert len(group.runs) == 2


def test_paths_of_the_papers_own_task_are_told_apart(tmp_path):
    for name in ("a", "b"):
        data = {"source": "folder", "path": f"/{name}/cifar"}
        make_run(tmp_path / name, data=data, cell=("table2", "resnet20", "cifar10", "fdg", 1.0, 2))
    titles = [task.title for task in by_task(find([tmp_path]))]
    assert titles == ["ResNet-20 on CIFAR-10, folder a/cifar", "ResNet-20 on CIFAR-10, folder b/cifar"]


def test_a_run_without_settings_is_a_task_of_its_own(tmp_path):
    for name in ("x/one", "x/two", "y/two"):
        (make_run(tmp_path / name) / "config.json").write_text("{")
    assert [task.title for task in by_task(find([tmp_path]))] == [
        f"unknown network on unknown data of {name}" for name in ("one", "x/two", "y/two")
    ]


def test_a_cell_takes_the_seeds_of_the_same_experiment_in_any_table_once(tmp_path):
    for table, seed in (("table2", 0), ("table4", 0), ("table4", 1)):
        make_run(tmp_path / f"{table}_{seed}", cell=(table, "resnet56", "cifar10", "fdg", 0.5, 2), seed=seed)
    runs = find([tmp_path])
    for table in ("table2", "table4"):
        key = Key(table, "resnet56", "cifar10", "fdg", 0.5, 2)
        assert [run.workdir.name for run in of_cell(runs, key, "full")] == ["table2_0", "table4_1"]
    assert of_cell(runs, key, "smoke") == []
    assert of_cell(runs, key._replace(beta=1.0), "full") == []


def test_the_papers_figures_are_whole():
    """Against cells read off the texts."""
    everything = published.cells()
    assert len(set(everything)) == len(everything) == sum(len(published.cells(table)) for table in published.TABLES)
    errors = {(*cell.key, cell.reported_by): cell.error for cell in everything if cell.source == "preprint"}
    assert errors["table2", "wrn28_10", "cifar10", "fdg", 0.7, 2, "own"] == 3.85
    assert errors["table2", "resnet20", "cifar10", "bp", None, 1, "rerun"] == 7.78
    assert errors["table2", "resnet20", "cifar10", "bp", None, 1, "cited"] == 8.75
    assert errors["table3", "wrn28_10", "cifar100", "fdg", 0.6, 2, "own"] == 19.08
    assert errors["table4", "resnet56", "cifar10", "fdg", 0.3, 4, "own"] == 6.14
    assert [cell.error for cell in published.cells("figure4a")] == [7.78, 7.92, None, None, None, 7.23]
    percents = [cell.percent_of_bp for cell in everything if cell.percent_of_bp]
    assert percents == [100.0, 60.64, 52.03, 44.32]
    seconds = {(c.network, c.method, c.num_stages): c.seconds_per_epoch for c in everything if c.seconds_per_epoch}
    assert seconds["wrn28_10", "fdg", 4] == 74.1
    with pytest.raises(ValueError, match="unknown table 'table5'; did you mean"):
        published.cells("table5")


@pytest.mark.parametrize("table", published.TABLES)
def test_what_is_to_be_run_can_be(table):
    keys = published.to_run(table)
    assert len(set(keys)) == len(keys)
    assert {key.method for key in keys} <= set(PRESETS)
    assert all((key.beta is not None) == (key.method == "fdg") for key in keys)
    assert all((key.num_stages == 1) == (key.method == "bp") for key in keys)
    assert json.loads(json.dumps(keys))  # as a cell.json will hold them
