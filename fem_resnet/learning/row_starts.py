"""What rows of the Jacobian start from: f_I of chosen samples, or what psi sees of it, and the functionals of a lift's V."""

from __future__ import annotations

from itertools import product

import numpy as np

from fem_resnet.label_domain.basis import Basis
from fem_resnet.learning.problem import LearningProblem

__all__ = ["RowStarts"]


class RowStarts:
    """The initial states of a problem's samples. Collective.

    Parameters
    ----------
    problem
        The problem.
    seen_by
        The basis psi, where g = Psi^T M f_I is wanted; None for f_I at the nodes.
    """

    def __init__(self, problem: LearningProblem, seen_by: Basis | None):
        self._lift, self._sum = problem.lift, problem.net.Y.sum
        Y = problem.net.Y if self._lift is None else self._lift.fields
        values = Y.values(problem.batch.inputs)
        self._by_basis = seen_by is not None
        if self._lift is None or seen_by is None:
            self._values = values if seen_by is None else seen_by.project(values)
            return
        # Of each field in each channel what psi sees, shape (channels, fields, rank of psi, samples).
        shape, nodes = self._lift.matrix().shape, Y.one.nodes
        self._values = np.empty((*shape, seen_by.rank, values.shape[1]))
        for c, m in product(*map(range, shape)):
            alone = np.zeros((shape[0] * nodes, values.shape[1]))
            alone[c * nodes : (c + 1) * nodes] = values[m * nodes : (m + 1) * nodes]
            self._values[c, m] = seen_by.project(alone)

    def at(self, samples: np.ndarray) -> np.ndarray:
        """f_I at the nodes, or g, of some samples at the present V, shape (nodes or rank of psi, samples).

        Parameters
        ----------
        samples
            Their numbers.
        """
        chosen = np.ascontiguousarray(self._values[..., samples])
        if self._lift is None:
            return chosen
        V = self._lift.matrix()
        if self._by_basis:
            return np.tensordot(V, chosen, 2)
        fields = chosen.reshape(V.shape[1], -1)
        return (V @ fields).reshape(len(V) * (len(chosen) // V.shape[1]), samples.size)

    def rows_of_lift(self, samples: np.ndarray, functionals: np.ndarray) -> np.ndarray:
        """The functionals of what V is made of, shape (count, samples), from those of what `at` gives, of its shape.

        Parameters
        ----------
        samples
            As for `at`.
        functionals
            Of each sample apart.
        """
        chosen, (C, m) = self._values[..., samples], self._lift.matrix().shape
        if self._by_basis:
            products = np.einsum("rs,cmrs->cms", functionals, chosen)
        else:
            nodes = len(chosen) // m
            parts = (part.reshape(count, nodes, samples.size) for part, count in ((functionals, C), (chosen, m)))
            products = self._sum(np.einsum("cns,mns->cms", *parts))
        of_whole = self._lift.V.space_basis.of_whole
        return np.column_stack([of_whole(column).ravel() for column in np.moveaxis(products, 2, 0)])
