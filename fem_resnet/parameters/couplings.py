"""Products with the coefficients beta of kernels that couple few functions of phi and psi.

A set of kernels may leave most of beta zero: functions of the Laplacian couple each eigenfunction with itself, kernels that
commute with rotations those of one angular number. Up to the order of the functions beta is then block diagonal, and products
with it cost as much as its blocks have entries.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components

__all__ = ["Couplings"]

#: Blocks with more than this part of all entries of beta are not worth the copies.
_WORTH = 0.25
#: Blocks of more entries than this are multiplied one by one, smaller ones together as one sparse matrix: measured.
_SMALL = 64


class Couplings:
    """The blocks of a matrix beta, and products with it.

    Parameters
    ----------
    shape
        (rank of phi, rank of psi).
    blocks
        Of each block the numbers of its rows and of its columns. No two blocks share a row or a column.
    """

    def __init__(self, shape: tuple[int, int], blocks: list[tuple[np.ndarray, np.ndarray]]):
        self._shape = shape
        self._blocks = blocks
        self._large = [(rows, columns) for rows, columns in blocks if rows.size * columns.size > _SMALL]
        small = [(rows, columns) for rows, columns in blocks if rows.size * columns.size <= _SMALL]
        pairs = [np.stack(np.meshgrid(*block, indexing="ij")).reshape(2, -1) for block in small]
        entries = np.hstack(pairs) if pairs else np.empty((2, 0), int)
        #: The entries of all small blocks, as a sparse matrix and as its transpose.
        self._small = [_Sparse(entries, shape), _Sparse(entries[::-1], shape[::-1])]

    @classmethod
    def of_pattern(cls, pattern: scipy.sparse.sparray) -> Couplings | None:
        """The blocks that hold all entries of a pattern; None where they hold so many that little is gained.

        Parameters
        ----------
        pattern
            A matrix of the shape of beta; where it has no entry beta is zero.
        """
        rows, columns = pattern.shape
        _, label = connected_components(scipy.sparse.block_array([[None, pattern], [pattern.T, None]]), directed=False)
        order = np.argsort(label, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
        both = [(part[part < rows], part[part >= rows] - rows) for part in parts]
        blocks = [(i, j) for i, j in both if i.size and j.size]
        entries = sum(i.size * j.size for i, j in blocks)
        return cls((rows, columns), blocks) if entries <= _WORTH * rows * columns else None

    def times(self, beta: np.ndarray, g: np.ndarray) -> np.ndarray:
        """`beta g`, shape (rank of phi, samples), for g of shape (rank of psi, samples)."""
        found = self._small[0].times(beta, g)
        for rows, columns in self._large:
            found[rows] = beta[np.ix_(rows, columns)] @ g[columns]
        return found

    def transposed_times(self, beta: np.ndarray, D: np.ndarray) -> np.ndarray:
        """`beta^T D`, shape (rank of psi, samples), for D of shape (rank of phi, samples)."""
        found = self._small[1].times(beta.T, D)
        for rows, columns in self._large:
            found[columns] = beta[np.ix_(rows, columns)].T @ D[rows]
        return found

    def outer(self, D: np.ndarray, g: np.ndarray) -> np.ndarray:
        """The entries of `D g^T` in the blocks, and 0 outside of them, of the shape of beta."""
        found = np.zeros(self._shape)
        for rows, columns in self._blocks:
            found[np.ix_(rows, columns)] = D[rows] @ g[columns].T
        return found


class _Sparse:
    """Products with some entries of a matrix: their rows and columns, shape (2, entries), in a matrix of this shape."""

    def __init__(self, entries: np.ndarray, shape: tuple[int, int]):
        self._rows, self._columns = entries[:, np.lexsort(entries[::-1])]
        self._starts = np.searchsorted(self._rows, np.arange(shape[0] + 1))
        self._shape = shape

    def times(self, matrix: np.ndarray, g: np.ndarray) -> np.ndarray:
        entries = matrix[self._rows, self._columns]
        return scipy.sparse.csr_array((entries, self._columns, self._starts), shape=self._shape) @ g
