"""What a run shows while it works: a live bar on a terminal, a plain line a log elsewhere."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunDisplay:
    """Use as a context; `advance` after batches, `report` once a log.

    Args:
        num_steps: batches of the whole run.
        num_epochs: of the whole run.
        console: where to write; `rich` decides whether it is a terminal.
        step: batches fed before, of a run that goes on.
    """

    def __init__(self, num_steps: int, num_epochs: int, console: Console, step: int = 0):
        self.console, self._num_epochs = console, num_epochs
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[latest]}"))
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=num_steps, completed=step, latest="compiling")
        self._width = len(str(num_steps))

    def __enter__(self) -> "RunDisplay":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, num: int) -> None:
        self._progress.advance(self._task, num)

    def report(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Shows the latest numbers; where an epoch was evaluated its line stays."""
        text = describe_metrics(values)
        trained = {tag: value for tag, value in values.items() if tag.startswith("train/")}
        self._progress.update(self._task, latest=describe_metrics(trained))
        if not self.console.is_terminal or any(tag.startswith("test/") for tag in values):
            head = f"epoch {epoch:6.2f}/{self._num_epochs}  step {step:{self._width}d}  "
            self.console.print(head + text, highlight=False, markup=False, soft_wrap=True)


def describe_metrics(values: Mapping[str, float]) -> str:
    """`loss 0.0312  accuracy 99.10 %  8,123 images/s  test accuracy 98.33 %`."""
    parts = []
    for tag, value in values.items():
        split, _, name = tag.partition("/")
        name = ("" if split == "train" else f"{split} ") + name.replace("_", " ")
        if name.endswith("accuracy"):
            parts.append(f"{name} {100 * value:.2f} %")
        elif name.endswith("images per s"):
            parts.append(f"{value:,.0f} images/s")
        elif name == "skipped":
            parts.append(f"{name} {value:.0f}")
        else:
            parts.append(f"{name} {value:.4f}")
    return "  ".join(parts)
