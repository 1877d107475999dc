"""Singular systems, spectra, Theorem 3.4 and simulations beside it, on a disk, an annulus and a sphere."""

import re

import matplotlib.figure
import mpmath
import numpy as np
import pytest
import sympy
from helpers import label_space, laplace, network, smooth
from numpy.testing import assert_allclose
from problems import ROUND_DOMAINS, autonomous_network, gathered, polynomials

from fem_resnet import (
    Activation,
    Basis,
    Bias,
    Kernel,
    LowRankKernel,
    ResidualNetwork,
    autonomous_problem,
    eigen_expansion,
    find_equilibria,
    frozen_spectra,
    observed_decay,
    singular_system,
    stability_verdict,
)  # fmt: skip
from fem_resnet.label_domain.points import class_space
from fem_resnet.theory.spectra.frozen_spectra import CAVEAT
from fem_resnet.theory.spectra.half_planes import count_left, count_left_in_gap

on_two_ranks = pytest.mark.parallel([1, 2])
on_ranks = pytest.mark.parallel([1, 2, 3])

each_domain = pytest.mark.parametrize("domain", ROUND_DOMAINS)


def dense(kernel, beta):
    """B on all nodes, in an orthonormal basis of the label measure: root(w) b root(w)."""
    Y = kernel.phi.Y

    def everywhere(values):
        return np.concatenate(Y.comm.allgather(values))

    root = np.sqrt(everywhere(Y.weights))[:, None]
    return root * everywhere(kernel.phi.values) @ beta @ everywhere(kernel.psi.values).T * root.T


def kernels(domain):
    """Kernels with psi = phi and other psi, orthonormal or not, of equal and of different rank."""
    four = laplace(domain, "CG1", 5 if domain == "annulus" else 4)
    given = polynomials(label_space(domain, "CG1"))
    return [LowRankKernel(*pair) for pair in ((four, four), (four, given), (given, given))]


# -- the singular system ---------------------------------------------------------------------------------------------


@on_ranks
@each_domain
def test_singular_system_and_spectra_are_those_of_the_dense_operator(domain, rng):
    """3.3: mu_l, the spectrum of B on R(B), and the spectrum of B_s on L2(Y) without zeros."""
    for kernel in kernels(domain):
        beta = rng.normal(size=kernel.shape)
        B, system = dense(kernel, beta), singular_system(kernel, beta)
        r = system.rank
        assert_allclose(system.values, np.linalg.svd(B, compute_uv=False)[:r], rtol=1e-11)
        exact = np.linalg.eigvals(B)
        exact = np.sort_complex(exact[np.argsort(-np.abs(exact))[:r]])
        # Eigenvalues of matrices that are not normal have some digits less.
        assert_allclose(np.sort_complex(system.eigenvalues), exact, atol=1e-10)
        symmetric = np.linalg.eigvalsh((B + B.T) / 2)
        padded = np.sort(np.append(system.symmetric_eigenvalues, np.zeros(len(B) - system.symmetric_eigenvalues.size)))
        assert_allclose(padded, symmetric, atol=1e-11)
        assert abs(system.symmetric_minimum - symmetric[0]) < 1e-11
        assert not system.is_symmetric
        f = smooth(kernel.phi.Y)
        assert_allclose(system.apply(f), kernel.apply(beta, f), atol=1e-11)


@on_ranks
@each_domain
def test_the_spectrum_on_the_range_is_that_of_D_T_transposed_and_of_D_T(domain, rng):
    """(3.5a), linearised: (phi_k, B phi_l) is D T^T, and D T has the same spectrum but is another matrix."""
    kernel = kernels(domain)[1]
    system = singular_system(kernel, rng.normal(size=kernel.shape))
    on_range = system.left_coefficients(system.apply(system.left_values(np.eye(system.rank))))
    assert_allclose(on_range, system.matrix, atol=1e-11)
    DT = system.values[:, None] * system.gram
    assert_allclose(np.sort_complex(np.linalg.eigvals(DT)), np.sort_complex(system.eigenvalues), atol=1e-10)
    assert np.abs(DT - system.matrix).max() > 0.1


@on_ranks
@each_domain
def test_a_symmetric_kernel_of_either_sign_is_seen_as_such(domain):
    """3.3 prints T = id for B = B^T: that holds for B >= 0; a negative eigenvalue gives T the entry -1."""
    kernel = kernels(domain)[0]
    for eigenvalues, positive in (([4, 3, 2, 1], True), ([4, -3, 2, -1], False)):
        beta = np.zeros(kernel.shape)
        beta[:4, :4] = np.diag(eigenvalues)
        system = singular_system(kernel, beta)
        assert system.is_symmetric and system.rank == 4
        assert_allclose(system.gram, np.diag(np.sign(eigenvalues)), atol=1e-10)
        assert_allclose(system.eigenvalues, np.sort(eigenvalues), atol=1e-10)
        assert (np.abs(system.symmetric_minimum - (0 if positive else -3))) < 1e-10


@on_ranks
@each_domain
def test_D_T_of_the_functions_with_positive_mu_does_not_make_the_symmetric_part_of_B_positive(domain):
    """3.3: (B f, f) >= 0 is equivalent to D T >= 0 for complete psi_l; those of mu_l > 0 see their span alone."""
    phi = laplace(domain, "CG1", 5 if domain == "annulus" else 4)
    first, second = Basis(phi.Y, phi.values[:, :2], "given"), None
    turned = phi.values[:, :2] * 0.8 + phi.values[:, 2:4] * 0.6
    second = Basis(phi.Y, turned, "given")
    system = singular_system(LowRankKernel(first, second), np.eye(2))
    assert_allclose(system.product_minimum, 0.8)
    # B on span(phi, psi) is [[0.8, 0.6], [0, 0]], twice: (0.8 - 1) / 2.
    assert_allclose(system.symmetric_minimum, -0.1)
    # With psi_l that are complete in the span of the four functions, as the paper supposes, D T is as indefinite as B.
    rest = np.hstack([turned, phi.values[:, :2] * 0.6 - phi.values[:, 2:4] * 0.8])
    complete = np.vstack([first.project(rest), np.zeros((2, 4))])
    assert_allclose(np.linalg.eigvalsh((complete + complete.T) / 2)[0], -0.1)
    assert_allclose(system.gram_minimum, 0.8)


@on_ranks
def test_a_kernel_on_all_of_a_small_space_may_be_positive_definite():
    """Where phi and psi span all of V, inf (B f, f) is not 0."""
    Y = class_space(3)
    everything = Basis(Y, np.eye(3)[Y.numbers], "given")
    system = singular_system(
        LowRankKernel(everything, everything), np.diag([1.0, 2.0, 3.0]) + [[0, 1, 0], [-1, 0, 0], [0, 0, 0]]
    )
    assert_allclose(system.symmetric_minimum, 1.0)
    assert singular_system(LowRankKernel(everything, everything), np.zeros((3, 3))).rank == 0


@on_ranks
def test_refuses_a_kernel_between_two_label_domains():
    kernel = LowRankKernel(laplace("disk", "CG1", 4), laplace("sphere", "CG1", 4))
    with pytest.raises(ValueError, match=r"^kernel: expected phi and psi on one label domain, got LabelSpace\("):
        singular_system(kernel, np.eye(4))


# -- Theorem 3.4 -----------------------------------------------------------------------------------------------------

PLANE = np.eye(2)
#: T, mu, the verdict, whether Theorem 3.4 applies, and whether int Sigma(u) falls.
VERDICTS = {
    "symmetric and positive": (PLANE, (1.0, 0.5), "asymptotically stable", True, True),
    "Theorem 3.4": ([[0.8, -0.3], [0.3, 0.8]], (1.0, 0.5), "asymptotically stable", True, False),
    "D T not definite": ([[0.3, 0.9], [0.0, 0.3]], (1.0, 0.2), "asymptotically stable", False, False),
    "a negative eigenvalue": ([[0.8, 0.0], [0.0, -0.5]], (1.0, 0.5), "unstable", False, False),
    "unstable spiral": ([[-0.2, 0.8], [-0.8, -0.2]], (1.0, 0.9), "unstable", False, False),
    "antisymmetric": ([[0.0, 1.0], [-1.0, 0.0]], (1.0, 1.0), "stable", False, True),
    "centre": ([[0.0, 0.9], [-0.9, 0.0]], (1.0, 0.5), "not decided", False, False),
    "T singular": ([[0.0, 0.0], [0.0, 0.9]], (1.0, 0.5), "not decided", False, False),
}
each_verdict = pytest.mark.parametrize("name", VERDICTS)


def root(G):
    """The root of a symmetric matrix whose eigenvalues are not negative."""
    values, turn = np.linalg.eigh(G)
    return turn * np.sqrt(np.maximum(values, 0)) @ turn.T


def kernel_with(T, mu, domain) -> tuple:
    """Orthonormal phi and psi with (phi_k, psi_l) = T_kl, and diag(mu): B f = sum mu_l (psi_l, f) phi_l."""
    T, four = np.array(T), laplace(domain, "CG1", 5 if domain == "annulus" else 4).values[:, :4]
    r, Y = len(T), laplace(domain, "CG1", 5 if domain == "annulus" else 4).Y
    phi = four[:, :r]
    psi = phi @ T + four[:, r : 2 * r] @ root(np.eye(r) - T.T @ T)
    return LowRankKernel(Basis(Y, phi, "given"), Basis(Y, psi, "given")), np.diag(mu)


def about_zero(name, domain, **options) -> ResidualNetwork:
    """The network of that name, with a in R(B)."""
    T, mu, *_ = VERDICTS[name]
    kernel, beta = kernel_with(T, mu, domain)
    bias = kernel.phi.values @ [0.3, -0.2]
    return autonomous_network(kernel, beta, bias, **{"layers": 40, "final_time": 40.0} | options)


def start(net, u) -> object:
    """f_I with a - B f_I = sum u_l phi_l, a column for each sample."""
    system = autonomous_problem(net).system
    kernel = net.kernel.space_basis.kernel
    u = kernel.phi.values @ u
    return net.Y.batch(system.least_norm(net.bias.get(0)[:, None] - u) + 0.1 * smooth_in_null_space(system, u.shape[1]))


def smooth_in_null_space(system, samples):
    f = system.null_part(smooth(system.kernel.phi.Y, samples, seed=9))
    assert np.abs(system.apply(f)).max(initial=0) < 1e-12
    return f


@on_ranks
@each_domain
@each_verdict
def test_verdicts_and_what_decides(name, domain):
    """Theorem 3.4 with its hypotheses (a) and (b), and the other criteria of 3.2."""
    _, mu, verdict, applies, falls = VERDICTS[name]
    stability = stability_verdict(about_zero(name, domain))
    assert stability.verdict == verdict, stability
    assert (stability.theorem_holds, stability.lyapunov_falls) == (applies, falls), stability
    assert stability.isolated is (None if name == "T singular" else True)
    assert_allclose(stability.system.values, mu, rtol=1e-10)
    assert stability.rate_bound <= stability.rate + 1e-12
    text = str(stability)
    assert text.startswith(f"{verdict}: ") and "smallest singular value of T" in text


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("domain", ["sphere"])
@pytest.mark.parametrize("name", [name for name, row in VERDICTS.items() if row[2] != "not decided"])
def test_simulations_do_what_the_verdict_says(name, domain):
    """Asymptotically stable: f goes to a point of f_inf + N(B). Stable: u stays small. Unstable: it grows from any size."""
    net = about_zero(name, domain, layers=120, final_time=30.0 if VERDICTS[name][2] == "stable" else 120.0)
    stability = stability_verdict(net)
    initial = start(net, np.array([[1e-3, 0.0], [0.0, 1e-3]]))
    problem = stability.problem
    sizes = np.array([problem.norms(problem.argument(net.Y.values(f))) for f in net.run(initial).states()])
    if stability.verdict == "asymptotically stable":
        final = net(initial)
        assert (sizes[-1] < 2e-3 * np.exp(-0.9 * stability.rate * 120) + 1e-12).all()
        assert (stability.steady.distance(final) < 1e-2).all()
        # The part of f - f_inf in N(B) that R(B) does not reach does not change.
        system = stability.system
        moved = net.Y.values(final) - net.Y.values(initial)
        assert name != "symmetric and positive" or np.abs(system.null_part(moved)).max(initial=0) < 1e-4
    elif stability.verdict == "unstable":
        assert sizes.max() > 0.1
    else:
        # Except for the damping of rk4 with steps of 1/4, u keeps its size.
        assert_allclose(sizes, 1e-3, rtol=1e-2)


@on_ranks
@each_domain
@pytest.mark.parametrize("name", ["symmetric and positive", "Theorem 3.4", "D T not definite"])
def test_the_rate_is_the_least_real_part_of_the_spectrum_of_D_T(name, domain):
    """Theorem 3.4, along (3.5a), (3.5b): the smallest eigenvalue of the symmetric part of D T is a bound and not the rate."""
    net = about_zero(name, domain, layers=150, final_time=100.0)
    decay = observed_decay(net, start(net, 1e-2 * np.array([[1.0, 0.2], [0.3, -1.0]])))
    stability = stability_verdict(net)
    assert_allclose(decay.predicted, np.linalg.eigvals(np.diag(VERDICTS[name][1]) @ VERDICTS[name][0]).real.min())
    assert_allclose(decay.rates, decay.predicted, rtol=1e-2)
    if name != "symmetric and positive":
        assert stability.rate_bound < 0.9 * decay.rates.min()


def lyapunov(net, initial):
    """int Sigma(u) dy at the layer times, shape (L + 1, samples)."""
    problem = autonomous_problem(net)
    return np.array(
        [
            net.Y.sum(net.Y.weights @ net.activation.primitive(problem.argument(net.Y.values(f))))
            for f in net.run(initial).states()
        ]
    )


@on_ranks
@each_domain
def test_int_Sigma_falls_where_B_s_is_positive_and_may_rise_where_only_D_T_is(domain):
    """The paper says that L(u) = int Sigma(u) dy falls where D T is positive definite; B_s >= 0 makes it fall."""
    kernel, beta = kernel_with([[0.4, 0.0], [0.8, 0.4]], (1.0, 0.2), domain)
    net = autonomous_network(kernel, beta, 0.0, layers=40, final_time=100.0, steps=2)
    stability = stability_verdict(net)
    assert stability.theorem_holds and not stability.lyapunov_falls  # what is printed would apply
    L = lyapunov(net, start(net, np.array([[0.0], [1e-2]])))[:, 0]
    assert L.max() > 1.5 * L[0], "printed: L falls"
    assert stability.verdict == "asymptotically stable" and L[-1] < 0.02 * L[0]
    turned, _ = np.linalg.qr(np.cos(np.arange(4.0)).reshape(2, 2))
    kernel = LowRankKernel(kernel.phi, kernel.phi)
    for beta in (turned @ np.diag([2.0, 0.3]) @ turned.T, turned @ np.diag([2.0, 0.3]) @ turned.T + [[0, 1], [-1, 0]]):
        net = autonomous_network(kernel, beta, 0.0, layers=20, final_time=5.0)
        assert stability_verdict(net).lyapunov_falls
        assert (np.diff(lyapunov(net, start(net, np.array([[3.0, 0.1], [-1.0, 2.0]]))), axis=0) < 0).all()


@on_ranks
@each_domain
def test_a_singular_T_leaves_it_open_whether_zero_is_isolated(domain):
    """3.3 says isolated if T is invertible. The converse holds for a linear sigma; for tanh 0 is isolated at T = 0 here."""
    Y = label_space(domain, "CG1")
    phi = Basis(Y, 1 + smooth(Y, 1), "given")
    # psi such that (psi, phi) = 0 but (psi, phi^3) is not 0.
    psi = phi.values**3 + smooth(Y, 1, seed=1)
    for _ in range(2):  # once leaves the round-off of the larger function, which is not 0 for these
        psi -= phi.values * (phi.project(psi) / phi.gram)
    kernel, beta = LowRankKernel(phi, Basis(Y, psi, "given")), np.eye(1)
    for activation, isolated in (("identity", False), ("tanh", True)):
        net = autonomous_network(kernel, beta, 0.0, activation=activation)
        assert stability_verdict(net).isolated is None
        near = find_equilibria(net).residuals(phi.Y.batch(phi.values * [[1e-1, 1e-2]]))
        assert (near > 1e-9).all() == isolated
    net = autonomous_network(LowRankKernel(phi, Basis(Y, psi + 0.3 * phi.values, "given")), beta, 0.0)
    assert stability_verdict(net).isolated
    assert (find_equilibria(net).residuals(Y.batch(phi.values * [[1e-1, 1e-2]])) > 0.1).all()


@on_ranks
@pytest.mark.parametrize(
    "beta, verdict, reason",
    [
        (np.diag([1.0, 0.5]), "asymptotically stable", r"no positive slope there, but \(B v, v\) >= 0.5 \|v\|\^2"),
        (np.array([[0.0, 1.0], [-1.0, 0.0]]), "stable", r"no positive slope there, but B_s >= 0"),
        (np.array([[0.5, 2.0], [0.0, 0.5]]), "not decided", r"no positive slope there, and inf \(B v, v\) = -0.5"),
    ],
)
def test_where_sigma_has_a_kink_int_Sigma_decides(beta, verdict, reason):
    """(A1) of 3.2 supposes sigma'(0) > 0, which leaky relu violates; it satisfies s sigma(s) >= 0, (3.4)."""
    phi = laplace("sphere", "CG1", 4)
    plane = Basis(phi.Y, phi.values[:, :2], "given")
    net = autonomous_network(
        LowRankKernel(plane, plane), beta, 0.0, activation="leaky_relu", layers=60, final_time=120.0, steps=20
    )
    stability = stability_verdict(net)
    assert stability.verdict == verdict and np.isnan(stability.rate) and not stability.theorem_holds
    assert re.search(reason, stability.reason), stability.reason
    L = lyapunov(net, start(net, np.array([[1.0], [0.5]])))[:, 0]
    if verdict == "asymptotically stable":
        assert L[-1] < 1e-4 * L[0]
    elif verdict == "stable":
        assert L.max() < 1.01 * L[0]


@on_ranks
def test_without_a_steady_state_nothing_is_decided():
    plane = laplace("disk", "CG1", 4)
    kernel, beta = LowRankKernel(plane, plane), np.diag([1.0, 1.0, 1.0, 0.0])
    for options, bias, reason in (
        ({"activation": "sigmoid"}, 0.0, "there is no steady state: sigmoid vanishes nowhere"),
        ({}, plane.values[:, 3], "there is no steady state: a is not in R(B): 1 of |a| is outside"),
        ({"activation": "relu"}, 0.0, "relu vanishes on an interval, so that u = 0 is not isolated"),
    ):
        stability = stability_verdict(autonomous_network(kernel, beta, bias, **options))
        assert stability.verdict == "not decided" and stability.reason.startswith(reason)
    assert stability_verdict(autonomous_network(kernel, 0 * beta)).verdict == "stable"
    assert "B = 0" in str(stability_verdict(autonomous_network(kernel, 0 * beta)))


@on_ranks
def test_the_rate_is_lost_as_the_rank_grows():
    """After Theorem 3.4: `carries over to the general case without change` is printed; the rate is that of the least mu_l."""
    phi = laplace("sphere", "CG1", 4)
    rates = []
    for rank in (1, 2, 3, 4):
        basis = Basis(phi.Y, phi.values[:, :rank], "given")
        net = autonomous_network(
            LowRankKernel(basis, basis), np.diag(4.0 ** -np.arange(rank)), layers=60, final_time=240.0, steps=4
        )
        slowest = start(net, 1e-2 * np.eye(rank)[:, -1:])
        assert stability_verdict(net).theorem_holds
        rates.append(observed_decay(net, slowest).rates[0] if rank > 1 else stability_verdict(net).rate)
    assert_allclose(rates, [1, 1 / 4, 1 / 16, 1 / 64], rtol=1e-2)


@on_ranks
@each_domain
def test_a_network_with_limits_behaves_as_the_limit_says(domain):
    """Remark 3.1: a(t) and b(t) converge, and u decays at the rate of a_inf and b_inf."""
    kernel, limit = kernel_with([[0.8, -0.3], [0.3, 0.8]], (1.0, 0.3), domain)
    net = ResidualNetwork(
        Kernel(kernel.phi, kernel.psi, in_time="linear"), bias=Bias(in_time="shared"), layers=80, final_time=40.0
    )
    for k, t in enumerate(net.times):
        net.kernel.set(k, limit + np.exp(-t) * np.array([[-3.0, 1.0], [1.0, -2.0]]))
    net.bias.set(0, kernel.phi.values @ [0.3, 0.2])
    stability = stability_verdict(net, at=net.times[-1])
    assert stability.verdict == "asymptotically stable"
    assert stability_verdict(net, at=0.0).verdict == "unstable"
    problem = stability.problem
    u = np.array(
        [problem.norms(problem.argument(net.Y.values(f)))[0] for f in net.run(net.Y.batch(0 * net.Y.weights)).states()]
    )
    assert_allclose(np.log(u[-21] / u[-1]) / 10, stability.rate, rtol=1e-2)


# -- the linearised flow ---------------------------------------------------------------------------------------------


@on_ranks
@each_domain
@pytest.mark.parametrize("name", ["symmetric and positive", "Theorem 3.4", "D T not definite", "unstable spiral"])
def test_the_expansion_in_eigenfunctions_is_the_linearised_flow(name, domain):
    """3.2: w_t = -sigma'(0) B w, against a network with sigma(s) = s and a = 0."""
    net = about_zero(name, domain, activation="tanh")
    w = smooth(net.Y, 2)
    expansion = eigen_expansion(net, net.Y.batch(w))
    T, mu, *_ = VERDICTS[name]
    linear = autonomous_network(
        net.kernel.space_basis.kernel, net.kernel.get(0), layers=8, final_time=4.0, steps=8, activation="identity"
    )
    for t, state in zip(linear.times, linear.run(net.Y.batch(w)).states()):
        assert_allclose(net.Y.values(expansion(t)), net.Y.values(state), atol=1e-6)  # rk4 with steps of 1/16
    assert_allclose(net.Y.values(expansion(0.0)), w, atol=1e-12)


@on_ranks
@each_domain
def test_of_a_symmetric_operator_the_coefficients_are_inner_products(domain):
    """3.2: w(t) = sum exp(-sigma'(0) omega_l t) (w_I, phi_l) phi_l, and the part in N(B) is constant."""
    phi = laplace(domain, "CG1", 5 if domain == "annulus" else 4)
    omega = np.array([2.0, 1.0, 0.5] + [0.0] * (phi.rank - 3))
    net = autonomous_network(LowRankKernel(phi, phi), np.diag(omega))
    w, t = smooth(phi.Y, 2), 0.7
    exact = w + phi.values @ ((np.exp(-omega * t) - 1)[:, None] * phi.project(w))
    assert_allclose(phi.Y.values(eigen_expansion(net, phi.Y.batch(w))(t)), exact, atol=1e-11)


@on_ranks
@each_domain
def test_the_nonlinear_flow_leaves_the_expansion_at_third_order(domain):
    """f - f_inf - w = O(|w|^3) for tanh, whose second derivative is 0 at 0."""
    net = about_zero("Theorem 3.4", domain, layers=4, final_time=2.0, steps=8)
    steady = stability_verdict(net).steady
    f_inf, direction = net.Y.values(steady.least_norm), smooth(net.Y, 1)
    errors = []
    for size in (0.2, 0.1, 0.05):
        w = net.Y.batch(size * direction)
        f = net(net.Y.batch(f_inf + size * direction))
        errors.append(net.Y.norm(net.Y.batch(net.Y.values(f) - f_inf - net.Y.values(eigen_expansion(net, w)(2.0)))))
    assert (np.log2(np.array(errors[:-1]) / errors[1:]) > 2.8).all(), errors


@on_ranks
def test_the_expansion_says_where_there_is_none():
    net = about_zero("T singular", "sphere")
    w = net.Y.batch(smooth(net.Y, 1))
    with pytest.raises(ValueError, match=r"^net: B has no basis of eigenfunctions that is well conditioned; the smallest"):
        eigen_expansion(net, w)
    with pytest.raises(ValueError, match=r"^net: there is no linearisation, as leaky_relu has no slope where it vanishes"):
        eigen_expansion(about_zero("Theorem 3.4", "sphere", activation="leaky_relu"), w)


# -- spectra frozen in time ------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("space", [("disk", "CG1"), ("sphere", "CG1")])
def test_frozen_spectra_are_those_of_the_dense_linearisation(space):
    """3.5 prints sigma(u) b; the linearisation (3.6) frozen at t has sigma'(u) b, which differences of the rate show."""
    net = network(space)
    Y = net.Y
    initial = Y.batch(smooth(Y, 2))
    spectra = frozen_spectra(net, initial)
    assert spectra.times.tolist() == net.times.tolist() and spectra.growth.shape == (4, 2)
    run = net.run(initial)
    for layer, kernel_of in ((0, 0), (2, 2), (3, 2)):
        kernel, beta = net.kernel.space_basis.kernel, net.kernel.get(kernel_of)
        b = gathered(Y, kernel.phi.values) @ beta @ gathered(Y, kernel.psi.values).T * gathered(Y, Y.weights[:, None]).T
        f = gathered(Y, Y.values(run.state(layer)))
        a = gathered(Y, net.bias.get(kernel_of)[:, None])
        for sample in range(2):
            u = a[:, 0] - b @ f[:, sample]
            exact = np.linalg.eigvals(-(1 - np.tanh(u) ** 2)[:, None] * b)
            exact = exact[np.argsort(-np.abs(exact))[:4]]
            found = spectra.eigenvalues[layer][sample]
            assert_allclose(np.sort_complex(found), np.sort_complex(exact), atol=1e-9)
            printed = np.linalg.eigvals(-np.tanh(u)[:, None] * b)
            printed = printed[np.argsort(-np.abs(printed))[:4]]
            assert np.abs(np.sort_complex(printed) - np.sort_complex(exact)).max() > 0.1


def rotating(domain, matrix, final_time, layers):
    """w_t = A(t) w in the plane of two orthonormal functions: sigma(s) = s, a = 0, B = -A."""
    phi = laplace(domain, "CG1", 5 if domain == "annulus" else 4)
    plane = Basis(phi.Y, phi.values[:, :2], "given")
    net = ResidualNetwork(Kernel(plane, in_time="linear"), layers=layers, final_time=final_time, activation="identity")
    for k, t in enumerate(net.times):
        net.kernel.set(k, -matrix(t))
    return net


def growing(t):
    """Eigenvalues (-1 +- i sqrt 7) / 4 at all times, and the solution e^(t/2) (cos t, -sin t)."""
    c, s = np.cos(t), np.sin(t)
    return np.array([[-1 + 1.5 * c * c, 1 - 1.5 * c * s], [-1 - 1.5 * c * s, -1 + 1.5 * s * s]])


def decaying(t):
    """Eigenvalues 2 and -13 at all times, and all solutions decay."""
    c, s = 7.5 * np.cos(12 * t), 7.5 * np.sin(12 * t)
    return np.array([[-5.5 + s, c], [c, -5.5 - s]])


@on_ranks
@each_domain
def test_frozen_spectra_do_not_decide_stability(domain):
    """3.5: decaying modes at every time, and a solution that grows as e^(t/2); and the other way round."""
    net = rotating(domain, growing, 6.0, 60)
    initial = net.Y.batch(net.bases["phi"][0].values[:, :1])
    spectra = frozen_spectra(net, initial)
    assert all(values.real.max() < -0.24 for values in spectra.eigenvalues) and spectra.growth.max() == 0
    # Between the 60 layer times the matrix is linear in t.
    assert_allclose(net.Y.norm(net(initial)), np.exp(3.0), rtol=3e-2)
    net = rotating(domain, decaying, 3.0, 180)
    initial = net.Y.batch(net.bases["phi"][0].values[:, :2])
    spectra = frozen_spectra(net, initial)
    assert_allclose(spectra.growth, 2.0, rtol=1e-9)
    assert net.Y.norm(net(initial)) < 0.1


@on_ranks
def test_the_plot_shows_all_times_and_what_it_does_not_say():
    net = rotating("disk", growing, 6.0, 5)
    axes = matplotlib.figure.Figure().subplots()
    frozen_spectra(net, net.Y.batch(0 * net.Y.weights)).plot(axes)
    assert axes.get_title() == CAVEAT and "do not decide stability" in CAVEAT
    points = np.concatenate([part.get_offsets() for part in axes.collections])
    assert points.shape == (12, 2) and set(points[:, 0]) == set(net.times)


@on_ranks
def test_frozen_spectra_of_layers_with_bases_of_their_own():
    phi = laplace("disk", "CG1", 4)
    one, three = Basis(phi.Y, phi.values[:, :1], "given"), Basis(phi.Y, phi.values[:, 1:], "given")
    net = ResidualNetwork([one, three], layers=2)
    net.kernel.set(0, np.array([[2.0]]))
    net.kernel.set(1, np.diag([1.0, 2.0, 3.0]))
    spectra = frozen_spectra(net, phi.Y.batch(0 * phi.Y.weights))
    assert [values.round(9).real.tolist() for values in spectra.eigenvalues] == [[[-2]], [[-1, -2, -3]], [[-1, -2, -3]]]
    with pytest.raises(ValueError, match="^frozen_spectra: it does not take a network without layers"):
        frozen_spectra(ResidualNetwork(phi, layers=0), phi.Y.batch(0 * phi.Y.weights))


# -- signs that round-off could change ---------------------------------------------------------------------------------


def plane_network(beta, **options):
    phi = laplace("disk", "CG1", 4)
    beta = np.array(beta, dtype=float)
    plane = Basis(phi.Y, phi.values[:, : len(beta)], "given")
    return autonomous_network(LowRankKernel(plane, plane), beta, **options)


#: Kernels in orthonormal functions and the verdict in exact arithmetic; "not decided" is also right where it is not certain.
SIGNS = {
    "a small unstable eigenvalue": ([[2e-7, 1], [0, -1e-7]], "unstable", True),
    "the same, stable": ([[2e-6, 1], [0, 1e-6]], "asymptotically stable", True),
    "below what round-off of B leaves": ([[2e-9, 1], [0, -1e-9]], "unstable", False),
    "both signs": ([[1, 0], [0, -1e-11]], "unstable", True),
    "a Jordan block": ([[1, 1, 0], [0, 1, 1], [0, 0, 1]], "asymptotically stable", True),
    "a Jordan block that grows": ([[-1, 1, 0], [0, -1, 1], [0, 0, -1]], "unstable", True),
    "slow growth of a rotation": ([[0, 1], [-1, -1e-12]], "unstable", True),
    "eigenvalues of opposite sign and one size": ([[0.5, 3], [0, -0.5]], "unstable", True),
    "rank one": ([[1, 5], [0, 0]], "asymptotically stable", True),
    "a Jordan block of 0": ([[0, 1], [0, 0]], "not decided", True),
    "far from normal": ([[1e-3, 1, 0], [0, 1e-3, 1], [0, 0, 1e-3]], "asymptotically stable", True),
    "farther": ([[1e-6, 1, 0], [0, 1e-6, 1], [0, 0, 1e-6]], "asymptotically stable", False),
}


@on_two_ranks
@pytest.mark.parametrize("name", SIGNS)
def test_signs_of_eigenvalues_decide_where_round_off_cannot_change_them(name):
    beta, verdict, sure = SIGNS[name]
    found = stability_verdict(plane_network(beta))
    assert found.verdict in ((verdict,) if sure else (verdict, "not decided")), found
    if name.startswith("below"):
        assert found.verdict == "not decided" and "could change the sign of min Re eig(D T)" in found.reason


def test_what_has_a_small_unstable_eigenvalue_grows():
    """beta = [[2e-7, 1], [0, -1e-7]]: along the eigenvector (1, -3e-7) of -1e-7, u grows by e in a time of 1e7."""
    net = plane_network(SIGNS["a small unstable eigenvalue"][0], activation="identity", layers=40, final_time=2e7, steps=200)
    assert_allclose(stability_verdict(net).rate, -1e-7, rtol=1e-6)
    initial = net.bases["phi"][0].values @ [1.0, -3e-7]
    assert_allclose(net.Y.norm(net(net.Y.batch(initial[:, None]))), np.e**2, rtol=1e-2)


def test_counts_of_eigenvalues_hold_for_all_matrices_within_the_error(rng):
    """Random matrices, defective and normal, at lines near their eigenvalues: no perturbation changes a count."""
    counted = 0
    for _ in range(60):
        n = rng.integers(2, 6)
        A = rng.normal(size=(n, n)) if rng.random() < 0.5 else np.triu(rng.normal(size=(n, n)))
        if rng.random() < 0.5:
            A[np.diag_indices(n)] = rng.choice([-1.0, 1.0]) * 10.0 ** -rng.integers(0, 6)
        error, x = 10.0 ** -rng.integers(1, 12), 10.0 ** -rng.integers(0, 6) * rng.normal()
        found = count_left(A, x, error)
        if found is None:
            continue
        counted += 1
        for _ in range(4):
            U, _, V = np.linalg.svd(rng.normal(size=(n, n)))
            E = error * np.outer(U[:, 0], V[0]) if rng.random() < 0.5 else error * U @ V
            values = mpmath.eig(mpmath.matrix(A + E), left=False, right=False)
            assert sum(1 for value in values if mpmath.re(value) < x) == found
    assert counted > 30
    assert count_left(np.diag([1.0, -1e-9]), 0.0, 1e-8) is None and count_left(np.empty((0, 0)), 0.0, 1.0) == 0
    assert count_left_in_gap(np.diag([1.0, -1.0]), 0.5, 0.5, 1e-16) is None


@on_two_ranks
def test_a_slope_of_round_off_is_none(monkeypatch):
    """(s - 7/3)^3 has no slope where it vanishes; the place is known up to round-off."""
    s = sympy.Symbol("s")
    monkeypatch.setattr("fem_resnet.theory.spectra.steady_states.zero_set", lambda sigma: (7 / 3 + 1e-9,) * 2)
    cubic = Activation.from_sympy(sympy.tanh((s - sympy.Rational(7, 3)) ** 3))
    found = stability_verdict(plane_network(np.eye(2), activation=cubic, bias=7 / 3 + 1e-9))
    assert 0 < found.slope < 1e-15
    assert found.verdict == "asymptotically stable" and "no positive slope there, but (B v, v) >= 1" in found.reason
