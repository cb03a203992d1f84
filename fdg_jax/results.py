"""What runs left in their folders, read again: settings, curves, final errors, machine and command.

A run that was cut short by a crash is read as far as it goes, and says so in its notes.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fdg_jax.metrics import read_lines
from fdg_jax.published import Key

UNKNOWN = "its machine and command are not known"
Curve = list[tuple[float, float]]  # (epoch, value)


@dataclass(frozen=True)
class Run:
    """A folder that a run of `fdg_jax.main` has written into.

    Attributes:
        workdir: the folder.
        settings: its config.json, nested as `config` is; {} where that cannot be read.
        lines: of its metrics.jsonl, without those that cannot be read.
        starts: of its run.json, an entry a start (see `provenance`); [] where that is not there.
        cell: which cell of the papers it was made for, None where nobody said so.
        scale: of that cell: "smoke", "short" or "full".
        timed: whether it was made for the cell's time alone, so that its errors say nothing.
        command: that makes this run, as far as is known: of its cell, or as typed at the last start.
        notes: what is missing, in words, for whoever looks at the numbers.
    """

    workdir: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    cell: Key | None = None
    scale: str | None = None
    timed: bool = False
    command: str | None = None
    notes: tuple[str, ...] = ()

    def curve(self, tag: str) -> Curve:
        """(epoch, value) for every finite value of a tag, like "train/loss", in the order of the file."""
        return [
            (line["epoch"], line[tag])
            for line in self.lines
            if is_number(line.get("epoch")) and is_number(line.get(tag))
        ]

    @property
    def test_error(self) -> Curve:
        """(epoch, percent)."""
        return [(epoch, 100 * (1 - accuracy)) for epoch, accuracy in self.curve("test/accuracy")]

    @property
    def train_loss(self) -> Curve:
        """(epoch, nats)."""
        return self.curve("train/loss")

    @property
    def error(self) -> float | None:
        """Of the last evaluation, in percent; of an unfinished run it is not the final one."""
        return self.test_error[-1][1] if self.test_error else None

    @property
    def epochs(self) -> float:
        """How far it went."""
        return max((line["epoch"] for line in self.lines if is_number(line.get("epoch"))), default=0.0)

    @property
    def finished(self) -> bool:
        """Whether it was evaluated after its last epoch, with everything in flight answered."""
        asked = self.setting("epochs")
        return is_number(asked) and bool(self.test_error) and self.test_error[-1][0] >= asked

    @property
    def seconds(self) -> float | None:
        """Of the training, compilation and evaluation included."""
        return max((line["time_s"] for line in self.lines if is_number(line.get("time_s"))), default=None)

    @property
    def images_per_second(self) -> float | None:
        """The median over the logs but the first, in which programs are compiled; None where there is no other."""
        rates = [rate for _, rate in self.curve("train/images_per_s")]
        return statistics.median(rates[1:]) if len(rates) > 1 else None

    @property
    def seconds_per_epoch(self) -> float | None:
        """Of the training alone, at `images_per_second`."""
        rate, size = self.images_per_second, self.setting("batch_size")
        steps = [line["step"] / line["epoch"] for line in self.lines if is_number(line.get("epoch")) and line["epoch"]]
        return steps[-1] * size / rate if rate and steps and is_number(size) else None

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by its dotted name, like "method.beta"."""
        value: Any = self.settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    def section(self, name: str) -> Mapping[str, Any]:
        """The settings under a name, like "model"; {} where there are none."""
        value = self.settings.get(name)
        return value if isinstance(value, Mapping) else {}

    @property
    def hardware(self) -> str | None:
        """Of the last start, like "1 x NVIDIA H200" or "2 x cpu (AMD EPYC, 2 cores)"."""
        return describe_hardware(self.starts[-1]) if self.starts else None


def describe_hardware(start: Mapping[str, Any]) -> str:
    """The machine of an entry of run.json, in words."""
    devices = start.get("devices")
    if not isinstance(devices, Mapping) or not devices:
        return "unknown devices"
    where = f" ({start.get('cpu') or 'CPU'}, {start.get('cpu_cores', '?')} cores)" if "cpu" in devices else ""
    return " and ".join(f"{number} x {kind}" for kind, number in devices.items()) + where


def find(paths: Iterable[Path | str]) -> list[Run]:
    """The runs in folders: each that is one, and those below it, in the order of their names, each once.

    Raises:
        ValueError: a path is not there, or holds no run.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            wrong = f"{path} is not a folder" if path.exists() else f"there is no folder {path}"
            raise ValueError(f"{wrong}; name folders of runs, or ones above them like runs/")
        folders = sorted(folder for folder in (path, *path.rglob("*")) if _is_run(folder))
        if not folders:
            raise ValueError(f"there is no run in {path}: a run has a config.json or a metrics.jsonl; try runs/")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return [read(folder) for folder in found.values()]


def read(workdir: Path) -> Run:
    """The run in a folder; what is not there or cannot be read becomes a note."""
    notes: list[str] = []
    settings = _json(workdir / "config.json", dict, notes, "its settings are not known")
    if not _is_as_written(settings):
        notes.append("config.json is not as a run writes it: its settings are not known")
        settings = {}
    starts = [start for start in _json(workdir / "run.json", list, notes, UNKNOWN) if _is_start(start)]
    cell = _json(workdir / "cell.json", dict, notes, "") if (workdir / "cell.json").exists() else {}
    command, scale = cell.get("command") or (starts[-1].get("command") if starts else None), cell.get("scale")
    lines = _lines(workdir / "metrics.jsonl", notes)
    scale, timed, command = scale and str(scale), bool(cell.get("timed")), command and str(command)
    run = Run(workdir, settings, lines, starts, _key(cell, notes), scale, timed, command)
    if any(None in (line.get("train/loss", 0), line.get("test/loss", 0)) for line in lines):
        notes.append("its loss was not finite at some time")
    if not run.test_error:
        notes.append("it has no evaluation")
    elif not run.finished:
        notes.append(f"it is not finished: {run.epochs:g} of {run.setting('epochs', '?')} epochs")
    return replace(run, notes=tuple(notes))


def _is_run(folder: Path) -> bool:
    """A checkpoint's own folders hold neither file."""
    return folder.is_dir() and ((folder / "metrics.jsonl").is_file() or (folder / "config.json").is_file())


def _json(path: Path, kind: type, notes: list[str], loss: str) -> Any:
    """The file's value, of `kind`; an empty one, and a note of the loss, where that cannot be had."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError
        return value
    except FileNotFoundError:
        notes.append(f"there is no {path.name}: {loss}")
    except (OSError, ValueError):
        notes.append(f"{path.name} cannot be read" + (f": {loss}" if loss else ""))
    return kind()


def _is_as_written(settings: Mapping[str, Any]) -> bool:
    """Whether what is read of it, and there, is of its kind."""
    sections = [settings.get(name, {}) for name in ("method", "model", "data")]
    names = [section.get(name, "") for section in sections if isinstance(section, Mapping) for name in ("name", "path")]
    numbers = [settings.get(name, 0) for name in ("seed", "epochs", "batch_size", "num_stages")]
    return (
        all(isinstance(section, Mapping) for section in sections)
        and all(isinstance(name, str | None) for name in names)
        and all(is_number(number) for number in numbers)
    )


def _is_start(start: Any) -> bool:
    return isinstance(start, dict) and isinstance(start.get("devices", {}), dict)


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        lines = read_lines(path)
        given = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        notes.append(f"metrics.jsonl cannot be read: {error.strerror}")
        return []
    if not given:
        notes.append("metrics.jsonl is empty or not there: nothing was measured")
    elif cut := len(given) - len(lines):
        notes.append(f"{cut} of {len(given)} lines of metrics.jsonl are cut short or damaged, and left out")
    return lines


def _key(cell: Mapping[str, Any], notes: list[str]) -> Key | None:
    """The place in a table that cell.json names."""
    if not cell:
        return None
    key = Key(*(cell.get(name) for name in Key._fields))  # type: ignore[arg-type]
    is_beta = key.beta is None or is_number(key.beta)
    if all(isinstance(word, str) for word in key[:4]) and is_beta and type(key.num_stages) is int:
        return key
    notes.append("cell.json names no cell: it counts for no table")
    return None


def is_number(value: Any) -> bool:
    """Whether it is finite, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
