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
about that matrix. The paper has D T there, which is B on f in the span of the psi_l alone: that D T >= 0 is not enough,
since B_s >= 0 forces N(B) = N(B^T), thus R(B) = R(B^T), and T to be orthogonal.

Nor is phi_l = psi_l for a symmetric B, unless B >= 0: for a negative eigenvalue they differ in sign, and T has a -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fem_resnet.arguments import number
from fem_resnet.basis import Basis
from fem_resnet.kernel import LowRankKernel

__all__ = ["SingularSystem", "singular_system", "weighted_gram"]

#: Nodes a block, so that products of basis functions never exist as whole arrays.
_BLOCK = 16_384

#: Principal angles below a millionth are none: their cosine is one to this.
_SAME_DIRECTION = 1e-12


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
    """

    kernel: LowRankKernel
    values: np.ndarray
    left: np.ndarray
    right: np.ndarray
    gram: np.ndarray

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
        keep = lengths > _SAME_DIRECTION
        P = np.sqrt(lengths[keep])[:, None] * turn[:, keep].T
        B = (P[:, :r] * self.values) @ P[:, r:].T
        return np.linalg.eigvalsh((B + B.T) / 2)

    @property
    def symmetric_minimum(self) -> float:
        """inf (B f, f) over |f| = 1: 0 at most where the phi_k and psi_l do not span all of V."""
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
        return self.left.T @ self.kernel.phi.project(u)

    def right_coefficients(self, f: np.ndarray) -> np.ndarray:
        """(psi_l, f), shape (r, samples), for f at the owned nodes. Collective."""
        return self.right.T @ self.kernel.psi.project(f)

    def left_values(self, c: np.ndarray) -> np.ndarray:
        """`sum_k c_k phi_k` at the owned nodes, shape (nodes, samples), for c of shape (r, samples)."""
        return self.kernel.phi.values @ (self.left @ c)

    def right_values(self, c: np.ndarray) -> np.ndarray:
        """`sum_l c_l psi_l` at the owned nodes."""
        return self.kernel.psi.values @ (self.right @ c)

    def null_part(self, f: np.ndarray) -> np.ndarray:
        """The part of f in N(B), `f - sum_l (psi_l, f) psi_l`, shape (nodes, samples). Collective."""
        return f - self.right_values(self.right_coefficients(f))

    def apply(self, f: np.ndarray) -> np.ndarray:
        """`B f` at the owned nodes. Collective."""
        return self.left_values(self.values[:, None] * self.right_coefficients(f))

    def least_norm(self, a: np.ndarray) -> np.ndarray:
        """The f of least norm for which B f is the part of a in R(B), shape (nodes, samples). Collective."""
        return self.right_values(self.left_coefficients(a) / self.values[:, None])


def singular_system(kernel: LowRankKernel, beta: np.ndarray, tolerance: float = 1e-12) -> SingularSystem:
    """The singular system of B, without an array of nodes x nodes. Collective.

    Parameters
    ----------
    kernel
        The bases, both on one label domain.
    beta
        Coefficients, shape (rank of phi, rank of psi).
    tolerance
        Singular values up to this part of the largest are zero.

    Raises
    ------
    ValueError
        If the bases live on different label domains.

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
    if kernel.phi.Y is not kernel.psi.Y:
        raise ValueError(f"kernel: one label domain is wanted, {kernel.phi.Y!r} and {kernel.psi.Y!r} were given")
    tolerance = number("tolerance", tolerance, least=0)
    left, values, right = kernel.svd(beta)
    keep = values > tolerance * values[0]
    left, right = left[:, keep], right[:, keep]
    between = kernel.phi.gram if kernel.phi is kernel.psi else kernel.phi.project(kernel.psi.values)
    return SingularSystem(kernel, values[keep], left, right, left.T @ between @ right)


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
