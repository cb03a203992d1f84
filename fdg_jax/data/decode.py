"""Image files to one array, by several processes; and a cache, so that it happens once.

Processes, because decoding a tiny image is mostly Python, and threads would wait for one another. They run this file as
a script, which needs Pillow and NumPy alone and so starts in a tenth of a second; `multiprocessing` would fork JAX's
threads, or run the user's main file again in every process.
"""

import logging
import os
import pickle
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

log = logging.getLogger(__name__)

Progress = Callable[[int, int], object]  # of the images done and those in all
Size = tuple[int, int]  # (width, height), Pillow's order
Job = tuple[list[str], Size, int | None]  # paths, the expected size, `resize`
Outcome = np.ndarray | Size | str  # the pixels; the size, where it is another; why the image does not decode
CHUNK = 64  # images a job


def decode(
    root: Path,
    names: Sequence[str],
    resize: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """The images `root / name`, in order, as (N, H, W, 3) uint8.

    Greyscale, palette and CMYK images become RGB. Transparency is dropped, EXIF's orientation is not applied.

    Args:
        root: the folder that holds them.
        names: of the files, relative to it.
        resize: the shorter side is scaled to so many pixels, then the centre is cropped to a square of them (bicubic).
            Where it is None, images are taken as they are and must be of one size.
        workers: processes; 1 decodes in this one. By default one a core, 16 at most, fewer where there is little to do.
        progress: called with the images done and those in all; where it is None, a bar on a terminal.

    Raises:
        ValueError: images do not decode, are of different sizes, or do not fit in memory; a process stopped.
    """
    width, height = size = (resize, resize) if resize else _first_size(root, names)
    try:
        images = np.empty((len(names), height, width, 3), np.uint8)
    except MemoryError:
        need = f"{len(names)} images of {width} x {height} need {len(names) * width * height * 3 / 1e9:.0f} GB"
        raise ValueError(f"{root}: {need} of memory; resize=N (--config.data.resize=N) makes them smaller") from None
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    jobs: list[Job] = [([str(root / name) for name in chunk], size, resize) for chunk in chunks]
    workers = min(workers or max(1, min(os.cpu_count() or 1, 16, len(jobs) // 4)), len(jobs))
    refused: dict[str, Size | str] = {}
    done = 0
    with ExitStack() as stack:
        show = stack.enter_context(_bar(root.name) if progress is None else nullcontext(progress))
        outcomes = stack.enter_context(closing(_in_processes(jobs, workers) if workers > 1 else _here(jobs)))
        for outcome in outcomes:
            if isinstance(outcome, np.ndarray):
                images[done] = outcome
            else:
                refused[names[done]] = outcome
            done += 1
            if done % CHUNK == 0 or done == len(names):
                show(done, len(names))
    if refused:
        raise ValueError(f"{root}: {_complaint(refused, size, len(names))}")
    return images


def _complaint(refused: dict[str, Size | str], size: Size, total: int) -> str:
    bad = [f"{name} ({reason})" for name, reason in refused.items() if isinstance(reason, str)]
    if bad:
        return f"{len(bad)} of {total} images do not decode: {_some(bad)}; mend or remove them"
    sizes = Counter(other for other in refused.values() if not isinstance(other, str))
    sizes[size] = total - len(refused)
    counted = [f"{width} x {height} ({count})" for (width, height), count in sizes.most_common()]
    return (
        f"images must be of one size; they are {_some(counted)}: resize=N (--config.data.resize=N) scales the shorter "
        "side to N and crops the centre to N x N"
    )


def _some(things: list[str]) -> str:
    return ", ".join(things[:3]) + (f" and {len(things) - 3} more" if len(things) > 3 else "")


def _first_size(root: Path, names: Sequence[str]) -> Size:
    for name in names:
        with suppress(Exception), Image.open(root / name) as image:
            return image.size
    return 1, 1  # none can be opened, as will be said of each


def _in_processes(jobs: list[Job], workers: int) -> Generator[Outcome, None, None]:
    """Jobs in turn to each process, the next when it has answered: neither side ever writes while the other does."""
    command = [sys.executable, "-P", __file__]  # -P: not this folder's files for modules of the same names
    with ExitStack() as stack:
        processes = []
        for _ in range(workers):  # in sessions of their own: Ctrl-C reaches this one alone, which then ends them
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            stack.callback(process.communicate)  # closes the pipes and waits, once it has been killed
            stack.callback(process.kill)
            processes.append(process)
        try:
            for n in range(len(jobs) + workers):
                process = processes[n % workers]
                assert process.stdin is not None
                assert process.stdout is not None
                if n >= workers:
                    yield from pickle.load(process.stdout)
                if n < len(jobs):
                    pickle.dump(jobs[n], process.stdin)
                    process.stdin.flush()
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise ValueError("a process that decodes images has stopped; workers=1 decodes in this one") from None


def _here(jobs: list[Job]) -> Generator[Outcome, None, None]:
    for job in jobs:
        yield from _outcomes(*job)


def _outcomes(paths: list[str], size: Size, resize: int | None) -> Iterator[Outcome]:
    for path in paths:
        try:
            with Image.open(path) as image:
                yield _pixels(image, resize) if resize or image.size == size else image.size
        except UnidentifiedImageError:
            yield "not an image"
        except Exception as error:  # a damaged file can lead Pillow's decoders to any
            yield (str(error).splitlines() or [type(error).__name__])[0]


def _pixels(image: Image.Image, resize: int | None) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits a channel, mode {image.mode}")  # Pillow would clip them, to white mostly
    if resize:
        image.draft(None, (2 * resize, 2 * resize))  # a JPEG more than twice as large is decoded at 1/2, 1/4 or 1/8
    opaque = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image  # else a warning
    rgb = opaque.convert("RGB")
    return np.asarray(ImageOps.fit(rgb, (resize, resize), Image.Resampling.BICUBIC) if resize else rgb)


def cached(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array that `file` (.npz) holds; where there is none, or it is damaged, what `make` returns, kept there.

    A file appears whole or not at all. That it cannot be written is logged, no error.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:  # .npz files have checksums
            return arrays["images"]
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever is wrong with it, it can be made again
        log.warning("the cache %s cannot be used (%s): decoding again", file, error)
    images = make()
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as out:
            np.savez(out, images=images)
        os.replace(part, file)
        log.info("decoded images are kept in %s", file)
    except OSError as error:
        log.warning("decoded images are not kept, the next run decodes again: cannot write %s (%s)", file, error)
    finally:
        with suppress(OSError):
            part.unlink()
    return images


@contextmanager
def _bar(name: str) -> Iterator[Progress]:
    """A bar on a terminal; nothing elsewhere."""
    from rich.console import Console  # a training job that finds the cache needs none
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("decoding {task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _serve() -> None:
    """Answers jobs from standard input until it ends."""
    with suppress(EOFError, BrokenPipeError):  # the other side has ended
        while True:
            job = pickle.load(sys.stdin.buffer)
            pickle.dump(list(_outcomes(*job)), sys.stdout.buffer)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
