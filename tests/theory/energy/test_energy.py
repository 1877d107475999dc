"""The energies of 3.2 for (3.2a), (3.2b): Theorem 3.2 and the bounds before it along solutions, and in discrete ones.

The domains are a disk, an annulus and a sphere; none has the measure 1.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers import flat_network, laplace, smooth
from numpy.testing import assert_allclose

from fem_resnet import (
    EnergyMonitor,
    ResidualNetwork,
    dissipation_ratio,
    energy_conditions,
    energy_step_limit,
    follow_trajectory,
    get_activation,
)  # fmt: skip
from fem_resnet.theory.spectra.autonomous import autonomous_problem

on_ranks = pytest.mark.parallel([1, 2, 3])

DOMAINS = [("disk", "CG1"), ("annulus", "DG0"), ("sphere", "CG1")]
EULER = {"ts_type": "rk", "ts_rk_type": "1fe"}
MIDPOINT = {"ts_type": "theta", "ts_theta_theta": 0.5}
BACKWARD_EULER = {"ts_type": "beuler"}
DISCRETE_GRADIENT = {"ts_type": "discrete_gradient"}

#: Statements of 3.2 that apply to B = B^T >= 0 and a in R(B): all but one bound, or both, which suppose more of sigma.
ALL = [
    "int Sigma(u) falls", "(i)", "(ii)", "1/2 |B^(1/2) f|^2 - (a, f) falls", "(iii)", "(iv)",
    "int |B f|^2", "int |B f|",
]  # fmt: skip
APPLY = {"leaky_relu": ALL, "identity": ALL, "tanh": ALL[:6] + ALL[7:], "elu": ALL[:6] + ALL[7:], "relu": ALL[:6]}


def square(rank=4, seed=0):
    """A positive definite matrix with eigenvalues from 0.1 to 3 or so."""
    A = np.random.default_rng(seed).normal(size=(rank, rank))
    return A @ A.T / rank + 0.1 * np.eye(rank)


def skew(rank=4, seed=1):
    """An antisymmetric matrix."""
    A = np.random.default_rng(seed).normal(size=(rank, rank))
    return (A - A.T) / 2


def network(beta, bias=None, space=("sphere", "CG1"), *, layers=16, final_time=4.0, alone=False, **options):
    """An autonomous network in orthonormal functions; the bias is in R(B) if R(B) is their whole span."""
    phi = laplace(*space, rank=len(beta), alone=alone)
    times = {"layers": layers, "final_time": final_time}
    net = flat_network(phi, bias=phi, bias_in_time="shared", kernel_in_time="shared", **(times | options))
    net.kernel.set(0, beta)
    net.bias.set(0, np.random.default_rng(2).normal(size=len(beta)) if bias is None else bias)
    return net


def start(net, size=1.0, samples=3):
    return net.Y.batch(size * smooth(net.Y, samples))


def followed(net, initial, **options):
    """A monitor that has measured the network's own steps."""
    monitor = EnergyMonitor(net)
    follow_trajectory(net, initial, monitor, solver_parameters=net.solver_parameters, **options)
    return monitor


def by_name(monitor):
    return {statement.name: statement for statement in monitor.statements()}


def rises(monitor, name):
    """The largest rise over a step, of all samples, relative to the size of the values."""
    values = monitor.values(name)
    return float(np.diff(values, axis=0).max() / np.abs(values).max())


# -- the solution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", DOMAINS, ids="-".join)
@pytest.mark.parametrize("name", APPLY)
def test_theorem_3_2_and_the_bounds_before_it_hold_where_they_apply(name, space):
    """Theorem 3.2 (i) - (iv) for B = B^T >= 0 and a in R(B^(1/2))."""
    net = network(square(), space=space, activation=name)
    statements = by_name(followed(net, start(net, 3.0), steps=4))
    assert [name for name in statements if statements[name].applies] == APPLY[name]
    for name, statement in statements.items():
        assert statement.holds or not statement.applies, statement


@pytest.mark.parametrize("space", DOMAINS, ids="-".join)
def test_the_primitive_falls_for_a_nonnegative_symmetric_part_and_the_root_is_not_asked_for(space):
    """Theorem 3.2, 1): B_s >= 0 is enough for (i) and (ii), and 2) does not apply."""
    net = network(square() + 3 * skew(), space=space)
    statements = by_name(followed(net, start(net, 3.0), steps=4))
    assert [name for name in statements if statements[name].applies] == [*ALL[:3], "int |B f|"]
    assert all(statement.holds for statement in statements.values() if statement.applies)
    assert statements["(iii)"].bound is None and "not its own transpose" in statements["(iii)"].unmet[0]


def test_the_primitive_rises_where_the_symmetric_part_is_negative_somewhere():
    net = network(square() - 3 * np.eye(4), np.zeros(4))
    statement = by_name(followed(net, start(net, 0.1), steps=4))["(i)"]
    assert not statement.applies and not statement.holds
    assert "B_s >= 0 fails: the smallest eigenvalue of B_s is -2" in str(statement)


def test_each_condition_is_flagged_with_its_reason():
    """What Theorem 3.2 supposes, (3.4) among it, one after the other taken away."""
    beta = np.diag([2.0, 1.0, 0.0])
    inside, outside = np.array([1.0, 1.0, 0.0]), np.ones(3)
    fails = {
        "B_s >= 0": network(-beta, inside),
        "B = B^T": network(beta + skew(3), inside),
        "a in R(B^(1/2))": network(beta, outside),
        "s sigma(s) >= 0": network(beta, inside, activation="sigmoid"),
        "|sigma(s)| >= C |s| for large |s|": network(beta, inside, activation="tanh"),
        "|sigma(s)| >= C > 0 for large |s|": network(beta, inside, activation="relu"),
    }
    conditions = energy_conditions(network(beta, inside, activation="identity"))
    assert all(condition.holds for condition in conditions.values())
    for what, net in fails.items():
        assert not energy_conditions(net)[what].holds
    reasons = {what: energy_conditions(net)[what].reason for what, net in fails.items()}
    assert reasons["a in R(B^(1/2))"] == "the part of a outside of R(B) has the norm 1, a has 1.73"
    assert reasons["s sigma(s) >= 0"] == "sigmoid has not the sign of its argument"
    assert reasons["|sigma(s)| >= C > 0 for large |s|"] == "|relu(-10000)| = 0, |relu(10000)| = 1e+04"


def test_coefficients_that_depend_on_time_are_flagged():
    net = ResidualNetwork(laplace("disk", "CG1", 2), layers=2)
    net.kernel.set(1, np.eye(2))
    condition = energy_conditions(net)["a and B do not depend on t"]
    assert not condition.holds and "kernel depends on t" in condition.reason
    net.kernel.set(0, np.eye(2))
    assert energy_conditions(net)["a and B do not depend on t"].holds


def test_outside_of_the_range_of_the_root_the_potential_has_no_lower_bound():
    """The assumption a in R(B^(1/2)) of (iii): without it -(a, f) falls for ever along N(B)."""
    net = network(np.diag([2.0, 1.0, 0.0]), np.ones(3), final_time=64.0, layers=64)
    statements = by_name(monitor := followed(net, start(net)))
    assert statements["(iii)"].bound is None and statements["1/2 |B^(1/2) f|^2 - (a, f) falls"].holds
    assert np.diff(monitor.values("potential")[-10:], axis=0).max() < -0.1


@pytest.mark.parametrize("name, potential", [("tanh", False), ("tanh", True), ("softplus", False)])
def test_what_is_measured_of_the_dissipation_is_what_the_energy_loses(name, potential):
    """(ii) and (iv) integrated by the stages of the classical method, against the differences: order 4."""
    energy, lost = ("potential", "spent") if potential else ("primitive", "dissipated")
    net = network(square(), activation=name)
    defects = []
    for steps in (2, 4):
        monitor = followed(net, start(net), steps=steps)
        E = monitor.values(energy)
        assert E[-1].max() < E[0].min()
        defects.append(np.abs(E + monitor.values(lost) - E[0]).max())
    assert 3.7 < np.log2(defects[0] / defects[1]) < 4.5


@pytest.mark.parametrize("method", [{}, EULER, MIDPOINT, BACKWARD_EULER], ids=["rk4", "1fe", "midpoint", "beuler"])
def test_a_run_has_the_energies_of_the_nodal_values_stepped_by_the_same_method(method):
    net = network(square() + skew(), solver_parameters=method)
    initial = start(net)
    along, at_layers = followed(net, initial), EnergyMonitor(net).watch(net.run(initial))
    assert_allclose(at_layers.times, along.times, atol=1e-12)
    for name in ("primitive", "dissipation", "potential", "power", "root", "coupling", "Bf_1", "Bf_2"):
        # Newton's method ends differently in the nodal values and in the coefficients, below 1e-8 squared.
        assert_allclose(at_layers.values(name), along.values(name), rtol=1e-10, atol=1e-10)


@on_ranks
@pytest.mark.parametrize("space", DOMAINS, ids="-".join)
def test_the_partition_does_not_change_what_is_measured(space):
    there, here = (network(square(), space=space, alone=alone) for alone in (False, True))
    these, those = (followed(net, start(net)) for net in (there, here))
    for name in ("primitive", "dissipated", "potential", "spent", "Bf_1"):
        assert_allclose(these.values(name), those.values(name), rtol=1e-12, atol=1e-12)
    for one, other in zip(these.statements(), those.statements(), strict=True):
        assert (one.holds, one.applies) == (other.holds, other.applies)


def test_what_was_not_measured_is_refused():
    monitor = EnergyMonitor(network(square()))
    with pytest.raises(ValueError, match="EnergyMonitor: nothing was measured yet; give it to follow_trajectory"):
        monitor.statements()
    follow_trajectory(monitor._net, start(monitor._net), monitor)
    with pytest.raises(ValueError, match="name: expected one of 'size', 'primitive', .*, got 'energy'"):
        monitor.values("energy")


# -- Euler's and other explicit steps --------------------------------------------------------------------------------


def stepped(net, h, initial, layers=1):
    """Measured along steps of length h of the network's method."""
    other = net.replace(layers=replace(net.settings.layers, times=h * np.arange(layers + 1.0)))
    other.kernel.set(0, net.kernel.get(0))
    other.bias.set(0, net.bias.get(0))
    return EnergyMonitor(other).watch(other.run(initial))


def along_the_largest(net, size=0.01):
    """A small u_I = -B f_I along the eigenfunction of the largest singular value, where sigma is nearly linear."""
    direction = np.linalg.svd(net.kernel.get(0))[2][0]
    return net.Y.batch(size * net.bases["phi"][0].values @ direction)


@pytest.mark.parametrize("space", DOMAINS, ids="-".join)
@pytest.mark.parametrize("energy", ["primitive", "potential"])
def test_euler_lets_both_energies_fall_up_to_two_over_the_norm_of_B_and_no_further(space, energy):
    """B = B^T >= 0: 1.99 holds, 2.2 fails; (i) and (iii) of Theorem 3.2 in the discrete solution."""
    net = network(square(), np.zeros(4), space, solver_parameters=EULER)
    h = getattr(energy_step_limit(net), energy)
    assert_allclose(h, 2 / np.linalg.norm(square(), 2), rtol=1e-10)
    for size in (0.01, 3.0):  # near the linear case, and far from it
        assert rises(stepped(net, 0.995 * h, start(net, size), layers=8), energy) <= 1e-12
    assert rises(stepped(net, 0.995 * h, along_the_largest(net)), energy) < 0
    assert rises(stepped(net, 1.1 * h, along_the_largest(net)), energy) > 0.05


def test_euler_lets_the_primitive_fall_up_to_twice_kappa_for_B_that_is_not_symmetric():
    """B = [[1, -c], [c, 1]] has kappa = 1 / (1 + c^2), and (1 - h)^2 + (h c)^2 <= 1 up to h = 2 kappa."""
    c = 3.0
    net = network(np.array([[1.0, -c], [c, 1.0]]), np.zeros(2), ("annulus", "CG1"), solver_parameters=EULER)
    limit = energy_step_limit(net)
    assert_allclose([limit.kappa, limit.primitive], [1 / (1 + c**2), 2 / (1 + c**2)], rtol=1e-10)
    assert limit.potential == 0 and "B = B^T" in limit.why["potential"]
    assert rises(stepped(net, 0.995 * limit.primitive, start(net, 3.0), layers=8), "primitive") <= 1e-12
    assert rises(stepped(net, 1.1 * limit.primitive, along_the_largest(net)), "primitive") > 0.04


def test_kappa_is_the_least_of_its_quotients():
    """kappa = inf (B_s v, v) / |B v|^2 over R(B^T); factors that are not orthonormal, and of a span too large for B."""
    phi = laplace("disk", "CG1", 4)
    inner = square(3) + 2 * skew(3)
    beta = np.zeros((4, 4))
    beta[:3, :3] = inner
    kappa = dissipation_ratio(autonomous_problem(network(beta, space=("disk", "CG1"))).system)
    v = np.random.default_rng(0).normal(size=(3, 20000))
    quotients = np.sum(v * (inner @ v), axis=0) / np.sum((inner @ v) ** 2, axis=0)
    assert kappa <= quotients.min() < kappa + 0.01 * abs(kappa)
    assert phi.rank == 4
    one_sided = np.diag([1.0, 1.0, 0.0])
    one_sided[0, 2] = 1.0
    assert dissipation_ratio(autonomous_problem(network(one_sided)).system) == -math.inf


@pytest.mark.parametrize("h", [1.0, 0.1, 0.01])
def test_no_step_of_euler_works_for_an_antisymmetric_kernel(h):
    """kappa = 0, and |u_1|^2 = |u_0|^2 + h^2 |B u_0|^2; the flow keeps int Sigma(u)."""
    net = network(np.array([[0.0, -1.0], [1.0, 0.0]]), np.zeros(2), ("disk", "CG1"), solver_parameters=EULER)
    limit = energy_step_limit(net)
    assert limit.primitive == limit.kappa == 0
    values = stepped(net, h, along_the_largest(net)).values("primitive")
    assert_allclose(values[1] / values[0], 1 + h**2, rtol=1e-3)


@pytest.mark.parametrize("name, radius", [("2a", 2.0), ("3", 2.5127), ("3bs", 2.5127), ("4", 2.7853), ("5dp", None)])
def test_other_methods_let_the_primitive_fall_up_to_a_constant_of_their_own(name, radius):
    """B = B^T >= 0: for most methods up to the interval of stability, which no constant can exceed."""
    net = network(square(), np.zeros(4), ("annulus", "DG0"), solver_parameters={"ts_type": "rk", "ts_rk_type": name})
    h, norm = energy_step_limit(net).primitive, np.linalg.norm(square(), 2)
    if radius is not None:
        assert_allclose(h * norm, radius, rtol=2e-3)
        assert rises(stepped(net, 1.05 * radius / norm, along_the_largest(net)), "primitive") > 0.05
    assert h * norm > 1.8
    for size in (0.01, 3.0):
        assert rises(stepped(net, h, start(net, size), layers=8), "primitive") <= 1e-12


# -- implicit steps of any size --------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("h", [1.0, 100.0, 1e4])
def test_the_discrete_gradient_keeps_the_law_of_the_primitive_at_any_step_size(h):
    """(i) and (ii) of Theorem 3.2 for B_s >= 0: int Sigma(u_1) + h (B_s D, D) = int Sigma(u_0) exactly."""
    net = network(square() + 3 * skew(), solver_parameters=DISCRETE_GRADIENT)
    monitor = stepped(net, h, start(net, 3.0), layers=6)
    E, lost = monitor.values("primitive"), monitor.values("dissipated")
    assert np.diff(E, axis=0).max() < 0 and np.diff(lost, axis=0).min() > 0
    # The residual of Newton's method in u, times |sigma|, and round-off in h D.
    assert_allclose(E + lost, E[:1] + 0 * E, rtol=1e-9)
    assert by_name(monitor)["(ii)"].holds
    assert energy_step_limit(net).primitive == math.inf


@pytest.mark.parametrize("h", [1.0, 100.0])
def test_the_implicit_midpoint_rule_keeps_the_law_of_the_potential_at_any_step_size(h):
    """(iii) and (iv) of Theorem 3.2 for B = B^T >= 0 and a in R(B^(1/2))."""
    net = network(square(), solver_parameters=MIDPOINT)
    monitor = stepped(net, h, start(net, 3.0), layers=6)
    F, lost = monitor.values("potential"), monitor.values("spent")
    assert np.diff(F, axis=0).max() < 0 and np.diff(lost, axis=0).min() > 0
    assert_allclose(F + lost, F[:1] + 0 * F, rtol=1e-9, atol=1e-9 * np.abs(F).max())
    assert by_name(monitor)["(iii)"].holds and by_name(monitor)["(iv)"].holds
    assert energy_step_limit(net).potential == math.inf


@pytest.mark.parametrize(
    "method, sign, keeps, breaks",
    [(DISCRETE_GRADIENT, 1.0, "primitive", "potential"), (MIDPOINT, -1.0, "potential", "primitive")],
    ids=["discrete gradient", "midpoint"],
)
def test_each_energy_stable_rule_breaks_the_law_of_the_other(method, sign, keeps, breaks):
    """B = 1 on constants, leaky relu, h large: Sigma(u_1) = Sigma(u_0) makes u_1 = -10^(1/2) u_0; midpoint -u_0."""
    net = network(np.eye(1), np.zeros(1), ("disk", "CG1"), activation="leaky_relu", solver_parameters=method)
    monitor = stepped(net, 1e4, net.Y.batch(-sign + 0 * net.Y.weights))
    assert rises(monitor, keeps) < 0
    assert rises(monitor, breaks) > 0.5
    limit = energy_step_limit(net)
    assert getattr(limit, keeps) == math.inf and getattr(limit, breaks) == 0


@pytest.mark.parametrize("h", [1.0, 1e3])
def test_backward_euler_lets_both_energies_fall_at_any_step_size(h):
    net = network(square(), activation="leaky_relu", solver_parameters=BACKWARD_EULER)
    limit = energy_step_limit(net)
    assert limit.primitive == limit.potential == math.inf
    monitor = stepped(net, h, start(net, 3.0), layers=4)
    assert rises(monitor, "primitive") <= 1e-12 and rises(monitor, "potential") <= 1e-12


def test_no_limit_is_given_where_none_is_known_and_the_reason_is_said():
    for options, activation, says in [
        ({"ts_type": "dirk"}, "tanh", "no statement about this method"),
        ({"ts_type": "cn"}, "tanh", "no statement about this method"),
        ({"ts_rk_type": "8vr"}, "tanh", "the constant of a method of 12 stages is not computed"),
        ({}, get_activation("tanh"), ""),
    ]:
        limit = energy_step_limit(network(square(), activation=activation, solver_parameters=options))
        assert (limit.primitive == 0) == bool(says) and says in limit.why["primitive"]
    net = network(-square(), solver_parameters=DISCRETE_GRADIENT)
    limit = energy_step_limit(net)
    assert net.tableau is None and limit.primitive == 0
    assert limit.why["primitive"] == "the discrete gradient allows any step, but the network lacks: B_s >= 0"


def test_a_run_of_another_network_is_refused():
    net, other = (network(square(seed=seed)) for seed in (0, 1))
    with pytest.raises(ValueError, match="run: expected a run of ResidualNetwork.*"):
        EnergyMonitor(net).watch(other.run(start(other)))
