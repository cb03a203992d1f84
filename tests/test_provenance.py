"""What a start leaves in run.json: the command, the machine, the versions."""

import json
import platform

import jax
import optax

from fdg_jax.provenance import describe_start, note_start, typed_command


def test_every_start_is_appended(tmp_path):
    for number in (1, 2):
        note_start(tmp_path, [jax.devices()[k] for k in (0, 1, 0)])  # stages 0 and 2 share a device
        starts = json.loads((tmp_path / "run.json").read_text())
        assert len(starts) == number
    assert starts[-1]["devices"] == {"cpu": 2}
    assert starts[-1]["versions"]["optax"] == optax.__version__
    assert starts[-1]["versions"]["python"] == platform.python_version()
    assert starts[-1]["cpu_cores"] >= 1
    assert starts[0]["time"] <= starts[1]["time"]


def test_a_damaged_list_begins_anew(tmp_path):
    for text in ('[{"command": "py', '{"command": 1}'):
        (tmp_path / "run.json").write_text(text)
        note_start(tmp_path, jax.devices()[:1])
        assert [set(start) for start in json.loads((tmp_path / "run.json").read_text())] == [set(describe_start([]))]


def test_the_command_can_be_typed_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["/usr/lib/python3", "-m", "fdg_jax.main", "--config", str(tmp_path / "my run.py"), "--workdir=runs/a"]
    assert typed_command(words) == "python -m fdg_jax.main --config 'my run.py' --workdir=runs/a"
