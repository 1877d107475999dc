"""The coupled system of the maximum principle, solved by SNES, against J's own gradient, MSA and the PMP residual."""

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import flat_network, label_space, smooth
from numpy.testing import assert_allclose
from problems import learning_problem, network
from test_msa import BOX, inside, problem

from fem_resnet import (
    Batch,
    Box,
    Kernel,
    LearningProblem,
    Polygon,
    RowBall,
    RowBox,
    cell_indicators,
    least_squares,
    msa,
    pmp_residual,
    solve_maximum_principle,
)  # fmt: skip
from fem_resnet.label_domain.basis import node_numbers
from fem_resnet.training.coupled_system import _System

on_ranks = pytest.mark.parallel([1, 2, 3])
HEUN = {"ts_type": "rk", "ts_rk_type": "2a"}


def fields(space=("annulus", "DG0"), alone=False, seed=50, **options):
    """Four samples whose targets the controls cannot reach; psi are indicators of cells, so rows are kernels themselves."""
    Y = label_space(*space, alone=alone)
    net = flat_network(cell_indicators(Y), **{"layers": 3, "final_time": 2.0, "solver_parameters": HEUN} | options)
    batch = Batch(Y.batch(smooth(Y, 4)), Y.batch(np.tanh(2 * smooth(Y, 4, seed=seed))), [1.0, 2.0, 1.0, 0.5])
    return LearningProblem(net, None, least_squares, None, batch)


def classes(alone=False):
    """A head with cross entropy on a disk, stepped by rk4 with two steps a layer; psi are no indicators."""
    return learning_problem(network("disk", "CG1", alone=alone, steps=2, size=0.3), weight=None)


def row_box(p):
    return RowBox(p.net.bases["psi"][0], (-0.2, 0.3), (-0.3, 0.2))


PROBLEMS = {
    "box": lambda: (problem(layers=2, steps=2), BOX),
    "rows": lambda: (fields(), row_box(fields())),
    "ball": lambda: (fields(), RowBall(fields().net.bases["psi"][0], 0.5)),
    "head": lambda: (classes(), row_box(classes())),
}


@on_ranks
@pytest.mark.parametrize("of", PROBLEMS)
def test_the_product_with_the_jacobian_is_the_derivative(of):
    """A Taylor test of F: its remainder has order 2."""
    p, _ = PROBLEMS[of]()
    A = BOX if of == "box" else RowBall(p.net.bases["psi"][0], 0.5) if of == "ball" else row_box(p)
    system, Y = _System(p, A), p.net.Y
    x = system.start()
    system.set_width(0.4)
    layers, two, stages, nodes, samples = system._shape
    field = smooth(Y, x.size // nodes, seed=8).reshape(nodes, layers, two, stages, samples)
    direction = (np.moveaxis(field, 0, 3) * system._scale).ravel()  # of the sizes of f and v
    base, sweep = system.residual(x), system.sweep(x)
    along, remainders = system.tangent(sweep, direction), []
    for h in 0.04, 0.02, 0.01:
        rest = system.residual(x + h * direction) - base - h * along
        remainders.append(float(np.sqrt(Y.sum(rest @ rest))))
    rates = np.log2(np.divide(remainders[:-1], remainders[1:]))
    print(f"\n{of}: {rates}, {remainders[-1]:.1e} beside {0.01 * float(np.sqrt(Y.sum(along @ along))):.1e}")
    assert rates[-1] > 1.85 and remainders[-1] < 0.05 * float(np.sqrt(Y.sum(along @ along)))


@on_ranks
@pytest.mark.parametrize("widths", [[3.0, 1.0], [1.0, 0.3]][COMM_WORLD.size > 1 :])
def test_a_solution_is_stationary_for_J_with_the_barrier(widths):
    """By J's own gradient, from the tape: G_k h_k / (epsilon c_k) = xi_k / sqrt(1 - xi_k^2) at all y, in all layers."""
    p = fields()
    A = row_box(p)
    found = solve_maximum_principle(p, A, smoothing=widths)
    print(f"\n{found}")
    assert found.converged and found.smoothing == widths[-1] and found.value == found.problem.evaluate()[0]
    assert_allclose(found.stages[-1].value, found.value, rtol=1e-12)
    Y, numbers = p.net.Y, node_numbers(p.net.Y)
    cells = np.diag(A.psi.gram)  # the measures of the cells
    # A network of the same rows, with a coefficient for each: its gradient in L2 is that in the rows.
    full = p.replace(net=p.net.replace(kernel=Kernel(A.psi, A.psi), bias=None))
    for l, c in enumerate(found.controls):
        full.net.bias.set(l, c.a)
        rows = np.zeros((Y.size, Y.size))
        rows[numbers] = c.phi
        full.net.kernel.set(l, Y.sum(rows))
    J = full.reduced_functional()
    assert_allclose(float(J.functional), found.value, rtol=1e-12)
    owners = [(q, k) for q in full.parameters for k in range(len(q.functions))]
    gradient = {(q.name, k): q.space_bases[k].read(g) for (q, k), g in zip(owners, J.derivative(apply_riesz=True))}
    largest = 0.0
    for l, c in enumerate(found.controls):
        G = -np.column_stack([gradient["bias", l], gradient["kernel", l][numbers] * cells])
        xi = (np.column_stack([c.a, c.phi]) - [0.05, *[-0.05] * Y.size]) / 0.25
        share = np.array([1.0, *cells / Y.measure])
        assert_allclose(G * 0.25 / (found.epsilon * share), xi / np.sqrt(1 - xi**2), rtol=1e-5, atol=1e-6)
        largest = max(largest, *Y.comm.allgather(np.abs(xi).max()))
    assert 0.5 < largest < 1


@on_ranks
def test_the_residual_of_the_maximum_principle_falls_with_the_width():
    """One sample, a target out of reach: from where MSA is, controls become those of (4.10), by independent measures."""
    start = msa(problem(layers=4, target=10.0), BOX, variant="damped", iterations=8)
    found = [solve_maximum_principle(start.problem, BOX, smoothing=[1e-2, 1e-3, 1e-4][: n + 1]) for n in range(3)]
    residuals = [pmp_residual(p.problem, BOX).upper for p in (start, *found)]
    print(f"\n{found[-1]}\nJ by MSA {start.value}; PMP residuals {residuals}")
    assert all(result.converged and inside(result, BOX) for result in found)
    assert residuals[1] < residuals[0] and residuals[2] < 0.1 * residuals[1] and residuals[3] < 1e-5
    assert found[0].value > found[1].value > found[2].value and found[2].value < start.value


@on_ranks
def test_newton_and_accelerated_successive_approximations_come_to_one_solution():
    p = classes()
    A = row_box(p)
    newton = solve_maximum_principle(p, A, smoothing=0.5)
    anderson = solve_maximum_principle(
        p, A, smoothing=0.5, solver_parameters={"snes_type": "anderson", "snes_max_it": 300}, options_prefix="by_anderson_"
    )
    print(f"\n{newton}\n{anderson}")
    assert newton.converged and anderson.converged and newton.stages[0].linear_iterations > 0
    assert newton.value < 0.99 * float(p.evaluate()[0])
    for mine, theirs in zip(newton.controls, anderson.controls):
        assert_allclose(mine.a, theirs.a, rtol=0, atol=1e-6)
        assert_allclose(mine.phi, theirs.phi, rtol=0, atol=1e-6)


@pytest.mark.parallel([2, 3])
def test_ranks_find_the_same():
    values = [
        solve_maximum_principle(fields(alone=alone), row_box(fields(alone=alone)), smoothing=1.0).value for alone in (0, 1)
    ]
    assert_allclose(*values, rtol=1e-9)


@on_ranks
def test_the_last_width_that_was_solved_for_is_kept():
    """With four iterations a stage fails sooner or later: the result then belongs to the width before."""
    p = fields()
    found = solve_maximum_principle(p, row_box(p), smoothing=[30.0, 1e-3], solver_parameters={"snes_max_it": 4})
    assert not found.converged and found.reason == "DIVERGED_MAX_IT" and len(found.stages) > 2
    assert found.smoothing == min(stage.smoothing for stage in found.stages if stage.reason.startswith("CONVERGED"))
    assert found.stages[2].smoothing == pytest.approx(np.sqrt(30.0 * 1e-3))
    again = solve_maximum_principle(found.problem, row_box(p), smoothing=found.smoothing)
    assert again.converged and again.stages[0].iterations == 0
    assert_allclose(again.value, found.value, rtol=1e-9)


def test_what_is_refused():
    p = problem(layers=2)
    with pytest.raises(ValueError, match="^activation: expected one without kinks, got relu; take a smooth one"):
        solve_maximum_principle(problem(activation="relu", layers=1), BOX)
    with pytest.raises(ValueError, match="^net: expected layers that are stepped by an explicit Runge-Kutta method, got"):
        solve_maximum_principle(problem(layers=1, solver_parameters={"ts_type": "cn"}), BOX)
    with pytest.raises(TypeError, match="^A: expected a Box or RowBox or RowBall, got Polygon; train by msa"):
        solve_maximum_principle(p, Polygon([(0, 0), (1, 0), (0, 1)]))
    with pytest.raises(ValueError, match="takes? not|does not take more than one sample"):
        solve_maximum_principle(fields(), Box((-1, 1), (-1, 1)))
    with pytest.raises(ValueError, match="^smoothing: expected widths > 0"):
        solve_maximum_principle(p, BOX, smoothing=[1.0, 0.0])
    with pytest.raises(ValueError, match="^solver_parameters: expected an option of a SNES of type 'anderson', got ksp_rtoll"):
        solve_maximum_principle(p, BOX, smoothing=1.0, solver_parameters={"snes_type": "anderson", "ksp_rtoll": 1e-3})


def test_an_overflow_is_said():
    p = problem(layers=1, activation="identity")
    p.net.bias.set(0, np.full(p.net.Y.nodes, 1e200))
    found = solve_maximum_principle(p, BOX, smoothing=1.0)
    assert not found.converged and "NAN" in found.reason
