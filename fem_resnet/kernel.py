"""Low-rank integral operators between label domains.

A kernel b(y, z) = sum_ij phi_i(y) beta_ij psi_j(z) maps functions of z to functions of y. With the bases at the nodes
and the measure M of the domain of z,

    (B f)(y) = int b(y, z) f(z) dz            B f   = Phi beta (Psi^T M f),
    (B^T r)(z) = int b(y, z) r(y) dy          B^T r = Psi beta^T (Phi^T M r),       (B f, r) = (f, B^T r),

and the norm of b in L2(Y x Z), the Hilbert-Schmidt norm of B, is given by the Gram matrices G of both bases:

    (b, c) = tr(beta^T G_Phi gamma G_Psi).

It bounds the operator norm of B on L2 and equals it at rank 1 only (the proof of Theorem 3.1 says "equals").
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from mpi4py import MPI
from numpy.typing import ArrayLike

from fem_resnet.basis import Basis

__all__ = ["LowRankKernel"]


class LowRankKernel:
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
            if not isinstance(basis, Basis):
                raise TypeError(f"{name}: a Basis is wanted, {type(basis).__name__} was given")
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
        ValueError
            If that is not so.

        Examples
        --------
        >>> import firedrake as fd
        >>> from fem_resnet import LabelSpace, cell_indicators
        >>> cells = cell_indicators(LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(0), "DG", 0)))
        >>> LowRankKernel(cells, cells).bound(0.5)
        0.5
        """
        C = np.asarray(coefficients, dtype=float)
        if C.shape not in ((), self.shape) or not (np.isfinite(C).all() and (C >= 0).all()):
            raise ValueError(f"coefficients: numbers >= 0 of shape () or {self.shape} are wanted, {coefficients!r} was given")
        C = np.broadcast_to(C, self.shape)
        of_rows = _largest(self.psi, np.abs(self.psi.values) @ C.T)
        return float(_largest(self.phi, np.abs(self.phi.values) @ of_rows))

    def norm(self, beta: np.ndarray) -> float:
        """Norm of b in L2(Y x Z), the Hilbert-Schmidt norm of B."""
        return float(np.sqrt(np.sum(self.dual(beta) * beta)))


def _largest(basis: Basis, values: np.ndarray) -> np.ndarray:
    """Over all nodes of the basis's domain, of values >= 0. Collective."""
    largest = np.asarray(values.max(axis=0, initial=0.0))
    basis.Y.comm.Allreduce(MPI.IN_PLACE, largest, op=MPI.MAX)
    return largest
