"""Label domains without geometry: classes, point clouds, graphs.

A finite set of K points with weights w is a label domain like any other: DG of degree 0 on a mesh of K intervals of
lengths w_i, so that `int f dy = sum_i w_i f_i`, and integrals in UFL over the cells are right too. Where the points lie in
space, the intervals are short pieces of lines through them. The order of the points says nothing: only a graph makes some of
them neighbours, and without one there is no Laplacian. With edge weights A_ij the integral of squared gradients becomes

    <K f, f> = 1/2 sum_ij A_ij (f_i - f_j)^2,

and the Laplace eigenfunctions are the eigenvectors of the graph Laplacian, `K x = lambda diag(w) x`.
"""

from __future__ import annotations

import firedrake as fd
import numpy as np
import scipy.sparse
from mpi4py import MPI
from numpy.typing import ArrayLike
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import instance, integer, real_array
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.ranks import same

__all__ = ["class_space", "point_space"]

#: As many points on each rank, in their order.
_IN_ORDER = {"partitioner_type": "simple"}
_COMM = "give firedrake.COMM_WORLD or firedrake.COMM_SELF"


def point_space(
    weights: ArrayLike,
    points: np.ndarray | None = None,
    graph: scipy.sparse.sparray | np.ndarray | None = None,
    comm: MPI.Comm = MPI.COMM_WORLD,
) -> LabelSpace:
    """Label domain of K points; arguments are the same on every rank. Collective over `comm`.

    An array f of values at all points, shape (K, samples), becomes a batch by ``Y.batch(f[Y.numbers])``.

    Parameters
    ----------
    weights
        w, shape (K,), positive: the measure of each point. `Y.weights` are these up to round-off of the coordinates.
    points
        Where the points lie, shape (K, d); side by side on a line if left out.
    graph
        Edge weights A >= 0, a symmetric matrix of shape (K, K), sparse or dense; its diagonal does not matter.
    comm
        Communicator.

    Returns
    -------
    LabelSpace
        `Y.numbers` are the numbers of the points that this rank owns, in the order of the arguments.

    Raises
    ------
    TypeError, ValueError
        If a weight is not positive and finite, a point is not finite, a shape does not fit, or the graph is not symmetric
        or has negative weights; or an argument differs between ranks.

    Examples
    --------
    >>> import numpy as np
    >>> from fem_resnet import laplace_basis
    >>> ring = np.roll(np.eye(12), 1, axis=0)
    >>> Y = point_space(np.ones(12), graph=ring + ring.T)
    >>> laplace_basis(Y, 5).eigenvalues.round(3) + 0.0
    array([0.   , 0.268, 0.268, 1.   , 1.   ])
    """
    same(instance("comm", comm, MPI.Comm, _COMM), weights=weights, points=points, graph=graph)
    w = real_array("weights", weights, ("points",), above=0)
    size = w.size
    with np.errstate(over="ignore"):
        total = np.cumsum(w)[-1]
    if not np.isfinite(total):
        raise ValueError("weights: expected numbers with a finite sum, |Y|, got a sum that overflows")
    if points is None:
        points = (np.cumsum(w) - w / 2)[:, None]
    points = real_array("points", points, (size, "d"))
    ends = points[:, None].repeat(2, axis=1)
    ends[:, :, 0] += np.outer(w, [-0.5, 0.5])
    lost = np.flatnonzero(np.abs(ends[:, 1, 0] - ends[:, 0, 0] - w) > 1e-6 * w)
    if lost.size:
        raise ValueError(
            f"weights: expected lengths that coordinates resolve, got {w[lost[0]]:g} for point {lost[0]}, which is lost in "
            f"the round-off of its coordinate {points[lost[0], 0]:g}; give points nearer to 0, or larger weights"
        )
    with stop_annotating():
        # Cell i is (i, i + 1). PT-Scotch would deal out the same points otherwise in each call, and sums change.
        cells = fd.IntervalMesh(size, float(size), comm=comm, distribution_parameters=_IN_ORDER, name="points")
        middle = fd.Function(fd.FunctionSpace(cells, "DG", 0)).interpolate(fd.SpatialCoordinate(cells)[0])
        at_ends = fd.FiniteElement("DG", fd.interval, 1, variant="equispaced")
        places = fd.Function(fd.VectorFunctionSpace(cells, at_ends, dim=points.shape[1]))
    numbers = middle.dat.data_ro_with_halos.astype(int)
    nodes = places.cell_node_map().values_with_halo
    places.dat.data_wo_with_halos.reshape(-1, points.shape[1])[nodes] = ends[numbers]
    V = fd.FunctionSpace(fd.Mesh(places, name="points", comm=comm), "DG", 0)
    return LabelSpace(V, numbers=numbers[: V.dof_dset.size], graph=graph)


def class_space(classes: int, comm: MPI.Comm = MPI.COMM_WORLD) -> LabelSpace:
    """Label domain of K classes: K cells of length one, so that an integral over it is a sum over the classes.

    Parameters
    ----------
    classes
        K, at least 1.
    comm
        Communicator; collective over it.

    Raises
    ------
    TypeError, ValueError
        If `classes` is no integer >= 1, or differs between ranks, or `comm` is no communicator.
    """
    same(instance("comm", comm, MPI.Comm, _COMM), classes=classes)
    return point_space(np.ones(integer("classes", classes)), comm=comm)
