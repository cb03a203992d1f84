"""Every block of the README is run, or compared with what it shows."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
from helpers import assert_trees_close

from fdg_jax import schedule as schedules

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.strip().splitlines()]
TRAININGS = [line.split(" && ")[-1] for line in COMMANDS if "fdg_jax.main" in line]


def test_the_blocks_are_of_known_kinds():
    assert {language for language, _ in BLOCKS} == {"text", "bash", "python"}
    for line in COMMANDS:
        for part in line.split(" && "):
            assert part == "pytest" or part.startswith(("pip install -e ", "python -m fdg_jax.main "))


def test_the_picture_is_the_schedules():
    (picture,) = [text for language, text in BLOCKS if language == "text"]
    assert picture.rstrip() == schedules.show(schedules.fdg(3), 6)


def test_what_is_installed_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for line in COMMANDS for name in re.findall(r'"\.\[(\w+)\]"', line)}
    assert named == {"cuda12", "cuda13", "dev"} == set(extras)


def test_the_training_commands_reach_what_is_promised(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}

    def start(number, line):
        words = shlex.split(line.replace("=runs/digits", f"={tmp_path / '0'}"))
        if "--workdir" in words:
            del words[words.index("--workdir") : words.index("--workdir") + 2]
        if "digits" not in line and ":smoke" not in line:  # what takes days is tried by the variant that takes seconds
            words = [word + ":smoke" if word.startswith("experiments/") else word for word in words]
        if "beta" in line:  # of which no accuracy is promised
            words.append("--config.epochs=5")
        command = [sys.executable, *words[1:], "--workdir", str(tmp_path / str(number))]
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)

    later = [line for line in TRAININGS if "init_from" in line]  # they need the weights of the first
    assert TRAININGS[0] == "python -m fdg_jax.main --config experiments/digits.py"
    for lines in ([line for line in TRAININGS if line not in later], later):
        processes = [start(TRAININGS.index(line), line) for line in lines]
        for line, process in zip(lines, processes, strict=True):
            stdout, _ = process.communicate()
            assert process.returncode == 0
            if "digits" in line:
                accuracy = float(re.search(r"test accuracy ([\d.]+) %", stdout.splitlines()[-1]).group(1))
                assert accuracy >= (98.0 if "beta" not in line else 90.0)


def test_the_library_examples(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training, saving, fused = [text for language, text in BLOCKS if language == "python"]
    names = {}
    exec(compile(training, "README.md", "exec"), names)
    before = names["params"]
    exec(compile(saving, "README.md", "exec"), names)
    assert names["notes"] == {"batches": 100}
    assert_trees_close(names["pipe"].params(names["state"]), before, 0)
    accuracy = (names["logits"].argmax(-1) == names["source"].test_labels).mean()
    assert accuracy > 0.95
    assert len(names["params"]) == len(names["layers"])
    assert "stage 0" in capsys.readouterr().out
    assert {own.batch.device for own in names["state"].stages} == set(jax.devices()[:2])
    exec(compile(fused, "README.md", "exec"), names)
    assert names["metrics"]["loss"].shape == (200 - 3,)
    assert names["metrics"]["accuracy"][-20:].mean() > 0.8
    assert {own.batch.device for own in names["state"].stages} == {jax.devices()[0]}


def test_the_map_names_files_that_exist():
    table = README[README.index("## Map of the code") : README.index("## What is not there yet")]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`([\w./]+)`", cell)]
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "fdg_jax" / name).exists(), name
    missing = {path.name for path in (ROOT / "fdg_jax").glob("*.py")} - set(named) - {"__init__.py", "names.py"}
    assert not missing
