"""The gradient by TSAdjoint and the tape: Taylor tests, Riesz maps, co-states, and what a Block may not do."""

from dataclasses import dataclass

import firedrake as fd
import numpy as np
import pytest
from created import created_functions
from firedrake import COMM_WORLD
from firedrake.adjoint import Control, ReducedFunctional
from helpers import SAMPLES, SWISH, TIMES, half_square_distance, laplace, name, network, smooth, smooth_direction
from numpy.testing import assert_allclose, assert_array_equal
from scipy.integrate import solve_ivp

from fem_resnet import ResidualNetwork, Run

on_ranks = pytest.mark.parallel([1, 2, 3])

RK_TYPES = ["1fe", "2a", "2b", "3", "3bs", "4", "5f", "5dp", "5bs", "6vr", "7vr", "8vr"]
#: Disk, annulus, sphere, solids and meshes from files; DG0, CG1, mass-lumped and spectral elements.
SPACES = [
    ("disk", "DG0"),
    ("disk", "CG1"),
    ("annulus", "DG0"),
    ("annulus", "CG2"),
    ("sphere", "DG0"),
    ("sphere", "CG1"),
    ("square", "CG3"),
    ("cube", "CG1"),
    ("hexes", "CG2"),
    ("prisms", "CG1"),
    ("polygon", "CG1"),
    ("polygon", "KMV3"),
    ("block", "CG1"),
]


@dataclass
class Problem:
    """J = 1/2 sum_s int (f_s(T) - target_s)^2 dy of a recorded run."""

    net: ResidualNetwork
    run: Run
    target: fd.Function
    J: float

    def controls(self, which="all"):
        """Controls of bias, kernel, initial state or of all."""
        parts = {
            "a": self.net.bias.controls(),
            "b": self.net.kernel.controls(),
            "f_I": [Control(self.run.initial, riesz_map=self.net.Y.riesz_map)],
        }
        return sum(parts.values(), []) if which == "all" else parts[which]

    def reduced(self, which="all"):
        return ReducedFunctional(self.J, self.controls(which))

    def point(self, which="all"):
        return [control.tape_value().copy(deepcopy=True) for control in self.controls(which)]

    def direction(self, which, rng):
        """One of size one, which no partition changes."""
        net, parts = self.net, {}
        for key, parameter in (("a", net.bias), ("b", net.kernel)):
            parts[key] = [smooth_direction(net, rng, k, parameter) for k in range(net.layers)]
        parts["f_I"] = [net.Y.batch(smooth(net.Y, seed=50))]
        return sum(parts.values(), []) if which == "all" else parts[which]


@pytest.fixture
def record(annotation):
    """``record(space, **options)``: a Problem, of `helpers.network(space, **options)`."""

    def record(space=("disk", "CG1"), functional=half_square_distance, **options):
        net = network(space, **{"steps": 2, "layers_per_block": 2} | options)
        initial, target = net.Y.batch(smooth(net.Y)), net.Y.batch(smooth(net.Y, seed=7))
        with annotation():
            run = net.run(initial)
            J = functional(run.final, target, net.Y)
        return Problem(net, run, target, J)

    return record


def _arrays(functions):
    return [np.array(function.dat.data_ro) for function in functions]


def _largest_difference(these, those):
    """Relative to the largest entry of each Function, on this rank."""
    return max(np.abs(a - b).max(initial=0) / np.abs(b).max(initial=1e-300) for a, b in zip(these, those, strict=True))


# -- Taylor tests ----------------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("which", ["a", "b", "f_I"])
@pytest.mark.parametrize("space", SPACES, ids=name)
def test_taylor_on(space, which, record, rng, taylor):
    problem = record(space)
    taylor(problem.reduced(which), problem.point(which), problem.direction(which, rng), name(space), which)


@on_ranks
@pytest.mark.parametrize("space", SPACES, ids=name)
def test_taylor_of_all_controls_on(space, record, rng, taylor):
    problem = record(space)
    taylor(problem.reduced(), problem.point(), problem.direction("all", rng), name(space), "all")


@pytest.mark.parametrize("rk_type", RK_TYPES)
def test_taylor_of_every_tableau(rk_type, record, rng, taylor):
    problem = record(solver_parameters={"ts_rk_type": rk_type})
    taylor(problem.reduced(), problem.point(), problem.direction("all", rng), f"disk-CG1 {rk_type}", "all")


@pytest.mark.parametrize("sigma", ["tanh", "arctan", "sigmoid", "softplus", "elu"])
def test_taylor_of_smooth_activations(sigma, record, rng, taylor):
    problem = record(activation=sigma)
    taylor(problem.reduced(), problem.point(), problem.direction("all", rng), f"disk-CG1 {sigma}", "all")


@on_ranks
def test_taylor_of_a_users_own_activation(record, rng, taylor):
    problem = record(activation=SWISH)
    taylor(problem.reduced(), problem.point(), problem.direction("all", rng), "disk-CG1 SymPy", "all")


@on_ranks
@pytest.mark.parametrize("which", ["a", "all"] if COMM_WORLD.size > 1 else ["a", "b", "f_I", "all"])
def test_taylor_with_the_bias_in_a_basis(which, record, rng, taylor):
    problem = record(basis_for_bias=True)
    direction = problem.direction(which, rng)
    taylor(problem.reduced(which), problem.point(which), direction, "disk-CG1 bias in basis", which)


def _by_ufl(f, target, Y):
    return fd.assemble(fd.inner(f - target, f - target) / 2 * fd.dx + f[0] ** 3 * fd.dx)


@on_ranks
def test_taylor_of_a_functional_in_ufl(record, rng, taylor):
    problem = record(("disk", "DG0"), functional=_by_ufl)
    taylor(problem.reduced(), problem.point(), problem.direction("all", rng), "disk-DG0 J in UFL", "all")


# -- the gradient ----------------------------------------------------------------------------------------------------


@on_ranks
def test_the_gradient_does_not_depend_on_the_layers_in_a_block(record):
    gradients = [_arrays(record(layers_per_block=n).reduced().derivative()) for n in (1, 2, 3)]
    for other in gradients[:2]:
        # The same sums in another order; every Function has entries of size 0.01 to 1.
        assert _largest_difference(other, gradients[2]) < 1e-13


@on_ranks
def test_nothing_depends_on_the_blocks_of_nodes_that_fit_the_cache(record, monkeypatch):
    found = []
    for nodes in (1000, 7):
        monkeypatch.setattr("fem_resnet.layers.stage._BLOCK_BYTES", nodes * 8 * SAMPLES)
        monkeypatch.setattr("fem_resnet.layers.stage._SMALLEST_BLOCK", 1)
        problem = record()
        found.append([*_arrays(problem.reduced().derivative()), *_arrays([problem.run.final, problem.run.state(1)])])
    assert _largest_difference(*found) < 1e-13


@on_ranks
@pytest.mark.parametrize("basis_for_bias", [False, True], ids=["bias at nodes", "bias in basis"])
def test_riesz_maps_are_those_of_label_measure_and_time(basis_for_bias, record, rng):
    """<dJ, h> = (grad J, h), with tau_l M or tau_l G for a, tau_l tr(g^T G_phi h G_psi) for b, M for f_I."""
    problem = record(basis_for_bias=basis_for_bias)
    net, Y, J = problem.net, problem.net.Y, problem.reduced()
    dual, gradient = J.derivative(), J.derivative(apply_riesz=True)
    direction = problem.direction("all", rng)
    factors = net.kernel.space_basis.kernel

    def bias_product(g, h):
        if basis_for_bias:
            g, h = (net.bias.space_basis.read(f) for f in (g, h))
            return float(g @ net.bias.space_basis.basis.gram @ h)
        return Y.inner(g, h)

    def kernel_product(g, h):
        g, h = (net.kernel.space_basis.read(f) for f in (g, h))
        return float(np.trace(g.T @ factors.phi.gram @ h @ factors.psi.gram))

    tau = np.diff(TIMES)
    for k, (d, g, h) in enumerate(zip(dual, gradient, direction, strict=True)):
        if k < 3:
            product = tau[k] * bias_product(g, h)
        elif k < 6:
            product = tau[k - 3] * kernel_product(g, h)
        else:
            product = Y.inner(g, h)
        assert_allclose(product, h._ad_dot(d), rtol=1e-11, err_msg=f"control {k}")


@on_ranks
def test_a_second_derivative_gives_the_same_bits(record):
    J = record().reduced()
    first = _arrays(J.derivative())
    for _ in range(2):
        assert all((a == b).all() for a, b in zip(first, _arrays(J.derivative()), strict=True))


@on_ranks
def test_an_unrecorded_run_in_between_does_not_disturb(record):
    problem = record()
    net, J = problem.net, problem.reduced()
    expected = _arrays(J.derivative())
    J(problem.point())
    net.run(net.Y.batch(smooth(net.Y, seed=3)))
    assert all((a == b).all() for a, b in zip(expected, _arrays(J.derivative()), strict=True))
    net.run(net.Y.batch(smooth(net.Y, samples=1)))
    assert all((a == b).all() for a, b in zip(expected, _arrays(J.derivative()), strict=True))


@on_ranks
def test_a_second_recorded_run_does_not_disturb(record, annotation):
    problem = record()
    expected = _arrays(problem.reduced().derivative())
    with annotation():
        problem.net.run(problem.net.Y.batch(smooth(problem.net.Y, seed=3)))
    assert all((a == b).all() for a, b in zip(expected, _arrays(problem.reduced().derivative()), strict=True))


@on_ranks
def test_changed_controls_are_evaluated_anew(record, rng):
    """As a network that was recorded with these values."""
    problem = record()
    J, old = problem.reduced(), problem.point()
    new = [m._ad_add(h) for m, h in zip(old, problem.direction("all", rng))]
    at_old = float(J(old)), _arrays(J.derivative())
    at_new = float(J(new)), _arrays(J.derivative())

    fresh = network(steps=2, layers_per_block=2)
    for function, value in zip(fresh.bias.functions + fresh.kernel.functions, new):
        function.assign(value)
    final = fresh(new[-1])
    assert_allclose(at_new[0], half_square_distance(final, problem.target, fresh.Y), rtol=1e-14)
    assert abs(at_new[0] - at_old[0]) > 1e-3 and _largest_difference(at_new[1], at_old[1]) > 1e-3

    # And back, also when J was not asked for in between.
    J(new)
    assert float(J(old)) == at_old[0]
    assert all((a == b).all() for a, b in zip(at_old[1], _arrays(J.derivative()), strict=True))


@on_ranks
def test_what_one_rank_alone_still_holds_keeps_its_values_and_stops_no_other_rank(record):
    """Python collects garbage at other times on every rank, and a new Function is made by all ranks or by none."""
    problem = record()
    controls, point = problem.controls(), problem.point()
    J = ReducedFunctional(problem.J, controls)
    expected = float(J(point))
    held, before = [], []
    for control in controls:
        if COMM_WORLD.rank == COMM_WORLD.size - 1:
            held.append(control.block_variable.checkpoint)
            before.append(held[-1].dat.data_ro.copy())
        J([part._ad_mul(2.0) for part in point])
    for function, values in zip(held, before):
        assert_array_equal(function.dat.data_ro, values)
    assert float(J(point)) == expected


@on_ranks
def test_values_assigned_after_recording_are_not_those_of_the_tape(record):
    problem = record()
    J = problem.reduced()
    expected = float(J(problem.point()))
    problem.net.kernel.set(0, 0 * problem.net.kernel.get(0))
    assert float(J(problem.point())) == expected


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(
    "space, basis_for_bias",
    # Every kind of mesh once, and a bias in a basis on two.
    [
        (("disk", "CG1"), False),
        (("sphere", "DG0"), False),
        (("annulus", "CG2"), False),
        (("square", "CG3"), False),
        (("cube", "CG1"), False),
        (("hexes", "CG2"), False),
        (("prisms", "CG1"), False),
        (("polygon", "KMV3"), False),
        (("block", "CG1"), False),
        (("disk", "CG1"), True),
        (("sphere", "DG0"), True),
    ],
    ids=str,
)
def test_any_number_of_ranks_gives_the_same_gradient(space, basis_for_bias, record):
    """Coefficients as they are, functions by inner products: the mesh on this rank alone against its parts."""
    found = []
    for alone in (False, True):
        problem = record(space, alone=alone, basis_for_bias=basis_for_bias)
        net, probe = problem.net, laplace(*space, rank=6, alone=alone)
        gradient = problem.reduced().derivative(apply_riesz=True)
        of_bias = [net.bias.space_basis.read(g) for g in gradient[:3]]
        if not basis_for_bias:
            of_bias = [probe.project(a[:, None]) for a in of_bias]
        of_kernel = [net.kernel.space_basis.read(g) for g in gradient[3:6]]
        costates = [probe.project(net.Y.values(problem.run.costate(layer))) for layer in range(4)]
        of_initial = probe.project(net.Y.values(gradient[6]))
        found.append([np.array(float(problem.J)), *of_bias, *of_kernel, of_initial, *costates])
    for k, (parts, whole) in enumerate(zip(*found, strict=True)):
        assert_allclose(parts, whole, rtol=0, atol=1e-10, err_msg=f"number {k}")


# -- the co-state ----------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("layers_per_block", [1, 2, 3])
def test_costate_at_both_ends(layers_per_block, record):
    """r(T) = f(T) - target, and r(0) represents dJ / df_I."""
    problem = record(layers_per_block=layers_per_block)
    Y = problem.net.Y
    (gradient,) = problem.reduced("f_I").derivative(apply_riesz=True)
    misfit = Y.values(problem.run.final) - Y.values(problem.target)
    assert_allclose(Y.values(problem.run.costate(3)), misfit, rtol=0, atol=1e-14)
    assert_allclose(Y.values(problem.run.costate(0)), Y.values(gradient), rtol=0, atol=1e-14)


@on_ranks
def test_costate_of_a_functional_in_ufl(record):
    problem = record(("disk", "DG0"), functional=lambda f, g, Y: fd.assemble(fd.inner(f - g, f - g) / 2 * fd.dx))
    problem.reduced().derivative()
    Y = problem.net.Y
    misfit = Y.values(problem.run.final) - Y.values(problem.target)
    assert_allclose(Y.values(problem.run.costate(3)), misfit, rtol=0, atol=1e-13)


@on_ranks
def test_costate_is_the_adjoint_value_on_the_tape(record, tape):
    """At the interfaces of Blocks: M^-1 of the tape's adjoint value; inside them the same numbers."""
    expected = None
    for layers_per_block in (1, 2, 3):
        problem = record(layers_per_block=layers_per_block)
        problem.reduced().derivative()
        Y, run = problem.net.Y, problem.run
        costates = [Y.values(run.costate(layer)).copy() for layer in range(4)]
        if expected is None:
            blocks = tape.get_blocks()[:3]
            states = [blocks[0].get_dependencies()[0], *(block.get_outputs()[0] for block in blocks)]
            expected = [Y.values(Y.riesz_map(state.adj_value)).copy() for state in states]
        for layer in range(4):
            assert_allclose(costates[layer], expected[layer], rtol=0, atol=1e-13, err_msg=f"layer {layer}")


def test_costate_solves_the_adjoint_equation(record):
    """(4.2): r_t = B^T (sigma'(a - B f) r), backwards from r(T), by SciPy for the whole f and r; (4.3) for a.

    r(0) = dJ/df_I depends on the sign and scale of every term.
    """
    problem = record(steps=32, solver_parameters={"ts_rk_type": "5dp"})
    net, run, Y = problem.net, problem.run, problem.net.Y
    gradient = problem.reduced("a").derivative(apply_riesz=True)
    factors = net.kernel.space_basis.kernel
    f, r = Y.values(run.final).copy(), Y.values(run.costate(3)).copy()
    for layer in (2, 1, 0):
        a, beta = net.bias.get(layer)[:, None], net.kernel.get(layer)
        B, BT = factors.phi.values @ beta @ factors.psi.weighted.T, factors.psi.values @ beta.T @ factors.phi.weighted.T

        def rates(t, y):
            f, r = y[: -Y.nodes].reshape(2, Y.nodes, -1)
            sigma = np.tanh(a - B @ f)
            v = (1 - sigma**2) * r
            return np.concatenate([sigma.ravel(), (BT @ v).ravel(), -v.sum(axis=1)])

        start = np.concatenate([f.ravel(), r.ravel(), np.zeros(Y.nodes)])
        tight = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}
        y = solve_ivp(rates, (TIMES[layer + 1], TIMES[layer]), start, **tight).y[:, -1]
        f, r = y[: -Y.nodes].reshape(2, Y.nodes, -1)
        # Order 5 at steps of 0.02 leaves errors of 1e-10.
        assert_allclose(Y.values(run.state(layer)), f, rtol=0, atol=1e-9, err_msg=f"f(t_{layer})")
        assert_allclose(Y.values(run.costate(layer)), r, rtol=0, atol=1e-9, err_msg=f"r(t_{layer})")
        average = y[-Y.nodes :] / (TIMES[layer + 1] - TIMES[layer])
        assert_allclose(gradient[layer].dat.data_ro, average, rtol=0, atol=1e-9, err_msg=f"gradient in a_{layer}")


@on_ranks
@pytest.mark.parametrize("layers_per_block", [1, 3])
def test_costate_is_there_after_a_derivative_of_the_latest_evaluation_only(layers_per_block, record):
    problem = record(layers_per_block=layers_per_block)
    J, new = problem.reduced(), [m._ad_mul(0.5) for m in problem.point()]
    missing = "costate: no derivative has reached t_1 since the latest evaluation; call derivative"
    with pytest.raises(RuntimeError, match=missing):
        problem.run.costate(1)
    J.derivative()
    first = problem.net.Y.values(problem.run.costate(1)).copy()
    J(new)
    with pytest.raises(RuntimeError, match=missing):
        problem.run.costate(1)
    J.derivative()
    Y = problem.net.Y
    assert np.abs(Y.sum(Y.weights @ (Y.values(problem.run.costate(1)) - first))).max() > 1e-3
    misfit = Y.values(problem.run.state(3)) - Y.values(problem.target)
    assert_allclose(Y.values(problem.run.costate(3)), misfit, rtol=0, atol=1e-14)


@on_ranks
def test_an_unrecorded_run_has_no_costate():
    net = network()
    with pytest.raises(RuntimeError, match=r"costate: this run has no layer on a tape; record it \(annotation"):
        net.run(net.Y.batch(smooth(net.Y))).costate(0)


# -- Blocks ----------------------------------------------------------------------------------------------------------


@on_ranks
def test_a_derivative_belongs_to_whoever_asked_for_it(record):
    """Neither a later one nor a Hessian sees what is done to it, and asking the tape's Control once more gives another."""
    problem = record()
    J, m = problem.reduced(), problem.point()
    J(m)
    first = J.derivative()
    kept = [functional.dat.data_ro.copy() for functional in first]
    once_more = [control.get_derivative() for control in J.controls]
    assert not any(one is other for one, other in zip(first, once_more))
    for functional, values, other in zip(first, kept, once_more):
        assert_allclose(other.dat.data_ro, values, rtol=0, atol=0)
    expected = [part.dat.data_ro.copy() for part in J.hessian(m)]
    J(m)
    second = J.derivative()
    for functional in second:
        functional.assign(7.0 * functional)
    for part, values in zip(J.hessian(m), expected):
        assert_allclose(part.dat.data_ro, values, rtol=1e-12, atol=1e-13)
    for functional, values in zip(first, kept):
        assert_allclose(functional.dat.data_ro, values, rtol=0, atol=0)


@on_ranks
@pytest.mark.parametrize("layers_per_block", [1, 3])
def test_evaluations_create_no_blocks_and_no_functions_but_what_users_get(layers_per_block, record, tape, monkeypatch):
    problem = record(layers_per_block=layers_per_block)
    J, m = problem.reduced(), problem.point()
    created = created_functions(monkeypatch)
    blocks = len(tape.get_blocks())
    J(m), J.derivative()
    assert created, "the first derivative makes the Blocks' Cofunctions; else this test counts nothing"
    created.clear()
    for _ in range(3):
        J(m), J.derivative()
    of_parameters = sum(len(parameter.functions) for parameter in problem.net.parameters)
    assert len(created) == 3 * of_parameters, "one a control and derivative, and that is the user's"
    assert set(created) == {"new_cofunction"}
    assert len(tape.get_blocks()) == blocks, "the tape grew"
