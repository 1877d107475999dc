r"""The mean of sigma over the segment from u0 to u1: the discrete gradient of its primitive.

    D(u0, u1) = int_0^1 sigma(u0 + theta (u1 - u0)) d theta = (Sigma(u1) - Sigma(u0)) / (u1 - u0),    D(u, u) = sigma(u)

The quotient loses digits where u1 is near u0. There the integral is evaluated, by Gauss's rule on each side of the
joints of sigma. With theta_0 = 1 - theta and theta_1 = theta the derivatives are

    D_k = int theta_k sigma' d theta,      D_jk = int theta_j theta_k sigma'' d theta        (with the jumps of sigma'),

and, where u1 is far from u0, with d = u1 - u0,

    D_1 = (sigma(u1) - D) / d,             D_11 = (sigma'(u1) - 2 D_1) / d,       D_01 = (D_1 - D_0) / d,
    D_0 = (D - sigma(u0)) / d,             D_00 = (2 D_0 - sigma'(u0)) / d.
"""

from __future__ import annotations

import itertools

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.activation.pieces import right_of

__all__ = ["Secant"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)
#: Gauss's rule on [0, 1].
_NODES, _WEIGHTS = (1 + _NODES) / 2, _WEIGHTS / 2
#: The rule is tried on |u| <= this, to find the lengths on which it has all digits; farther out activations are smoother.
_RANGE = 16.0


class Secant:
    """D(u0, u1) of an activation, pointwise, with first and second derivatives; free of cancellation at u1 near u0.

    Parameters
    ----------
    activation
        sigma. Its primitive is used where u1 is far from u0.

    Attributes
    ----------
    near : float
        Up to this distance of u0 and u1 the integral is evaluated, beyond it the quotient.

    Examples
    --------
    >>> from fem_resnet.activation.activation import get_activation
    >>> D = Secant(get_activation("relu"))
    >>> D(np.array([1.0, -1.0, -2.0]), np.array([1.0, 1.0, -1.0]))[0].round(12).tolist()
    [1.0, 0.25, 0.0]
    """

    def __init__(self, activation: Activation):
        self._sigma = (activation, activation.derivative, activation.second_derivative)
        self._primitive = activation.primitive
        ends = (-np.inf, *sorted(activation.joints), np.inf)
        self._pieces = list(itertools.pairwise(ends))
        self._jumps = [(c, float(activation.derivative(right_of(c)) - activation.derivative(c))) for c in activation.kinks]
        self.near = self._smooth_length()

    def __call__(self, u0: np.ndarray, u1: np.ndarray, order: int = 0) -> list[np.ndarray]:
        """D, then up to the order D_0, D_1, then D_00, D_01, D_11.

        Parameters
        ----------
        u0, u1
            The ends of the segments, arrays of one shape.
        order
            Of the derivatives: 0, 1 or 2.

        Returns
        -------
        list of numpy.ndarray
            1, 3 or 6 new arrays of that shape.
        """
        results = [np.empty(np.shape(u0)) for _ in range((1, 3, 6)[order])]
        near = np.abs(u1 - u0) <= self.near
        for mask, formula in ((near, self._integrals), (~near, self._quotients)):
            if mask.any():
                for result, values in zip(results, formula(u0[mask], u1[mask], order)):
                    result[mask] = values
        return results

    def _quotients(self, u0, u1, order):
        d = u1 - u0
        D = (self._primitive(u1) - self._primitive(u0)) / d
        if order == 0:
            return [D]
        sigma, slope, _ = self._sigma
        D_0, D_1 = (D - sigma(u0)) / d, (sigma(u1) - D) / d
        if order == 1:
            return [D, D_0, D_1]
        return [D, D_0, D_1, (2 * D_0 - slope(u0)) / d, (D_1 - D_0) / d, (slope(u1) - 2 * D_1) / d]

    def _integrals(self, u0, u1, order):
        d = u1 - u0
        same = d == 0
        divisor = np.where(same, 1.0, d)
        totals = [np.zeros_like(u0) for _ in range((1, 3, 6)[order])]
        for left, right in self._pieces:
            start, end = np.clip(u0, left, right), np.clip(u1, left, right)
            # The part of the segment in this piece. A point at a joint belongs to the left, as its derivatives do.
            part = np.where(same, (u0 > left) & (u0 <= right), (end - start) / divisor)
            if not part.any():
                continue
            first = (start - u0) / divisor
            for node, weight in zip(_NODES, _WEIGHTS):
                s, theta = start + node * (end - start), first + node * part
                _add(totals, weight * part, theta, [sigma(s) for sigma in self._sigma[: order + 1]])
        if order == 2:
            for c, jump in self._jumps:
                theta = (c - u0) / divisor
                crossed = jump * (theta > 0) * (theta < 1) * ~same / np.abs(divisor)
                for total, power in zip(totals[3:], ((1 - theta) ** 2, (1 - theta) * theta, theta**2)):
                    total += crossed * power
        return totals

    def _smooth_length(self) -> float:
        """The largest 2^-k up to which Gauss's rule has all digits, between joints."""
        length = 1.0
        while length > 2.0**-12:
            starts = np.arange(-_RANGE, _RANGE, length / 2)
            crossed = [(starts < c) & (starts + length > c) for c, _ in self._pieces[1:]]
            starts = starts[~np.any(crossed, axis=0)] if crossed else starts
            if all(self._has_all_digits(sigma, starts, length) for sigma in self._sigma):
                break
            length /= 2
        return length

    @staticmethod
    def _has_all_digits(sigma, starts, length) -> bool:
        def mean(start, length):
            return sum(weight * sigma(start + node * length) for node, weight in zip(_NODES, _WEIGHTS))

        halves = (mean(starts, length / 2) + mean(starts + length / 2, length / 2)) / 2
        size = np.abs(halves).max(initial=0.0)
        return bool(np.abs(mean(starts, length) - halves).max(initial=0.0) <= 4e-15 * max(size, 1e-300))


def _add(totals, weight, theta, values):
    """Add the terms of one of Gauss's nodes to D, D_k, D_jk."""
    totals[0] += weight * values[0]
    if len(values) > 1:
        slope = weight * values[1]
        totals[1] += slope * (1 - theta)
        totals[2] += slope * theta
    if len(values) > 2:
        bend = weight * values[2]
        totals[3] += bend * (1 - theta) ** 2
        totals[4] += bend * (1 - theta) * theta
        totals[5] += bend * theta**2
