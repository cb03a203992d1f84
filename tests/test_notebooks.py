"""Every notebook runs from top to bottom in a kernel of its own, and is kept as it was written, without outputs."""

import ast
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["01_quickstart", "02_schedules_and_delays", "03_bring_your_own_model", "04_results"]
SECONDS = 300  # for a cell, far beyond what one takes: a kernel that hangs ends the test
HERE = re.compile(r"/(?:home|root|Users|tmp|work|usr|content|opt|mnt|private|var)/|[A-Z]:\\\\|site-packages")

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_of(path: Path) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == "code"]


@pytest.fixture
def clean_environment(tmp_path, monkeypatch):
    """What a user has: no devices or XLA flags of the tests', no settings and kernels of the machine's Jupyter.

    The kernel "python3" is then the one that comes with this interpreter. But compiled programs of an earlier round of
    tests are used again.
    """
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "PYTHONWARNINGS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return tmp_path


@notebooks
def test_it_runs(path, clean_environment):
    notebook, folder = read(path), clean_environment / "folder"
    folder.mkdir()
    where = {"metadata": {"path": str(folder)}}
    limits = {"timeout": SECONDS, "startup_timeout": SECONDS}
    NotebookClient(notebook, kernel_name="python3", resources=where, **limits).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = [output.text for output in outputs if output.output_type == "stream"]
    assert not [text for text in printed if "Warning:" in text]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@notebooks
def test_it_is_valid_and_its_cells_have_names(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.metadata.kernelspec.name == "python3"


@notebooks
def test_it_is_kept_without_outputs(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
        assert not cell.metadata


@notebooks
def test_no_machine_is_named(path):
    assert HERE.search(path.read_text()) is None


@notebooks
def test_the_first_code_cell_installs_what_is_missing_before_jax_starts(path):
    first, *rest = code_of(path)
    assert 'find_spec("fdg_jax") is None' in first
    assert re.search(r"%pip install .*fdg_jax\{extra\} @ git\+\{REPOSITORY\}", first)
    if any(re.search(r"^import jax$|\bjax\.\w", source, re.MULTILINE) for source in [first, *rest]):
        assert first.index("%pip") < first.index("import jax") < first.index("jax_num_cpu_devices")
        assert first.index("jax_num_cpu_devices") < first.index("jax.devices()")


def test_they_install_from_one_place():
    """And say so where nobody has put an address in."""
    (install,) = {code_of(path)[0].split("import importlib.util")[1].split("%pip")[0] for path in NOTEBOOKS}
    source = "import importlib.util" + install + "pass"
    source = source.replace('"fdg_jax"', '"no_such_package"')
    if "OWNER" in source:
        with pytest.raises(ImportError, match="set REPOSITORY, or run pip install"):
            exec(compile(ast.parse(source), "setup", "exec"), {})
