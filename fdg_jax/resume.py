"""How a run begins: from nothing, with the weights of another, or where a workdir says that one stopped."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from fdg_jax.agreement import Mismatch
from fdg_jax.build import build, described, example_images
from fdg_jax.checkpoint import Checkpoints, Weights, load_weights, read_checkpoint
from fdg_jax.config import ConfigError, Settings, differences
from fdg_jax.console import warn
from fdg_jax.data import Source
from fdg_jax.engine.base import State
from fdg_jax.lock import is_locked
from fdg_jax.pipeline import Pipeline
from fdg_jax.sealed import Damaged
from fdg_jax.snapshot import Snapshot, weights

WAYS_OUT = "--config.checkpoint.resume=params goes on with its weights alone; or choose another --workdir"


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside the state of its pipeline.

    Attributes:
        step: batches fed.
        logged: whether the log of that step, where one is due, is written.
        last_log: the step of the last log.
        seconds: of training, and of these since the last log.
        best_error: the smallest test error so far.
        metrics: of the last evaluation, by tag.
        updates_before: of the learning rate's schedule, before the optimizer's own count began.
    """

    step: int = 0
    logged: bool = True
    last_log: int = 0
    seconds: float = 0.0
    seconds_since_log: float = 0.0
    best_error: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    updates_before: int = 0


@dataclass(frozen=True)
class Found:
    """What a workdir holds of a run that is to go on; no snapshot where it was stopped before its first checkpoint."""

    path: Path
    snapshot: Snapshot | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    progress: Progress = Progress()
    differences: tuple[str, ...] = ()


def find(settings: Settings, workdir: Path, checkpoints: Checkpoints, console: Console) -> Found | None:
    """The run in a workdir; None where there is none.

    Damaged checkpoints are told of and renamed, and the newest that is complete counts.

    Raises:
        ConfigError: a run is there, and the settings do not allow to go on with it.
    """
    config, paths = workdir / "config.json", checkpoints.complete()
    if not paths and not config.exists() and not (workdir / "metrics.jsonl").exists():
        return None
    if settings.checkpoint.resume == "never":
        raise ConfigError(f"{workdir} holds a run already, and nothing is overwritten: choose another --workdir")
    if not paths:
        return _unsaved(settings, workdir, config)
    damaged: list[tuple[Path, Exception]] = []
    for path in reversed(paths):
        try:
            snapshot, notes = read_checkpoint(path)
            found = Found(path, snapshot, notes, Progress(**notes["progress"]), _different(notes, settings))
            break
        except Damaged as error:
            damaged.append((path, error))
        except (KeyError, TypeError):
            raise ConfigError(f"{path} was not written by a run: choose another --workdir") from None
        except (OSError, MemoryError) as error:
            raise ConfigError(
                f"{path} cannot be read: {getattr(error, 'strerror', None) or 'out of memory'}"
            ) from error
    else:
        raise ConfigError(f"{damaged[0][1]}, and there is no other checkpoint: choose another --workdir")
    if found.differences and settings.checkpoint.resume != "params":
        raise ConfigError(f"{workdir} holds a run of other settings: {'; '.join(found.differences)}; {WAYS_OUT}")
    for path, why in damaged:
        warn(console, f"{why}; going back to {found.path.name}")
        checkpoints.set_aside(path)
    return found


def _different(notes: Mapping[str, Any], settings: Settings) -> tuple[str, ...]:
    return tuple(differences(notes["settings"], settings))


def _unsaved(settings: Settings, workdir: Path, config: Path) -> Found:
    """A run that was stopped before its first checkpoint: with the same settings it begins again."""
    try:
        saved = json.loads(config.read_text())
        same = isinstance(saved, dict) and not differences(saved, settings)
    except (OSError, ValueError):
        same = False
    if not same or (workdir / "params").exists():
        raise ConfigError(f"{workdir} holds a run already, and nothing is overwritten: choose another --workdir")
    return Found(workdir)


def goes_on(workdir: Path, settings: Settings) -> bool:
    """Whether a folder holds a run of these settings that is not finished and that no process is at."""
    if settings.checkpoint.resume == "never" or (workdir / "params").exists() or is_locked(workdir):
        return False
    try:
        saved = json.loads((workdir / "config.json").read_text())
        return isinstance(saved, dict) and not differences(saved, settings)
    except (OSError, ValueError):
        return False


class Start(NamedTuple):
    """What a run begins or goes on with, and a line that says so."""

    pipe: Pipeline
    source: Source
    state: State
    progress: Progress
    line: str | None


def begin(settings: Settings, found: Found | None, console: Console) -> Start:
    """What a run is made of, and the state and the progress with which it begins or goes on.

    Args:
        settings: of the run.
        found: from `find`.
        console: where to tell what is found on the way.

    Raises:
        ConfigError: the settings do not fit one another; the checkpoint, or what `init_from` names, does not fit.
    """
    if found is None or found.snapshot is None:
        pipe, source = build(settings, console)
        state, line = _init(pipe, settings, source), None
        if settings.init_from:
            state, line = _with_weights_named(settings.init_from, pipe, settings, source, state, console)
        return Start(pipe, source, state, Progress(), line)
    try:
        return _go_on(settings, found, found.snapshot, console)
    except Mismatch as mismatch:
        if settings.checkpoint.resume != "params":
            raise ConfigError(f"{found.path} is of another run: {mismatch}; {WAYS_OUT}") from None
        return _go_on_with_weights(settings, found, found.snapshot, console, str(mismatch))
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{found.path} was not written by a run: {error!r}; choose another --workdir") from error


def _go_on(settings: Settings, found: Found, snapshot: Snapshot, console: Console) -> Start:
    if found.differences:
        raise Mismatch("; ".join(found.differences))
    # Where the network was cut, a measurement would not find again.
    cuts = tuple(snapshot.record["pipeline"]["cuts"]) if settings.cuts == "balanced" else None
    pipe, source = build(settings, console, cuts, found.progress.updates_before)
    if (saved := found.notes["data"]) != (here := described(source, settings)):
        name = next(name for name in here if saved.get(name) != here[name])
        raise Mismatch(f"of the data, {name} was {saved.get(name)}, is {here[name]}")
    state = pipe.restore(_init(pipe, settings, source), snapshot)
    if settings.on_nan == "stop":
        state = pipe.forget_faults(state)  # which the run was told to bear, until now
    in_flight = f", with {snapshot.in_flight} in flight" if snapshot.in_flight else ""
    line = f"going on after step {found.progress.step}{in_flight}, from {found.path}"
    return Start(pipe, source, state, found.progress, line)


def _go_on_with_weights(settings: Settings, found: Found, snapshot: Snapshot, console: Console, why: str) -> Start:
    """The optimizer begins anew, its learning rate does not."""
    step, batch_size = found.progress.step, found.notes["settings"]["batch_size"]
    if batch_size != settings.batch_size:
        raise ConfigError(
            f"{found.path} counts batches of {batch_size}, not of {settings.batch_size}: begin anew with its weights, "
            f"--config.init_from={found.path} and another --workdir"
        )
    pipe, source = build(settings, console, updates_before=step)
    state = _with_weights_of(found.path, snapshot, pipe, settings, source, _init(pipe, settings, source), step)
    line = f"going on after step {step} with the weights of {found.path} alone: {why}; left: {_left(snapshot)}"
    progress = replace(found.progress, logged=True, last_log=step, seconds_since_log=0.0, updates_before=step)
    return Start(pipe, source, state, progress, line)


def _with_weights_named(
    init_from: str, pipe: Pipeline, settings: Settings, source: Source, fresh: State, console: Console
) -> tuple[State, str]:
    """The state before the first batch, with the weights that `config.init_from` names, and a line about them."""
    damaged: list[Damaged] = []
    for folder in _folders_with_weights(Path(init_from).expanduser()):
        try:
            if (folder / "weights").is_dir():
                loaded = load_weights(folder, Weights(pipe.params(fresh), pipe.module_state(fresh)))
                return _init(pipe, settings, source, *loaded), f"beginning with the weights of {folder}"
            snapshot, _ = read_checkpoint(folder)
        except Damaged as error:
            damaged.append(error)
        except (ValueError, OSError) as error:
            raise ConfigError(f"config.init_from={init_from}: {error}") from None
        else:
            for why in damaged:
                warn(console, f"{why}; going back to {folder.name}")
            state = _with_weights_of(folder, snapshot, pipe, settings, source, fresh)
            return state, f"beginning with the weights of {folder}; left: {_left(snapshot)}"
    raise ConfigError(f"config.init_from={init_from}: {damaged[0]}")


def _folders_with_weights(folder: Path) -> list[Path]:
    """Where the weights of a run may be, the best place first; the folder itself where it is no run's."""
    if (folder / "params").is_dir():
        return [folder / "params"]
    for parent in (folder / "checkpoints", folder):
        if checkpoints := Checkpoints(parent).complete():
            return checkpoints[::-1]
    return [folder]


def _with_weights_of(
    path: Path,
    snapshot: Snapshot,
    pipe: Pipeline,
    settings: Settings,
    source: Source,
    fresh: State,
    first_batch: int = 0,
) -> State:
    try:
        params, module_state = weights(snapshot, pipe.params(fresh), pipe.module_state(fresh))
    except Mismatch as mismatch:
        raise ConfigError(f"{path} is of another network: {mismatch}") from None
    return _init(pipe, settings, source, params, module_state, first_batch)


def _init(pipe: Pipeline, settings: Settings, source: Source, *begin_with: Any) -> State:
    try:
        return pipe.init(jax.random.key(settings.seed), example_images(settings, source), *begin_with)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def _left(snapshot: Snapshot) -> str:
    """What of a snapshot is neither parameters nor module state, in words."""
    return ", ".join(filter(None, ["the optimizer's state", snapshot.in_flight]))
