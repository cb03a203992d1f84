"""The pages under docs/: links lead somewhere, commands are read by what they name, pictures are those of the code."""

import ast
import functools
import importlib.util
import itertools
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import make_pipeline, tiny_batches
from matplotlib.backends.backend_agg import FigureCanvasAgg

from docs import pictures
from fdg_jax import Pipeline, methods, models, softmax_cross_entropy
from fdg_jax.by_name import read_calls
from fdg_jax.config import default_config, resolve, resolve_comparison
from fdg_jax.plots import save
from fdg_jax.published import cells

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
LINKS = [(name, link) for name, text in PAGES.items() for link in re.findall(r"\]\(([^)#\s]+)", text)]
COMMANDS = [
    (name, line)
    for name, text in PAGES.items()
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for line in block.strip().splitlines()
]
MENTIONED = {
    (name, code) for name, text in PAGES.items() for code in re.findall(r"`((?:python -m )[\w.]+[^`]*)`", text)
}


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert {f"docs/{name}" for name in PAGES} == set(re.findall(r"docs/\w+\.md", readme))


def test_relative_links_resolve():
    assert LINKS
    for name, link in LINKS:
        assert link.startswith("https://") or (DOCS / link).exists(), f"{name}: {link}"


def test_pages_and_files_that_are_mentioned_exist():
    for name, text in PAGES.items():
        for mentioned in re.findall(r"`((?:docs/|tests/|fdg_jax/|experiments/)?\w+\.(?:md|py))`", text):
            places = (ROOT / mentioned, DOCS / mentioned, ROOT / "fdg_jax" / mentioned)
            assert any(place.exists() for place in places), f"{name}: {mentioned}"


def test_every_picture_is_drawn_here_shown_and_small():
    shown = {link.removeprefix("pictures/") for _, link in LINKS if link.startswith("pictures/")}
    left = {path.name: path.stat().st_size for path in (DOCS / "pictures").iterdir()}
    assert shown == set(left) == set(pictures.PICTURES)
    assert max(left.values()) < 100_000


def described(svg):
    """What does not depend on the version of matplotlib: size, words, and how many shapes of which colour."""
    (size,) = re.findall(r'viewBox="([^"]+)"', svg)
    colours = re.findall(r"fill: (#\w+)", svg)
    words = re.findall(r"<!-- (.*?) -->", svg)
    return [float(number) for number in size.split()], words, {c: colours.count(c) for c in set(colours)}


figure_of = functools.cache(lambda name: pictures.PICTURES[name]())


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_what_the_code_draws_today(name, tmp_path):
    drawn = save(figure_of(name), tmp_path / name).read_text()
    (size, words, colours), (size_left, words_left, colours_left) = map(
        described, (drawn, (DOCS / "pictures" / name).read_text())
    )
    assert words == words_left, "draw them again: python -m docs.pictures"
    assert colours == colours_left
    assert size == pytest.approx(size_left, rel=0.01)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_words_in_pictures_do_not_touch(name):
    """Nor come close: a line apart where one stands above the other."""
    canvas = FigureCanvasAgg(figure_of(name))
    canvas.draw()
    texts = [text for axes in canvas.figure.axes for text in axes.texts if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer()).expanded(1, 3)) for text in texts]
    assert not [(one, other) for (one, a), (other, b) in itertools.combinations(boxes, 2) if a.overlaps(b)]


def test_the_speed_ups_are_the_papers():
    """Of `choosing.md` and the README, worked out from `published.json`."""
    own = [cell for cell in cells("table4") if cell.method in ("bp", "fdg") and cell.is_time]
    seconds = {(cell.network, cell.num_stages): cell.seconds_per_epoch for cell in own if cell.seconds_per_epoch}
    shares = {cell.num_stages: cell.percent_of_bp for cell in own if cell.percent_of_bp}
    rows = {
        "ResNet-56, speed-up on Tesla K80": {k: 100 / shares[k] for k in (1, 2, 3, 4)},
        "ResNet-56, speed-up on devices": {k: seconds["resnet56", 1] / seconds["resnet56", k] for k in (1, 2, 3, 4)},
        "WRN-28-10, speed-up on the same": {k: seconds["wrn28_10", 1] / seconds["wrn28_10", k] for k in (1, 2, 3, 4)},
    }
    for head, speed_ups in rows.items():
        (shown,) = re.findall(rf"^\| {head} [^|]*\|(.*)\|$", PAGES["choosing.md"], re.MULTILINE)
        words = [f"{speed_up:.2f}".replace("1.00", "1") for speed_up in speed_ups.values()]
        assert shown.replace(" ", "").split("|") == words
        if head.startswith("ResNet"):
            assert "{}, {} and {}".format(*words[1:]) in re.sub(r"\s+", " ", (ROOT / "README.md").read_text())


def values_of(config, words):
    """The configuration after the overrides among the words, as the command line would read them."""
    for key, text in (word.removeprefix("--config.").split("=", 1) for word in words if word.startswith("--config.")):
        *path, last = key.split(".")
        place = config
        for part in path:
            place = place[part]
        default = place[last]  # a KeyError is a key that does not exist
        parse = {bool: lambda word: word == "true", str: str}.get(type(default), ast.literal_eval)
        place[last] = parse(text)
    return config


def config_of(words):
    given = words[words.index("--config") + 1].replace("EXPERIMENT", "experiments/digits.py")
    path, _, variants = given.partition(":")
    spec = importlib.util.spec_from_file_location("experiment", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*[variants] if variants else [])


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_commands_are_read_by_what_they_name(name, line):
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    assert words[:2] == ["python", "-m"]
    spec = importlib.util.find_spec(words[2])
    assert spec is not None
    source = Path(spec.origin).read_text() + (ROOT / "fdg_jax" / "flags.py").read_text()
    for flag in (re.match(r"--(\w+)", word).group(1) for word in words if word.startswith("--")):
        assert re.search(rf'"(--)?{flag}"', source), f"{words[2]} has no --{flag}"
    if "--config" in words:
        config = values_of(config_of(words), words)
        assert (resolve_comparison if "methods" in config else resolve)(config)


@pytest.mark.parametrize(("name", "code"), sorted(MENTIONED))
def test_programs_that_are_mentioned_exist(name, code):
    module = shlex.split(code)[2]
    assert importlib.util.find_spec(module), name


def test_overrides_that_are_mentioned_are_read():
    """Each by itself, on a config to which it can belong."""
    text = "\n".join(PAGES[name] for name in ("choosing.md", "guide.md", "troubleshooting.md", "logs.md"))
    found = set(re.findall(r"`(--config\.[\w.]+=[^`]+)`", text))
    assert len(found) > 15
    for override in found:
        key, value = shlex.split(override)[0].removeprefix("--config.").split("=", 1)
        config = default_config()
        config.num_stages = 3 if key == "cuts" else 2
        values_of(config, [f"--config.{key}={value}"])
        assert resolve(config)
    for call in re.findall(r"`(learning_rate_shrinking\([^`]*\)|spike_compensation)`", text):
        assert read_calls(call)


def tied():
    layer = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    return make_pipeline([layer, jax.nn.relu, layer], cuts=(1,))


def shrunk_adam():
    return make_pipeline(optimizer=optax.adam(1e-3), method=methods.fdg(0.5))


def hidden():
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(6, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)]
    pipe = make_pipeline(layers, cuts=(2,), method=methods.fdg(policy="current"))
    return pipe.init(jax.random.key(0), tiny_batches(1)[0][0])


def too_many():
    layers = models.mlp(3, rngs=nnx.Rngs(0), in_shape=(6,))
    return Pipeline(layers, loss=softmax_cross_entropy, optimizer=optax.sgd(1), method=methods.bp(), num_stages=9)


def uneven():
    pipe = make_pipeline(method=methods.gpipe(4))
    return pipe.init(jax.random.key(0), jax.ShapeDtypeStruct((6, 6), jnp.float32))


def mistyped():
    return resolve({"epoch": 3})


def remat_elsewhere():
    return make_pipeline(remat="full", method=methods.fdg(policy="recompute"))


REFUSED = {
    "shrinking gradients (beta < 1) does nothing": shrunk_adam,
    "num_stages must lie in 1..5, for every stage needs one of the 5 layers": too_many,
    "share a Param; a stage trains its own copy": tied,
    "policy 'current' cannot refresh": hidden,
    "does not go with policy 'recompute'": remat_elsewhere,
    "does not make 4 equal micro-batches": uneven,
    "unknown config key": mistyped,
}


def test_the_refusals_are_those_of_the_page():
    page = PAGES["troubleshooting.md"]
    section = page[page.index("## Refused") : page.index("## Resume")]
    assert re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE) == list(REFUSED)


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_says_so(line):
    with pytest.raises(ValueError, match=re.escape(line)):
        REFUSED[line]()


def test_the_model_of_the_page_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGES["networks.md"], re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(block, "networks.md", "exec"), names)
    assert names["state"].fed == 40
    assert float(names["metrics"][-1]["accuracy"]) > 0.5


def test_the_program_that_draws_says_what_it_drew(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "PICTURES", {"beta.svg": pictures.PICTURES["beta.svg"]})
    monkeypatch.setattr(sys, "argv", ["pictures", "--out", str(tmp_path)])
    pictures.main()
    assert capsys.readouterr().out == f"{tmp_path / 'beta.svg'}\n"
