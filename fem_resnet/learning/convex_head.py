"""The head eliminated under a cross entropy: W and mu of least J in every evaluation, by Newton's method.

Cross entropies are convex in the output, which is linear in W and mu, and Tikhonov's term makes the minimum one. As in
`elimination`, the derivative of what is left is that at fixed W and mu, so it is as good as they are. A trust region, which
begins where the last evaluation ended, comes near the minimum by values of J. Closer than that they differ by round-off alone,
and Newton's method goes on by the gradient, while that falls.
"""

from __future__ import annotations

from collections.abc import Sequence

import firedrake as fd
import numpy as np
import scipy.optimize
import scipy.sparse.linalg

from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.learning.elimination import HeadSolve, Reading
from fem_resnet.learning.head import Head
from fem_resnet.learning.loss import Loss, least_squares
from fem_resnet.learning.prediction import PREDICTIONS
from fem_resnet.parameters.coordinates import Coordinates

__all__ = ["ConvexHeadSolve"]

#: Where the trust region ends, and where all ends: the gradient in W and mu over that at W = 0, mu = 0.
_NEAR, _THERE = 1e-5, 1e-13
#: The residual that conjugate gradients leave of a step.
_OF_A_STEP = 1e-8


class ConvexHeadSolve(HeadSolve):
    """As `HeadSolve`, for a loss that is convex in the output, and has a second derivative.

    Parameters
    ----------
    head, readings, weights
        As for `HeadSolve`.
    ridges
        lambda_W > 0 and lambda_mu.
    loss
        The loss.

    Attributes
    ----------
    condition : None
        There is no linear problem whose condition it would be.
    """

    def __init__(
        self, head: Head, readings: Sequence[Reading], weights: Sequence[float] | None, ridges: Sequence[float], loss: Loss
    ):
        #: The loss and the prediction of each reading: derivatives of the output are fitted by least squares.
        self._losses = [
            (loss, head.prediction) if reading.shifted else (least_squares, PREDICTIONS["identity"]) for reading in readings
        ]
        super().__init__(head, readings, weights, ridges)
        self._coordinates = Coordinates(head.parameters)
        self.unknowns = self.determined = self._coordinates.size
        self.condition = None
        dims = [parameter.dim for parameter in head.parameters]
        self._ridge = self._coordinates.units * np.repeat(self._ridges[: len(dims)], dims)
        self._x = np.zeros(self.unknowns)

    def _right_hand_side(self, targets: Sequence[fd.Function], weights: Sequence[float] | None):
        """Weights of the samples of each reading, and the values of its targets. Collective."""
        omega = sample_weights(weights, self.inputs[0].shape[1])
        return [weight * omega for weight in self._weights], [self._onto.Y.values(batch) for batch in targets]

    def _solve(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        if not all(np.isfinite(g).all() for g in arrays):  # a trial step went too far: J is not finite either
            return tuple(np.full(part.shape, np.nan) for part in self.solution)
        size = float(np.linalg.norm(self._value_and_gradient(np.zeros(self.unknowns), arrays)[1]))
        near = scipy.optimize.minimize(
            self._value_and_gradient, self._x, args=(arrays,), jac=True, hessp=self._curvature, method="trust-ncg",
            options={"gtol": _NEAR * size, "maxiter": 1000},
        )  # fmt: skip
        self._x = self._refined(near.x, near.jac, _THERE * size, arrays)
        return self._split(self._x)

    def _refined(self, x: np.ndarray, gradient: np.ndarray, least: float, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Newton's method from x, until the gradient is no longer than `least`, or falls no more. Collective."""
        while (length := np.linalg.norm(gradient)) > least:
            at, shape = x, (self.unknowns,) * 2
            H = scipy.sparse.linalg.LinearOperator(shape, lambda v, at=at: self._curvature(at, v, arrays), dtype=float)
            moved = x + scipy.sparse.linalg.cg(H, -gradient, rtol=_OF_A_STEP)[0]
            gradient = self._value_and_gradient(moved, arrays)[1]
            if not np.linalg.norm(gradient) < 0.5 * length:
                break
            x = moved
        return x

    def _split(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """The coefficients of W and mu, of the shapes of the head's parameters."""
        c = self._coordinates.matrix @ x
        return tuple(c[place].reshape(part.shape) for place, part in zip(self._coordinates.places, self.solution))

    def _outputs(self, x: np.ndarray, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The output of each reading at the nodes, linear in x."""
        W, mu = self._head.whole(*self._split(x))
        return [self._onto.expand(W @ g + shifted * mu[:, None]) for g, shifted in zip(arrays, self._shifted)]

    def _value_and_gradient(self, x: np.ndarray, arrays: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        """J, but for what W and mu have no part in, and its gradient. Collective."""
        Y, value, by_outputs = self._onto.Y, 0.0, []
        for (loss, prediction), O, C, omega in zip(self._losses, self._outputs(x, arrays), self._targets, self._roots):
            value += float(Y.sum(loss.value(Y, O, C, prediction)) @ omega)
            by_outputs.append(loss.gradient(Y, O, C, prediction) * omega)
        return value + 0.5 * float(self._ridge @ x**2), self._pulled(by_outputs, arrays) + self._ridge * x

    def _curvature(self, x: np.ndarray, v: np.ndarray, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The second derivative in the direction v. Collective."""
        Y = self._onto.Y
        parts = zip(self._losses, self._outputs(x, arrays), self._outputs(v, arrays), self._targets, self._roots)
        by_outputs = [loss.hessian(Y, O, C, prediction, V) * omega for (loss, prediction), O, V, C, omega in parts]
        return self._pulled(by_outputs, arrays) + self._ridge * v

    def _pulled(self, by_outputs: Sequence[np.ndarray], arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The transpose of `_outputs`. Collective."""
        Ds = [self._onto.pull_back(by_O) for by_O in by_outputs]
        by_W = np.sum([D @ g.T for D, g in zip(Ds, arrays)], axis=0)
        by_mu = np.sum([shifted * D.sum(axis=1) for D, shifted in zip(Ds, self._shifted)], axis=0)
        parts = zip(self._head.parameters, (by_W, by_mu))
        functionals = [parameter.space_basis.of_whole(part).ravel() for parameter, part in parts]
        return self._coordinates.matrix.T @ np.concatenate(functionals)
