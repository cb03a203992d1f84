"""Runs put together: those of one task, and among them those that differ in their seed alone; medians and spreads."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fdg_jax.published import Key
from fdg_jax.results import Run, is_number

METHODS = {"bp": "BP", "fdg": "FDG", "ddg": "DDG", "dgl": "DGL", "dni": "DNI", "adl": "ADL"} | {
    "features_replay": "Features Replay",
    "data_parallel": "data parallel",
}
NETWORKS = {"wrn28_10": "WRN-28-10"} | {f"resnet{depth}": f"ResNet-{depth}" for depth in (18, 20, 56, 110, 1202)}
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
# Settings that change when something is written, or where TFDS keeps its images, and not what: runs that differ in them
# are seeds of one another.
ASIDE = ("seed", "log_every", "on_nan", "checkpoint.", "data.path", "trace", "profile", "probe")


class Task(NamedTuple):
    """What runs must have in common to stand in one picture.

    Attributes:
        network: as it ran, like "resnet_cifar, depth 8, width 16".
        data: that it ran on.
        cell: network and data set of the papers that it stands for, or None.
        scale: of that cell.
        path: of the data, where they are read from a file or a folder of the user's; "" for others.
    """

    network: str
    data: str
    cell: tuple[str, str] | None = None
    scale: str | None = None
    path: str = ""

    @property
    def ran(self) -> str:
        return f"{self.network} on {self.data} {self.path}".rstrip()

    @property
    def title(self) -> str:
        if self.cell is None:
            return self.ran
        named = f"{NETWORKS.get(self.cell[0], self.cell[0])} on {DATASETS.get(self.cell[1], self.cell[1])}"
        if self.scale == "full":
            return f"{named}, {self.data} {self.path}" if self.path else named
        return f"{named}, scale {self.scale or 'unknown'}: {self.ran}"


class Place(NamedTuple):
    """What a time depends on, of a `Key`: not on beta, and not on the table."""

    network: str
    dataset: str
    method: str
    num_stages: int


class Spread(NamedTuple):
    """Median, least and greatest of some numbers."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        label: what distinguishes it from the other groups of its task, like "FDG, beta 0.5, K = 2".
        runs: one or more.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        return str(self.runs[0].setting("method.name", "?"))

    @property
    def beta(self) -> float:
        beta = self.runs[0].setting("method.beta")
        return float(beta) if is_number(beta) else 1.0

    @property
    def num_stages(self) -> int:
        """K; 1 for BP, whose stages wait for one another."""
        stages = self.runs[0].setting("num_stages")
        return int(stages) if is_number(stages) and self.method != "bp" else 1

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def error(self) -> Spread | None:
        """In percent, after the last epoch, of the runs that are finished."""
        errors = [run.error for run in self.finished if run.error is not None]
        return Spread.of(errors) if errors else None

    @property
    def seeds(self) -> str:
        """How many are finished, "2 of 3" where some are not."""
        done = len(self.finished)
        return f"{done}" if done == len(self.runs) else f"{done} of {len(self.runs)}"

    def median_of(self, attribute: str) -> float | None:
        """Of a number of `Run`, over the runs that have it, the finished ones where there are some."""
        values = [getattr(run, attribute) for run in self.finished or self.runs]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    @property
    def hardware(self) -> list[str]:
        return list(dict.fromkeys(run.hardware or "unknown" for run in self.runs))

    @property
    def device_kinds(self) -> set[str]:
        """Of all its starts; None is in it where one is not known."""
        return {kind for run in self.runs for start in run.starts or [{}] for kind in start.get("devices") or [None]}

    def curve(self, name: str) -> list[tuple[float, Spread]]:
        """(epoch, spread over the seeds) of a curve of `Run`, "test_error" or "train_loss".

        Of the finished runs, or of all where none is, at epochs at which each has a value: a line that takes up or
        loses a seed on its way would jump for that.
        """
        curves = [dict(getattr(run, name)) for run in self.finished or self.runs if getattr(run, name)]
        epochs = sorted(set.intersection(*map(set, curves))) if curves else []
        return [(epoch, Spread.of([curve[epoch] for curve in curves])) for epoch in epochs]


def by_task(runs: Iterable[Run]) -> dict[Task, list[Group]]:
    """The groups of every task, in the order in which the runs are given; of paths, what tells them apart.

    Runs that were made for a time alone, of a few epochs, are left out.
    """
    tasks: dict[Task, list[Run]] = defaultdict(list)
    for run in [run for run in runs if not run.timed]:
        tasks[task_of(run)].append(run)
    paths = {task.path for task in tasks}
    return {task._replace(path=_tail(task.path, paths)): grouped(members) for task, members in tasks.items()}


def task_of(run: Run) -> Task:
    """The network and the data of a run, and the cell that it stands for; a run without settings is like no other."""
    model, data = run.section("model"), run.section("data")
    cell, scale = ((run.cell.network, run.cell.dataset), run.scale) if run.cell else (None, None)
    if not (model and data):
        return Task("unknown network", "unknown data of", cell, scale, str(run.workdir))
    network = str(model.get("name"))
    for key, value in model.items():
        if key in ("depth", "width") or (key == "stem" and network == "resnet"):
            network += f", {key} {value}"
    source, path = str(data.get("source")), ""
    if source == "tfds":
        source = str(data.get("name"))
    elif source in ("arrays", "folder"):
        path = str(Path(str(data.get("path"))))
    return Task(network, f"{data['limit']} images of {source}" if data.get("limit") else source, cell, scale, path)


def _tail(path: str, paths: Iterable[str]) -> str:
    """As many of the last parts of a path as no other of the paths ends in."""
    parts, others = Path(path).parts, [Path(other).parts for other in paths if other != path]
    lengths = (n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others))
    return str(Path(*parts[-next(lengths, len(parts)) :])) if parts else ""


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Runs with equal settings but for the seed as groups, BP first, then by K; with labels that tell them apart."""
    members: dict[tuple, list[Run]] = defaultdict(list)
    for run in distinct(runs):
        members[_identity(run)].append(run)
    labels: dict[str, list[tuple]] = defaultdict(list)
    for identity, own in members.items():
        labels[_label(own[0])].append(identity)
    groups = [
        Group(", ".join([label, *_differences(identity, alike)]), tuple(members[identity]))
        for label, alike in labels.items()
        for identity in alike
    ]
    return sorted(groups, key=lambda group: (group.method != "bp", group.num_stages, group.method, -group.beta))


def _identity(run: Run) -> tuple:
    """Everything that its result depends on, but for the seed; a run without settings is like no other."""
    flat = sorted((key, str(value)) for key, value in flatten(run.settings) if not key.startswith(ASIDE))
    return (*flat, ("path", task_of(run).path))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _label(run: Run) -> str:
    name, beta, stages = (run.setting(key) for key in ("method.name", "method.beta", "num_stages"))
    facts = [METHODS.get(name, name) if name else run.workdir.name]
    facts += [f"beta {beta:g}"] if is_number(beta) and (name == "fdg" or beta != 1) else []
    return ", ".join(facts + ([f"K = {stages}"] if stages and name != "bp" else []))


def _differences(identity: tuple, alike: Sequence[tuple]) -> list[str]:
    """Where the settings of groups with one label are others."""
    common = set.intersection(*map(set, alike))
    return [f"{key} {value}" for key, value in identity if (key, value) not in common] if len(alike) > 1 else []


def alike(groups: Iterable[Group], *free: str) -> list[tuple[str, list[Group]]]:
    """Groups that differ in nothing but settings whose names begin with one of `free`, and what sets each list apart.

    The words begin with a comma, to be put after a title; they are empty where there is one list.
    """
    lists: dict[tuple, list[Group]] = defaultdict(list)
    for group in groups:
        lists[rest(group, *free)].append(group)
    return [("".join(f", {word}" for word in _differences(own, list(lists))), lists[own]) for own in lists]


def rest(group: Group, *free: str) -> tuple:
    """All settings of a group but the seed and those whose names begin with one of `free`."""
    return tuple((key, value) for key, value in _identity(group.runs[0]) if not key.startswith(free))


def of_cell(runs: Iterable[Run], key: Key, scale: str | None) -> list[Run]:
    """The runs made for a cell at a scale, those of the same cell in another table among them."""
    return distinct(
        run for run in runs if run.cell and run.cell[1:] == key[1:] and run.scale == scale and not run.timed
    )


def by_place(runs: Iterable[Run], scale: str | None) -> dict[Place, Group]:
    """The runs made at a scale for any cell, put together where their times should be equal."""
    places: dict[Place, list[Run]] = defaultdict(list)
    for run in runs:
        if run.cell and run.scale == scale:
            places[Place(run.cell.network, run.cell.dataset, run.cell.method, run.cell.num_stages)].append(run)
    return {place: Group("", tuple(distinct(own))) for place, own in places.items()}


def distinct(runs: Iterable[Run]) -> list[Run]:
    """Each seed of the same settings once, that which went furthest."""
    kept: dict[tuple, Run] = {}
    for run in runs:
        name = (*_identity(run), run.setting("seed"))
        if name not in kept or run.epochs > kept[name].epochs:
            kept[name] = run
    return list(kept.values())
