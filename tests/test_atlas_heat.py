"""The data of heat_on_a_gear.py are what their law says."""

from importlib import import_module
from pathlib import Path

import firedrake as fd
import numpy as np
import pytest
from scipy.spatial import cKDTree

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def heat():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "demos" / "atlas")
        yield import_module("heat")


@pytest.fixture(scope="module")
def rivals(heat):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "demos" / "atlas")
        yield import_module("heat_rivals")


@pytest.fixture(scope="module")
def gear(heat):
    return heat.Gear()


def turned(points):
    c = np.sqrt(0.5)
    return points @ np.array([[c, c], [-c, c]])


@pytest.mark.parametrize("move", [turned, lambda points: points * [1, -1]])
def test_the_mesh_has_the_symmetries_of_the_gear(gear, move):
    """Nodes, cells and so the matrices: up to round-off."""
    distance, to = cKDTree(gear.points).query(move(gear.points))
    assert distance.max() < 1e-11 and len(set(to)) == len(to)
    cells = gear.V.cell_node_map().values
    assert {tuple(sorted(to[cell])) for cell in cells} == {tuple(sorted(cell)) for cell in cells}
    assert abs(gear.stiffness[to][:, to] - gear.stiffness).max() < 1e-9
    assert np.abs(gear.weights[to] - gear.weights).max() < 1e-13


def test_inputs_have_the_mean_square_of_the_law_and_the_map_is_odd_and_not_linear(heat, gear):
    u = gear.fields(400, np.random.default_rng(0))
    assert abs((gear.weights @ u**2).mean() / gear.weights.sum() - 1) < 0.1  # the deviation of this mean is 0.03
    few = u[:, :2]
    once, odd, twice = (gear.heat(scale * few) for scale in (1, -1, 2))
    np.testing.assert_allclose(odd, -once, atol=1e-13)
    assert np.linalg.norm(twice - 2 * once) > 0.1 * np.linalg.norm(once)
    np.testing.assert_allclose(gear.weights @ once, gear.weights @ few, rtol=1e-9)  # nothing leaves the gear


def by_crank_and_nicolson(u, steps, heat):
    """Temperatures at the end of continuous quadratics, in the weak form with k(u), by Newton's method in each step."""
    mesh = u.function_space().mesh()
    V = fd.FunctionSpace(mesh, "CG", 2)
    before, after, test = fd.Function(V).interpolate(u), fd.Function(V).interpolate(u), fd.TestFunction(V)
    middle = (before + after) / 2
    flux = (0.02 + 0.06 * middle**2) * fd.grad(middle)
    rate = fd.Constant(steps / heat.FINAL_TIME)
    F = (rate * (after - before) * test + fd.inner(flux, fd.grad(test))) * fd.dx
    solver = fd.NonlinearVariationalSolver(
        fd.NonlinearVariationalProblem(F, after), solver_parameters={"pc_type": "lu", "snes_rtol": 1e-6}
    )
    for _ in range(steps):
        solver.solve()
        before.assign(after)
    return after


def difference(gear, found, other):
    """Relative, in L2."""
    mine = fd.Function(gear.V)
    mine.dat.data[:] = found
    return fd.norm(fd.Function(other.function_space()).interpolate(mine) - other) / fd.norm(other)


def test_another_method_finds_the_same_temperatures(heat, gear):
    """Quadratics, another form of the law, an implicit method: what is left is the error of linear functions on the mesh."""
    u = gear.fields(1, np.random.default_rng(1))
    start = fd.Function(gear.V)
    start.dat.data[:] = u[:, 0]
    other = by_crank_and_nicolson(start, 30, heat)
    errors = [difference(gear, values, other) for values in (gear.heat(u)[:, 0], u[:, 0])]
    assert errors[0] < 0.003 and errors[1] > 0.2  # and much has happened


def test_a_finer_mesh_and_shorter_steps_find_the_same_temperatures(heat, gear):
    """The error of the mesh falls with its square: so the difference is about three quarters of it."""
    mesh = fd.MeshHierarchy(gear.V.mesh(), 1)[-1]
    finer = heat.Gear(mesh)
    u = gear.fields(1, np.random.default_rng(1))
    coarse = gear.heat(u)
    start = fd.Function(gear.V)
    start.dat.data[:] = u[:, 0]
    on_finer = fd.Function(finer.V)
    fd.prolong(start, on_finer)
    end = fd.Function(finer.V)
    end.dat.data[:] = finer.heat(on_finer.dat.data_ro[:, None])[:, 0]
    assert difference(gear, coarse[:, 0], end) < 0.003
    shorter = gear.heat(u, refined=2)
    assert np.linalg.norm(shorter - coarse) < 1e-10 * np.linalg.norm(coarse)


def test_derivatives_are_those_of_the_map(heat, gear):
    """A Taylor test: what is left after the derivative falls with the square of the step. The steps of all are the same."""
    found = heat.derivatives(2, 5, 2)
    assert found["directions"].shape == found["derivatives"].shape == (2, 2, len(gear.points))
    np.testing.assert_array_equal(found["inputs"], gear.fields(2, np.random.default_rng([5, 0])).T)  # as `samples` has them
    direction, derivative = (found[name][:, 1] for name in ("directions", "derivatives"))
    steps = np.array([2e-3, 1e-3, 5e-4])
    moved = [gear.heat((found["inputs"] + step * direction).T).T for step in steps]
    rest = [np.linalg.norm(u - found["targets"] - step * derivative) for u, step in zip(moved, steps)]
    rates = np.log2(np.divide(rest[:-1], rest[1:]))
    assert (np.abs(rates - 2) < 0.1).all(), rates
    assert np.linalg.norm(found["derivatives"][:, 0] - derivative) > 0.5 * np.linalg.norm(derivative)


def test_the_positions_are_all_of_the_group(rivals, gear):
    moves = rivals.positions(gear.points)
    assert len({tuple(move) for move in moves}) == 16 and (moves[0] == np.arange(moves.shape[1])).all()
    assert {tuple(one[other]) for one in moves for other in moves} == {tuple(move) for move in moves}
    assert np.abs(np.linalg.norm(gear.points[moves], axis=2) - np.linalg.norm(gear.points, axis=1)).max() < 1e-11


def test_kernel_ridge_in_all_positions_is_kernel_ridge_on_all_moved_samples(rivals, gear):
    moves, random = rivals.positions(gear.points), np.random.default_rng(0)
    x, y, x_test = (gear.fields(count, random).T / 30 for count in (4, 4, 3))
    all_x, all_y = (np.concatenate([values[:, move] for move in moves]) for values in (x, y))
    kernel = rivals.odd_kernel(all_x, all_x, 0.3) + 1e-3 * np.eye(len(all_x))
    expected = rivals.odd_kernel(x_test, all_x, 0.3) @ np.linalg.solve(kernel, all_y)
    found = rivals.RidgeInAllPositions(x, y, moves, 0.3, 1e-3).predict(x_test)
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())
    np.testing.assert_allclose(
        rivals.RidgeInAllPositions(x, y, moves, 0.3, 1e-3).predict(-x_test[:, moves[3]]), -found[:, moves[3]], atol=1e-12
    )


def test_samples_on_the_grid_are_moved_as_on_the_mesh(rivals, gear):
    """A quarter turn and a reflection of values at the nodes are moves of the grid; an eighth of a turn is none."""
    u = gear.fields(1, np.random.default_rng(0)).T
    seen = rivals.on_the_grid({"points": gear.points, "inputs": u, "targets": u}, 1)
    mask, grid = seen["weights"].ravel(), seen["inputs"][0].ravel()
    assert np.abs(mask[seen["moves"]] - mask).max() == 0 and abs(mask.mean() - 0.485) < 0.02  # 2.139 of 4.41 is gear
    moved = rivals.grid_values(u[0][rivals.positions(gear.points)[[2, 8, 1]]])[0].reshape(3, -1)
    moves = seen["signs"][:, None] * grid[seen["moves"]]
    distances = np.abs(moved[:, None] - moves).max(axis=2).min(axis=1)
    assert distances[0] < 1e-9 and distances[1] < 1e-9 and distances[2] > 0.1
    np.testing.assert_allclose(moved[2], seen["inputs"][1].ravel(), atol=1e-12)  # so it is a sample of its own
