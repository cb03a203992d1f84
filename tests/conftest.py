"""Four CPU devices before JAX starts, and compiled programs shared between tests (and runs) that need the same one."""

import gc
import os
from pathlib import Path
from unittest import mock

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Tests compile far longer than they compute. Their own processes only: runs that they start are as users start them.
LITTLE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):  # half the time of compiling; later versions know but one way to emit a fusion
    LITTLE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
with mock.patch.dict(os.environ, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {LITTLE}"):
    jax.devices()

# Files that take half a minute or more: begun first, so that no worker is left alone with one at the end.
LONG = ("survival", "notebooks", "readme", "snapshot", "experiments", "pipeline", "main", "models", "stage", "data")


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable: within a file the order stays


def pytest_collection_finish():
    gc.freeze()  # what is imported by now stays: collections need not look at it again and again
