"""Singular systems, spectra, Theorem 3.4 and what simulations say of it, on a disk, an annulus and a sphere."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from fem_resnet import Basis, LowRankKernel, singular_system
from fem_resnet.points import class_space
from helpers import label_space, laplace, smooth
from problems import polynomials

on_ranks = pytest.mark.parallel([1, 2, 3])

#: None has the measure one: 3, 2.6 and 12 or so.
DOMAINS = ("disk", "annulus", "sphere")
each_domain = pytest.mark.parametrize("domain", DOMAINS)


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
    """3.3: mu_l, the spectrum of B on R(B), that of B_s on all of L2(Y) but for zeros."""
    for kernel in kernels(domain):
        beta = rng.normal(size=kernel.shape)
        B, system = dense(kernel, beta), singular_system(kernel, beta)
        r = system.rank
        assert_allclose(system.values, np.linalg.svd(B, compute_uv=False)[:r], rtol=1e-11)
        exact = np.linalg.eigvals(B)
        exact = np.sort_complex(exact[np.argsort(-np.abs(exact))[:r]])
        # Eigenvalues of matrices that are not normal: some digits less.
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
def test_D_T_positive_definite_does_not_make_the_symmetric_part_of_B_positive(domain):
    """3.3 prints: (B f, f) >= 0 for all f if and only if D T is; D T sees f in the span of the psi_l alone."""
    phi = laplace(domain, "CG1", 5 if domain == "annulus" else 4)
    first, second = Basis(phi.Y, phi.values[:, :2], "given"), None
    turned = phi.values[:, :2] * 0.8 + phi.values[:, 2:4] * 0.6
    second = Basis(phi.Y, turned, "given")
    system = singular_system(LowRankKernel(first, second), np.eye(2))
    assert_allclose(system.product_minimum, 0.8)
    # B on span(phi, psi) is [[0.8, 0.6], [0, 0]], twice: (0.8 - 1) / 2.
    assert_allclose(system.symmetric_minimum, -0.1)
    assert_allclose(system.gram_minimum, 0.8)


@on_ranks
def test_a_kernel_on_all_of_a_small_space_may_be_positive_definite():
    """Where phi and psi span all of V, inf (B f, f) is not 0."""
    Y = class_space(3)
    everything = Basis(Y, np.eye(3)[Y.numbers], "given")
    system = singular_system(LowRankKernel(everything, everything), np.diag([1.0, 2.0, 3.0]) + [[0, 1, 0], [-1, 0, 0], [0, 0, 0]])
    assert_allclose(system.symmetric_minimum, 1.0)
    assert singular_system(LowRankKernel(everything, everything), np.zeros((3, 3))).rank == 0


@on_ranks
def test_refuses_a_kernel_between_two_label_domains():
    kernel = LowRankKernel(laplace("disk", "CG1", 4), laplace("sphere", "CG1", 4))
    with pytest.raises(ValueError, match=r"^kernel: one label domain is wanted, LabelSpace\("):
        singular_system(kernel, np.eye(4))
