"""Regularisers: values against integrals written out, gradients by Taylor tests, sums."""

import firedrake as fd
import numpy as np
import pytest
from firedrake import dx, grad, inner
from helpers import label_space, laplace
from mpi4py import MPI
from problems import TIMES, gathered, learning_problem, network, taping
from pyadjoint import ReducedFunctional

from fem_resnet.learning.regulariser import Regulariser, smooth_in_space, smooth_in_time, tikhonov

on_ranks = pytest.mark.parallel([1, 2, 3])
TAU = np.diff(TIMES)
KINDS = {"Tikhonov": tikhonov, "smooth in y": smooth_in_space, "smooth in t": smooth_in_time}
#: A domain whose measure is not one, with a bias at the nodes and in a basis.
NETWORKS = [("disk", "nodes"), ("disk", "basis"), ("annulus", "nodes"), ("annulus", "basis")]


def bias_functions(net):
    """a on each layer, as Functions."""
    functions = []
    for layer in range(net.layers):
        a = fd.Function(net.Y.V)
        a.dat.data_wo[...] = net.bias.space_basis.expand(net.bias.get(layer))
        functions.append(a)
    return functions


@on_ranks
@pytest.mark.parametrize("domain, bias", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_regulariser(domain, bias, kind, taylor):
    problem = learning_problem(network(domain, "CG1" if domain == "disk" else "CG2", bias=bias))
    with taping():
        J = KINDS[kind](0.7)(problem.parameters)
    rf = ReducedFunctional(J, problem.controls())
    comm = problem.net.Y.comm
    largest = max(comm.allreduce(abs(f.dat.data_ro).max(initial=0), op=MPI.MAX) for f in problem.functions)
    taylor(rf, problem.functions, [f._ad_mul(float(1 / largest)) for f in problem.functions], "regulariser", kind)


@on_ranks
@pytest.mark.parametrize("domain, bias", NETWORKS)
def test_smoothness_in_y_is_the_integral_of_the_squared_gradient(domain, bias):
    net = network(domain, "CG1" if domain == "disk" else "CG2", bias=bias)
    expected = sum(tau * fd.assemble(inner(grad(a), grad(a)) * dx) for tau, a in zip(TAU, bias_functions(net))) / 2
    # the eigenvalues of a Laplace basis are its Gram matrix of gradients, up to the eigensolver's tolerance
    assert float(smooth_in_space(1.0)([net.bias])) == pytest.approx(expected, rel=1e-9)


@on_ranks
def test_smoothness_in_y_and_z_of_a_kernel():
    net = network("disk", "CG1")
    kernel, w = net.kernel.space_basis.kernel, gathered(net.Y, net.Y.weights)
    values = [gathered(net.Y, basis.values) for basis in (kernel.phi, kernel.psi)]
    slopes = []
    for basis in (kernel.phi, kernel.psi):
        p = [basis.function(c) for c in np.eye(basis.rank)]
        slopes.append(np.array([[fd.assemble(inner(grad(u), grad(v)) * dx) for v in p] for u in p]))
    expected = 0.0
    for tau, beta in zip(TAU, (net.kernel.get(k) for k in range(net.layers))):
        in_z, in_y = beta @ values[1].T, values[0] @ beta
        expected += tau / 2 * np.einsum("iz,ij,jz,z->", in_z, slopes[0], in_z, w)
        expected += tau / 2 * np.einsum("yi,ij,yj,y->", in_y, slopes[1], in_y, w)
    assert float(smooth_in_space(1.0)([net.kernel])) == pytest.approx(expected, rel=1e-9)


@on_ranks
def test_smoothness_in_t_is_the_squared_difference_over_the_distance_of_layers():
    net = network("disk", "CG1")
    a = [net.bias.get(k) for k in range(net.layers)]
    expected = sum(net.Y.sum(net.Y.weights @ (a[k + 1] - a[k]) ** 2) / (TAU[k] + TAU[k + 1]) for k in range(net.layers - 1))
    assert float(smooth_in_time(1.0)([net.bias])) == pytest.approx(float(expected), rel=1e-13)
    for k in range(net.layers):
        net.bias.set(k, a[0])
    assert float(smooth_in_time(1.0)([net.bias])) == 0.0


def test_smoothness_leaves_the_head_alone():
    problem = learning_problem(network("disk", "CG1"))
    for kind in (smooth_in_space, smooth_in_time):
        assert float(kind(1.0)(problem.head.parameters)) == 0.0


def test_regularisers_add_up():
    net = network("disk", "CG1")
    both = tikhonov(0.3) + smooth_in_time(2.0)
    assert isinstance(both, Regulariser)
    expected = float(tikhonov(0.3)(net.parameters)) + float(smooth_in_time(2.0)(net.parameters))
    assert float(both(net.parameters)) == pytest.approx(expected, rel=1e-14)
    with pytest.raises(TypeError):
        tikhonov(0.3) + 1


def test_discontinuous_functions_have_no_gradient():
    net = network("disk", "DG0")
    with pytest.raises(ValueError, match="Y: expected continuous functions, which have gradients, got .*; use CG"):
        smooth_in_space(1.0)([net.bias])
    assert laplace("disk", "DG0", 4).stiffness.shape == (4, 4)  # eigenfunctions know theirs


def test_apply_stiffness_is_that_of_the_form():
    Y = label_space("square", "CG3")
    x, y = fd.SpatialCoordinate(Y.V.mesh())
    u = fd.Function(Y.V).interpolate(x**2 * y)
    # exact for a polynomial of this degree: int |grad x^2 y|^2 = int 4 x^2 y^2 + x^4
    assert Y.sum(u.dat.data_ro @ Y.apply_stiffness(Y.values(u))[:, 0]) == pytest.approx(4 / 9 + 1 / 5, rel=1e-12)
