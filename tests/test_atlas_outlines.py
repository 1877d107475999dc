"""Outlines of the atlas: how they are read, fetched and made up."""

import sys
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

TEXT = """#An outline of a leaf: 2, 3
@problemName Leaves
@classLabel true 1 2
@data
0.5,-1,2.5e-1:2
1,2,3:1
"""


@pytest.fixture
def outlines(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demos" / "atlas")
    return import_module("outlines")


def test_a_file_has_values_and_classes_from_zero(outlines):
    x, y = outlines.parsed(TEXT)
    assert x.tolist() == [[0.5, -1, 0.25], [1, 2, 3]] and y.tolist() == [1, 0]


def test_another_wheel_is_refused_and_none_is_said_to_be_missing(outlines, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")  # no pip
    with pytest.raises(outlines.NotThere, match="pip does not find aeon"):
        outlines.wheel(tmp_path)
    with zipfile.ZipFile(tmp_path / outlines.WHEEL, "w") as archive:
        archive.writestr(outlines.MEMBER.format("TRAIN"), TEXT)
    with pytest.raises(ValueError, match="expected the checksum d05227"):
        outlines.wheel(tmp_path)


def test_the_archive_has_the_outlines_that_its_description_says(outlines):
    folder = ROOT / "demos" / "output" / "data"
    if not (folder / outlines.WHEEL).exists():
        pytest.skip("the wheel of aeon has not been fetched: demos/outlines_on_the_circle.py does it")
    data = outlines.leaves(folder)
    for part, sizes in zip(("", "test_"), outlines.SIZES):
        x, y = data[f"{part}inputs"], data[f"{part}labels"]
        assert x.shape == (sum(sizes), outlines.POINTS) and np.bincount(y).tolist() == sizes
        assert np.abs(x.mean(axis=1)).max() < 1e-7 and np.abs(x.std(axis=1, ddof=1) - 1).max() < 1e-6
        # They are closed: the step from the last value to the first is as large as others.
        assert np.abs(x[:, 0] - x[:, -1]).mean() < np.abs(np.diff(x)).mean()


def test_made_up_outlines_have_their_lobes(outlines):
    """The amplitude of a class is largest at its number of lobes, and outlines begin anywhere."""
    data = outlines.made_up(120, 60)
    assert data["inputs"].shape == (120, outlines.POINTS) and data["test_labels"].shape == (60,)
    for part in ("", "test_"):
        x, y = data[f"{part}inputs"], data[f"{part}labels"]
        modes = np.fft.rfft(x) / outlines.POINTS
        assert np.abs(modes[:, 0]).max() < 1e-12 and np.allclose(x.std(axis=1), 1)
        mean = np.array([np.abs(modes[y == label]).mean(axis=0) for label in range(outlines.CLASSES)])
        assert mean.argmax(axis=1).tolist() == [3, 4, 5, 6, 7, 8]
        assert np.abs(np.exp(1j * np.angle(modes[range(len(y)), y + 3])).mean()) < 0.3
    assert np.array_equal(data["inputs"], outlines.made_up(120, 60)["inputs"])
    assert not np.array_equal(data["inputs"][:60], data["test_inputs"])


def test_warped_outlines_are_the_outlines_along_another_parameter(outlines):
    s = np.arange(outlines.POINTS) / outlines.POINTS
    x = np.array([np.cos(2 * np.pi * k * s) for k in (1, 2, 3)])
    assert np.abs(outlines.warped(x, 0.0, 0) - x).max() < 1e-12
    found = outlines.warped(x, 0.02, 0)
    # It is cos(k v): so no value is new, and the size of what moves them is what was asked for.
    moved = np.unwrap(np.arctan2(*[outlines.warped(f(2 * np.pi * s)[None].repeat(400, 0), 0.02, 1) for f in (np.sin, np.cos)]))
    w = moved / (2 * np.pi) - s
    assert np.abs(found).max() <= 1 and abs(np.sqrt(np.mean(w**2)) - 0.02) < 1e-3
    assert np.array_equal(found, outlines.warped(x, 0.02, 0)) and not np.array_equal(found, outlines.warped(x, 0.02, 1))
