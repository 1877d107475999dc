"""Orthonormal bases as unknowns: the QR retraction in the label measure, with its derivatives.

A basis Phi of `rank` functions, orthonormal in M, is reached from a given one, Phi_0, by

    Phi(X) = qf(Phi_0 + P X),      P X = X - Phi_0 (Phi_0^T M X),      Y = qf(Y) R,    R^T R = Y^T M Y,

with R upper triangular. P takes from X the part that only turns the functions among themselves, since the kernel's matrix
beta can turn them too. So b = sum phi_i beta_ij psi_j determines P X, and second derivatives have no null directions from
such turns. The derivative in a direction X_1 is

    Phi_1 = Y_1 R^-1 - Phi U,      Y_1 = P X_1,      R_1 = U R,      U = up(A + A^T),      A = Phi^T M Y_1 R^-1,

where up(S) is the upper triangle of S with half the diagonal. Here each `adjoint` is the transpose of a derivative.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from fem_resnet.label_domain.basis import Basis
from fem_resnet.parameters.space_basis import BatchValues, StateValues

__all__ = ["Retraction"]


def _upper(S: np.ndarray) -> np.ndarray:
    """up(S)."""
    return np.triu(S) - np.diag(np.diag(S)) / 2


class Retraction:
    """The operator X -> Phi(X) on node values, shape (nodes, rank): see `tape.operator.Operator`.

    Parameters
    ----------
    basis
        Phi_0, orthonormal in the label measure.
    """

    ready = True

    def __init__(self, basis: Basis):
        self._basis = basis
        self._Y = basis.Y
        space = basis.Y.batch_space(basis.rank)
        self.inputs = [StateValues(basis.Y, space, unit=1.0)]
        self.output = BatchValues(basis.Y, space)

    def _project(self, X: np.ndarray) -> np.ndarray:
        return X - self._basis.values @ self._basis.project(X)

    def _project_transposed(self, functional: np.ndarray) -> np.ndarray:
        return functional - self._basis.weighted @ self._Y.sum(self._basis.values.T @ functional)

    def _at(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Phi and R."""
        Y = self._basis.values + self._project(X)
        R = np.linalg.cholesky(self._Y.sum(Y.T @ (self._Y.weights[:, None] * Y))).T
        return _divide(Y, R), R

    def forward(self, arrays: Sequence[np.ndarray], save: bool) -> np.ndarray:
        """Phi. Collective."""
        return self._at(arrays[0])[0]

    def _moved(self, phi: np.ndarray, R: np.ndarray, X_dot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Phi_1 and U."""
        moved = _divide(self._project(X_dot), R)
        A = self._Y.sum(phi.T @ (self._Y.weights[:, None] * moved))
        U = _upper(A + A.T)
        return moved - phi @ U, U

    def tangent(self, arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray]) -> np.ndarray:
        """Phi_1. Collective."""
        return self._moved(*self._at(arrays[0]), directions[0])[0]

    def _reduced(self, phi: np.ndarray, functional: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A functional of Y_1 R^-1, `d - M Phi S`, from a functional d of Phi_1; and S."""
        W = self._Y.sum(phi.T @ functional)
        S = _upper(W) + _upper(W).T
        return functional - self._Y.weights[:, None] * (phi @ S), S

    def adjoint(self, arrays: Sequence[np.ndarray], functional: np.ndarray) -> list[np.ndarray]:
        """A functional of X from a functional of Phi. Collective."""
        phi, R = self._at(arrays[0])
        return [self._project_transposed(_divide_transposed(self._reduced(phi, functional)[0], R))]

    def second_adjoint(
        self,
        arrays: Sequence[np.ndarray],
        directions: Sequence[np.ndarray],
        functional: np.ndarray,
        functional_dot: np.ndarray,
    ) -> list[np.ndarray]:
        """Derivative of `adjoint` where X moves in the directions and the functional in functional_dot. Collective."""
        phi, R = self._at(arrays[0])
        phi_dot, U = self._moved(phi, R, directions[0])
        reduced, S = self._reduced(phi, functional)
        W_dot = self._Y.sum(phi_dot.T @ functional + phi.T @ functional_dot)
        S_dot = _upper(W_dot) + _upper(W_dot).T
        reduced_dot = functional_dot - self._Y.weights[:, None] * (phi_dot @ S + phi @ S_dot)
        return [self._project_transposed(_divide_transposed(reduced_dot - reduced @ U.T, R))]


def _divide(Y: np.ndarray, R: np.ndarray) -> np.ndarray:
    """Y R^-1."""
    return scipy.linalg.solve_triangular(R, Y.T, trans="T").T


def _divide_transposed(Y: np.ndarray, R: np.ndarray) -> np.ndarray:
    """Y R^-T."""
    return scipy.linalg.solve_triangular(R, Y.T).T
