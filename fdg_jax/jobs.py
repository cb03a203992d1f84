"""The runs that fill the cells of the published tables: their commands, folders and processes.

The scales differ in how much of the papers' recipe, the files of `experiments/`, is done.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fdg_jax.config import Settings
from fdg_jax.methods import PRESETS
from fdg_jax.published import TABLES, Key, to_run, to_time
from fdg_jax.sealed import replace_text

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RECIPE = Settings()  # its epochs and milestones are the papers'
WARMUP_EPOCHS = 3  # of ResNet-110, and with more than two stages
TIMED_EPOCHS = 2  # of a run for its time alone: a few hundred batches after those that compile
SMOKE_EPOCH = 1437 // 64  # batches of the digits
NUM_CLASSES = {"cifar10": 10, "cifar100": 100}


class Scale(NamedTuple):
    """How much of the recipe is run."""

    epochs: int
    seeds: str


SCALES = {"smoke": Scale(12, "0"), "short": Scale(24, "0,1,2"), "full": Scale(RECIPE.epochs, "0,1,2")}


@dataclass(frozen=True)
class Job:
    """A run of a cell, for its error or, `timed`, for its time alone; `key` has the table in whose folder it lies."""

    key: Key
    scale: str
    seed: int
    folder: Path
    command: tuple[str, ...]
    timed: bool = False

    def __str__(self) -> str:
        return f"{self.folder.parent.name}, seed {self.seed}"

    @property
    def typed(self) -> str:
        """The command as one types it."""
        return shlex.join(("python", *self.command[1:]))

    @property
    def epochs(self) -> int:
        return TIMED_EPOCHS if self.timed else SCALES[self.scale].epochs

    @property
    def finished(self) -> bool:
        return (self.folder / "params").is_dir()  # written last

    def begin(self) -> None:
        """Makes the folder, and writes into it which cell it is for.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        cell = {**self.key._asdict(), "scale": self.scale, "seed": self.seed, "timed": self.timed}
        cell["command"] = self.typed
        replace_text(self.folder / "cell.json", json.dumps(cell, indent=2) + "\n")

    def tidy(self) -> None:
        """Removes the checkpoints, which hold batches in flight and are far larger than the weights."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)


Runner = Callable[[Job, list[int]], str | None]  # of a job and the signals received; None, or why it failed


def make_jobs(table: str, scale: str, seeds: Sequence[int], workdir: Path, data: dict[str, str]) -> list[Job]:
    """A job a cell and seed, in the table's order, then one a place that wants its time alone, of seed 0.

    Args:
        table: one of `published.TABLES`.
        scale: one of SCALES.
        seeds: of every cell.
        workdir: of all.
        data: keys of the configuration that say where the images are, from `data_keys`.

    Raises:
        ValueError: the experiments are not there.
    """
    if not EXPERIMENTS.is_dir():
        raise ValueError(f"there is no folder {EXPERIMENTS}: run this in a copy of the repository")
    jobs = []
    for key in [key for key in to_run(table) if key.method in PRESETS]:
        folder = _home(workdir, key)
        home = key._replace(table=folder.parent.name)
        for seed in seeds:
            own = folder / f"seed{seed}"
            jobs.append(Job(home, scale, seed, own, _command(key, scale, seed, own, data)))
    for key in [key for key in to_time(table) if key.method in PRESETS]:
        own = workdir / table / f"{name_of(key)}_time" / "seed0"  # whatever the seeds: it makes no difference to a time
        jobs.append(Job(key, scale, 0, own, _command(key, scale, 0, own, data, timed=True), timed=True))
    return jobs


def name_of(key: Key) -> str:
    """Of the cell's folder: resnet56_fdg_beta0.5_K2."""
    beta = "" if key.beta is None else f"_beta{key.beta:g}"
    return f"{key.network}_{key.method}{beta}_K{key.num_stages}"


def _home(workdir: Path, key: Key) -> Path:
    """Where the cell's runs lie: with the table begun first, where several have it."""
    tables = [table for table in (key.table, *TABLES) if key._replace(table=table) in to_run(table)]
    folders = [workdir / table / name_of(key) for table in tables]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _command(
    key: Key, scale: str, seed: int, folder: Path, data: dict[str, str], timed: bool = False
) -> tuple[str, ...]:
    share = SCALES[scale].epochs / RECIPE.epochs
    warms_up = key.network == "resnet110" or key.num_stages > 2
    values = {
        "seed": f"{seed}",
        "num_stages": f"{key.num_stages}",
        "method.name": key.method,
        "method.beta": f"{1.0 if key.beta is None else key.beta:g}",
        "optim.warmup_epochs": f"{WARMUP_EPOCHS * share * warms_up:g}",
        "checkpoint.keep_best": "0",
    }
    if share < 1:
        milestones = ",".join(f"{round(epoch * share)}" for epoch in RECIPE.optim.milestones)
        values |= {"epochs": f"{SCALES[scale].epochs}", "optim.milestones": milestones}
    if timed:  # at the first rate throughout, without the steps of a warm-up, which take as long
        values |= {"epochs": f"{TIMED_EPOCHS}", "optim.warmup_epochs": "0"}
    if scale == "smoke":
        values |= {"data.limit": "0", "data.flip": "false"}  # all of the digits, none mirrored
        values["log_every_steps"] = f"{SMOKE_EPOCH // 2 if timed else SMOKE_EPOCH}"  # a loss an epoch; some more times
    changes = (f"--config.{name}={value}" for name, value in (values | data).items())
    main = (sys.executable, "-m", "fdg_jax.main", f"--config={_experiment(key, scale)}", f"--workdir={folder}")
    return (*main, *changes)


def _experiment(key: Key, scale: str) -> str:
    """The network's file, and behind it what makes of it the data set and the scale."""
    own = (EXPERIMENTS / f"{key.dataset}_{key.network}.py").is_file()
    file = EXPERIMENTS / (f"{key.dataset}_{key.network}.py" if own else f"{key.network}.py")
    variants = [key.dataset] * (not own and key.dataset != "cifar10") + ["smoke"] * (scale == "smoke")
    return ":".join([os.path.relpath(file), ",".join(variants)]).rstrip(":")


def data_keys(path: str | None, scale: str, dataset: str) -> dict[str, str]:
    """Keys of the configuration for the images at a path; none for those of the experiments, digits or from TFDS.

    Raises:
        ValueError: they are not as the scale and the data set want them.
    """
    if path is None:
        if scale != "smoke" and importlib.util.find_spec("tensorflow_datasets") is None:
            raise ValueError(
                f"--data is missing: name a folder of the images of {dataset} or an .npz file, "
                "or pip install tensorflow-datasets"
            )
        return {}
    if scale == "smoke":
        raise ValueError(f"--scale smoke runs on the digits of the package: leave out --data={path}")
    place = Path(path).expanduser()
    if place.is_dir():
        source, found = "folder", sum(folder.is_dir() for folder in place.glob("train/[!.]*"))
    elif place.suffix == ".npz" and place.is_file():
        source, found = "arrays", _classes_of(place)
    else:
        raise ValueError(
            f"--data={path} must be a folder with train/<class>/*.jpg and test/<class>/*.jpg, or an .npz file"
        )
    if found != NUM_CLASSES[dataset]:
        raise ValueError(f"--data={path} must hold the {NUM_CLASSES[dataset]} classes of {dataset}; it has {found}")
    return {"data.source": source, "data.path": path}


def _classes_of(file: Path) -> int:
    with np.load(file, allow_pickle=False) as arrays:
        if "train_labels" not in arrays:
            raise ValueError(f"--data={file} must hold train_images, train_labels, test_images and test_labels")
        return int(arrays["num_classes"] if "num_classes" in arrays else 1 + arrays["train_labels"].max())


def run_process(job: Job, received: list[int]) -> str | None:
    """Runs a job to its end and hands on the signals received meanwhile; None, or in a line why it failed.

    Raises:
        ValueError: its input is wrong (exit status 2), as that of the others will be.
    """
    log = job.folder / "log.txt"
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(job.folder.parents[2] / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with log.open("ab") as output:
        before, told = output.tell(), 0
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=cache | os.environ,
            process_group=0,  # else the terminal sends it a Ctrl-C too, and two stop it at once
        )
        while (status := _ended(process)) is None:
            for number in received[told:]:
                process.send_signal(number)
                print("stopping after this batch to save it; press Ctrl-C again to stop at once", flush=True)
            told = len(received)
    if status == 0:
        return None
    lines = log.read_bytes()[before:].decode(errors="replace").split("\n")
    spoken = [line for line in lines if line.startswith("fdg_jax: ")] or [line for line in lines if line.strip()]
    how = f"signal {-status}" if status < 0 else f"status {status}"
    reason = f"{spoken[-1].removeprefix('fdg_jax: ')} ({how}; {log})" if spoken else f"{how}; {log}"
    if status == 2:
        raise ValueError(f"{job} is refused: {reason}")
    return reason


def _ended(process: subprocess.Popen) -> int | None:
    try:
        return process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return None
