"""How fast f may grow, section 3.4: bounds along solutions, sharp ones, and fitted exponents.

No domain has the measure 1: a disk (about 3), one of radius 0.4 (about 1/2), an annulus and a sphere.
"""

import firedrake as fd
import numpy as np
import pytest
import sympy
from helpers import flat_network, laplace, smooth
from numpy.testing import assert_allclose

from fem_resnet import (
    Activation,
    Basis,
    Bias,
    GrowthMonitor,
    Kernel,
    LabelSpace,
    ResidualNetwork,
    fit_growth,
    follow_trajectory,
    get_activation,
    given_basis,
)  # fmt: skip
from fem_resnet.theory.energy.growth import supremum
from fem_resnet.theory.energy.growth_fit import MARGIN

on_ranks = pytest.mark.parallel([1, 2, 3])

SPACES = [("disk", "CG1"), ("annulus", "DG0"), ("sphere", "CG1")]


def network(beta, activation, space=("sphere", "CG1"), *, final_time=32.0, alone=False, bias=0.0, **options):
    """An autonomous network in orthonormal functions, with a constant bias."""
    times = {"bias_in_time": "shared", "kernel_in_time": "shared", "layers": 32, "final_time": final_time}
    net = flat_network(laplace(*space, rank=len(beta), alone=alone), activation=activation, **(times | options))
    net.kernel.set(0, beta)
    net.bias.set(0, bias + np.zeros(net.Y.nodes))
    return net


def followed(net, size=1.0, steps=4):
    monitor = GrowthMonitor(net)
    follow_trajectory(net, net.Y.batch(size * smooth(net.Y)), monitor, steps=steps)
    return monitor


def by_name(monitor):
    return {bound.name: bound for bound in monitor.bounds()}


def random(seed=0, rank=4):
    return np.random.default_rng(seed).normal(size=(rank, rank))


def non_negative(seed=0, rank=4):
    """A matrix with a positive semidefinite symmetric part, and no symmetric one."""
    A = random(seed, rank)
    return A @ A.T / rank + random(seed + 1, rank) - random(seed + 1, rank).T


# -- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids="-".join)
@pytest.mark.parametrize("name", ["tanh", "arctan", "sigmoid"])
def test_growth_is_linear_at_most_for_bounded_activations_whatever_B_is(name, space):
    """3.4, first sentence; the bias is so large that sigma is near its supremum, and the bound nearly reached."""
    bound = by_name(followed(network(-random(), name, space), steps=2))["bounded"]
    assert bound.applies and bound.ratio <= 1 + 1e-12
    near = by_name(followed(network(1e-3 * random(), name, space, bias=300.0), 1e-2, steps=2))["bounded"]
    assert 0.98 < near.ratio <= 1 + 1e-12


@on_ranks
@pytest.mark.parametrize("space", SPACES, ids="-".join)
def test_proposition_3_5_holds_with_its_constants(space):
    """Proposition 3.5: |f(t)| <= |f_I| + |u_I^+| t for relu and B_s >= 0."""
    net = network(non_negative(), "relu", space, bias=1.0)
    initial = 2 * smooth(net.Y)
    bound = by_name(followed(net, 2.0, steps=1 if net.Y.comm.size > 1 else 4))["Proposition 3.5"]
    u = 1.0 - net.kernel.space_basis.kernel.apply(net.kernel.get(0), initial)
    C_1, C_2 = (np.sqrt(net.Y.sum(net.Y.weights @ part**2)) for part in (initial, np.maximum(u, 0)))
    assert_allclose(bound.values[-1], C_1 + 32.0 * C_2, rtol=1e-12)
    assert bound.applies and bound.ratio <= 1 + 1e-12


def test_the_constants_of_proposition_3_5_are_sharp_along_the_null_space_of_B():
    """B = 0 and f_I = 0: f = a^+ t."""
    net = network(np.zeros((1, 1)), "relu", bias=1.5)
    monitor = followed(net, 0.0)
    assert_allclose(by_name(monitor)["Proposition 3.5"].ratio, 1.0, rtol=1e-12)


@pytest.mark.parametrize("name", ["leaky_relu", "elu", "identity", "tanh"])
def test_growth_is_linear_at_most_for_other_activations_too_where_the_symmetric_part_is_nonnegative(name):
    """The last sentence of 3.4 for leaky relu; C_2 = (2 sup sigma' int Sigma(u_I))^(1/2)."""
    bound = by_name(followed(network(non_negative(), name, bias=1.0), 2.0))["Proposition 3.5"]
    assert bound.applies and 0 < bound.ratio <= 1 + 1e-12


@on_ranks
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "softplus", "tanh"])
def test_the_exponential_bound_holds_and_the_one_without_the_measure_does_not(name):
    """3.4, Gronwall: the exponent has the factor |Y|; sigma(0) of softplus adds |sigma(0)| |Y| t."""
    net = network(-0.3 * np.eye(1), name, final_time=2.0, bias=0.1)
    bound = by_name(followed(net, steps=1))["Gronwall"]
    assert bound.applies and bound.ratio <= 1 + 1e-12
    if name == "relu":
        monitor = GrowthMonitor(net)
        follow_trajectory(net, net.Y.batch(1 + 0 * net.Y.weights), monitor, steps=1)
        b = net.kernel.space_basis.kernel.norm(net.kernel.get(0), "linf")
        measure = net.Y.measure
        printed = monitor.norms("L1")[0] + 0.1 * measure * np.array(monitor.times)[:, None]
        assert (monitor.norms("L1")[-1] > 1.5 * printed[-1] * np.exp(2.0 * b)).all()


def disk_of_measure_one_half():
    mesh = fd.UnitDiskMesh(2)
    mesh.coordinates.dat.data_wo[...] *= 0.4
    return LabelSpace(fd.FunctionSpace(mesh, "CG", 1))


@on_ranks
@pytest.mark.parametrize("domain", ["small disk", "sphere"])
def test_a_kernel_of_rank_one_makes_the_exponential_bound_sharp(domain):
    """b = -c, a = 0, f_I = 1 and relu: f = exp(c |Y| t) is the bound itself."""
    Y = disk_of_measure_one_half() if domain == "small disk" else laplace("sphere", "CG1", 1).Y
    c = 2.0 / Y.measure
    net = ResidualNetwork(
        Kernel(given_basis(Y, [1.0]), in_time="shared"),
        bias=Bias(in_time="shared"),
        layers=3,
        final_time=3.0,
        activation="relu",
    )
    net.kernel.set(0, [[-c]])
    monitor = GrowthMonitor(net)
    final = follow_trajectory(net, Y.batch(1 + 0 * Y.weights), monitor, steps=16)
    # Order 6 in steps of 1/16.
    assert_allclose(Y.values(final), np.exp(6.0), rtol=1e-7)
    bound = by_name(monitor)["Gronwall"]
    assert_allclose(bound.observed, bound.values, rtol=1e-7)
    fit = fit_growth(monitor.times, monitor.norms())
    assert fit.is_exponential.all()
    assert_allclose(fit.rate, 2.0, rtol=1e-6)


def test_norms_of_coefficients_that_depend_on_time_are_integrated():
    """a and b linear within layers, against integrals by hand; an upper bound where |b| has a kink."""
    phi = laplace("sphere", "CG1", 1)
    measure = phi.Y.measure
    net = ResidualNetwork(
        Kernel(phi, in_time="linear"), bias=Bias(in_time="linear"), layers=(0.0, 0.5, 2.0), activation="relu"
    )
    for k, (a, beta) in enumerate([(1.0, 0.2), (3.0, 0.6), (2.0, 0.4)]):
        net.bias.set(k, a + np.zeros(phi.Y.nodes))
        net.kernel.set(k, [[beta]])
    monitor = followed(net, steps=2)
    bound = by_name(monitor)["Gronwall"]
    of_a = measure * np.array([0.0, 0.25 * 1.5, 0.5 * 2.0, 1.0 + 0.75 * 2.75, 1.0 + 1.5 * 2.5])
    of_b = np.array([0.0, 0.25 * 0.3, 0.5 * 0.4, 0.2 + 0.75 * 0.55, 0.2 + 1.5 * 0.5]) / measure
    wanted = (bound.observed[0] + of_a[:, None]) * np.exp(measure * of_b)[:, None]
    assert_allclose(bound.values, wanted, rtol=1e-12)
    for k, beta in enumerate([0.5, -0.5, 0.5]):  # |b| has a kink, and trapezoids are above its integral
        net.kernel.set(k, [[beta]])
    above = by_name(followed(net, steps=1))["Gronwall"]
    assert np.log(above.values[-1] / (above.observed[0] + of_a[-1])).min() > 0.25 + 0.5 * 1.5 / 2
    assert not by_name(monitor)["Proposition 3.5"].applies
    assert "bias depends on t" in by_name(monitor)["Proposition 3.5"].unmet[0]


def test_layers_of_different_bases_have_different_norms():
    """The same coefficients, with factors of twice the size in the second layer: sup |b| is twice as large there."""
    phi = laplace("sphere", "CG1", 1)
    twice = Basis(phi.Y, 2 * phi.values, "given")
    net = ResidualNetwork(Kernel([phi, twice], phi), layers=2, final_time=2.0, activation="relu")
    for k in range(2):
        net.kernel.set(k, [[0.1]])
    bound = by_name(followed(net, steps=1))["Gronwall"]
    assert_allclose(np.log(bound.values[1:] / bound.observed[0]), np.array([[0.1], [0.3]]) + 0 * bound.values[1:])


def test_a_run_has_the_norms_of_the_nodal_values_stepped_by_the_same_method():
    net = network(non_negative(), "relu", bias=1.0)
    initial = net.Y.batch(smooth(net.Y))
    along = GrowthMonitor(net)
    follow_trajectory(net, initial, along, solver_parameters=net.solver_parameters)
    at_layers = GrowthMonitor(net).watch(net.run(initial))
    for name in ("L1", "L2"):
        assert_allclose(at_layers.norms(name), along.norms(name), rtol=1e-11)
    for one, other in zip(at_layers.bounds(), along.bounds(), strict=True):
        assert one.unmet == other.unmet
        if one.values is not None:
            assert_allclose(one.values, other.values, rtol=1e-11)


@on_ranks
def test_the_partition_does_not_change_bounds():
    nets = (network(non_negative(), "relu", alone=alone, bias=1.0) for alone in (False, True))
    there, here = (by_name(followed(net, steps=1)) for net in nets)
    for name in there:
        assert there[name].unmet == here[name].unmet
        if there[name].values is not None:
            assert_allclose(there[name].values, here[name].values, rtol=1e-10)


def test_conditions_that_fail_are_flagged():
    swish = sympy.Symbol("s") / (1 + sympy.exp(-sympy.Symbol("s")))
    for activation, beta, name, says in [
        ("relu", np.eye(1), "bounded", "sup |sigma| is infinite for relu"),
        ("relu", -np.eye(1), "Proposition 3.5", "B_s >= 0 fails: the smallest eigenvalue of B_s is -1"),
        ("sigmoid", np.eye(1), "Proposition 3.5", "s sigma(s) >= 0 fails: sigmoid has not the sign of its argument"),
        (Activation.from_sympy(swish), np.eye(1), "Proposition 3.5", "is not non-decreasing"),
    ]:
        bound = by_name(followed(network(beta, activation, final_time=1.0), steps=1))[name]
        assert not bound.applies and says in "; ".join(bound.unmet) and says in str(bound)


# -- fitted exponents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids="-".join)
@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_where_the_symmetric_part_is_nonnegative_the_fitted_power_is_one(name, space):
    """Proposition 3.5: an antisymmetric B rotates u for ever, and the mean of sigma(u) in N(B) adds up in f."""
    beta = random(rank=3) - random(rank=3).T
    fit = fit_growth(*times_and_norms(network(beta, name, space, bias=1.0, final_time=64.0), steps=2))
    assert_allclose(fit.power, 1.0, atol=0.1)
    assert not fit.is_exponential.any()


@pytest.mark.parametrize("space", SPACES, ids="-".join)
def test_where_it_is_negative_the_fitted_growth_of_relu_is_exponential_and_that_of_tanh_linear(space):
    """B = -1 on the span of three functions, the constants among them: the rate is the eigenvalue's, 1."""
    beta = -np.eye(3)
    fit = fit_growth(*times_and_norms(network(beta, "relu", space, bias=1.0, final_time=16.0), steps=2))
    assert fit.is_exponential.all()
    assert_allclose(fit.rate, 1.0, rtol=1e-2)
    fit = fit_growth(*times_and_norms(network(beta, "tanh", space, bias=1.0, final_time=64.0), steps=2))
    assert not fit.is_exponential.any()
    assert_allclose(fit.power, 1.0, atol=0.1)


#: Norms at times from 0 to 8, and how they grow.
CURVES = {
    "3 t": (lambda t: 3 * t + 1e-9, "power"),
    "100 + t": (lambda t: 100 + t, "power"),
    "100 + t^2": (lambda t: 100 + t**2, "power"),
    "50 + sqrt(t)": (lambda t: 50 + t**0.5, "power"),
    "1 + t + t^3": (lambda t: 1 + t + t**3, "power"),
    "1 / t": (lambda t: 1 / (t + 0.1), "power"),
    "e^(t/2)": (lambda t: np.exp(0.5 * t), "exponential"),
    "e^(t/100)": (lambda t: np.exp(0.01 * t), "exponential"),
    "1 + e^t / 100": (lambda t: 1 + 0.01 * np.exp(t), "exponential"),
    "(1 + t) e^(t/2)": (lambda t: (1 + t) * np.exp(0.5 * t), "exponential"),
    "e^-t": (lambda t: np.exp(-t), "exponential"),
    "2": (lambda t: 2 + 0 * t, "not decided"),
    "10^6 + t": (lambda t: 1e6 + t, "not decided"),
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("points", [17, 65])
def test_the_kind_of_growth_is_decided_by_a_margin_or_not(name, points):
    curve, verdict = CURVES[name]
    t = np.linspace(0.0, 8.0, points)
    fit = fit_growth(t, np.column_stack([curve(t), 7.0 * curve(t)]))
    assert fit.verdicts == [verdict] * 2
    assert fit.is_exponential.tolist() == [verdict == "exponential"] * 2
    assert (np.abs(fit.in_favour) >= MARGIN).all() == (verdict != "not decided")


def test_few_or_noisy_norms_decide_nothing():
    t = np.linspace(0.0, 8.0, 9)
    assert fit_growth(t, np.exp(t)[:, None]).verdicts == ["not decided"]
    t = np.linspace(4.0, 8.0, 33)
    noisy = (5 + t) * (1 + 0.02 * np.sin(37 * t))
    assert fit_growth(t, noisy[:, None]).verdicts == ["not decided"]


def test_a_ratio_is_that_of_the_growth_beyond_the_start():
    """f_I is large and f hardly grows: norm over bound is 1 at t = 0 whatever f does."""
    net = network(1e-3 * random(), "tanh", bias=300.0)
    bound = by_name(followed(net, 100.0, steps=1))["bounded"]
    observed, values = bound.observed, bound.values
    assert_allclose(observed[0], values[0])
    assert_allclose(bound.ratio, ((observed[1:] - observed[0]) / (values[1:] - values[0])).max())
    assert 0 < bound.ratio < 0.9
    falling = by_name(followed(network(np.eye(4), "identity"), steps=2))["Proposition 3.5"]
    assert falling.applies and falling.ratio < 0
    still = by_name(followed(network(np.zeros((1, 1)), "relu"), steps=1))["Proposition 3.5"]
    assert still.ratio == 0 and "by up to 0 of what the bound allows" in str(still)


def times_and_norms(net, steps):
    monitor = followed(net, 0.1, steps)
    return monitor.times, monitor.norms()


def test_supremum_of_bounded_activations():
    s = sympy.Symbol("s")
    for activation, wanted in [("tanh", 1.0), ("arctan", np.pi / 2), ("sigmoid", 1.0)]:
        assert_allclose(supremum(get_activation(activation)), wanted, rtol=1e-14)
    # For a function that is not monotone it is an upper bound, by half a spacing times the slope.
    assert 1 <= supremum(Activation.from_sympy(sympy.sin(s))) < 1.01
    with pytest.raises(ValueError, match="activation: expected a bounded activation, got relu"):
        supremum(get_activation("relu"))


def test_what_cannot_be_fitted_or_was_not_measured_is_refused():
    with pytest.raises(ValueError, match=r"norms: expected numbers of shape \(4, samples\)"):
        fit_growth([0.0, 1.0, 2.0, 3.0], np.ones(4))
    with pytest.raises(ValueError, match="norms: expected positive and finite norms at positive times"):
        fit_growth([0.0, 1.0, 2.0, 3.0], np.zeros((4, 1)))
    monitor = GrowthMonitor(network(np.eye(1), "relu"))
    with pytest.raises(ValueError, match="nothing was measured"):
        monitor.bounds()
    with pytest.raises(ValueError, match="name: expected one of 'L1', 'L2', got 'max'"):
        monitor.norms("max")
