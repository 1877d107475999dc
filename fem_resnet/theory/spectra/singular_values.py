"""The singular system and the spectrum of B, from matrices of the size of its rank: section 3.3.

Let phi_l and psi_l be orthonormal in L2(Y), let Phi and Psi be their values at the nodes, and D = diag(mu_1, .., mu_r) > 0.

    B f = sum_l mu_l (psi_l, f) phi_l,        T = ((phi_k, psi_l)),        B = Phi D Psi^T M.

On R(B), in the coordinates u_k = (phi_k, u), B is the matrix D T^T. So the spectrum of B without 0 is the spectrum of D
T^T, which is also the spectrum of D T, since (T D)^T = D T^T and D (T D) D^-1 = D T. The eigenvalue 0 belongs to N(B),
whose codimension in L2(Y) is r.

Consider the span of all phi_k and psi_l. Let K = [[I, T], [T^T, I]] be their Gram matrix, and P = [P_Phi, P_Psi] a root of
it, P^T P = K. In an orthonormal basis of the span,

    B = P_Phi D P_Psi^T,        B_s = (B + B^T) / 2

are matrices of size 2r at most. On the orthogonal complement both are 0. So (B f, f) >= 0 for all f is a statement about the
second matrix. The paper states it for D T, which is right if the psi_l are complete in L2(Y), including those with mu_l = 0.
Here and in Theorem 3.4 D T has only the r functions with mu_l > 0. Then D T >= 0 is a statement about f in their span, and
(B f, f) < 0 is possible for other f. For B_s >= 0 implies N(B) = N(B^T), thus R(B) = R(B^T), and that T is orthogonal.

For a symmetric B, phi_l = psi_l holds only if B >= 0: for a negative eigenvalue they have opposite signs, and T has a -1.
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

#: The number of nodes that are multiplied at a time, so that products of basis functions are never stored for all nodes.
_CHUNK = 16_384

#: Round-off in a computed matrix or decomposition with n rows, divided by n and by the norm of the matrix.
_ROUND_OFF = 8 * np.finfo(float).eps


@dataclass(frozen=True)
class SingularSystem:
    """`B f = sum_l mu_l (psi_l, f) phi_l`, l = 1 .. r, as in 3.3. Get one from `singular_system`.

    Attributes
    ----------
    kernel : LowRankKernel
        The bases phi and psi that the coefficients belong to, both on one label domain.
    values : numpy.ndarray
        mu_l > 0, falling, shape (r,); in the unit of B.
    left, right : numpy.ndarray
        Coefficients of the phi_l in the basis phi, shape (rank of phi, r), and of the psi_l in the basis psi, shape
        (rank of psi, r).
    gram : numpy.ndarray
        T = ((phi_k, psi_l)), shape (r, r), the same on every rank.
    whole : numpy.ndarray
        B on the span of the basis phi, in orthonormal coordinates, including the singular values that count as zero, shape
        (rank of phi, rank of phi).
    error : float
        The round-off in `whole` and in mu_l, in the operator norm and in the unit of B.
    cut : float
        The largest singular value that counts as zero, in the unit of B.
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
        """D T^T, shape (r, r): B on R(B) in the coordinates (phi_k, u), as in the linearised (3.5a) up to sigma'(0)."""
        return self.values[:, None] * self.gram.T

    @cached_property
    def eigenvalues(self) -> np.ndarray:
        """The spectrum of B on R(B), complex, real parts rising, shape (r,); it contains 0 if T is singular."""
        root = np.sqrt(self.values)
        found = np.linalg.eigvals(root[:, None] * self.gram.T * root).astype(complex)
        return found[np.lexsort((found.imag, found.real))]

    @cached_property
    def symmetric_eigenvalues(self) -> np.ndarray:
        """The spectrum of B_s on the span of all phi_k and psi_l, rising, shape (dimension of the span,)."""
        r = self.rank
        K = np.block([[np.eye(r), self.gram], [self.gram.T, np.eye(r)]])
        lengths, turn = np.linalg.eigh(K)
        # Directions that differ by round-off alone are dropped, because they could make a B_s >= 0 indefinite. That changes
        # (B v, v) by at most mu_1 / 4 times the bound.
        keep = lengths > 2 * r * _ROUND_OFF
        P = np.sqrt(lengths[keep])[:, None] * turn[:, keep].T
        B = (P[:, :r] * self.values) @ P[:, r:].T
        return np.linalg.eigvalsh((B + B.T) / 2)

    @cached_property
    def squared(self) -> SingularSystem:
        """The singular system of B B^T, on the span of the phi_l: values mu_l^2 and T = I."""
        kernel = LowRankKernel(self.kernel.phi, self.kernel.phi)
        size = self.values.max(initial=0.0)
        roots = self.left * self.values
        R = self.kernel.phi.root @ roots
        return SingularSystem(
            kernel, self.values**2, self.left, self.left, np.eye(self.rank), R @ R.T, 2 * size * self.error, self.cut**2
        )

    @property
    def symmetric_minimum(self) -> float:
        """The infimum of (B f, f) over |f| = 1; at most 0 if the phi_k and psi_l do not span all of V."""
        spanned = self.symmetric_eigenvalues.size == self.kernel.phi.Y.size
        return float(min(self.symmetric_eigenvalues.min(initial=np.inf), np.inf if spanned else 0.0))

    @cached_property
    def gram_minimum(self) -> float:
        """The smallest singular value of T, the cosine of the largest angle between R(B) and R(B^T); no unit."""
        return float(np.linalg.svd(self.gram, compute_uv=False).min(initial=1.0))

    @cached_property
    def product_minimum(self) -> float:
        """The smallest eigenvalue of the symmetric part of D T; hypothesis (b) of Theorem 3.4 is that it is positive."""
        DT = self.values[:, None] * self.gram
        return float(np.linalg.eigvalsh((DT + DT.T) / 2).min(initial=np.inf))

    @property
    def is_symmetric(self) -> bool:
        """Whether B = B^T, up to 1e-7 |B| in the Hilbert-Schmidt norm, the square root of round-off."""
        # |B - B^T|^2 = 2 (|B|^2 - tr(B B)), and tr(B B) is the trace of the square of D T^T.
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
        """`sum_l c_l psi_l` at the owned nodes, shape (nodes, samples), for c of shape (r, samples)."""
        return self.kernel.psi.values @ (self.right @ self._coordinates(c))

    def _coordinates(self, c: np.ndarray) -> np.ndarray:
        return real_array("c", c, (self.rank, "samples"), finite=False)

    def weighted(self, c: np.ndarray) -> np.ndarray:
        """The matrix ((psi_l, c phi_k)), shape (r, r); T^T for c = 1. Collective.

        Parameters
        ----------
        c
            Values of a function at the owned nodes, shape (nodes,).

        Raises
        ------
        TypeError, ValueError
            If `c` is no such array.
        """
        c = real_array("c", c, (self.kernel.phi.Y.nodes,), finite=False)
        return self.right.T @ weighted_gram(self.kernel.psi, c, self.kernel.phi) @ self.left

    def null_part(self, f: np.ndarray) -> np.ndarray:
        """The part of f in N(B), `f - sum_l (psi_l, f) psi_l`, at the owned nodes, shape (nodes, samples). Collective."""
        return f - self.right_values(self.right_coefficients(f))

    def apply(self, f: np.ndarray) -> np.ndarray:
        """`B f` at the owned nodes, shape (nodes, samples). Collective."""
        return self.left_values(self.values[:, None] * self.right_coefficients(f))

    def least_norm(self, a: np.ndarray) -> np.ndarray:
        """The f of least norm for which B f is the part of a in R(B), shape (nodes, samples). Collective."""
        a = columns(self.kernel.phi.Y, "a", a)
        return self.right_values(self.left_coefficients(a) / self.values[:, None])


def singular_system(kernel: LowRankKernel, beta: np.ndarray, tolerance: float = 0.0) -> SingularSystem:
    """The singular system of B, without an array of nodes x nodes. Collective over the ranks of the label domain.

    Parameters
    ----------
    kernel
        The bases, both on one label domain.
    beta
        Coefficients, shape (rank of phi, rank of psi).
    tolerance
        Singular values up to this part of the largest one count as zero, as well as those that do not exceed round-off.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the bases belong to different label domains; on all ranks alike.

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
        raise ValueError(f"kernel: expected phi and psi on one label domain, got {kernel.phi.Y!r} and {kernel.psi.Y!r}")
    tolerance = number("tolerance", tolerance, least=0)
    beta = real_array("beta", beta, kernel.shape)
    left, values, right = kernel.svd(beta)
    between = kernel.phi.gram if kernel.phi is kernel.psi else kernel.phi.project(kernel.psi.values)
    R, R_psi = kernel.phi.root, kernel.psi.root
    # B = Phi beta Psi^T M maps the coordinates R c of Phi c to R beta (Psi, Phi) c.
    whole = scipy.linalg.solve_triangular(R, between @ beta.T @ R.T, trans="T").T
    sizes = [np.linalg.norm(matrix, 2) for matrix in (R, beta, R_psi)]
    conditions = [np.linalg.cond(matrix) for matrix in (R, R_psi)]
    of_product = max(kernel.shape) * _ROUND_OFF * np.prod(sizes)
    # Bases that are orthonormal up to round-off change mu_l in proportion to it, but make no mu_l = 0 positive.
    error = of_product + max(kernel.shape) * _ROUND_OFF * np.prod(conditions) * values[0]
    keep = values > max(tolerance * values[0], of_product)
    left, right = left[:, keep], right[:, keep]
    return SingularSystem(
        kernel, values[keep], left, right, left.T @ between @ right, whole, float(error), float(values[~keep].max(initial=0.0))
    )


def columns(Y: LabelSpace, name: str, values: np.ndarray) -> np.ndarray:
    """Values at the owned nodes from outside, shape (nodes, samples).

    Searches call this often and check themselves whether the values are finite. Therefore it is not collective.
    """
    return real_array(name, values, (Y.nodes, "samples"), finite=False)


def weighted_gram(first: Basis, c: np.ndarray, second: Basis) -> np.ndarray:
    """The matrix `((p_i, c q_j))` for the functions p_i and q_j of two bases, shape (rank, rank), on every rank. Collective.

    Parameters
    ----------
    first, second
        Bases on one label domain.
    c
        Values at the owned nodes, shape (nodes,).
    """
    total = np.zeros((first.rank, second.rank))
    weights = c * first.Y.weights
    for start in range(0, weights.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        total += first.values[part].T @ (weights[part, None] * second.values[part])
    return first.Y.sum(total)
