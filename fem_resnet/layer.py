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

from collections.abc import Iterator

import numpy as np

from fem_resnet.activation import Activation
from fem_resnet.kernel import LowRankKernel

__all__ = ["Stage"]

#: Bytes of one block of u; two of them and the block's rows of Phi and Psi stay in a usual second-level cache.
_BLOCK_BYTES = 131072
_SMALLEST_BLOCK = 64


class Stage:
    """Stage evaluations of all layers that share a kernel's bases, an activation and a number of samples.

    Collective over the communicator of the label domain: one Allreduce of rank x samples numbers a call of `rate` or
    `transpose`. Arrays of nodes are this rank's.

    Parameters
    ----------
    kernel
        The bases phi and psi, on the same label domain.
    activation
        sigma.
    samples
        Number of samples in a batch.
    """

    def __init__(self, kernel: LowRankKernel, activation: Activation, samples: int):
        self.kernel = kernel
        self.activation = activation
        self.samples = samples
        self._Y = kernel.psi.Y
        self._block = max(_SMALLEST_BLOCK, _BLOCK_BYTES // (8 * samples))
        self._u = np.empty((min(self._block, self._Y.nodes), samples))
        self._v = np.empty_like(self._u)

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self._Y.nodes, self._block):
            yield slice(start, min(start + self._block, self._Y.nodes))

    def _argument(self, block: slice, a: np.ndarray, C: np.ndarray) -> np.ndarray:
        u = self._u[: block.stop - block.start]
        np.matmul(self.kernel.phi.values[block], C, out=u)
        return np.subtract(a[block, None], u, out=u)

    def rate(self, a: np.ndarray, C: np.ndarray) -> np.ndarray:
        """`Psi^T M sigma(a - Phi C)`, shape (rank of psi, samples), on every rank.

        Parameters
        ----------
        a
            Bias at the nodes, shape (nodes,).
        C
            `beta g`, shape (rank of phi, samples).
        """
        Q = np.zeros((self.kernel.psi.rank, self.samples))
        for block in self._blocks():
            u = self._argument(block, a, C)
            self.activation(u, out=u)
            Q += self.kernel.psi.weighted[block].T @ u
        return self._Y.sum(Q)

    def transpose(
        self, a: np.ndarray, C: np.ndarray, x: np.ndarray, x_q: np.ndarray, adjoint: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`Phi^T v` on every rank, shape (rank of phi, samples), and `sum_s v` at the owned nodes, shape (nodes,).

        Parameters
        ----------
        a, C
            As for `rate`: the stage where the derivative is taken.
        x
            Adjoint of g, shape (rank of psi, samples).
        x_q
            Adjoint of q_t = <adjoint, sigma(u)>, one number a sample.
        adjoint
            Adjoint value of f at the end of the segment, dual to the node values, shape (nodes, samples).
        """
        D = np.zeros((self.kernel.phi.rank, self.samples))
        bias = np.empty(self._Y.nodes)
        through_q = bool(x_q.any())
        for block in self._blocks():
            u = self._argument(block, a, C)
            self.activation.derivative(u, out=u)
            v = np.matmul(self.kernel.psi.weighted[block], x, out=self._v[: len(u)])
            if through_q:
                v += adjoint[block] * x_q
            v *= u
            np.sum(v, axis=1, out=bias[block])
            D += self.kernel.phi.values[block].T @ v
        return self._Y.sum(D), bias

    def advance(self, f: np.ndarray, stages: list[tuple[float, np.ndarray, np.ndarray]]) -> None:
        """`f += sum_k c_k sigma(a_k - Phi C_k)` in place.

        Parameters
        ----------
        f
            Shape (nodes, samples).
        stages
            The triples (c_k, a_k, C_k).
        """
        for block in self._blocks():
            for weight, a, C in stages:
                u = self._argument(block, a, C)
                self.activation(u, out=u)
                u *= weight
                f[block] += u
