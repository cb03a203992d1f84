import jax
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close, make_pipeline, run, tiny_batches

from fdg_jax import models
from fdg_jax.checkpoint import Weights, load_weights, save_weights


class Nested(nnx.Module):
    """With a list inside, whose numbers are keys of the parameters."""

    def __init__(self):
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=nnx.Rngs(i)) for i in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_saved_weights_come_back_and_predict_the_same(tmp_path):
    network = models.resnet_cifar(8, rngs=nnx.Rngs(1), width=2, num_classes=3, in_shape=(4, 4, 1))
    pipe = make_pipeline(network, num_stages=3)
    batches = tiny_batches(4, (4, 4, 1))
    state, _ = run(pipe, batches)
    weights = Weights(pipe.params(state), pipe.module_state(state))
    save_weights(tmp_path / "params", weights)
    loaded = load_weights(tmp_path / "params", like=weights)
    assert_trees_close(loaded, weights, 0)
    assert_trees_close(load_weights(tmp_path / "params"), weights, 0)
    other = make_pipeline(network, num_stages=1)
    again = other.init(jax.random.key(5), batches[0][0], loaded.params, loaded.module_state)
    np.testing.assert_array_equal(other.predict(again, batches[0][0]), pipe.predict(state, batches[0][0]))


def test_keys_that_are_numbers_need_the_likeness(tmp_path):
    weights = Weights([nnx.to_pure_dict(nnx.state(Nested()))], [{}])
    save_weights(tmp_path / "params", weights)
    assert_trees_close(load_weights(tmp_path / "params", like=weights), weights, 0)
    assert list(load_weights(tmp_path / "params").params[0]["layers"]) == ["0", "1"]


def test_nothing_is_overwritten(tmp_path):
    weights = Weights([{"w": np.ones(3, np.float32)}], [{}])
    save_weights(tmp_path / "params", weights)
    with pytest.raises(ValueError, match="already exists"):
        save_weights(tmp_path / "params", Weights([{"w": np.zeros(3, np.float32)}], [{}]))
    assert_trees_close(load_weights(tmp_path / "params", like=weights), weights, 0)
