"""The stage of a gradient flow: f_t = tau B^T sigma(a - B f), from that of a layer.

Section 3.5 ends with this network: minus the gradient of int Sigma(a - B f) in the label measure, so that for sigma' >= 0
two solutions never part. With B = Phi beta Psi^T M its transpose is B^T = Psi beta^T Phi^T M, and with C = beta g

    Q'_0 = tau Phi^T M sigma(a - Phi C)       what a layer (`layer.Stage`) gives whose psi is phi too,
    R_0  = beta^T Q'_0,                       s_0 = Psi R_0,        Q_0 = Psi^T M s_0 = G R_0,        G = Psi^T M Psi,
    R_1  = beta_1^T Q'_0 + beta^T Q'_1,       s_1 = Psi R_1 + Psi_1 R_0,      Q_1 = G R_1 + G_1 R_0.

So f moves in the span of Psi alone, all that is as large as nodes x samples happens in the layer's own stage, and what is
added here are products of small matrices. For functionals x_k of Q_k and l_k of s_k, with
z_0 = G x_0 + G_1 x_1 + Psi^T l_0 + Psi_1^T l_1 and z_1 = G x_1 + Psi^T l_1, those of Q'_0 and Q'_1 are
beta z_0 + beta_1 z_1 and beta z_1, and beta has one more, Q'_0 z_0^T + Q'_1 z_1^T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from fem_resnet.layers.inputs import FactorDirections
from fem_resnet.layers.stage import Argument, Cotangent, Functionals, Stage, StageValue
from fem_resnet.parameters.kernel import LowRankKernel

__all__ = ["TransposedStage"]


class TransposedStage(Stage):
    """Stage evaluations of f_t = tau B^T sigma(a - B f), with the verbs and laws of `Stage`. Collective as that is.

    Parameters
    ----------
    stage
        Stage evaluations of f_t = tau sigma(a - B f).
    """

    def __init__(self, stage: Stage):
        super().__init__(stage.Y, stage.activation, stage.samples, stage.real.name)
        self._stage = stage
        self._square: LowRankKernel | None = None

    def _inside(self, at: Argument) -> Argument:
        """What the layer's stage is evaluated at: psi is phi there."""
        phi, turning = at.factors.phi, at.turning
        if self._square is None or self._square.phi is not phi:
            self._square = LowRankKernel(phi, phi)
        if turning is not None:
            turning = FactorDirections(turning.phi, turning.phi, self.Y.weights[:, None] * turning.phi)
        return replace(at, factors=self._square, turning=turning)

    def _fields(self, at: Argument, R: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """s_0, then s_1 if R has two orders."""
        yield at.factors.psi.values @ R[0]
        if len(R) == 2:
            s = at.factors.psi.values @ R[1]
            yield s if at.turning is None else s + at.turning.psi @ R[0]

    def _gram_direction(self, at: Argument) -> np.ndarray:
        half = self.Y.sum(at.turning.weighted.T @ at.factors.psi.values)
        return half + half.T

    def _seen(self, at: Argument, R: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Q_k from R_k."""
        Q = [at.factors.psi.gram @ part for part in R]
        if at.turning is not None:
            Q[1] += self._gram_direction(at) @ R[0]
        return Q

    def rate(self, at: Argument, out: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        R = _transposed(at.beta, self._stage.rate(self._inside(at)))
        self._fill(out, at, R)
        return self._seen(at, R)

    def _fill(self, out: Sequence[np.ndarray] | None, at: Argument, R: Sequence[np.ndarray]) -> None:
        if out is not None:
            for part, s in zip(out, self._fields(at, R)):
                part[...] = s

    def transpose(self, at: Argument, dual: Cotangent, with_length: bool = False, with_factors: bool = False) -> Functionals:
        inside, x, beta = self._inside(at), dual.x, at.beta
        of_fields = [] if dual.x_q is None else [dual.x_q * part for part in dual.adjoint]
        z = self._pulled_back(at, x, of_fields)
        y = [beta[0] @ part for part in z]
        if len(z) == 2:
            y[0] += beta[1] @ z[1]
        result = self._stage.transpose(inside, Cotangent(tuple(y), None, ()), with_length, with_factors)
        Q = self._stage.rate(inside)
        result.beta = sum(part @ other.T for part, other in zip(Q, z))
        if with_factors:
            result.phi = result.phi + result.psi  # phi acts before sigma and behind it
            result.psi = self._by_psi(at, _transposed(beta, Q), x, of_fields)
        return result

    def _pulled_back(self, at: Argument, x: Sequence[np.ndarray], of_fields: Sequence[np.ndarray]) -> list[np.ndarray]:
        """z_k."""
        psi, turning = at.factors.psi, at.turning
        z = [psi.gram @ part for part in x]
        if turning is not None:
            z[0] += self._gram_direction(at) @ x[1]
        if of_fields:
            seen = [psi.values.T @ part for part in of_fields]
            if turning is not None:
                seen[0] += turning.psi.T @ of_fields[1]
            for part, other in zip(z, self.Y.sum(np.array(seen))):
                part += other
        return z

    def _by_psi(self, at, R, x, of_fields) -> np.ndarray:
        """The functional of Psi, which is in Q_k twice and in s_k once."""
        psi, turning = at.factors.psi, at.turning
        result = psi.weighted @ sum(part @ other.T + other @ part.T for part, other in zip(R, x))
        if turning is not None:
            result += turning.weighted @ (x[1] @ R[0].T + R[0] @ x[1].T)
        for part, other in zip(of_fields, R):
            result += part @ other.T
        return result

    def blocks(self, at: Argument) -> list[np.ndarray]:
        K, gram, beta = self._stage.blocks(self._inside(at)), at.factors.psi.gram, at.beta
        result = [gram @ beta[0].T @ K[0]]
        if len(K) == 2:
            result.append(gram @ (beta[1].T @ K[0] + beta[0].T @ K[1]))
            if at.turning is not None:
                result[1] += self._gram_direction(at) @ beta[0].T @ K[0]
        return result

    def advance(self, f: Sequence[np.ndarray], stages: Sequence[StageValue]) -> list[np.ndarray]:
        f = [part.copy() for part in f]
        # Within a layer all stages move f along one Psi: their coefficients are added up first.
        for _, group in groupby(stages, lambda stage: (id(stage.argument.factors.psi), id(stage.argument.turning))):
            terms = [(stage.weight, stage.argument) for stage in group]
            total = [
                sum(weight * part for (weight, _), part in zip(terms, parts))
                for parts in zip(*(_transposed(at.beta, self._stage.rate(self._inside(at))) for _, at in terms))
            ]
            for part, s in zip(f, self._fields(terms[0][1], total)):
                part += s
        return f

    def derivative(self, at: Argument, dC: Sequence[np.ndarray], out: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        R = _transposed(at.beta, self._stage.derivative(self._inside(at), dC))
        self._fill(out, at, R)
        return self._seen(at, R)


def _transposed(beta: Sequence[np.ndarray], Q: Sequence[np.ndarray]) -> list[np.ndarray]:
    """R_k."""
    if len(Q) == 1:
        return [beta[0].T @ Q[0]]
    return [beta[0].T @ Q[0], beta[1].T @ Q[0] + beta[0].T @ Q[1]]
