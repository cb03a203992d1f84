import functools
import hashlib
import http.server
import importlib.util
import io
import tarfile
import threading

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from fdg_jax.data import cifar as preparation
from fdg_jax.data.source import ArraySource
from fdg_jax.data.stream import StreamSource
from fdg_jax.data.tfds import tfds

FILES = {
    "cifar10": ([f"data_batch_{n}.bin" for n in range(1, 6)], ["test_batch.bin"], "cifar-10-batches-bin/"),
    "cifar100": (["train.bin"], ["test.bin"], "cifar-100-binary/"),
}
NAMES = {
    "cifar10": {"batches.meta.txt": 10},
    "cifar100": {"coarse_label_names.txt": 20, "fine_label_names.txt": 100},
}


def made_up(name, rng):
    """{id: (image (32, 32, 3), labels)} and the archive that holds them in CIFAR's binary format."""
    train, test, prefix = FILES[name]
    examples, file = {}, io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:

        def add(path, data):
            member = tarfile.TarInfo(prefix + path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        for path, num in NAMES[name].items():
            add(path, "\n".join(f"{path[0]}{n}" for n in range(num)).encode() + b"\n\n")
        for split, paths in (("train", train), ("test", test)):
            rows = []
            for number in range(3 * len(paths)):
                image = rng.integers(0, 256, (32, 32, 3), np.uint8)
                labels = [int(rng.integers(num)) for num in NAMES[name].values()]
                examples[f"{split}_{number:05d}"] = image, labels
                rows.append(bytes(labels) + b"".join(image[..., channel].tobytes() for channel in range(3)))
            for part, path in enumerate(paths):
                add(path, b"".join(rows[3 * part : 3 * part + 3]))
    return examples, file.getvalue()


def register(monkeypatch, name, archive, url=None):
    """Makes TFDS expect this archive, and from that address; returns what the archive is called."""
    cls = tensorflow_datasets.builder_cls(name)
    files = cls._cifar_info.fget(type("Named", (), {"name": name}))
    files = files._replace(url=url or files.url)
    infos = {
        files.url: tensorflow_datasets.download.checksums.UrlInfo(
            len(archive), hashlib.sha256(archive).hexdigest(), files.url.split("/")[-1]
        )
    }
    monkeypatch.setattr(cls, "_cifar_info", files)
    monkeypatch.setattr(cls, "url_infos", infos)
    return files.url.split("/")[-1]


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    """A function that puts a small archive where one that was fetched by hand belongs; returns its examples."""

    def make(name):
        examples, archive = made_up(name, np.random.default_rng(0))
        manual = tmp_path / "downloads" / "manual"
        manual.mkdir(parents=True)
        (manual / register(monkeypatch, name, archive)).write_bytes(archive)
        return examples

    return make


def as_set(images, labels):
    return {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


@pytest.mark.parametrize("name", FILES)
def test_cifar_is_prepared_as_stock_tfds_reads_it(name, cifar, tmp_path):
    examples = cifar(name)
    source = tfds(name, tmp_path)
    assert isinstance(source, ArraySource)
    stock = tensorflow_datasets.data_source(name, data_dir=tmp_path, download=False)
    assert list(stock) == ["train", "test"]
    for split, images, labels in (
        ("train", source.train_images, source.train_labels),
        ("test", source.test_images, source.test_labels),
    ):
        wanted = {key: example for key, example in examples.items() if key.startswith(split)}
        assert len(stock[split]) == len(wanted) == len(images)
        for record in stock[split]:
            image, all_labels = wanted.pop(record["id"].decode())
            np.testing.assert_array_equal(record["image"], image)
            assert [record[key] for key in ("coarse_label", "label")[-len(all_labels) :]] == all_labels
        assert not wanted
        ours = {(x.tobytes(), y[-1]) for key, (x, y) in examples.items() if key.startswith(split)}
        assert as_set(images, labels) == ours
    builder = tensorflow_datasets.builder(name, data_dir=tmp_path)
    assert builder.info.full_name == f"{name}/{tensorflow_datasets.builder_cls(name).VERSION}"
    assert builder.info.features["label"].int2str(7) in ("b7", "f7")
    assert source.num_classes == {"cifar10": 10, "cifar100": 100}[name]


def test_what_is_prepared_is_not_prepared_again(cifar, tmp_path):
    cifar("cifar10")
    tfds("cifar10", tmp_path)
    (tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz").unlink()
    assert tfds("cifar10", tmp_path).num_train == 15


def test_an_interrupted_preparation_leaves_nothing_that_is_taken_for_whole(cifar, tmp_path, monkeypatch):
    cifar("cifar10")
    rows = preparation.rows

    def interrupted(data, num_labels):
        yield next(rows(data, num_labels))
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tfds("cifar10", tmp_path)
    monkeypatch.setattr(preparation, "rows", rows)
    assert not list((tmp_path / "cifar10").iterdir())
    (tmp_path / "cifar10" / "incomplete.ABC123_3.0.2").mkdir()  # what a killed process leaves
    assert tfds("cifar10", tmp_path).num_train == 15


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The address of a folder, served on this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
        server.shutdown()


def test_the_archive_is_downloaded_and_verified(served, tmp_path, monkeypatch):
    folder, url = served
    examples, archive = made_up("cifar10", np.random.default_rng(0))
    register(monkeypatch, "cifar10", archive, url)
    (folder / "cifar-10-binary.tar.gz").write_bytes(archive[:-1])
    with pytest.raises(ValueError, match=r"^Artifact http://.*, has wrong checksum: remove that file and start again$"):
        tfds("cifar10", tmp_path)
    (folder / "cifar-10-binary.tar.gz").write_bytes(archive)
    source = tfds("cifar10", tmp_path)
    wanted = {(x.tobytes(), y[-1]) for key, (x, y) in examples.items() if key.startswith("train")}
    assert as_set(source.train_images, source.train_labels) == wanted


def test_an_archive_put_there_by_hand_is_verified_too(tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "cifar-100-binary.tar.gz").write_bytes(made_up("cifar100", np.random.default_rng(0))[1])
    with pytest.raises(
        ValueError, match=r"^Artifact https://.*cifar-100-binary.tar.gz, has wrong checksum: remove that file [^\n]*$"
    ):
        tfds("cifar100", tmp_path)
    assert not list(tmp_path.rglob("3.0.2"))


def test_without_a_network_it_says_where_the_archive_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    register(monkeypatch, "cifar10", b"", "http://127.0.0.1:9/cifar-10-binary.tar.gz")  # where nobody listens
    with pytest.raises(ValueError, match=r"^cifar10 could not be had from http://127[^\n]*manual/cifar-10-bin[^\n]*$"):
        tfds("cifar10", tmp_path)
    assert not list(tmp_path.rglob("3.0.2"))


class Shapes(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
    """Pictures as a set of TFDS would hold them, with hidden test labels."""

    name = "shapes"
    VERSION = tensorflow_datasets.core.Version("1.0.0")
    shape: tuple[int | None, int | None, int] = (6, 4, 1)
    splits: tuple[str, ...] = ("train", "test", "validation")
    hidden = "test"

    def _info(self):
        kinds = tensorflow_datasets.features
        features = {"image": kinds.Image(shape=self.shape), "label": kinds.ClassLabel(num_classes=3)}
        return tensorflow_datasets.core.DatasetInfo(builder=self, features=kinds.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.splits}

    def _generate_examples(self, split):
        for number in range({"train": 5, "test": 4, "validation": 3}[split]):
            height, width, channels = (side or 20 + number for side in self.shape)
            file = io.BytesIO()
            pixels = np.full((height, width, channels), 40 * number, np.uint8)
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "png")
            yield number, {"image": file.getvalue(), "label": -1 if split == self.hidden else number % 3}


def prepare(tmp_path, file_format="array_record", **attributes):
    cls = type("Shapes", (Shapes,), attributes, skip_registration=True)
    cls(data_dir=tmp_path, file_format=file_format).download_and_prepare()
    return tmp_path


def test_any_prepared_set_is_read_and_hidden_labels_are_passed_over(tmp_path):
    source = tfds("shapes", prepare(tmp_path))
    assert isinstance(source, ArraySource)
    assert (source.image_shape, source.num_classes, source.num_train, source.num_test) == ((6, 4, 1), 3, 5, 3)
    assert as_set(source.train_images, source.train_labels) == {(bytes([40 * n] * 24), n % 3) for n in range(5)}


def test_test_images_with_labels_come_before_those_for_validation(tmp_path):
    assert tfds("shapes", prepare(tmp_path, hidden=None)).num_test == 4


def test_a_set_that_does_not_fit_is_streamed_as_it_is(tmp_path):
    data_dir = prepare(tmp_path)
    stream, resident = (
        tfds("shapes", data_dir, resident_bytes=8 * 24 - 1),
        tfds("shapes", data_dir, resident_bytes=8 * 24),
    )
    assert (type(stream), type(resident)) == (StreamSource, ArraySource)
    for one, other in zip(stream.batch(1, 2, 3), resident.batch(1, 2, 3), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_images_of_many_sizes_are_streamed_and_resized(tmp_path):
    source = tfds("shapes", prepare(tmp_path, shape=(None, None, 3)), image_size=8)
    assert isinstance(source, StreamSource)
    assert source.image_shape == (8, 8, 3)
    assert source.flip
    images, labels, mask = next(source.test_batches(4))
    assert images.shape == (4, 8, 8, 3)
    assert sorted(labels[mask]) == [0, 1, 2]


def test_a_set_without_a_test_split_can_be_cut(tmp_path):
    data_dir = prepare(tmp_path, splits=("train",))
    with pytest.raises(
        ValueError, match=r"^'shapes' has no test split with labels, only train; name parts of one, such"
    ):
        tfds("shapes", data_dir)
    source = tfds("shapes", data_dir, train_split="train[:60%]", test_split="train[60%:]")
    assert (source.num_train, source.num_test) == (3, 2)
    with pytest.raises(ValueError, match=r"^'shapes' has no split 'tset': [^\n]*$"):
        tfds("shapes", data_dir, test_split="tset")


def test_with_tensorflow_tfds_prepares_the_set_itself(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorflow" or find_spec(name))
    cls = tensorflow_datasets.builder_cls("mnist")
    for method in ("_split_generators", "_generate_examples"):
        monkeypatch.setattr(cls, method, getattr(Shapes, method))
    monkeypatch.setattr(cls, "shape", (28, 28, 1), raising=False)
    monkeypatch.setattr(cls, "hidden", None, raising=False)
    monkeypatch.setattr(cls, "splits", ("train", "validation"), raising=False)
    assert tfds("mnist", tmp_path).num_train == 5


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("cifar11", r"unknown TFDS data set 'cifar11'; did you mean 'cifar10[^\n]*"),
        ("no name", r"TFDS has no 'no name': [^\n]*"),
        ("imagenet_resized/33x33", r"unknown variant of 'imagenet_resized' '33x33'; did you mean '32x32'.*"),
        ("cifar10:9.9.9", r"TFDS has no 'cifar10:9.9.9': [^\n]* only: 3.0.2."),
        ("imdb_reviews", r"'imdb_reviews' is not a set for image classification: .* it has (text, label|label, text)"),
        ("eurosat/all", r"'eurosat/all' is not a set for image classification: .* it has [^\n]*"),
        (
            "mnist",
            r"'mnist' is not prepared in [^\n]*: pip install tensorflow && tfds build mnist "
            r"--file_format=array_record --data_dir=[^\n]*",
        ),
    ],
)
def test_a_set_that_cannot_be_had_gets_one_line(name, complaint, tmp_path):
    with pytest.raises(ValueError, match=f"^{complaint}$"):
        tfds(name, tmp_path)


def test_a_directory_without_random_access_is_refused(tmp_path):
    data_dir = prepare(tmp_path)
    info = next(tmp_path.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"holds tfrecord, which cannot be read at random: name another data_dir, or"):
        tfds("shapes", data_dir)
