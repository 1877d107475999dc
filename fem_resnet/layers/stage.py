"""The stage of a layer: f_t = tau sigma(a - Phi C), as a basis psi sees it, with its tangent and the transposes of both.

TS runs through a layer in a time from 0 to 1, so the length tau of the layer is a factor. Let u = a - Phi C be the
preactivation, nodes x samples. Here C = beta g, and g = Psi^T M f are the coefficients through which the layer sees f.

    value       s_0 = tau sigma(u)                                    Q_0 = Psi^T M s_0: g_t of (3.5a), for any low-rank kernel
    tangent     s_1 = tau sigma'(u) u_1 + tau_1 sigma(u)              Q_1 = Psi^T M s_1,       u_1 = a_1 - Phi C_1
    transpose   v_0 = tau sigma'(u) w_0                               the terms of (4.2) - (4.4):
                -> Phi^T v_0,  sum_s v_0                              d/dg = -beta^T Phi^T v_0,  d/dbeta = -Phi^T v_0 g^T
                                                                      d/da = sum_s v_0
    of both     v_1 = tau sigma'(u) w_1
                v_0 = sigma'(u) (tau w_0 + tau_1 w_1) + tau sigma''(u) u_1 w_1
    Jacobian    K   = Psi^T M diag(c) Phi, one matrix a sample        dQ_0/dg = -K beta for c = tau sigma'(u)

The functional w_k in s_k is M Psi x_k + x_q lambda_k. Learned factors have directions Phi_1 and Psi_1 as well:

    u_1 = a_1 - Phi C_1 - Phi_1 C_0,       Q_1 = Psi^T M s_1 + Psi_1^T M s_0,       w_0 = .. + M Psi_1 x_1,
    d/dPhi = -(v_0 C_0^T + v_1 C_1^T),     d/dPsi = M (s_0 x_0^T + s_1 x_1^T).

The index 1 marks directions and tangents. A value alone has one order, a value with its tangent has two: all tuples here have
one entry or two. Nodes go through a stage in blocks that fit the cache, so that u, sigma(u) and sigma'(u) never exist as whole
arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.inputs import FactorDirections
from fem_resnet.parameters.kernel import LowRankKernel

__all__ = ["Argument", "Functionals", "Stage", "StageFunctional", "StageValue"]

#: Bytes of u on one node block. Two such arrays and the rows of Phi and Psi stay in the second-level cache of usual
#: processors.
_BLOCK_BYTES = 131072
#: Nodes of the smallest node block.
_SMALLEST_BLOCK = 64


@dataclass(frozen=True)
class Argument:
    """The point at which a stage is evaluated. Tuples have one entry an order.

    Attributes
    ----------
    factors : LowRankKernel
        The bases phi and psi.
    length : tuple of float
        tau, in the unit of t.
    a : tuple of numpy.ndarray
        Bias at the nodes, shape (nodes,).
    C : tuple of numpy.ndarray
        beta g, shape (rank of phi, samples).
    directions : FactorDirections or None
        Phi_1 and Psi_1, where there is a tangent and the factors are learned.
    beta : tuple of numpy.ndarray
        The kernel's coefficients, shape (rank of phi, rank of psi). The stage of a gradient flow alone reads them, as it
        applies B^T too (`transposed_stage`).
    """

    factors: LowRankKernel
    length: tuple[float, ...]
    a: tuple[np.ndarray, ...]
    C: tuple[np.ndarray, ...]
    directions: FactorDirections | None = None
    beta: tuple[np.ndarray, ...] = ()


#: The kind of point at which a stage is evaluated; a step by the discrete gradient has two ends.
At = TypeVar("At", bound=Argument)


@dataclass(frozen=True)
class StageFunctional:
    """A functional of the s_k of a stage, `w_k = M Psi x_k + x_q lambda_k`. Tuples have one entry an order.

    Attributes
    ----------
    x : tuple of numpy.ndarray
        The functional in g_k, shape (rank of psi, samples).
    x_q : numpy.ndarray or None
        One number a sample, shape (samples,); None for 0.
    by_f : tuple of numpy.ndarray
        lambda_k, the functional in f_k at the end of the segment, shape (nodes, samples); empty for 0.
    by_c : numpy.ndarray or None
        The functional in the samples' running costs, shape (orders, samples), if there are such; no stage reads it.
    """

    x: tuple[np.ndarray, ...]
    x_q: np.ndarray | None
    by_f: tuple[np.ndarray, ...]
    by_c: np.ndarray | None = None


@dataclass
class Functionals:
    """The functionals in the arguments of a stage: what its transpose returns.

    Attributes
    ----------
    D : list of numpy.ndarray
        Minus the functional in C_k, shape (rank of phi, samples), the same on every rank.
    bias : numpy.ndarray
        The functional in the bias at the owned nodes, `sum_s v_0`, shape (nodes,).
    length : float
        The functional in tau, where it was asked for.
    phi, psi : numpy.ndarray or None
        The functionals in the factors' values at the owned nodes, shape (nodes, rank), where they were asked for.
    beta : numpy.ndarray or None
        The functional in beta as far as beta acts other than through C_k, the same on every rank.
    """

    D: list[np.ndarray]
    bias: np.ndarray
    length: float = 0.0
    phi: np.ndarray | None = None
    psi: np.ndarray | None = None
    beta: np.ndarray | None = None


@dataclass(frozen=True)
class StageValue(Generic[At]):
    """A stage of a step as f sees it: the term `weight * s_k` of the quadrature (3.3)."""

    weight: float
    argument: At


class Stage(Generic[At]):
    """Stage evaluations for layers on one label domain, with one activation and one number of samples.

    Collective over the label domain's communicator: one Allreduce a call. Arrays of nodes hold the nodes of this rank.

    Parameters
    ----------
    Y
        The label domain.
    activation
        sigma.
    samples
        Number of samples in a batch.
    precision
        "double" or "single". With "single", u, sigma(u), sigma'(u) and functionals at the nodes are float32. Sums over nodes
        are always float64.
    """

    def __init__(self, Y: LabelSpace, activation: Activation, samples: int, precision: str = "double"):
        self.Y = Y
        self.activation = activation
        self.samples = samples
        self._block_size = max(_SMALLEST_BLOCK, _BLOCK_BYTES // (8 * samples))
        self.real = np.dtype(precision)
        self._work = [np.empty((min(self._block_size, Y.nodes), samples)) for _ in range(2)]

    def _node_blocks(self) -> Iterator[slice]:
        """The nodes of this rank, one node block after the other."""
        for start in range(0, self.Y.nodes, self._block_size):
            yield slice(start, min(start + self._block_size, self.Y.nodes))

    def arranged(self, by_f: np.ndarray) -> np.ndarray:
        """Lambda in the order of memory that `transpose` reads fastest.

        Parameters
        ----------
        by_f
            lambda, shape (nodes, samples).

        Returns
        -------
        numpy.ndarray
            The array itself, or a copy of it, of the same shape.
        """
        return by_f

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        """Round values at the nodes to the precision, in place."""
        if self.real != values.dtype:
            values[...] = values.astype(self.real)
        return values

    def _affine(self, nodes: slice, at: Argument, order: int = 0, out: np.ndarray | None = None) -> np.ndarray:
        """The preactivation u (order 0), or u_1 (order 1), on a node block."""
        u = self._work[0][: nodes.stop - nodes.start] if out is None else out
        np.matmul(at.factors.phi.values[nodes], at.C[order], out=u)
        if order == 1 and at.directions is not None:
            u += at.directions.phi[nodes] @ at.C[0]
        return self._rounded(np.subtract(at.a[order][nodes, None], u, out=u))

    def _values(self, nodes: slice, at: At) -> Iterator[np.ndarray]:
        """s_0, then s_1, on a node block, each in memory that the next call overwrites."""
        u = self._affine(nodes, at)
        if len(at.a) == 1:
            self.activation(u, out=u)
            u *= at.length[0]
            yield self._rounded(u)
            return
        sigma, slope = self.activation(u), self.activation.derivative(u)
        yield self._rounded(at.length[0] * sigma)
        slope *= self._affine(nodes, at, 1)
        slope *= at.length[0]
        slope += at.length[1] * sigma
        yield self._rounded(slope)

    def rate(self, at: At, out: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Evaluate the stage, as psi sees it: `Q_k = Psi^T M s_k`. Collective.

        Parameters
        ----------
        at
            The point.
        out
            Arrays of shape (nodes, samples), one an order, into which the s_k themselves are written.

        Returns
        -------
        list of numpy.ndarray
            Q_k, shape (rank of psi, samples), the same on every rank.
        """
        psi = at.factors.psi
        Q = np.zeros((len(at.a), psi.rank, self.samples))
        for nodes in self._node_blocks():
            for k, s in enumerate(self._values(nodes, at)):
                Q[k] += psi.weighted[nodes].T @ s
                if k == 0 and at.directions is not None:
                    Q[1] += at.directions.weighted[nodes].T @ s
                if out is not None:
                    out[k][nodes] = s
        return list(self.Y.sum(Q))

    def transpose(self, at: At, by_s: StageFunctional, with_length: bool = False, with_factors: bool = False) -> Functionals:
        """Apply the transpose of the derivative of the s_k in a, C, tau and the factors. Collective.

        Parameters
        ----------
        at
            The point at which the derivative is taken.
        by_s
            The functional in the s_k.
        with_length, with_factors
            Whether to compute the functionals in tau and in the factors too.
        """
        orders, phi, psi = len(at.a), at.factors.phi, at.factors.psi
        D = np.zeros((orders, phi.rank, self.samples))
        result = Functionals([], np.empty(self.Y.nodes))
        if with_factors:
            result.phi, result.psi = np.empty_like(phi.values), np.empty_like(psi.values)
        for nodes in self._node_blocks():
            w = [self._functional_at_nodes(nodes, at, by_s, k) for k in range(orders)]
            if with_length:
                result.length += self._by_length(nodes, at, w)
            if with_factors:
                s = self._values(nodes, at)
                result.psi[nodes] = sum(part @ x.T for part, x in zip(s, by_s.x)) * self.Y.weights[nodes, None]
            v = self._by_u(nodes, at, w)
            np.sum(v[0], axis=1, out=result.bias[nodes])
            for k in range(orders):
                D[k] += phi.values[nodes].T @ v[k]
            if at.directions is not None:
                D[0] += at.directions.phi[nodes].T @ v[1]
            if with_factors:
                result.phi[nodes] = -sum(part @ C.T for part, C in zip(v, at.C))
        if with_length:
            result.length = float(self.Y.sum(result.length))
        result.D = list(self.Y.sum(D))
        return result

    def _functional_at_nodes(self, nodes: slice, at: At, by_s: StageFunctional, order: int) -> np.ndarray:
        """w_k on a node block."""
        first = self._work[1][: nodes.stop - nodes.start] if order == 0 else None
        w = np.matmul(at.factors.psi.weighted[nodes], by_s.x[order], out=first)
        if order == 0 and at.directions is not None:
            w += at.directions.weighted[nodes] @ by_s.x[1]
        if by_s.x_q is not None:
            w += by_s.by_f[order][nodes] * by_s.x_q
        return self._rounded(w)

    def _by_u(self, nodes: slice, at: At, w: list[np.ndarray]) -> list[np.ndarray]:
        """v_k on a node block: the functionals in u and u_1."""
        u = self._affine(nodes, at)
        if len(w) == 1:
            self.activation.derivative(u, out=u)
            u *= at.length[0]
            w[0] *= u
            return [self._rounded(w[0])]
        slope, bend = self.activation.derivative(u), self.activation.second_derivative(u)
        bend *= self._affine(nodes, at, 1)
        v_0 = slope * (at.length[0] * w[0] + at.length[1] * w[1]) + at.length[0] * bend * w[1]
        return [self._rounded(v_0), self._rounded(at.length[0] * slope * w[1])]

    def _by_length(self, nodes: slice, at: At, w: list[np.ndarray]) -> float:
        """The functional in tau, `<w_0, sigma(u)> + <w_1, sigma'(u) u_1>`, the part of this node block."""
        u = self._affine(nodes, at)
        paired = np.sum(w[0] * self.activation(u))
        if len(w) == 2:
            slope = self.activation.derivative(u)
            paired += np.sum(w[1] * slope * self._affine(nodes, at, 1))
        return float(paired)

    def jacobian(self, at: At) -> list[np.ndarray]:
        """K_k = `Psi^T M diag(c_k) Phi`, one matrix a sample. Collective.

        Here c_0 = tau sigma'(u) and c_1 = tau sigma''(u) u_1 + tau_1 sigma'(u), so that dQ_0/dg = -K_0 beta and
        dQ_1/dg = -(K_1 beta + K_0 beta_1). Directions of the factors add to K_1 what they move in Phi and Psi.

        Parameters
        ----------
        at
            The point.

        Returns
        -------
        list of numpy.ndarray
            K_k, shape (samples, rank of psi, rank of phi), the same on every rank.
        """
        phi, psi = at.factors.phi, at.factors.psi
        K = np.zeros((len(at.a), psi.rank * phi.rank, self.samples))

        def products(left, right):
            return np.einsum("ni,nj->ijn", left[nodes], right[nodes], optimize=True).reshape(K.shape[1], -1)

        for nodes in self._node_blocks():
            u = self._affine(nodes, at)
            slope = self.activation.derivative(u)
            both = products(psi.weighted, phi.values)
            K[0] += both @ (at.length[0] * slope)
            if len(at.a) == 2:
                bend = self.activation.second_derivative(u) * self._affine(nodes, at, 1)
                K[1] += both @ (at.length[0] * bend + at.length[1] * slope)
            if at.directions is not None:
                turned = products(at.directions.weighted, phi.values) + products(psi.weighted, at.directions.phi)
                K[1] += turned @ (at.length[0] * slope)
        self.Y.sum(K)
        return [np.moveaxis(k.reshape(psi.rank, phi.rank, self.samples), 2, 0) for k in K]

    def advance(self, f: Sequence[np.ndarray], stages: Sequence[StageValue[At]]) -> list[np.ndarray]:
        """Add stages to f: `f_k + sum of weight * s_k`, in one pass over the nodes.

        Parameters
        ----------
        f
            Value, or value and tangent, shape (nodes, samples).
        stages
            The terms of the sum, from one layer or from many. They have at least as many orders as f.

        Returns
        -------
        list of numpy.ndarray
            New arrays of shape (nodes, samples).
        """
        f = [part.copy() for part in f]
        for nodes in self._node_blocks():
            for stage in stages:
                for part, s in zip(f, self._values(nodes, stage.argument)):
                    s *= stage.weight
                    part[nodes] += s
        return f

    def derivative(self, at: At, dC: Sequence[np.ndarray], out: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Derivative of `rate` in directions of C_k, in one pass over the nodes. Collective.

        Parameters
        ----------
        at
            The point.
        dC
            Directions of C_k, shape (rank of phi, samples).
        out
            Arrays of shape (nodes, samples), one an order, into which the derivatives of the s_k are written.

        Returns
        -------
        list of numpy.ndarray
            Derivatives of Q_k, shape (rank of psi, samples), the same on every rank.
        """
        phi, psi = at.factors.phi, at.factors.psi
        dQ = np.zeros((len(at.a), psi.rank, self.samples))
        for nodes in self._node_blocks():
            u = self._affine(nodes, at)
            slope = at.length[0] * self.activation.derivative(u)
            du = -(phi.values[nodes] @ dC[0])
            ds = [slope * du]
            if len(at.a) == 2:
                bend = at.length[1] * self.activation.derivative(u)
                bend += at.length[0] * self.activation.second_derivative(u) * self._affine(nodes, at, 1)
                ds.append(bend * du - slope * (phi.values[nodes] @ dC[1]))
            if at.directions is not None:
                ds[1] -= slope * (at.directions.phi[nodes] @ dC[0])
                dQ[1] += at.directions.weighted[nodes].T @ ds[0]
            for k, part in enumerate(ds):
                dQ[k] += psi.weighted[nodes].T @ part
                if out is not None:
                    out[k][nodes] = part
        return list(self.Y.sum(dQ))
