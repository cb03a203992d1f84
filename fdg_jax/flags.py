"""What all commands that take `--config` share: the flag, and one line about whatever is wrong with it.

Exit status 2 stands for wrong input.
"""

import re
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from fdg_jax.commands import complain
from fdg_jax.config import COMPARISON_KEYS, CONFIG_KEYS, ConfigError
from fdg_jax.names import check_name

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The experiment, for example experiments/digits.py. Its keys can be overridden: --config.method.beta=0.2, "
    "--config.num_stages=4; fdg_jax/config.py lists them all.",
    lock_config=True,
)


def given_config() -> ConfigDict:
    """What `--config` and its overrides come to.

    Raises:
        ConfigError: it is missing, or no configuration.
    """
    if not _CONFIG.present:
        raise ConfigError("--config is missing; try --config experiments/digits.py")
    try:
        config = _CONFIG.value
        config.keys()
    except (OSError, AttributeError) as error:  # ml_collections puts an OSError off until the config is used
        if not Path(config_file()).is_file():
            raise ConfigError(f"there is no file --config={config_file()}; try experiments/digits.py") from None
        raise ConfigError(f"--config={config_file()} fails: {error.__cause__ or error}") from None
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config() of --config={config_file()} must return a ConfigDict, like default_config()")
    return config


def config_file() -> str:
    """Of the experiment, without its variants."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def experiment_name() -> str:
    """Of the experiment's file."""
    return Path(config_file()).stem


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Flags, or one line about the first that is wrong and exit status 2."""
    try:
        for key in re.findall(r"^--?config\.([\w.]+)", "\n".join(argv), re.MULTILINE):
            if key not in COMPARISON_KEYS:
                check_name("config key", key, CONFIG_KEYS)
        return flags.FLAGS(list(argv))
    except Exception as error:  # the config file is Python, and may raise anything
        raise SystemExit(complain(_fault_of_config_file(error) or _first_line(error), 2)) from None


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
