"""Low-rank kernels against the dense kernel b(y, z) = sum_ij phi_i(y) beta_ij psi_j(z), in the label measure."""

import numpy as np
import pytest
from helpers import label_space, laplace, smooth
from numpy.testing import assert_allclose
from problems import polynomials

from fem_resnet.label_domain.basis import cell_indicators
from fem_resnet.label_domain.points import class_space
from fem_resnet.parameters.kernel import LowRankKernel

on_ranks = pytest.mark.parallel([1, 2, 3])
#: For tests of messages, and of code that sees no partition: once on several ranks is enough.
on_two_ranks = pytest.mark.parallel([1, 2])

# Sums of some hundred numbers of size one.
ROUND_OFF = 1e-13

#: (phi, psi) of equal and of different rank, orthonormal or not, on one label space and on two.
PAIRS = {
    "laplace": lambda: (laplace("disk", "DG0", 4),) * 2,
    "different ranks": lambda: (laplace("sphere", "CG1", 4), polynomials(laplace("sphere", "CG1", 4).Y)),
    "not orthonormal": lambda: (polynomials(label_space("square", "CG3")),) * 2,
    "cells": lambda: (cell_indicators(label_space("disk", "DG0")),) * 2,
    "onto classes": lambda: (cell_indicators(class_space(5)), polynomials(label_space("disk", "CG1"))),
    "from classes": lambda: (polynomials(label_space("disk", "CG1")), cell_indicators(class_space(2))),
    "rank one": lambda: (laplace("disk", "CG1", 1), laplace("disk", "CG1", 1)),
}


@pytest.fixture(params=PAIRS)
def kernel(request):
    return LowRankKernel(*PAIRS[request.param]())


def _all(Y, values):
    """Rows of all ranks, one below the other."""
    return np.concatenate(Y.comm.allgather(values))


def _dense(kernel, beta):
    """b(y, z) at all nodes, with the weights of y and of z."""
    phi, psi = kernel.phi, kernel.psi
    b = np.einsum("yi,ij,zj->yz", _all(phi.Y, phi.values), beta, _all(psi.Y, psi.values))
    return b, _all(phi.Y, phi.Y.weights), _all(psi.Y, psi.Y.weights)


@on_ranks
def test_apply_is_the_integral_over_z_of_the_dense_kernel(kernel, rng):
    beta, f = rng.normal(size=kernel.shape), smooth(kernel.psi.Y)
    b, _, w_z = _dense(kernel, beta)
    exact = np.einsum("yz,z,zs->ys", b, w_z, _all(kernel.psi.Y, f))
    found = _all(kernel.phi.Y, kernel.apply(beta, f))
    assert_allclose(found, exact, rtol=0, atol=ROUND_OFF * np.abs(exact).max())


@on_ranks
def test_transpose_is_the_integral_over_y_of_the_dense_kernel(kernel, rng):
    beta, r = rng.normal(size=kernel.shape), smooth(kernel.phi.Y)
    b, w_y, _ = _dense(kernel, beta)
    exact = np.einsum("yz,y,ys->zs", b, w_y, _all(kernel.phi.Y, r))
    found = _all(kernel.psi.Y, kernel.transpose(beta, r))
    assert_allclose(found, exact, rtol=0, atol=ROUND_OFF * np.abs(exact).max())


@on_ranks
def test_transpose_is_the_adjoint_in_the_label_measure(kernel, rng):
    """(B f, r) = (f, B^T r), the left side in L2(Y), the right side in L2(Z)."""
    Y, Z = kernel.phi.Y, kernel.psi.Y
    beta, f, r = rng.normal(size=kernel.shape), Z.batch(smooth(Z)), Y.batch(smooth(Y, seed=1))
    left = Y.inner(Y.batch(kernel.apply(beta, Z.values(f))), r)
    right = Z.inner(f, Z.batch(kernel.transpose(beta, Y.values(r))))
    bound = kernel.norm(beta) * Z.norm(f) * Y.norm(r)
    assert abs(left - right) < ROUND_OFF * bound, f"(B f, r) = {left}, (f, B^T r) = {right}"
    assert abs(left) > 1e-3 * bound, "the test says nothing where both sides vanish"


@on_two_ranks
def test_apply_and_transpose_are_linear_in_beta(kernel, rng):
    beta, gamma = rng.normal(size=(2, *kernel.shape))
    f, r = smooth(kernel.psi.Y), smooth(kernel.phi.Y)
    for verb, x in ((kernel.apply, f), (kernel.transpose, r)):
        assert_allclose(verb(beta - 2 * gamma, x), verb(beta, x) - 2 * verb(gamma, x), rtol=0, atol=1e-11)


@on_ranks
def test_norm_is_that_of_the_dense_kernel_in_the_measure_of_y_and_z(kernel, rng):
    beta = rng.normal(size=kernel.shape)
    b, w_y, w_z = _dense(kernel, beta)
    exact = np.sqrt(np.einsum("y,yz,z->", w_y, b**2, w_z))
    # Non-orthogonal bases lose digits to cancellation: the condition of the Gram matrices here is below 100.
    assert abs(kernel.norm(beta) / exact - 1) < 1e-12


@on_two_ranks
def test_norm_of_zero_is_zero(kernel):
    assert kernel.norm(np.zeros(kernel.shape)) == 0.0


def _singular_values(kernel, beta):
    """The norm of B: L2(Z) -> L2(Y)."""
    b, w_y, w_z = _dense(kernel, beta)
    return np.linalg.svd(np.sqrt(w_y)[:, None] * b * np.sqrt(w_z), compute_uv=False)


@on_ranks
def test_operator_norm_is_bounded_by_the_norm_of_b_and_equals_it_at_rank_one_only(kernel, rng):
    """errata, proof of Thm 3.1: `equals norm(b, L2)` is printed; that is the Hilbert-Schmidt norm."""
    beta = rng.normal(size=kernel.shape)
    singular_values = _singular_values(kernel, beta)
    assert abs(kernel.norm(beta) / np.linalg.norm(singular_values) - 1) < 1e-12
    if min(kernel.shape) > 1:
        # Far more than round-off apart.
        assert singular_values[0] < (1 - 1e-6) * kernel.norm(beta), "the printed form would hold"
    rank_one = np.outer(rng.normal(size=kernel.shape[0]), rng.normal(size=kernel.shape[1]))
    assert abs(_singular_values(kernel, rank_one)[0] / kernel.norm(rank_one) - 1) < 1e-12


@on_ranks
def test_operator_norm_is_the_largest_singular_value(kernel, rng):
    """Proof of Theorem 3.1: the operator norm is at most the Hilbert-Schmidt norm, which the proof uses in its place."""
    beta = rng.normal(size=kernel.shape)
    singular_values = _singular_values(kernel, beta)
    assert abs(kernel.norm(beta, "operator") / singular_values[0] - 1) < 1e-12
    rank_one = np.outer(rng.normal(size=kernel.shape[0]), rng.normal(size=kernel.shape[1]))
    assert abs(kernel.norm(rank_one, "operator") / kernel.norm(rank_one, "hs") - 1) < 1e-12
    if min(kernel.shape) > 1:
        assert kernel.norm(beta, "operator") < (1 - 1e-6) * kernel.norm(beta, "hs")


@on_ranks
def test_svd_is_that_of_the_dense_kernel(kernel, rng):
    beta = rng.normal(size=kernel.shape)
    left, values, right = kernel.svd(beta)
    count = min(kernel.shape)
    assert_allclose(values, _singular_values(kernel, beta)[:count], rtol=1e-12, atol=1e-12)
    assert_allclose(left @ np.diag(values) @ right.T, beta, rtol=0, atol=1e-11)
    for basis, coefficients in ((kernel.phi, left), (kernel.psi, right)):
        assert_allclose(coefficients.T @ basis.gram @ coefficients, np.eye(count), rtol=0, atol=1e-11)


@on_ranks
def test_supremum_of_b_is_found_in_blocks_of_nodes(kernel, rng, monkeypatch):
    monkeypatch.setattr("fem_resnet.parameters.kernel._PAIRED", 7)
    beta = rng.normal(size=kernel.shape)
    exact = np.abs(_dense(kernel, beta)[0]).max()
    assert kernel.supremum_is_exact and abs(kernel.norm(beta, "linf") / exact - 1) < 1e-13
    assert kernel.norm(-beta, "linf") == kernel.norm(beta, "linf")


@on_ranks
def test_on_many_nodes_the_supremum_is_an_upper_bound_which_says_so(kernel, rng, monkeypatch, caplog):
    """The upper bound by Cauchy and Schwarz is exact at rank one."""
    monkeypatch.setattr("fem_resnet.parameters.kernel._TOGETHER", 5)
    beta = rng.normal(size=kernel.shape)
    rank_one = np.outer(rng.normal(size=kernel.shape[0]), rng.normal(size=kernel.shape[1]))
    exact, exact_one = kernel.norm(beta, "linf"), kernel.norm(rank_one, "linf")
    monkeypatch.setattr("fem_resnet.parameters.kernel.EXACT_SUPREMUM", 1)
    bound = kernel.norm(beta, "linf")
    assert not kernel.supremum_is_exact
    assert exact * (1 - 1e-12) <= bound
    assert abs(kernel.norm(rank_one, "linf") / exact_one - 1) < 1e-12
    if kernel.phi.Y.comm.rank == 0:
        assert "upper bound" in caplog.text


@on_two_ranks
def test_refuses_norms_that_it_does_not_know(kernel):
    with pytest.raises(ValueError, match=r"^kind: expected one of 'hs', 'operator', 'linf', got 'l1'$"):
        kernel.norm(np.zeros(kernel.shape), "l1")


@on_ranks
def test_dual_represents_the_inner_product_of_dense_kernels(kernel, rng):
    beta, gamma = rng.normal(size=(2, *kernel.shape))
    (b, w_y, w_z), (c, _, _) = _dense(kernel, beta), _dense(kernel, gamma)
    exact = np.einsum("y,yz,yz,z->", w_y, b, c, w_z)
    bound = kernel.norm(beta) * kernel.norm(gamma)
    assert abs(np.sum(kernel.functional(beta) * gamma) - exact) < 1e-12 * bound
    assert abs(np.sum(kernel.functional(gamma) * beta) - exact) < 1e-12 * bound


@on_two_ranks
def test_primal_inverts_dual(kernel, rng):
    beta = rng.normal(size=kernel.shape)
    # The condition of both Gram matrices together is below 1e4.
    assert_allclose(kernel.riesz(kernel.functional(beta)), beta, rtol=0, atol=1e-11)
    assert_allclose(kernel.functional(kernel.riesz(beta)), beta, rtol=0, atol=1e-11)


@on_ranks
def test_shape_is_rank_of_phi_by_rank_of_psi():
    kernel = LowRankKernel(*PAIRS["onto classes"]())
    assert kernel.shape == (5, 3) == (kernel.phi.rank, kernel.psi.rank)


@on_two_ranks
@pytest.mark.parametrize("name", ["phi", "psi"])
@pytest.mark.parametrize("other", [np.ones((3, 2)), None, "laplace"], ids=["array", "None", "name"])
def test_refuses_what_is_no_basis(name, other):
    bases = {"phi": laplace("disk", "CG1", 1), "psi": laplace("disk", "CG1", 1)} | {name: other}
    with pytest.raises(TypeError, match=rf"^{name}: expected a Basis, got {type(other).__name__}; laplace_basis"):
        LowRankKernel(**bases)
