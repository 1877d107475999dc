"""The nodes of a small label domain, whose values every rank holds."""

from __future__ import annotations

import numpy as np

from fem_resnet.label_domain.basis import node_numbers
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["Cells"]


class Cells:
    """The nodes of a label domain in an order that does not depend on the partition. Every rank holds the values of all.

    The order is that of `cell_indicators`: by coordinates, the last one slowest. The nodes of `point_space` keep their own
    order.

    Parameters
    ----------
    Y
        The label domain. Collective over its communicator.

    Attributes
    ----------
    Y : LabelSpace
    weights : numpy.ndarray
        w of all nodes, shape (n,).
    own : numpy.ndarray
        The places of this rank's nodes among all, shape (nodes,).
    """

    def __init__(self, Y: LabelSpace):
        self.Y = Y
        self.own = node_numbers(Y)
        self._all = np.concatenate(Y.comm.allgather(self.own))
        self.weights = self.gather(Y.weights)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """The values at all nodes, shape (n, ..), from those at each rank's nodes, shape (nodes, ..). Collective."""
        parts = np.concatenate(self.Y.comm.allgather(np.asarray(values, dtype=float)))
        ordered = np.empty_like(parts)
        ordered[self._all] = parts
        return ordered

    def gather_batch(self, values: np.ndarray, name: str) -> np.ndarray:
        """The values at all nodes of one sample or many from outside, shape (n, samples). Collective.

        Parameters
        ----------
        values
            Values at this rank's nodes, shape (nodes,) or (nodes, samples).
        name
            The name of the argument, for messages.

        Raises
        ------
        TypeError, ValueError
            If the shape is another one, or a value is not finite; on all ranks alike.
        """
        return self.gather(self.Y.values(self.Y.batch(values, name)))
