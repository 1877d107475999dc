"""Every type of TAO that PETSc has, with and without bounds, wherever it stops: right, or refused by name.

Also: what one unit of length makes of a problem, another makes of it too.
"""

from pathlib import Path

import numpy as np
import petsctools
import pytest
from firedrake import COMM_WORLD
from numpy.testing import assert_allclose, assert_array_equal
from petsc4py import PETSc

from fem_resnet.training.gradient import TOLERANCES, train
from fem_resnet.training.tao import TYPES
from problems import learning_problem, network

on_ranks = pytest.mark.parallel([1, 2, 3])
alone = COMM_WORLD.size == 1


def _petsc_types() -> list[str]:
    """The names in PETSc's own header, and one that it does not have."""
    header = Path(petsctools.get_petsc_dir()) / "include" / "petsctao.h"
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define TAO")]
    return [words[2].strip('"') for words in lines if len(words) == 3 and words[2].startswith('"')] + ["adam"]


ALL = _petsc_types()
#: On more ranks: one of each kind, with bounds and without, by gradients and by Hessian actions, and one that is refused.
WALKED = ALL if alone else ["lmvm", "blmvm", "bntr", "bncg", "owlqn"]
BOUNDS = {"bias": (-0.4, 0.5), "kernel": (-0.6, 0.3)}


def problem():
    return learning_problem(network("disk", "DG0", layers_per_block=3), samples=2)


def _held(problem):
    return [p.get(k) for p in problem.parameters for k in range(len(p.functions))]


class Watch:
    """A monitor that evaluates J at the problem's parameters, and keeps these."""

    def __init__(self, problem, stop_at=None):
        self.problem, self.stop_at, self.told, self.evaluated, self.held = problem, stop_at, [], [], []

    def __call__(self, progress):
        self.told.append(progress)
        self.evaluated.append(float(self.problem.evaluate()[0]))
        self.held.append(_held(self.problem))
        return progress.iteration == self.stop_at


def _right(P, result, watch, bounds):
    """The result is what the problem holds, with its J, and no worse than the start."""
    assert_allclose(result.value, P.evaluate()[0], rtol=1e-14)
    for held, kept, told in zip(_held(P), result.controls, watch.held[-1], strict=True):
        assert_array_equal(held, kept)
        assert_array_equal(held, told)
    assert_allclose([p.value for p in watch.told], watch.evaluated, rtol=1e-14)
    assert result.value <= watch.evaluated[0] * (1 + 1e-14) and result.values[-1] == result.value
    assert [p.iteration for p in watch.told] == list(range(result.iterations + 1))
    for p in P.parameters:
        low, high = (bounds or {}).get(p.name, (-np.inf, np.inf))
        assert all(np.all((p.get(k) >= low) & (p.get(k) <= high)) for k in range(len(p.functions)))


def test_the_walk_goes_over_all_types_that_petsc_registers():
    assert len(ALL) > 30 and set(TYPES) < set(ALL)
    for name in ("gpcg", "bmrm", "owlqn", "nm", "pounders", "ssils", "tron", "adam"):
        assert name in ALL and name not in TYPES


@on_ranks
@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["free", "bounds"])
@pytest.mark.parametrize("tao_type", WALKED)
def test_a_type_is_right_wherever_it_stops_or_refused_by_name(tao_type, bounds):
    allowed = [name for name, kind in TYPES.items() if kind.bounds or bounds is None]
    if tao_type not in allowed:
        with pytest.raises(ValueError, match=f"^solver_parameters: TAO's '{tao_type}' .*'tao_type' one of .*'blmvm'"):
            train(problem(), {"tao_type": tao_type}, bounds=bounds)
        return
    values = []
    for limit in (0, 1, 20):
        P = problem()
        watch = Watch(P)
        result = train(P, {"tao_type": tao_type, "tao_max_it": limit}, monitor=watch, bounds=bounds)
        _right(P, result, watch, bounds)
        assert result.iterations <= limit and (result.reason == "DIVERGED_MAXITS") == (result.iterations == limit)
        values.append(result.value)
    assert values[1] < values[0] and values[2] < 0.9 * values[0]


@on_ranks
@pytest.mark.parametrize("tao_type", ["lmvm", "bnls", "bntr"] if alone else ["lmvm"])
@pytest.mark.parametrize("how", ["callback", "tolerance", "least value", "round-off"])
def test_the_result_is_right_whatever_stops_it(tao_type, how):
    P = problem()
    watch = Watch(P, stop_at=2 if how == "callback" else None)
    options = {
        "callback": {}, "tolerance": {"tao_gttol": 1e-1}, "least value": {"tao_fmin": 0.9 * float(P.evaluate()[0])},
        "round-off": {"tao_gatol": 0.0, "tao_max_it": 500},
    }[how]  # fmt: skip
    reasons = {
        "callback": {"STOPPED"}, "tolerance": {"CONVERGED_GTTOL"}, "least value": {"CONVERGED_MINF"},
        "round-off": {"CONVERGED_GRTOL", "DIVERGED_LS_FAILURE", "CONVERGED_STEPTOL", "DIVERGED_MAXITS"},
    }[how]  # fmt: skip
    result = train(P, {"tao_type": tao_type} | options, monitor=watch)
    _right(P, result, watch, None)
    assert result.reason in reasons and result.converged == (result.reason.startswith("CONVERGED"))


@on_ranks
def test_the_type_and_the_preconditioner_follow_an_option_with_the_prefix():
    options = PETSc.Options()
    try:
        options["mine_tao_type"] = "owlqn"
        with pytest.raises(ValueError, match="^solver_parameters: TAO's 'owlqn' is not taken"):
            train(problem(), options_prefix="mine")
        options["mine_tao_type"] = "nls"
        found = train(problem(), {"tao_max_it": 2}, options_prefix="mine", monitor=lambda p: None)
    finally:
        options.delValue("mine_tao_type")
    by_dictionary = train(problem(), {"tao_type": "nls", "tao_max_it": 2}, monitor=lambda p: None)
    assert_array_equal(found.values, by_dictionary.values)


def test_options_that_are_no_dictionary_are_refused():
    with pytest.raises(TypeError, match=r"^solver_parameters: a dictionary .*\{'tao_type': 'lmvm'\}; 'lmvm' was given"):
        train(problem(), "lmvm")
