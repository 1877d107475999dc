"""The co-state (4.2) and the gradients (4.3), (4.4), (4.7), solved on their own and held against the network's.

What they are held against here is pyadjoint's and TSAdjoint's, and in part neither: derivatives by a complex step, and
SciPy's solver near round-off.
"""

from dataclasses import replace

import firedrake as fd
import numpy as np
import pytest
from helpers import label_space, laplace, name, smooth, smooth_direction
from numpy.testing import assert_allclose
from problems import TIMES, learning_problem, network, polynomials
from scipy.integrate import solve_ivp

from fem_resnet import (
    Batch,
    Head,
    Kernel,
    Layers,
    LearningProblem,
    ResidualNetwork,
    binary_cross_entropy,
    costate_check,
    cross_entropy,
    functional_loss,
    least_squares,
    smooth_in_space,
    smooth_in_time,
    solve_costate,
    solve_trajectory,
    terminal_costate,
    tikhonov,
    train,
)  # fmt: skip
from fem_resnet.time_stepping.evolution import Path

on_ranks = pytest.mark.parallel([1, 2, 3])

#: Explicit schemes with their orders; those below have a partner: no b_i is 0, but for stages that nothing uses.
ORDERS = {"1fe": 1, "2a": 2, "2b": 2, "3": 3, "3bs": 3, "4": 4}
WITH_PARTNER = ["1fe", "2a", "3", "3bs", "4"]
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
]
#: Largest of some hundred roundings of sums of size one, relative; measured: 1e-15.
ROUND_OFF = 1e-13


def _problem(space=("disk", "CG1"), scheme="4", steps=4, alone=False, **options):
    net = network(*space, steps=steps, alone=alone, solver_parameters={"ts_rk_type": scheme})
    return learning_problem(net, **options)


def _assert_order(check, order):
    # Leading terms rule at the finest steps. Round-off is 1e-14 at most: above 1e-12 it moves an order by 0.02 or less.
    assert min(check.costate + check.gradient) > 1e-12, f"round-off has no order:\n{check}"
    assert abs(check.costate_orders[-1] - order) < 0.2, f"\n{check}"
    assert abs(check.gradient_orders[-1] - order) < 0.2, f"\n{check}"


def _assert_round_off(check):
    assert check.partner_costate and max(check.partner_costate + check.partner_gradient) < ROUND_OFF, f"\n{check}"


# -- the comparison --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ORDERS)
def test_costate_and_gradient_agree_to_the_order_of_the_scheme(scheme):
    check = costate_check(_problem(scheme=scheme))
    _assert_order(check, ORDERS[scheme])
    assert bool(check.partner_costate) == (scheme in WITH_PARTNER)
    if check.partner_costate:
        _assert_round_off(check)


@pytest.mark.parametrize("space", SPACES, ids=name)
def test_costate_and_gradient_agree_on(space):
    """At orders 2 and 4; to round-off where (4.2) is stepped by the scheme's own partner."""
    for scheme, head in (("2a", False), ("4", True)):
        check = costate_check(_problem(space, scheme, head=head))
        _assert_order(check, ORDERS[scheme])
        _assert_round_off(check)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("space", [("annulus", "DG0"), ("sphere", "CG1")], ids=name)
def test_ranks_find_the_same_differences(space):
    parts, whole = (costate_check(_problem(space, alone=alone), refinements=[1, 2]) for alone in (False, True))
    _assert_round_off(parts)
    for these, those in ((parts.costate, whole.costate), (parts.gradient, whole.gradient)):
        # Bases on partitions agree to 1e-10, differences of size 1e-5 are relative to co-states of size one.
        assert_allclose(these, those, rtol=1e-4)
    assert abs(parts.costate_orders[0] - 4) < 0.5 and abs(parts.gradient_orders[0] - 4) < 0.5, f"\n{parts}"


@pytest.mark.slow
@on_ranks
@pytest.mark.parametrize("scheme", ORDERS)
@pytest.mark.parametrize("space", SPACES, ids=name)
def test_every_scheme_on_every_space(space, scheme):
    for bias, head in (("nodes", True), ("basis", False)):
        net = network(*space, steps=4, bias=bias, solver_parameters={"ts_rk_type": scheme})
        check = costate_check(learning_problem(net, head=head))
        _assert_order(check, ORDERS[scheme])
        assert bool(check.partner_costate) == (scheme in WITH_PARTNER)
        if check.partner_costate:
            _assert_round_off(check)


@pytest.mark.parametrize("sigma", ["arctan", "sigmoid", "softplus"])
def test_other_smooth_activations(sigma):
    net = network("disk", "CG1", steps=4, activation=sigma)
    check = costate_check(learning_problem(net), refinements=[1, 2, 4])
    _assert_order(check, 4)
    _assert_round_off(check)


def test_the_same_scheme_for_both_equations_differs_at_its_order():
    """(4.2) by the network's own scheme and steps, along interpolated states: not to round-off, at order p."""
    for scheme, order in (("1fe", 1), ("2a", 2), ("4", 4)):
        problem, own, found = _problem(scheme=scheme), {"ts_rk_type": scheme}, []
        for steps in (8, 16, 32):
            options = {"steps": steps, "keep_stages": True, "solver_parameters": own}
            trajectory = solve_trajectory(problem.net, problem.batch.inputs, **options)
            terminal = terminal_costate(problem, trajectory.final)
            same = solve_costate(trajectory, terminal, solver_parameters=own)
            partner = solve_costate(trajectory, terminal, partner=True)
            Y = problem.net.Y
            found.append(np.abs(Y.values(same.at_layer(0)) - Y.values(partner.at_layer(0))).max())
        assert min(found) > 1e-9
        assert abs(np.log2(found[-2] / found[-1]) - order) < 0.35, f"{scheme}: {found}"
        # The partner is the architecture that belongs to the network: exact with the network's own steps.
        J, run = problem.record()
        J.derivative()
        options["steps"] = problem.net.steps
        trajectory = solve_trajectory(problem.net, problem.batch.inputs, **options)
        partner = solve_costate(trajectory, terminal_costate(problem, trajectory.final), partner=True)
        assert_allclose(Y.values(partner.at_layer(0)), Y.values(run.costate(0)), rtol=0, atol=ROUND_OFF)


def test_nothing_is_shared_with_the_adjoint_of_the_layers(monkeypatch):
    problem = _problem()
    expected = costate_check(problem, refinements=[1])

    def forbidden(*args):
        raise AssertionError("the layers' own adjoint was called")

    for owner in (
        "layers.stage.Stage.transpose", "time_stepping.ts_stepper.TSStepper.adjoint",
        "time_stepping.compiled_layer.CompiledLayers.adjoint", "network.segment.Segment.adjoint",
        "learning.head._HeadOperator.adjoint", "learning.loss.LossOperator.adjoint",
    ):  # fmt: skip
        monkeypatch.setattr(f"fem_resnet.{owner}", forbidden)
    trajectory = solve_trajectory(problem.net, problem.batch.inputs)
    costate = solve_costate(trajectory, terminal_costate(problem, trajectory.final))
    assert all(np.isfinite(g.dat.data_ro).all() for g in costate.gradient(problem.regulariser))
    with pytest.raises(AssertionError, match="the layers' own adjoint"):
        costate_check(problem, refinements=[1])
    assert max(expected.costate) < 1e-3


def test_a_check_leaves_the_problem_and_its_tape_as_they_were(annotation, tape):
    problem = _problem()
    J, _ = problem.record()
    m = [function.copy(deepcopy=True) for function in problem.functions]
    value, derivative = float(J(m)), [d.dat.data_ro.copy() for d in J.derivative()]
    with annotation():
        costate_check(problem, refinements=[1, 2])
    assert tape.get_blocks() == [] and problem.net.steps == 4
    assert float(J(m)) == value
    for before, after in zip(derivative, J.derivative(), strict=True):
        assert (before == after.dat.data_ro).all()
    new = [function._ad_mul(1.1) for function in m]
    assert abs(float(J(new)) - value) > 1e-4


def test_a_refined_network_has_the_same_parameters():
    net = network("disk", "CG1", steps=2)
    f = net.Y.batch(smooth(net.Y))
    before = net.Y.values(net(f)).copy()
    finer, direct = net.replace(layers=replace(net.settings.layers, steps=6)), network("disk", "CG1", steps=6)
    assert finer.kernel is net.kernel and finer.steps == 6
    assert (net.Y.values(finer(f)) == net.Y.values(direct(f))).all()
    assert (net.Y.values(net(f)) == before).all() and np.abs(before - net.Y.values(direct(f))).max() > 1e-8


def test_the_table_of_a_check():
    check = costate_check(_problem(), refinements=[1, 2])
    head, first, second = str(check).splitlines()
    columns = ["step", "co-state", "order", "gradient", "order", "co-state", "gradient", "(by", "the", "partner)"]
    assert head.split() == columns
    assert len(first.split()) == 5 and len(second.split()) == 7
    assert_allclose(float(second.split()[0]), 0.7 / 8, rtol=1e-4)
    assert second.split()[2] == f"{check.costate_orders[0]:.2f}"
    assert len(str(costate_check(_problem(scheme="2b"), refinements=[1])).splitlines()[1].split()) == 3


# -- terminal values -------------------------------------------------------------------------------------------------


def _field_head(net, prediction):
    """An output on the network's own label domain, with W and mu of size one."""
    head = Head(net.kernel.space_basis.kernel.phi, polynomials(net.Y), prediction)
    rng = np.random.default_rng(5)
    head.W.set(0, rng.normal(size=head.W.space_basis.shape))
    head.mu.set(0, rng.normal(size=head.mu.space_basis.shape))
    return head


def _density(Y, samples):
    values = np.exp(smooth(Y, samples, seed=8))
    return values / Y.sum(Y.weights @ values)


@on_ranks
@pytest.mark.parametrize(
    "prediction, loss",
    [
        (None, least_squares),
        (None, cross_entropy),
        (None, binary_cross_entropy),
        ("identity", least_squares),
        ("logistic", least_squares),
        ("softmax", least_squares),
        ("softmax", cross_entropy),
        ("logistic", binary_cross_entropy),
        ("logistic", functional_loss(lambda p, C: (p - C) ** 4 * fd.dx)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_terminal_values_of(prediction, loss):
    """(4.2b), Remark 4.3 and cross entropy, C_pre - C before h' and W; samples of unequal weight, one of 0."""
    net = network("disk", "CG1")
    head = None if prediction is None else _field_head(net, prediction)
    inputs, targets = net.Y.batch(smooth(net.Y, 4)), net.Y.batch(_density(net.Y, 4))
    problem = LearningProblem(net, head, loss, None, Batch(inputs, targets, [1.0, 0.0, 2.5, 0.3]))
    check = costate_check(problem, refinements=[1])
    _assert_round_off(check)
    final = net(inputs)
    r = net.Y.values(terminal_costate(problem, final))
    assert np.abs(r[:, 1]).max(initial=0) == 0 and net.Y.norm(net.Y.batch(r)) > 1e-3


def test_terminal_values_of_classes():
    """Softmax with cross entropy over classes: r(z, T) = sum_k (p_k - C_k) W_k(z), a mean over the samples."""
    problem = _problem(samples=4)
    net, head = problem.net, problem.head
    final = net(problem.batch.inputs)
    O = head.scores(final)
    p = np.exp(O) / np.exp(O).sum(axis=1, keepdims=True)
    C = np.eye(3)[problem.batch.targets]
    expected = head.psi.values @ head.W.get(0).T @ ((p - C) / 4).T
    assert_allclose(net.Y.values(terminal_costate(problem, final)), expected, rtol=0, atol=1e-15)


def test_the_arguments_of_the_output_kernel_keep_their_order():
    """Remark 4.3 prints W(z, y) in the output and W(y, z) in the co-state; one order holds, (2.9)'s."""
    net = network("disk", "CG1")
    psi = polynomials(net.Y)
    head = Head(psi, psi, "identity")
    head.W.set(0, np.random.default_rng(0).normal(size=(3, 3)))
    inputs, target = net.Y.batch(smooth(net.Y, 1)), net.Y.batch(smooth(net.Y, 1, seed=4))
    problem = LearningProblem(net, head, least_squares, None, Batch(inputs, target))

    def J(f):
        return net.Y.norm(net.Y.batch(net.Y.values(head(f)) - net.Y.values(target))) ** 2 / 2

    r, delta = terminal_costate(problem, inputs), net.Y.batch(smooth(net.Y, 1, seed=9))
    plus, minus = (net.Y.batch(net.Y.values(inputs) + e * net.Y.values(delta)) for e in (1, -1))
    derivative = (J(plus) - J(minus)) / 2  # J is quadratic: no truncation
    assert_allclose(net.Y.inner(r, delta), derivative, rtol=1e-12)
    as_printed = psi.values @ head.W.get(0) @ psi.project(net.Y.values(head(inputs)) - net.Y.values(target))
    assert abs(net.Y.inner(net.Y.batch(as_printed), delta) / derivative - 1) > 0.1


# -- running costs ---------------------------------------------------------------------------------------------------


def _dense(net):
    """a, B and B^T of each layer as matrices, for a net on one rank."""
    phi, psi = net.kernel.space_basis.kernel.phi, net.kernel.space_basis.kernel.psi
    for layer in range(net.layers):
        beta = net.kernel.get(layer)
        yield net.bias.get(layer)[:, None], phi.values @ beta @ psi.weighted.T


def _accurate(net, f, rate, more=0):
    """y at T, from f with `more` zeros behind, of y_t = rate(t, y, a, B), by SciPy near round-off."""
    y = np.concatenate([np.ravel(f), np.zeros(more)])
    for (start, end), (a, B) in zip(zip(net.times, net.times[1:]), _dense(net)):
        y = solve_ivp(lambda t, y: rate(t, y, a, B), (start, end), y, method="DOP853", rtol=3e-14, atol=1e-15).y[:, -1]
    return y


def _running_cost(net, inputs, weight):
    """J = weight/2 |f(T)|^2 + int sum_s (1 + t) int_Y sin f_s dy dt."""
    w, shape = net.Y.weights, (net.Y.nodes, inputs.function_space().value_size)

    def rate(t, y, a, B):
        f = y[:-1].reshape(shape)
        return np.append(np.tanh(a - B @ f).ravel(), (1 + t) * (w @ np.sin(f)).sum())

    y = _accurate(net, net.Y.values(inputs), rate, more=1)
    return weight / 2 * (w @ y[:-1].reshape(shape) ** 2).sum() + y[-1]


@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["running alone", "running and terminal"])
def test_running_costs(weight):
    """r_t = B^T(sigma'(u) r) - L_f: r(0) and the gradients in a and b are derivatives of J by SciPy."""
    net = network("disk", "CG1", size=0.7)
    inputs = net.Y.batch(smooth(net.Y, 2))
    trajectory = solve_trajectory(net, inputs, steps=32)
    terminal = net.Y.batch(weight * net.Y.values(trajectory.final))
    costate = solve_costate(trajectory, terminal, running=lambda t, f: (1 + t) * np.cos(f))
    without = solve_costate(trajectory, terminal)
    rng, e = np.random.default_rng(3), 1e-3

    def difference(move):
        # Fourth order in e: truncation 1e-12, cancellation 1e-12.
        J = [move(step * e) for step in (-2, -1, 1, 2)]
        return (J[0] - 8 * J[1] + 8 * J[2] - J[3]) / (12 * e)

    delta = smooth(net.Y, 2, seed=6)
    by_initial = difference(lambda e: _running_cost(net, net.Y.batch(net.Y.values(inputs) + e * delta), weight))
    assert_allclose(net.Y.inner(costate.at_layer(0), net.Y.batch(delta)), by_initial, rtol=1e-8)
    assert abs(net.Y.inner(without.at_layer(0), net.Y.batch(delta)) / by_initial - 1) > 0.1
    gradients = iter(costate.gradient())
    for parameter in net.parameters:
        for k, gradient in zip(range(net.layers), gradients):
            c = parameter.get(k)
            d = parameter.space_basis.read(smooth_direction(net, rng, k, parameter))

            def moved(e):
                parameter.set(k, c + e * d)
                return _running_cost(net, inputs, weight)

            by_difference = difference(moved)
            parameter.set(k, c)
            found = parameter.inner(k, parameter.space_basis.read(gradient), d)
            assert_allclose(found, by_difference, rtol=1e-7, err_msg=f"{parameter.name}_{k}")


# -- the gradients ---------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("bias", ["nodes", "basis"])
def test_coefficients_of_the_gradient_are_projections_of_its_values(bias):
    """Those of (4.3), (4.4) from values at Gauss points in t; those of (4.4) are of rank one a sample."""
    net = network("annulus", "CG2", bias=bias)
    problem = learning_problem(net, head=False, weight=None)
    trajectory = solve_trajectory(net, problem.batch.inputs, steps=8)
    costate = solve_costate(trajectory, terminal_costate(problem, trajectory.final))
    gradient = costate.gradient()
    kernel = net.kernel.space_basis.kernel
    points, weights = np.polynomial.legendre.leggauss(12)
    for layer, (start, end) in enumerate(zip(net.times, net.times[1:])):
        a, beta = 0.0, 0.0
        for x, weight in zip(points, weights / 2):
            t = (start + end + (end - start) * x) / 2
            a = a + weight * costate.bias_gradient(t).dat.data_ro
            p, q = (net.Y.values(part) for part in costate.kernel_gradient(t))
            assert p.shape == q.shape == (net.Y.nodes, 4)
            beta = beta + weight * kernel.riesz(kernel.phi.project(p) @ kernel.psi.project(q).T)
        if bias == "basis":
            basis = net.bias.space_basis.basis
            a = np.linalg.solve(basis.gram, basis.project(a[:, None])[:, 0])
        # Interpolation of r at 1/8 of a layer, O(h^6): 1e-8.
        assert_allclose(net.bias.space_basis.read(gradient[layer]), a, rtol=0, atol=1e-7)
        assert_allclose(net.kernel.space_basis.read(gradient[3 + layer]), beta, rtol=0, atol=1e-7)


@on_ranks
@pytest.mark.parametrize("bias", ["nodes", "basis"])
def test_regularised_gradient(bias):
    """(4.7): Tikhonov adds lambda a and lambda b to the letter, R having a factor 1/2; others are those of the tape."""
    net = network("sphere", "CG1", bias=bias)
    for regulariser in (tikhonov(0.3), smooth_in_space(0.2) + smooth_in_time(0.1)):
        problem = LearningProblem(net, None, least_squares, regulariser, learning_problem(net, head=False).batch)
        _assert_round_off(costate_check(problem, refinements=[1]))
    trajectory = solve_trajectory(net, problem.batch.inputs)
    costate = solve_costate(trajectory, terminal_costate(problem, trajectory.final))
    pairs = iter(zip(costate.gradient(), costate.gradient(tikhonov(0.3)), strict=True))
    for parameter in net.parameters:
        for k, (without, with_it) in zip(range(net.layers), pairs):
            added = with_it.dat.data_ro - without.dat.data_ro
            assert_allclose(added, 0.3 * parameter.functions[k].dat.data_ro, rtol=0, atol=1e-13)


def test_what_is_printed_elsewhere_is_not_the_gradient():
    """5.1 has sigma for sigma' in (4.3); against derivatives in a by SciPy."""
    net = network("disk", "CG1", size=0.7)
    inputs, target = net.Y.batch(smooth(net.Y, 1)), net.Y.batch(smooth(net.Y, 1, seed=3))
    problem = LearningProblem(net, None, least_squares, None, Batch(inputs, target))
    trajectory = solve_trajectory(net, inputs, steps=16)
    costate = solve_costate(trajectory, terminal_costate(problem, trajectory.final))
    w, C, delta = net.Y.weights, net.Y.values(target), smooth(net.Y, 1, seed=9)[:, 0]
    a = net.bias.get(1)

    def J(e):
        net.bias.set(1, a + e * delta)
        f = _accurate(net, net.Y.values(inputs), lambda t, y, a, B: np.tanh(a - B @ y[:, None]).ravel())
        return w @ (f - C[:, 0]) ** 2 / 2

    derivative = (J(1e-4) - J(-1e-4)) / 2e-4
    net.bias.set(1, a)
    points, weights = np.polynomial.legendre.leggauss(10)
    holds = printed = 0.0
    for x, weight in zip(points, weights / 2 * 0.7):
        t = (TIMES[1] + TIMES[2] + (TIMES[2] - TIMES[1]) * x) / 2
        f, r = net.Y.values(trajectory(t)), net.Y.values(costate(t))
        u = trajectory.layers[1].argument(t, f)
        holds += weight * (w * delta) @ ((1 - np.tanh(u) ** 2) * r)[:, 0]
        printed += weight * (w * delta) @ (np.tanh(u) * r)[:, 0]
    assert_allclose(holds, derivative, rtol=1e-6)
    assert abs(printed / derivative - 1) > 0.1


def test_controls_that_vary_inside_of_the_layers():
    for bias in ("nodes", "basis"):
        in_time = {"bias_in_time": "linear", "kernel_in_time": "linear"}
        net = network("disk", "CG1", bias=bias, steps=4, solver_parameters={"ts_rk_type": "3"}, **in_time)
        rng = np.random.default_rng(1)
        for parameter in net.parameters:
            for k in range(len(parameter.functions)):
                direction = smooth_direction(net, rng, k, parameter)
                parameter.set(k, 0.7 * parameter.space_basis.read(direction))
        check = costate_check(learning_problem(net))
        _assert_order(check, 3)
        _assert_round_off(check)


def test_layers_with_bases_of_their_own():
    phi, psi = laplace("disk", "CG1", 4), polynomials(label_space("disk", "CG1"))
    net = ResidualNetwork(Kernel([phi, psi, phi], [psi, phi, phi]), bias=[None, phi, psi], layers=Layers(TIMES, steps=4))
    rng = np.random.default_rng(1)
    for layer in range(3):
        net.kernel.set(layer, 0.5 * rng.normal(size=net.kernel.space_bases[layer].shape))
        if layer:
            net.bias.set(layer, rng.normal(size=net.bias.space_bases[layer].shape))
        else:
            net.bias.set(layer, smooth(net.Y, 1)[:, 0])
    batch = Batch(net.Y.batch(smooth(net.Y)), net.Y.batch(smooth(net.Y, seed=2)))
    check = costate_check(LearningProblem(net, None, least_squares, tikhonov(0.1), batch), refinements=[1, 2, 4])
    _assert_order(check, 4)
    _assert_round_off(check)


def test_learned_factors_and_layer_times_are_taken_as_they_stand():
    """(4.3), (4.4) at a network whose factors and times have moved away from the given ones."""
    net = network("disk", "CG1", steps=4, learn_factors=True, learn_times=True)
    net.layer_times.set(0, [0.3, 0.8, 1.4])
    rng = np.random.default_rng(7)
    for parameter in net.factors:
        parameter.set(0, parameter.get(0) + 0.1 * rng.normal(size=parameter.get(0).shape))
    check = costate_check(learning_problem(net, weight=None))
    _assert_order(check, 4)
    _assert_round_off(check)


def test_one_sample_may_be_a_function_of_the_space_itself():
    net = network("disk", "CG1")
    f, target = fd.Function(net.Y.V), fd.Function(net.Y.V)
    f.dat.data_wo[...], target.dat.data_wo[...] = smooth(net.Y, 2).T
    check = costate_check(LearningProblem(net, None, least_squares, None, Batch(f, target)), refinements=[1])
    _assert_round_off(check)


# -- implicit schemes ------------------------------------------------------------------------------------------------

MIDPOINT = {"ts_type": "theta", "ts_theta_theta": 0.5}
CRANK_NICOLSON = {"ts_type": "cn"}
BACKWARD_EULER = {"ts_type": "beuler"}


def _discrete(net, f, steps, scheme):
    """f(T) by an implicit scheme whose stages are found by fixed-point iteration; f may be complex."""
    for (start, end), (a, B) in zip(zip(net.times, net.times[1:]), _dense(net)):
        h = (end - start) / steps

        def sigma(f):
            return np.tanh(a - B @ f)

        for _ in range(steps):
            stage = f
            for _ in range(60):  # contracts by 0.3 or less each time
                if scheme is MIDPOINT:
                    stage = f + h / 2 * sigma(stage)
                elif scheme is CRANK_NICOLSON:
                    stage = f + h / 2 * (sigma(f) + sigma(stage))
                else:
                    stage = f + h * sigma(stage)
            f = f + h * sigma(stage) if scheme is MIDPOINT else stage
    return f


def _discrete_costate(net, f, C, steps, scheme):
    """M^-1 of the derivative of 1/2 |f(T) - C|^2 in f(0), by a complex step at each node: to round-off."""
    w, r = net.Y.weights, np.empty_like(f)
    for i in range(len(f)):
        step = np.zeros_like(f)
        step[i] = 1e-30
        end = _discrete(net, f + 1j * step, steps, scheme)
        r[i] = (w @ ((end - C) ** 2 / 2)).imag / 1e-30 / w[i]
    return r


def _by_hand(scheme, steps, partner):
    """The discrete network's co-state r(0) without any adjoint, and (4.2)'s stepped by that scheme or its partner."""
    net = network("disk", "CG1", size=0.5)
    f, C = smooth(net.Y, 2), smooth(net.Y, 2, seed=4)
    trajectory = solve_trajectory(net, net.Y.batch(f), steps=steps, keep_stages=True, solver_parameters=scheme)
    assert_allclose(net.Y.values(trajectory.final), _discrete(net, f, steps, scheme), rtol=0, atol=1e-13)
    terminal = net.Y.batch(net.Y.values(trajectory.final) - C)
    costate = solve_costate(trajectory, terminal, partner=partner, solver_parameters=None if partner else scheme)
    r = net.Y.values(costate.at_layer(0))
    return np.abs(r - _discrete_costate(net, f, C, steps, scheme)).max() / np.abs(r).max()


@pytest.mark.parametrize("scheme", [MIDPOINT, BACKWARD_EULER], ids=["midpoint", "backward Euler"])
def test_implicit_schemes_of_one_stage_are_their_own_partners(scheme):
    """On the forward stages. The implicit midpoint rule is symmetric: it is the same rule in both directions."""
    # Newton and GMRES stop at 1e-13.
    assert _by_hand(scheme, 2, partner=True) < 1e-12


def test_crank_nicolson_is_not_its_own_partner():
    """It steps f and (4.2) at second order both; the derivative of the one is the other to O(h^2) only."""
    differences = [_by_hand(CRANK_NICOLSON, steps, partner=False) for steps in (2, 4, 8)]
    assert differences[-1] > 1e-6
    assert_allclose(np.log2(np.divide(differences[:-1], differences[1:])), 2, atol=0.15)
    net = network("disk", "CG1")
    trajectory = solve_trajectory(net, net.Y.batch(smooth(net.Y)), keep_stages=True, solver_parameters=CRANK_NICOLSON)
    with pytest.raises(
        ValueError, match="partner: expected a trajectory stepped by a scheme with a partner, got theta 0.5, endpoint"
    ):
        solve_costate(trajectory, trajectory.final, partner=True)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(
    "scheme, order, equal",
    [(MIDPOINT, 2, True), (BACKWARD_EULER, 1, True), (CRANK_NICOLSON, 2, False), ({"ts_type": "dirk"}, 2, False)],
    ids=["midpoint", "backward Euler", "Crank-Nicolson", "dirk"],
)
def test_implicit_networks(scheme, order, equal):
    """The adjoint of TSAdjoint is (4.2) at the scheme's order; to round-off by the partner of those that have one."""
    net = network("disk", "CG1", steps=8, solver_parameters=scheme)
    check = costate_check(learning_problem(net), refinements=[1, 2])
    _assert_order(check, order)
    assert bool(check.partner_costate) == equal
    if equal:
        _assert_round_off(check)


@on_ranks
def test_implicit_schemes_on_ranks():
    """Order 2 of the implicit midpoint rule, for state and co-state."""
    problem = _problem(("annulus", "DG0"), head=False)
    inputs, Y = problem.batch.inputs, problem.net.Y

    def solved(steps, **options):
        trajectory = solve_trajectory(problem.net, inputs, steps=steps, **options)
        costate = solve_costate(trajectory, terminal_costate(problem, trajectory.final), **options)
        return Y.values(trajectory.final), Y.values(costate.at_layer(0)), Y.values(costate(0.0))

    exact = solved(16)
    coarse, fine = (solved(steps, solver_parameters=MIDPOINT) for steps in (8, 16))
    for c, f, e in zip(coarse, fine, exact):
        errors = [Y.norm(Y.batch(values - e)) for values in (c, f)]
        assert abs(np.log2(errors[0] / errors[1]) - 2) < 0.1


# -- Proposition 4.1, Remark 4.1 -------------------------------------------------------------------------------------


def _one_sample(net, target):
    return LearningProblem(net, None, least_squares, None, Batch(net.Y.batch(smooth(net.Y, 1)), target))


@on_ranks
def test_at_a_reached_target_the_gradient_vanishes():
    """Proposition 4.1, (4.5): r = 0, so that (4.3) and (4.4) are 0; by (4.2) and by the tape."""
    net = network("disk", "CG1")
    trajectory = solve_trajectory(net, net.Y.batch(smooth(net.Y, 1)), steps=8)
    problem = _one_sample(net, trajectory.final)
    costate = solve_costate(trajectory, terminal_costate(problem, trajectory.final))
    assert all((g.dat.data_ro == 0).all() for g in costate.gradient())
    problem = _one_sample(net, net(problem.batch.inputs))
    J, _ = problem.record()
    assert J(problem.functions) == 0
    assert all((g.dat.data_ro == 0).all() for g in J.derivative())


@on_ranks
@pytest.mark.parametrize("sigma", ["tanh", "arctan", "sigmoid"])
def test_elsewhere_it_does_not_if_sigma_increases(sigma):
    """Remark 4.1: with sigma' > 0, (4.3) has the sign of r everywhere, and r does not vanish."""
    net = network("disk", "CG1", activation=sigma)
    problem = _one_sample(net, net.Y.batch(smooth(net.Y, 1, seed=5)))
    trajectory = solve_trajectory(net, problem.batch.inputs, steps=8)
    costate = solve_costate(trajectory, terminal_costate(problem, trajectory.final))
    for t in (0.0, 0.1, 0.5, 1.3):
        r, gradient = net.Y.values(costate(t))[:, 0], costate.bias_gradient(t).dat.data_ro
        assert net.Y.norm(costate(t)) > 1e-2
        assert (np.sign(gradient) == np.sign(r)).all()
        p, q = costate.kernel_gradient(t)
        assert net.Y.norm(p) * net.Y.norm(q) > 1e-3


@on_ranks
def test_relu_below_its_kink_is_stationary():
    """Remark 4.1: with a <= B f everywhere nothing moves, the gradient is 0 and J is not."""
    net = network("disk", "CG1", activation="relu", size=0.3)
    for layer in range(net.layers):
        net.bias.set(layer, np.full(net.Y.nodes, -5.0))
    problem = _one_sample(net, net.Y.batch(smooth(net.Y, 1, seed=5)))
    trajectory = solve_trajectory(net, problem.batch.inputs, steps=4)
    inputs = net.Y.values(problem.batch.inputs)
    for t in (0.1, 0.5, 1.2):
        layer = trajectory.layers[trajectory.layer_at(t)]
        assert (layer.argument(t, net.Y.values(trajectory(t))) < 0).all()
        assert_allclose(net.Y.values(trajectory(t)), inputs, rtol=0, atol=1e-14)
    costate = solve_costate(trajectory, terminal_costate(problem, trajectory.final))
    assert all((g.dat.data_ro == 0).all() for g in costate.gradient())
    assert net.Y.norm(costate.at_layer(0)) > 0.1
    J, _ = problem.record()
    assert all((g.dat.data_ro == 0).all() for g in J.derivative())
    value = float(J(problem.functions))
    moved = [function._ad_mul(1.05) for function in problem.functions]
    assert value > 0.01 and float(J(moved)) == value


@on_ranks
def test_the_gradient_in_b_is_that_in_a_times_the_state():
    """Proposition 4.1: D_b J(y, z) = - D_a J(y) f(z) for one sample. So (4.5) is enough: (ii) adds nothing to it."""
    net = network("disk", "CG1")
    problem = _one_sample(net, net.Y.batch(smooth(net.Y, 1, seed=5)))
    trajectory = solve_trajectory(net, problem.batch.inputs, steps=8)
    costate = solve_costate(trajectory, terminal_costate(problem, trajectory.final))
    for t in (0.0, 0.1, 0.5, 1.3):
        p, q = (net.Y.values(part)[:, 0] for part in costate.kernel_gradient(t))
        assert_allclose(p, -costate.bias_gradient(t).dat.data_ro, rtol=0, atol=1e-14)
        assert_allclose(q, net.Y.values(trajectory(t))[:, 0], rtol=0, atol=1e-14)
    # What the tape has of b is the projection of just that: of D_a J where f is orthogonal to psi nothing is seen.
    check = costate_check(problem, refinements=[1])
    assert max(check.partner_gradient) < ROUND_OFF


def test_with_tikhonov_a_target_within_reach_is_not_reached():
    """Remark 4.2: at the minimum of J_mod sigma'(u) r = - lambda a, (4.7), and r is not 0 as it is without R."""
    teacher, left = network("disk", "CG1", size=0.5), []
    inputs = teacher.Y.batch(smooth(teacher.Y, 1))
    target = teacher(inputs)
    for R in (None, tikhonov(0.1)):
        problem = LearningProblem(network("disk", "CG1", size=0.4, seed=1), None, least_squares, R, Batch(inputs, target))
        result = train(problem, {"tao_gatol": 1e-8, "tao_max_it": 500}, monitor=lambda progress: None)
        assert result.converged
        trajectory = solve_trajectory(
            problem.net, inputs, steps=problem.net.steps, keep_stages=True, solver_parameters={"ts_rk_type": "4"}
        )
        costate = solve_costate(trajectory, terminal_costate(problem, trajectory.final), partner=True)
        without, with_R = (np.sqrt(sum(fd.assemble(fd.inner(g, g) * fd.dx) for g in costate.gradient(r))) for r in (None, R))
        left.append((problem.net.Y.norm(costate.at_layer(problem.net.layers)), without, with_R))
    assert max(left[0]) < 1e-6
    assert left[1][0] > 0.01 and left[1][1] > 1e-3 and left[1][2] < 1e-6


# -- conditioning ----------------------------------------------------------------------------------------------------


def test_the_backward_problem_is_conditioned_as_the_forward_one():
    """Section 5.1, 3.5: the propagators of z_t = - sigma'(u) B z and of (4.2) are adjoint in the label measure.

    So their norms and all their singular values agree: the forward one by SciPy, the backward one by `solve_costate`.
    """
    net = network("disk", "CG1", size=4.0)
    N, w = net.Y.nodes, net.Y.weights
    f = smooth(net.Y, 1)

    def rate(t, y, a, B):
        f, Z = y[:N], y[N:].reshape(N, N)
        sigma = np.tanh(a[:, 0] - B @ f)
        return np.append(sigma, -(1 - sigma**2)[:, None] * (B @ Z))

    forward = _accurate(net, np.append(f, np.eye(N)), rate)[N:].reshape(N, N)
    options = {"solver_parameters": {"ts_rk_type": "8vr"}}
    trajectory = solve_trajectory(net, net.Y.batch(np.repeat(f, N, axis=1)), steps=64, **options)
    # Sample i has r(T) = e_i; the trajectory is the same for all.
    backward = net.Y.values(solve_costate(trajectory, net.Y.batch(np.eye(N)), **options).at_layer(0))

    def singular_values(P):
        return np.linalg.svd(np.sqrt(w)[:, None] * P / np.sqrt(w), compute_uv=False)

    found, expected = singular_values(backward), singular_values(forward)
    assert expected[0] / expected[-1] > 2, "the problem should not be an isometry"
    assert_allclose(found[0], expected[0], rtol=1e-10)
    assert_allclose(found[-1], expected[-1], rtol=1e-10)
    assert_allclose(found, expected, rtol=1e-10)
    assert_allclose(backward, forward.T * w / w[:, None], rtol=0, atol=1e-10)
    # The bound of section 5.1 on the generator, with sup |sigma'| = 1.
    kernel = net.kernel.space_basis.kernel
    for layer, (a, B) in enumerate(_dense(net)):
        generator = B * (1 - np.tanh(a - B @ f) ** 2)
        assert singular_values(generator)[0] <= kernel.norm(net.kernel.get(layer))


# -- paths and arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, order", [((8, 16), 6), ((9, 27), 4)], ids=["even", "odd"])
def test_order_of_the_interpolation(steps, order):
    errors = []
    for n in steps:
        t = np.linspace(0.5, 2.0, n + 1)
        path = Path(0.5, 2.0, np.sin(3 * t)[:, None, None], 3 * np.cos(3 * t)[:, None, None])
        between = np.linspace(0.5, 2.0, 1001)
        errors.append(max(abs(path(s)[0, 0] - np.sin(3 * s)) for s in between))
    assert abs(np.log(errors[0] / errors[1]) / np.log(steps[1] / steps[0]) - order) < 0.3


@on_ranks
def test_trajectory_and_network_make_the_same_steps():
    """Of (4.1), from f_I on."""
    net = network("disk", "CG1", steps=3, solver_parameters={"ts_rk_type": "3bs"})
    f = net.Y.batch(smooth(net.Y))
    trajectory = solve_trajectory(net, f, steps=3, solver_parameters={"ts_rk_type": "3bs"})
    run = net.run(f)
    for layer, t in enumerate(net.times):
        assert_allclose(net.Y.values(trajectory(t)), net.Y.values(run.state(layer)), rtol=0, atol=1e-13)


@on_ranks
def test_arguments_that_do_not_fit_are_refused():
    problem = _problem()
    net, inputs = problem.net, problem.batch.inputs
    trajectory = solve_trajectory(net, inputs, steps=2)
    costate = solve_costate(trajectory, trajectory.final)
    with pytest.raises(ValueError, match="steps: expected a positive integer, got 0"):
        solve_trajectory(net, inputs, steps=0)
    with pytest.raises(ValueError, match="expected one of 'rk', 'theta', 'beuler', 'cn' as 'ts_type' .* got 'ssp'"):
        solve_trajectory(net, inputs, solver_parameters={"ts_type": "ssp"})
    with pytest.raises(ValueError, match="'none' as 'ts_adapt_type' for fields, got 'rk' and 'basic'"):
        solve_costate(trajectory, trajectory.final, solver_parameters={"ts_adapt_type": "basic"})
    with pytest.raises(ValueError, match="solver_parameters: PETSc refuses"):
        solve_trajectory(net, inputs, solver_parameters={"ts_rk_type": "nothing"})
    with pytest.raises(ValueError, match="terminal: expected . samples, as in the trajectory, got"):
        solve_costate(trajectory, net.Y.batch(smooth(net.Y, 1)))
    with pytest.raises(ValueError, match="partner: expected a trajectory with its stages, .*keep_stages=True"):
        solve_costate(solve_trajectory(net, inputs, solver_parameters={"ts_rk_type": "4"}), inputs, partner=True)
    with pytest.raises(
        ValueError, match="partner: expected a trajectory stepped by a scheme with a partner, got 6vr; all its"
    ):
        solve_costate(trajectory, inputs, partner=True)
    with pytest.raises(ValueError, match="layer: expected an integer from 0 to 3, got 4"):
        costate.at_layer(4)
    with pytest.raises(ValueError, match="t: expected a time in a layer, from 0 to T = 1.3, got 1.5"):
        costate(1.5)
    adapted = network("disk", "CG1", solver_parameters={"ts_adapt_type": "basic"})
    with pytest.raises(ValueError, match="^costate_check: it does not take adapted time steps"):
        costate_check(LearningProblem(adapted, None, least_squares, None, Batch(inputs, inputs)))
    flat = ResidualNetwork(net.bases["phi"][0], layers=0)
    with pytest.raises(ValueError, match="^costate_check: it does not take a network without layers"):
        costate_check(LearningProblem(flat, None, least_squares, None, Batch(inputs, inputs)))


def test_without_layers_the_costate_is_its_terminal_value():
    net = ResidualNetwork(laplace("disk", "CG1", 4), layers=0)
    f = net.Y.batch(smooth(net.Y))
    costate = solve_costate(solve_trajectory(net, f), f)
    assert (net.Y.values(costate.at_layer(0)) == net.Y.values(f)).all() and costate.gradient() == []
