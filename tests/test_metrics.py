import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from fdg_jax.metrics import MetricWriter, masked_sums, softmax_cross_entropy

LOGITS = jnp.array([[2.0, 0.0, -1.0], [0.0, 0.5, 0.0], [1.0, 1.0, 3.0], [0.0, 4.0, 0.0]])
TARGETS = jnp.array([0, 2, 2, 0])


def test_softmax_cross_entropy_is_minus_the_log_likelihood():
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    expected = -np.log(probabilities[np.arange(4), TARGETS]).mean()
    loss, metrics = softmax_cross_entropy(LOGITS, TARGETS)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["accuracy"]) == 0.5
    half, _ = softmax_cross_entropy(LOGITS.astype(jnp.bfloat16), TARGETS)
    assert half.dtype == jnp.float32


def test_large_logits_do_not_overflow():
    loss, _ = softmax_cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    assert float(loss) == 2e4


def test_masked_sums_leave_padding_out():
    mask = jnp.array([True, True, True, False])
    sums = masked_sums(softmax_cross_entropy, LOGITS, TARGETS, mask)
    loss, metrics = softmax_cross_entropy(LOGITS[:3], TARGETS[:3])
    assert float(sums["loss"]) == pytest.approx(3 * float(loss), rel=1e-6)
    assert float(sums["accuracy"]) == pytest.approx(3 * float(metrics["accuracy"]), rel=1e-6)
    assert float(sums["count"]) == 3
    broken = LOGITS.at[3].set(jnp.nan)
    np.testing.assert_array_equal(
        jax.tree.leaves(masked_sums(softmax_cross_entropy, broken, TARGETS, mask)), jax.tree.leaves(sums)
    )


def read_events(folder):
    """(step, tag, value) of every scalar in the folder's event files: records of length, check, data, check."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 12 + length + 4
    return found


def test_numbers_go_to_both_files(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(10, 0.5, 1.23456, {"train/loss": 2.0, "train/accuracy": 0.25})
    writer.write(20, 1.0, 2.0, {"train/loss": float("inf"), "test/loss": 1.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 10, "epoch": 0.5, "time_s": 1.235, "train/loss": 2.0, "train/accuracy": 0.25},
        {"step": 20, "epoch": 1.0, "time_s": 2.0, "train/loss": None, "test/loss": 1.0},
    ]
    assert read_events(tmp_path) == [
        (10, "train/loss", 2.0),
        (10, "train/accuracy", 0.25),
        (20, "train/loss", float("inf")),
        (20, "test/loss", 1.0),
    ]
