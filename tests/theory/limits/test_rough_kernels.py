"""Limits in width outside of Theorem 2.2: kernels that jump, oscillate, have no bound, or are random graphs."""

import numpy as np
from exact_limits import (
    QUADRATURE,
    RK8,
    Continuum,
    T,
    bias,
    demo,
    distance,
    errors_on_cells,
    irregular,
    kernel,
    mesh_size,
    network,
    orders,
    runge_kutta,
    scalar,
    slope,
    start,
)
from helpers import label_space
from scipy.sparse.linalg import svds

from fem_resnet import (
    Basis,
    Kernel,
    Layers,
    ResidualNetwork,
    from_network,
    state_array,
)


def split_square(cut, n=10):
    """Gauss points and weights on the unit square, on both sides of x = cut."""
    x, w = np.hstack([demo.gauss(n, 0, cut), demo.gauss(n, cut, 1)])
    y, v = demo.gauss(n, 0, 1)
    return np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1).reshape(-1, 2), np.outer(w, v).ravel()


CUT = 2**0.5 - 1


def test_a_kernel_that_jumps_in_y_converges_at_order_one_half():
    """f jumps where b does: on a strip of cells of width h the error is of size one, also in the means."""

    def jumping(y, z):
        return kernel(y, z) * (1 + 2 * (y[..., 0] > CUT))

    exact = Continuum(split_square(CUT), jumping)
    found, sizes = [], []
    for n in (6, 12, 24, 48):
        Y = irregular(n)
        f = scalar(Y, network(Y, jumping)(Y.batch(start(Y.coordinates))))
        # Means over cells that the jump crosses are computed from a polynomial, which suffices for an error of size one.
        found.append(errors_on_cells(f, exact.state))
        sizes.append(mesh_size(Y))
    strong, means = np.transpose(found)
    assert 0.3 < slope(sizes, strong) < 0.85, f"errors {strong}"
    assert 0.3 < slope(sizes, means) < 0.75, f"errors {means}"


def test_a_kernel_that_jumps_along_the_diagonal_loses_order_in_its_means():
    """b = 1 for z_1 < y_1: its integral is smooth in y, but a cell that z_1 = y_1 crosses counts as a whole or not at all."""

    def volterra(y, z):
        return 2.0 * (z[..., 0] < y[..., 0]) * (1 + z[..., 1])

    points, weights = demo.square_points()
    exact = Continuum((points, np.ones(len(weights))), lambda y, z: _volterra_weights(y, weights, points))
    found, sizes = [], []
    for n in (4, 8, 16):
        Y = irregular(n)
        y, w = state_array(Y, Y.batch(Y.coordinates)), state_array(Y, Y.batch(Y.weights))[:, 0]
        b = volterra(y[:, None], y[None]) * w
        net, initial = from_network(bias(y), b, start(y), Y, steps=3, solver_parameters=RK8)
        found.append(errors_on_cells(scalar(Y, net(initial)), exact.state))
        sizes.append(mesh_size(Y))
    strong, means = np.transpose(found)
    assert slope(sizes, strong) > 0.85, f"errors {strong}"
    assert 0.9 < slope(sizes, means) < 1.75, f"errors {means}"


def _volterra_weights(y, weights, points, n=10):
    """2 int_0^(y_1) int_0^1 l(z) (1 + z_2) dz for the polynomials l that are one at one quadrature point."""
    y = np.broadcast_to(y, (y.shape[0], 1, 2))[:, 0]
    x, w = demo.gauss(n, 0, 1)
    # Legendre polynomials through the points, and their integrals from 0.
    series = np.linalg.inv(np.polynomial.legendre.legvander(2 * x - 1, n - 1))
    antiderivatives = np.polynomial.legendre.legint(series, lbnd=-1) / 2
    integrals = np.polynomial.legendre.legval(2 * y[:, 0] - 1, antiderivatives).T
    return 2 * (integrals[:, :, None] * (w * (1 + x))[None, None, :]).reshape(len(y), -1)


def checkerboard(Y, n):
    """+1 and -1 on cells of an annulus that are neighbours along the circle, shape (nodes,)."""
    angle = np.arctan2(Y.coordinates[:, 1], Y.coordinates[:, 0]) % (2 * np.pi)
    return (-1.0) ** np.floor(angle / (2 * np.pi) * 12 * n)


def oscillating(n, in_y):
    """f_h and its label space, for b_h(y, z) = s_h b with the sign of the cell of y, or of z."""
    Y = label_space("annulus", "DG0", n)
    s = checkerboard(Y, n)
    assert abs(Y.sum(Y.weights @ s)) < 1e-12 * Y.measure
    net = network(Y)
    phi, psi = net.kernel.space_basis.kernel.phi, net.kernel.space_basis.kernel.psi
    factors = [
        Basis(Y, (s[:, None] if signed else 1) * basis.values, "given") for basis, signed in ((phi, in_y), (psi, not in_y))
    ]
    other = ResidualNetwork(Kernel(*factors), layers=Layers(1, T, steps=3), solver_parameters=RK8)
    other.kernel.set(0, net.kernel.get(0))
    other.bias.set(0, net.bias.get(0))
    return Y, Y.values(other(Y.batch(start(Y.coordinates))))[:, 0]


def moments(Y, f):
    """Against three functions: f in the sense of distributions."""
    x, v = Y.coordinates[:, 0], Y.coordinates[:, -1]
    return Y.sum((Y.weights * f) @ np.column_stack([np.ones_like(x), x, np.cos(v)]))


def test_a_kernel_that_oscillates_in_y_has_another_limit_than_its_weak_one():
    """b_h tends to 0 weakly, not pointwise as Theorem 2.2 asks for: f_h does not tend to the solution of b = 0.

    It is bounded, as (A3) of 2.1 asks for.

    It has no strong limit at all; its weak one is the mean of two, f_+ with the kernel b and f_- with -b, whose mean
    both see.
    """
    points, weights = QUADRATURE["annulus"]()
    a, B, n = bias(points), kernel(points[:, None], points[None]) * weights, len(weights)
    sign = np.repeat([1.0, -1.0], n)

    def two(t, f):
        return np.tanh(np.tile(a, 2) - sign * np.tile(B @ ((f[:n] + f[n:]) / 2), 2))

    f = runge_kutta(two, np.tile(start(points), 2), np.array([0, T]), steps=40)[-1]
    tested = np.column_stack([np.ones(n), points[:, 0], np.cos(points[:, 1])])
    averaged = (weights * (f[:n] + f[n:]) / 2) @ tested
    of_weak_limit = (weights * runge_kutta(lambda t, f: np.tanh(a), start(points), np.array([0, T]))[-1]) @ tested
    to_mean, to_weak, strong = [], [], []
    for refinement in (1, 2, 4):
        Y, f_h = oscillating(refinement, in_y=True)
        to_mean.append(np.linalg.norm(moments(Y, f_h) - averaged))
        to_weak.append(np.linalg.norm(moments(Y, f_h) - of_weak_limit))
        no_kernel = start(Y.coordinates) + T * np.tanh(bias(Y.coordinates))
        strong.append(float(Y.sum(Y.weights @ (f_h - no_kernel) ** 2)) ** 0.5)
    assert abs(orders([1, 1 / 2, 1 / 4], to_mean)[-1] - 2) < 0.3, f"errors {to_mean}"
    assert min(to_weak) > 0.1 and to_weak[-1] > 10 * to_mean[-1]
    assert min(strong) > 0.5 and abs(strong[-1] / strong[-2] - 1) < 0.05


def test_a_kernel_that_oscillates_in_z_does_no_harm():
    """Theorem 2.2 does not apply either, but the kernel is integrated against an f that does not oscillate: B_h f -> 0."""
    errors = []
    for refinement in (1, 2, 4):
        Y, f_h = oscillating(refinement, in_y=False)
        no_kernel = start(Y.coordinates) + T * np.tanh(bias(Y.coordinates))
        errors.append(float(Y.sum(Y.weights @ (f_h - no_kernel) ** 2)) ** 0.5)
    assert orders([1, 1 / 2, 1 / 4], errors)[-1] > 0.85, f"errors {errors}"


def test_kernels_without_a_bound_have_another_limit_than_their_pointwise_one():
    """(A3) of 2.1: b_h(y, z) = 1 / |Y_k| for z in the cell Y_k tends to 0 almost everywhere, B_h f is f at a point."""
    errors, to_zero, sizes = [], [], []
    for n in (1, 2, 4):
        Y = label_space("annulus", "DG0", n)
        y = state_array(Y, Y.batch(Y.coordinates))
        k = int(np.argmin(np.linalg.norm(y - [0.7, 0], axis=1)))
        B = np.zeros((Y.size, Y.size))
        B[:, k] = 1.0
        net, initial = from_network(bias(y), B, start(y), Y, steps=4, solver_parameters=RK8)
        f = state_array(Y, net(initial))[:, 0]
        # B_h f is the value of f at the point.
        point = np.array([[0.7, 0.0], *y])
        exact = runge_kutta(lambda t, f: np.tanh(bias(point) - f[0]), start(point), np.array([0, T]), steps=40)[-1]
        errors.append(distance(Y, f, exact[1:]))
        to_zero.append(distance(Y, f, start(y) + T * np.tanh(bias(y))))
        sizes.append(mesh_size(Y))
    assert errors[-1] < 0.5 * errors[0] and min(to_zero) > 5 * errors[-1] and min(to_zero) > 0.5, f"{errors}, {to_zero}"


def graphon(y, z):
    """The probability of an edge between two points of a sphere, in (0, 1)."""
    return 0.5 + 0.4 * (y * z).sum(axis=-1)


#: With this factor sigma is not flat on a sphere, |Y| = 12.6.
GAIN = 0.2


def test_a_graph_drawn_from_a_graphon_converges_in_the_operator_norm_alone():
    """b_h in {0, 1} with the probabilities b: outside of the hypotheses of Theorem 2.2, yet f_h tends to f.

    norm(b_h - b) in L1 and L2 stays, so there is no pointwise limit, of no subsequence; the operator, like the cut
    norm, goes with N^(-1/2), and takes f_h along. For networks on graphs, rates are proved in arXiv 2510.03923 (Yan,
    Kulick, Tang) where graphs are not random: weighted by a smooth graphon, or of a {0, 1}-valued one. For random ones the
    rate is (alpha N)^(-1/2), alpha the density of edges ("Zero-shot size transfer for neural ODEs on sparse random graphs").
    """
    exact = Continuum(QUADRATURE["sphere"](), lambda y, z: GAIN * graphon(y, z))
    sizes, states, apart = [], [], []
    for refinement in (0, 1, 2):
        Y, y, w = cells_of_the_sphere(refinement)
        b, rk4 = graphon(y[:, None], y[None]), {"ts_rk_type": "4"}
        net, initial = from_network(bias(y), GAIN * b * w, start(y), Y, steps=8, solver_parameters=rk4)
        weighted, limit = state_array(Y, net(initial))[:, 0], exact.state(y)
        squares = []
        for seed in range(8):
            net.kernel.set(0, GAIN * drawn(y, seed))
            f = state_array(Y, net(initial))[:, 0]
            squares.append([distance(Y, f, weighted) ** 2, distance(Y, f, limit) ** 2])
        for errors, square in zip((apart, states), np.mean(squares, axis=0)):
            errors.append(square**0.5)
        sizes.append(1 / Y.size)
    assert abs(orders(sizes, apart)[-1] - 0.5) < 0.1, f"errors {apart}"
    assert states[2] < states[1] / 1.5 < states[0] / 3, f"errors {states}"

    sizes, kernels, operators = [], [], []
    for refinement in (1, 2, 3):
        Y, y, w = cells_of_the_sphere(refinement)
        left = np.sqrt(w)[:, None] * (drawn(y, 0) - graphon(y[:, None], y[None])) * np.sqrt(w)
        kernels.append(np.linalg.norm(left))
        operators.append(float(svds(left, k=1, return_singular_vectors=False, rng=np.random.default_rng(0))[0]))
        sizes.append(1 / Y.size)
    assert abs(slope(sizes, operators) - 0.5) < 0.06, f"errors {operators}"
    # The L2 norm of the difference has a limit that is not 0: the root of int int b (1 - b).
    points, weights = QUADRATURE["sphere"]()
    W = graphon(points[:, None], points[None])
    np.testing.assert_allclose(kernels[1:], (weights @ (W * (1 - W)) @ weights) ** 0.5, rtol=0.03)


def cells_of_the_sphere(refinement):
    """Label space, midpoints and measures in the order of `node_numbers`."""
    Y = label_space("sphere", "DG0", refinement)
    return Y, state_array(Y, Y.batch(Y.coordinates)), state_array(Y, Y.batch(Y.weights))[:, 0]


def drawn(y, seed):
    """A graph: an edge from i to j with the probability b(y_i, y_j)."""
    return (np.random.default_rng([seed, len(y)]).random((len(y), len(y))) < graphon(y[:, None], y[None])).astype(float)
