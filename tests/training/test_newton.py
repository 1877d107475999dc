"""Newton's method on Hessian actions: TAO's and SciPy's, on networks without layers."""

import numpy as np
import pytest
import scipy.optimize
from firedrake import COMM_WORLD
from helpers import laplace
from numpy.testing import assert_allclose
from problems import learning_problem, observations
from pyadjoint.optimization.tao_solver import PETScVecInterface, ReducedFunctionalMat, RFOperation
from pyadjoint.reduced_functional_numpy import ReducedFunctionalNumPy

from fem_resnet.learning.batch import Batch
from fem_resnet.learning.head import Head
from fem_resnet.learning.loss import least_squares
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.regulariser import tikhonov
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.training.gradient import train
from fem_resnet.training.hessian import HessianAtItsPoint

on_ranks = pytest.mark.parallel([1, 2, 3])
#: |gradient| at which a method has arrived.
GOAL = 1e-10
#: Below this a gradient is nothing but round-off: J is of size one.
ROUND_OFF = 1e-16


def classes() -> LearningProblem:
    """Softmax, cross entropy and Tikhonov: strictly convex. Starts at zero, where the gradient is of size one."""
    problem = learning_problem(ResidualNetwork(laplace("disk", "CG1", 4), layers=0), weight=0.01, samples=6)
    for function in problem.functions:
        function.assign(0.0)
    return problem


def logistic_field() -> LearningProblem:
    """Least squares of a logistic prediction, a function on the sphere: not convex."""
    head = Head(laplace("disk", "CG1", 4), laplace("sphere", "DG0", 4), "logistic")
    Y = head.psi.Y
    inputs = Y.batch(np.cos(2 * Y.coordinates @ np.arange(1, 11).reshape(2, 5) / 5))
    batch = Batch(inputs, observations(head, "logistic", 5))
    return LearningProblem(ResidualNetwork(head.psi, layers=0), head, least_squares, tikhonov(0.01), batch)


def _silent(progress):
    pass


def orders(norms) -> np.ndarray:
    """p of |g_(k+1)| ~ |g_k|^p, from any three gradient norms on end that differ, but for round-off at the end."""
    logs = np.log([norm for norm in dict.fromkeys(norms) if norm > ROUND_OFF])
    return np.diff(logs)[1:] / np.diff(logs)[:-1]


@on_ranks
@pytest.mark.parametrize(
    "make", [logistic_field, classes][: None if COMM_WORLD.size < 3 else 1], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("kind", ["nls", "ntr", "bnls"] if COMM_WORLD.size == 1 else ["ntr"])
def test_newton_of_tao_converges_quadratically(make, kind):
    """A line search and trust regions."""
    linear_solver = {"bnls": "bnk"}.get(kind, kind)
    problem = make()
    options = {"tao_type": kind, "tao_gatol": GOAL, f"tao_{linear_solver}_ksp_rtol": 1e-8}
    result = train(problem, options, monitor=_silent)
    norms = ", ".join(f"{norm:.1e}" for norm in result.gradient_norms)
    assert result.reason == "CONVERGED_GATOL" and result.iterations < 15, f"|gradient| is {norms}"
    # The last may be one of round-off, and the first steps are long.
    found = orders(result.gradient_norms)[-2:]
    assert any(1.8 < order < 2.5 for order in found), f"|gradient| is {norms}: orders {found}"
    again = train(problem, monitor=_silent)  # L-BFGS
    assert again.iterations == 0 and again.gradient_norm < GOAL, "L-BFGS has another gradient"


@on_ranks
@pytest.mark.parametrize("method", ["trust-ncg", "Newton-CG"])
def test_newton_of_scipy_converges_faster_than_linearly_to_the_same_minimum(method):
    """Both solve for a step to a tolerance of sqrt |gradient|, which makes the order 3/2."""
    problem = classes()
    J = problem.reduced_functional()
    array = ReducedFunctionalNumPy(J)
    # Newton-CG takes a curvature <p, H p> below 6e-16 for none, which ends it at |gradient| = 6e-8 if J is not scaled.
    scale, options = {"trust-ncg": (1.0, {"gtol": GOAL}), "Newton-CG": (1e3, {"xtol": 1e-11})}[method]
    norms = []

    def derivative(x):
        # SciPy's inner product is the Euclidean one: no Riesz maps.
        array(x)
        return scale * array.get_global(J.derivative())

    def action(x, v):
        derivative(x)  # trust regions ask at a point after they have tried another
        return scale * array.get_global(J.hessian(array.set_local([f._ad_copy() for f in problem.functions], v)))

    start = array.get_global(problem.functions)
    found = scipy.optimize.minimize(
        lambda x: scale * float(array(x)),
        start,
        jac=derivative,
        hessp=action,
        method=method,
        options=options,
        callback=lambda x: norms.append(np.linalg.norm(derivative(x)) / scale),
    )
    text = ", ".join(f"{norm:.1e}" for norm in norms)
    assert found.success and norms[-1] < GOAL and len(norms) < 30, f"{found.message} |gradient| is {text}"
    assert orders(norms)[-1] > 1.4, f"|gradient| is {text}: orders {orders(norms)}"
    result = train(problem, {"tao_type": "nls", "tao_gatol": GOAL}, monitor=_silent)
    assert abs(found.fun / scale - result.value) < 1e-13
    assert_allclose(array.get_global(problem.functions), found.x, atol=1e-7)  # GOAL over the smallest curvature, 0.01


@on_ranks
def test_gauss_newton_reaches_the_same_minimum_without_the_curvature_of_the_prediction():
    problem = logistic_field()
    exact = train(problem, {"tao_type": "nls", "tao_gatol": GOAL}, monitor=_silent)
    for function in problem.functions:
        function.assign(0.0)
    result = train(problem, {"tao_type": "nls", "tao_gatol": GOAL}, monitor=_silent, gauss_newton=True)
    norms = ", ".join(f"{norm:.1e}" for norm in result.gradient_norms)
    assert result.converged and abs(result.value - exact.value) < 1e-13, f"|gradient| is {norms}"
    # linear at the rate of residual times curvature: if it is quadratic, nothing has been left out
    assert result.iterations > exact.iterations, f"|gradient| is {norms}"


@on_ranks
def test_the_hessian_stays_where_tao_asked_for_it():
    """pyadjoint's own matrix acts where the tape stands, which after a trial step is elsewhere."""
    problem = classes()
    J = problem.reduced_functional()
    comm = problem.net.Y.comm
    matrix = ReducedFunctionalMat(J, action=RFOperation.HESSIAN, comm=comm)
    matrix.setPythonContext(HessianAtItsPoint(J, comm=comm))
    interface = PETScVecInterface(problem.functions, comm=comm)
    x, y, v = interface.new_petsc(), interface.new_petsc(), interface.new_petsc()
    v.set(1.0)
    interface.to_petsc(x, problem.functions)
    matrix.getPythonContext().update(None, x, matrix, matrix)
    matrix.mult(v, y)
    expected = y.array_r.copy()
    elsewhere = [function._ad_copy() for function in problem.functions]
    interface.from_petsc(v, elsewhere)
    J(elsewhere)
    matrix.mult(v, y)
    assert_allclose(y.array_r, expected, rtol=1e-12)
