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

from fdg_jax import report
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
    assert page.rows[place + 1] == ["python -m fdg_jax.main --config.seed=0"]
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
    assert times[1] == ["FDG", "2", "50.0", "60.64", "1.00", "29.6", "2 x H100"]
    assert ["data parallel", "4", DASH, DASH, "not a method here", "84.0", ""] in times


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
    assert "The runs are of 2 networks or sets of images: each has axes of its own." in page.text
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


def made(folder, method, beta, num_epochs, num_stages=2):
    stages = num_stages if method == "fdg" else 1
    name = folder / f"{method}_{beta}_{num_epochs}_{stages}"
    return make_run(name, tuple(20.0 - 5 * n for n in range(num_epochs)), method, beta, stages)


def test_bars_and_curves_hold_runs_that_differ_in_nothing_else(tmp_path):
    for stages in (2, 3):
        for beta, epochs in ((0.5, 2), (0.5, 3), (1.0, 2), (1.0, 3)):
            made(tmp_path, "fdg", beta, epochs, stages)
    made(tmp_path, "bp", 1.0, 2)
    made(tmp_path, "bp", 1.0, 4)
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    bars = [image["alt"] for image in page.images if "values of beta" in image["alt"] and "K = 2" in image["alt"]]
    assert [alt.count("beta 0.5") for alt in bars] == [1, 1]
    assert all(("epochs 2" in alt) == alt.endswith("BP 15.00 %.") for alt in bars)
    assert all(("epochs 3" in alt) == alt.endswith("BP not run.") for alt in bars)
    curves = [image["alt"] for image in page.images if "number of stages" in image["alt"]]
    assert len(curves) == 4
    assert all(("epochs 2" in alt) == ("BP, epochs 2 ends" in alt) for alt in curves)
    assert not any("epochs 2" in alt and "epochs 3" in alt for alt in curves)
    assert "differ in more than beta or K have figures of their own" in page.text


def test_warm_up_and_cuts_belong_to_the_number_of_stages(tmp_path):
    """The papers' recipe warms up where K is more than 2."""
    for stages, warmup in ((1, 0), (2, 0), (3, 3)):
        folder = made(tmp_path, "fdg" if stages > 1 else "bp", 1.0, 2, stages)
        settings = json.loads((folder / "config.json").read_text())
        settings |= {"optim": {"warmup_epochs": warmup}, "cuts": list(range(1, stages))}
        (folder / "config.json").write_text(json.dumps(settings))
    page = Page(report.write(find([tmp_path]), tmp_path / "report").read_text())
    (stages,) = [image["alt"] for image in page.images if "number of stages" in image["alt"]]
    assert "K = 1 1 s, K = 2 1 s, K = 3 1 s" in stages
    assert "figures of their own" not in page.text


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
    assert page.rows[time + 1] == ["as typed"]
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


@pytest.mark.parametrize("words", [[], ["a", "--uot=b"]])
def test_flags_that_are_wrong_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(words)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fdg_jax: ")
    assert line.endswith("; try python -m fdg_jax.report runs")


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
