"""What the first layers see of an input: Psi^T M f, computed once for as long as the input stays the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from fem_resnet.label_domain.basis import Basis

__all__ = ["SeenInput"]


class SeenInput:
    """The coefficients Psi^T M f of the latest input.

    Parameters
    ----------
    comm
        The communicator of the label domain.
    """

    def __init__(self, comm: MPI.Comm):
        self._comm = comm
        self._array: Callable[[], np.ndarray | None] = _gone
        self._psi: Basis | None = None
        self._g: np.ndarray | None = None

    def through(self, psi: Basis, f: np.ndarray) -> np.ndarray:
        """Psi^T M f, shape (rank of psi, samples), read-only. Collective.

        It is kept while f is the same array and nobody may write into it.

        Parameters
        ----------
        psi
            The basis.
        f
            The input at the owned nodes, shape (nodes, samples).
        """
        known = self._array() is f and self._psi is psi
        if not self._comm.allreduce(known, op=MPI.LAND):  # one rank alone may have looked at the data
            self._g = psi.project(f)
            self._g.flags.writeable = False
            self._array, self._psi = (_gone if f.flags.writeable else weakref.ref(f)), psi
        return self._g


def _gone() -> None:
    """A weak reference whose array is gone."""
