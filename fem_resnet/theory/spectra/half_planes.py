"""How many eigenvalues lie to the left of a vertical line, for all matrices near a given one.

Let X solve Lyapunov's equation (A - x)^H X + X (A - x) = I. Then A - x and X have the same number of eigenvalues in the left
half plane (Ostrowski and Schneider). A + E - x has this number too, for every E with 2 |E| |X| < 1, since

    (A + E - x)^H X + X (A + E - x) = I + E^H X + X E > 0.

In coordinates S, A becomes S^-1 A S, and the perturbation has a norm of at most cond(S) |E|. With eigenvectors as S that is
the bound of Bauer and Fike, which resolves eigenvalues that are small compared with |A|. With scaled Schur vectors as S,
each one shorter than the one before, the count also succeeds for a defective A.
"""

from __future__ import annotations

import warnings

import numpy as np
import scipy.linalg

#: By which factor each Schur vector is made shorter than the one before.
_SHORTER = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)

__all__ = ["count_left", "count_left_in_gap"]

#: Places in a gap between eigenvalues where a line is tried, in this order. X does not exist if two eigenvalues add up to 2 x.
_PARTS = (0.5, 0.38, 0.62, 0.25, 0.75)


def count_left(A: np.ndarray, x: float, error: float) -> int | None:
    """The number of eigenvalues with a real part below x, if it is the same for all matrices within `error` of A.

    Parameters
    ----------
    A
        The matrix, shape (n, n).
    x
        The real part of the line.
    error
        The distance, in the spectral norm. Round-off in A - x and in this function is added to it.

    Returns
    -------
    int or None
        None if the number may differ, or is not known to be the same.

    Examples
    --------
    >>> A = np.array([[2e-7, 1.0], [0.0, -1e-7]])
    >>> count_left(A, -5e-8, 1e-15), count_left(A, -5e-8, 1e-13)
    (1, None)
    """
    n = len(A)
    if not n:
        return 0
    error = error + 4 * n * np.finfo(float).eps * (np.linalg.norm(A, 2) + abs(x))
    schur = scipy.linalg.schur(A.astype(complex))[1]
    for S in (np.linalg.eig(A)[1], *(schur * shorter ** np.arange(n) for shorter in _SHORTER)):
        sizes = np.linalg.svd(S, compute_uv=False)
        if not sizes[-1] > np.finfo(float).eps * sizes[0]:
            continue
        B = np.linalg.solve(S, A @ S) - x * np.eye(n)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            X = scipy.linalg.solve_continuous_lyapunov(B.conj().T, np.eye(n))
        X = (X + X.conj().T) / 2
        if not np.isfinite(X).all():
            continue
        missed = np.linalg.norm(B.conj().T @ X + X @ B - np.eye(n), 2)
        if missed + 2 * sizes[0] / sizes[-1] * error * np.linalg.norm(X, 2) < 1:
            return int(np.count_nonzero(np.linalg.eigvalsh(X) < 0))
    return None


def count_left_in_gap(A: np.ndarray, low: float, high: float, error: float) -> int | None:
    """`count_left` of some line between low and high; None if no line gives a number, or low >= high."""
    for part in _PARTS if low < high else ():
        found = count_left(A, low + part * (high - low), error)
        if found is not None:
            return found
    return None
