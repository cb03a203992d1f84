"""Trains a network as a file under `experiments/` says:

    python -m fdg_jax.main --config experiments/digits.py --config.method.beta=0.2 --workdir runs/shrunk

This file is short on purpose: flags, devices, `train_and_evaluate`; or `compare` where the config has `methods`. Exit
status: 0 done, 1 the run failed, 2 the configuration is wrong, 130 or 143 stopped by a signal.
"""

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from fdg_jax.allocator import keep_memory
from fdg_jax.compare import compare
from fdg_jax.config import COMPARISON_KEYS, CONFIG_KEYS, ConfigError, Settings, resolve, resolve_comparison
from fdg_jax.console import describe_metrics
from fdg_jax.names import check_name
from fdg_jax.resume import goes_on
from fdg_jax.saving import RunFailed
from fdg_jax.sealed import free_name
from fdg_jax.train import train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The experiment, for example experiments/digits.py. Its keys can be overridden: --config.method.beta=0.2, "
    "--config.num_stages=4; fdg_jax/config.py lists them all.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for the settings, metrics, checkpoints and weights, in which a run that was stopped goes on; by default "
    "runs/ and the name of the experiment.",
)

STOPPED_AT_ONCE = "stopped at once; what was written before is kept"


def main(argv: Sequence[str]) -> int:
    """Runs the experiment that the flags name; returns the exit status."""
    console = Console()
    keep_memory()  # before there are threads
    with _ending_at_once(console):
        return _main(argv, console)


def _main(argv: Sequence[str], console: Console) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file
    try:
        if len(argv) > 1:
            raise ConfigError(f"unexpected argument {argv[1]!r}; flags begin with --config. or --workdir")
        return _carry_out(_given_config(), console)
    except ConfigError as error:
        return _complain(error, 2)
    except RunFailed as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        _complain(STOPPED_AT_ONCE, 130)
        os._exit(130)  # not to wait for the devices, nor for what is being written


def _carry_out(config: ConfigDict, console: Console) -> int:
    """Trains, or compares methods; the exit status."""
    runs = resolve_comparison(config) if "methods" in config else {}
    settings = next(iter(runs.values())) if runs else resolve(config)
    make_devices(1 if settings.engine == "fused" else settings.num_stages)
    if _WORKDIR.value == "":
        raise ConfigError("--workdir is empty; name a folder, or leave it out for one under runs/")
    base = Path("runs") / _experiment_name()
    if runs:
        stopped_by = compare(runs, Path(_WORKDIR.value or base), console)
        return 128 + stopped_by if stopped_by else 0
    workdir = Path(_WORKDIR.value) if _WORKDIR.value else default_workdir(base, settings)
    result = train_and_evaluate(settings, workdir, console)
    line = result.summary if result.stopped_by else f"{describe_metrics(result.metrics)}  {result.summary}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 128 + result.stopped_by if result.stopped_by else 0


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
        os._exit(_complain(STOPPED_AT_ONCE, 128 + number))

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


def _given_config():
    if not _CONFIG.present:
        raise ConfigError("--config is missing; try --config experiments/digits.py")
    try:
        config = _CONFIG.value
        config.keys()
    except (OSError, AttributeError) as error:  # ml_collections puts an OSError off until the config is used
        if not Path(_config_file()).is_file():
            raise ConfigError(f"there is no file --config={_config_file()}; try experiments/digits.py") from None
        raise ConfigError(f"--config={_config_file()} fails: {error.__cause__ or error}") from None
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config() of --config={_config_file()} must return a ConfigDict, like default_config()")
    return config


def _config_file() -> str:
    return config_flags.get_config_filename(flags.FLAGS["config"])


def _experiment_name() -> str:
    return Path(_config_file()).stem


def default_workdir(base: Path, settings: Settings) -> Path:
    """The folder, or the next like it, that does not exist or holds this very run unfinished: runs/digits, -2, .."""
    return free_name(base, taken=lambda folder: os.path.exists(folder) and not goes_on(folder, settings))


def _complain(reason: object, status: int) -> int:
    print(f"fdg_jax: {reason}", file=sys.stderr)
    return status


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Flags, or one line about the first that is wrong and exit status 2."""
    try:
        for key in re.findall(r"^--?config\.([\w.]+)", "\n".join(argv), re.MULTILINE):
            if key not in COMPARISON_KEYS:
                check_name("config key", key, CONFIG_KEYS)
        return flags.FLAGS(list(argv))
    except Exception as error:  # the config file is Python, and may raise anything
        raise SystemExit(_complain(_fault_of_config_file(error) or _first_line(error), 2)) from None


def _fault_of_config_file(error: BaseException | None) -> str | None:
    """What went wrong in the config file, and where; None where the fault is not in it."""
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        lines = [(f.f_code.co_filename, n) for f, n in frames if f.f_globals.get("__name__") == "config_config"]
        if isinstance(error, ConfigError):
            return str(error)
        if lines or isinstance(error, SyntaxError):
            place = " ({}, line {})".format(*lines[-1]) if lines else ""  # a SyntaxError tells its place itself
            return f"the config file fails: {type(error).__name__}: {_first_line(error)}{place}"
        error = error.__context__
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
