import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdg_jax import sealed
from fdg_jax.sealed import MANIFEST, PARTIAL, REMOVED, Damaged, remove, seal, sweep, verify

OLD = {"record.json": b'{"step": 1}', "arrays/0/data": bytes(range(40)), "arrays/empty": b""}
NEW = {"record.json": b'{"step": 2}', "arrays/1/data": bytes(range(40, 0, -1)), "weights/w": b"w"}
LISTED = [*OLD, MANIFEST]


def filler(files):
    def fill(inside):
        for name, data in files.items():
            (inside / name).parent.mkdir(parents=True, exist_ok=True)
            (inside / name).write_bytes(data)

    return fill


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files_of(folder):
    """What was sealed in a folder that verifies."""
    verify(folder)
    found = contents(folder)
    del found[MANIFEST]
    return found


@pytest.fixture
def folder(tmp_path):
    seal(tmp_path / "step", filler(OLD))
    return tmp_path / "step"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One for many examples, each of which puts right what it damaged."""
    folder = tmp_path_factory.mktemp("sealed") / "step"
    seal(folder, filler(OLD))
    return folder


def test_what_is_sealed_is_what_was_filled_in_and_nothing_lies_beside_it(folder):
    assert files_of(folder) == OLD
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("name", LISTED)
def test_a_file_cut_short_is_refused_at_every_length(name, shared):
    whole = (shared / name).read_bytes()
    try:
        for length in range(len(whole)):
            (shared / name).write_bytes(whole[:length])
            with pytest.raises(Damaged, match=f"is damaged: {name} (is cut short|cannot be read)$") as refused:
                verify(shared)
            assert str(refused.value).startswith(f"{shared} is damaged")
    finally:
        (shared / name).write_bytes(whole)
    verify(shared)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_changed_byte_is_refused(shared, data):
    """But for one in the manifest that leaves what it says as it is, like a space that becomes a tab."""
    name = data.draw(st.sampled_from([name for name in LISTED if name != "arrays/empty"]))
    whole = (shared / name).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    (shared / name).write_bytes(changed)
    try:
        if name == MANIFEST and says(bytes(changed)) == says(whole):
            verify(shared)
        else:
            with pytest.raises(Damaged, match="is damaged"):
                verify(shared)
    finally:
        (shared / name).write_bytes(whole)


def says(manifest):
    try:
        return json.loads(manifest)["files"]
    except (ValueError, KeyError, TypeError):
        return None


@pytest.mark.parametrize("name", LISTED)
def test_bytes_at_the_end_of_a_file_are_refused(name, folder):
    (folder / name).write_bytes((folder / name).read_bytes() + b"x")
    with pytest.raises(Damaged, match=f"is damaged: {name} (has changed|cannot be read)$"):
        verify(folder)


@pytest.mark.parametrize("name", LISTED)
def test_a_missing_file_is_refused(name, folder):
    (folder / name).unlink()
    lacks = "damaged, or none of ours: it has no" if name == MANIFEST else "damaged:"
    with pytest.raises(Damaged, match=f"{folder} is {lacks} {name}"):
        verify(folder)


@pytest.mark.parametrize("name", ["more", "arrays/.hidden", "arrays/0/data.1", "arrays/manifest.json"])
def test_a_file_that_does_not_belong_to_it_is_refused(name, folder):
    (folder / name).write_bytes(b"")
    with pytest.raises(Damaged, match=f"is damaged: {name} does not belong to it"):
        verify(folder)


def test_two_files_exchanged_are_refused(folder):
    a, b = folder / "record.json", folder / "arrays/0/data"
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)
    with pytest.raises(Damaged, match="is damaged: arrays/0/data is cut short"):
        verify(folder)


@pytest.mark.parametrize("name", LISTED)
def test_a_link_in_the_place_of_a_file_is_refused_though_its_contents_are_the_same(name, folder):
    (folder / name).rename(folder.parent / "moved")
    (folder / name).symlink_to(folder.parent / "moved")
    with pytest.raises(Damaged, match=f"is refused: {name} is a link, or no file"):
        verify(folder)


def test_a_link_in_the_place_of_a_folder_is_refused(folder):
    (folder / "arrays").rename(folder.parent / "moved")
    (folder / "arrays").symlink_to(folder.parent / "moved")
    with pytest.raises(Damaged, match="is refused: arrays is a link, or no file"):
        verify(folder)


def test_what_is_no_file_is_refused_and_not_opened(folder):
    os.mkfifo(folder / "arrays" / "pipe")  # opening it for reading would wait for ever
    with pytest.raises(Damaged, match="is refused: arrays/pipe is a link, or no file"):
        verify(folder)


@pytest.mark.parametrize(
    "manifest",
    [
        *(b"", b"null", b"[]", b'"files"', b"{}", b'{"files": []}', b'{"files": {"record.json": null}}', b"\xff\xfe"),
        *(b'{"files": {"a": [1]}}', b'{"files": {"a": ["1", "b"]}}', b'{"files": {"a": [true, "b"]}}', b"[" * 100_000),
    ],
)
def test_a_manifest_of_another_kind_is_refused(manifest, folder):
    (folder / MANIFEST).write_bytes(manifest)
    with pytest.raises(Damaged, match=f"{folder} is damaged: {MANIFEST} cannot be read$"):
        verify(folder)


@pytest.mark.parametrize("name", ["../outside", "/outside", "arrays/../../outside", "record.json/../../outside"])
def test_a_manifest_that_names_a_file_outside_is_refused_and_the_file_not_read(name, folder, monkeypatch):
    (folder.parent / "outside").write_bytes(b"secret")
    listed = json.loads((folder / MANIFEST).read_text())
    listed["files"][name] = sealed._measure(folder.parent / "outside")
    (folder / MANIFEST).write_text(json.dumps(listed))
    opened, plain = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: opened.append(path) or plain(path, *args, **kwargs))
    with pytest.raises(Damaged, match=f"is damaged: {name} is missing"):
        verify(folder)
    assert set(opened) <= {folder / MANIFEST}


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_what_is_no_folder_is_refused(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Damaged, match=f"there is no folder {tmp_path / name}$"):
        verify(tmp_path / name)


def test_what_the_disk_refuses_is_no_damage(folder, monkeypatch):
    def fail(path, *_):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(sealed, "_measure", fail)
    with pytest.raises(OSError, match="Input/output error"):
        verify(folder)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path):
    def fill(inside):
        raise AssertionError("it was to be refused before")

    with pytest.raises(OSError, match=r"No space left on device: [\d.]+ MiB to write, [\d.]+ MiB free"):
        seal(tmp_path / "step", fill, num_bytes=2**60)
    assert list(tmp_path.iterdir()) == []


def test_a_link_among_what_is_written_is_not_sealed(tmp_path):
    with pytest.raises(Damaged, match="is refused: link"):
        seal(tmp_path / "step", lambda inside: (inside / "link").symlink_to(tmp_path))
    assert list(tmp_path.iterdir()) == []


# Cut off anywhere


class Stop(BaseException):
    """What no handler of ours names, as KeyboardInterrupt and SystemExit are not."""


CALLS = [(Path, "mkdir"), (Path, "rename"), (Path, "write_text"), (Path, "write_bytes"), (os, "fsync")]


class Interruption:
    """Counts the calls that change the disk, and raises before (or after) the one of a number.

    Args:
        monkeypatch: pytest's.
        number: of the call, from 0; None counts alone.
        killed: whether every later one fails too, as nothing is tidied by a process that is dead.
        after: whether the call has its effect first.
    """

    def __init__(self, monkeypatch, number, killed=False, after=False):
        self.calls, self.number, self.killed, self.after = 0, number, killed, after
        for owner, name in [*CALLS, (shutil, "rmtree")]:
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name), name))

    def wrapped(self, call, name):
        def instead(*args, **kwargs):
            if self.dead:
                raise Stop
            counted = name != "rmtree" or Path(args[0]).exists()
            self.calls += counted
            stops = counted and self.calls - 1 == self.number
            if stops and not self.after:
                raise Stop
            result = call(*args, **kwargs)
            if stops:
                raise Stop
            return result

        return instead

    @property
    def dead(self):
        return self.killed and self.number is not None and self.calls > self.number


def count_calls(work, tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        interruption = Interruption(monkeypatch, None)
        work(tmp_path)
    return interruption.calls


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_sealing_cut_off_anywhere_leaves_the_old_one_or_the_new_one_whole(exists, killed, after, tmp_path):
    """At most while its name passes from one to the other is neither under it, and `sweep` puts that right."""

    def prepared(name):
        (tmp_path / name).mkdir()
        if exists:
            seal(tmp_path / name / "step", filler(OLD))
        return tmp_path / name / "step"

    num_calls = count_calls(lambda path: seal(path, filler(NEW)), prepared("counted"))
    assert num_calls >= 10
    ends = []
    for number in range(num_calls):
        folder = prepared(str(number))
        with pytest.MonkeyPatch.context() as monkeypatch:
            Interruption(monkeypatch, number, killed, after)
            with pytest.raises(Stop):
                seal(folder, filler(NEW))
        if killed:
            if folder.exists():
                assert files_of(folder) in (OLD, NEW)
            sweep(folder.parent)
        ends.append(files_of(folder) if folder.exists() else None)
        assert {path.name for path in folder.parent.iterdir()} <= {"step", *([] if killed else ["step" + REMOVED])}
        seal(folder, filler(NEW))  # whatever is left does not stand in the way
        assert files_of(folder) == NEW
    before = OLD if exists else None
    turn = ends.index(NEW) if NEW in ends else len(ends)
    assert ends == [before] * turn + [NEW] * (len(ends) - turn)
    assert ends[0] == before


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("killed", [False, True])
def test_removing_cut_off_anywhere_leaves_it_whole_or_its_name_free(killed, after, tmp_path):
    def prepared(name):
        (tmp_path / name).mkdir()
        seal(tmp_path / name / "step", filler(OLD))
        return tmp_path / name / "step"

    for number in range(count_calls(remove, prepared("counted"))):
        folder = prepared(str(number))
        with pytest.MonkeyPatch.context() as monkeypatch:
            Interruption(monkeypatch, number, killed, after)
            with pytest.raises(Stop):
                remove(folder)
        if folder.exists():
            assert files_of(folder) == OLD
        sweep(folder.parent)
        assert {path.name for path in folder.parent.iterdir()} <= {"step"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(28, "No space left on device")])
def test_what_ends_the_filling_comes_through_and_leaves_the_old_one(error, folder):
    def fill(inside):
        filler(NEW)(inside)
        raise error

    with pytest.raises(error if isinstance(error, type) else OSError):
        seal(folder, fill)
    assert files_of(folder) == OLD
    assert list(folder.parent.iterdir()) == [folder]


def test_sweeping_leaves_everything_else_alone(folder):
    for name in (f"a{PARTIAL}", f"b{REMOVED}"):
        filler(NEW)(folder.with_name(name))
    filler(NEW)(folder.with_name("step.damaged"))
    (folder.parent / "file").write_text("")
    sweep(folder.parent)
    assert {path.name for path in folder.parent.iterdir()} == {"step", "step.damaged", "file"}
    assert files_of(folder) == OLD


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(st.text("abcé -", min_size=1, max_size=6), st.binary(max_size=50), max_size=6))
def test_any_files_under_any_names_verify(files, tmp_path):
    seal(tmp_path / "step", filler(files))
    assert files_of(tmp_path / "step") == files
