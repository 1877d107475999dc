"""Every tool of the theory on every way to hold and step a network: the same as on a plain network, or refused.

Each feature has a twin: the same coefficients, held or stepped as plainly as can be.
"""

from functools import cache

import numpy as np
import pytest
from helpers import flat_network, laplace, smooth
from numpy.testing import assert_allclose

from fem_resnet import (
    Basis,
    Channels,
    EnergyMonitor,
    GrowthMonitor,
    Kernel,
    Layers,
    LinearisedFlow,
    PositiveSemidefinite,
    RepeatedBasis,
    ResidualNetwork,
    autonomous_problem,
    depth_limit,
    duhamel,
    eigen_expansion,
    energy_conditions,
    energy_step_limit,
    find_equilibria,
    find_steady_states,
    frozen_spectra,
    integrated_norms,
    lipschitz_bound,
    observed_decay,
    picard,
    solve_linearised,
    solve_trajectory,
    stability_estimate,
    stability_report,
    stability_verdict,
    to_network,
    weighted_identity,
    well_posedness_constants,
)  # fmt: skip
from fem_resnet.features import FEATURES, TOOLS, features_of

#: They list what there is.
pytestmark = pytest.mark.whole

LAYERS = 2
TIMES = (0.0, 0.6, 1.0)
EULER = {"ts_rk_type": "1fe"}
BETA = np.array([[1.0, 0.3, 0.0], [-0.2, 0.8, 0.1], [0.0, 0.2, 0.6]])
#: Symmetric and positive, as one of the sets of kernels requires.
SYMMETRIC = BETA @ BETA.T


@cache
def basis() -> Basis:
    phi = laplace("disk", "CG1", 4)
    return Basis(phi.Y, phi.values[:, :3], "given")


def bias(Y):
    """Of half the size in each channel that follows."""
    return np.concatenate([basis().values @ [0.3, -0.2, 0.4] / 2**c for c in range(Y.channels)])


def with_channels(repeated, options):
    """Two channels: a basis repeated in each, or the same functions in a basis that knows nothing of channels."""
    Y = Channels(basis().Y, 2)
    phi = RepeatedBasis(Y, basis())
    phi = phi if repeated else Basis(Y, phi.values, "given")
    return made(phi, np.block([[BETA, 0.2 * np.eye(3)], [-0.1 * BETA.T, BETA]]), **options)


def made(phi, beta, **options):
    """A network with a and B that do not depend on t."""
    net = flat_network(phi, **{"times": TIMES, "steps": 2} | options)
    for k in range(len(net.kernel.functions)):
        net.kernel.set(k, beta)
    for k in range(len(net.bias.functions)):
        space = net.bias.space_bases[k]
        net.bias.set(k, bias(net.Y) if space.space is net.Y.V else np.array([0.3, -0.2, 0.4]))
    return net


def with_factors(euler):
    phi = basis()
    net = made(phi, BETA, learn_factors=True, solver_parameters=euler)
    for factor in net.factors:
        factor.set(0, 0.2 * smooth(net.Y, 3, seed=3))
    moved = net.learned_factors()
    plain = ResidualNetwork(Kernel(moved.phi, moved.psi), layers=Layers(TIMES, steps=2), solver_parameters=euler)
    for k in range(LAYERS):
        plain.kernel.set(k, net.kernel.get(k))
        plain.bias.set(k, net.bias.get(k))
    return net, plain


@cache
def plain_network(euler):
    return made(basis(), BETA, **({"solver_parameters": EULER} if euler else {}))


@cache
def numbers(tool, net):
    return list(NUMBERS[tool](net))


def pair(feature, euler):
    """A network with the feature, and its twin without; steps of Euler's method or not."""
    phi, own, plain = basis(), {"solver_parameters": EULER} if euler else {}, plain_network(euler)
    match feature:
        case "channels":
            return with_channels(True, own), with_channels(False, own)
        case "learned_factors":
            return with_factors(own.get("solver_parameters"))
        case "learned_times":
            return made(phi, BETA, learn_times=True, **own), plain
        case "kernel_set":
            return made(phi, SYMMETRIC, kernel_set=PositiveSemidefinite(), **own), made(phi, SYMMETRIC, **own)
        case "nodal_bias":
            return plain, made(phi, BETA, bias=phi, **own)
        case "bases_by_layer":
            # The same functions, rotated in the second layer; statements about an autonomous problem need one basis.
            turn, _ = np.linalg.qr(np.cos(np.arange(9.0)).reshape(3, 3))
            net = made([phi, Basis(phi.Y, phi.values @ turn, "given")], BETA, **own)
            net.kernel.set(1, turn.T @ BETA @ turn)
            return net, plain
        case "linear_in_time":
            return made(phi, BETA, bias_in_time="linear", kernel_in_time="linear", **own), plain
        case "shared_in_time":
            return made(phi, BETA, bias_in_time="shared", kernel_in_time="shared", **own), plain
        case "adapted_steps":
            adapted = {"ts_rk_type": "5dp", "ts_adapt_type": "basic", "ts_rtol": 1e-11, "ts_atol": 1e-11}
            return made(phi, BETA, solver_parameters=adapted), made(
                phi, BETA, steps=25, solver_parameters={"ts_rk_type": "5dp"}
            )
        case "discrete_gradient":
            fine = {"ts_type": "discrete_gradient"}
            return made(phi, BETA, steps=40, solver_parameters=fine), made(phi, BETA, steps=8)
        case "single_precision":
            return made(phi, BETA, precision="single", **own), plain


def of_monitor(monitor):
    watched = monitor.watch(monitor._net.run(monitor._net.Y.batch(smooth(monitor._net.Y, 1))))
    statements = watched.bounds() if isinstance(monitor, GrowthMonitor) else watched.statements()
    return [each.observed.max() for each in statements] + [len(each.unmet) for each in statements]


def start(net, samples=1, seed=0):
    return net.Y.batch(smooth(net.Y, samples, seed=seed))


def in_order(values):
    return np.sort_complex(np.round(np.ravel(values), 9))


def of_flow(net):
    flow = LinearisedFlow(net, start(net))
    M = flow.propagator()
    return [M.norm, M.smallest, flow.bound(), flow.exponent(operator_norm=True), *flow.slope(1)[:4, 0]]


def of_report(net):
    return [
        [l.grows, l.keeps, l.bound, l.condition, l.costate, l.bias_gradient, l.frozen]
        for l in stability_report(net, start(net)).layers
    ]


def of_autonomous(net):
    problem = autonomous_problem(net, at=net.times[-1])
    return [problem.system.values, problem.system.eigenvalues.real, problem.argument(smooth(net.Y, 1))[:3, 0]]


def of_steady_states(net):
    steady = find_steady_states(net, at=net.times[-1])
    return [steady.residual, steady.residuals(start(net, 2)), *([net.Y.values(steady.least_norm)] if steady.exist else [])]


def of_limit(net):
    return depth_limit(net, start(net), halvings=1).errors


def of_verdict(net):
    found = stability_verdict(net, at=net.times[-1])
    return [found.rate, found.rate_bound, len(found.verdict)]


#: The results of each tool for a network, as numbers or lists of arrays.
NUMBERS = {
    "well_posedness_constants": lambda net: [(c := well_posedness_constants(net)).C_1, c.C_2, c.operator, c.drift],
    "integrated_norms": lambda net: integrated_norms(net, "hs"),
    "stability_estimate": lambda net: stability_estimate(net, start(net), start(net, seed=1)).ratios,
    "picard": lambda net: net.Y.values(picard(net, start(net)).final),
    "autonomous_problem": of_autonomous,
    "find_steady_states": of_steady_states,
    "find_equilibria": lambda net: find_equilibria(net, at=net.times[-1]).residuals(start(net, 2)),
    "eigen_expansion": lambda net: net.Y.values(eigen_expansion(net, start(net), at=net.times[-1])(0.7)),
    "stability_verdict": of_verdict,
    "observed_decay": lambda net: observed_decay(net, start(net)).sizes,
    "frozen_spectra": lambda net: [in_order(values) for values in frozen_spectra(net, start(net)).eigenvalues],
    "LinearisedFlow": of_flow,
    "stability_report": of_report,
    "lipschitz_bound": lambda net: [(bound := lipschitz_bound(net)).discrete, bound.continuous, *bound.norms],
    "to_network": lambda net: list(to_network(net)),
    "depth_limit": of_limit,
    "energy_conditions": lambda net: [float(condition.holds) for condition in energy_conditions(net).values()],
    "energy_step_limit": lambda net: [(limit := energy_step_limit(net)).primitive, limit.potential, limit.kappa],
    "EnergyMonitor": lambda net: of_monitor(EnergyMonitor(net)),
    "GrowthMonitor": lambda net: of_monitor(GrowthMonitor(net)),
    "solve_linearised": lambda net: net.Y.values(
        solve_linearised(solve_trajectory(net, start(net), steps=16), start(net, seed=2))
    ),
    "weighted_identity": lambda net: weighted_identity(solve_trajectory(net, start(net), steps=16), start(net, seed=2)).kernel,
}
#: Tools that depend on an autonomous problem, or on the steps themselves.
OF_THE_STEPS = {"energy_step_limit", "depth_limit", "lipschitz_bound"}
OF_ONE_PROBLEM = {"energy_conditions", "EnergyMonitor", "GrowthMonitor", "energy_step_limit", "observed_decay"}
WAYS = [name for name in FEATURES if FEATURES[name].of == "net" and name not in ("no_layers", "gradient_flow")]


@pytest.mark.parametrize("feature", WAYS)
@pytest.mark.parametrize("tool", NUMBERS)
def test_each_tool_says_of_each_way_what_it_says_of_a_plain_one_or_refuses(tool, feature):
    net, plain = pair(feature, tool == "to_network" and feature not in ("adapted_steps", "discrete_gradient"))
    assert feature in features_of(net), features_of(net)
    if feature not in TOOLS[tool]:
        with pytest.raises(ValueError, match=f"^{tool}: it does not take {FEATURES[feature].what}"):
            NUMBERS[tool](net)
        return
    if feature in ("adapted_steps", "discrete_gradient") and tool in OF_THE_STEPS:
        pytest.skip("it is about these very steps; tests of its own have it")
    if tool in OF_ONE_PROBLEM and feature == "bases_by_layer":
        # An autonomous problem has one basis for all times.
        assert "its kernel depends on t" in energy_conditions(net)["a and B do not depend on t"].reason
        return
    tolerance = {"single_precision": 1e-4, "adapted_steps": 1e-7, "discrete_gradient": 1e-3}.get(feature, 1e-9)
    for ours, theirs in zip(numbers(tool, net), numbers(tool, plain), strict=True):
        assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_duhamel_takes_what_has_no_learned_factors():
    for feature in WAYS:
        net, _ = pair(feature, False)
        if feature not in TOOLS["duhamel"]:
            with pytest.raises(ValueError, match=f"^duhamel: it does not take {FEATURES[feature].what}"):
                duhamel(solve_trajectory(net, start(net), steps=16), [])
    assert set(WAYS) - TOOLS["duhamel"] == {"learned_factors"}
