"""Adaptive cross approximation of a kernel: from some of its rows and columns, without a matrix of all values.

A step takes the row of the residual R_k = b - b_k through a node y*, and the column through the node z* where that row
is largest in the label measure,

    b_(k+1)(y, z) = b_k(y, z) + R_k(y, z*) R_k(y*, z) / R_k(y*, z*).

The next row is the one where that column is largest (partial pivoting). This alone may miss a part of Y x Z, whose rows
it never meets. Therefore pairs (y, z) are drawn at random. The approximation ends when their mean shows, with a
confidence, that the error is small enough; until then it continues with the row where the residual of the pairs is largest.
Each rank holds the columns and rows at its own nodes.
"""

from __future__ import annotations

import numpy as np
import scipy.stats

from fem_resnet.theory.limits.kernel_values import KernelValues, Nodes, draw_pairs

__all__ = ["CrossApproximation", "upper_limit"]


def upper_limit(squares: np.ndarray, confidence: float) -> float:
    """An upper limit of a mean, from a sample of shape (n,), by Student's distribution; infinite for n < 2."""
    if squares.size < 2:
        return np.inf
    return float(squares.mean() + scipy.stats.t.ppf(confidence, squares.size - 1) * squares.std(ddof=1) / squares.size**0.5)


class _Watched:
    """Pairs (y, z) drawn at random, and the residual b - b_k there. Collective."""

    def __init__(self, b: KernelValues, factors: list[np.ndarray], count: int, seed: int):
        sides = b.y, b.z
        self._measure = b.y.Y.measure * b.z.Y.measure
        self._samples = draw_pairs(*sides, count, seed)
        values = b.pairs(*(sample.rows(nodes.places) for sample, nodes in zip(self._samples, sides)))
        #: The largest |b| at the pairs.
        self.size = float(np.abs(values).max(initial=0.0))
        self._residual = values - np.einsum("ik,ik->i", *(part.rows(f) for part, f in zip(self._samples, factors)))

    def subtract(self, column: np.ndarray, row: np.ndarray) -> None:
        """Take a new cross into account."""
        at_pairs = [sample.rows(new[:, None])[:, 0] for sample, new in zip(self._samples, (column, row))]
        self._residual = self._residual - at_pairs[0] * at_pairs[1]

    def error(self, confidence: float) -> float:
        """An upper limit of the norm of b - b_k in L2(Y x Z)."""
        return (self._measure * upper_limit(self._residual**2, confidence)) ** 0.5

    def worst(self, round_off: float) -> tuple[int, int] | None:
        """The node y of the pair with the largest residual; None where all residuals are round-off."""
        if not np.abs(self._residual).max(initial=0.0) > round_off:
            return None
        return self._samples[0].node(int(np.argmax(np.abs(self._residual))))


class CrossApproximation:
    """b_k = U V^T at the nodes, which grows by a row and a column in each step.

    Parameters
    ----------
    b
        The values of the kernel.
    pairs
        About how many pairs (y, z) are drawn to watch the residual.
    confidence
        The confidence with which their mean bounds the mean over all pairs, between 0 and 1.
    largest_rank
        The largest rank that is allowed.

    Attributes
    ----------
    rank : int
        The number k of crosses so far.
    """

    def __init__(self, b: KernelValues, *, pairs: int, confidence: float, largest_rank: int):
        self._b, self._pairs, self._confidence, self._largest_rank = b, pairs, confidence, largest_rank
        self._factors = [np.empty((nodes.Y.nodes, 0), order="F") for nodes in (b.y, b.z)]
        self._free = [np.ones(nodes.Y.nodes) for nodes in (b.y, b.z)]
        self._grams = [np.empty((0, 0)), np.empty((0, 0))]
        self.rank = 0
        #: Residuals up to this are round-off.
        self._round_off = 0.0

    @property
    def _sides(self) -> tuple[Nodes, Nodes]:
        return self._b.y, self._b.z

    @property
    def factors(self) -> list[np.ndarray]:
        """U and V at the owned nodes, shape (nodes, rank) each."""
        return [factor[:, : self.rank] for factor in self._factors]

    @property
    def norm(self) -> float:
        """The norm of b_k in L2(Y x Z)."""
        return float(np.sqrt(max(np.sum(self._grams[0] * self._grams[1]), 0.0)))

    def extend(self, tolerance: float, seed: int) -> None:
        """Add rows and columns until the error is at most `tolerance` times the norm. Collective.

        Each call draws new pairs, because an earlier call took rows and columns through its own pairs.

        Parameters
        ----------
        tolerance
            The error relative to the norm; no unit.
        seed
            The seed of the pairs.

        Raises
        ------
        RuntimeError
            If the rank would exceed the largest one.
        """
        watched = _Watched(self._b, self.factors, self._pairs, seed)
        self._round_off = max(self._round_off, 1e-14 * watched.size)
        full = min(self._b.y.Y.size, self._b.z.Y.size)
        row = self._worst_row(watched)
        while row is not None:
            if self.rank >= full:
                return
            if self.rank >= self._largest_rank:
                error = watched.error(self._confidence)
                raise RuntimeError(
                    f"compress: expected an error of {tolerance:.2g} of the norm, got {error:.2g} for the norm "
                    f"{self.norm:.3g} at rank {self.rank}, the largest one allowed; take a larger tolerance, or a larger "
                    f"'largest_rank'"
                )
            column, added = self._add(row, watched)
            small = added <= tolerance * self.norm
            if small and watched.error(self._confidence) <= tolerance * self.norm:
                return
            row = None if column is None or small else self._b.y.largest(np.abs(column) * self._free[0])
            row = row or self._worst_row(watched)

    def _worst_row(self, watched: _Watched) -> tuple[int, int] | None:
        """The node y of the pair with the largest residual, unless its row was taken or all residuals are round-off."""
        node = watched.worst(self._round_off)
        if node is None:
            return None
        (free,) = self._b.y.from_owner(node, self._free[0])
        return node if free else None

    def _add(self, row: tuple[int, int], watched: _Watched) -> tuple[np.ndarray | None, float]:
        """Take the cross through a node y*.

        Returns
        -------
        column : numpy.ndarray or None
            The new column of U times M^(1/2), shape (nodes,); None where the row is round-off.
        added : float
            The norm of the new cross.
        """
        b, (U, V) = self._b, self.factors
        root_y, root_z = (np.sqrt(nodes.Y.weights) for nodes in self._sides)
        place, u = b.y.from_owner(row, b.y.places, U)
        self._take(0, row)
        residual_row = b.between(place[None], b.z.places)[0] - V @ u
        # Entries that are round-off are no pivots.
        pivot = b.z.largest(np.abs(residual_row) * (np.abs(residual_row) > self._round_off) * root_z * self._free[1])
        if pivot is None:
            return None, 0.0
        place, v, value = b.z.from_owner(pivot, b.z.places, V, residual_row)
        self._take(1, pivot)
        column = (b.between(b.y.places, place[None])[:, 0] - U @ v) / value
        self._append(column, residual_row)
        watched.subtract(column, residual_row)
        return column * root_y, float(np.sqrt(self._grams[0][-1, -1] * self._grams[1][-1, -1]))

    def _take(self, side: int, node: tuple[int, int]) -> None:
        rank, index = node
        if self._b.y.Y.comm.rank == rank:
            self._free[side][index] = 0.0

    def _append(self, column: np.ndarray, row: np.ndarray) -> None:
        for side, (nodes, new) in enumerate(zip(self._sides, (column, row))):
            factor = self._factors[side]
            if self.rank == factor.shape[1]:
                grown = np.empty((len(factor), max(8, 2 * self.rank)), order="F")
                grown[:, : self.rank] = factor
                factor = self._factors[side] = grown
            factor[:, self.rank] = new
            products = nodes.Y.sum(factor[:, : self.rank + 1].T @ (nodes.Y.weights * new))
            self._grams[side] = np.block([[self._grams[side], products[:-1, None]], [products[None]]])
        self.rank += 1
