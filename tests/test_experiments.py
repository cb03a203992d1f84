"""Every file under experiments/ can be read, says what it is, and trains for two ticks."""

import ast
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from fdg_jax.config import resolve
from fdg_jax.train import build

FILES = sorted((Path(__file__).parents[1] / "experiments").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_trains(path):
    settings = resolve(load(path).get_config())
    pipe, source = build(settings)
    state = pipe.init(jax.random.key(settings.seed), source.batch(0, 0, settings.batch_size)[0])
    for i in range(2):
        state, _ = pipe.step(state, source.batch(settings.seed, i, settings.batch_size))
    state, _ = pipe.drain(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pipe.params(state)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_says_its_command_and_result(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python -m fdg_jax.main --config experiments/{path.name}" in docstring
    assert "Expected:" in docstring
