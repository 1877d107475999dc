"""Low-rank integral operators between label domains.

A kernel b(y, z) = sum_ij phi_i(y) beta_ij psi_j(z) maps functions of z to functions of y. With the bases at the nodes
and the measure M of the domain of z,

    (B f)(y) = int b(y, z) f(z) dz            B f   = Phi beta (Psi^T M f),
    (B^T r)(z) = int b(y, z) r(y) dy          B^T r = Psi beta^T (Phi^T M r),       (B f, r) = (f, B^T r),

and the norm of b in L2(Y x Z), the Hilbert-Schmidt norm of B, is given by the Gram matrices G of both bases:

    (b, c) = tr(beta^T G_Phi gamma G_Psi).

It bounds the operator norm of B on L2 and equals it at rank 1 only (the proof of Theorem 3.1 says "equals"). With
Cholesky's G = R^T R of both bases, B has the singular values of the small matrix R_Phi beta R_Psi^T.
"""

from __future__ import annotations

import logging

import numpy as np
import scipy.linalg
from mpi4py import MPI
from numpy.typing import ArrayLike

from fem_resnet.arguments import choice, instance, real_array
from fem_resnet.fixed import OnMesh
from fem_resnet.label_domain.basis import Basis
from fem_resnet.log import log
from fem_resnet.ranks import same

__all__ = ["EXACT_SUPREMUM", "LowRankKernel"]

#: Up to how many pairs of nodes (y, z) sup |b| is found by looking at all of them: 20,000 nodes of y and of z.
EXACT_SUPREMUM = 20_000**2
#: Nodes a block: of pairs, so that a block of b stays in the cache, and of one basis.
_PAIRED, _BLOCK = 512, 16_384


class LowRankKernel(OnMesh):
    """The pair of bases (phi, psi) in which kernels are expanded.

    Parameters
    ----------
    phi
        Basis in y, where the operator's values live.
    psi
        Basis in z, where its arguments live; both on the same communicator.

    Attributes
    ----------
    shape : tuple of int
        (rank of phi, rank of psi), the shape of beta.
    """

    def __init__(self, phi: Basis, psi: Basis):
        for name, basis in (("phi", phi), ("psi", psi)):
            instance(name, basis, Basis, "laplace_basis(Y, rank) makes one")
        self.phi = phi
        self.psi = psi
        self.shape = (phi.rank, psi.rank)
        self._factors = [scipy.linalg.cho_factor(basis.gram) for basis in (phi, psi)]

    def apply(self, beta: np.ndarray, f: np.ndarray) -> np.ndarray:
        """`B f` at the owned nodes, shape (nodes of y, samples), for f of shape (nodes of z, samples). Collective."""
        return self.phi.values @ (beta @ self.psi.project(f))

    def transpose(self, beta: np.ndarray, r: np.ndarray) -> np.ndarray:
        """`B^T r` at the owned nodes, shape (nodes of z, samples), for r of shape (nodes of y, samples). Collective."""
        return self.psi.values @ (beta.T @ self.phi.project(r))

    def dual(self, beta: np.ndarray) -> np.ndarray:
        """`G_Phi beta G_Psi`, so that `(b, c) = sum_ij dual(beta)_ij gamma_ij`."""
        return self.phi.gram @ beta @ self.psi.gram

    def primal(self, dual: np.ndarray) -> np.ndarray:
        """`G_Phi^-1 d G_Psi^-1`, the inverse of `dual`."""
        phi, psi = self._factors
        return scipy.linalg.cho_solve(psi, scipy.linalg.cho_solve(phi, dual).T).T

    def stiffness(self, beta: np.ndarray) -> np.ndarray:
        """Dual of beta in `int |grad_y b|^2 + |grad_z b|^2 dy dz`: `K_Phi beta G_Psi + G_Phi beta K_Psi`."""
        phi, psi = self.phi, self.psi
        return phi.stiffness @ beta @ psi.gram + phi.gram @ beta @ psi.stiffness

    def bound(self, coefficients: ArrayLike) -> float:
        """How large abs(b) may be at the nodes if abs(beta_ij) <= C_ij: no larger than

            max_y sum_i |phi_i(y)| max_z sum_j C_ij |psi_j(z)|.

        With elements of degree 0 and 1 that holds between the nodes too. For indicators of cells it is the largest C_ij, and
        attained; for other bases a box on beta is not one on b. Collective.

        Parameters
        ----------
        coefficients
            C >= 0, a number or shape (rank of phi, rank of psi); for a box (low, high) max(|low|, |high|).

        Raises
        ------
        TypeError, ValueError
            If that is not so, or differs between ranks.

        Examples
        --------
        >>> import firedrake as fd
        >>> from fem_resnet import LabelSpace, cell_indicators
        >>> cells = cell_indicators(LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(0), "DG", 0)))
        >>> LowRankKernel(cells, cells).bound(0.5)
        0.5
        """
        same(self.phi.Y.comm, coefficients=coefficients)
        C = real_array("coefficients", coefficients, least=0)
        if C.shape not in ((), self.shape):
            raise ValueError(f"coefficients: expected numbers >= 0 of shape () or {self.shape}, got {coefficients!r}")
        C = np.broadcast_to(C, self.shape)
        of_rows = _largest(self.psi, np.abs(self.psi.values) @ C.T)
        return float(_largest(self.phi, np.abs(self.phi.values) @ of_rows))

    def norm(self, beta: np.ndarray, kind: str = "hs") -> float:
        """A norm of b, or of B. Collective; no array of nodes x nodes occurs.

        Parameters
        ----------
        beta
            Coefficients, shape (rank of phi, rank of psi).
        kind
            "hs": that of b in L2(Y x Z), the Hilbert-Schmidt norm of B; the root of tr(beta^T G_Phi beta G_Psi).
            "operator": that of B from L2(Z) to L2(Y), its largest singular value; at most "hs", and equal to it at rank
            one only.
            "linf": the largest |b(y, z)| over the nodes, where `supremum_is_exact`; above that an upper bound by Cauchy
            and Schwarz, with a warning in the log.

        Raises
        ------
        TypeError, ValueError
            If `kind` is none of these, or beta no array of finite real numbers of that shape; or they differ between ranks.

        Examples
        --------
        >>> from firedrake import FunctionSpace, UnitDiskMesh
        >>> from fem_resnet import LabelSpace, laplace_basis
        >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
        >>> kernel, beta = LowRankKernel(phi, phi), np.diag([4.0, 3.0, 0.0, 0.0])
        >>> round(kernel.norm(beta), 12), round(kernel.norm(beta, "operator"), 12)
        (5.0, 4.0)
        """
        same(self.phi.Y.comm, beta=beta, kind=kind)
        choice("kind", kind, ("hs", "operator", "linf"))
        beta = real_array("beta", beta, self.shape)
        if kind == "hs":
            return float(np.sqrt(max(np.sum(self.dual(beta) * beta), 0.0)))
        if kind == "operator":
            R_phi, R_psi = self._roots()
            return float(scipy.linalg.svdvals(R_phi @ beta @ R_psi.T)[0])
        if self.supremum_is_exact:
            return self._supremum(beta)
        log(
            self.phi.Y.comm, logging.WARNING, "norm: sup |b| is given by an upper bound: b has values at %d x %d "
            "nodes", self.phi.Y.size, self.psi.Y.size,
        )  # fmt: skip
        return self._supremum_bound(beta)

    @property
    def supremum_is_exact(self) -> bool:
        """Whether ``norm(beta, "linf")`` looks at all pairs of nodes, or is an upper bound."""
        return self.phi.Y.size * self.psi.Y.size <= EXACT_SUPREMUM

    def svd(self, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Singular value decomposition of B in the label measure, `B f = sum_k mu_k (psi_k, f) phi_k` of 3.3. Collective.

        Returns
        -------
        left : numpy.ndarray
            Coefficients of the orthonormal phi_k in the basis phi, shape (rank of phi, count), count the smaller rank.
        values : numpy.ndarray
            mu_k >= 0, falling, shape (count,).
        right : numpy.ndarray
            Coefficients of the orthonormal psi_k in the basis psi, shape (rank of psi, count).

        Raises
        ------
        TypeError, ValueError
            If beta is no array of finite real numbers of its shape, or differs between ranks.
        """
        same(self.phi.Y.comm, beta=beta)
        beta = real_array("beta", beta, self.shape)
        R_phi, R_psi = self._roots()
        U, values, Vt = np.linalg.svd(R_phi @ beta @ R_psi.T, full_matrices=False)
        return scipy.linalg.solve_triangular(R_phi, U), values, scipy.linalg.solve_triangular(R_psi, Vt.T)

    def _roots(self) -> list[np.ndarray]:
        """R of both bases: what `cho_factor` leaves below the diagonal is no part of it."""
        return [np.triu(factor) for factor, _ in self._factors]

    def _supremum(self, beta: np.ndarray) -> float:
        """All pairs of nodes: each rank's nodes of z come to all ranks in turn."""
        comm = self.phi.Y.comm
        rows = self.phi.values @ beta
        largest = 0.0
        for rank, nodes in enumerate(comm.allgather(self.psi.Y.nodes)):
            columns = np.ascontiguousarray(self.psi.values) if rank == comm.rank else np.empty((nodes, self.psi.rank))
            comm.Bcast(columns, root=rank)
            for z in range(0, nodes, _PAIRED):
                for y in range(0, len(rows), _PAIRED):
                    b = rows[y : y + _PAIRED] @ columns[z : z + _PAIRED].T
                    largest = max(largest, b.max(), -b.min())
        return float(comm.allreduce(largest, op=MPI.MAX))

    def _supremum_bound(self, beta: np.ndarray) -> float:
        """`|b(y, z)|^2 <= sum_k mu_k phi_k(y)^2 sum_k mu_k psi_k(z)^2`."""
        left, values, right = self.svd(beta)
        return float(np.sqrt(_largest_row(self.phi, left, values) * _largest_row(self.psi, right, values)))


def _largest_row(basis: Basis, coefficients: np.ndarray, values: np.ndarray) -> float:
    """The largest `sum_k mu_k p_k(y)^2` over the nodes."""
    largest = 0.0
    for start in range(0, basis.Y.nodes, _BLOCK):
        largest = max(largest, ((basis.values[start : start + _BLOCK] @ coefficients) ** 2 @ values).max())
    return basis.Y.comm.allreduce(largest, op=MPI.MAX)


def _largest(basis: Basis, values: np.ndarray) -> np.ndarray:
    """Over all nodes of the basis's domain, of values >= 0. Collective."""
    largest = np.asarray(values.max(axis=0, initial=0.0))
    basis.Y.comm.Allreduce(MPI.IN_PLACE, largest, op=MPI.MAX)
    return largest
