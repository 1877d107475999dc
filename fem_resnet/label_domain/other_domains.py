"""Whether two label spaces may be of one label domain, on two meshes.

Meshes of one Y agree in dimension and in Euler's characteristic, an integer that counts holes, whatever the mesh. They agree
in measure, centre and spread up to what a coarse mesh cuts off of a round Y. What differs less than that is not told apart
here: a basis that moves there says how much of its functions is lost.
"""

from __future__ import annotations

import firedrake as fd
import numpy as np
from mpi4py import MPI

from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.plane_waves import PlaneWaves

__all__ = ["difference"]

#: A sphere of 24 quadrilaterals has a measure that is a seventh too small. Disks of 25 and 289 nodes differ by a tenth in
#: their spread, the largest that was seen in meshes that hold a few eigenfunctions.
_MEASURE, _CENTRE, _SPREAD = 0.25, 0.1, 0.2


def difference(Y: LabelSpace, other: LabelSpace) -> str | None:
    """What tells the domain of another label space from that of Y, in words; None where they may be one. Collective.

    Parameters
    ----------
    Y, other
        Label spaces of the same ranks.
    """
    if Y is other or Y.V.mesh() is other.V.mesh() and Y.numbers is None:
        return None
    if Y.numbers is not None or other.numbers is not None:
        return "a set of points"
    meshes = Y.V.mesh(), other.V.mesh()
    space, own = ([getattr(mesh, f"{which}_dimension") for mesh in meshes] for which in ("geometric", "topological"))
    if space[0] != space[1]:
        return f"in a space of {space[1]} dimensions, not {space[0]}"
    if own[0] != own[1]:
        return f"of {own[1]} dimensions, not {own[0]}"
    characteristics = [_euler_characteristic(mesh) for mesh in meshes]
    if characteristics[0] != characteristics[1]:
        return "another domain: Euler's characteristic is {1}, not {0}".format(*characteristics)
    waves = PlaneWaves(Y.one), PlaneWaves(other.one)
    measures = Y.one.measure, other.one.measure
    if abs(measures[1] - measures[0]) > _MEASURE * max(measures):
        return "another domain: |Y| is {1:.4g}, not {0:.4g}".format(*measures)
    length = max(each.length for each in waves)
    if np.linalg.norm(waves[1].centre - waves[0].centre) > _CENTRE * length:
        centres = [each.centre.round(3).tolist() for each in waves]
        return "another domain: its centre is {1}, not {0}".format(*centres)
    if np.linalg.norm(waves[1].spread - waves[0].spread, 2) > _SPREAD * length**2:
        return "another domain, of another shape"
    return None


def _euler_characteristic(mesh: fd.MeshGeometry) -> int:
    """Vertices less edges plus faces less cells. Collective."""
    if mesh.extruded:
        return 0 if mesh.extruded_periodic else _counted(mesh.topology._base_mesh, mesh.comm)
    return _counted(mesh.topology, mesh.comm)


def _counted(topology, comm: MPI.Comm) -> int:
    plex = topology.topology_dm
    owned = plex.createPointNumbering().getIndices() >= 0
    parts = [owned[slice(*plex.getDepthStratum(d))].sum() for d in range(plex.getDepth() + 1)]
    return int(comm.allreduce(sum((-1) ** d * int(part) for d, part in enumerate(parts))))
