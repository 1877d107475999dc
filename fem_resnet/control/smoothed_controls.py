r"""Smoothed extremal controls: (4.10) and the first-order condition of (4.8), with a width epsilon in the place of jumps.

Extremal controls jump where r* or f change their signs. Here s(x) = x / sqrt(1 + x^2) is in the place of the sign, so that
controls are smooth functions of f and r*, and lie inside of A. They tend to extremal controls as epsilon -> 0.

A layer has one control and several stages i of its time steps, with states f_i. Let r*_i be the co-state of a stage, with its
weight in the layer, and let v_i = sigma'(u_i) r*_i, so that H_a = sum_i v_i and H_b(y, z) = - sum_i v_i(y) f_i(z) are the
derivatives of the discrete J in the direction of (4.3), (4.4), with the sign of section 4.2.

`SmoothedRows`, for rows (a, X)(y) with b(y, z) = sum_k X_k(y) psi_k(z), and any number of samples. Let G be the derivative of
H in (a, X). The row at y maximises

    G . (a, X) + epsilon sum_k c_k sqrt(1 - xi_k^2)      over a `RowBox`:    xi_k = s(G_k h_k / (epsilon c_k))
    G . (a, X) + epsilon sqrt(1 - xi . xi)               over a `RowBall`:   xi = s(G R / epsilon), with the norm in s

where h_k is half the length of an edge of the box, xi the row over h or R, from the middle of the box, and c_k = 1 for a. For
X_k it is the part of Y on which psi_k lives, (int abs(psi_k))^2 / (abs(Y) int psi_k^2), so that epsilon has one meaning on all
meshes. Where G belongs to the rows themselves, they are stationary for H + epsilon sum_k c_k sqrt(1 - xi_k^2): that is the
first-order condition of (4.8), which for many samples is necessary and not sufficient.

`SmoothedBox`, for a box A and one sample. With bars for means over the stages, (4.10) becomes

    a = a_0 + h_a s(v / epsilon_v),        b(y, z) = b_0 - h_b s(v(y) / epsilon_v) s(f(z) / epsilon_f),

of rank 2, where (a_0, b_0) is the middle of A. v has the sign of r*, as sigma increases strictly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fem_resnet.control.controls import Controls
from fem_resnet.control.row_sets import RowBall, RowBox, controls_of_rows
from fem_resnet.control.sets.box import Box
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["SmoothedBox", "SmoothedControls", "SmoothedRows", "StagePairs"]


@dataclass(frozen=True)
class StagePairs:
    """States and co-states at the stages of all steps of one layer; or directions of these.

    Attributes
    ----------
    f, v : numpy.ndarray
        f_i and v_i = sigma'(u_i) r*_i, shape (stages, nodes, samples) each, at the nodes of this rank.
    """

    f: np.ndarray
    v: np.ndarray


class SmoothedControls(Protocol):
    """Controls of a layer as a smooth function of its stage pairs, and the derivative. Collective."""

    def value(self, at: StagePairs) -> Controls:
        """The controls.

        Parameters
        ----------
        at
            The pairs.
        """

    def tangent(self, at: StagePairs, along: StagePairs) -> Controls:
        """The derivative of `value` in a direction: a_1, and the factors of b_1, whose rank may be larger than that of b.

        Parameters
        ----------
        at, along
            The pairs, and the direction.
        """


class SmoothedRows(SmoothedControls):
    """Rows of a box or a ball that are smooth functions of f and v; see above.

    Parameters
    ----------
    A
        The set of rows.
    width
        epsilon > 0, in the unit of a density of H.
    """

    def __init__(self, A: RowBox | RowBall, width: float):
        self._A, self._psi, self._width = A, A.psi, width
        Y, values = A.psi.Y, A.psi.values
        if isinstance(A, RowBall):
            return
        ends = np.array([A.bias, *[A.kernel] * A.psi.rank])
        self._middle, self._half = ends.mean(axis=1), np.diff(ends, axis=1)[:, 0] / 2
        sums = Y.sum(Y.weights @ np.hstack([np.abs(values), values**2])).reshape(2, -1)
        self._share = np.concatenate([[1.0], sums[0] ** 2 / (Y.measure * sums[1])])

    def value(self, at: StagePairs) -> Controls:
        return controls_of_rows(self._A, self._rows(self._gradient(at))[0])

    def tangent(self, at: StagePairs, along: StagePairs) -> Controls:
        return controls_of_rows(self._A, self._rows(self._gradient(at), self._gradient(at, along))[1])

    def _gradient(self, at: StagePairs, along: StagePairs | None = None) -> np.ndarray:
        """G = (H_a, H_X), or its derivative along a direction: shape (nodes, 1 + rank)."""
        pairs = [(at.v, at.f)] if along is None else [(along.v, at.f), (at.v, along.f)]
        psi, Y = self._psi, self._psi.Y
        G = np.zeros((Y.nodes, 1 + psi.rank))
        G[:, 0] = np.sum((at if along is None else along).v, axis=(0, 2))
        for v, f in pairs:
            g = Y.sum(np.einsum("nk,ins->iks", psi.weighted, f))
            G[:, 1:] -= np.einsum("ins,iks->nk", v, g)
        return G

    def _rows(self, G: np.ndarray, G_1: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a gradient, and their derivative along a direction of it (0 without one)."""
        G_1 = np.zeros_like(G) if G_1 is None else G_1
        if isinstance(self._A, RowBall):
            R = self._A.radius
            x, x_1 = R / self._width * G, R / self._width * G_1
            root = np.sqrt(1 + np.sum(x**2, axis=1))[:, None]
            return R * x / root, R * (x_1 / root - x * np.sum(x * x_1, axis=1)[:, None] / root**3)
        per_unit = self._half / (self._width * self._share)
        s, slope = _sign(G * per_unit)
        return self._middle + self._half * s, self._half * per_unit * slope * G_1


class SmoothedBox(SmoothedControls):
    """(4.10) for a box and one sample, as a smooth function of f and v; see above.

    Parameters
    ----------
    Y
        The label domain.
    A
        The box.
    of_v, of_f
        epsilon_v and epsilon_f > 0, in the units of v and of f.
    weights
        Weights of the stages in the mean of f, shape (stages,).
    """

    def __init__(self, Y: LabelSpace, A: Box, of_v: float, of_f: float, weights: Sequence[float] | np.ndarray):
        self._Y, self._of_v, self._of_f, self._weights = Y, of_v, of_f, np.asarray(weights)
        self._middle, self._half = np.mean([A.bias, A.kernel], axis=1), np.diff([A.bias, A.kernel], axis=1)[:, 0] / 2

    def _signs(self, pairs: StagePairs) -> tuple[np.ndarray, np.ndarray]:
        """The means of v and f over their widths, shape (nodes,) each."""
        return pairs.v.sum(axis=0)[:, 0] / self._of_v, np.tensordot(self._weights, pairs.f, 1)[:, 0] / self._of_f

    def value(self, at: StagePairs) -> Controls:
        (a, b), (h_a, h_b), one = self._middle, self._half, np.ones(self._Y.nodes)
        (xi, _), (eta, _) = map(_sign, self._signs(at))
        return Controls(a + h_a * xi, np.column_stack([b * one, -h_b * xi]), np.column_stack([one, eta]))

    def tangent(self, at: StagePairs, along: StagePairs) -> Controls:
        h_a, h_b = self._half
        v_1, f_1 = self._signs(along)
        (xi, by_v), (eta, by_f) = map(_sign, self._signs(at))
        xi_1, eta_1 = by_v * v_1, by_f * f_1
        return Controls(h_a * xi_1, -h_b * np.column_stack([xi_1, xi]), np.column_stack([eta, eta_1]))


def _sign(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s(x) = x / sqrt(1 + x^2) and its derivative."""
    root = np.hypot(1.0, x)
    return x / root, root**-3
