import io

from rich.console import Console

from fdg_jax.console import RunDisplay, describe_metrics

VALUES = {"train/loss": 0.5, "train/accuracy": 0.875, "train/images_per_s": 12345.6}
TESTED = {**VALUES, "test/loss": 0.25, "test/accuracy": 0.9}


def test_metrics_in_words():
    assert describe_metrics(TESTED) == (
        "loss 0.5000  accuracy 87.50 %  12,346 images/s  test loss 0.2500  test accuracy 90.00 %"
    )


def shown(**kwargs):
    text = io.StringIO()
    console = Console(file=text, width=100, **kwargs)
    with RunDisplay(10, 2, console) as display:
        for step in range(1, 11):
            display.advance(1)
            if step % 5 == 0:
                display.report(step, step / 5, TESTED if step == 10 else VALUES)
    return text.getvalue()


def test_plain_lines_where_nobody_watches():
    assert shown().splitlines() == [
        "epoch   1.00/2  step  5  loss 0.5000  accuracy 87.50 %  12,346 images/s",
        "epoch   2.00/2  step 10  " + describe_metrics(TESTED),
    ]


def test_a_bar_on_a_terminal():
    text = shown(force_terminal=True)
    assert "10/10" in text
    assert "compiling" in text
    assert "epoch   1.00/2" not in text  # the bar shows it
    assert "epoch   2.00/2  step 10" in text  # an evaluation stays
