"""Orthonormal functions in the label measure: values Q at the nodes with Q^T M Q = 1.

=====================  ==============================================  ==============================================
function               result                                          method
=====================  ==============================================  ==============================================
`orthonormal`          a Basis with the span of one Basis              Cholesky: P R^-1, with R = `Basis.root`
`joint_span`           a Basis with the span of several                singular values of R, then `orthonormal`
`orthonormal_factors`  Q and R with values P = Q R                     QR on each rank, then QR of the ranks' factors
`closest_orthonormal`  the orthonormal functions closest to values P   P G^(-1/2), with G = P^T M P
=====================  ==============================================  ==============================================

Cholesky is the cheapest and squares the condition number of P. QR does not, and takes dependent functions too. P G^(-1/2)
rotates with P, whereas a triangular factor depends on the order of the functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["closest_orthonormal", "gram_matrix", "joint_span", "orthonormal", "orthonormal_factors"]


def orthonormal(basis: Basis) -> Basis:
    """The basis itself if it is orthonormal in the label measure, else an orthonormal one of the same span. Collective."""
    if np.abs(basis.gram - np.eye(basis.rank)).max() < 1e-10:
        return basis
    return Basis(basis.Y, scipy.linalg.solve_triangular(basis.root, basis.values.T, trans="T").T, "given")


def joint_span(Y: LabelSpace, bases: Sequence[Basis]) -> Basis:
    """An orthonormal basis of all functions of several bases on Y; functions that depend on others add none. Collective."""
    distinct = list(dict.fromkeys(bases))
    if len(distinct) == 1:
        (basis,) = distinct
    else:
        functions = np.hstack([basis.values / np.sqrt(np.diag(basis.gram)) for basis in distinct])
        _, R = orthonormal_factors(Y, functions)
        _, size, turn = np.linalg.svd(R, full_matrices=False)
        kept = size > 1e-12 * size[0]  # round-off of a sum of so many functions of norm one
        basis = Basis(Y, functions @ (turn[kept].T / size[kept]), "given")
    return orthonormal(orthonormal(basis))  # one pass is not enough for a basis that is nearly dependent


def orthonormal_factors(Y: LabelSpace, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q and R with `Q R = values` and `Q^T M Q = 1`. Collective.

    Parameters
    ----------
    Y
        The label domain.
    values
        Functions at the owned nodes, shape (nodes, functions); they may be linearly dependent.

    Returns
    -------
    Q : numpy.ndarray
        Shape (nodes, count), count the smaller of the numbers of functions and of all nodes.
    R : numpy.ndarray
        Upper triangular, shape (count, functions), the same on every rank.
    """
    root = np.sqrt(Y.weights)[:, None]
    mine, factor = np.linalg.qr(root * values)
    factors = Y.comm.allgather(factor)
    start = sum(len(part) for part in factors[: Y.comm.rank])
    Q, R = np.linalg.qr(np.concatenate(factors))
    return mine @ Q[start : start + len(factor)] / root, R


def closest_orthonormal(Y: LabelSpace, values: np.ndarray) -> np.ndarray:
    """The orthonormal functions closest to these, `P G^(-1/2)`, shape (nodes, functions). Collective.

    Parameters
    ----------
    Y
        The label domain.
    values
        P, linearly independent functions at the owned nodes, shape (nodes, functions).
    """
    sizes, directions = np.linalg.eigh(gram_matrix(Y, values))
    return values @ (directions / np.sqrt(sizes)) @ directions.T


def gram_matrix(Y: LabelSpace, values: np.ndarray) -> np.ndarray:
    """`P^T M P` of functions at the owned nodes, shape (functions, functions), the same on every rank. Collective.

    Parameters
    ----------
    Y
        The label domain.
    values
        P, shape (nodes, functions).
    """
    return Y.sum((values * Y.weights[:, None]).T @ values)
