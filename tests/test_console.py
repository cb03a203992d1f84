"""What a run says: to people on a terminal and off it, to machines, and quietly."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from fdg_jax.compare import compare
from fdg_jax.config import default_config, resolve_comparison
from fdg_jax.console import JsonLines, RunDisplay, describe_metrics, insist, say, telling, voices, warn

VALUES = {"train/loss": 0.5, "train/accuracy": 0.875, "train/images_per_s": 12345.6}
TESTED = {**VALUES, "test/loss": 0.25, "test/accuracy": 0.9}


def test_metrics_in_words():
    assert describe_metrics(TESTED) == (
        "loss 0.5000  accuracy 87.50 %  12,346 images/s  test loss 0.2500  test accuracy 90.00 %"
    )


def shown(width=100, quiet=False, lines=None, **terminal):
    """Ten steps of two epochs, a log every fifth, an evaluation at the end; a step takes 3 s, the first one 100 s."""
    text, now = io.StringIO(), [0.0]
    console = Console(file=text, width=width, quiet=quiet, color_system=None, **terminal)
    now[0] = 100.0
    with RunDisplay(10, 2, console, lines=lines or JsonLines(), balance=(1, 0.5), clock=lambda: now[0]) as display:
        for step in range(1, 11):
            display.advance(1)
            if step % 5 == 0:
                display.report(step, step / 5, now[0], TESTED if step == 10 else VALUES)
                display._progress.refresh()
            now[0] += 3
    return text.getvalue()


def test_plain_lines_where_nobody_watches():
    assert shown().splitlines() == [
        "epoch   1.00/2  step  5  loss 0.5000  accuracy 87.50 %  12,346 images/s  0:00:15 left",
        "epoch   2.00/2  step 10  loss 0.5000  accuracy 87.50 %  12,346 images/s  0:00:00 left"
        "  test loss 0.2500  test accuracy 90.00 %",
    ]


def test_a_bar_on_a_terminal():
    text = shown(width=160, force_terminal=True)
    assert "compiling" in text
    assert "epoch   1.00/2" not in text  # the bar shows it
    assert "epoch   2.00/2  step 10" in text  # an evaluation stays
    bar = text.split("\r")[-1]
    for part in (
        "loss 0.5000",
        "accuracy 87.50 %",
        "12,346 images/s",
        "test accuracy 90.00 %",
        "10/10",
        "stages 100/50 %",
    ):
        assert part in bar, part
    assert re.search(r"\d:\d\d:\d\d left", bar)


@pytest.mark.parametrize("num_stages", [2, 4, 16])
@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_all_stays_visible_on_terminals_of_all_widths(width, num_stages):
    """Also after a test, and of a long run; the first line has the loss, the accuracy and the time left."""
    text, balance = io.StringIO(), [0.75, *[1.0] * (num_stages - 1)]
    console = Console(file=text, width=width, color_system=None, force_terminal=True)
    with RunDisplay(117300, 300, console, balance=balance) as display:
        display.report(58000, 148.0, 1.0, TESTED)
        display.advance(58000)
    frame = text.getvalue()[text.getvalue().rindex("loss 0.5000  accuracy 87.50 %") :]
    first, *more = (line for line in re.sub(r"\x1b\[\S*[a-zA-Z]|\r", "", frame).splitlines() if line.strip())
    assert "58000/117300" in first
    assert first.rstrip().endswith("left")
    for part in ("12,346 images/s", "test accuracy 90.00 %"):
        assert part in frame
    assert f"stages {'/'.join(f'{100 * share:.0f}' for share in balance)} %" in frame or "stages 75-100 %" in frame
    assert ("stages 75-100 %" in frame) == (num_stages == 16 and width <= 120)
    assert all(len(line.rstrip()) <= width for line in (first, *more))
    assert len(more) <= (1 if width >= 80 and num_stages < 16 else 2 if width >= 80 else 3)
    assert "…" not in frame


def test_what_takes_a_while_is_told_in_lines_where_nobody_watches():
    text = io.StringIO()
    with telling(Console(file=text, width=20), "planning every method") as tell:
        tell("K = 1 of 8")
    assert text.getvalue() == "planning every method\nplanning every method: K = 1 of 8\n"


def test_and_in_one_place_on_a_terminal():
    text = io.StringIO()
    with telling(Console(file=text, width=60, force_terminal=True, color_system=None), "planning") as tell:
        tell("K = 1 of 8")
    assert "planning" in text.getvalue()
    assert text.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # nothing is left, and the cursor is back


def test_the_time_left_forgets_the_first_log():
    """What compiles in it does not lengthen a run: 2 s a step after the first log, however long that took."""
    now, lines = [0.0], io.StringIO()
    with RunDisplay(100, 1, Console(quiet=True), lines=JsonLines(lines), clock=lambda: now[0]) as display:
        for step, seconds in ((10, 1000.0), (20, 20.0), (30, 20.0)):
            display.advance(10)
            now[0] += seconds
            display.report(step, step / 100, now[0], VALUES)
    left = [json.loads(line)["time_left_s"] for line in lines.getvalue().splitlines()]
    assert left == [None, 80 * 2, 70 * 2]


def frames_of(progress):
    """What a bar shows now, without styles."""
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(progress.get_renderable())
    return console.file.getvalue()


def test_the_bar_and_the_line_agree_on_the_time_left():
    """Also after a first batch of 1000 s, and over a day."""
    now, text, lines = [0.0], io.StringIO(), io.StringIO()
    console = Console(file=text, width=160, color_system=None, force_terminal=True)
    with RunDisplay(100, 1, console, lines=JsonLines(lines), clock=lambda: now[0]) as display:
        assert "-:--:-- left" in frames_of(display._progress)
        for step, seconds, left in ((10, 1000.0, None), (20, 20.0, "0:02:40"), (30, 30000.0, "29:11:10")):
            display.advance(10)
            now[0] += seconds
            display.report(step, step / 100, now[0], TESTED)
            shown = frames_of(display._progress)
            assert f" {left or '-:--:--'} left" in shown
            assert shown.count("left") == 1
            line, below = text.getvalue().split(f"step  {step}")[1].split("\n", 1)
            assert (f"  {left} left" in line) if left else ("left" not in line)
            assert f" {left or '-:--:--'} left" in below.splitlines()[0]


@pytest.mark.parametrize("width", [60, 160])
@pytest.mark.parametrize("balance", [(), (1, 0.5), (0.75, *[1.0] * 15)])
def test_before_the_first_log_the_bar_says_what_goes_on_and_the_balance(width, balance):
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=True)
    with RunDisplay(100, 1, console, balance=balance) as display:
        for what in ("compiling", "compiling", "training", "training"):
            shown = frames_of(display._progress)
            assert [word in shown for word in ("compiling", "training")] == [what == "compiling", what == "training"]
            assert ("stages " in shown) == bool(balance)
            assert all(len(line) <= display._room for line in display._progress.tasks[0].fields["latest"].splitlines())
            display.advance(1)
        display.report(4, 0.04, 1.0, VALUES)
        display.advance(1)
        assert "loss 0.5000  accuracy 87.50 %" in frames_of(display._progress)


def test_a_run_that_goes_on_knows_its_pace_by_its_own_batches():
    now, lines = [0.0], io.StringIO()
    with RunDisplay(100, 1, Console(quiet=True), 50, JsonLines(lines), clock=lambda: now[0]) as display:
        for step in (60, 70):
            display.advance(5)
            now[0] += 5
            display.advance(5)
            now[0] += 5
            display.report(step, step / 100, now[0], VALUES)
    assert [json.loads(line)["time_left_s"] for line in lines.getvalue().splitlines()] == [40 * 10 / 5, 30]


def test_a_quiet_display_shows_nothing():
    assert shown(quiet=True) == shown(quiet=True, force_terminal=True) == ""


def test_quiet_leaves_warnings_and_the_last_word():
    text = io.StringIO()
    console = Console(file=text, quiet=True, width=20)
    say(console, "a plan")
    warn(console, "the disk is full [red]and this line is longer than the console")
    insist(console, "test accuracy 99 %")
    say(console, "more")
    assert text.getvalue().splitlines() == [
        "the disk is full [red]and this line is longer than the console",
        "test accuracy 99 %",
    ]


def test_json_has_a_line_a_log_and_an_evaluation():
    lines = io.StringIO()
    shown(lines=JsonLines(lines).within({"run": "bp", "seed": 3}))
    told = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [line["event"] for line in told] == ["log", "log", "evaluation"]
    assert told[0] == {
        **{"event": "log", "run": "bp", "seed": 3, "step": 5, "epoch": 1.0, "time_s": 112.0, "time_left_s": 15.0},
        **VALUES,
    }
    assert told[2] == {
        **{"event": "evaluation", "run": "bp", "seed": 3, "step": 10, "epoch": 2.0, "time_s": 127.0},
        **{"test/loss": 0.25, "test/accuracy": 0.9},
    }


def test_json_is_strict_and_never_wrapped():
    file = io.StringIO()
    values = {"loss": float("nan"), "cuts": (1, 2), "inf": [float("inf"), 1.5], "text": "[red]\n" + "x" * 500}
    JsonLines(file).write("log", values)
    (line,) = file.getvalue().splitlines()
    told = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert told == {"event": "log", "loss": None, "cuts": [1, 2], "inf": [None, 1.5], "text": values["text"]}


def test_with_json_nothing_else_reaches_stdout(capsys):
    console, lines = voices("json", quiet=False)
    with lines.alone():
        print("what a library prints")
        say(console, "what is for people")
        lines.write("start", {"step": 0})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"event": "start", "step": 0}
    assert err == "what a library prints\nwhat is for people\n"


def test_without_json_no_line_is_written(capsys):
    console, lines = voices("text", quiet=True)
    with lines.alone():
        lines.write("start", {"step": 0})
        say(console, "a plan")
        insist(console, "the end")
    assert capsys.readouterr() == ("the end\n", "")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A quiet comparison of one run: what it printed, and its JSON lines."""
    config = default_config()
    config.update({"methods": "fdg", "seeds": (0,), "num_stages": 2, "epochs": 1, "batch_size": 512})
    config.model.update({"name": "mlp", "depth": 2, "width": 8})
    text, lines = io.StringIO(), io.StringIO()
    console = Console(file=text, quiet=True, width=200)
    assert compare(resolve_comparison(config), tmp_path_factory.mktemp("compared"), console, JsonLines(lines)) is None
    return text.getvalue(), [json.loads(line) for line in lines.getvalue().splitlines()]


def test_a_quiet_comparison_prints_its_table_alone(compared):
    head, row = compared[0].splitlines()
    assert head.startswith("method  seeds  test error")
    assert row.startswith("fdg ")


def test_a_comparison_says_which_run_a_line_is_of(compared):
    events = [line["event"] for line in compared[1]]
    assert events[:3] == ["start", "log", "evaluation"]
    assert events[-1] == "result"
    assert "checkpoint" in events
    assert all((line["run"], line["seed"]) == ("fdg", 0) for line in compared[1])
    start, result = compared[1][0], compared[1][-1]
    assert (start["num_steps"], start["delay_ticks"], start["cuts"]) == (2, [2, 0], [2])
    assert result["test_error"] == 1 - compared[1][2]["test/accuracy"]


def test_every_key_is_documented_and_every_documented_key_is_there(compared):
    """But for what a run says on occasion; `end` is main's own, see test_main.py."""
    rows, told = documented(), {line["event"]: set(line) - {"event", "run", "seed"} for line in compared[1]}
    assert set(rows) == {*told, "end", "probe", "trace"}
    for event, keys in told.items():
        assert keys == rows[event] - {"train/skipped"}, event
    named = set(re.findall(r"`([\w/]+)`", LOGS[LOGS.index("| key |") :]))
    assert {key for keys in rows.values() for key in keys if key.startswith(("train/", "test/", "time"))} <= named


LOGS = (Path(__file__).parents[1] / "docs" / "logs.md").read_text()


def documented():
    """The keys of every event, as docs/logs.md has them."""
    table = LOGS[LOGS.index("| event |") : LOGS.index("| key |")]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", table, re.MULTILINE)
    return {event: set(re.findall(r"`([\w/]+)`", keys)) for event, keys in rows}
