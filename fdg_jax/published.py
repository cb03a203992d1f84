"""What the authors of FDG published: the cells of their tables, and the bars of their Figure 4a.

The numbers are in `published.json`, a line a figure, and nowhere else. Source "preprint" is arXiv 1906.09108, "readme"
the repository of the authors, which prints the later version's. Of Figure 4a the text prints no number; three of its
bars are ResNet-20's cells of Table 2, and the betas of the others, which nothing gives, were chosen here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

from fdg_jax.names import check_name

TABLES = ("table2", "table3", "table4", "figure4a")
TITLES = {
    "table2": "Table 2: CIFAR-10, K = 2",
    "table3": "Table 3: CIFAR-100, K = 2",
    "table4": "Table 4: ResNet-56 on CIFAR-10 over more devices",
    "figure4a": "Figure 4a: gradient shrinking, ResNet-20 on CIFAR-10, K = 2",
}


class Key(NamedTuple):
    """Where in a table a figure stands.

    Attributes:
        table: one of TABLES.
        network: as in the names of `experiments/`, like "resnet56".
        dataset: "cifar10" or "cifar100".
        method: a preset's name, or "data_parallel", which is none.
        beta: of FDG, None for the others and for times, which do not depend on it.
        num_stages: K, 1 for BP.
    """

    table: str
    network: str
    dataset: str
    method: str
    beta: float | None
    num_stages: int


@dataclass(frozen=True)
class Cell:
    """A published figure: an error or a time; or, all three None, a bar of which no number is printed.

    Attributes:
        table, network, dataset, method, beta, num_stages: see `Key`.
        reported_by: "own" of the authors' method, "rerun" by them with their recipe (their *), "cited" from elsewhere.
        source: "preprint" or "readme".
        error: top-1 test error in percent after the last epoch; of FDG the median of three runs.
        seconds_per_epoch: on hardware that the readme does not name.
        percent_of_bp: time, on Tesla K80.
    """

    table: str
    network: str
    dataset: str
    method: str
    beta: float | None
    num_stages: int
    reported_by: str | None = None
    source: str | None = None
    error: float | None = None
    seconds_per_epoch: float | None = None
    percent_of_bp: float | None = None

    @property
    def key(self) -> Key:
        return Key(self.table, self.network, self.dataset, self.method, self.beta, self.num_stages)

    @property
    def is_time(self) -> bool:
        return self.seconds_per_epoch is not None or self.percent_of_bp is not None


def cells(table: str | None = None) -> list[Cell]:
    """The published figures of a table, or of all, in their order. One place may have several: cited and rerun.

    Raises:
        ValueError: there is no such table.
    """
    if table is not None:
        check_name("table", table, TABLES)
    return [cell for cell in _all() if table in (None, cell.table)]


def to_run(table: str) -> list[Key]:
    """The places of a table that a run's error can fill, each once.

    Raises:
        ValueError: there is no such table.
    """
    return list(dict.fromkeys(cell.key for cell in cells(table) if not cell.is_time))


def to_time(table: str) -> list[Key]:
    """The places of a table of which a time is published and no error: runs for their errors do not fill them.

    Raises:
        ValueError: there is no such table.
    """
    trained = {_without_beta(key) for key in to_run(table)}
    timed = dict.fromkeys(cell.key for cell in cells(table) if cell.is_time)
    return [key for key in timed if _without_beta(key) not in trained]


def _without_beta(key: Key) -> Key:
    return key._replace(beta=None)


def _all() -> Iterator[Cell]:
    text = resources.files("fdg_jax").joinpath("published.json").read_text(encoding="utf-8")
    return (Cell(**cell) for cell in json.loads(text))
