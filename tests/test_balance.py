import jax
import jax.numpy as jnp
import pytest
from helpers import make_pipeline, tiny_batches, tiny_mlp

from fdg_jax import balance
from fdg_jax.balance import Balance, balanced_cuts, layer_seconds


def clocked(monkeypatch, seconds_of):
    """Replaces the clock by one that a layer's call moves by what the test says, round by round."""
    now = [0.0]
    calls = []

    def measured(layer, *args):
        calls.append(layer.name)

        def call():
            now[0] += seconds_of(len(calls), layer)

        return call

    monkeypatch.setattr(balance, "_call", measured)
    monkeypatch.setattr(balance.time, "perf_counter", lambda: now[0])
    return calls


def test_equal_layers_are_measured_once_and_the_median_counts(monkeypatch):
    jitter = iter([0.0] * 3 + [9.0] * 3 + [1.0] * 3)  # of three rounds
    calls = clocked(monkeypatch, lambda _, layer: {"Hidden": 2.0, "Linear": 5.0}[layer.name] + next(jitter))
    network = tiny_mlp(4)  # the first hidden layer is wider than the three that follow
    assert layer_seconds(network, tiny_batches(1)[0][0], rounds=3) == [3.0, 3.0, 3.0, 3.0, 6.0]
    assert calls == ["Hidden", "Hidden", "Linear"]


def test_cuts_make_the_slowest_stage_fastest(monkeypatch):
    clocked(monkeypatch, lambda _, layer: {"Hidden": 2.0, "Linear": 5.0}[layer.name])
    found = balanced_cuts(tiny_mlp(4), tiny_batches(1)[0][0], 2)
    assert found == Balance((3,), (2.0, 2.0, 2.0, 2.0, 5.0))
    assert found.stage_seconds == [6.0, 7.0]
    assert (
        str(found) == "cuts (3,) balanced by measurement: 6000.0, 7000.0 ms a stage for forward and backward of a batch"
    )


def test_any_layer_can_be_measured_anywhere():
    """Whole numbers between layers, layers without parameters, another device."""
    network = [lambda x: {"x": x, "i": jnp.arange(4)}, lambda t: t["x"], *tiny_mlp()]
    seconds = layer_seconds(network, tiny_batches(1)[0][0], jax.devices()[1], rounds=1)
    assert len(seconds) == 6
    assert all(s > 0 for s in seconds)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"num_stages must lie in 1\.\.4"):
        balanced_cuts(tiny_mlp(3), tiny_batches(1)[0][0], 5, rounds=1)


def test_measured_cuts_cut_a_pipeline():
    inputs = tiny_batches(1)[0][0]
    found = balanced_cuts(tiny_mlp(3), inputs, 3, rounds=1)
    assert make_pipeline(tiny_mlp(3), cuts=found.cuts).num_stages == 3
