"""Where a run's numbers come from: an entry in its run.json at every start."""

import json
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from fdg_jax.sealed import replace_text


def note_start(workdir: Path, devices: Iterable[jax.Device]) -> None:
    """Appends to the list in `workdir`/run.json: the command, the machine, the versions and the time.

    Args:
        workdir: an existing folder.
        devices: that the run's stages are on.

    Raises:
        OSError: it cannot be written.
    """
    path = workdir / "run.json"
    before: list[Any] = []
    with suppress(FileNotFoundError, ValueError):  # a damaged list begins anew
        kept = json.loads(path.read_text(encoding="utf-8"))
        before = kept if isinstance(kept, list) else []
    replace_text(path, json.dumps([*before, describe_start(devices)], indent=2) + "\n")


def describe_start(devices: Iterable[jax.Device]) -> dict[str, Any]:
    """The entry: "devices" counts each once, by kind; "cpu" is the processor's name where the system tells it."""
    return {
        "command": typed_command(sys.orig_argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "devices": dict(Counter(device.device_kind for device in dict.fromkeys(devices))),
        "cpu": _processor(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


_PACKAGES = ("fdg_jax", "jax", "jaxlib", "flax", "optax")


def typed_command(words: Sequence[str]) -> str:
    """A command line as one would type it again: the interpreter by its short name, paths relative to where it ran."""
    here = os.path.join(os.getcwd(), "")
    return shlex.join(["python", *(word.replace(here, "") if here != "/" else word for word in words[1:])])


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(name: str) -> str | None:
    if name == "fdg_jax":
        import fdg_jax

        return fdg_jax.__version__
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None
