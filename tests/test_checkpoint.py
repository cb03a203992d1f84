import json
import pickle
import shutil
import struct
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # names bfloat16 and its like to NumPy
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close, make_pipeline, run, tiny_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax import checkpoint, models
from fdg_jax.backward import Memo
from fdg_jax.checkpoint import Checkpoints, Weights, load_weights, read_checkpoint, save_weights
from fdg_jax.engine.base import StageState, State
from fdg_jax.sealed import MANIFEST, Damaged, seal, verify
from fdg_jax.snapshot import Snapshot, put, take


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


# Checkpoints


def numbered(*arrays):
    """A snapshot of arrays alone."""
    described = [{"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name} for leaf in arrays]
    return Snapshot(list(arrays), {"arrays": described})


def save(checkpoints, step, snapshot=None, **notes):
    """Writes one and waits: how it ended."""
    checkpoints.save(step, snapshot or numbered(np.arange(step + 1)), notes)
    checkpoints.wait()
    (outcome,) = checkpoints.outcomes()
    return outcome


def steps(checkpoints):
    return [int(path.name.removeprefix("step_")) for path in checkpoints.complete()]


DTYPES = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int32", "uint32", "int64"]


@st.composite
def arrays(draw):
    """Of any bits: NaNs with payloads, infinities and negative zeros among them."""
    dtype = np.dtype(draw(st.sampled_from([*DTYPES, "bool", "complex64"])))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    num_bytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
    if dtype.kind == "b":
        data = bytes(byte % 2 for byte in data)
    return np.frombuffer(data, dtype).reshape(shape)


@settings(deadline=None, max_examples=8)
@given(leaves=st.lists(arrays(), min_size=1, max_size=6), notes=st.dictionaries(st.text(max_size=3), st.integers()))
def test_arrays_of_any_shape_and_dtype_come_back_to_the_bit(tmp_path_factory, leaves, notes):
    leaves = [*leaves, np.zeros((3, 0), np.int8), np.zeros(4, np.uint32)]  # a stage always has its counts
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run") / "checkpoints")
    assert save(checkpoints, 1, numbered(*leaves), **{"n": notes}).error is None
    snapshot, found = read_checkpoint(checkpoints.path(1))
    assert found == {"n": notes}
    for leaf, wanted in zip(snapshot.arrays, leaves, strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.tobytes() == wanted.tobytes()


def test_every_kind_of_leaf_comes_back_with_its_type(tmp_path):
    """Typed keys of every implementation, weak types, what is empty, and NumPy's arrays, which go onto the device."""
    opt_state = {
        "keys": {impl: jax.random.key(3, impl=impl) for impl in ("threefry2x32", "rbg", "unsafe_rbg")},
        "many keys": jax.random.split(jax.random.key(1), 3),
        "weak": [jnp.asarray(1.5), jnp.asarray(-2), jax.jit(lambda x: 2 * x)(0.1)],
        "strong": [jnp.float32(1.5), jnp.int32(-2), jnp.asarray(True)],
        "small": [jnp.asarray([1.5, -0.0], "bfloat16"), jnp.asarray([-128, 127], "int8"), jnp.asarray([True, False])],
        "empty": [jnp.zeros((0, 3)), jnp.zeros((2, 0), "int8")],
        "numpy": [np.arange(3, dtype=np.int16), np.float32(7)],
    }
    assert [leaf.weak_type for leaf in opt_state["weak"]] == [True] * 3
    params = [{"w": jnp.ones((2, 3))}]
    own = StageState(params, [], opt_state, jax.random.key(0), jnp.zeros(4, "uint32"), {"loss": jnp.float32(2)})
    state = State(3, 1, (own,), {}, {}, {(0, 2): Memo([jnp.zeros(())], [params[0]["w"]])})
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert save(checkpoints, 3, take(state)).error is None
    snapshot, _ = read_checkpoint(checkpoints.path(3))
    again = put(snapshot, state, jax.devices()[1:2], [None])
    assert (again.fed, again.origin, again.memos.keys()) == (3, 1, state.memos.keys())
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for leaf, wanted in zip(
        jax.tree.leaves((again.stages, again.memos)), jax.tree.leaves((state.stages, state.memos)), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.device == jax.devices()[1]
        assert getattr(leaf, "weak_type", False) == getattr(wanted, "weak_type", False)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(leaf) == jax.random.key_impl(wanted)
            leaf, wanted = jax.random.key_data(leaf), jax.random.key_data(wanted)
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes()
    assert again.memos[0, 2].held[0] is again.stages[0].params[0]["w"]


def test_before_the_first_checkpoint_there_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.complete() == []
    assert not checkpoints.busy
    checkpoints.wait()
    checkpoints.sweep()
    assert checkpoints.outcomes() == []
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("errors", "keep_last", "keep_best", "kept"),
    [
        ([None] * 4, 2, 0, [3, 4]),
        ([None] * 4, 1, 1, [4]),
        ([0.5, 0.1, 0.4, 0.3], 1, 1, [2, 4]),
        ([0.5, 0.1, 0.4, 0.3], 1, 2, [2, 4]),  # the best two are the newest and another
        ([0.5, 0.4, 0.3, 0.1], 2, 2, [3, 4]),
        ([0.1, 0.2, 0.3, 0.4], 1, 2, [1, 2, 4]),
        ([0.2, 0.2, 0.2, 0.2], 1, 1, [1, 4]),  # of equals the one that got there first
        ([0.2, None, 0.1, None], 1, 1, [3, 4]),
        ([float("nan"), 0.3, 0.4, 0.5], 1, 1, [2, 4]),
        ([0.3, 0.4, float("nan"), 0.5], 1, 2, [1, 2, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(errors, keep_last, keep_best, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_save_tree", lambda folder, tree: folder.mkdir())  # what Orbax writes is no matter
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last, keep_best)
    for step, error in enumerate(errors, 1):
        assert save(checkpoints, step, test_error=error).error is None
        assert checkpoints.complete()[-1] == checkpoints.path(step)
    assert steps(checkpoints) == kept
    for path in checkpoints.complete():
        verify(path)


def test_what_is_set_aside_counts_no_more_and_is_not_lost(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=3)
    for step in (1, 2):
        save(checkpoints, step)
    for _ in range(3):
        checkpoints.set_aside(checkpoints.path(2))
        assert steps(checkpoints) == [1]
        save(checkpoints, 2)
    names = {path.name for path in checkpoints.folder.iterdir()}
    assert len(names) == 2 + 3
    assert sum(name.startswith("step_000000002.damaged") for name in names) == 3
    checkpoints.sweep()
    assert {path.name for path in checkpoints.folder.iterdir()} == names


def test_what_was_cut_off_does_not_count_and_is_swept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    save(checkpoints, 1)
    for name in ("step_000000002.partial", "step_000000000.removed"):
        shutil.copytree(checkpoints.path(1), checkpoints.folder / name)
    assert steps(checkpoints) == [1]
    checkpoints.sweep()
    assert list(checkpoints.folder.iterdir()) == [checkpoints.path(1)]
    read_checkpoint(checkpoints.path(1))


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for value in (1, 2):
        save(checkpoints, 5, numbered(np.full(3, value)), value=value)
    snapshot, notes = read_checkpoint(checkpoints.path(5))
    assert (snapshot.arrays[0].tolist(), notes) == ([2, 2, 2], {"value": 2})


def test_saving_does_not_wait_for_the_disk_but_for_the_one_before(tmp_path, monkeypatch):
    awaited, written = threading.Event(), []

    class Thread(threading.Thread):
        def join(self, timeout=None):
            awaited.set()
            super().join(timeout)

    def write(folder, tree):
        step = int(folder.parent.name[len("step_") :].removesuffix(".partial"))
        assert step == 2 or awaited.wait(60)
        assert written == list(range(1, step))
        written.append(step)
        folder.mkdir()

    monkeypatch.setattr(checkpoint, "_save_tree", write)
    monkeypatch.setattr(checkpoint.threading, "Thread", Thread)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, numbered(np.arange(1)), {})
    assert checkpoints.busy
    assert (steps(checkpoints), checkpoints.outcomes()) == ([], [])
    checkpoints.save(2, numbered(np.arange(2)), {})
    checkpoints.wait()
    assert not checkpoints.busy
    assert [(outcome.step, outcome.error) for outcome in checkpoints.outcomes()] == [(1, None), (2, None)]
    assert (steps(checkpoints), checkpoints.outcomes()) == ([1, 2], [])


def fail_to_write(folder, tree):
    (folder.parent / "half").write_text("half")
    raise OSError(28, "No space left on device", str(folder))


def fail_at_length(folder, tree):
    raise RuntimeError("a reason\nand then\nmuch more")


@pytest.mark.parametrize(
    ("failure", "notes", "error"),
    [
        (fail_to_write, {}, "No space left on device"),
        (fail_at_length, {}, "a reason"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_told_of_in_a_line_and_leaves_the_others(
    failure, notes, error, tmp_path, monkeypatch
):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    save(checkpoints, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_save_tree", failure)
        outcome = save(checkpoints, 2, **notes)
    assert (outcome.step, outcome.folder, outcome.error) == (2, checkpoints.path(2), error)
    assert list(checkpoints.folder.iterdir()) == [checkpoints.path(1)]
    read_checkpoint(checkpoints.path(1))
    assert save(checkpoints, 3).error is None
    assert steps(checkpoints) == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_last": 0}, "keep_last must be at least 1, keep_best at least 0; got 0 and 0"),
        ({"keep_last": -1}, "got -1 and 0"),
        ({"keep_best": -1}, "got 2 and -1"),
    ],
)
def test_what_would_keep_nothing_is_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("step", "notes", "message"),
    [
        (-3, {}, "step must be at least 0; got -3"),
        (1.5, {}, "'float' object cannot be interpreted as an integer"),
        (1, {"note": {1, 2}}, "Object of type set is not JSON serializable"),
    ],
)
def test_a_step_or_notes_that_cannot_be_are_refused_where_they_are_given(step, notes, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        save(Checkpoints(tmp_path), step, **notes)
    assert list(tmp_path.iterdir()) == []


def test_steps_of_any_length_are_in_order_and_folders_are_made(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "new" / "checkpoints"), keep_last=2)
    for step in (999_999_999, 10**10, 2 * 10**9):
        save(checkpoints, step, numbered(np.arange(3)))
    assert steps(checkpoints) == [2 * 10**9, 10**10]
    read_checkpoint(str(checkpoints.path(10**10)))


def test_where_no_folder_can_be_made_the_outcome_says_so(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    assert save(Checkpoints(tmp_path / "checkpoints"), 1).error in ("Not a directory", "File exists")


def test_an_unfit_snapshot_is_not_written_and_nothing_retires_for_it(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    save(checkpoints, 1)
    seen = []
    checkpoints.save(2, numbered(jnp.arange(3)), {}, unfit=lambda snapshot: seen.append(snapshot) or True)
    checkpoints.wait()
    assert checkpoints.outcomes() == []
    assert steps(checkpoints) == [1]
    assert [type(leaf) for leaf in seen[0].arrays] == [np.ndarray]


# What is damaged, and what is made up


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run") / "checkpoints")
    pipe = make_pipeline()
    state, _ = run(pipe, tiny_batches(5), drain=False)
    assert save(checkpoints, 5, pipe.snapshot(state)).error is None
    return checkpoints.path(5)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_damage_is_found_before_orbax_reads_anything(written, data):
    name = data.draw(st.sampled_from(sorted(str(p.relative_to(written)) for p in written.rglob("*") if p.is_file())))
    path, whole = written / name, (written / name).read_bytes()
    place = data.draw(st.integers(0, max(0, len(whole) - 1)))
    kind = data.draw(st.sampled_from(["cut", "flip", "missing"] if whole else ["missing"]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(checkpoint.orbax, "load", lambda *_: pytest.fail("Orbax was called"))
        try:
            if kind == "cut":
                path.write_bytes(whole[:place])
            elif kind == "flip":
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 128]) + whole[place + 1 :])  # no longer ASCII
            else:
                path.unlink()
            with pytest.raises(Damaged, match=f"^{written} is damaged.*{name}") as refused:
                read_checkpoint(written)
            assert "\n" not in str(refused.value)
        finally:
            path.write_bytes(whole)


def forged(written, folder, change):
    """A copy that was changed and sealed anew, as by somebody who means harm."""

    def fill(inside):
        shutil.copytree(written, inside, dirs_exist_ok=True)
        (inside / MANIFEST).unlink()
        change(inside)

    seal(folder, fill)
    verify(folder)
    return folder


def rewrite(path, change):
    """Changes JSON in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_copy_sealed_anew_is_read(written, tmp_path):
    one, other = read_checkpoint(written), read_checkpoint(forged(written, tmp_path / "step", lambda inside: None))
    assert one[0].record == other[0].record
    assert_trees_close(other[0].arrays, one[0].arrays, 0)


@pytest.mark.parametrize("kind", ["dict", "string"])
def test_a_handler_that_a_checkpoint_names_is_not_imported(kind, written, tmp_path, monkeypatch):
    (tmp_path / "harmful.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'harm')!r}).touch()\nclass Handler: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def change(inside):
        for path in inside.rglob("_*METADATA"):
            text = path.read_text().replace("np.ndarray", "harmful.Handler").replace("jax.Array", "harmful.Handler")
            path.write_text(text)
        handlers = {"state": "harmful.Handler"} if kind == "dict" else "harmful.Handler"
        rewrite(inside / "arrays" / "_CHECKPOINT_METADATA", lambda value: value.update(item_handlers=handlers))

    attempt(forged(written, tmp_path / "step", change))
    assert "harmful" not in sys.modules
    assert not (tmp_path / "harm").exists()


def attempt(folder):
    """Why it is refused, which is one line; None where it is read."""
    try:
        read_checkpoint(folder)
    except Damaged as damaged:
        message = str(damaged)
    else:
        return None
    assert message.startswith(f"{folder} cannot be read: ")
    assert "\n" not in message
    return message


class Harmful:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dtype", [None, "object", "void", "V8", "datetime64[s]", "no dtype", "f4,f4"])
def test_no_pickle_is_read_whatever_the_record_says_the_arrays_are(dtype, written, tmp_path):
    data = pickle.dumps(Harmful(tmp_path / "harm"))

    def change(inside):
        for path in (inside / "arrays").rglob("*"):
            if path.is_file() and path.parent.name == "d" and dtype is None:
                path.write_bytes(data)
        if dtype:
            rewrite(inside / "record.json", lambda value: [a.update(dtype=dtype) for a in value["snapshot"]["arrays"]])

    assert attempt(forged(written, tmp_path / "step", change))
    assert not (tmp_path / "harm").exists()
    pickle.loads(data)
    assert (tmp_path / "harm").exists()  # it would have done harm


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.clear(),
        lambda value: value.pop("notes"),
        lambda value: value["snapshot"].pop("arrays"),
        lambda value: value["snapshot"].update(arrays=None),
        lambda value: value["snapshot"]["arrays"][1].update(shape=[-1]),
        lambda value: value["snapshot"]["arrays"][1].update(shape="../.."),
        lambda value: value["snapshot"]["arrays"][1].update(shape=[2**62, 2**62]),
        lambda value: value["snapshot"]["arrays"].append({"shape": [3], "dtype": "float32"}),
        lambda value: value["snapshot"]["arrays"][1].update(shape=[6, 6]),
    ],
)
def test_a_record_that_is_not_of_its_arrays_is_refused(change, written, tmp_path):
    assert attempt(forged(written, tmp_path / "step", lambda inside: rewrite(inside / "record.json", change)))


def test_names_in_a_checkpoint_do_not_lead_out_of_it(written, tmp_path):
    """TensorStore's index names the files that hold the arrays; here one outside, with what belongs in it."""

    def change(inside):
        index = inside / "arrays" / "state" / "manifest.ocdbt"
        raw = index.read_bytes()
        start = raw.index(b"d/")
        name = raw[start : start + 34]
        outside = f"../../../{moved.name}".encode()
        shutil.move(index.parent / name.decode(), moved)
        raw = raw[:-4].replace(name, outside)
        index.write_bytes(raw + struct.pack("<I", crc32c(raw)))

    moved = tmp_path / ("e" * 25)
    message = attempt(forged(written, tmp_path / "step", change))
    assert (tmp_path / "step" / "arrays" / "state" / "../../.." / moved.name).exists()
    assert message is not None
    assert "Invalid key" in message


def crc32c(data):
    """The checksum that TensorStore ends its index with."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("name", ["../0", "/0", "0/../../0"])
def test_names_in_the_metadata_do_not_lead_out_of_it(name, written, tmp_path):
    def change(inside):
        def rename(value):
            tree = value["tree_metadata"]
            (entry,) = tree.values()
            tree.clear()
            tree[str((name,))] = {**entry, "key_metadata": [{"key": name, "key_type": 2}]}

        rewrite(inside / "arrays" / "state" / "_METADATA", rename)

    assert attempt(forged(written, tmp_path / "step", change))


def test_weights_that_are_damaged_are_refused(tmp_path):
    save_weights(tmp_path / "params", Weights([{"w": np.ones(3, np.float32)}], [{}]))
    (path,) = (tmp_path / "params").rglob("_METADATA")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match=r"params is damaged: weights/.*_METADATA is cut short"):
        load_weights(tmp_path / "params")
