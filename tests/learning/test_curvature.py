"""Largest eigenvalues of a loss's Hessian in the inner product of the controls, against dense ones."""

import numpy as np
import pytest
import scipy.linalg
from firedrake import COMM_WORLD
from helpers import laplace, set_smooth, smooth
from numpy.testing import assert_allclose
from pyadjoint.reduced_functional_numpy import ReducedFunctionalNumPy

from fem_resnet import Basis, Batch, LearningProblem, ResidualNetwork, hessian_spectrum, least_squares, tikhonov, train

on_ranks = pytest.mark.parallel([1, 2, 3])
TIMES = (0.0, 0.2, 0.9)


def problem(bias="basis", learn="parameters", alone=False):
    basis = laplace("disk", "CG1", 3, alone)
    phi = Basis(basis.Y, basis.values @ np.diag([1.0, 2.0, 3.0]), "given")  # not orthonormal: Gram matrices matter
    net = ResidualNetwork(phi, bias=phi if bias == "basis" else None, layers=TIMES)
    set_smooth(net, np.random.default_rng(0))
    batch = Batch(net.Y.batch(smooth(net.Y, 4)), net.Y.batch(smooth(net.Y, 4, seed=9)))
    return LearningProblem(net, None, least_squares, tikhonov(0.1), batch, learn=learn)


def inner(problem, u, v):
    owners = [(p, k) for p in problem.parameters for k in range(len(p.functions))]
    return sum(p.inner(k, p.space_bases[k].read(a), p.space_bases[k].read(b)) for (p, k), a, b in zip(owners, u, v))


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("bias", ["basis", "nodes"])
def test_eigenvalues_are_those_of_the_dense_pencil(bias, gauss_newton):
    p = problem(bias)
    spectrum = hessian_spectrum(p, 5, gauss_newton=gauss_newton)
    loss = LearningProblem(p.net, None, least_squares, None, p.batch)
    J = loss.reduced_functional(gauss_newton=gauss_newton)
    J(p.functions)
    J.derivative()
    array = ReducedFunctionalNumPy(J)
    at = [f.copy(deepcopy=True) for f in p.functions]
    columns = np.eye(array.get_global(p.functions).size)
    as_functions = [[f.copy(deepcopy=True) for f in array.set_local(at, e)] for e in columns]
    R = np.array([[inner(p, u, v) for v in as_functions] for u in as_functions])
    H = np.array([array.get_global(J.hessian(v)) for v in as_functions])
    exact = scipy.linalg.eigh((H + H.T) / 2, R, eigvals_only=True)[::-1]
    assert_allclose(spectrum.values, exact[:5], rtol=1e-8)
    assert spectrum.residuals.max() < 1e-7 * exact[0]
    if gauss_newton:
        assert exact.min() > -1e-12
    assert_allclose(spectrum.variance(0.1), 0.1 / (0.1 + exact[:5]), rtol=1e-8)


@on_ranks
@pytest.mark.parametrize("learn", ["parameters", "both"])
def test_directions_are_orthonormal_in_the_label_measure_and_values_see_no_partition(learn):
    p = problem("nodes", learn)
    spectrum = hessian_spectrum(p, 4)
    gram = [[inner(p, u, v) for v in spectrum.directions] for u in spectrum.directions]
    assert_allclose(gram, np.eye(4), rtol=0, atol=1e-8)
    assert (np.diff(spectrum.values) <= 0).all() and (COMM_WORLD.bcast(spectrum.values) == spectrum.values).all()
    # the eigensolver's tolerance
    assert_allclose(spectrum.values, hessian_spectrum(problem("nodes", learn, alone=True), 4).values, rtol=1e-7)


@pytest.mark.parallel([1, 2])
def test_what_does_not_fit_is_refused():
    p = problem()
    for count in (0, 1.5, 1000):
        with pytest.raises(ValueError, match=r"^count: expected an integer from 1 to 24"):
            hessian_spectrum(p, count)
    with pytest.raises(RuntimeError, match="SLEPc found . of 6 eigenvalues"):
        hessian_spectrum(p, 6, solver_parameters={"eps_max_it": 1, "eps_ncv": 8, "eps_tol": 1e-15})


def test_variances_at_a_minimum_are_those_of_the_inverse_of_the_whole_hessian():
    """(H + lambda R)^-1 = (lambda R)^-1 - sum_i (1 / lambda - 1 / (lambda + mu_i)) v_i v_i^T, with all eigenpairs."""
    p, weight = problem(), 0.1
    assert train(p, {"tao_type": "nls", "tao_gatol": 1e-10}, monitor=lambda progress: None).converged
    J = p.reduced_functional()
    J.derivative()
    array = ReducedFunctionalNumPy(J)
    at = [f.copy(deepcopy=True) for f in p.functions]
    columns = np.eye(array.get_global(p.functions).size)
    as_functions = [[f.copy(deepcopy=True) for f in array.set_local(at, e)] for e in columns]
    R = np.array([[inner(p, u, v) for v in as_functions] for u in as_functions])
    exact = np.linalg.inv([array.get_global(J.hessian(v)) for v in as_functions])
    spectrum = hessian_spectrum(p, len(columns))
    V = np.array([array.get_global(v) for v in spectrum.directions])
    posterior = np.linalg.inv(weight * R) - V.T @ np.diag((1 - spectrum.variance(weight)) / weight) @ V
    # the eigensolver's tolerance, over the smallest curvature
    assert_allclose(posterior, exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    assert spectrum.values.min() > -weight and spectrum.variance(weight).min() < 0.5  # a minimum, and the data speak
