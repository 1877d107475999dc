"""Steps by the discrete gradient of int Sigma(u): the mean of sigma between two points, order, gradients, failures.

What they do for the energies of 3.2 is in `test_energy`.
"""

import mpmath
import numpy as np
import pytest
import sympy
from firedrake.adjoint import Control, ReducedFunctional
from helpers import half_square_distance, laplace, network, set_smooth, smooth, smooth_direction
from numpy.testing import assert_allclose
from problems import coefficients, gathered, learning_problem, taping
from problems import network as classifier
from pyadjoint import Tape, taylor_to_dict
from pyadjoint.tape import set_working_tape

from fem_resnet import ACTIVATIONS, Activation, Bias, ResidualNetwork, StepFailure, verify
from fem_resnet.activation.secant import Secant

on_ranks = pytest.mark.parallel([1, 2, 3])

OPTIONS = {"ts_type": "discrete_gradient"}
SPACES = [("disk", "CG1"), ("annulus", "DG0"), ("sphere", "CG1")]

_s = sympy.Symbol("s")
ALL = dict(ACTIVATIONS) | {
    "swish": Activation.from_sympy(_s / (1 + sympy.exp(-_s))),
    "tanh(50 s)": Activation.from_sympy(sympy.tanh(50 * _s)),
    "|s|": Activation.from_sympy(sympy.Abs(_s)),
}


# -- the mean of sigma -----------------------------------------------------------------------------------------------


def pairs(count=3000):
    """(u0, u1) at distances from 1e-16 to 10, a third of them on both sides of 0, some equal."""
    rng = np.random.default_rng(0)
    d = rng.normal(size=count) * 10.0 ** rng.uniform(-16, 1, count)
    u0 = 2 * rng.normal(size=count)
    u0[: count // 3] = -d[: count // 3] * rng.uniform(size=count // 3)
    d[-10:] = 0
    return u0, u0 + d


@pytest.mark.parametrize("name", ALL)
def test_the_mean_times_the_distance_is_the_difference_of_the_primitive(name):
    """What makes (i) of Theorem 3.2 exact in the discrete solution."""
    sigma, (u0, u1) = ALL[name], pairs()
    D = Secant(sigma)(u0, u1)[0]
    Sigma = [sigma.primitive(u) for u in (u0, u1)]
    size = 1 + np.abs(Sigma[0]) + np.abs(Sigma[1])
    assert np.abs(D * (u1 - u0) - (Sigma[1] - Sigma[0])).max() < 1e-14 * size.max()
    assert_allclose(D[u0 == u1], sigma(u0[u0 == u1]), rtol=1e-14)


@pytest.mark.parametrize("name, f", [("tanh", mpmath.tanh), ("arctan", mpmath.atan), ("elu", None), ("softplus", None)])
def test_no_digits_are_lost_at_any_distance(name, f):
    """Against 40 digits; the plain quotient of the primitive has none left at a distance of 1e-16."""
    f = f or {
        "elu": lambda s: mpmath.expm1(s) if s < 0 else s, "softplus": lambda s: mpmath.log1p(mpmath.exp(s))
    }[name]  # fmt: skip
    u0, u1 = (u[::150] for u in pairs())
    values = Secant(ALL[name])(u0, u1, 2)
    with mpmath.workdps(40):
        exact = [_means(f, mpmath.mpf(float(a)), mpmath.mpf(float(b))) for a, b in zip(u0, u1)]
    exact = np.array(exact, dtype=float).T
    for value, wanted in zip(values[:1], exact[:1]):
        assert np.abs(value - wanted).max() < 2e-14
    # Beyond `near`, >= 1/4, derivatives are quotients of the mean: one digit a derivative.
    assert np.abs(values[1] - exact[1]).max() < 1e-13 and np.abs(values[2] - exact[2]).max() < 1e-13
    naive = (ALL[name].primitive(u1) - ALL[name].primitive(u0))[u0 != u1] / (u1 - u0)[u0 != u1]
    assert np.abs(naive - exact[0][u0 != u1]).max() > 1e-2


def _means(f, a, b):
    if a == b:
        slope = mpmath.diff(f, a)
        return f(a), slope / 2, slope / 2
    cuts = [0, *([-a / (b - a)] if a * b < 0 else []), 1]
    D, first = (mpmath.quad(lambda x: w(x) * f(a + x * (b - a)), cuts) for w in (lambda x: 1, lambda x: x))
    # D_1 = int x sigma' dx = (sigma(b) - D) / (b - a), in 40 digits.
    return D, (D - f(a)) / (b - a), (f(b) - D) / (b - a)


@pytest.mark.parametrize("name", ALL)
def test_derivatives_of_the_mean_are_those_of_the_mean(name):
    """Remainders of Taylor's series at u1 near u0, far from it, and with a joint between them: orders 2 and 3."""
    D = Secant(ALL[name])
    scale = 50.0 if name == "tanh(50 s)" else 1.0
    # The joint at 0 is in the first two; in steps of 1e-3 and less none is crossed.
    u0, u1 = np.array([[-0.3, -4.0, 0.4, 0.4, -0.7, 0.3], [0.5, 3.0, 0.40002, 4.0, -0.7 - 1e-7, 0.3 + 1e-7]]) / scale
    v0, v1 = np.array([0.3, 1.0, -0.7, 1.3, 0.2, 0.9]) / scale, np.array([-0.6, 0.4, 0.8, 0.5, 1.0, -0.3]) / scale
    value, D_0, D_1, D_00, D_01, D_11 = D(u0, u1, 2)
    first = D_0 * v0 + D_1 * v1
    second = D_00 * v0**2 + 2 * D_01 * v0 * v1 + D_11 * v1**2
    remainders = []
    for h in (2e-2, 1e-2):
        linear = D(u0 + h * v0, u1 + h * v1)[0] - value - h * first
        remainders.append([np.abs(linear).max(), np.abs(linear - h**2 / 2 * second).max()])
    (one, two), (half_one, half_two) = remainders
    # Of piecewise linear sigma no more than the pair across the joint is curved; of the identity none is.
    if one > 1e-13:
        assert np.log2(one / half_one) > 1.95 and np.log2(two / half_two) > 2.9
    assert name == "identity" or one > 1e-13


# -- layers ----------------------------------------------------------------------------------------------------------


def states(net):
    return net.Y.values(net(net.Y.batch(smooth(net.Y)))).copy()


@pytest.mark.parametrize("in_time", ["layers", "linear"])
def test_the_rule_is_of_order_two(in_time):
    """Also where bias and kernel vary within the layers: they are taken at the middle of a step."""
    options = {"bias_in_time": in_time, "kernel_in_time": in_time}
    exact = states(network(steps=8, solver_parameters={"ts_rk_type": "8vr"}, **options))
    coarse, fine = (np.abs(states(network(steps=n, solver_parameters=OPTIONS, **options)) - exact).max() for n in (8, 16))
    assert abs(np.log2(coarse / fine) - 2) < 0.05 and fine < 1e-3


def test_steps_back_lead_to_where_they_came_from():
    """The rule is symmetric: with sigma odd and the signs of a and B turned, f_t = -sigma(a - B f)."""
    there = network(solver_parameters=OPTIONS, times=(0.0, 0.5))
    back = network(solver_parameters=OPTIONS, times=(0.0, 0.5))
    for p in (back.bias, back.kernel):
        p.set(0, -p.get(0))
    initial = smooth(there.Y)
    f = there.Y.values(back(there(there.Y.batch(initial))))
    assert_allclose(f, initial, rtol=0, atol=1e-12)


def test_in_one_linear_layer_it_is_the_implicit_midpoint_rule():
    """sigma(s) = s: D(u0, u1) is (u0 + u1) / 2."""
    nets = [network(activation="identity", solver_parameters=options) for options in (OPTIONS, {"ts_type": "theta"})]
    assert_allclose(*(states(net) for net in nets), rtol=0, atol=1e-12)


@on_ranks
@pytest.mark.parametrize("space", SPACES, ids="-".join)
def test_the_partition_does_not_change_states_nor_gradients(space):
    found = []
    for alone in (True, False):
        net = network(space, alone=alone, solver_parameters=OPTIONS, learn_times=True)
        J, controls = recorded(net)
        derivative = ReducedFunctional(J, controls).derivative()
        parts = [(p, f) for p in (net.bias, net.kernel) for f in p.functions]
        found.append(
            [float(J), gathered(net.Y, states(net))]
            + [coefficients(p, d) for (p, _), d in zip(parts, derivative)]
            + [gathered(net.Y, net.Y.values(derivative[-1]))]
        )
    for one, other in zip(*found, strict=True):
        assert_allclose(one, other, rtol=1e-10, atol=1e-11)


def recorded(net):
    """J = 1/2 |f(T) - target|^2 and all its controls: bias, kernel, what else is learned, f_I."""
    set_working_tape(Tape())
    initial, target = net.Y.batch(smooth(net.Y)), net.Y.batch(smooth(net.Y, seed=7))
    with taping():
        J = half_square_distance(net(initial), target, net.Y)
    parts = [control for parameter in net.parameters for control in parameter.controls()]
    return J, [*parts, Control(initial, riesz_map=net.Y.riesz_map)]


def taylor(net, size=1.0):
    """Rates of Taylor's remainders, for each parameter and f_I on its own."""
    J, controls = recorded(net)
    rng, at, rates = np.random.default_rng(3), 0, {}
    for parameter in net.parameters:
        number = len(parameter.functions)
        directions = [smooth_direction(net, rng, k, parameter) for k in range(number)]
        rates[parameter.name] = _rates(J, controls[at : at + number], directions)
        at += number
    rates["initial"] = _rates(J, controls[at:], [net.Y.batch(smooth(net.Y, seed=50))])
    return rates


def _rates(J, controls, directions):
    with taping():
        reduced = ReducedFunctional(J, controls)
        point = [control.tape_value().copy(deepcopy=True) for control in controls]
        for direction in directions:
            # A third of this is seen against round-off no more, and three times as much not yet in the limit.
            direction.dat.data_wo[...] *= 0.1
        found = taylor_to_dict(reduced, point, directions)
    return min(found["R1"]["Rate"]), min(found["R2"]["Rate"])


LEARNED = {
    "bias, kernel": {},
    "linear in time": {"bias_in_time": "linear", "kernel_in_time": "linear", "steps": 2},
    "layer times": {"learn_times": True, "kernel_in_time": "shared"},
    "factors": {"learn_factors": True, "kernel_in_time": "shared", "basis_for_bias": True},
    "a Block a layer, softplus": {"layers_per_block": 1, "activation": "softplus", "steps": 2},
}


@pytest.mark.parametrize("learned", LEARNED)
def test_gradients_and_hessians_pass_taylors_test_for_all_that_is_learned(learned):
    for name, (R1, R2) in taylor(network(solver_parameters=OPTIONS, **LEARNED[learned])).items():
        assert R1 > 1.95 and R2 > 2.95, f"{name}: {R1:.3f}, {R2:.3f}"


@on_ranks
def test_gradients_pass_taylors_test_on_a_sphere_where_steps_are_large():
    """h |B| = 30: far beyond what an explicit method could take."""
    phi = laplace("sphere", "CG1", 4)
    net = ResidualNetwork(phi, bias=Bias(in_time="shared"), layers=3, final_time=90.0, solver_parameters=OPTIONS)
    set_smooth(net, np.random.default_rng(0))
    for k in range(3):
        net.kernel.set(k, np.eye(4) + 0.1 * net.kernel.get(k))
    J, controls = recorded(net)
    rng = np.random.default_rng(5)
    directions = [smooth_direction(net, rng, k, net.kernel) for k in range(3)]
    R1, R2 = _rates(J, controls[1:4], directions)
    assert R1 > 1.95 and R2 > 2.95


def test_the_gradient_is_the_same_however_layers_make_blocks_and_under_checkpoints():
    whole, parts = (network(solver_parameters=OPTIONS, layers_per_block=n) for n in (3, 1))
    derivatives = []
    for net in (whole, parts):
        J, controls = recorded(net)
        derivatives.append([d.dat.data_ro.copy() for d in ReducedFunctional(J, controls).derivative()])
    problem = learning_problem(classifier("disk", "CG1", solver_parameters=OPTIONS, layers_per_block=1))
    J, _ = problem.record()
    wanted = [float(J(problem.functions)), *(d.dat.data_ro.copy() for d in J.derivative())]
    problem = problem.replace(checkpoints=1)
    J, _ = problem.record()
    found = [float(J(problem.functions)), *(d.dat.data_ro.copy() for d in J.derivative())]
    for one, other in [*zip(*derivatives, strict=True), *zip(wanted, found, strict=True)]:
        assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_a_learning_problem_is_verified():
    """Every check that does not step f a second time."""
    report = verify(learning_problem(classifier("disk", "CG1", solver_parameters=OPTIONS)), quick=True)
    assert report.passed, str(report)


def test_what_is_no_option_is_refused():
    for option in ({"ts_rk_type": "4"}, {"ts_adapt_type": "basic"}, {"nonsense": 1}):
        says = f"expected options of a SNES .*'discrete_gradient', got '{next(iter(option))}'; drop it"
        with pytest.raises(ValueError, match=says):
            network(solver_parameters=OPTIONS | option)
    with pytest.raises(ValueError, match="PETSc refuses"):
        network(solver_parameters=OPTIONS | {"snes_type": "nonsense"})


def test_options_reach_the_solver_and_a_failure_leaves_network_and_tape_usable():
    net = network(solver_parameters=OPTIONS | {"snes_max_it": 1})
    with pytest.raises(StepFailure, match="SNES's DIVERGED_MAX_IT in layer 0"):
        states(net)
    net = network(solver_parameters=OPTIONS)
    J, controls = recorded(net)
    reduced = ReducedFunctional(J, controls)
    point = [control.tape_value().copy(deepcopy=True) for control in controls]
    broken = [function.copy(deepcopy=True) for function in point]
    broken[3].dat.data_wo[...] = 1e308  # B f overflows
    with taping(), pytest.raises(StepFailure):
        reduced(broken)
    with taping():
        assert_allclose(reduced(point), float(J), rtol=1e-12)
        reduced.derivative()


def test_a_gradient_flow_is_refused():
    with pytest.raises(ValueError, match="^gradient_flow: expected False with .*'discrete_gradient'"):
        ResidualNetwork(
            laplace("disk", "CG1", 4), layers=1, gradient_flow=True, solver_parameters={"ts_type": "discrete_gradient"}
        )
