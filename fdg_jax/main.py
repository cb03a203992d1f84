"""Trains a network as a file under `experiments/` says:

    python -m fdg_jax.main --config experiments/digits.py --config.method.beta=0.2 --workdir runs/shrunk

This file is short on purpose: flags, devices, `train_and_evaluate`; or `compare` where the config has `methods`. Exit
status: 0 done, 1 the run failed, 2 the configuration is wrong, 130 or 143 stopped by a signal.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict
from rich.console import Console

from fdg_jax.allocator import keep_memory
from fdg_jax.commands import complain
from fdg_jax.compare import compare
from fdg_jax.config import ConfigError, Settings, resolve, resolve_comparison
from fdg_jax.console import LOG_FORMATS, JsonLines, describe_metrics, insist, voices
from fdg_jax.flags import experiment_name, given_config, parse_flags
from fdg_jax.resume import goes_on
from fdg_jax.saving import RunFailed
from fdg_jax.sealed import free_name
from fdg_jax.train import train_and_evaluate

flags.declare_key_flag("config")  # so that --help tells of it
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for the settings, metrics, checkpoints and weights, in which a run that was stopped goes on; by default "
    "runs/ and the name of the experiment.",
)
_LOG_FORMAT = flags.DEFINE_enum(
    "log_format",
    "text",
    LOG_FORMATS,
    "text for people; or json, an object a line on stdout for machines (docs/logs.md), and text on stderr.",
)
_QUIET = flags.DEFINE_bool("quiet", False, "Say nothing but warnings, errors and the last line.")

STOPPED_AT_ONCE = "stopped at once; what was written before is kept"


def main(argv: Sequence[str]) -> int:
    """Runs the experiment that the flags name; returns the exit status."""
    console, lines = _voices()
    keep_memory()  # before there are threads
    with _ending_at_once(console), lines.alone():
        return _main(argv, console, lines)


def _voices() -> tuple[Console, JsonLines]:
    return voices(_LOG_FORMAT.value, _QUIET.value)


def _main(argv: Sequence[str], console: Console, lines: JsonLines) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file
    try:
        if len(argv) > 1:
            raise ConfigError(f"unexpected argument {argv[1]!r}; flags begin with --config. or --workdir")
        return _carry_out(given_config(), console, lines)
    except (ConfigError, RunFailed) as error:
        status = 2 if isinstance(error, ConfigError) else 1
        lines.write("end", {"exit_status": status, "error": str(error)})
        return complain(error, status)
    except KeyboardInterrupt:
        complain(STOPPED_AT_ONCE, 130)
        os._exit(130)  # not to wait for the devices, nor for what is being written


def _carry_out(config: ConfigDict, console: Console, lines: JsonLines) -> int:
    """Trains, or compares methods; the exit status."""
    runs = resolve_comparison(config) if "methods" in config else {}
    settings = next(iter(runs.values())) if runs else resolve(config)
    make_devices(1 if settings.engine == "fused" else settings.num_stages)
    if _WORKDIR.value == "":
        raise ConfigError("--workdir is empty; name a folder, or leave it out for one under runs/")
    base = Path("runs") / experiment_name()
    if runs:
        stopped_by = compare(runs, Path(_WORKDIR.value or base), console, lines)
        status = 128 + stopped_by if stopped_by else 0
        lines.write("end", {"exit_status": status, "runs": len(runs)})
        return status
    workdir = Path(_WORKDIR.value) if _WORKDIR.value else default_workdir(base, settings)
    result = train_and_evaluate(settings, workdir, console, lines)
    status = 128 + result.stopped_by if result.stopped_by else 0
    line = result.summary if result.stopped_by else f"{describe_metrics(result.metrics)}  {result.summary}"
    insist(console, line)
    end = {
        "exit_status": status,
        "workdir": str(workdir),
        "seconds": round(result.seconds, 3),
        "summary": result.summary,
    }
    lines.write("end", end | result.metrics)
    return status


@contextmanager
def _ending_at_once(console: Console) -> Iterator[None]:
    """Ends the process at a SIGINT or SIGTERM, unless the loop waits for one; and at a second one in any case.

    Not by an exception, which is lost where a signal falls into a callback. Python acts on a signal only when a
    compiler or a device lets the main thread go; the pipe hears of it at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object = None) -> None:
        console.show_cursor()
        os._exit(complain(STOPPED_AT_ONCE, 128 + number))

    handlers = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    hears, tells = os.pipe()
    os.set_blocking(tells, False)
    over = threading.Event()

    def listen() -> None:
        with open(hears, "rb", buffering=0) as pipe:
            numbers = (byte[0] for byte in iter(lambda: pipe.read(1), b""))
            stops = list(islice((n for n in numbers if n in (signal.SIGINT, signal.SIGTERM)), 2))
        if len(stops) == 2 and not over.wait(timeout=1):  # the main thread ends in better order, where it can
            end(stops[-1])

    before = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        over.set()
        os.close(tells)


def make_devices(num_devices: int) -> None:
    """Lets the CPU appear as so many devices, where nobody has said how many. Must come before JAX starts.

    Accelerators are not touched: JAX prefers them where it finds them. Exactly as many, since idle CPU devices spin.
    A number far beyond any network is refused later, and must not exhaust the machine before.
    """
    said = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not said:
        jax.config.update("jax_num_cpu_devices", min(num_devices, 1024))


def default_workdir(base: Path, settings: Settings) -> Path:
    """The folder, or the next like it, that does not exist or holds this very run unfinished: runs/digits, -2, .."""
    return free_name(base, taken=lambda folder: os.path.exists(folder) and not goes_on(folder, settings))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
