"""Steady states of (3.2a) and equilibria of u_t = -B sigma(u), on a disk, an annulus and a sphere, none of measure 1."""

import numpy as np
import pytest
import scipy.optimize
import sympy
from helpers import label_space, laplace, smooth
from numpy.testing import assert_allclose
from problems import ROUND_DOMAINS, autonomous_network, gathered, polynomials

from fem_resnet import (
    ACTIVATIONS,
    Activation,
    Basis,
    Bias,
    Kernel,
    LowRankKernel,
    ResidualNetwork,
    autonomous_problem,
    eigen_expansion,
    find_equilibria,
    find_steady_states,
    zero_set,
)  # fmt: skip
from fem_resnet.label_domain.points import class_space

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])
each_domain = pytest.mark.parametrize("domain", ROUND_DOMAINS)

s = sympy.Symbol("s")


def eigenfunctions(domain) -> Basis:
    """Some Laplace eigenfunctions, the constant first; no repeated eigenvalue is cut."""
    return laplace(domain, "CG1", 5 if domain == "annulus" else 4)


def kernel_on(domain) -> LowRankKernel:
    """phi and psi that differ in rank, psi not orthonormal."""
    return LowRankKernel(eigenfunctions(domain), polynomials(label_space(domain, "CG1")))


def dense(kernel, beta):
    """Matrix of B on all nodes, in an orthonormal basis of the label measure, and the roots of the weights."""
    Y = kernel.phi.Y
    root = np.sqrt(gathered(Y, Y.weights[:, None]))
    return root * gathered(Y, kernel.phi.values) @ beta @ gathered(Y, kernel.psi.values).T * root.T, root


# -- where sigma vanishes --------------------------------------------------------------------------------------------


@on_two_ranks
def test_where_activations_vanish():
    """By (A1) of 3.2 sigma vanishes at 0 only, or on an interval around it; sigmoid and softplus vanish nowhere."""
    at_zero = ("tanh", "arctan", "elu", "leaky_relu", "identity")
    expected = dict.fromkeys(at_zero, (0.0, 0.0)) | {"relu": (-np.inf, 0.0), "sigmoid": None, "softplus": None}
    assert {name: zero_set(sigma) for name, sigma in ACTIVATIONS.items()} == expected
    assert zero_set(Activation.from_sympy(sympy.exp(-(s**2)))) is None
    assert zero_set(Activation.from_sympy(s / (1 + sympy.exp(-s)))) == (0.0, 0.0)
    assert_allclose(zero_set(Activation.from_sympy(sympy.tanh(s - sympy.Rational(7, 3)))), (7 / 3, 7 / 3), rtol=1e-12)
    soft = Activation.from_sympy(sympy.Max(s - 1, 0) + sympy.Min(s + 2, 0))
    assert_allclose(zero_set(soft), (-2.0, 1.0), rtol=1e-12)
    with pytest.raises(ValueError, match=r"^activation: expected an activation .*; sin\(s\) vanishes at several places"):
        zero_set(Activation.from_sympy(sympy.sin(s)))


@on_two_ranks
def test_what_of_the_assumptions_on_sigma_does_not_hold_is_named():
    """(A1) of 3.2; (A2) of 3.2 holds for every network, which has finite values at finitely many nodes."""
    kernel = kernel_on("disk")
    unmet = {
        name: autonomous_problem(autonomous_network(kernel, np.ones((4, 3)), activation=name)).unmet for name in ACTIVATIONS
    }
    assert {name for name, what in unmet.items() if not what} == {"tanh", "arctan", "elu", "identity"}
    assert unmet["relu"] == unmet["leaky_relu"] == ("sigma'(0) > 0",)
    assert unmet["sigmoid"] == unmet["softplus"] == ("s sigma(s) >= 0", "sigma(0) = 0")


# -- steady states ---------------------------------------------------------------------------------------------------


@on_ranks
@each_domain
def test_steady_states_are_those_of_the_dense_equation(domain, rng):
    """3.2: B f = a has solutions if and only if a is in R(B); then f_inf + N(B), f_inf of least norm."""
    kernel = kernel_on(domain)
    beta, Y = rng.normal(size=kernel.shape), kernel.phi.Y
    f = smooth(Y, 4)
    net = autonomous_network(kernel, beta, kernel.apply(beta, f)[:, 0], activation="tanh")
    steady = find_steady_states(net)
    assert steady.exist and steady.residual < 1e-12 and "a is in R(B)" in steady.reason
    B, root = dense(kernel, beta)
    a = root[:, 0] * gathered(Y, net.bias.get(0)[:, None])[:, 0]
    exact = np.linalg.pinv(B, rcond=1e-10) @ a
    found = root[:, 0] * gathered(Y, Y.values(steady.least_norm))[:, 0]
    assert_allclose(found, exact, atol=1e-9 * np.linalg.norm(exact))
    assert steady.null_space_dimension == Y.size - np.linalg.matrix_rank(B, 1e-8)
    # a = B f_1, so that f_1 is steady. Other f are not, and their distance is the norm of their part outside of N(B).
    batch = Y.batch(f)
    assert steady.contain(batch).tolist() == [True, False, False, False]
    apart = root * gathered(Y, f) - exact[:, None]
    outside_null_space = np.linalg.pinv(B, rcond=1e-10) @ B @ apart
    assert_allclose(steady.distance(batch), np.linalg.norm(outside_null_space, axis=0), atol=1e-8)
    assert steady.contain(steady.nearest(batch)).all()


@on_ranks
@each_domain
def test_a_network_at_a_steady_state_stays_there(domain, rng):
    kernel = kernel_on(domain)
    beta, Y = 0.2 * rng.normal(size=kernel.shape), kernel.phi.Y
    net = autonomous_network(kernel, beta, kernel.apply(beta, smooth(Y, 1))[:, 0], layers=3, final_time=5.0)
    start = find_steady_states(net).nearest(Y.batch(smooth(Y, 2, seed=7)))
    # Round-off in u, times the growth of unstable modes.
    assert_allclose(Y.values(net(start)), Y.values(start), atol=1e-8)


@on_ranks
@each_domain
def test_outside_of_the_range_there_is_no_steady_state(domain):
    """The residual is the part of a outside R(B); steady states exist if and only if it is zero."""
    phi = eigenfunctions(domain)
    beta = np.diag([2.0, 1.0] + [0.0] * (phi.rank - 2))
    kernel = LowRankKernel(phi, phi)
    net = autonomous_network(kernel, beta, phi.values @ np.array([3.0, 0.0, 4.0] + [0.0] * (phi.rank - 3)))
    steady = find_steady_states(net)
    assert not steady.exist
    assert_allclose(steady.residual, 4 / 5)
    assert "a is not in R(B): 0.8 of |a|" in steady.reason
    for verb in (lambda: steady.nearest(net.Y.batch(smooth(net.Y, 1))), lambda: steady.least_norm):
        with pytest.raises(ValueError, match=r"^nearest: there is no steady state: a is not in R\(B\)"):
            verb()
    assert find_steady_states(net, tolerance=0.81).exist


@on_two_ranks
def test_what_is_no_batch_of_the_label_domain_is_refused():
    net = autonomous_network(kernel_on("disk"), np.ones((4, 3)))
    steady, set_of_u, other = find_steady_states(net), find_equilibria(net), label_space("sphere", "CG1")
    for verb, name in (
        (steady.residuals, "f"), (steady.nearest, "f"), (set_of_u.residuals, "u"), (set_of_u.nearest, "u"),
        (set_of_u.describe, "u"), (set_of_u.found_from, "f"), (set_of_u.velocity, "f"),
        (lambda w: eigen_expansion(net, w), "perturbation"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: expected a Function on the mesh "):
            verb(other.batch(smooth(other, 1)))


@on_ranks
@pytest.mark.parametrize("name", ["sigmoid", "softplus"])
def test_activations_that_vanish_nowhere_have_no_steady_states(name):
    net = autonomous_network(kernel_on("disk"), np.ones((4, 3)), 0.0, activation=name)
    steady = find_steady_states(net)
    assert not steady.exist and steady.zeros is None and steady.reason == f"{name} vanishes nowhere"
    assert not steady.contain(net.Y.batch(smooth(net.Y, 2))).any()


@on_two_ranks
def test_an_activation_that_vanishes_elsewhere_shifts_the_bias():
    phi = eigenfunctions("disk")
    shifted = Activation.from_sympy(sympy.tanh(s - 2))
    net = autonomous_network(LowRankKernel(phi, phi), np.diag([2.0, 1.0, 1.0, 0.0]), 2 + phi.values[:, 1], activation=shifted)
    steady = find_steady_states(net)
    assert steady.exist
    assert_allclose(net.Y.values(steady.least_norm), phi.values[:, 1:2], atol=1e-9)


@on_ranks
@each_domain
def test_steady_states_of_relu_are_where_B_f_is_at_least_a(domain, rng):
    """3.2 for relu: the convex set B f >= a; the point nearest to f against a general solver on all nodes."""
    kernel = kernel_on(domain)
    Y, beta = kernel.phi.Y, rng.normal(size=kernel.shape)
    psi = kernel.psi
    member = psi.values @ np.array([0.5, 1.0, -0.7])
    bias = kernel.apply(beta, member[:, None])[:, 0] - 0.3 * (1 + smooth(Y, 1)[:, 0])
    net = autonomous_network(kernel, beta, bias, activation="relu")
    steady = find_steady_states(net)
    assert steady.exist and steady.zeros == (-np.inf, 0.0)
    starts = smooth(Y, 2, seed=5)
    assert steady.contain(Y.batch(np.column_stack([member, member + starts[:, 0]]))).tolist()[0]
    nearest = Y.values(steady.nearest(Y.batch(starts)))
    assert steady.contain(Y.batch(nearest)).all()
    # The same problem in the three coefficients (psi, f), with a constraint at every node.
    phi_all, a_all = gathered(Y, kernel.phi.values), gathered(Y, bias[:, None])[:, 0]
    root = np.linalg.cholesky(psi.gram)
    for k in range(2):
        g = psi.project(starts[:, k : k + 1])[:, 0]
        seen = np.linalg.solve(root, g)
        result = scipy.optimize.minimize(
            lambda c: np.sum((c - seen) ** 2) / 2, seen, jac=lambda c: c - seen, method="SLSQP",
            constraints={
                "type": "ineq", "fun": lambda c: phi_all @ beta @ root @ c - a_all, "jac": lambda c: phi_all @ beta @ root,
            },
            options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        found = np.linalg.solve(root, psi.project(nearest[:, k : k + 1])[:, 0])
        assert_allclose(found, result.x, atol=1e-5)  # what SLSQP finds
        assert np.linalg.norm(found - seen) > 1e-2
    assert_allclose(steady.distance(Y.batch(starts)), autonomous_problem(net).norms(nearest - starts))
    least = Y.norm(steady.least_norm)
    assert least <= Y.norm(Y.batch(member)) * (1 + 1e-8)


@on_ranks
@each_domain
def test_relu_has_no_steady_state_where_B_f_cannot_reach_a(domain):
    """Functions of mean zero do not reach a = 1; the nearest of them is 0."""
    phi = eigenfunctions(domain)
    beta = np.diag([0.0] + [1.0] * (phi.rank - 1))
    steady = find_steady_states(autonomous_network(LowRankKernel(phi, phi), beta, 1.0, activation="relu"))
    assert not steady.exist
    assert_allclose(steady.residual, 1.0, rtol=1e-9)
    assert "outside" in steady.reason
    below = find_steady_states(autonomous_network(LowRankKernel(phi, phi), beta, -1.0, activation="relu"))
    assert below.exist and phi.Y.norm(below.least_norm) == 0


@on_two_ranks
@pytest.mark.parametrize("seed", [0, 26, 34, 42])
def test_the_nearest_steady_state_is_found_where_there_is_no_other(seed):
    """u is at an end of [-2, 1], where sigma vanishes, at every node: the set has no interior."""
    phi, rng = eigenfunctions("disk"), np.random.default_rng(seed)
    dead_zone = Activation.from_sympy(sympy.Max(s - 1, 0) + sympy.Min(s + 2, 0))
    kernel = LowRankKernel(phi, phi)
    beta = rng.normal(size=kernel.shape) * 10.0 ** rng.uniform(-3, 3, size=(1, 4))
    member = smooth(phi.Y, 1, seed=seed)
    # The end differs from node to node, so that no direction in R(B) leads inside.
    ends = np.where(np.sin(1e3 * phi.Y.coordinates @ [1.0, 0.7] + seed) > 0, 1.0, -2.0)
    net = autonomous_network(kernel, beta, kernel.apply(beta, member)[:, 0] + ends, activation=dead_zone)
    steady, starts = find_steady_states(net), phi.Y.batch(100 * smooth(phi.Y, 2, seed=seed + 1))
    assert steady.exist
    nearest = steady.nearest(starts)
    assert steady.contain(nearest).all()
    # All steady states have the same B f as the one that defines the bias.
    B_f = [kernel.apply(beta, f) for f in (phi.Y.values(nearest), member)]
    assert_allclose(*np.broadcast_arrays(*B_f), atol=1e-7 * np.linalg.norm(beta, 2))


@pytest.mark.slow
def test_the_nearest_steady_state_is_found_wherever_there_is_one():
    """Random feasible problems: with a large, a small and no interior; badly scaled kernels; starts near and far."""
    phi = eigenfunctions("disk")
    dead_zone = Activation.from_sympy(sympy.Max(s - 1, 0) + sympy.Min(s + 2, 0))
    for seed in range(300):
        rng = np.random.default_rng(seed)
        kernel = LowRankKernel(phi, polynomials(phi.Y) if seed % 2 else phi)
        beta = rng.normal(size=kernel.shape) * 10.0 ** rng.uniform(-3, 3, size=(1, kernel.shape[1]))
        B_f = kernel.apply(beta, smooth(phi.Y, 1, seed=seed) * 10 ** rng.uniform(-2, 2))[:, 0]
        if rng.random() < 0.5:
            room = rng.choice([0.0, 1e-10, 1e-6, 0.3]) * np.abs(B_f).max()
            activation, bias = "relu", B_f - room * rng.uniform(size=phi.Y.nodes)
        else:
            inside = rng.choice([-2.0, 1.0], phi.Y.nodes) if rng.random() < 0.3 else rng.uniform(-2, 1, phi.Y.nodes)
            activation, bias = dead_zone, B_f + inside
        steady = find_steady_states(autonomous_network(kernel, beta, bias, activation=activation))
        starts = phi.Y.batch(smooth(phi.Y, 2, seed=seed + 1) * 10.0 ** rng.uniform(-3, 3))
        assert steady.exist and steady.contain(steady.nearest(starts)).all(), seed


@on_two_ranks
def test_without_a_kernel_only_a_zero_bias_stands_still():
    phi = eigenfunctions("disk")
    kernel, zero = LowRankKernel(phi, phi), np.zeros((4, 4))
    assert find_steady_states(autonomous_network(kernel, zero, 0.0)).exist
    assert not find_steady_states(autonomous_network(kernel, zero, 0.1)).exist
    assert find_steady_states(autonomous_network(kernel, zero, -0.1, activation="relu")).exist


@on_ranks
def test_a_network_that_depends_on_time_is_read_at_a_time():
    """Remark 3.1: with the limits of a and b in place of a and b."""
    phi = eigenfunctions("disk")
    net = ResidualNetwork(Kernel(phi, in_time="linear"), bias=Bias(in_time="shared"), layers=2, final_time=2.0)
    for k, size in enumerate((1.0, 2.0, 4.0)):
        net.kernel.set(k, size * np.eye(4))
    net.bias.set(0, phi.values[:, 1])
    with pytest.raises(ValueError, match=r"^net: its kernel depends on t; give a time `at`, .* kernel_in_time='shared'$"):
        find_steady_states(net)
    for t, size in ((0.0, 1.0), (0.5, 1.5), (1.0, 2.0), (1.5, 3.0), (2.0, 4.0)):
        assert_allclose(net.Y.values(find_steady_states(net, at=t).least_norm), phi.values[:, 1:2] / size, atol=1e-10)
    with pytest.raises(ValueError, match=r"^at: expected a number from 0 to 2, got 3.0$"):
        find_steady_states(net, at=3.0)
    with pytest.raises(ValueError, match="^find_steady_states: it does not take a network without layers"):
        find_steady_states(ResidualNetwork(phi, layers=0))


@on_two_ranks
def test_steady_states_see_learned_factors():
    phi = eigenfunctions("disk")
    net = ResidualNetwork(Kernel(phi, learn_factors=True), layers=1)
    net.kernel.set(0, np.eye(4))
    net.factors[0].set(0, smooth(net.Y, 4))
    system = autonomous_problem(net).system
    assert np.abs(system.gram - np.eye(4)).max() > 0.1 and not system.is_symmetric


# -- equilibria of u -------------------------------------------------------------------------------------------------


def drifting(domain, activation="tanh", alpha=1.7):
    """The example of 3.3: B f = (f, psi) phi, |phi| = 1, psi orthogonal to sigma(phi), a = alpha phi."""
    eigen = eigenfunctions(domain)
    Y = eigen.Y
    phi = 1 + smooth(Y, 1)
    phi /= Y.norm(Y.batch(phi))
    sigma = ACTIVATIONS[activation](phi)
    psi = smooth(Y, 1, seed=4)
    psi -= sigma * (Y.inner(Y.batch(psi), Y.batch(sigma)) / Y.inner(Y.batch(sigma), Y.batch(sigma)))
    psi /= Y.norm(Y.batch(psi))
    kernel = LowRankKernel(Basis(Y, phi, "given"), Basis(Y, psi, "given"))
    return autonomous_network(kernel, np.ones((1, 1)), alpha * phi[:, 0], activation=activation, layers=8, final_time=20.0)


@on_ranks
@each_domain
@pytest.mark.parametrize("activation", ["tanh", "leaky_relu"])
def test_f_drifts_for_ever_where_u_stands_still(domain, activation):
    """3.3, the example of rank one: (3.2) has the solution f(t) = f_I + t sigma(phi), which is (3.3) with u at rest.

    There int f_I psi = alpha - 1.
    """
    net = drifting(domain, activation)
    Y, kernel = net.Y, net.kernel.space_basis.kernel
    f = smooth(Y, 1, seed=2)
    f += kernel.psi.values * (0.7 - kernel.psi.project(f))
    set_of_u = find_equilibria(net)
    u = Y.batch(autonomous_problem(net).argument(f))
    assert_allclose(Y.values(u), kernel.phi.values, atol=1e-12)
    assert set_of_u.contain(u).all() and set_of_u.codimension == 1
    velocity = set_of_u.velocity(Y.batch(f))
    assert_allclose(Y.values(velocity), net.activation(kernel.phi.values), atol=1e-12)
    for t, state in zip(net.times, net.run(Y.batch(f)).states()):
        # Round-off, times the growth of unstable modes.
        assert_allclose(Y.values(state), f + t * Y.values(velocity), atol=1e-9)
    # Not a steady state, though a is in R(B) and steady states exist.
    steady = find_steady_states(net)
    assert steady.exist and not steady.contain(Y.batch(f)).any()
    (found,) = set_of_u.describe(u)
    assert_allclose(found.speed, Y.norm(velocity))


@on_ranks
@each_domain
def test_equilibria_of_a_symmetric_operator_vanish_where_sigma_does_not(domain, rng):
    """Lemma 3.3: u sigma(u) = 0 for u in R(B). It fails without symmetry, by the example of 3.3, and outside of R(B)."""
    phi = eigenfunctions(domain)
    turn, _ = np.linalg.qr(np.cos(np.arange(9.0)).reshape(3, 3))
    beta = np.zeros((phi.rank, phi.rank))
    beta[1:4, 1:4] = turn @ np.diag([2.0, -1.0, 0.5]) @ turn.T
    kernel = LowRankKernel(phi, phi)
    net = autonomous_network(kernel, beta, kernel.apply(beta, smooth(phi.Y, 1))[:, 0])
    assert autonomous_problem(net).system.is_symmetric
    found = find_equilibria(net).found_from(phi.Y.batch(3 * smooth(phi.Y, 12)))
    assert found
    for equilibrium in found:
        assert equilibrium.outside < 1e-7 and abs(equilibrium.pairing) < 1e-12
        assert phi.Y.norm(equilibrium.u) < 1e-6  # tanh vanishes at 0 alone
    # As (phi_1, sigma(1)) = 0, constants outside of R(B) are equilibria too; the lemma is not about them.
    (constant,) = find_equilibria(net).describe(phi.Y.batch(np.ones((phi.Y.nodes, 1))))
    assert find_equilibria(net).contain(constant.u).all() and constant.outside > 1 and constant.pairing > 1
    assert find_equilibria(net).lemma_applies
    # B is not symmetric: u is in R(B) and s sigma(s) >= 0, but u sigma(u) is not 0.
    example = drifting(domain)
    (broken,) = find_equilibria(example).describe(example.Y.batch(example.kernel.space_basis.kernel.phi.values))
    assert broken.outside < 1e-12 and broken.pairing > 0.1 and not find_equilibria(example).lemma_applies


@on_ranks
@each_domain
def test_equilibria_are_found_from_starts_and_judged_by_their_spectrum(domain):
    """Rank one: u = c phi stands still where (psi, sigma(c phi)) = 0, here at c = -1, 0, 1 since sigma is odd."""
    net = drifting(domain)
    Y, kernel, set_of_u = net.Y, net.kernel.space_basis.kernel, find_equilibria(net)
    starts = np.array([1.2, 0.9, 0.1, -0.05, -0.8, -1.3])
    f = smooth(Y, 6, seed=3)
    f += kernel.psi.values * (1.7 - starts - kernel.psi.project(f))  # a - B f = c phi
    found = set_of_u.found_from(Y.batch(f))
    c = [kernel.phi.project(Y.values(equilibrium.u))[0, 0] for equilibrium in found]
    assert_allclose(sorted(c), [-1, 0, 1], atol=1e-7)
    for value, equilibrium in zip(c, found):
        # -(psi, sigma'(c phi) phi) is the rate of growth or decay of u.
        slope = net.activation.derivative(value * kernel.phi.values) * kernel.phi.values
        rate = -kernel.psi.project(slope)[0, 0]
        assert_allclose(equilibrium.eigenvalues, [rate], rtol=1e-6)
        near = Y.batch(kernel.psi.values * (1.7 - value - 1e-6))
        u = [kernel.phi.project(autonomous_problem(net).argument(Y.values(state)))[0, 0] for state in net.run(near).states()]
        grown = np.log(abs(u[-1] - value) / abs(u[0] - value)) / net.times[-1]
        assert_allclose(grown, rate, rtol=0.02, atol=1e-4)


@on_ranks
@each_domain
def test_the_nearest_equilibrium_is_one_and_is_reached_at_right_angles(domain, rng):
    kernel = kernel_on(domain)
    Y = kernel.phi.Y
    net = autonomous_network(kernel, rng.normal(size=kernel.shape), 0.3)
    set_of_u, system = find_equilibria(net), autonomous_problem(net).system
    u = 0.8 * smooth(Y, 2, seed=8)
    nearest = set_of_u.nearest(Y.batch(u))
    v = Y.values(nearest)
    assert set_of_u.contain(nearest).all() and not set_of_u.contain(Y.batch(u)).any()
    # v - u = sigma'(v) psi c: no direction along the set leads nearer.
    for k in range(2):
        slope = net.activation.derivative(v[:, k : k + 1])
        moved = (v - u)[:, k : k + 1] / slope
        inside = system.right_values(system.right_coefficients(moved))
        assert_allclose(moved, inside, atol=1e-7)
    assert_allclose(set_of_u.distance(Y.batch(u)), autonomous_problem(net).norms(v - u))
    # Others in the set are farther away.
    for seed in range(3):
        other = Y.values(set_of_u.nearest(Y.batch(v + 0.1 * smooth(Y, 2, seed=20 + seed))))
        assert (autonomous_problem(net).norms(other - u) > autonomous_problem(net).norms(v - u)).all()


@on_two_ranks
def test_the_nearest_equilibrium_is_that_of_a_general_solver():
    Y = class_space(5)
    numbers = Y.numbers
    everything = np.array([[1.0, 0.5], [0.3, -1.0], [0.7, 0.2], [-0.4, 0.9], [1.1, 0.1]])
    basis = Basis(Y, everything[numbers], "given")
    net = autonomous_network(LowRankKernel(basis, basis), np.array([[1.0, 0.4], [-0.2, 0.7]]))
    u = np.array([1.0, 0.5, -0.3, 0.8, 0.2])
    result = scipy.optimize.minimize(
        lambda v: np.sum((v - u) ** 2) / 2, u, method="SLSQP", options={"ftol": 1e-15, "maxiter": 200},
        constraints={"type": "eq", "fun": lambda v: everything.T @ np.tanh(v)},
    )  # fmt: skip
    found = find_equilibria(net).nearest(Y.batch(u[numbers][:, None]))
    assert_allclose(Y.values(found)[:, 0], result.x[numbers], atol=1e-6)


@on_ranks
@each_domain
@pytest.mark.parametrize("activation", ["tanh", "leaky_relu", "relu", "arctan"])
def test_an_equilibrium_is_found_from_anywhere(domain, activation):
    """Where Newton's method fails, at kinks and far from the set, other equilibria are returned."""
    phi = eigenfunctions(domain)
    beta = np.eye(phi.rank) + 0.3 * np.cos(np.arange(phi.rank**2.0)).reshape(phi.rank, -1)
    net = autonomous_network(LowRankKernel(phi, phi), beta, 0.1, activation=activation)
    set_of_u, Y = find_equilibria(net), net.Y
    u = Y.batch(smooth(Y, 3) * [0.1, 1.0, 30.0])
    near = set_of_u.nearest(u)
    assert set_of_u.contain(near).all()
    assert (set_of_u.distance(u) <= autonomous_problem(net).norms(Y.values(u)) * (1 + 1e-12)).all()
    if activation == "relu":
        # (1, relu(v)) = 0 implies v <= 0, and the nearest such v is min(u, 0).
        assert_allclose(Y.values(near), np.minimum(Y.values(u), 0), atol=1e-9)


@on_two_ranks
def test_says_so_where_no_equilibrium_is_near():
    """With sigmoid and B f = (f, 1) 1 there is no equilibrium: (1, sigma(u)) > 0."""
    phi = eigenfunctions("disk")
    constant = Basis(phi.Y, phi.values[:, :1], "given")
    net = autonomous_network(LowRankKernel(constant, constant), np.ones((1, 1)), activation="sigmoid")
    assert find_equilibria(net).found_from(phi.Y.batch(smooth(phi.Y, 3))) == []
    with pytest.raises(RuntimeError, match=r"^nearest: no equilibrium near u was found in 100 steps"):
        find_equilibria(net).nearest(phi.Y.batch(smooth(phi.Y, 1)))
