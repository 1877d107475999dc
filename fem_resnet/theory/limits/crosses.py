"""Compression of a kernel from some of its rows and columns, with an error that a sample judges.

Adaptive cross approximation finds factors (`cross_approximation`), whose singular values are then truncated. The error is
estimated at pairs (y, z) drawn at random. Whole rows are drawn at random too, because a few pairs miss what a kernel
has near y = z alone. The larger one of both limits is stated, times a factor: no sample bounds the mean of squares that
are large on a small set.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from fem_resnet.theory.limits.compression import Compression, KernelError, decompose, least_rank, low_rank_kernel
from fem_resnet.theory.limits.cross_approximation import CrossApproximation, upper_limit
from fem_resnet.theory.limits.kernel_values import KernelValues, draw_pairs

__all__ = ["compress_by_crosses"]

#: How many pairs steer the cross approximation; and how many other pairs, and whole rows, judge its error.
_STEERING, _JUDGING, _ROWS = 4096, 16384, 32
#: The stated error is this many times the limit of Student's distribution, which is a little short for squares, as these
#: are skew.
FACTOR = 1.2
#: Parts of the tolerance that the cross approximation and the truncation may use; the pairs are tried one after the other.
_PARTS = ((0.3, 0.65), (0.2, 0.6), (0.1, 0.5), (0.05, 0.3))


def compress_by_crosses(b: KernelValues, tolerance: float, largest_rank: int, confidence: float, seed: int) -> Compression:
    """A kernel of low rank whose error is within the tolerance with a confidence. Collective.

    Parameters
    ----------
    b
        The values of the kernel.
    tolerance, largest_rank
        As for `compress`.
    confidence, seed
        As for `KernelSampling`.

    Raises
    ------
    RuntimeError
        If the rank would exceed the largest one, or the error is not known to be within the tolerance.
    """
    spaces = b.y.Y, b.z.Y
    cross = CrossApproximation(b, pairs=_STEERING, confidence=confidence, largest_rank=largest_rank)
    seeds = itertools.count(16 * seed)
    judge = _Judge(b, seeds)
    # The judge is asked once for each entry of _PARTS and has two samples. All its answers hold with the confidence.
    each = 1 - (1 - confidence) / (2 * len(_PARTS))
    for of_cross, of_truncation in _PARTS:
        cross.extend(of_cross * tolerance, next(seeds))
        Q, s, rest = decompose(spaces, cross.factors, np.eye(cross.rank))
        r = least_rank(s, rest, of_truncation * tolerance, largest_rank)
        factors = [q[:, :r] for q in Q]
        error, residual = judge.limit(factors, s[:r], each)
        norm = rest[0] if r == s.size else (rest[0] ** 2 - rest[r] ** 2) ** 0.5
        if error <= tolerance * norm:
            break
    else:
        raise RuntimeError(
            f"compress: at rank {r} the error is only known to be below {error / norm:.2g} of the norm, with confidence "
            f"{confidence:g}; expected {tolerance:.2g}. Take a larger tolerance, or a larger 'affordable', so that all "
            f"values are computed"
        )
    stated = KernelError(error)
    return Compression(
        low_rank_kernel(spaces, factors),
        s[:r],
        "cross",
        float(norm),
        stated,
        stated,
        confidence,
        (float(np.abs(residual).max()), float(-np.log1p(-each) / residual.size)),
        int(spaces[0].comm.allreduce(b.evaluations)),
    )


class _Judge:
    """Pairs and whole rows of b that the approximation was not made with. Collective."""

    def __init__(self, b: KernelValues, seeds: Iterator[int]):
        self._b, self._measure = b, b.y.Y.measure * b.z.Y.measure
        self._pairs = draw_pairs(b.y, b.z, _JUDGING, next(seeds))
        self._at_pairs = b.pairs(*(sample.rows(nodes.places) for sample, nodes in zip(self._pairs, (b.y, b.z))))
        self._rows, _ = draw_pairs(b.y, b.y, _ROWS, next(seeds))
        self._in_rows = b.between(self._rows.rows(b.y.places), b.z.places)

    def limit(self, factors: Sequence[np.ndarray], s: np.ndarray, confidence: float) -> tuple[float, np.ndarray]:
        """An upper limit of the norm of b - b_r, and the residuals at the pairs, shape (pairs,)."""
        phi, psi = factors
        of_pairs = self._at_pairs - np.einsum("ik,k,ik->i", self._pairs[0].rows(phi), s, self._pairs[1].rows(psi))
        of_rows = self._in_rows - (self._rows.rows(phi) * s) @ psi.T
        Z = self._b.z.Y
        # Each entry of the first and each row of the second estimates the mean over Y x Z.
        samples = of_pairs**2, Z.sum(of_rows**2 @ Z.weights) / Z.measure
        return FACTOR * (self._measure * max(upper_limit(sample, confidence) for sample in samples)) ** 0.5, of_pairs
