"""Every type of TAO that PETSc has, with and without bounds, wherever it stops: right, or refused by name.

Also: what one unit of length makes of a problem, another makes of it too.
"""

from dataclasses import replace
from pathlib import Path

import firedrake as fd
import numpy as np
import petsctools
import pytest
from firedrake import COMM_WORLD
from helpers import smooth
from numpy.testing import assert_allclose, assert_array_equal
from petsc4py import PETSc
from problems import CLASSES, learning_problem, network

from fem_resnet import (
    Basis,
    Batch,
    Head,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    cross_entropy,
    least_squares,
    train,
    train_pam,
)  # fmt: skip
from fem_resnet.training.tao_types import TYPES

on_ranks = pytest.mark.parallel([1, 2, 3])
alone = COMM_WORLD.size == 1


def _petsc_types() -> list[str]:
    """The names in PETSc's own header, and one that it does not have."""
    header = Path(petsctools.get_petsc_dir()) / "include" / "petsctao.h"
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define TAO")]
    return [words[2].strip('"') for words in lines if len(words) == 3 and words[2].startswith('"')] + ["adam"]


ALL = _petsc_types()
#: On two ranks: one of each kind, with bounds and without, by gradients and by Hessian actions, and one that is refused.
WALKED = {1: ALL, 2: ["lmvm", "blmvm", "bntr", "bncg", "owlqn"]}.get(COMM_WORLD.size, ["blmvm", "owlqn"])
BOUNDS = {"bias": (-0.4, 0.5), "kernel": (-0.6, 0.3)}


def problem():
    return learning_problem(network("disk", "DG0", layers_per_block=3), samples=2)


def _few_krylov_steps(tao_type) -> dict:
    """So that a Newton step costs no more than a few gradients."""
    prefix = TYPES[tao_type].newton
    return {} if prefix is None else {f"tao_{prefix}_ksp_max_it": 4}


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
        with pytest.raises(ValueError, match=f"^solver_parameters: TAO's '{tao_type}' .*'tao_type' of .*'blmvm'"):
            train(problem(), {"tao_type": tao_type}, bounds=bounds)
        return
    values = []
    for limit in (0, 1, 20):
        P = problem()
        watch = Watch(P)
        options = {"tao_type": tao_type, "tao_max_it": limit} | _few_krylov_steps(tao_type)
        result = train(P, options, monitor=watch, bounds=bounds)
        _right(P, result, watch, bounds)
        assert result.iterations <= limit and (result.reason == "ITERATIONS") == (result.iterations == limit)
        values.append(result.value)
    assert values[1] < values[0] and values[2] < 0.9 * values[0]


@on_ranks
@pytest.mark.parametrize("tao_type", ["lmvm", "bntr"] if alone else ["lmvm"])
@pytest.mark.parametrize("how", ["callback", "tolerance", "least value", "round-off"])
def test_the_result_is_right_whatever_stops_it(tao_type, how):
    P = problem()
    watch = Watch(P, stop_at=2 if how == "callback" else None)
    options = {
        "callback": {}, "tolerance": {"tao_gttol": 1e-1}, "least value": {"tao_fmin": 0.9 * float(P.evaluate()[0])},
        "round-off": {"tao_gatol": 0.0, "tao_max_it": 60},
    }[how]  # fmt: skip
    reasons = {
        "callback": {"STOPPED"}, "tolerance": {"CONVERGED_GTTOL"}, "least value": {"CONVERGED_MINF"},
        "round-off": {"CONVERGED_GRTOL", "DIVERGED_LS_FAILURE", "CONVERGED_STEPTOL", "ITERATIONS"},
    }[how]  # fmt: skip
    result = train(P, {"tao_type": tao_type} | options | _few_krylov_steps(tao_type), monitor=watch)
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
    # Each problem has a mesh of its own, whose partition may be another one.
    assert_allclose(found.values, by_dictionary.values, rtol=1e-12)


def test_options_that_are_no_dictionary_are_refused():
    with pytest.raises(
        TypeError, match=r"^solver_parameters: expected a Mapping or None, got str; give PETSc's options by name"
    ):
        train(problem(), "lmvm")


# -- units -----------------------------------------------------------------------------------------------------------

UNITS = (1e-6, 1.0, 6371220.0)
#: For types that compare coefficients, whose amplitudes are powers of two.
POWERS = (2.0**-20, 1.0, 2.0**22)


def in_unit(length, kind):
    """One and the same problem, told in a unit of length: f, a and W f stay, b and W fall like 1 / |Y|.

    "classes" by a head, J without a unit; a "field", J in the unit of |Y|; "both": its initial state is learned too.
    """
    mesh = fd.UnitDiskMesh(1)
    mesh.coordinates.dat.data[...] *= length
    Y = LabelSpace(fd.FunctionSpace(mesh, "DG", 0))
    x = Y.coordinates / length
    phi = Basis(Y, np.column_stack([np.ones(Y.nodes), x, x[:, 0] * x[:, 1]]), "given")
    net = ResidualNetwork(phi, layers=(0.0, 0.3, 1.0))
    rng = np.random.default_rng(7)
    for k in range(2):
        net.bias.set(k, 0.3 * np.cos(x @ [1.0, 2.0] + k))
        net.kernel.set(k, rng.normal(size=(4, 4)) / length**2)
    f, target = (np.cos(x @ np.array([[1.0, -2.0], [0.5, 3.0]]) + shift) for shift in (0.0, 1.0))
    if kind != "classes":
        batch = Batch(Y.batch(f), Y.batch(target))
        return LearningProblem(net, None, least_squares, None, batch, learn="both" if kind == "both" else "parameters")
    head = Head(phi, CLASSES)
    head.W.set(0, 0.5 * rng.normal(size=head.W.space_basis.shape) / length**2)
    return LearningProblem(net, head, cross_entropy, None, Batch(Y.batch(f), [0, 2]))


def _falls(values):
    return np.array(values) / values[0]


@on_ranks
@pytest.mark.parametrize(
    "tao_type, kind",
    [
        ("lmvm", "field"),
        ("lmvm", "classes"),
        ("lmvm", "both"),
        ("ntr", "field"),
        ("blmvm", "field"),
        ("bnls", "classes"),
        ("bncg", "field"),
    ][: None if alone else 1],
)
def test_training_takes_the_same_iterations_in_every_unit_of_length(tao_type, kind):
    """On a disk of radius 1e-6, of one and of the Earth's; until the default tolerances or a looser one are met."""
    results = []
    for length in UNITS if tao_type == "lmvm" else POWERS:
        P = in_unit(length, kind)
        bounds = {"kernel": (-2 / length**2, 2 / length**2), "bias": (-1.5, 1.5)} if TYPES[tao_type].bounds else None
        options = {"tao_type": tao_type, "tao_max_it": 8} | _few_krylov_steps(tao_type)
        results.append(train(P, options, bounds=bounds, monitor=lambda p: None))
        loose = train(
            in_unit(length, kind), options | {"tao_gttol": 0.2, "tao_max_it": 100}, bounds=bounds, monitor=lambda p: None
        )
        results[-1] = results[-1], loose
    for found, loose in results:
        assert (found.iterations, found.reason) == (results[1][0].iterations, results[1][0].reason)
        assert (loose.iterations, loose.reason) == (results[1][1].iterations, "CONVERGED_GTTOL")
        # Round-off is that of other numbers, and grows with the iterations.
        assert_allclose(_falls(found.values), _falls(results[1][0].values), rtol=1e-6)
        assert_allclose(_falls(loose.values), _falls(results[1][1].values), rtol=1e-6)
    assert results[1][0].iterations == 8 and results[1][0].value < 0.9 * results[1][0].values[0]


@on_ranks
def test_a_minimum_is_left_alone_by_the_default_tolerances_in_every_unit_of_length():
    for length in UNITS:
        Y = in_unit(length, "field").net.Y
        net = ResidualNetwork(Basis(Y, np.ones((Y.nodes, 1)), "given"), layers=1, activation="identity")
        net.kernel.set(0, [[1.0 / Y.measure]])  # two samples, one bias: J cannot be 0
        batch = Batch(Y.batch(smooth(Y, 2) * 0 + [1.0, -1.0]), Y.batch(smooth(Y, 2) * 0 + [2.0, 1.0]))
        P = LearningProblem(net, None, least_squares, None, batch)
        options = {"tao_max_it": 50}
        first = train(P, options, bounds={"kernel": (0.9 / Y.measure, 1.0 / Y.measure)}, monitor=lambda p: None)
        again = train(P, options, bounds={"kernel": (0.9 / Y.measure, 1.0 / Y.measure)}, monitor=lambda p: None)
        assert first.converged and first.iterations > 1 and again.converged and again.iterations == 0, (first, again)


@on_ranks
def test_pam_stops_relative_to_its_start_in_every_unit_of_length():
    """tau has the unit of a squared norm over J's: a J told in other units, with as much less a tau, is the same problem."""
    results = []
    for unit in (1e-12, 1.0, 1e12):
        P = in_unit(1.0, "field")
        targets = P.batch.targets
        loss = _times(unit)
        P = LearningProblem(P.net, None, loss, None, Batch(P.batch.inputs, targets))
        results.append(train_pam(P, step=1.0 / unit, gradient_tolerance=0.3, iterations=20, monitor=lambda p: None))
    for found in results:
        assert (found.iterations, found.reason) == (results[1].iterations, "GRADIENT_TOLERANCE")
        assert_allclose(_falls(found.values), _falls(results[1].values), rtol=1e-6)
    assert 1 < results[1].iterations < 20


def _times(unit):
    """Least squares in another unit of J."""
    return replace(
        least_squares, name="scaled", value=lambda *a: unit * least_squares.value(*a),
        gradient=lambda *a: unit * least_squares.gradient(*a), hessian=lambda *a: unit * least_squares.hessian(*a),
    )  # fmt: skip
