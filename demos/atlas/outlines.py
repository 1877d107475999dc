"""Outlines of leaves, OSULeaf of the UCR archive, and outlines that are made up where the archive cannot be reached.

OSULeaf (from the MSc thesis of A. Grandhi; Dau et al., The UCR time series archive, 2018): 200 training and 242 test outlines
of leaves of four maples and two oaks, each of 427 values along the outline, anti-clockwise, of mean 0 and deviation 1. The
files do not say which number is which kind. The wheel of aeon 1.6.0 brings them. It is fetched by pip, held against its
checksum, and read as an archive: nothing is installed.

The made-up outlines are u(s) = cos(2 pi k (s + w(s))) + noise(s) with k = 3 .. 8 lobes, one number a class, from a random
starting point. The warp w and the noise are random Fourier series that fall as 1/m^2, with deviations of 0.1/k and 0.3.

Leaves of one kind differ in where along the outline their parts lie. `warped` makes further samples of an outline u by
u(s + w(s)), where w is such a series that falls as 1/m, with six modes.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

POINTS, CLASSES = 427, 6
#: Samples of each class: training, test. They were counted in the files, and are held against them by a test.
SIZES = [34, 29, 33, 53, 36, 15], [32, 55, 42, 44, 46, 23]

VERSION = "1.6.0"
WHEEL = f"aeon-{VERSION}-py3-none-any.whl"
CHECKSUM = "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409"
MEMBER = "aeon/datasets/data/OSULeaf/OSULeaf_{}.ts"


class NotThere(Exception):
    """The archive is neither on this machine nor to be had."""


def wheel(folder: Path) -> Path:
    """The path of aeon's wheel in a folder, into which pip fetches it if need be.

    Raises
    ------
    NotThere
        If it cannot be fetched.
    ValueError
        If it is not the one that this file knows.
    """
    path = folder / WHEEL
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--retries", "1", "--timeout", "10", "--dest", str(folder), f"aeon=={VERSION}"]
        if subprocess.run(command, capture_output=True).returncode or not path.exists():
            raise NotThere(f"pip does not find aeon {VERSION}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != CHECKSUM:
        raise ValueError(f"{path}: expected the checksum {CHECKSUM}, got {found}; delete the file")
    return path


def parsed(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Values, shape (samples, points), and classes from 0, of a file of the format .ts."""
    rows = [line.rsplit(":", 1) for line in text.split("@data", 1)[1].split()]
    return np.array([values.split(",") for values, _ in rows], float), np.array([int(label) - 1 for _, label in rows])


def leaves(folder: str) -> dict[str, np.ndarray]:
    """`inputs`, `labels`, `test_inputs`, `test_labels` of OSULeaf. Raises what `wheel` does."""
    with zipfile.ZipFile(wheel(Path(folder))) as archive:
        (x, y), (x_test, y_test) = (parsed(archive.read(MEMBER.format(part)).decode()) for part in ("TRAIN", "TEST"))
    return {"inputs": x, "labels": y, "test_inputs": x_test, "test_labels": y_test}


def series(random: np.random.Generator, number: int, modes: int, fall: float) -> np.ndarray:
    """Random Fourier series of mean square 1 at the points, shape (number, points); amplitudes fall as m^-fall."""
    s, m = np.arange(POINTS) / POINTS, np.arange(1, modes + 1)
    a, b = random.standard_normal((2, number, modes)) * m**-fall / np.sqrt(np.sum(m ** (-2 * fall)))
    return a @ np.cos(2 * np.pi * np.outer(m, s)) + b @ np.sin(2 * np.pi * np.outer(m, s))


def warped(x: np.ndarray, deviation: float, seed: int) -> np.ndarray:
    """Outlines u(s + w(s)) of outlines u, samples first; w has this deviation, the whole outline has the length one."""
    s = np.arange(POINTS + 1) / POINTS
    places = (s[:-1] + deviation * series(np.random.default_rng(seed), len(x), 6, 1.0)) % 1
    return np.array([np.interp(at, s, np.append(u, u[0])) for at, u in zip(places, x)])


def made_up(samples: int, test: int) -> dict[str, np.ndarray]:
    """The same of outlines by the law above."""
    random, s = np.random.default_rng(0), np.arange(POINTS) / POINTS

    def drawn(number):
        labels = np.arange(number) % CLASSES
        lobes, start = labels[:, None] + 3, random.uniform(size=(number, 1))
        u = np.cos(2 * np.pi * lobes * (s + start) + 2 * np.pi * 0.1 * series(random, number, 20, 2.0))
        u += 0.3 * series(random, number, 20, 2.0)
        return (u - u.mean(axis=1, keepdims=True)) / u.std(axis=1, keepdims=True), labels

    (x, y), (x_test, y_test) = drawn(samples), drawn(test)
    return {"inputs": x, "labels": y, "test_inputs": x_test, "test_labels": y_test}
