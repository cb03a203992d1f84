"""The table of all methods against rows written by hand, and docs/methods.md against the code."""

import inspect
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import assert_trees_close

from fdg_jax import methods, methods_table, models, softmax_cross_entropy
from fdg_jax.corrections import CORRECTIONS
from fdg_jax.data import digits
from fdg_jax.methods_table import LEGEND, catalogue, describe, table

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "methods.md").read_text()

# For K = 3 and M = 4: locks broken, D_k, tau_k, answers with, memos, of, versions, heads, forwards again, used.
# Times in units of a forward: a stage's share of a batch is 3. GPipe: M of M + K - 1 turns. DDG: the forwards of stages
# 0 and 1, then 1 + 2 of stage 2 beside the backwards of the others; Features Replay: these take 1 + 2 as well.
NONE, ALL, NOT_FORWARD = "- - -", "F B U", "- B U"
EXPECTED = {
    "bp": (NONE, "4 2 0", "0 0 0", "the same", "1 1 1", "activations", "1 1 1", "0", "0", Fraction(1, 3)),
    "gpipe, M = 4": (NONE, "7 5 3", "0 0 0", "the same", "4 4 4", "activations", "1 1 1", "0", "0", Fraction(4, 6)),
    "one_f_one_b, M = 4": (
        *(NONE, "6 3 0", "0 0 0", "the same", "3 2 1", "activations", "1 1 1", "0", "0"),
        Fraction(4, 6),
    ),
    "ddg": (NOT_FORWARD, "8 4 0", "2 1 0", "the forward's", "3 2 1", "activations", "3 2 1", "0", "0", Fraction(3, 5)),
    "features_replay": (
        *(NOT_FORWARD, "8 4 0", "2 1 0", "today's", "3 2 1", "inputs", "1 1 1", "0", "1 1 0"),
        Fraction(3, 5),
    ),
    "fdg": (ALL, "4 2 0", "3 1 0", "the forward's", "4 2 1", "activations", "4 2 1", "0", "0", 1),
    "fdg, current": (ALL, "4 2 0", "3 1 0", "today's", "4 2 1", "activations", "1 1 1", "0", "0", 1),
    "fdg, recompute": (ALL, "4 2 0", "3 1 0", "today's", "4 2 1", "inputs", "1 1 1", "0", "1 1 0", Fraction(3, 4)),
    "adl, M = 4": (ALL, "4 2 0", "0-1 0-1 0", "the forward's", "4 2 1", "activations", "2 2 1", "0", "0", 1),
    "pipelined_bp": (ALL, "4 2 0", "4 2 0", "today's", "5 3 1", "activations", "1 1 1", "0", "0", 1),
    "pipedream": (ALL, "5 3 0", "2 1 0", "the forward's", "3 2 1", "activations", "3 2 1", "0", "0", 1),
    "pipedream, vertical sync": (ALL, "5 3 0", "2 2 2", "the forward's", "3 2 1", "activations", "3 3 3", "0", "0", 1),
    "pipedream_2bw, M = 4": (ALL, "5 3 0", "1 1 1", "the forward's", "3 2 1", "activations", "2 2 2", "0", "0", 1),
    "dgl": (ALL, "0 0 0", "0 0 0", "the same", "1 1 1", "activations", "1 1 1", "1 1 0", "0", 1),
    "dni": (ALL, "0 0 0", "0 0 0", "the same", "2 2 1", "activations", "1 1 1", "1 1 0", "0", 1),
}


def in_words(row):
    """A row as it is written above."""

    def each(numbers):
        return " ".join(map(str, numbers))

    late = [str(most) if least == most else f"{least}-{most}" for least, most in row.stalenesses]
    return (
        *(str(row.locks), each(row.delay), " ".join(late), row.answers_with, each(row.memos), row.memo),
        *(each(row.versions), each(row.heads) if any(row.heads) else "0"),
        *(each(row.forwards_again) if any(row.forwards_again) else "0", row.utilisation),
    )


ROWS = {row.label: row for row in (describe(method, 3) for method in catalogue(3))}


def test_every_preset_has_a_row():
    assert {row.split(",")[0] for row in ROWS} == set(methods.PRESETS)
    assert set(ROWS) == set(EXPECTED)


@pytest.mark.parametrize("label", EXPECTED)
def test_a_row_written_by_hand(label):
    *facts, used = in_words(ROWS[label])
    *expected, share = EXPECTED[label]
    assert facts == expected
    assert used == pytest.approx(float(share))


def test_vertical_sync_keeps_older_weights_for_forwards_whatever_answers():
    """Of the batches that stage 0 met k updates ago; under stash those that memos refer to besides."""
    for policy in ("current", "recompute"):
        assert describe(methods.pipedream(policy, vertical_sync=True), 4).versions == (1, 2, 3, 4)


@pytest.mark.parametrize("num_stages", [1, 2, 5, 8])
def test_the_locks_are_those_of_the_method_whatever_the_number_of_stages(num_stages):
    for method in catalogue(num_stages):
        row = describe(method, num_stages)
        (three,) = [other for label, other in ROWS.items() if label.split(" = ")[0] == row.label.split(" = ")[0]]
        assert row.locks == three.locks
        assert len(row.delay) == len(row.versions) == num_stages
        assert 0 < row.utilisation <= 1 + 1e-9
        if num_stages == 1:
            assert row.utilisation == pytest.approx(1)


def test_the_command_prints_the_table(tmp_path):
    """And nothing else: the module has been imported by the package before."""
    command = (sys.executable, "-W", "error", "-m", "fdg_jax.methods")
    done = subprocess.run([*command, "--num_stages", "2"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{table(2)}\n\n{LEGEND}\n"
    wrong = subprocess.run([*command, "--num_stages=0"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode != 0
    assert wrong.stderr == "fdg_jax: a schedule needs at least one stage; got num_stages=0\n"


def test_a_reader_that_has_enough_ends_it_quietly(monkeypatch):
    """As `| head` does; nothing is left to write when Python ends."""
    monkeypatch.setattr(sys, "argv", ["methods"])
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        methods_table.main()


def test_the_docs_show_the_table_and_name_everything():
    (shown,) = re.findall(r"^```text\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    assert shown.rstrip() == table(3)
    for name in (*methods.PRESETS, *CORRECTIONS):
        assert f"`{name}`" in DOCS
    for name, correction in CORRECTIONS.items():
        (line,) = [line for line in DOCS.splitlines() if line.startswith(f"| `{name}`")]
        typed = [key for key in inspect.signature(correction).parameters if key != "build"]  # that is a function
        assert all(f"`{key}`" in line for key in typed), name


def test_the_method_of_ones_own_does_what_it_says(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(code, "methods.md", "exec"), names)
    assert "2 updates" in capsys.readouterr().out
    row = describe(names["method"], 3)
    assert (row.delay, row.stalenesses, row.versions) == ((14, 12, 10), ((2, 2),) * 3, (3, 3, 3))
    assert_trees_close(names["pipe"].params(names["state"]), late_descent(num_batches=20, batches=2), 1e-5)


def late_descent(num_batches, batches):
    """W_{t+1} = W_t - rate * grad f_t(W_{t-batches}), the first gradients all in W_0, with one jax.grad a batch."""
    layers = models.mlp(depth=2, width=16, in_shape=(8, 8, 1), rngs=nnx.Rngs(0))[1:]
    splits = [nnx.split(layer) for layer in layers]
    graphs, params = [graph for graph, _ in splits], [nnx.to_pure_dict(state) for _, state in splits]
    states = [state for _, state in splits]

    def loss(params, images, labels):
        x = jnp.reshape(images, (len(images), -1))
        for graph, state, values in zip(graphs, states, params, strict=True):
            nnx.replace_by_pure_dict(state, values)
            x = nnx.merge(graph, state)(x)
        return softmax_cross_entropy(x, labels)[0]

    source, optimizer = digits(), optax.sgd(0.05)
    history = [params]
    for i in range(num_batches):
        gradient = jax.grad(loss)(history[max(0, i - batches)], *source.batch(seed=0, i=i, batch_size=64))
        updates, _ = optimizer.update(gradient, optimizer.init(params))
        history.append(optax.apply_updates(history[-1], updates))
    return [{}, *history[-1]]
