"""How many eigenvalues lie left of a vertical line, for all matrices near one: what a verdict on signs may stand on.

With X from Lyapunov's equation (A - x)^H X + X (A - x) = I, A - x and X have as many eigenvalues in the left half plane as
each other (Ostrowski and Schneider), and so has A + E - x for every E with 2 |E| |X| < 1, since

    (A + E - x)^H X + X (A + E - x) = I + E^H X + X E > 0.

In coordinates S, A becomes S^-1 A S and |E| at most cond(S) |E|: in eigenvectors that is the bound of Bauer and Fike, and sees
eigenvalues that are small beside |A|; in Schur's vectors, each shorter than the one before, a defective A is seen too.
"""

from __future__ import annotations

import warnings

import numpy as np
import scipy.linalg

#: How much shorter Schur's vectors are made.
_SHORTER = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)

__all__ = ["count_left", "count_left_in_gap"]

#: Parts of a gap between eigenvalues in which a line is tried: some sum of two eigenvalues may be twice x, where X does not exist.
_PARTS = (0.5, 0.38, 0.62, 0.25, 0.75)


def count_left(A: np.ndarray, x: float, error: float) -> int | None:
    """How many eigenvalues have a real part below x, the same for all matrices that are `error` or less from A.

    Parameters
    ----------
    A
        Shape (n, n).
    x
        The line's real part.
    error
        In the spectral norm; round-off in A - x and in what is computed here is added to it.

    Returns
    -------
    int or None
        None where they may differ, or it is not known that they do not.

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
    """`count_left` of some line between two, where one is found; None where none is, or low >= high."""
    for part in _PARTS if low < high else ():
        found = count_left(A, low + part * (high - low), error)
        if found is not None:
            return found
    return None
