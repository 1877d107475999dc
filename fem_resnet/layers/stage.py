"""The stage of a layer: f_t = tau sigma(a - Phi C), seen through a basis, with its tangent and both transposes.

TS runs through a layer in a time from 0 to 1, so the length tau of the layer is a factor. With u = a - Phi C, nodes x
samples, C = beta g and g = Psi^T M f the coefficients that the layer sees of f:

    value       s_0 = tau sigma(u)                                    Q_0 = Psi^T M s_0: g_t of (3.5a), for any low-rank kernel
    tangent     s_1 = tau sigma'(u) u_1 + tau_1 sigma(u)              Q_1 = Psi^T M s_1,       u_1 = a_1 - Phi C_1
    transpose   v_0 = tau sigma'(u) w_0                               what (4.2) - (4.4) are made of:
                -> Phi^T v_0,  sum_s v_0                              d/dg = -beta^T Phi^T v_0,  d/dbeta = -Phi^T v_0 g^T
                                                                      d/da = sum_s v_0
    of both     v_1 = tau sigma'(u) w_1
                v_0 = sigma'(u) (tau w_0 + tau_1 w_1) + tau sigma''(u) u_1 w_1
    Jacobian    K   = Psi^T M diag(c) Phi, one block a sample         dQ_0/dg = -K beta for c = tau sigma'(u)

w_k, dual to s_k, is M Psi x_k + x_q lambda_k. Where the factors are learned, and have directions Phi_1 and Psi_1,

    u_1 = a_1 - Phi C_1 - Phi_1 C_0,       Q_1 = Psi^T M s_1 + Psi_1^T M s_0,       w_0 = .. + M Psi_1 x_1,
    d/dPhi = -(v_0 C_0^T + v_1 C_1^T),     d/dPsi = M (s_0 x_0^T + s_1 x_1^T).

An index 1 marks directions and what they bring. Values alone are the case
of one order, values with a tangent that of two: tuples have one or two entries throughout.

Only arrays, weights and a sum over the ranks occur here. Nodes are passed in blocks that fit the cache, so that u,
sigma(u) and sigma'(u) never exist as whole arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.inputs import FactorDirections
from fem_resnet.parameters.kernel import LowRankKernel

__all__ = ["Argument", "Cotangent", "Functionals", "LayerTrace", "Stage", "StageValue"]

#: Bytes of one block of u; two of them and the block's rows of Phi and Psi stay in a usual second-level cache.
_BLOCK_BYTES = 131072
_SMALLEST_BLOCK = 64


@dataclass(frozen=True)
class Argument:
    """What a stage is evaluated at, with one entry an order.

    Attributes
    ----------
    factors : LowRankKernel
        The bases phi and psi.
    length : tuple of float
        tau.
    a : tuple of numpy.ndarray
        Bias at the nodes, shape (nodes,).
    C : tuple of numpy.ndarray
        beta g, shape (rank of phi, samples).
    turning : FactorDirections or None
        Phi_1 and Psi_1, where there is a tangent and the factors have directions.
    beta : tuple of numpy.ndarray
        The kernel's coefficients themselves, which a layer with B^T in front wants (`transposed_stage`).
    """

    factors: LowRankKernel
    length: tuple[float, ...]
    a: tuple[np.ndarray, ...]
    C: tuple[np.ndarray, ...]
    turning: FactorDirections | None = None
    beta: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Cotangent:
    """Functionals of a stage's s_k, `M Psi x_k + x_q lambda_k`, with one entry an order.

    Attributes
    ----------
    x : tuple of numpy.ndarray
        Adjoints of g, shape (rank of psi, samples).
    x_q : numpy.ndarray or None
        One number a sample; None for 0.
    adjoint : tuple of numpy.ndarray
        lambda_k, dual to node values, shape (nodes, samples).
    cost : numpy.ndarray or None
        Adjoints of the samples' running costs, shape (orders, samples), where there are such; no affair of the stage.
    """

    x: tuple[np.ndarray, ...]
    x_q: np.ndarray | None
    adjoint: tuple[np.ndarray, ...]
    cost: np.ndarray | None = None


@dataclass
class Functionals:
    """Transpose of the derivative of a stage, and of that of its tangent.

    Attributes
    ----------
    D : list of numpy.ndarray
        Minus those of C_k, shape (rank of phi, samples), on every rank.
    bias : numpy.ndarray
        Of the bias at the owned nodes, `sum_s v_0`, shape (nodes,).
    length : float
        Of tau, where it is wanted.
    phi, psi : numpy.ndarray or None
        Of the factors' values at the owned nodes, shape (nodes, rank), where they are wanted.
    beta : numpy.ndarray or None
        Of beta where it acts other than through C_k, on every rank.
    """

    D: list[np.ndarray]
    bias: np.ndarray
    length: float = 0.0
    phi: np.ndarray | None = None
    psi: np.ndarray | None = None
    beta: np.ndarray | None = None


@dataclass(frozen=True)
class StageValue:
    """A stage of a step as f sees it: the term `weight * s_k` of the quadrature (3.3)."""

    weight: float
    argument: Argument


@dataclass
class LayerTrace:
    """What a forward solve leaves, from which f at the end of the layer follows from f at its start.

    Attributes
    ----------
    stages : iterable of StageValue
        The terms of the quadrature (3.3); none where the state carried f.
    end : list of numpy.ndarray or None
        f at the end, and its tangent, where the state carried them; with a running cost a row more, for c.
    steps : list of float
        The accepted steps, in parts of the layer.
    added : bool
        Whether the integral of f_t was added up on the way, so that f at the end needs no stages.
    """

    stages: Iterable[StageValue] = field(default_factory=list)
    end: list[np.ndarray] | None = None
    steps: list[float] = field(default_factory=list)
    added: bool = False


class Stage:
    """Stage evaluations of layers on one label domain, with one activation and one number of samples.

    Collective over the communicator of the label domain: one Allreduce a call of `rate`, `transpose` or `blocks`.
    Arrays of nodes are this rank's. The kernel's factors Phi and Psi are inputs, as a and C are.

    Parameters
    ----------
    Y
        The label domain.
    activation
        sigma.
    samples
        Number of samples in a batch.
    precision
        "double", or "single": then u, sigma(u), sigma'(u) and functionals at the nodes are float32; sums over nodes are not.
    """

    def __init__(self, Y: LabelSpace, activation: Activation, samples: int, precision: str = "double"):
        self.Y = Y
        self.activation = activation
        self.samples = samples
        self._block = max(_SMALLEST_BLOCK, _BLOCK_BYTES // (8 * samples))
        self.real = np.dtype(precision)
        self._work = [np.empty((min(self._block, Y.nodes), samples)) for _ in range(2)]

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self.Y.nodes, self._block):
            yield slice(start, min(start + self._block, self.Y.nodes))

    def arranged(self, adjoint: np.ndarray) -> np.ndarray:
        """An array (nodes, samples) as `transpose` reads it fastest: itself, or a copy."""
        return adjoint

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        """Values at the nodes as the precision has them, in place."""
        if self.real != values.dtype:
            values[...] = values.astype(self.real)
        return values

    def _affine(self, block: slice, at: Argument, order: int = 0, out: np.ndarray | None = None) -> np.ndarray:
        """U (order 0) or u_1 on a block of nodes."""
        u = self._work[0][: block.stop - block.start] if out is None else out
        np.matmul(at.factors.phi.values[block], at.C[order], out=u)
        if order == 1 and at.turning is not None:
            u += at.turning.phi[block] @ at.C[0]
        return self._rounded(np.subtract(at.a[order][block, None], u, out=u))

    def _values(self, block: slice, at: Argument) -> Iterator[np.ndarray]:
        """s_0, then s_1, on a block of nodes; each is good until the next."""
        u = self._affine(block, at)
        if len(at.a) == 1:
            self.activation(u, out=u)
            u *= at.length[0]
            yield self._rounded(u)
            return
        sigma, slope = self.activation(u), self.activation.derivative(u)
        yield self._rounded(at.length[0] * sigma)
        slope *= self._affine(block, at, 1)
        slope *= at.length[0]
        slope += at.length[1] * sigma
        yield self._rounded(slope)

    def rate(self, at: Argument, out: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """`Q_k = Psi^T M s_k`, shape (rank of psi, samples), on every rank.

        Parameters
        ----------
        at
            Where.
        out
            Arrays of shape (nodes, samples) that take the s_k themselves.
        """
        psi = at.factors.psi
        Q = np.zeros((len(at.a), psi.rank, self.samples))
        for block in self._blocks():
            for k, s in enumerate(self._values(block, at)):
                Q[k] += psi.weighted[block].T @ s
                if k == 0 and at.turning is not None:
                    Q[1] += at.turning.weighted[block].T @ s
                if out is not None:
                    out[k][block] = s
        return list(self.Y.sum(Q))

    def transpose(self, at: Argument, dual: Cotangent, with_length: bool = False, with_factors: bool = False) -> Functionals:
        """Transpose of the derivative in a, C, tau and the factors, and of that of the tangent.

        Parameters
        ----------
        at
            The stage where the derivative is taken.
        dual
            Functionals of its s_k.
        with_length, with_factors
            Whether those of tau, and of the factors, are wanted.
        """
        orders, phi, psi = len(at.a), at.factors.phi, at.factors.psi
        D = np.zeros((orders, phi.rank, self.samples))
        result = Functionals([], np.empty(self.Y.nodes))
        if with_factors:
            result.phi, result.psi = np.empty_like(phi.values), np.empty_like(psi.values)
        for block in self._blocks():
            w = [self._cotangent(block, at, dual, k) for k in range(orders)]
            if with_length:
                result.length += self._pair_rates(block, at, w)
            if with_factors:
                s = self._values(block, at)
                result.psi[block] = sum(part @ x.T for part, x in zip(s, dual.x)) * self.Y.weights[block, None]
            v = self._transposed(block, at, w)
            np.sum(v[0], axis=1, out=result.bias[block])
            for k in range(orders):
                D[k] += phi.values[block].T @ v[k]
            if at.turning is not None:
                D[0] += at.turning.phi[block].T @ v[1]
            if with_factors:
                result.phi[block] = -sum(part @ C.T for part, C in zip(v, at.C))
        if with_length:
            result.length = float(self.Y.sum(result.length))
        result.D = list(self.Y.sum(D))
        return result

    def _cotangent(self, block: slice, at: Argument, dual: Cotangent, order: int) -> np.ndarray:
        first = self._work[1][: block.stop - block.start] if order == 0 else None
        w = np.matmul(at.factors.psi.weighted[block], dual.x[order], out=first)
        if order == 0 and at.turning is not None:
            w += at.turning.weighted[block] @ dual.x[1]
        if dual.x_q is not None:
            w += dual.adjoint[order][block] * dual.x_q
        return self._rounded(w)

    def _transposed(self, block: slice, at: Argument, w: list[np.ndarray]) -> list[np.ndarray]:
        u = self._affine(block, at)
        if len(w) == 1:
            self.activation.derivative(u, out=u)
            u *= at.length[0]
            w[0] *= u
            return [self._rounded(w[0])]
        slope, bend = self.activation.derivative(u), self.activation.second_derivative(u)
        bend *= self._affine(block, at, 1)
        v_0 = slope * (at.length[0] * w[0] + at.length[1] * w[1]) + at.length[0] * bend * w[1]
        return [self._rounded(v_0), self._rounded(at.length[0] * slope * w[1])]

    def _pair_rates(self, block: slice, at: Argument, w: list[np.ndarray]) -> float:
        """The functional of tau: `<w_0, sigma(u)> + <w_1, sigma'(u) u_1>`, on this rank."""
        u = self._affine(block, at)
        paired = np.sum(w[0] * self.activation(u))
        if len(w) == 2:
            slope = self.activation.derivative(u)
            paired += np.sum(w[1] * slope * self._affine(block, at, 1))
        return float(paired)

    def blocks(self, at: Argument) -> list[np.ndarray]:
        """`Psi^T M diag(c_k) Phi` of each sample, shape (samples, rank of psi, rank of phi), on every rank.

        c_0 = tau sigma'(u) and c_1 = tau sigma''(u) u_1 + tau_1 sigma'(u), so that dQ_0/dg = -K_0 beta and
        dQ_1/dg = -(K_1 beta + K_0 beta_1). Directions of the factors add theirs to K_1.
        """
        phi, psi = at.factors.phi, at.factors.psi
        K = np.zeros((len(at.a), psi.rank * phi.rank, self.samples))

        def products(left, right):
            return np.einsum("ni,nj->ijn", left[block], right[block], optimize=True).reshape(K.shape[1], -1)

        for block in self._blocks():
            u = self._affine(block, at)
            slope = self.activation.derivative(u)
            both = products(psi.weighted, phi.values)
            K[0] += both @ (at.length[0] * slope)
            if len(at.a) == 2:
                bend = self.activation.second_derivative(u) * self._affine(block, at, 1)
                K[1] += both @ (at.length[0] * bend + at.length[1] * slope)
            if at.turning is not None:
                turned = products(at.turning.weighted, phi.values) + products(psi.weighted, at.turning.phi)
                K[1] += turned @ (at.length[0] * slope)
        self.Y.sum(K)
        return [np.moveaxis(k.reshape(psi.rank, phi.rank, self.samples), 2, 0) for k in K]

    def advance(self, f: Sequence[np.ndarray], stages: Sequence[StageValue]) -> list[np.ndarray]:
        """`f_k + sum c s_k`, new arrays of shape (nodes, samples), in one pass over the nodes.

        Parameters
        ----------
        f
            Value, or value and tangent.
        stages
            The terms of the sum, of one layer or of many; with as many orders at least.
        """
        f = [part.copy() for part in f]
        for block in self._blocks():
            for stage in stages:
                for part, s in zip(f, self._values(block, stage.argument)):
                    s *= stage.weight
                    part[block] += s
        return f

    def derivative(self, at: Argument, dC: Sequence[np.ndarray], out: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Derivative of `rate` in the directions dC of C_k, in one pass over the nodes."""
        phi, psi = at.factors.phi, at.factors.psi
        dQ = np.zeros((len(at.a), psi.rank, self.samples))
        for block in self._blocks():
            u = self._affine(block, at)
            slope = at.length[0] * self.activation.derivative(u)
            du = -(phi.values[block] @ dC[0])
            ds = [slope * du]
            if len(at.a) == 2:
                bend = at.length[1] * self.activation.derivative(u)
                bend += at.length[0] * self.activation.second_derivative(u) * self._affine(block, at, 1)
                ds.append(bend * du - slope * (phi.values[block] @ dC[1]))
            if at.turning is not None:
                ds[1] -= slope * (at.turning.phi[block] @ dC[0])
                dQ[1] += at.turning.weighted[block].T @ ds[0]
            for k, part in enumerate(ds):
                dQ[k] += psi.weighted[block].T @ part
                if out is not None:
                    out[k][block] = part
        return list(self.Y.sum(dQ))
