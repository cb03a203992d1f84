"""Imports point one way: a file may use those of lower rows, never its own or a higher one. Heavy ones have a place."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fdg_jax"
ROWS = [
    ["names", "sealed", "lock", "allocator", "pauses"],
    [
        "schedule",
        "backward",
        "layers",
        "data.augment",
        "data.shuffle",
        "data.decode",
        "optim",
        "metrics",
        "theory",
        "reuse",
        "corrections",
        "published",
        "provenance",
        "commands",
    ],
    ["models.parts", "models.cuts", "stacking", "methods", "partition", "timeline", "data.source", "results", "plots"],
    [
        "models.mlp",
        "models.resnet_cifar",
        "models.resnet",
        "models.wrn",
        "data.digits",
        "data.arrays",
        "data.folder",
        "data.stream",
        "methods_table",
        "by_name",
        "trace",
        "tally",
        "page",
    ],
    ["models", "models.heads", "data", "data.cifar", "stage", "trace_picture", "figures"],
    ["data.tfds", "local", "flops", "comparisons"],
    ["engine.base"],
    ["engine.worker", "engine.switching", "recorder"],
    ["engine.mpmd", "forecast", "checks", "agreement"],
    ["snapshot", "engine.fused", "engine.reusing", "overview"],
    ["pipeline", "balance"],
    ["checkpoint", "config", "console", "feeding", "probe"],
    ["build", "saving", "flags", "estimates", "jobs"],
    ["announce", "staleness", "expected", "planning", "summary", "tables"],
    ["resume", "tracing", "report", "alternatives", "plan_files"],
    ["train", "reproduce", "remedies"],
    ["compare", "plan_text"],
    ["main", "plan"],
]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
PLACES = {
    "flax": {
        "layers",
        "models",
        *(f"models.{name}" for name in ("parts", "mlp", "resnet_cifar", "resnet", "wrn", "heads")),
        "stage",
    },
    "ml_collections": {"config", "flags", "main"},
    "absl": {"flags", "main", "plan"},
    "orbax": {"checkpoint"},
    "tensorboardX": {"metrics"},
    "rich": {
        "announce",
        "build",
        "compare",
        "console",
        "resume",
        "saving",
        "tracing",
        "train",
        "main",
        "plan",
        "data.decode",
    },
    "PIL": {"data.decode", "data.stream", "data.cifar"},
    "grain": {"data.stream"},
    "requests": {"data.cifar"},
    "sklearn": set(),
    "tensorflow": set(),
    "tensorflow_datasets": {"data.cifar", "data.tfds"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES.pop("")  # __init__.py of the package imports the public names
FILES.pop("engine")  # holds a docstring


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_every_file_has_its_row():
    assert set(FILES) == set(LEVEL)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    own = {module.removeprefix("fdg_jax.") for module in imported(FILES[name]) if module.startswith("fdg_jax.")}
    for other in own & set(LEVEL):
        assert LEVEL[other] < LEVEL[name], f"{name} imports {other}"


@pytest.mark.parametrize("package", PLACES)
def test_packages_are_imported_in_their_place_only(package):
    users = {name for name, path in FILES.items() if package in {module.split(".")[0] for module in imported(path)}}
    assert users <= PLACES[package]


def test_the_core_has_no_arrays_in_schedules():
    assert not {module.split(".")[0] for module in imported(FILES["schedule"])} & {"jax", "numpy"}
