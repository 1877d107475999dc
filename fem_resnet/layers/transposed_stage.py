"""The stage of a gradient flow, f_t = tau B^T sigma(a - B f), built on the stage of a layer.

Section 3.5 ends with this network. Its right-hand side is minus the gradient of int Sigma(a - B f) in the label measure, so
that for sigma' >= 0 two solutions never move apart. For B = Phi beta Psi^T M the transpose is B^T = Psi beta^T Phi^T M, and
with C = beta g

    Q'_0 = tau Phi^T M sigma(a - Phi C),      the result of a layer's `Stage` in which phi takes the place of psi,
    R_0  = beta^T Q'_0,                       s_0 = Psi R_0,        Q_0 = Psi^T M s_0 = G R_0,        G = Psi^T M Psi,
    R_1  = beta_1^T Q'_0 + beta^T Q'_1,       s_1 = Psi R_1 + Psi_1 R_0,      Q_1 = G R_1 + G_1 R_0.

So f moves in the span of Psi alone. All work on arrays of size nodes x samples happens in the layer's own stage, and this
module adds products of small matrices. Let x_k be functionals in Q_k, l_k functionals in s_k, and

    z_0 = G x_0 + G_1 x_1 + Psi^T l_0 + Psi_1^T l_1,      z_1 = G x_1 + Psi^T l_1.

Then the functionals in Q'_0 and Q'_1 are beta z_0 + beta_1 z_1 and beta z_1, and the functional in beta gets the additional
term Q'_0 z_0^T + Q'_1 z_1^T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from fem_resnet.layers.inputs import FactorDirections
from fem_resnet.layers.stage import Argument, Functionals, Stage, StageFunctional, StageValue
from fem_resnet.parameters.kernel import LowRankKernel

__all__ = ["TransposedStage"]


class TransposedStage(Stage[Argument]):
    """Stage evaluations of f_t = tau B^T sigma(a - B f), with the methods of `Stage`, which obey the same laws. Collective.

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
        """The point at which the layer's stage is evaluated: there phi takes the place of psi."""
        phi, directions = at.factors.phi, at.directions
        if self._square is None or self._square.phi is not phi:
            self._square = LowRankKernel(phi, phi)
        if directions is not None:
            directions = FactorDirections(directions.phi, directions.phi, self.Y.weights[:, None] * directions.phi)
        return replace(at, factors=self._square, directions=directions)

    def _fields(self, at: Argument, R: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """s_0, then s_1 if R has two orders."""
        yield at.factors.psi.values @ R[0]
        if len(R) == 2:
            s = at.factors.psi.values @ R[1]
            yield s if at.directions is None else s + at.directions.psi @ R[0]

    def _gram_direction(self, at: Argument) -> np.ndarray:
        """G_1 = Psi_1^T M Psi + Psi^T M Psi_1. Collective."""
        half = self.Y.sum(at.directions.weighted.T @ at.factors.psi.values)
        return half + half.T

    def _seen(self, at: Argument, R: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Q_k, from R_k."""
        Q = [at.factors.psi.gram @ part for part in R]
        if at.directions is not None:
            Q[1] += self._gram_direction(at) @ R[0]
        return Q

    def rate(self, at: Argument, out: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        R = _transposed(at.beta, self._stage.rate(self._inside(at)))
        self._fill(out, at, R)
        return self._seen(at, R)

    def _fill(self, out: Sequence[np.ndarray] | None, at: Argument, R: Sequence[np.ndarray]) -> None:
        """Write the s_k into arrays, if there are any."""
        if out is not None:
            for part, s in zip(out, self._fields(at, R)):
                part[...] = s

    def transpose(
        self, at: Argument, by_s: StageFunctional, with_length: bool = False, with_factors: bool = False
    ) -> Functionals:
        inside, x, beta = self._inside(at), by_s.x, at.beta
        l = [] if by_s.x_q is None else [by_s.x_q * part for part in by_s.by_f]
        z = self._pulled_back(at, x, l)
        y = [beta[0] @ part for part in z]
        if len(z) == 2:
            y[0] += beta[1] @ z[1]
        result = self._stage.transpose(inside, StageFunctional(tuple(y), None, ()), with_length, with_factors)
        Q = self._stage.rate(inside)
        result.beta = sum(part @ other.T for part, other in zip(Q, z))
        if with_factors:
            result.phi = result.phi + result.psi  # phi acts before sigma and behind it
            result.psi = self._by_psi(at, _transposed(beta, Q), x, l)
        return result

    def _pulled_back(self, at: Argument, x: Sequence[np.ndarray], l: Sequence[np.ndarray]) -> list[np.ndarray]:
        """z_k, from the functionals x_k and l_k. Collective."""
        psi, directions = at.factors.psi, at.directions
        z = [psi.gram @ part for part in x]
        if directions is not None:
            z[0] += self._gram_direction(at) @ x[1]
        if l:
            seen = [psi.values.T @ part for part in l]
            if directions is not None:
                seen[0] += directions.psi.T @ l[1]
            for part, other in zip(z, self.Y.sum(np.array(seen))):
                part += other
        return z

    def _by_psi(self, at, R, x, l) -> np.ndarray:
        """The functional in Psi, which occurs in Q_k twice and in s_k once."""
        psi, directions = at.factors.psi, at.directions
        result = psi.weighted @ sum(part @ other.T + other @ part.T for part, other in zip(R, x))
        if directions is not None:
            result += directions.weighted @ (x[1] @ R[0].T + R[0] @ x[1].T)
        for part, other in zip(l, R):
            result += part @ other.T
        return result

    def jacobian(self, at: Argument) -> list[np.ndarray]:
        K, gram, beta = self._stage.jacobian(self._inside(at)), at.factors.psi.gram, at.beta
        result = [gram @ beta[0].T @ K[0]]
        if len(K) == 2:
            result.append(gram @ (beta[1].T @ K[0] + beta[0].T @ K[1]))
            if at.directions is not None:
                result[1] += self._gram_direction(at) @ beta[0].T @ K[0]
        return result

    def advance(self, f: Sequence[np.ndarray], stages: Sequence[StageValue]) -> list[np.ndarray]:
        f = [part.copy() for part in f]
        # All stages of a layer move f in the span of one Psi, so their coefficients are added up first.
        for _, group in groupby(stages, lambda stage: (id(stage.argument.factors.psi), id(stage.argument.directions))):
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
    """R_k, from Q'_k."""
    if len(Q) == 1:
        return [beta[0].T @ Q[0]]
    return [beta[0].T @ Q[0], beta[1].T @ Q[0] + beta[0].T @ Q[1]]
