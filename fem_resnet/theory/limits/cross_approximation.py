"""Adaptive cross approximation of a kernel: from some of its rows and columns, without a matrix of all values.

A step takes the row of the residual R_k = b - b_k through a node y* and the column through the node z* where that row
is largest in the label measure,

    b_(k+1)(y, z) = b_k(y, z) + R_k(y, z*) R_k(y*, z) / R_k(y*, z*),

then goes on with the row where that column is largest (partial pivoting). That alone may miss a part of Y x Z: rows
that it never sees. So pairs (y, z) are drawn at random, and it ends when their mean says so, with a confidence, not
before; else it goes on where the residual of the pairs is largest. Ranks hold the columns and rows at their own nodes.
"""

from __future__ import annotations

import numpy as np
import scipy.stats

from fem_resnet.theory.limits.kernel_values import KernelValues, draw_pairs

__all__ = ["CrossApproximation", "upper_limit"]


def upper_limit(squares: np.ndarray, confidence: float) -> float:
    """Limit of the mean that a sample of it is taken from, by Student's distribution."""
    if squares.size < 2:
        return np.inf
    return float(squares.mean() + scipy.stats.t.ppf(confidence, squares.size - 1) * squares.std(ddof=1) / squares.size**0.5)


class CrossApproximation:
    """b_k = U V^T at the nodes, which grows by a row and a column a step.

    Parameters
    ----------
    b
        The kernel's values.
    pairs
        About how many pairs (y, z) watch over the residual.
    confidence
        With which confidence their mean is taken for that of all pairs, between 0 and 1.
    largest_rank
        Where it gives up.

    Attributes
    ----------
    rank : int
    """

    def __init__(self, b: KernelValues, *, pairs: int, confidence: float, largest_rank: int):
        self._b, self._pairs, self._confidence, self._largest_rank = b, pairs, confidence, largest_rank
        self._factors = [np.empty((nodes.Y.nodes, 0), order="F") for nodes in (b.y, b.z)]
        self._free = [np.ones(nodes.Y.nodes) for nodes in (b.y, b.z)]
        self._grams = [np.empty((0, 0)), np.empty((0, 0))]
        self.rank = 0
        #: Residuals below this are round-off.
        self._round_off = 0.0

    @property
    def _sides(self):
        return self._b.y, self._b.z

    @property
    def factors(self) -> list[np.ndarray]:
        """U and V at the owned nodes, shape (nodes, rank)."""
        return [factor[:, : self.rank] for factor in self._factors]

    @property
    def norm(self) -> float:
        """Norm of b_k in L2(Y x Z)."""
        return float(np.sqrt(max(np.sum(self._grams[0] * self._grams[1]), 0.0)))

    def error(self) -> float:
        """Upper limit of the norm of b - b_k in L2(Y x Z), from the pairs that watch over it."""
        measure = self._b.y.Y.measure * self._b.z.Y.measure
        return (measure * upper_limit(self._watched**2, self._confidence)) ** 0.5

    def extend(self, tolerance: float, seed: int) -> None:
        """Add rows and columns until the error is at most `tolerance` of the norm. Collective.

        Pairs are drawn for `seed`: those of an earlier call have had rows and columns taken through them.

        Raises
        ------
        RuntimeError
            If the rank would exceed the largest one.
        """
        self._samples = draw_pairs(*self._sides, self._pairs, seed)
        values = self._b.pairs(*(sample.rows(nodes.places) for sample, nodes in zip(self._samples, self._sides)))
        self._round_off = max(self._round_off, 1e-14 * np.abs(values).max(initial=0.0))
        self._watched = values - np.einsum("ik,ik->i", *(part.rows(f) for part, f in zip(self._samples, self.factors)))
        row = self._worst_row()
        while row is not None:
            if self.rank >= min(self._largest_rank, self._b.y.Y.size, self._b.z.Y.size):
                if self.rank >= min(self._b.y.Y.size, self._b.z.Y.size):
                    return
                raise RuntimeError(
                    f"compress: at rank {self.rank} the error is {self.error():.2g} of a norm {self.norm:.3g}, a part "
                    f"expected {tolerance:.2g}; take a larger tolerance, or a larger 'largest_rank'"
                )
            column, added = self._add(row)
            small = added <= tolerance * self.norm
            if small and self.error() <= tolerance * self.norm:
                return
            row = None if column is None or small else self._b.y.largest(np.abs(column) * self._free[0])
            row = row or self._worst_row()

    def _worst_row(self) -> tuple[int, int] | None:
        """The node y of the watched pair with the largest residual; None where there is round-off alone."""
        if not np.abs(self._watched).max(initial=0.0) > self._round_off:
            return None
        node = self._samples[0].node(int(np.argmax(np.abs(self._watched))))
        (free,) = self._b.y.from_owner(node, self._free[0])
        return node if free else None

    def _add(self, row: tuple[int, int]) -> tuple[np.ndarray | None, float]:
        """Take the cross through a node y*: the new column of U in the label measure, and the norm of what is added."""
        b, (U, V) = self._b, self.factors
        root_y, root_z = (np.sqrt(nodes.Y.weights) for nodes in self._sides)
        place, u = b.y.from_owner(row, b.y.places, U)
        self._take(0, row)
        residual_row = b.block(place[None], b.z.places)[0] - V @ u
        # A node is drawn on, but where its row is nothing but round-off.
        pivot = b.z.largest(np.abs(residual_row) * (np.abs(residual_row) > self._round_off) * root_z * self._free[1])
        if pivot is None:
            return None, 0.0
        place, v, value = b.z.from_owner(pivot, b.z.places, V, residual_row)
        self._take(1, pivot)
        column = (b.block(b.y.places, place[None])[:, 0] - U @ v) / value
        self._append(column, residual_row)
        return column * root_y, float(np.sqrt(self._grams[0][-1, -1] * self._grams[1][-1, -1]))

    def _take(self, side: int, node: tuple[int, int]) -> None:
        rank, index = node
        if self._b.y.Y.comm.rank == rank:
            self._free[side][index] = 0.0

    def _append(self, column: np.ndarray, row: np.ndarray) -> None:
        drawn = []
        for side, (nodes, new) in enumerate(zip(self._sides, (column, row))):
            factor = self._factors[side]
            if self.rank == factor.shape[1]:
                grown = np.empty((len(factor), max(8, 2 * self.rank)), order="F")
                grown[:, : self.rank] = factor
                factor = self._factors[side] = grown
            factor[:, self.rank] = new
            products = nodes.Y.sum(factor[:, : self.rank + 1].T @ (nodes.Y.weights * new))
            self._grams[side] = np.block([[self._grams[side], products[:-1, None]], [products[None]]])
            drawn.append(self._samples[side].rows(new[:, None])[:, 0])
        self.rank += 1
        self._watched = self._watched - drawn[0] * drawn[1]
