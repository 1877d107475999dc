"""The stage of a layer: f_t = sigma(a - Phi C), seen through a basis P.

With u = a - Phi C, nodes x samples, C = beta g and g = Psi^T M f the coefficients that the layer sees of f:

    rate        Q = P^T M sigma(u)                                    P = Psi: g_t of (3.5a), for any low-rank kernel
    transpose   v = sigma'(u) * (M P x + lambda x_q)                  what (4.2) - (4.4) are made of:
                -> Phi^T v,  sum_s v                                  d/dg = -beta^T Phi^T v,  d/dbeta = -Phi^T v g^T,
                                                                      d/da = sum_s v
    advance     f += sum_k c_k sigma(a_k - Phi C_k)                   the quadrature (3.3)

Only arrays, weights and a sum over the ranks occur here. Nodes are passed in blocks that fit the cache, so that u,
sigma(u) and sigma'(u) never exist as whole arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fem_resnet.activation import Activation
from fem_resnet.basis import Basis
from fem_resnet.kernel import LowRankKernel
from fem_resnet.label_space import LabelSpace

__all__ = ["Stage", "StageValue"]

#: Bytes of one block of u; two of them and the block's rows of Phi and Psi stay in a usual second-level cache.
_BLOCK_BYTES = 131072
_SMALLEST_BLOCK = 64


@dataclass(frozen=True)
class StageValue:
    """A stage of a step as f sees it: the term `weight * sigma(a - Phi C)` of the quadrature (3.3)."""

    weight: float
    phi: Basis
    a: np.ndarray
    C: np.ndarray


class Stage:
    """Stage evaluations of layers on one label domain, with one activation and one number of samples.

    Collective over the communicator of the label domain: one Allreduce of rank x samples numbers a call of `rate` or
    `transpose`. Arrays of nodes are this rank's. The kernel's factors Phi and Psi are inputs, as a and C are.

    Parameters
    ----------
    Y
        The label domain.
    activation
        sigma.
    samples
        Number of samples in a batch.
    """

    def __init__(self, Y: LabelSpace, activation: Activation, samples: int):
        self.activation = activation
        self.samples = samples
        self._Y = Y
        self._block = max(_SMALLEST_BLOCK, _BLOCK_BYTES // (8 * samples))
        self._u = np.empty((min(self._block, self._Y.nodes), samples))
        self._v = np.empty_like(self._u)

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self._Y.nodes, self._block):
            yield slice(start, min(start + self._block, self._Y.nodes))

    def _argument(self, block: slice, phi: Basis, a: np.ndarray, C: np.ndarray) -> np.ndarray:
        u = self._u[: block.stop - block.start]
        np.matmul(phi.values[block], C, out=u)
        return np.subtract(a[block, None], u, out=u)

    def rate(self, factors: LowRankKernel, a: np.ndarray, C: np.ndarray) -> np.ndarray:
        """`Psi^T M sigma(a - Phi C)`, shape (rank of psi, samples), on every rank.

        Parameters
        ----------
        factors
            The bases phi and psi.
        a
            Bias at the nodes, shape (nodes,).
        C
            `beta g`, shape (rank of phi, samples).
        """
        Q = np.zeros((factors.psi.rank, self.samples))
        for block in self._blocks():
            u = self._argument(block, factors.phi, a, C)
            self.activation(u, out=u)
            Q += factors.psi.weighted[block].T @ u
        return self._Y.sum(Q)

    def transpose(
        self, factors: LowRankKernel, a: np.ndarray, C: np.ndarray, x: np.ndarray, x_q: np.ndarray, adjoint: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`Phi^T v` on every rank, shape (rank of phi, samples), and `sum_s v` at the owned nodes, shape (nodes,).

        Parameters
        ----------
        factors, a, C
            As for `rate`: the stage where the derivative is taken.
        x
            Adjoint of g, shape (rank of psi, samples).
        x_q
            Adjoint of q_t = <adjoint, sigma(u)>, one number a sample.
        adjoint
            Adjoint value of f at the end of the segment, dual to the node values, shape (nodes, samples).
        """
        D = np.zeros((factors.phi.rank, self.samples))
        bias = np.empty(self._Y.nodes)
        through_q = bool(x_q.any())
        for block in self._blocks():
            u = self._argument(block, factors.phi, a, C)
            self.activation.derivative(u, out=u)
            v = np.matmul(factors.psi.weighted[block], x, out=self._v[: len(u)])
            if through_q:
                v += adjoint[block] * x_q
            v *= u
            np.sum(v, axis=1, out=bias[block])
            D += factors.phi.values[block].T @ v
        return self._Y.sum(D), bias

    def advance(self, f: np.ndarray, stages: Sequence[StageValue]) -> np.ndarray:
        """`f + sum_k c_k sigma(a_k - Phi_k C_k)`, a new array, in one pass over the nodes.

        Parameters
        ----------
        f
            Shape (nodes, samples).
        stages
            The terms of the sum, of one layer or of many.
        """
        f = f.copy()
        for block in self._blocks():
            for stage in stages:
                u = self._argument(block, stage.phi, stage.a, stage.C)
                self.activation(u, out=u)
                u *= stage.weight
                f[block] += u
        return f
