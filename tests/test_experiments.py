"""Every file under experiments/ can be read, says what it is, and trains for two ticks."""

import ast
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from fdg_jax import models
from fdg_jax.build import build
from fdg_jax.config import OptimSettings, resolve

ALL = sorted((Path(__file__).parents[1] / "experiments").glob("*.py"))
FILES = [path for path in ALL if not path.stem.startswith("compare_")]  # the others are in test_compare.py


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_can_be_read(path):
    """The keys exist and their values fit one another; what the variants make of it, too."""
    module = load(path)
    settings = resolve(module.get_config())
    if settings.cuts == "published":
        cuts = models.published_cuts(
            settings.model.name, settings.model.depth, settings.model.width, settings.num_stages
        )
        assert len(cuts) == settings.num_stages - 1
    assert resolve(module.get_config("smoke")).data.source == "digits"
    if "cifar10" in path.stem or "wrn" in path.stem:  # CIFAR-100 too
        beta = f"(beta {settings.method.beta:g})"
        assert beta in ast.get_docstring(ast.parse(path.read_text()))
        warmup = 3.0 if path.stem.endswith("resnet110") else 0.0
        assert settings.optim == OptimSettings(
            "sgd", 0.1, 0.9, False, 5e-4, "piecewise", (150, 225, 275), 0.1, warmup, 0.1
        )
        assert (settings.epochs, settings.batch_size, settings.method.policy) == (300, 128, "stash")
        assert (settings.data.crop_padding, settings.data.flip) == (4, True)
    with pytest.raises(ValueError, match="unknown variant 'smok'; did you mean 'smoke'"):
        module.get_config("smok")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_trains(path):
    """The smoke variant, for two ticks and the draining: data, network, method and recipe fit together."""
    settings = resolve(load(path).get_config("smoke"))
    pipe, source = build(settings)
    state = pipe.init(jax.random.key(settings.seed), source.batch(0, 0, settings.batch_size)[0])
    for i in range(2):
        state, _ = pipe.step(state, source.batch(settings.seed, i, settings.batch_size))
    state, _ = pipe.drain(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pipe.params(state)))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_an_experiment_says_its_command_and_result(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python -m fdg_jax.main --config experiments/{path.name}" in docstring
    assert "Expected" in docstring
