"""The report of runs written by hand: what its tables say, that it needs nothing beside it, what bad input does."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_runs import make_run
from PIL import Image

from fdg_jax import report, reproduce
from fdg_jax.published import cells
from fdg_jax.results import find

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DASH = "\N{EN DASH}"  # where there is no number
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Text of table rows, images, and every attribute; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.images, self.attributes, self.open, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def make_tables(folder):
    """Table 4 in part, three seeds a cell, and two bars of Figure 4a."""
    r56, r20 = ("resnet56", "cifar10"), ("resnet20", "cifar10")
    for seed, error in enumerate((6.5, 6.0, 6.25)):
        bp = ("table4", *r56, "bp", None, 1)
        make_run(folder / f"bp_{seed}", (20, error), "bp", 1.0, 1, seed, cell=bp, depth=56, images_per_s=500)
        for stages in (2, 3):
            cell = ("table4", *r56, "fdg", 1.0, stages)
            make_run(
                folder / f"fdg_{stages}_{seed}", (25, error + stages), "fdg", 1.0, stages, seed, None, cell, depth=56
            )
    make_run(folder / "late", (25,), "fdg", 1.0, 4, 0, 2, ("table4", *r56, "fdg", 1.0, 4), depth=56)
    make_run(folder / "bar_bp", (20, 8.0), "bp", 1.0, 1, cell=("figure4a", *r20, "bp", None, 1))
    for beta, error in ((1.0, 8.25), (0.4, 7.5)):
        make_run(folder / f"bar_{beta}", (20, error), "fdg", beta, 2, cell=("figure4a", *r20, "fdg", beta, 2))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of the tables, once."""
    folder = make_tables(tmp_path_factory.mktemp("runs"))
    path = report.write(find([folder]), folder / "report")
    return path, Page(path.read_text())


def row(page, *beginning):
    (found,) = [row for row in page.rows if row[: len(beginning)] == list(beginning) and len(row) == 9]
    return found


def test_a_cell_has_median_spread_seeds_paper_and_machine(written):
    page = written[1]
    place = page.rows.index(row(page, "FDG", "1.0", "3"))
    assert page.rows[place] == ["FDG", "1.0", "3", "9.25", "9.00 to 9.50", "3", "6.40, 6.20 r", "14", "3 x H100"]
    again = "--scale=full --only=resnet56_fdg_beta1_K3 --seeds=0,1,2 --workdir=runs/again_full"
    assert page.rows[place + 1] == [f"python -m fdg_jax.reproduce table4 {again}"]
    assert row(page, "BP", DASH, "1", "6.25")[4:] == ["6.00 to 6.50", "3", "6.19*", "14", "1 x H100"]


def test_a_cell_that_was_not_run_or_not_finished_says_so(written):
    page = written[1]
    assert row(page, "FDG", "0.3", "4") == ["FDG", "0.3", "4", "not run", "", "", "6.14", "", ""]
    assert row(page, "FDG", "1.0", "4")[3:7] == ["not finished", "1 epoch", "0 of 1", "6.83"]
    assert row(page, "FDG", "0.6", "2")[3] == "not run"
    assert row(page, "FDG", "0.4", "2")[6] == "not printed"


def test_every_published_error_of_a_table_is_on_the_page(written):
    shown = " ".join(cell for row in written[1].rows if len(row) == 9 for cell in row[6:7])
    for cell in cells("table4") + cells("figure4a"):
        assert cell.error is None or f"{cell.error:.2f}" in shown


def test_times_are_shares_of_bps(written):
    """At 500 and 1000 images a second, of which an epoch has 1000."""
    page = written[1]
    times = [row for row in page.rows if len(row) == 7 and row[0] in ("BP", "FDG", "data parallel")]
    assert times[0] == ["BP", "1", "100.0", "100.00", "2.00", "30.2", "1 x H100"]
    assert times[2] == ["FDG", "2", "50.0", "60.64", "1.00", "29.6", "2 x H100"]
    assert ["data parallel", "4", DASH, DASH, "not a method here", "84.0", ""] in times


def test_cells_that_ran_the_same_at_a_smaller_scale_have_a_time_each(tmp_path):
    """All of one network, which at scale smoke stands for three of the papers'."""
    for network, table in (("resnet20", "table2"), ("resnet56", "table4"), ("wrn28_10", "table4")):
        for method, beta, stages, rate in (("bp", None, 1, 500.0), ("fdg", 1.0, 2, 1000.0)):
            cell = (table, network, "cifar10", method, beta, stages)
            folder = tmp_path / table / f"{network}_{method}"
            make_run(folder, method=method, num_stages=stages, images_per_s=rate, cell=cell, scale="smoke")
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    ours = [(*row[:3], row[4]) for row in page.rows if len(row) == 7 and row[2] not in ("Ours, % of BP", DASH)]
    assert ours == 2 * [("BP", "1", "100.0", "2.00"), ("FDG", "2", "50.0", "1.00")]
    assert "Some ran the same network on the same images, in place of different ones of the papers." in page.text


def test_a_cells_command_makes_its_seeds_and_nothing_else(tmp_path, monkeypatch, capsys):
    """As `reproduce` reads it; each run's own stands with the run."""
    keys = [("table2", "resnet20", "cifar10", "fdg", 0.2, 2), ("table2", "resnet20", "cifar10", "bp", None, 1)]
    keys += [("table4", "resnet56", "cifar10", "fdg", 0.5, 2), ("table4", "wrn28_10", "cifar10", "fdg", None, 2)]
    for number, key in enumerate(keys):
        for seed in (2, 0) if number < 3 else (0,):
            make_run(tmp_path / f"{number}_{seed}", beta=key[4] or 1.0, seed=seed, cell=key, scale="smoke")
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    monkeypatch.chdir(tmp_path)
    made = []
    for command in [row[0] for row in page.rows if row[0].startswith("python -m fdg_jax.reproduce")]:
        assert reproduce.main([*command.split()[3:], "--dry_run"]) == 0
        made.append(re.findall(r"--workdir=runs/again_smoke/(\S+)", capsys.readouterr().out))
    bp, fdg, fdg56 = (
        [f"{folder}/seed{seed}" for seed in (0, 2)]
        for folder in ("table2/resnet20_bp_K1", "table2/resnet20_fdg_beta0.2_K2", "table4/resnet56_fdg_beta0.5_K2")
    )
    assert made == [bp, fdg, fdg56, fdg56, fdg56, ["table4/wrn28_10_fdg_K2_time/seed0"]]
    own = [row[0] for row in page.rows if "fdg_jax.main" in row[0]]
    assert [re.findall(r"main --config.seed=(\d)", row) for row in own] == [*[["0"], ["2"]] * 3, ["0"]]


def test_images_of_a_path_are_named_in_the_command(tmp_path):
    data = {"source": "folder", "path": "/some where/cifar"}
    make_run(tmp_path / "a", data=data, cell=("table2", "resnet20", "cifar10", "fdg", 1.0, 2), scale="short")
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    assert any(row[0].endswith("--workdir=runs/again_short '--data=/some where/cifar'") for row in page.rows)


def test_a_cell_that_nobody_can_make_keeps_its_runs_command(tmp_path):
    folder = make_run(tmp_path / "a", cell=("table2", "resnet20", "cifar10", "fdg", 1.0, 2), scale="tiny")
    page = Page(report.write(find([folder]), tmp_path / "report").read_text())
    assert ["python -m fdg_jax.main --config.seed=0"] in page.rows


def test_rows_go_by_stages_then_bp_first_then_beta_falling(written):
    rows = [tuple(row[:3]) for row in written[1].rows if len(row) == 9 and row[2].isdecimal()]
    assert rows[0] == ("BP", DASH, "1")
    four = [("DDG", DASH), ("DGL", DASH), ("Features Replay", DASH)]
    betas = {"2": ("1.0", "0.5"), "3": ("1.0", "0.5", "0.2"), "4": ("1.0", "0.5", "0.3")}
    table4 = [(*row, stages) for stages in "234" for row in [*four, *(("FDG", beta) for beta in betas[stages])]]
    assert rows[1 : 1 + len(table4)] == table4


def test_which_weights_answered_is_read_from_the_runs(tmp_path):
    for method, stages, policy in (("bp", 1, "stash"), ("fdg", 2, "current"), ("dgl", 2, "stash")):
        cell = ("table2", "resnet56", "cifar10", method, 1.0 if method == "fdg" else None, stages)
        make_run(tmp_path / method, method=method, num_stages=stages, cell=cell, policy=policy)
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    assert [row[0] for row in page.rows if len(row) == 9 and row[3] == "10.00"] == ["BP", "DGL", "FDG, policy current"]
    assert "answered with activations of its forward and weights of today (policy current); in the code" in page.text
    assert "policy stash" not in page.text
    made = page.rows[page.rows.index(next(row for row in page.rows if row[0] == "FDG, policy current")) + 1]
    assert made == ["python -m fdg_jax.main --config.seed=0"]  # `reproduce` would take the usual policy


def test_the_weights_of_the_forward_are_the_usual_ones(written):
    assert "is answered with the weights that its forward saw (policy stash); in the code that" in written[1].text
    assert not any("policy" in cell for row in written[1].rows for cell in row)


def test_times_of_other_devices_are_not_compared(tmp_path):
    for method, beta, stages, kind in (("bp", None, 1, "H100"), ("fdg", 1.0, 2, "A100")):
        cell = ("table4", "resnet56", "cifar10", method, beta, stages)
        make_run(tmp_path / method, method=method, num_stages=stages, cell=cell, devices={kind: stages})
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    assert ["FDG", "2", DASH, "60.64", "1.00", "29.6", "2 x A100"] in page.rows


def test_every_image_decodes_has_words_and_lies_beside_the_page(written):
    path, page = written
    assert len(page.images) >= 4  # curves of two networks, bars, stages
    beside = {file.read_bytes() for file in path.parent.glob("*.png")}
    for image in page.images:
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert data in beside
        with Image.open(io.BytesIO(data)) as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
            assert picture.width / picture.height == pytest.approx(int(image["width"]) / int(image["height"]), rel=0.01)
        assert len(image["alt"]) > 40
    (bars,) = [image["alt"] for image in page.images if "values of beta, ResNet-20" in image["alt"]]
    assert "beta 0.4 7.50 %" in bars
    assert "beta 0.6 not run" in bars
    assert bars.endswith("BP 8.00 %.")
    (stages,) = [image["alt"] for image in page.images if "number of stages" in image["alt"]]
    assert "K = 1 2 s, K = 2 1 s, K = 3 1 s" in stages


def test_the_page_refers_to_nothing_outside(written):
    path, page = written
    loading = {"src", "href", "action", "data", "srcset", "poster", "background"}
    for tag, name, value in page.attributes:
        if name in loading:
            assert value.startswith("#" if tag == "a" else "data:image/png;base64,")
        assert not name.startswith("on")
    text = re.sub(r"base64,[\w+/=]+", "", path.read_text())
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<iframe", text)


def test_different_networks_are_separated_and_that_is_said(written):
    page = written[1]
    assert "The runs are of 2 tasks, a network on a set of images each: every task has axes of its own." in page.text
    assert "in place of different ones" not in page.text
    curves = [image["alt"] for image in page.images if image["alt"].startswith("Test error and training loss")]
    assert len(curves) == 2
    assert not any("ResNet-20" in alt and "ResNet-56" in alt for alt in curves)


def test_a_smaller_scale_is_said_loudly(tmp_path):
    make_run(tmp_path / "a", cell=("table2", "wrn28_10", "cifar10", "fdg", 0.7, 2), scale="smoke")
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    assert "Scale smoke: this is not the papers' task" in page.text
    assert "1 run of 2 epochs (resnet_cifar, depth 20, width 16 on cifar10)" in page.text
    assert "SCALE SMOKE: OURS ARE NOT OF THE PAPERS' TASK" in page.text


def test_names_cannot_become_part_of_the_page(tmp_path):
    evil = '<script>alert("1")</script>$\\frac{'
    folder = make_run(tmp_path / evil.replace("/", "_"), method=evil)
    (folder / "run.json").write_text('[{"command": "<img src=x onerror=alert(1)>", "devices": {"<b>": 1}}]')
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    assert {tag for tag, *_ in page.attributes} <= {
        "html",
        "meta",
        "a",
        "section",
        "h2",
        "nav",
        "div",
        "p",
        "td",
        "th",
        "tr",
        "img",
        "figure",
    }
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert evil in page.text
    assert "<img src=x onerror=alert(1)>" in page.text


def test_staleness_and_pictures_of_the_runs_own_are_inside(tmp_path):
    quantities = ("delay", "distance", "gradient_norm", "cosine", "factor")
    tags = {f"staleness/stage{k}/{name}": 0.5 for k in range(2) for name in quantities}
    folder = make_run(tmp_path / "a", more=tags)
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    assert any("a line a stage" in image["alt"] for image in page.images)
    Image.new("RGB", (20, 10)).save(folder / "trace.png")
    (folder / "staleness.png").write_text("no picture")
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    (own,) = [image for image in page.images if "Drawn by the run itself" in image["alt"]]
    data = base64.b64decode(own["src"].partition(",")[2])
    assert data == (folder / "trace.png").read_bytes()


def test_runs_that_measured_nothing_are_listed(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "metrics.jsonl").unlink()
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    assert "Nothing was measured yet." in page.text
    assert "metrics.jsonl is empty or not there: nothing was measured" in page.text


def test_the_command_writes_where_the_runs_are_and_tells_what_is_missing(tmp_path, capsys):
    folder = make_run(tmp_path / "runs" / "a", (20.0, 10.0))
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 15, "ep')
    assert report.main([str(folder)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"{folder}: 1 of 3 lines of metrics.jsonl are cut short or damaged, and left out",
        f"{tmp_path / 'runs' / 'report' / 'index.html'}: 1 run",
    ]
    assert report.main([str(tmp_path / "runs")]) == 0  # its own report is no run
    assert capsys.readouterr().out.splitlines() == told


def test_the_command_runs_without_a_display(tmp_path):
    make_run(tmp_path / "a")
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    command = (sys.executable, "-W", "error", "-m", "fdg_jax.report", str(tmp_path), "--out", str(tmp_path / "page"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "page" / "index.html").stat().st_size > 10_000


def test_the_papers_cells_are_not_separated(written):
    assert "figures of their own" not in written[1].text


def test_pictures_of_an_earlier_report_are_removed_and_no_others(tmp_path):
    make_run(tmp_path / "a")
    out = tmp_path / "report"
    old = ["curves_7.png", "betas_1_K2.png", "betas_1_K2_1.png", "stages_0_beta0.5.png", "staleness_3.png"]
    others = ["curves_mine.png", "trace.png", "curves_7.png.txt", "my_curves_7.png"]
    (out / "below").mkdir(parents=True)
    for name in (*old, *others, "below/curves_7.png"):
        (out / name).touch()
    report.write(find([tmp_path / "a"]), out)
    assert {path.name for path in out.iterdir()} == {*others, "below", "curves_0.png", "index.html"}
    assert (out / "below" / "curves_7.png").exists()


def test_a_time_of_one_log_is_not_measured(tmp_path):
    """It is that of compilation."""
    for method, beta, stages in (("bp", None, 1), ("fdg", 1.0, 2), ("fdg", 1.0, 3)):
        cell = ("table4", "resnet56", "cifar10", method, beta, stages)
        make_run(tmp_path / f"{method}{stages}", (9.0,), method, 1.0, stages, cell=cell)
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    assert ["FDG", "2", "not measured", "60.64", "not measured", "29.6", "2 x H100"] in page.rows
    assert any(image["alt"].endswith("Seconds an epoch: not measured.") for image in page.images)


def test_runs_that_answer_with_other_weights_have_a_row_each(tmp_path):
    for policy, error in (("stash", 6.0), ("current", 7.0)):
        cell = ("table4", "resnet56", "cifar10", "fdg", 0.5, 2)
        make_run(tmp_path / policy, (20, error), beta=0.5, cell=cell, policy=policy)
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    rows = [row[:6] for row in page.rows if len(row) == 9 and row[1:3] == ["0.5", "2"]]
    assert ["FDG", "0.5", "2", "6.00", "6.00 to 6.00", "1"] in rows
    assert ["FDG, policy current", "0.5", "2", "7.00", "7.00 to 7.00", "1"] in rows


def test_of_runs_for_their_times_alone_there_are_no_curves(tmp_path):
    folder = make_run(tmp_path / "a", method="bp", cell=("table4", "wrn28_10", "cifar10", "bp", None, 1), scale="smoke")
    (folder / "cell.json").write_text((folder / "cell.json").read_text().replace("{", '{"timed": true, ', 1))
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    assert "1 run of 2 epochs (resnet_cifar, depth 20, width 16 on cifar10) for the time alone" in page.text
    assert "stand in for cells" not in page.text
    assert "Learning curves" not in page.text
    assert "Runs by method" not in page.text
    assert "for its time" in [cell for row in page.rows for cell in row]


def test_a_run_for_its_time_alone_fills_no_cell_of_errors_and_no_curve(tmp_path):
    for table in ("table2", "table4"):
        make_run(tmp_path / table, method="bp", num_stages=1, cell=(table, "wrn28_10", "cifar10", "bp", None, 1))
    cell = tmp_path / "table4" / "cell.json"
    cell.write_text(json.dumps(json.loads(cell.read_text()) | {"timed": True, "command": "as typed"}))
    make_run(tmp_path / "cell2", cell=("table2", "wrn28_10", "cifar10", "fdg", 0.7, 2))
    (tmp_path / "table2" / "metrics.jsonl").unlink()
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    (bp,) = [row for row in page.rows if len(row) == 9 and row[0] == "BP" and row[3] != "not run"]
    assert bp[3] == "not finished"
    time = page.rows.index(["BP", "1", "100.0", DASH, "1.00", "219.1", "1 x H100"])
    again = "--scale=full --only=wrn28_10_bp_K1 --seeds=0 --workdir=runs/again_full"
    assert page.rows[time + 1] == [f"python -m fdg_jax.reproduce table4 {again}"]
    (curves,) = [image["alt"] for image in page.images if image["alt"].startswith("Test error and training loss")]
    assert "FDG" in curves
    assert "BP" not in curves


def test_inside_a_run_the_report_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(make_run(tmp_path / "runs" / "a"))
    assert report.default_out(["."]) == tmp_path / "runs" / "report"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["file"], "file is not a folder; name folders of runs, or ones above them like runs/"),
        (["nowhere"], "there is no folder nowhere; name folders of runs, or ones above them like runs/"),
        (["empty"], "there is no run in empty: a run has a config.json or a metrics.jsonl; try runs/"),
        (["a", "--out", "file/x"], "cannot write to --out=file/x: Not a directory; choose another folder"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("a"))
    Path("empty").mkdir()
    Path("file").touch()
    assert report.main(words) == 2
    assert capsys.readouterr().err == f"fdg_jax: {message}\n"


def test_a_flag_that_is_wrong_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["a", "--uot=b"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fdg_jax: unknown flag ")
    assert "out'?" in line


def test_without_a_folder_it_takes_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/a"))
    assert report.main([]) == 0
    assert capsys.readouterr().out == "runs/report/index.html: 1 run\n"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
def test_chromium_shows_the_page(written, tmp_path):
    path = written[0]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "page.png"
    size = ["--hide-scrollbars", "--window-size=1250,1600"]
    subprocess.run(
        [*command, *size, f"--screenshot={shot}", path.as_uri()], check=True, capture_output=True, timeout=120
    )
    with Image.open(shot) as picture:
        assert picture.size == (1250, 1600)
        assert np.asarray(picture.convert("L")).std() > 5
    dumped = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    page = Page(dumped.stdout)
    assert ["FDG", "1.0", "3", "9.25", "9.00 to 9.50", "3", "6.40, 6.20 r", "14", "3 x H100"] in page.rows
    assert len(page.images) == len(written[1].images)
