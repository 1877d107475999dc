"""Low-rank integral operators between label domains, and their coefficients beta.

A kernel b(y, z) = sum_ij phi_i(y) beta_ij psi_j(z) maps functions of z to functions of y. With the bases at the nodes
and the measure M of the domain of z,

    (B f)(y) = int b(y, z) f(z) dz            B f   = Phi beta (Psi^T M f),
    (B^T r)(z) = int b(y, z) r(y) dy          B^T r = Psi beta^T (Phi^T M r),       (B f, r) = (f, B^T r),

and the norm of b in L2(Y x Z), the Hilbert-Schmidt norm of B, is given by the Gram matrices G of both bases:

    (b, c) = tr(beta^T G_Phi gamma G_Psi).

This norm bounds the operator norm of B on L2, and equals it at rank 1 only (the proof of Theorem 3.1 says "equals"). With
Cholesky's G = R^T R of both bases, the singular values of B are those of the small matrix R_Phi beta R_Psi^T.
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
from fem_resnet.parameters.couplings import Couplings
from fem_resnet.parameters.space_basis import Replicated, SpaceBasis
from fem_resnet.ranks import same

__all__ = ["EXACT_SUPREMUM", "KernelCoefficients", "LowRankKernel", "kernel_coefficients"]

#: The largest number of pairs of nodes (y, z) for which sup |b| is found from all of them: 20,000 nodes of y and of z.
EXACT_SUPREMUM = 20_000**2
#: Nodes of y, and of z, of which all pairs are looked at together, so that their values of b stay in the cache.
_PAIRED = 512
#: Nodes of one basis that are looked at together.
_TOGETHER = 16_384


class LowRankKernel(OnMesh):
    """The pair of bases (phi, psi) in which kernels are expanded.

    Parameters
    ----------
    phi
        Basis in y, where the operator's values live.
    psi
        Basis in z, where its arguments live; both on the same communicator.
    couplings
        The functions that the kernels couple, where all beta are zero but for some blocks; else None.

    Attributes
    ----------
    shape : tuple of int
        (rank of phi, rank of psi), the shape of beta.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    """

    def __init__(self, phi: Basis, psi: Basis, couplings: Couplings | None = None):
        self._couplings = instance("couplings", couplings, (Couplings, type(None)))
        for name, basis in (("phi", phi), ("psi", psi)):
            instance(name, basis, Basis, "laplace_basis(Y, rank) makes one")
        self.phi = phi
        self.psi = psi
        self.shape = (phi.rank, psi.rank)
        self._factors = [scipy.linalg.cho_factor(basis.gram) for basis in (phi, psi)]

    def times(self, beta: np.ndarray, g: np.ndarray) -> np.ndarray:
        """`beta g`, shape (rank of phi, samples).

        Parameters
        ----------
        beta
            Coefficients, zero where the kernels couple nothing, shape (rank of phi, rank of psi).
        g
            Numbers, shape (rank of psi, samples).
        """
        return beta @ g if self._couplings is None else self._couplings.times(beta, g)

    def transposed_times(self, beta: np.ndarray, D: np.ndarray) -> np.ndarray:
        """`beta^T D`, shape (rank of psi, samples).

        Parameters
        ----------
        beta
            Coefficients, shape (rank of phi, rank of psi).
        D
            Numbers, shape (rank of phi, samples).
        """
        return beta.T @ D if self._couplings is None else self._couplings.transposed_times(beta, D)

    def outer(self, D: np.ndarray, g: np.ndarray) -> np.ndarray:
        """The entries of `D g^T` that count for these kernels, of the shape of beta.

        Parameters
        ----------
        D, g
            Numbers, of shape (rank of phi, samples) and (rank of psi, samples).
        """
        return D @ g.T if self._couplings is None else self._couplings.outer(D, g)

    def apply(self, beta: np.ndarray, f: np.ndarray) -> np.ndarray:
        """`B f` at the owned nodes, shape (nodes of y, samples). Collective.

        Parameters
        ----------
        beta
            Coefficients, shape (rank of phi, rank of psi), the same on every rank.
        f
            Values at the owned nodes of z, shape (nodes of z, samples).
        """
        return self.phi.expand(beta @ self.psi.project(f))

    def transpose(self, beta: np.ndarray, r: np.ndarray) -> np.ndarray:
        """`B^T r` at the owned nodes, shape (nodes of z, samples). Collective.

        Parameters
        ----------
        beta
            Coefficients, shape (rank of phi, rank of psi), the same on every rank.
        r
            Values at the owned nodes of y, shape (nodes of y, samples).
        """
        return self.psi.expand(beta.T @ self.phi.project(r))

    def functional(self, beta: np.ndarray) -> np.ndarray:
        """The functional c -> (b, c), `D = G_Phi beta G_Psi`, of the shape of beta: (b, c) = sum_ij D_ij gamma_ij."""
        return self.phi.gram @ beta @ self.psi.gram

    def riesz(self, functional: np.ndarray) -> np.ndarray:
        """The Riesz map `G_Phi^-1 d G_Psi^-1` of a functional d, of the shape of beta: the inverse of `functional`."""
        phi, psi = self._factors
        return scipy.linalg.cho_solve(psi, scipy.linalg.cho_solve(phi, functional).T).T

    def stiffness(self, beta: np.ndarray) -> np.ndarray:
        """`K_Phi beta G_Psi + G_Phi beta K_Psi`, of the shape of beta, K the stiffness matrices of the bases.

        Its sum of products with beta is `int |grad_y b|^2 + |grad_z b|^2 dy dz`.
        """
        phi, psi = self.phi, self.psi
        return phi.stiffness @ beta @ psi.gram + phi.gram @ beta @ psi.stiffness

    def bound(self, coefficients: ArrayLike) -> float:
        """An upper bound of abs(b) at the nodes, where abs(beta_ij) <= C_ij. Collective.

            |b(y, z)| <= max_y sum_i |phi_i(y)| max_z sum_j C_ij |psi_j(z)|

        With elements of degree 0 and 1 the bound holds between the nodes too. For indicators of cells it is the largest C_ij,
        and is attained. For other bases a box for beta is no box for b.

        Parameters
        ----------
        coefficients
            C >= 0, a number or shape (rank of phi, rank of psi); for a box (low, high) max(|low|, |high|).

        Raises
        ------
        TypeError, ValueError
            If C is not such numbers, or differs between ranks.

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
            raise ValueError(f"coefficients: expected numbers >= 0 of shape () or {self.shape}, got shape {C.shape}")
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
            "hs": the norm of b in L2(Y x Z), which is the Hilbert-Schmidt norm of B, (tr(beta^T G_Phi beta G_Psi))^(1/2).
            "operator": the norm of B from L2(Z) to L2(Y), its largest singular value; at most "hs", and equal to it at
            rank one only.
            "linf": the largest |b(y, z)| over the nodes, where `supremum_is_exact`; else an upper bound by the inequality of
            Cauchy and Schwarz, with a warning in the log.

        Raises
        ------
        TypeError, ValueError
            If `kind` is none of these, or beta no array of finite real numbers of its shape; or they differ between ranks.

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
            return float(np.sqrt(max(np.sum(self.functional(beta) * beta), 0.0)))
        if kind == "operator":
            R_phi, R_psi = self._roots()
            return float(scipy.linalg.svdvals(R_phi @ beta @ R_psi.T)[0])
        if self.supremum_is_exact:
            return self._supremum(beta)
        log(
            self.phi.Y.comm, logging.WARNING, "norm: b has values at %d x %d nodes, too many to look at: an upper bound of "
            "sup |b| is given", self.phi.Y.size, self.psi.Y.size,
        )  # fmt: skip
        return self._supremum_bound(beta)

    @property
    def supremum_is_exact(self) -> bool:
        """Whether ``norm(beta, "linf")`` looks at all pairs of nodes; else it is an upper bound."""
        return self.phi.Y.size * self.psi.Y.size <= EXACT_SUPREMUM

    def svd(self, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Singular value decomposition of B in the label measure, `B f = sum_k mu_k (psi_k, f) phi_k` of 3.3. Collective.

        Parameters
        ----------
        beta
            Coefficients, shape (rank of phi, rank of psi).

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

    def orthonormal(self, beta: np.ndarray) -> np.ndarray:
        """`R_Phi beta R_Psi^T`, of the shape of beta: coefficients in the orthonormal functions Phi R_Phi^-1, Psi R_Psi^-1."""
        R_phi, R_psi = self._roots()
        return R_phi @ beta @ R_psi.T

    def from_orthonormal(self, X: np.ndarray) -> np.ndarray:
        """beta, of the shape of X, the coefficients in orthonormal functions: the inverse of `orthonormal`."""
        R_phi, R_psi = self._roots()
        return scipy.linalg.solve_triangular(R_psi, scipy.linalg.solve_triangular(R_phi, X).T).T

    def _roots(self) -> list[np.ndarray]:
        """R_Phi and R_Psi, the factors that `riesz` uses; they differ from `Basis.root` by round-off."""
        # Entries below the diagonal that `cho_factor` leaves there are no part of R.
        return [np.triu(factor) for factor, _ in self._factors]

    def _supremum(self, beta: np.ndarray) -> float:
        """From all pairs of nodes: the values of psi on each rank come to all ranks in turn."""
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
        """By `|b(y, z)|^2 <= sum_k mu_k phi_k(y)^2 sum_k mu_k psi_k(z)^2`."""
        left, values, right = self.svd(beta)
        return float(np.sqrt(_largest_row(self.phi, left, values) * _largest_row(self.psi, right, values)))


class KernelCoefficients(Replicated, SpaceBasis):
    """The matrix beta of a low-rank kernel, shape (rank of phi, rank of psi): R = G_Phi x G_Psi.

    Parameters
    ----------
    kernel
        The factors; where they are learned, the orthonormal ones at the start.
    learned
        Whether the factors are learned.

    Attributes
    ----------
    has_learned_factors : bool
        Whether they are.
    """

    def __init__(self, kernel: LowRankKernel, learned: bool = False):
        super().__init__(kernel.phi.Y, kernel.shape)
        self.kernel = kernel
        self.has_learned_factors = learned

    @property
    def amplitude(self):
        return 1 / self.kernel.psi.Y.measure  # b is integrated over it

    @property
    def unit(self):
        return self.kernel.phi.Y.measure / self.kernel.psi.Y.measure

    def functional(self, coefficients):
        return self.kernel.functional(coefficients)

    def riesz(self, functional):
        return self.kernel.riesz(functional)

    def coordinates(self, coefficients):
        return self.kernel.orthonormal(coefficients) / np.sqrt(self.unit)

    def from_coordinates(self, coordinates):
        return self.kernel.from_orthonormal(coordinates) * np.sqrt(self.unit)

    def stiffness(self, coefficients):
        if self.has_learned_factors:
            raise ValueError(
                "smooth_in_space: expected a kernel with fixed factors, got learned ones, for whose gradients there is no "
                "formula here; fix the factors, or regularise by smooth_in_time or tikhonov"
            )
        return self.kernel.stiffness(coefficients)


def _largest_row(basis: Basis, coefficients: np.ndarray, values: np.ndarray) -> float:
    """The largest `sum_k mu_k p_k(y)^2` over the nodes."""
    largest = 0.0
    for start in range(0, basis.Y.nodes, _TOGETHER):
        largest = max(largest, ((basis.values[start : start + _TOGETHER] @ coefficients) ** 2 @ values).max())
    return basis.Y.comm.allreduce(largest, op=MPI.MAX)


def _largest(basis: Basis, values: np.ndarray) -> np.ndarray:
    """The largest of values >= 0 over all nodes of the basis's label domain, for each column. Collective."""
    largest = np.asarray(values.max(axis=0, initial=0.0))
    basis.Y.comm.Allreduce(MPI.IN_PLACE, largest, op=MPI.MAX)
    return largest


def kernel_coefficients(basis: SpaceBasis) -> KernelCoefficients:
    """The space basis of a kernel, of which more is known than of any space basis."""
    assert isinstance(basis, KernelCoefficients), "a kernel is expanded in factors"
    return basis
