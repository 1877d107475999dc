"""Singular system and spectrum of B, from matrices of the size of the rank: the tools of 3.3.

With orthonormal phi_l and psi_l in L2(Y), Phi and Psi their values at the nodes, D = diag(mu_1, .., mu_r) > 0,

    B f = sum_l mu_l (psi_l, f) phi_l,        T = ((phi_k, psi_l)),        B = Phi D Psi^T M.

On R(B), in the coordinates u_k = (phi_k, u), B is the matrix D T^T. So the spectrum of B but for 0 is that of D T^T; it
is that of D T too, since (T D)^T = D T^T and D (T D) D^-1 = D T. The 0 belongs to N(B), which has all dimensions of
L2(Y) but r.

On the span of all phi_k and psi_l, with K = [[I, T], [T^T, I]] their Gram matrix and P its root, P^T P = K, P = [P_Phi,
P_Psi],

    B = P_Phi D P_Psi^T,        B_s = (B + B^T) / 2,

matrices of size 2r at most in an orthonormal basis; on the rest both are 0. (B f, f) >= 0 for all f is a statement
about that matrix. It is about D T too, as the paper says, where the psi_l are complete in L2(Y), those of mu_l = 0 among them.
Here, and in Theorem 3.4, D T has the r functions of mu_l > 0 alone, and sees f in their span alone: of such a D T >= 0 there
may be other f with (B f, f) < 0. For B_s >= 0 forces N(B) = N(B^T), thus R(B) = R(B^T), and T to be orthogonal.

Nor is phi_l = psi_l for a symmetric B, unless B >= 0: for a negative eigenvalue they differ in sign, and T has a -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg

from fem_resnet.arguments import instance, number, real_array
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.ranks import same

__all__ = ["SingularSystem", "columns", "singular_system", "weighted_gram"]

#: Nodes a block, so that products of basis functions never exist as whole arrays.
_BLOCK = 16_384

#: Round-off of a computed matrix or decomposition of n rows, in parts of its norm and of n.
_ROUND_OFF = 8 * np.finfo(float).eps


@dataclass(frozen=True)
class SingularSystem:
    """`B f = sum_l mu_l (psi_l, f) phi_l`, l = 1 .. r, as in 3.3. Get one from `singular_system`.

    Attributes
    ----------
    kernel : LowRankKernel
        The bases that the coefficients belong to; arguments and values of B live on one label domain.
    values : numpy.ndarray
        mu_l > 0, falling, shape (r,); in the unit of B.
    left, right : numpy.ndarray
        Coefficients of the phi_l, shape (rank of the basis phi, r), and of the psi_l in the basis psi.
    gram : numpy.ndarray
        T = ((phi_k, psi_l)), shape (r, r), the same on every rank.
    whole : numpy.ndarray
        B on the span of the basis phi, in orthonormal coordinates, with what was cut as zero: shape (rank of phi, rank of phi).
    error : float
        How far round-off has left `whole`, and mu_l, from what they stand for, in the operator norm and the unit of B.
    cut : float
        The largest singular value that was taken for 0.
    """

    kernel: LowRankKernel
    values: np.ndarray
    left: np.ndarray
    right: np.ndarray
    gram: np.ndarray
    whole: np.ndarray
    error: float
    cut: float

    @property
    def rank(self) -> int:
        """r, the dimension of R(B)."""
        return self.values.size

    @property
    def matrix(self) -> np.ndarray:
        """D T^T: B on R(B) in the coordinates (phi_k, u); the matrix of (3.5a), linearised, up to sigma'(0)."""
        return self.values[:, None] * self.gram.T

    @cached_property
    def eigenvalues(self) -> np.ndarray:
        """Spectrum of B on R(B), shape (r,), complex, real parts rising; with 0 if T is singular."""
        root = np.sqrt(self.values)
        found = np.linalg.eigvals(root[:, None] * self.gram.T * root).astype(complex)
        return found[np.lexsort((found.imag, found.real))]

    @cached_property
    def symmetric_eigenvalues(self) -> np.ndarray:
        """Spectrum of B_s on the span of all phi_k and psi_l, rising, shape (dimension of that span,)."""
        r = self.rank
        K = np.block([[np.eye(r), self.gram], [self.gram.T, np.eye(r)]])
        lengths, turn = np.linalg.eigh(K)
        # Where B_s >= 0 directions that are one but for round-off must not make it indefinite; shorter ones change
        # (B v, v) by mu_1 / 4 times this.
        keep = lengths > 2 * r * _ROUND_OFF
        P = np.sqrt(lengths[keep])[:, None] * turn[:, keep].T
        B = (P[:, :r] * self.values) @ P[:, r:].T
        return np.linalg.eigvalsh((B + B.T) / 2)

    @cached_property
    def squared(self) -> SingularSystem:
        """That of B B^T, on the span of the phi_l: values mu_l^2, and T = id."""
        kernel = LowRankKernel(self.kernel.phi, self.kernel.phi)
        size = self.values.max(initial=0.0)
        roots = self.left * self.values
        R = np.linalg.cholesky(self.kernel.phi.gram).T @ roots
        return SingularSystem(
            kernel, self.values**2, self.left, self.left, np.eye(self.rank), R @ R.T, 2 * size * self.error, self.cut**2
        )

    @property
    def symmetric_minimum(self) -> float:
        """Inf (B f, f) over |f| = 1: 0 at most where the phi_k and psi_l do not span all of V."""
        spanned = self.symmetric_eigenvalues.size == self.kernel.phi.Y.size
        return float(min(self.symmetric_eigenvalues.min(initial=np.inf), np.inf if spanned else 0.0))

    @cached_property
    def gram_minimum(self) -> float:
        """Smallest singular value of T, the cosine of the largest angle between R(B) and R(B^T)."""
        return float(np.linalg.svd(self.gram, compute_uv=False).min(initial=1.0))

    @cached_property
    def product_minimum(self) -> float:
        """Smallest eigenvalue of the symmetric part of D T: (b) of Theorem 3.4 asks that it is positive."""
        DT = self.values[:, None] * self.gram
        return float(np.linalg.eigvalsh((DT + DT.T) / 2).min(initial=np.inf))

    @property
    def is_symmetric(self) -> bool:
        """Whether B = B^T, up to 1e-7 |B| in the Hilbert-Schmidt norm: the root of round-off."""
        # |B - B^T|^2 = 2 (|B|^2 - tr(B B)), and tr(B B) is that of the square of D T^T.
        size = self.values @ self.values
        return bool(2 * (size - np.sum(self.matrix * self.matrix.T)) <= 1e-14 * size)

    def left_coefficients(self, u: np.ndarray) -> np.ndarray:
        """(phi_k, u), shape (r, samples), for u at the owned nodes, shape (nodes, samples). Collective."""
        return self.left.T @ self.kernel.phi.project(columns(self.kernel.phi.Y, "u", u))

    def right_coefficients(self, f: np.ndarray) -> np.ndarray:
        """(psi_l, f), shape (r, samples), for f at the owned nodes. Collective."""
        return self.right.T @ self.kernel.psi.project(columns(self.kernel.psi.Y, "f", f))

    def left_values(self, c: np.ndarray) -> np.ndarray:
        """`sum_k c_k phi_k` at the owned nodes, shape (nodes, samples), for c of shape (r, samples)."""
        return self.kernel.phi.values @ (self.left @ self._coordinates(c))

    def right_values(self, c: np.ndarray) -> np.ndarray:
        """`sum_l c_l psi_l` at the owned nodes."""
        return self.kernel.psi.values @ (self.right @ self._coordinates(c))

    def _coordinates(self, c: np.ndarray) -> np.ndarray:
        return real_array("c", c, (self.rank, "samples"), finite=False)

    def weighted(self, c: np.ndarray) -> np.ndarray:
        """((psi_l, c phi_k)), shape (r, r), for values c at the owned nodes, shape (nodes,): T^T for c = 1. Collective."""
        c = real_array("c", c, (self.kernel.phi.Y.nodes,), finite=False)
        return self.right.T @ weighted_gram(self.kernel.psi, c, self.kernel.phi) @ self.left

    def null_part(self, f: np.ndarray) -> np.ndarray:
        """The part of f in N(B), `f - sum_l (psi_l, f) psi_l`, shape (nodes, samples). Collective."""
        return f - self.right_values(self.right_coefficients(f))

    def apply(self, f: np.ndarray) -> np.ndarray:
        """`B f` at the owned nodes. Collective."""
        return self.left_values(self.values[:, None] * self.right_coefficients(f))

    def least_norm(self, a: np.ndarray) -> np.ndarray:
        """The f of least norm for which B f is the part of a in R(B), shape (nodes, samples). Collective."""
        a = columns(self.kernel.phi.Y, "a", a)
        return self.right_values(self.left_coefficients(a) / self.values[:, None])


def singular_system(kernel: LowRankKernel, beta: np.ndarray, tolerance: float = 0.0) -> SingularSystem:
    """The singular system of B, without an array of nodes x nodes. Collective.

    Parameters
    ----------
    kernel
        The bases, both on one label domain.
    beta
        Coefficients, shape (rank of phi, rank of psi).
    tolerance
        Singular values up to this part of the largest are zero, and those that round-off does not tell from zero.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind, or the bases live on different label domains; on all ranks alike.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 2)
    >>> B = singular_system(LowRankKernel(phi, phi), np.array([[0.0, 2.0], [-2.0, 0.0]]))
    >>> B.values.round(12).tolist(), B.eigenvalues.imag.round(12).tolist()
    ([2.0, 2.0], [-2.0, 2.0])
    >>> bool(np.abs(B.symmetric_eigenvalues).max() < 1e-12)
    True
    """
    same(instance("kernel", kernel, LowRankKernel).phi.Y.comm, beta=beta, tolerance=tolerance)
    if kernel.phi.Y is not kernel.psi.Y:
        raise ValueError(f"kernel: expected one label domain, got {kernel.phi.Y!r} and {kernel.psi.Y!r}")
    tolerance = number("tolerance", tolerance, least=0)
    beta = real_array("beta", beta, kernel.shape)
    left, values, right = kernel.svd(beta)
    between = kernel.phi.gram if kernel.phi is kernel.psi else kernel.phi.project(kernel.psi.values)
    R, R_psi = (np.linalg.cholesky(basis.gram).T for basis in (kernel.phi, kernel.psi))
    # B = Phi beta Psi^T M maps the coordinates R c of Phi c to R beta (Psi, Phi) c.
    whole = scipy.linalg.solve_triangular(R, between @ beta.T @ R.T, trans="T").T
    sizes = [np.linalg.norm(matrix, 2) for matrix in (R, beta, R_psi)]
    conditions = [np.linalg.cond(matrix) for matrix in (R, R_psi)]
    of_product = max(kernel.shape) * _ROUND_OFF * np.prod(sizes)
    # Bases that are orthonormal up to round-off alone change mu_l in proportion, and none from 0.
    error = of_product + max(kernel.shape) * _ROUND_OFF * np.prod(conditions) * values[0]
    keep = values > max(tolerance * values[0], of_product)
    left, right = left[:, keep], right[:, keep]
    return SingularSystem(
        kernel, values[keep], left, right, left.T @ between @ right, whole, float(error), float(values[~keep].max(initial=0.0))
    )


def columns(Y: LabelSpace, name: str, values: np.ndarray) -> np.ndarray:
    """Values at the owned nodes from outside, shape (nodes, samples).

    Searches ask for them many times, and see for themselves whether they are finite; so it is not collective.
    """
    return real_array(name, values, (Y.nodes, "samples"), finite=False)


def weighted_gram(first: Basis, c: np.ndarray, second: Basis) -> np.ndarray:
    """`((p_i, c q_j))` for the functions p_i and q_j of two bases, shape (rank, rank), on every rank. Collective.

    Parameters
    ----------
    first, second
        Bases on one label domain.
    c
        Values at the owned nodes, shape (nodes,).
    """
    total = np.zeros((first.rank, second.rank))
    weights = c * first.Y.weights
    for start in range(0, weights.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        total += first.values[part].T @ (weights[part, None] * second.values[part])
    return first.Y.sum(total)
