"""Every tool of the theory on a gradient flow f_t = B^T sigma(a - B f): as arrays over all nodes, or refused by name."""

from importlib import import_module
from inspect import signature
from pkgutil import walk_packages

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize
import sympy
from firedrake import COMM_WORLD
from helpers import label_space, laplace, network, smooth
from numpy.testing import assert_allclose
from problems import autonomous_network

import fem_resnet.theory
from fem_resnet import (
    Basis,
    DepthInterpolant,
    EnergyMonitor,
    GrowthMonitor,
    LinearisedFlow,
    LowRankKernel,
    ResidualNetwork,
    Trajectory,
    autonomous_problem,
    depth_limit,
    duhamel,
    eigen_expansion,
    energy_conditions,
    energy_step_limit,
    find_equilibria,
    find_steady_states,
    from_network,
    frozen_spectra,
    integrated_norms,
    lipschitz_bound,
    observed_decay,
    picard,
    point_space,
    solve_linearised,
    stability_estimate,
    stability_report,
    stability_verdict,
    to_network,
    weighted_identity,
    well_posedness_constants,
    width_limit,
)  # fmt: skip
from fem_resnet.features import TOOLS

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])


class Dense:
    """A gradient flow in arrays over all nodes, the same on every rank, made of a, beta, Phi, Psi and w alone."""

    def __init__(self, net):
        self.net, self.sigma = net, net.activation
        self.w = self.everywhere(net.Y.weights)
        self.length = np.diff(net.times)

    def everywhere(self, values):
        return np.concatenate(self.net.Y.comm.allgather(np.asarray(values)))

    def here(self, values):
        """The rows of this rank."""
        start = sum(self.net.Y.comm.allgather(self.net.Y.nodes)[: self.net.Y.comm.rank])
        return values[start : start + self.net.Y.nodes]

    def at(self, layer, s=0.0):
        """a, and B and B^T as matrices on the values at the nodes."""
        part = self.net.layer_inputs()[layer]
        a = self.everywhere(part.bias.coefficients(s))
        phi, psi = (self.everywhere(basis.values) for basis in (part.factors.phi, part.factors.psi))
        b = phi @ part.beta.coefficients(s) @ psi.T
        return a, b * self.w, b.T * self.w

    def size(self, values):
        return np.sqrt(self.w @ values**2)

    def hs(self, B):
        return np.linalg.norm(np.sqrt(self.w)[:, None] * B / np.sqrt(self.w))

    def operator(self, B):
        return np.linalg.norm(np.sqrt(self.w)[:, None] * B / np.sqrt(self.w), 2)

    def solve(self, f):
        """f at the layer times, by SciPy."""
        states = [f]
        for layer, length in enumerate(self.length):
            ends = [self.at(layer, s) for s in (0.0, 1.0)]

            def rate(t, f):
                a, B, BT = (x + t / length * (y - x) for x, y in zip(*ends))
                return (BT @ self.sigma(a[:, None] - B @ f.reshape(states[0].shape))).ravel()

            found = scipy.integrate.solve_ivp(rate, (0, length), states[-1].ravel(), "DOP853", rtol=1e-11, atol=1e-12)
            states.append(found.y[:, -1].reshape(f.shape))
        return states


def alone() -> bool:
    """On several ranks fewer cases suffice, as only the partition differs."""
    return COMM_WORLD.size == 1


def moving(**more):
    """Three layers, phi and psi of different rank, coefficients that change in time."""
    return network(gradient_flow=True, **{"size": 0.6, "kernel_in_time": "linear", "bias_in_time": "linear"} | more)


def still(beta=None, bias=None, *, domain="disk", **more):
    """An autonomous flow with phi and psi of different rank; the bias is in R(B) unless it is given."""
    phi = laplace(domain, "CG1", 4)
    kernel = LowRankKernel(
        phi, Basis(phi.Y, phi.values @ (np.eye(4, 3) + 0.3 * np.sin(np.arange(12.0)).reshape(4, 3)), "given")
    )
    beta = 0.9 * np.eye(4, 3) + 0.2 * np.cos(np.arange(12.0)).reshape(4, 3) if beta is None else beta
    bias = kernel.apply(beta, smooth(phi.Y, 1))[:, 0] if bias is None else bias
    options = {"gradient_flow": True, "layers": 4, "final_time": 2.0, "steps": 4} | more
    return autonomous_network(kernel, beta, bias, **options)


def away(activation="tanh", **more):
    """A flow whose steady states have sigma(u) != 0, as the bias is not in R(B)."""
    Y = label_space("disk", "CG1")
    return still(bias=1 + smooth(Y, 1)[:, 0], activation=activation, **more)


def of_mean_zero(activation, bias):
    """R(B) has only functions of mean zero, so that a u with a positive mean is not negative everywhere."""
    phi = laplace("disk", "CG1", 4)
    mean_zero = Basis(phi.Y, phi.values[:, 1:], "given")
    return autonomous_network(
        LowRankKernel(mean_zero, mean_zero), np.diag([2.0, 1.0, 0.5]), bias, gradient_flow=True, activation=activation
    )


# -- each tool that takes gradient flows -------------------------------------------------------------------------------


def check_constants():
    for activation in ("tanh", "sigmoid"):
        net = moving(activation=activation)
        dense, found = Dense(net), well_posedness_constants(net)
        x, weights = np.polynomial.legendre.leggauss(30)
        L, sigma_0 = {"tanh": (1.0, 0.0), "sigmoid": (0.25, 0.5)}[activation]
        totals = np.zeros(4)
        for layer, length in enumerate(dense.length):
            for s, weight in zip((x + 1) / 2, weights / 2 * length):
                a, B, _ = dense.at(layer, s)
                hs = dense.hs(B)
                totals += weight * np.array([L * hs * dense.size(a), L * hs**2, L * dense.operator(B) ** 2, hs])
        C_0 = sigma_0 * net.Y.measure**0.5
        assert_allclose(
            [found.C_1[-1], found.C_2[-1], found.operator[-1], found.C_0, found.drift[-1]],
            [*totals[:3], C_0, C_0 * totals[3]], rtol=1e-6,
        )  # fmt: skip
        f = smooth(net.Y)
        sizes = np.array([dense.size(state) for state in dense.solve(dense.everywhere(f))])
        assert (sizes <= found.solution_bound(sizes[0]) * (1 + 1e-9)).all()
    # The formula for (2.8), |f_I| + C_0 t + C_1 with the norm of b once, is no bound here: b is large.
    net = still(10 * np.eye(4, 3), 1 + 0 * label_space("disk", "CG1").weights, final_time=0.1, steps=200)
    grown = net.Y.norm(net(net.Y.batch(0 * net.Y.weights)))
    of_2_8 = net.Y.norm(net.Y.batch(net.bias.get(0))) * 0.1
    assert of_2_8 < grown < well_posedness_constants(net).solution_bound(0.0)[-1]


def check_integrated_norms():
    net = moving(kernel_in_time="layers", bias_in_time="layers")
    dense = Dense(net)
    parts = [(dense.hs(B), dense.operator(B), dense.size(a)) for a, B, _ in map(dense.at, range(net.layers))]
    for k, name in enumerate(("hs", "operator", "bias")):
        wanted = [0, *np.cumsum([length * part[k] for length, part in zip(dense.length, parts)])]
        assert_allclose(integrated_norms(net, name), wanted, rtol=1e-10)
    wanted = [0, *np.cumsum([length * part[0] * part[2] for length, part in zip(dense.length, parts)])]
    assert_allclose(integrated_norms(net, "hs", "bias"), wanted, rtol=1e-10)
    assert_allclose(integrated_norms(net), net.times)


def check_stability_estimate():
    net = moving(steps=8)
    dense, pair = Dense(net), [smooth(net.Y, seed=seed) for seed in (3, 4)]
    estimate = stability_estimate(net, *map(net.Y.batch, pair))
    first, second = (dense.solve(dense.everywhere(f)) for f in pair)
    wanted = np.array([dense.size(f - g) for f, g in zip(first, second)])
    assert_allclose(estimate.distances, wanted, rtol=1e-5)
    assert (estimate.distances <= estimate.bounds * (1 + 1e-12)).all() and (estimate.ratios <= 1 + 1e-12).all()
    # In steps that are too long distances grow in the discrete network, but not by more than this.
    net = moving(size=3.0)
    estimate = stability_estimate(net, *map(net.Y.batch, pair))
    assert (estimate.distances[-1] > estimate.distances[0]).any()
    assert (estimate.ratios <= 1 + 1e-12).all()


def check_picard():
    for activation in ("tanh", "softplus") if alone() else ("softplus",):
        net = moving(activation=activation, size=0.25 if alone() else 0.15)
        dense, f = Dense(net), smooth(net.Y)
        exact = dense.here(dense.solve(dense.everywhere(f))[-1])
        for split in (True, False) if alone() else (True,):
            solution = picard(net, net.Y.batch(f), split=split)
            assert solution.converged
            assert_allclose(net.Y.values(solution.final), exact, atol=1e-8)
            assert_allclose(sum(piece.C_2 for piece in solution.pieces), well_posedness_constants(net).C_2[-1], rtol=1e-9)
            for piece in solution.pieces:
                assert (piece.increments <= piece.bounds + 1e-14 * piece.increments[0]).all()
                assert (piece.largest <= piece.uniform_bound).all()


def check_autonomous_problem():
    net = still()
    problem, dense = autonomous_problem(net), Dense(net)
    a, B, BT = dense.at(0)
    f = smooth(net.Y)
    u = a[:, None] - B @ dense.everywhere(f)
    assert problem.gradient_flow
    assert_allclose(problem.rate(problem.argument(f)), dense.here(BT @ np.tanh(u)), atol=1e-11)
    assert_allclose(problem.generator.apply(f), dense.here(B @ BT @ dense.everywhere(f)), atol=1e-10)
    assert_allclose(
        np.sort(problem.generator.eigenvalues.real)[::-1], np.sort(np.linalg.eigvals(B @ BT).real)[::-1][:3], rtol=1e-9
    )
    assert_allclose(problem.generator.whole, problem.generator.whole.T)


def check_steady_states():
    net = still()
    steady, dense = find_steady_states(net), Dense(net)
    a, B, BT = dense.at(0)
    assert steady.exist and steady.minimiser is None
    # a in R(B): as for (2.8).
    assert_allclose(
        dense.everywhere(net.Y.values(steady.least_norm))[:, 0],
        np.linalg.pinv(B * dense.w**-0.5, 1e-9) @ a * dense.w**-0.5,
        atol=1e-8,
    )
    for activation in ("tanh", "leaky_relu", "arctan", "elu") if alone() else ("tanh",):
        net = away(activation)
        steady, dense = find_steady_states(net), Dense(net)
        a, B, BT = dense.at(0)
        f = smooth(net.Y, 2, seed=5)
        near = dense.everywhere(net.Y.values(steady.nearest(net.Y.batch(f))))
        u = a[:, None] - B @ near
        assert steady.exist and steady.minimiser is not None
        assert dense.size(net.activation(u)).min() > 0.1, "sigma(u) is to be something else than 0"
        assert np.abs(BT @ net.activation(u)).max() < 1e-8
        # At right angles to N(B), in which steady states are free.
        inside = np.linalg.pinv(B * dense.w**-0.5, 1e-9) @ B @ (near - dense.everywhere(f)) * dense.w[:, None] ** -0.5
        assert_allclose(near - dense.everywhere(f), inside, atol=1e-7)
        assert steady.contain(steady.nearest(net.Y.batch(f))).all() and not steady.contain(net.Y.batch(f)).any()
        # SciPy's minimum of the convex integral.
        U = np.linalg.svd(B, full_matrices=False)[0][:, :3]
        least = scipy.optimize.minimize(
            lambda x: dense.w @ net.activation.primitive(a - U @ x), np.zeros(3), options={"gtol": 1e-9}
        )
        assert_allclose(a - U @ least.x, u[:, 0], atol=1e-4)
        if not alone():
            continue
        final = away(activation, final_time=100.0, layers=10, steps=40)
        assert steady.residuals(final(net.Y.batch(f))).max() < 1e-2 * steady.residuals(net.Y.batch(f)).min()


def check_equilibria():
    net = away()
    found, dense, steady = find_equilibria(net), Dense(net), find_steady_states(net)
    a, B, BT = dense.at(0)
    f = net.Y.batch(smooth(net.Y, 2))
    (equilibrium,) = found.found_from(f)
    u = dense.everywhere(net.Y.values(equilibrium.u))[:, 0]
    assert_allclose(u, dense.everywhere(steady.rest)[:, 0], atol=1e-7)
    assert equilibrium.speed < 1e-7 < 0.1 < dense.size(np.tanh(u))
    exact = np.sort(np.linalg.eigvals(-B @ BT @ np.diag(1 - np.tanh(u) ** 2)).real)[:3]
    assert_allclose(np.sort(equilibrium.eigenvalues.real), exact, rtol=1e-7)
    assert found.lemma_applies and found.codimension == 3
    near = found.nearest(f)
    assert found.contain(near).all()
    assert np.abs(BT @ np.tanh(dense.everywhere(net.Y.values(near)))).max() < 1e-7
    velocity = dense.here(BT @ np.tanh(a[:, None] - B @ dense.everywhere(net.Y.values(f))))
    assert_allclose(net.Y.values(found.velocity(f)), velocity, atol=1e-10)


def linearised(dense, u):
    """The matrix of w_t = -B^T sigma'(u) B w, on the values at the nodes."""
    _, B, BT = dense.at(0)
    return -BT @ (dense.sigma.derivative(u)[:, None] * B)


def check_eigen_expansion():
    for net in (still(), away()):
        dense, steady = Dense(net), find_steady_states(net)
        f_inf = dense.everywhere(net.Y.values(steady.least_norm))[:, 0]
        a, B, _ = dense.at(0)
        w = smooth(net.Y, 2)
        expansion = eigen_expansion(net, net.Y.batch(w))
        A = linearised(dense, a - B @ f_inf)
        for t in (0.0, 0.3, 2.0):
            assert_allclose(net.Y.values(expansion(t)), dense.here(scipy.linalg.expm(t * A) @ dense.everywhere(w)), atol=1e-8)


def check_observed_decay():
    for net in (still(final_time=30.0, layers=40, steps=8), away(final_time=60.0, layers=40, steps=16)):
        dense, steady = Dense(net), find_steady_states(net)
        f_inf = net.Y.values(steady.least_norm)
        a, B, _ = dense.at(0)
        exact = np.sort(-np.linalg.eigvals(linearised(dense, a - B @ dense.everywhere(f_inf)[:, 0])).real)[-3]
        start = net.Y.batch(f_inf + 1e-2 * smooth(net.Y, 2))
        decay = observed_decay(net, start)
        assert_allclose(decay.predicted, exact, rtol=1e-7)
        assert_allclose(decay.rates, exact, rtol=2e-2)


def check_stability_verdict():
    # (2.8) with this kernel is unstable, the gradient flow decays.
    phi = laplace("disk", "CG1", 4)
    beta = -np.eye(4)
    flows = [
        autonomous_network(LowRankKernel(phi, phi), beta, gradient_flow=flow, layers=4, final_time=4.0, steps=4)
        for flow in (False, True)
    ]
    assert [stability_verdict(net).verdict for net in flows] == ["unstable", "asymptotically stable"]
    f = phi.Y.batch(0.1 * phi.values[:, 1:2])
    assert phi.Y.norm(flows[0](f)) > 1 and phi.Y.norm(flows[1](f)) < 1e-2
    for net in (still(), away()):
        stability, dense = stability_verdict(net), Dense(net)
        a, B, _ = dense.at(0)
        u = a - B @ dense.everywhere(net.Y.values(stability.steady.least_norm))[:, 0]
        exact = np.sort(-np.linalg.eigvals(linearised(dense, u)).real)[-3]
        assert stability.verdict == "asymptotically stable", stability
        assert_allclose(stability.rate, exact, rtol=1e-7)
        assert 0 < stability.rate_bound <= stability.rate * (1 + 1e-9)
    assert stability_verdict(still(activation="leaky_relu")).verdict == "stable"
    relu = stability_verdict(still(activation="relu"))
    assert relu.verdict == "stable" and "two solutions never move apart" in relu.reason
    # u = 1, where relu has a slope of 1.
    relu = stability_verdict(of_mean_zero("relu", 1.0))
    assert relu.verdict == "asymptotically stable" and abs(relu.rate - 0.25) < 1e-10
    # The constants are in R(B), and int Sigma(u) of sigmoid falls for ever.
    nowhere = stability_verdict(still(activation="sigmoid"))
    assert nowhere.verdict == "not decided" and "has no minimum that was found" in nowhere.reason


def check_frozen_spectra():
    net = moving()
    dense, f = Dense(net), smooth(net.Y, 2)
    found = frozen_spectra(net, net.Y.batch(f))
    run = net.run(net.Y.batch(f))
    for number in range(4):
        a, B, BT = dense.at(min(number, 2), 0.0 if number < 3 else 1.0)
        state = dense.everywhere(net.Y.values(run.state(number)))
        for k in range(2):
            slope = dense.sigma.derivative(a - B @ state[:, k])
            exact = np.sort(np.linalg.eigvals(-BT @ (slope[:, None] * B)).real)[:4]
            assert_allclose(np.sort(found.eigenvalues[number][k].real), exact, atol=1e-9)
    assert found.growth.max() == 0


def check_linearised_flow():
    net = moving(steps=4, size=1.5)
    dense, f, w = Dense(net), smooth(net.Y, 1), smooth(net.Y, 1, seed=9)
    flow = LinearisedFlow(net, net.Y.batch(f))
    small = 1e-5
    ahead, behind = (net.Y.values(net(net.Y.batch(f + sign * small * w))) for sign in (1, -1))
    assert_allclose(net.Y.values(flow.tangent(net.Y.batch(w))), (ahead - behind) / 2 / small, atol=1e-8)
    for layer in range(3):
        a, B, BT = dense.at(layer)
        slope = dense.sigma.derivative(a - B @ dense.everywhere(flow.states[layer])[:, 0])
        assert_allclose(flow.slope(layer)[:, 0], dense.here(slope), atol=1e-11)
        exact = np.sort(np.linalg.eigvals(-BT @ (slope[:, None] * B)).real)[:4]
        assert_allclose(np.sort(flow.frozen_eigenvalues(layer).real), exact, atol=1e-9)
        s = np.linspace(0, 1, 2001)
        norms = [dense.hs(dense.at(layer, each)[1]) ** 2 for each in s[::100]]
        exponent = dense.length[layer] * np.trapezoid(norms, dx=0.05)
        assert_allclose(flow.exponent(layer, layer + 1), exponent, rtol=1e-2)
        assert flow.propagator(layer, layer + 1).norm <= flow.bound(layer, layer + 1)
        assert flow.bound(layer, layer + 1, operator_norm=True) <= flow.bound(layer, layer + 1)


def check_stability_report():
    # Steps that are too long: a layer makes perturbations larger than exp(int sup |sigma'| norm(b) dt), the bound of (2.8).
    phi = laplace("disk", "CG1", 4)
    net = autonomous_network(
        LowRankKernel(phi, phi), 3.0 * np.eye(4), gradient_flow=True, activation="identity", layers=3, final_time=1.5
    )
    report = stability_report(net, net.Y.batch(0.01 * smooth(net.Y, 1)))
    for layer in report.layers:
        assert np.exp(0.5 * 3.0) < layer.grows <= layer.bound
        assert layer.frozen <= 0 and layer.wanted_steps > 1
    # In short steps nothing grows, and the report does not say that it does.
    net = moving(steps=16)
    report = stability_report(net, net.Y.batch(smooth(net.Y, 2)))
    assert all(layer.grows <= 1 + 1e-9 and layer.verdict in ("damps", "neutral") for layer in report.layers)
    # The derivative of <r(T), f(T)> in the bias of a layer, by differences of the network over a short layer.
    net = moving(times=(0.0, 0.5, 0.501, 1.0), steps=8, bias_in_time="layers", kernel_in_time="layers")
    Y, f, r = net.Y, smooth(net.Y, 1), smooth(net.Y, 1, seed=2)
    report = stability_report(net, Y.batch(f), terminal=Y.batch(r))
    flow = LinearisedFlow(net, Y.batch(f))
    pulled = Y.values(flow.adjoint(Y.batch(r), 1))
    gradient = flow.by_bias(1, pulled)
    assert_allclose(report.layers[1].bias_gradient, Y.norm(Y.batch(gradient)) / Y.norm(Y.batch(r)), rtol=1e-9)
    a, along = net.bias.get(1).copy(), smooth(Y, 1, seed=7)[:, 0]
    values = []
    for sign in (1, -1):
        net.bias.set(1, a + sign * 1e-3 * along)
        values.append(float(Y.sum(Y.weights @ (r * Y.values(net(Y.batch(f))))[:, 0])))
    wanted = (values[0] - values[1]) / 2e-3 / 1e-3
    assert_allclose(float(Y.sum(Y.weights @ (gradient[:, 0] * along))), wanted, rtol=1e-2)


def check_lipschitz_bound():
    for size in (0.4, 2.0):
        net = moving(size=size)
        bound, dense = lipschitz_bound(net), Dense(net)
        ends = [max(dense.operator(dense.at(layer, s)[1]) for s in (0.0, 1.0)) for layer in range(3)]
        assert_allclose(bound.norms, ends, rtol=1e-9)
        f, g = smooth(net.Y), smooth(net.Y, seed=8)
        apart = [net.Y.values(net(net.Y.batch(each))) for each in (f, g)]
        grown = dense.size(dense.everywhere(apart[0] - apart[1])) / dense.size(dense.everywhere(f - g))
        assert (grown <= bound.discrete * (1 + 1e-12)).all() and bound.continuous == 1.0


def check_width_limit():
    spaces = [label_space("disk", "DG0", n) for n in (1, 2, 3)]
    phi = laplace("disk", "DG0", 4)
    net = ResidualNetwork(phi, bias=phi, layers=1, gradient_flow=True)
    net.kernel.set(0, np.eye(4))
    found = width_limit(net, lambda y: np.cos(2 * y[:, 0]), spaces)
    moved = [net.on(Y) for Y in spaces]
    moments = []
    for other in moved:
        final = Dense(other).solve(Dense(other).everywhere(np.cos(2 * other.Y.coordinates[:, :1])))[-1]
        moments.append(other.bases["phi"][0].project(Dense(other).here(final)))
    assert_allclose(found.errors, [np.linalg.norm(m - moments[-1]) for m in moments[:-1]], rtol=3e-2)
    assert found.errors[1] < found.errors[0]
    with pytest.raises(ValueError, match="it does not take the gradient flow"):
        width_limit(net, lambda y: np.cos(y[:, 0]), spaces, terminal=lambda y: np.cos(y[:, 0]))


RIGHT = {
    "well_posedness_constants": check_constants,
    "integrated_norms": check_integrated_norms,
    "stability_estimate": check_stability_estimate,
    "picard": check_picard,
    "autonomous_problem": check_autonomous_problem,
    "find_steady_states": check_steady_states,
    "find_equilibria": check_equilibria,
    "eigen_expansion": check_eigen_expansion,
    "observed_decay": check_observed_decay,
    "stability_verdict": check_stability_verdict,
    "frozen_spectra": check_frozen_spectra,
    "LinearisedFlow": check_linearised_flow,
    "stability_report": check_stability_report,
    "lipschitz_bound": check_lipschitz_bound,
    "width_limit": check_width_limit,
}
REFUSED = {
    "to_network": to_network,
    "depth_limit": lambda net: depth_limit(net, net.Y.batch(0 * net.Y.weights)),
    "DepthInterpolant": lambda net: DepthInterpolant(net, net.Y.batch(0 * net.Y.weights)),
    "energy_conditions": energy_conditions,
    "energy_step_limit": energy_step_limit,
    "EnergyMonitor": EnergyMonitor,
    "GrowthMonitor": GrowthMonitor,
    "solve_linearised": lambda net: solve_linearised(Trajectory(net, None, None, 1, []), None),
    "duhamel": lambda net: duhamel(Trajectory(net, None, None, 1, []), []),
    "weighted_identity": lambda net: weighted_identity(Trajectory(net, None, None, 1, []), None),
}


def tools_of_the_theory() -> dict[str, object]:
    """The public names of the theory whose first argument is a network or a solution of one."""
    found = walk_packages(fem_resnet.theory.__path__, "fem_resnet.theory.")
    modules = [import_module(module.name) for module in found if not module.ispkg]
    public = {name: getattr(module, name) for module in modules for name in module.__all__}
    return {
        name: thing for name, thing in public.items()
        if callable(thing) and next(iter(signature(thing).parameters), None) in ("net", "trajectory", "run")
    }  # fmt: skip


#: Parts of tools. The tool has checked the network, so that they have no declaration of their own.
INSIDE = {"problem_at_start", "frozen_eigenvalues", "scheme_of", "lipschitz_constant", "drift_constant", "StepMonitor"}


def test_every_tool_is_in_one_of_both_tables_as_it_declares():
    tools = set(tools_of_the_theory()) - INSIDE
    assert tools == set(RIGHT) | set(REFUSED) and not set(RIGHT) & set(REFUSED)
    assert {name for name in tools if "gradient_flow" in TOOLS[name]} == set(RIGHT)


@pytest.mark.parametrize("name", RIGHT)
def test_what_takes_gradient_flows_is_right(name):
    RIGHT[name]()


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("name", ["picard", "find_steady_states", "find_equilibria", "stability_verdict", "frozen_spectra"])
def test_what_takes_gradient_flows_is_right_on_several_ranks(name):
    RIGHT[name]()


@on_two_ranks
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_is_refused_by_name(name):
    net = moving(solver_parameters={"ts_rk_type": "1fe"}, kernel_in_time="shared", bias_in_time="shared")
    with pytest.raises(ValueError, match=rf"^{name}: it does not take the gradient flow f_t = B\^T sigma\(a - B f\); make"):
        REFUSED[name](net)


@on_two_ranks
def test_arrays_of_a_residual_network_make_no_gradient_flow():
    Y = point_space([0.2, 0.5, 0.3])
    with pytest.raises(ValueError, match=r"^gradient_flow: expected False, as the layers of \(2.1\)"):
        from_network(np.zeros(3), np.eye(3), np.ones(3), Y, gradient_flow=True)


@on_two_ranks
def test_steady_states_of_gradient_flows_say_what_they_do_not_know():
    steady = find_steady_states(of_mean_zero("relu", 1.0))
    assert steady.exist and steady.minimiser is not None
    with pytest.raises(ValueError, match=r"^nearest: the nearest steady state is not known, as relu is constant somewhere"):
        steady.least_norm
    with pytest.raises(ValueError, match=r"^net: expected a non-decreasing sigma for a gradient flow"):
        find_steady_states(still(activation=sympy.sin(sympy.Symbol("s"))))
    # Functions of mean zero: int Sigma(u) of sigmoid has a minimum, where sigma(u) is not 0.
    phi = laplace("disk", "CG1", 4)
    net = of_mean_zero("sigmoid", 0.3 + phi.values[:, 1])
    steady, dense = find_steady_states(net), Dense(net)
    a, B, BT = dense.at(0)
    assert steady.exist
    assert np.abs(BT @ dense.sigma(a - B @ dense.everywhere(net.Y.values(steady.least_norm))[:, 0])).max() < 1e-9
    with pytest.raises(ValueError, match="^net: there is no steady state: int Sigma"):
        eigen_expansion(still(activation="softplus"), phi.Y.batch(smooth(phi.Y, 1)))
