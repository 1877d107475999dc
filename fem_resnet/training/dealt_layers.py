"""Layers that the members of an ensemble share out among them, as none needs what is computed for another one.

All members hold the same problem and data, each on its own communicator. Each does its own layers' part, and sends what it
found to the others. What is found for a layer does not depend on which member does it, so all have what one alone would have.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any, TypeVar

import firedrake as fd
import numpy as np
from mpi4py import MPI

from fem_resnet.arguments import instance
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.ranks import same, together, watched

__all__ = ["DealtLayers"]

_T = TypeVar("_T")
#: How far the J of members may be apart, as a part of J, for the same problem.
_ROUND_OFF = 1e-12


class DealtLayers:
    """The layers of a problem's network, dealt to the members of an ensemble in turn; without one, all are here.

    Parameters
    ----------
    problem
        The problem of this member.
    ensemble
        The ensemble, or None.
    **arguments
        What all members must give alike, by its names in messages.

    Attributes
    ----------
    comm : mpi4py.MPI.Comm
        The communicator of all members and their ranks.

    Raises
    ------
    TypeError, ValueError
        If this is no ensemble, a problem is on another communicator than its member's, or nodes or arguments differ between
        members; on all members alike.
    """

    def __init__(self, problem: LearningProblem, ensemble: fd.Ensemble | None, **arguments: Any):
        instance("ensemble", ensemble, (fd.Ensemble, NoneType))
        net = problem.net
        self._members = None if ensemble is None else watched(ensemble.ensemble_comm)
        self.comm = net.Y.comm if ensemble is None else watched(ensemble.global_comm)
        self._layers = net.layers
        if ensemble is None:
            return
        comm = net.Y.comm
        fits = MPI.Comm.Compare(comm, ensemble.comm) in (MPI.IDENT, MPI.CONGRUENT)
        if not self.comm.allreduce(fits, op=MPI.LAND):
            raise ValueError(
                f"ensemble: expected problems on the communicators of the members, of {ensemble.comm.size} ranks, got one of "
                f"{comm.size} here or elsewhere; make the mesh with comm=ensemble.comm"
            )
        # Values at nodes are sent from rank to rank.
        x = net.Y.coordinates
        if not self.comm.allreduce(np.array_equal(x, watched(ensemble.ensemble_comm).bcast(x)), op=MPI.LAND):
            raise ValueError("problem: expected the same label domain with the same nodes on all members, got others on one")
        same(self.comm, layers=self._layers, **arguments)

    def each(self, of_layer: Callable[[int], _T]) -> list[_T]:
        """What a function finds for each layer, on all members. Collective over all members.

        Each member calls it for its own layers. An error in one of them is raised on all members.
        """
        members = self._members
        if members is None:
            return [of_layer(l) for l in range(self._layers)]
        mine = together(members, lambda: [of_layer(l) for l in range(members.rank, self._layers, members.size)])
        parts = members.allgather(mine)
        return [parts[l % len(parts)][l // len(parts)] for l in range(self._layers)]

    def first(self, value: float) -> float:
        """J of the first member, by which all decide. Collective over all members.

        Raises
        ------
        ValueError
            If the members have different J, and so not the same problem; on all members.
        """
        if self._members is None:
            return value
        values = self._members.allgather(value)
        if max(values) - min(values) > _ROUND_OFF * max(map(abs, values)):
            raise ValueError(f"problem: expected the same on all members of the ensemble, got different J, {values}")
        return values[0]
