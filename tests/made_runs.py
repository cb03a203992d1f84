"""Run folders written by hand, for tests of what reads them."""

import json
from pathlib import Path
from typing import Any


def make_run(
    folder: Path,
    errors: tuple[float, ...] = (30.0, 10.0),
    method: str = "fdg",
    beta: float = 1.0,
    num_stages: int = 2,
    seed: int = 0,
    epochs: int | None = None,
    cell: tuple | None = None,
    scale: str | None = "full",
    depth: int = 20,
    images_per_s: float = 1000.0,
    devices: dict[str, int] | None = None,
    more: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    policy: str = "stash",
) -> Path:
    """A folder as `fdg_jax.main` leaves it: five steps of 200 images an epoch, `errors` in percent after each.

    Args:
        cell: (table, network, dataset, method, beta, num_stages).
        more: of every line of the metrics.
        data: its settings; CIFAR-10 of TFDS by default.
    """
    folder.mkdir(parents=True)
    settings = {
        "seed": seed,
        "num_stages": num_stages,
        "epochs": len(errors) if epochs is None else epochs,
        "batch_size": 200,
        "model": {"name": "resnet_cifar", "depth": depth, "width": 16},
        "data": data or {"source": "tfds", "name": "cifar10"},
        "method": {"name": method, "beta": beta, "policy": policy},
    }
    lines = [
        {
            "step": 5 * epoch,
            "epoch": float(epoch),
            "time_s": 7.0 * epoch,
            "train/loss": 2.0 / epoch,
            "train/images_per_s": 10.0 if epoch == 1 else images_per_s,
            "test/accuracy": 1 - error / 100,
            **(more or {}),
        }
        for epoch, error in enumerate(errors, 1)
    ]
    start = {
        "command": f"python -m fdg_jax.main --config.seed={seed}",
        "devices": devices or {"H100": num_stages},
        "versions": {"jax": "0.10.2"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps([start]))
    if cell:
        names = ("table", "network", "dataset", "method", "beta", "num_stages")
        (folder / "cell.json").write_text(json.dumps(dict(zip(names, cell, strict=True)) | {"scale": scale}))
    return folder
