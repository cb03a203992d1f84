"""Many methods on one task: a run for every method and seed, each in a folder of its own, and a table of all."""

import json
import math
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from fdg_jax.config import ConfigError, Settings
from fdg_jax.console import SILENT, JsonLines, insist, say
from fdg_jax.metrics import read_lines
from fdg_jax.overview import columns
from fdg_jax.saving import RunFailed
from fdg_jax.sealed import replace_text
from fdg_jax.train import Result, train_and_evaluate

Runs = Mapping[tuple[str, int], Settings]  # by method, as it is typed, and seed


@dataclass(frozen=True)
class Outcome:
    """What a run comes to; kept as `result.json`.

    Attributes:
        test_error: after the last batch, NaN where the run failed.
        batch_seconds: the median over its logs; compilation and evaluation are not in it.
        bytes_held: by all stages, and by the largest, between two ticks of the steady state.
        extra_params: of auxiliary networks.
        failed: why, in a line, or None.
    """

    test_error: float
    batch_seconds: float = math.nan
    bytes_held: tuple[int, int] = (0, 0)
    extra_params: int = 0
    failed: str | None = None


def compare(runs: Runs, workdir: Path, console: Console, lines: JsonLines = SILENT) -> int | None:
    """Trains all that is not trained yet, and prints the table; the signal that ended it early, or None.

    Runs are kept as `workdir`/method/seed: the same command skips those that are finished, and goes on in the middle of
    the one that was stopped. A run that fails is a result too.

    Args:
        runs: from `config.resolve_comparison`.
        workdir: made here.
        console: a line a run, and the table; what runs say themselves is in `log.txt` beside theirs.
        lines: for machines: what runs say themselves too, each line with the method as "run", and the seed.

    Raises:
        ConfigError: settings do not fit one another, or the workdir holds runs of others.
        RunFailed: nothing can be written.
    """
    outcomes: dict[tuple[str, int], Outcome] = {}
    stopped_by = None
    with _programs_shared():
        for number, ((method, seed), settings) in enumerate(runs.items(), 1):
            folder = workdir / _folder(method) / f"seed_{seed}"
            own = lines.within({"run": method, "seed": seed})
            outcome = _read(folder, settings)
            if outcome is None:
                outcome, stopped_by = _run(settings, folder, own)
            if outcome is None:
                insist(console, f"stopped in {folder}: the same command goes on from there")
                break
            own.write("result", asdict(outcome))
            outcomes[method, seed] = outcome
            error = outcome.failed or f"test error {100 * outcome.test_error:.2f} %"
            say(console, f"{number:3d}/{len(runs)}  {method}, seed {seed}: {error}")
    say(console, "")
    insist(console, table(outcomes))
    return stopped_by


def table(outcomes: Mapping[tuple[str, int], Outcome]) -> str:
    """A line a method: median, least and greatest test error over its seeds, and what a batch takes."""
    heads = ("method", "seeds", "test error", "least - greatest", "ms a batch", "MiB", "largest stage", "extra params")
    lines: list[tuple[str, ...]] = [heads]
    for method in dict.fromkeys(name for name, _ in outcomes):
        own = [outcome for (name, _), outcome in outcomes.items() if name == method]
        done = [outcome for outcome in own if outcome.failed is None]
        seeds = f"{len(done)}" if len(done) == len(own) else f"{len(done)} of {len(own)}"
        if not done:
            lines.append((method, seeds, "failed", *[""] * 5))
            continue
        errors = [100 * outcome.test_error for outcome in done]
        total, largest = done[0].bytes_held
        lines.append(
            (
                method,
                seeds,
                f"{statistics.median(errors):.2f} %",
                f"{min(errors):.2f} - {max(errors):.2f}",
                f"{1e3 * statistics.median(outcome.batch_seconds for outcome in done):.2f}",
                f"{total / 2**20:.2f}",
                f"{largest / 2**20:.2f}",
                f"{done[0].extra_params:,}",
            )
        )
    return columns(lines)


def _run(settings: Settings, folder: Path, lines: JsonLines) -> tuple[Outcome | None, int | None]:
    """What the run comes to; or None, and the signal that stopped it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            result = train_and_evaluate(settings, folder, Console(file=log, width=120), lines)
        if result.stopped_by:
            return None, result.stopped_by
        outcome = _outcome(result, settings, folder)
    except RunFailed as error:
        outcome = Outcome(math.nan, failed=str(error))
    except OSError as error:
        raise ConfigError(f"cannot write to --workdir={folder}: {error.strerror}; choose another") from error
    try:
        kept = {"settings": asdict(settings), "outcome": asdict(outcome)}
        replace_text(folder / "result.json", json.dumps(kept, indent=2) + "\n")
    except OSError as error:
        raise RunFailed(f"the result cannot be written to {folder}: {error.strerror}") from error
    return outcome, None


def _outcome(result: Result, settings: Settings, folder: Path) -> Outcome:
    lines = read_lines(folder / "metrics.jsonl")
    rates = [line["train/images_per_s"] for line in lines if "train/images_per_s" in line]  # a probe's line has none
    held = [forecast.total for forecast in result.pipe.forecasts]
    return Outcome(
        test_error=1 - result.metrics["test/accuracy"],
        batch_seconds=settings.batch_size / statistics.median(rates[1:] or rates),  # the first compiles
        bytes_held=(sum(held), max(held)),
        extra_params=sum(result.pipe.extra_params),
    )


def _read(folder: Path, settings: Settings) -> Outcome | None:
    """The result of a finished run of these very settings; of others, the run itself complains."""
    try:
        kept = json.loads((folder / "result.json").read_text())
        return Outcome(**kept["outcome"]) if kept["settings"] == json.loads(json.dumps(asdict(settings))) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folder(method: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "_", method).strip("_")


@contextmanager
def _programs_shared() -> Iterator[None]:
    """Runs that differ in the seed alone compile once, unless the user has a place for programs already."""
    before = {name: getattr(jax.config, name) for name in _CACHE}
    if before["jax_compilation_cache_dir"] is not None:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, value in {**_CACHE, "jax_compilation_cache_dir": folder}.items():
            jax.config.update(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)


_CACHE: dict[str, Any] = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
