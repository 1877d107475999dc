"""Functionals of each sample apart, where a layer else adds them up over the samples: rows of Jacobians.

The transpose of a stage gives D = Phi^T v, shape (rank of phi, samples), for functionals v of the preactivation u = a - Phi
beta g. So those of sample s are `-D_s g_s^T` in beta, and `P^T v_s` in a bias of the basis P: E^T D_s where P = Phi E. Where
P is not in the span of phi the transpose takes more functions beside phi, on which beta does not act. A kernel that is made of
controls X takes its functional through the transpose of P'(X). All of that is linear in the samples, and touches no nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse

from fem_resnet.label_domain.basis import Basis
from fem_resnet.parameters.kernel import LowRankKernel

__all__ = ["JoinedBasis", "SampleFunctionals", "outer_products"]

#: A function whose part outside of a span is smaller than this, relative to its size, is in the span.
_IN_SPAN = 1e-10

#: From D and g, shapes (rank of phi, samples) and (rank of psi, samples), to functionals of shape (numbers, samples).
Products = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class JoinedBasis:
    """Functions that span those of two bases, the first basis first: ``second = basis E``.

    Attributes
    ----------
    basis : Basis
        The first basis itself, where it spans the second.
    matrix : numpy.ndarray
        E, shape (rank of basis, rank of the second).
    """

    basis: Basis
    matrix: np.ndarray

    @classmethod
    def of(cls, first: Basis, second: Basis) -> JoinedBasis:
        """The union of two bases on one label space. Collective.

        Parameters
        ----------
        first, second
            The bases.
        """
        if first is second:
            return cls(first, np.eye(first.rank))
        Y, more = first.Y, np.empty((first.Y.nodes, 0))

        def outside(function: np.ndarray) -> np.ndarray:
            for _ in range(2):  # twice is enough
                function = function - first.values @ np.linalg.solve(first.gram, first.project(function))
                function = function - more @ Y.sum(more.T @ (Y.weights[:, None] * function))
            return function

        def size(function: np.ndarray) -> float:
            return float(np.sqrt(Y.sum(Y.weights @ function**2))[0])

        for k in range(second.rank):
            given = second.values[:, k : k + 1]
            part = outside(given)
            if size(part) > _IN_SPAN * size(given):
                more = np.hstack([more, part / size(part)])
        basis = Basis(Y, np.hstack([first.values, more]), "joined") if more.shape[1] else first
        return cls(basis, np.linalg.solve(basis.gram, basis.project(second.values)))


def outer_products(shape: tuple[int, int], derivative: np.ndarray | scipy.sparse.sparray | None = None) -> Products:
    """What takes D and g to the functionals `D_s g_s^T`, or to their images by the transpose of a matrix.

    Parameters
    ----------
    shape
        Ranks of phi and psi.
    derivative
        A matrix from the controls of a kernel to beta, shape (rank of phi x rank of psi, numbers); none for beta itself. Of a
        sparse matrix the entries that are not zero count alone.
    """
    if derivative is None:
        return lambda D, g: (D[:, None] * g[None]).reshape(-1, g.shape[1])
    if isinstance(derivative, np.ndarray):
        return lambda D, g: derivative.T @ (D[:, None] * g[None]).reshape(-1, g.shape[1])
    used = np.unique(derivative.tocoo().row)
    rows, columns = np.divmod(used, shape[1])
    transposed = derivative.tocsr()[used].T.tocsr()
    return lambda D, g: transposed @ (D[rows] * g[columns])


@dataclass(frozen=True)
class SampleFunctionals:
    """How functionals of each sample in what one layer takes follow from those in its stages.

    Attributes
    ----------
    kernel : LowRankKernel
        The layer's phi and psi.
    joined : JoinedBasis
        Phi and the basis of the bias.
    in_time : tuple of callable
        ``weights(s)`` of the bias and of the kernel: the values of their active time functions at the fraction s of the
        layer.
    products : sequence of Products
        For each active time function of the kernel.
    size : int
        How many numbers a sample has: for each active function of the bias, then of the kernel.
    """

    kernel: LowRankKernel
    joined: JoinedBasis
    in_time: tuple[Callable[[float], Sequence[float]], Callable[[float], Sequence[float]]]
    products: Sequence[Products]
    size: int

    @cached_property
    def factors(self) -> LowRankKernel:
        """Phi with the functions beside it, on which beta does not act, and psi."""
        more = self.joined.basis is not self.kernel.phi
        return LowRankKernel(self.joined.basis, self.kernel.psi) if more else self.kernel

    def pull_back(self, s: float, D: np.ndarray, g: np.ndarray) -> list[np.ndarray]:
        """The functionals, one array an active function, each of shape (numbers x samples,).

        Parameters
        ----------
        s
            The fraction of the layer.
        D
            Phi^T v for the phi of `factors`, shape (its rank, samples).
        g
            g at the stage, shape (rank of psi, samples).
        """
        in_bias, in_kernel = self.in_time
        by_bias = self.joined.matrix.T @ D
        D = D[: self.kernel.phi.rank]
        found = [weight * by_bias for weight in in_bias(s)]
        found += [-weight * product(D, g) for weight, product in zip(in_kernel(s), self.products, strict=True)]
        return [part.ravel() for part in found]
