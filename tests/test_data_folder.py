import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdg_jax.data import decode as decoding
from fdg_jax.data import folder as folders
from fdg_jax.data.folder import folder

ARCHIVE = Path(__file__).parents[2] / "shared" / "data" / "cifar10-images.tar.xz"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fdg_jax"


@pytest.fixture
def decoded(monkeypatch):
    """Grows by the number of images whenever some are decoded."""
    calls, decode = [], folders.decode

    def counted(root, names, *args):
        calls.append(len(names))
        return decode(root, names, *args)

    monkeypatch.setattr(folders, "decode", counted)
    return calls


def pixels(seed, height=4, width=6):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, image, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **kwargs)


@pytest.fixture
def root(tmp_path):
    """Two classes of two training images and one test image."""
    root = tmp_path / "animals"
    for seed, name in enumerate(
        ("train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "train/dog/2.png", "test/cat/1.png", "test/dog/1.png")
    ):
        save(root / name, pixels(seed))
    return root


def refusal(root, **kwargs):
    with pytest.raises(ValueError, match=re.escape(str(root))) as error:
        folder(root, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_images_come_by_class_and_name(root):
    (root / "train/dog/notes.txt").write_text("no image")
    (root / "train/.ipynb_checkpoints").mkdir()
    (root / "train/cat/._1.png").write_bytes(b"left by another system")
    source = folder(root)
    assert (source.name, source.num_classes, source.image_shape) == ("animals", 2, (4, 6, 3))
    np.testing.assert_array_equal(source.train_images, [pixels(seed) for seed in range(4)])
    np.testing.assert_array_equal(source.test_images, [pixels(4), pixels(5)])
    assert list(source.train_labels) == [0, 0, 1, 1]
    assert list(source.test_labels) == [0, 1]
    assert source.train_images.dtype == np.uint8


def test_every_kind_of_image_becomes_rgb(tmp_path):
    colours = np.array([[[255, 0, 0], [0, 0, 255]], [[9, 9, 9], [0, 255, 0]]], np.uint8).repeat(4, 0).repeat(4, 1)
    rgb = Image.fromarray(colours)
    grey = rgb.convert("L")
    palette = rgb.quantize(4)
    root = tmp_path / "kinds"
    save(root / "train/a/1.png", rgb.convert("RGBA"))
    save(root / "train/a/2.PNG", palette)
    save(root / "train/a/3.png", palette, transparency=bytes([0, 128]))
    save(root / "train/a/4.gif", rgb)
    save(root / "train/a/5.jpeg", rgb.convert("CMYK"), quality=100, subsampling=0)
    save(root / "train/a/6.bmp", grey)
    save(root / "train/a/7.png", grey.convert("LA"))
    save(root / "test/a/1.jpg", grey, quality=100)
    source = folder(root)
    assert source.image_shape == (8, 8, 3)
    for image in source.train_images[:5]:
        np.testing.assert_allclose(image.astype(int), colours, atol=4)  # JPEG, and palettes of 256 colours
    for image in (*source.train_images[5:], *source.test_images):
        np.testing.assert_allclose(image, np.repeat(np.asarray(grey)[..., None], 3, -1), atol=1)


def test_more_than_eight_bits_are_refused_not_clipped(root):
    save(root / "test/dog/2.png", (np.arange(24, dtype=np.uint16) * 2000).reshape(4, 6))
    assert "1 of 7 images do not decode: test/dog/2.png (more than 8 bits a channel, mode I;16)" in refusal(root)


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (7, 5), (16, 16)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_resize_scales_the_shorter_side_and_crops_the_centre(tmp_path, height, width, suffix):
    """A ramp along each axis stays one, and its middle stays in the middle; the ends of the longer side are lost."""
    y, x = np.mgrid[:height, :width].astype(float)
    side = min(height, width)
    ramps = np.stack([128 + 200 * (x - (width - 1) / 2) / side, 128 + 200 * (y - (height - 1) / 2) / side, 0 * x], -1)
    for split in ("train", "test"):
        save(tmp_path / f"r/{split}/a/1.{suffix}", np.clip(ramps.round(), 0, 255).astype(np.uint8), quality=98)
    (image,) = folder(tmp_path / "r", resize=8).train_images.astype(float)
    expected = 128 + 200 * (np.arange(8) - 3.5) / 8
    inner = slice(1, -1)  # at the borders the filter has one side only
    np.testing.assert_allclose(image[inner, inner, 0], np.broadcast_to(expected[inner], (6, 6)), atol=8)
    np.testing.assert_allclose(image[inner, inner, 1], np.broadcast_to(expected[inner, None], (6, 6)), atol=8)


def test_resize_takes_images_of_all_sizes(root):
    save(root / "train/cat/3.png", pixels(9, 30, 20))
    message = refusal(root)
    assert "images must be of one size; they are 6 x 4 (6), 20 x 30 (1): resize=N (--config.data.resize=N)" in message
    assert folder(root, resize=5).train_images.shape == (5, 5, 5, 3)


def test_processes_decode_what_one_does(root):
    for seed in range(150):
        save(root / f"train/cat/more{seed:03}.png", pixels(seed + 10))
    names = list(folders._listing(root)[1])
    seen = []
    alone = decoding.decode(root, names, workers=1)
    shared = decoding.decode(root, names, workers=2, progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(alone, shared)
    np.testing.assert_array_equal(shared[2:152], [pixels(seed + 10) for seed in range(150)])
    assert seen == [(64, 156), (128, 156), (156, 156)]


def test_a_process_that_stops_is_said(root, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK", 2)
    monkeypatch.setattr(decoding.sys, "executable", "false")
    with pytest.raises(ValueError, match="a process that decodes images has stopped; workers=1"):
        folder(root, workers=2)


def test_the_second_time_nothing_is_decoded(root, decoded, cache):
    first, second = folder(root), folder(root)
    assert decoded == [6]
    np.testing.assert_array_equal(first.train_images, second.train_images)
    np.testing.assert_array_equal(first.test_images, second.test_images)
    assert len(list(cache.iterdir())) == 1
    folder(root, cache_dir=root.parent / "elsewhere")
    assert decoded == [6, 6]
    assert len(list((root.parent / "elsewhere").iterdir())) == 1


def rewrite(root):
    """Another content, the same time."""
    path = root / "train/cat/1.png"
    stat = path.stat()
    save(path, Image.new("RGB", (6, 4)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def rename(root):
    (root / "train/cat/1.png").rename(root / "train/cat/3.png")


def swap(root):
    """The files of two classes change places."""
    (root / "train/cat").rename(root / "train/x")
    (root / "train/dog").rename(root / "train/cat")
    (root / "train/x").rename(root / "train/dog")


def add(root):
    save(root / "test/dog/2.png", pixels(7))


def remove(root):
    (root / "train/dog/2.png").unlink()


@pytest.mark.parametrize("change", [rewrite, rename, swap, add, remove])
def test_any_change_is_decoded_anew(root, decoded, change):
    folder(root)
    change(root)
    source = folder(root)
    assert decoded == [6, source.num_train + source.num_test]
    with Image.open(root / "train/cat" / sorted(os.listdir(root / "train/cat"))[0]) as image:
        np.testing.assert_array_equal(source.train_images[0], np.asarray(image))


def test_bytes_are_the_key_whatever_the_clock_says(root, decoded):
    """A later time is no change; equal names, sizes and times, as reproducible archives have them, are no equality."""
    path = root / "train/cat/1.png"
    folder(root)
    os.utime(path, ns=(0, 0))
    folder(root)
    assert decoded == [6]
    damaged = path.read_bytes()
    path.write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))  # in a checksum that nobody reads
    os.utime(path, ns=(0, 0))
    folder(root)
    assert decoded == [6, 6]


def test_resize_is_part_of_the_key_and_the_place_of_the_folder_is_not(root, decoded):
    folder(root)
    assert folder(root, resize=3).image_shape == (3, 3, 3)
    assert decoded == [6, 6]
    (root / "README").write_text("no image")
    root.rename(root.parent / "moved")
    assert folder(root.parent / "moved").name == "moved"
    assert decoded == [6, 6]


def test_a_damaged_cache_is_made_anew(root, decoded, cache, caplog):
    images = folder(root).train_images
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    at = whole.index(images.tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for number, damaged in enumerate((b"", b"nonsense", whole[: len(whole) // 2], flipped), 2):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(folder(root).train_images, images)
        assert len(decoded) == len(caplog.messages) + 1 == number
        assert "cannot be used" in caplog.messages[-1]
        assert file.read_bytes() == whole


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(root, decoded, cache, caplog, monkeypatch, error):
    def fail(file, **kwargs):
        file.write(b"PK the beginning")
        file.flush()
        assert len(list(cache.iterdir())) == 1
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(decoding.np, "savez", fail)
        if isinstance(error, OSError):
            assert folder(root).num_train == 4
            assert "No space left on device" in caplog.text
        else:
            with pytest.raises(KeyboardInterrupt):
                folder(root)
    assert not list(cache.iterdir())
    folder(root)
    folder(root)
    assert decoded == [6, 6]


def test_a_cache_that_cannot_be_written_is_no_error(root, caplog):
    (root.parent / "file").write_text("in the way")
    assert folder(root, cache_dir=root.parent / "file").num_train == 4
    assert "the next run decodes again: cannot write" in caplog.text


def test_the_cache_is_where_the_desktop_standard_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, expected in ((str(tmp_path / "x"), "x"), ("", ".cache"), ("relative", ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert folders._cache_home() == tmp_path / expected / "fdg_jax"


def test_images_that_do_not_decode_are_named_and_counted(root, cache):
    (root / "train/cat/2.png").write_bytes(b"not an image")
    whole = (root / "train/dog/1.png").read_bytes()
    (root / "train/dog/1.png").write_bytes(whole[: len(whole) // 2])
    message = refusal(root)
    assert "2 of 6 images do not decode: train/cat/2.png (not an image), train/dog/1.png (" in message
    (root / "test/cat/1.png").write_bytes(b"")
    (root / "test/dog/1.png").unlink()
    (root / "test/dog/1.png").symlink_to("nowhere")
    message = refusal(root)
    assert "4 of 6 images do not decode: train/cat/2.png" in message
    assert " and 1 more; mend or remove them" in message
    for path in root.rglob("*.png"):
        path.unlink()
        path.write_bytes(b"")
    assert "6 of 6 images do not decode" in refusal(root)
    assert not cache.exists()


def test_wrong_folders_get_one_line(root):
    assert refusal(root.parent / "nowhere").startswith("there is no folder")
    assert refusal(root / "train/cat/1.png").endswith("is a file, not a folder")
    assert "it has no train/ and no test/ (folders: cat, dog)" in refusal(root / "train")
    (root / "train/ant").mkdir()
    assert "every class must be in both splits; in train/ but not in test/: ant" in refusal(root)
    (root / "test/ant").mkdir()
    assert "train/ant has no images (.jpg, .jpeg, .png" in refusal(root)
    (root / "train/ant").rmdir()
    assert "in test/ but not in train/: ant" in refusal(root)
    (root / "test").rename(root / "val")
    assert "it has no test/ (folders: train, val)" in refusal(root)
    (root / "test").mkdir()
    assert "test has no folders; it must hold one of images for each class" in refusal(root)


def test_what_memory_does_not_hold_gets_one_line(root, monkeypatch):
    def full(shape, dtype):
        raise MemoryError

    monkeypatch.setattr(decoding.np, "empty", full)
    assert "6 images of 40000 x 40000 need 29 GB of memory; resize=N" in refusal(root, resize=40000)


@pytest.mark.parametrize("name", ["resize", "workers"])
def test_numbers_out_of_range_are_refused(root, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, or None; got 0"):
        folder(root, **{name: 0})


@pytest.mark.skipif(not ARCHIVE.exists(), reason="shared/data/cifar10-images.tar.xz is not here")
def test_real_photographs(tmp_path, decoded):
    """The first of two classes; every third is held out, since the archive's own test images come last."""
    counts = {"bird": 0, "frog": 0}
    with tarfile.open(ARCHIVE, "r|xz") as archive:
        for member in archive:
            name, file = Path(member.name).parts[-2:] if member.isfile() else ("", "")
            if counts.get(name, 24) == 24:
                continue
            target = tmp_path / "birds" / ("train" if counts[name] % 3 else "test") / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.extractfile(member).read())
            counts[name] += 1
            if counts["frog"] == 24:
                break
    source, again = folder(tmp_path / "birds"), folder(tmp_path / "birds")
    assert decoded == [48]
    assert source.train_images.shape == (32, 32, 32, 3)
    assert list(source.test_labels) == [0] * 8 + [1] * 8
    np.testing.assert_array_equal(source.train_images, again.train_images)
    pixels = source.train_images.astype(float)
    between_neighbours = np.abs(np.diff(pixels, axis=2)).mean()
    between_images = np.abs(np.diff(pixels, axis=0)).mean()
    assert 2 * between_neighbours < between_images  # photographs are smooth, and differ
    batch, _ = source.batch(0, 0, 32)
    np.testing.assert_allclose(batch.mean((0, 1, 2)), 0, atol=1e-4)  # one batch is the whole split
    np.testing.assert_allclose(batch.std((0, 1, 2)), 1, atol=1e-4)
