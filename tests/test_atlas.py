"""What the demos of the atlas share, and the page that is made of their results."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from firedrake import COMM_WORLD

ROOT = Path(__file__).parents[1]


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demos" / "atlas")
    return import_module("comparison")


CALLS = []


def made(number):
    CALLS.append(number)
    return {"numbers": np.arange(number)}


@pytest.mark.parallel([1, 2, 3])
def test_data_are_made_once_by_one_rank_and_anew_by_another_law(comparison, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "OUTPUT", tmp_path)
    CALLS.clear()
    for number in (3, 3, 4, 3):
        assert comparison.made_once(made, number)["numbers"].tolist() == list(range(number))
    assert CALLS == ([3, 4] if COMM_WORLD.rank == 0 else [])


def test_ridges_find_a_linear_map_and_a_smooth_one(comparison):
    random = np.random.default_rng(0)
    x, A = 7 + 3 * random.standard_normal((150, 4)), random.standard_normal((4, 3))
    train, test = x[:100], x[100:]
    for target, best in ((lambda x: x @ A + 1, {"linear map": 1e-6}), (lambda x: np.sin(x @ A / 6), {"kernel ridge": 0.1})):
        found = {name: y for name, y, _ in comparison.ridges(train, target(train), test)}
        error = {name: comparison.relative_errors(y, target(test), np.ones(3)).mean() for name, y in found.items()}
        assert set(error) == {"linear map", "kernel ridge"}
        assert all(error[name] < bound for name, bound in best.items()), error
    assert error["linear map"] > 2 * error["kernel ridge"]


def test_a_result_is_read_as_it_was_written_and_the_best_is_marked(comparison, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "FOLDER", tmp_path)
    results = [
        comparison.Result("network", [0.01, 0.02], [5.0, 7.0], 1234),
        comparison.Result("kernel ridge", [0.012], [1.0]),
    ]
    one = comparison.Experiment("P", "D", "L", "S", results, ["more"])
    one.write("p")
    assert comparison.Experiment.read("p") == one and [result.ours for result in results] == [True, False]
    assert one.table().splitlines()[2:] == ["| network | 1,234 | 1.50 | 0.71 | 6 |", "| kernel ridge |  | **1.20** |  | 1 |"]


def test_the_atlas_is_what_its_script_makes_of_the_results(comparison):
    page = import_module("page")
    assert page.PAGE.read_text() == page.page()
    assert page.summary() in (ROOT / "README.md").read_text()


def test_whatever_is_drawn_has_five_seeds(comparison):
    """All that has learned numbers, but what is linear in them."""
    for name in import_module("page").NAMES:
        drawn = [one for one in comparison.Experiment.read(name).results if one.parameters and one.seconds]
        few = [one.method for one in drawn if len(one.errors) != comparison.SEEDS]
        assert drawn and all("linear" in method or "L = 0" in method or "no layers" in method for method in few), (name, few)


def test_the_full_runs_of_the_atlas_are_no_tests(comparison, monkeypatch):
    """They train baselines for half an hour; their short forms are."""
    monkeypatch.syspath_prepend(ROOT / "tests")
    assert [f"{name}.py" for name in import_module("page").NAMES] == import_module("test_demos").ATLAS
