"""Parts of a label domain: where a kernel, a bias, an input or an output lives, if that is not all of Y.

A part D is a label domain of its own, `Part.space`. A function g on it becomes one on Y that is 0 elsewhere. In the measure of
Y, with w_i the weight of node i and w^D_i the part of it that lies in D,

    (extend g)_i = w^D_i / w_i g_i,        (extend g, f)_Y = (g, restrict f)_D    for all f on Y,

so that an integral over Y of extended functions is the integral over D, to the last bit. Inside of D the factor is 1. At nodes
between D and the rest it is the share of D, so that the indicators of parts that cover Y add up to 1.

A set of nodes is a part too: those on a curve or a face, which have no measure of their own, or any that the user chooses.
They keep their weights in Y.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from typing import cast, overload

import firedrake as fd
import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating
from pyop2 import op2
from ufl import H1

from fem_resnet.arguments import did_you_mean, instance, text
from fem_resnet.fixed import OnMesh, read_only
from fem_resnet.label_domain.basis import Basis, in_order
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.label_domain.laplace import move_laplace
from fem_resnet.label_domain.mesh_file import LABELS_OF_MESHES
from fem_resnet.label_domain.points import point_space
from fem_resnet.petsc import apply_columns
from fem_resnet.ranks import same, together

__all__ = ["Part", "mover_of"]

#: The label of the cells of a part, while its mesh is made.
_CHOSEN = "fem_resnet_part"
#: The labels of numbered parts: of cells first.
_NUMBERED = ("Cell Sets", "Face Sets")
#: What an extruded mesh has parts of: the names that Firedrake gives its first and last layer of facets.
_ENDS = ("bottom", "top")
#: How the kind of a basis begins that was extended from Laplace's on a part; the part follows, as JSON.
_KIND = "laplace on "


class Part(OnMesh):
    """A part of a label domain, as a label domain of its own, and the way to and fro.

    Collective over the communicator of the mesh.

    Parameters
    ----------
    Y
        The label domain, of one channel.
    which
        The name or the number of a physical group of Gmsh, or of any label of Firedrake's `mark_entities`. A number is that of
        cells, and of facets if no cells have it. On an extruded mesh "bottom" or "top". Or a choice of nodes: bools, shape
        (nodes,), for the nodes that this rank owns.

    Attributes
    ----------
    Y : LabelSpace
        All of it.
    space : LabelSpace
        The part. If it has cells, its mesh is made of these. A set of nodes is a `point_space`, whose points are in the order
        of their coordinates; on a graph it has the edges between them.
    indicator : numpy.ndarray
        The indicator of the part at the owned nodes of Y, shape (nodes,), between 0 and 1; read-only.

    Raises
    ------
    TypeError
        If `Y` is no LabelSpace, or `which` neither a name, a number nor an array of bools.
    ValueError
        If Y has no such part, the part has no nodes, or Y has channels; if `which` differs between ranks.

    Examples
    --------
    A network that reads on one part and writes on the other:

    >>> from fem_resnet import Head, Kernel, ResidualNetwork, label_domain, laplace_basis
    >>> Y = label_domain("meshes/disk.msh")
    >>> inside, ring = Part(Y, "inside"), Part(Y, "ring")
    >>> ring
    Part('ring', |D| = 2.35513 of |Y| = 3.13395)
    >>> phi, psi = (part.extend(laplace_basis(part.space, 5)) for part in (ring, inside))
    >>> net = ResidualNetwork(Kernel(phi, psi), bias=phi, layers=2)
    >>> head = Head(phi, onto=laplace_basis(ring.space, 5), prediction="identity")
    >>> head(net(inside.extend(inside.space.batch(inside.space.coordinates)))).function_space() == ring.space.batch_space(2)
    True
    """

    def __init__(self, Y: LabelSpace, which: str | int | np.ndarray):
        check_label_space(Y)
        if Y.one is not Y:
            raise ValueError(
                f"Y: expected the label domain of one channel, got {Y!r}; take a part of its `one`, and "
                f"RepeatedBasis(Y, basis)"
            )
        named = isinstance(which, (str, int, np.integer)) and not isinstance(which, (bool, np.bool_))
        same(Y.comm, which=which if named else None)
        self.Y, self._which = Y, which if named else None
        if not named:
            self.space, numbers = _of_nodes(Y, _chosen(Y, which))
        elif Y.V.mesh().extruded:
            self.space, numbers = _of_nodes(Y, _nodes_at_end(Y, cast(str | int, which)))
        else:
            points, dimension = _labelled(Y, cast(str | int, which))
            if dimension == Y.V.mesh().topological_dimension:
                self.space, numbers = _of_cells(Y, points)
            else:
                self.space, numbers = _of_nodes(Y, _nodes_on(Y, points))
        self._to_part = _picking(Y, self.space, numbers)
        self.indicator = read_only(self._extended(np.ones((self.space.nodes, 1)))[:, 0].copy())

    def __repr__(self) -> str:
        which = "chosen nodes" if self._which is None else repr(self._which)
        return f"Part({which}, |D| = {self.space.measure:.6g} of |Y| = {self.Y.measure:.6g})"

    @cached_property
    def _to_Y(self) -> PETSc.Mat:
        return PETSc.Mat().createTranspose(self._to_part)

    def _extended(self, values: np.ndarray) -> np.ndarray:
        weighted = apply_columns(self._to_Y, values * self.space.weights[:, None])
        return weighted / self.Y.weights[:, None]

    @overload
    def extend(self, function: Basis) -> Basis: ...
    @overload
    def extend(self, function: fd.Function) -> fd.Function: ...
    def extend(self, function: Basis | fd.Function) -> Basis | fd.Function:
        """A function on the part as one on Y that is 0 elsewhere; no tape knows of it. Collective.

        Parameters
        ----------
        function
            A basis or a batch on `space`.

        Returns
        -------
        Basis or Function
            The basis keeps the eigenvalues and the gradients that it has on the part. It moves to other meshes of Y that have
            a part of this name; in a file, a Laplace basis keeps this too.

        Raises
        ------
        TypeError, ValueError
            If it is neither, or lives elsewhere.
        """
        instance("function", function, (Basis, fd.Function), "one on Part.space")
        if not isinstance(function, Basis):
            self.space.check_batch(function, "function")
            return self.Y.batch(self._extended(self.space.values(function)))
        if function.Y is not self.space:
            raise ValueError(f"function: expected a basis on {self.space!r}, the part's own space, got {function!r}")
        has_gradients = function.eigenvalues is not None or self.space.V.ufl_element() in H1 or self.space.graph is not None
        which = self._which

        def move(extended: Basis, Y: LabelSpace) -> Basis:
            there = Part(Y, which)
            return there.extend(function.first(extended.rank).on(there.space))

        is_laplace = which is not None and function.kind == "laplace"
        kind = _KIND + json.dumps(which if isinstance(which, str) else int(which)) if is_laplace else "given"
        return Basis(
            self.Y,
            self._extended(function.values),
            kind,
            function.eigenvalues,
            None if which is None else mover_of(kind) or move,
            function.stiffness if has_gradients else None,
        )

    def _inside(self, extended: Basis) -> Basis:
        """The Laplace basis on the part of which this is the extension."""
        share = np.where(self.indicator > 0, self.indicator, 1.0)[:, None]
        values = apply_columns(self._to_part, extended.values / share)
        return Basis(self.space, values, "laplace", extended.eigenvalues, move_laplace, extended.stiffness)

    @overload
    def restrict(self, function: Basis) -> Basis: ...
    @overload
    def restrict(self, function: fd.Function) -> fd.Function: ...
    def restrict(self, function: Basis | fd.Function) -> Basis | fd.Function:
        """The values of a function on Y in the part; no tape knows of it. Collective.

        Parameters
        ----------
        function
            A basis or a batch on `Y`.

        Returns
        -------
        Basis or Function
            On `space`.

        Raises
        ------
        TypeError, ValueError
            If it is neither, or lives elsewhere; or the functions of a basis are dependent in the part.
        """
        instance("function", function, (Basis, fd.Function), "one on the whole label domain")
        if not isinstance(function, Basis):
            self.Y.check_batch(function, "function")
            return self.space.batch(apply_columns(self._to_part, self.Y.values(function)))
        if function.Y is not self.Y:
            raise ValueError(f"function: expected a basis on {self.Y!r}, got {function!r}")
        return Basis(self.space, apply_columns(self._to_part, function.values), "given")


def mover_of(kind: str) -> Callable[[Basis, LabelSpace], Basis] | None:
    """How a basis of a kind moves that `Part.extend` has made of a Laplace basis; None for another kind.

    Parameters
    ----------
    kind
        As `Basis.kind`.

    Raises
    ------
    TypeError, ValueError
        If the kind is not what `Part.extend` writes, as in a file that was changed.
    """
    if not kind.startswith(_KIND):
        return None
    which = instance("kind", json.loads(kind.removeprefix(_KIND)), (str, int))

    def move(extended: Basis, Y: LabelSpace) -> Basis:
        there = Part(Y, which)
        return there.extend(Part(extended.Y, which)._inside(extended).on(there.space))

    return move


def _chosen(Y: LabelSpace, which: object) -> np.ndarray:
    """The choice of nodes from outside. Collective."""

    def check() -> np.ndarray:
        array = instance("which", which, np.ndarray, "the name or number of a part, or an array of bools")
        if array.dtype != bool or array.shape != (Y.nodes,) or np.ma.is_masked(array):
            raise ValueError(
                f"which: expected bools of shape (nodes,) = ({Y.nodes},), got {array.dtype} of shape {array.shape}"
            )
        return np.asarray(array)

    return together(Y.comm, check)


def _labelled(Y: LabelSpace, which: str | int) -> tuple[np.ndarray, int]:
    """Those points of a mesh on this rank that have a label, and their dimension: the largest among them. Collective."""
    mesh = Y.V.mesh()
    if Y.numbers is not None:
        raise ValueError(f"which: expected bools of shape (nodes,), as a set of points has no named parts, got {which!r}")
    plex = mesh.topology_dm
    dimensions = np.zeros(plex.getChart()[1], int)
    for d in range(plex.getDepth() + 1):
        dimensions[slice(*plex.getDepthStratum(d))] = d
    names = {plex.getLabelName(k) for k in range(plex.getNumLabels())} - LABELS_OF_MESHES
    of_name = isinstance(which, str)
    for label in [text("which", which)] if of_name else _NUMBERED:
        known = plex.hasLabel(label) and (not of_name or label in names)
        points = _stratum(plex, label, None if of_name else int(which)) if known else np.zeros(0, int)
        dimension = Y.comm.allreduce(int(dimensions[points].max(initial=-1)), op=MPI.MAX)
        if dimension >= 0:
            # Firedrake gives the corners of facets the facets' numbers.
            return points[dimensions[points] == dimension], dimension
    numbers = {int(value) for label in _NUMBERED if plex.hasLabel(label) for value in plex.getLabelIdIS(label).getIndices()}
    known_names, known_numbers = (sorted(set().union(*Y.comm.allgather(each))) for each in (names, numbers))
    raise ValueError(
        f"which: expected a part of {Y!r}, by name {', '.join(map(repr, known_names)) or '(it has none)'}, or by number "
        f"{', '.join(map(str, known_numbers)) or '(it has none)'}, got {which!r}{did_you_mean(which, known_names)}; groups of "
        f"Gmsh with two dimensions less than the cells are no parts, choose their nodes by bools of shape (nodes,)"
    )


def _stratum(plex: PETSc.DMPlex, label: str, value: int | None) -> np.ndarray:
    """The points with a value of a label, or with any."""
    found = [
        plex.getStratumIS(label, each).getIndices()
        for each in plex.getLabelIdIS(label).getIndices()
        if (value is None or each == value) and plex.getStratumSize(label, each)
    ]
    return np.unique(np.concatenate([*found, np.zeros(0, int)])).astype(int)


def _of_cells(Y: LabelSpace, cells: np.ndarray) -> tuple[LabelSpace, np.ndarray]:
    """A label space on these cells, and which node of Y each of its owned nodes is. Collective."""
    mesh, plex = Y.V.mesh(), Y.V.mesh().topology_dm
    plex.createLabel(_CHOSEN)
    try:
        chosen = PETSc.IS().createGeneral(cells.astype(PETSc.IntType), comm=PETSc.COMM_SELF)  # type: ignore[arg-type]
        plex.getLabel(_CHOSEN).insertIS(chosen, 1)
        below = fd.Submesh(mesh, subdomain_id=1, label_name=_CHOSEN)
    finally:
        plex.removeLabel(_CHOSEN)
    with stop_annotating():
        # The mesh's coordinates may be others than those that PETSc has: moved, curved or periodic.
        places = fd.FunctionSpace(below, mesh.coordinates.function_space().ufl_element())
        x = fd.Function(places).interpolate(mesh.coordinates)
        number = fd.Function(Y.V)
        number.dat.data_wo[:] = (Y.comm.exscan(Y.nodes) or 0) + np.arange(Y.nodes)
        found = fd.Function(fd.FunctionSpace(below, Y.V.ufl_element())).interpolate(number)
        space = LabelSpace(fd.FunctionSpace(fd.Mesh(x), Y.V.ufl_element()))
    return space, np.rint(found.dat.data_ro).astype(int)


def _nodes_on(Y: LabelSpace, points: np.ndarray) -> np.ndarray:
    """Which owned nodes lie on these points of the mesh, or on their boundary; bools. Collective."""
    section, plex = Y.V.dm.getLocalSection(), Y.V.mesh().topology_dm
    found = [
        np.arange(section.getOffset(part), section.getOffset(part) + section.getDof(part))
        for point in points
        for part in plex.getTransitiveClosure(point)[0]
    ]
    return _on_all_ranks(Y, np.concatenate([np.zeros(0, int), *found]))


def _nodes_at_end(Y: LabelSpace, which: str | int) -> np.ndarray:
    """Which owned nodes lie on the first or the last layer of facets of an extruded mesh; bools. Collective."""
    if which not in _ENDS:
        raise ValueError(
            f"which: expected 'bottom' or 'top', the parts of an extruded mesh, or bools of shape (nodes,), got {which!r}; "
            f"Y.coordinates say which nodes lie above a part of its base"
        )
    return _on_all_ranks(Y, Y.V.boundary_nodes(which))


def _on_all_ranks(Y: LabelSpace, numbers: np.ndarray) -> np.ndarray:
    """Which owned nodes are among the numbers of nodes of any rank that has them; bools. Collective."""
    on = fd.Function(Y.V)
    data = on.dat.data_wo_with_halos
    data[:] = 0.0
    data[numbers] = 1.0
    # The owner of a node need not have the facets on which it lies.
    on.dat.local_to_global_begin(op2.MAX)
    on.dat.local_to_global_end(op2.MAX)
    return on.dat.data_ro > 0.5


def _of_nodes(Y: LabelSpace, chosen: np.ndarray) -> tuple[LabelSpace, np.ndarray]:
    """A label space of these nodes, and which node of Y each of its owned points is. Collective."""
    mine = np.flatnonzero(chosen)
    first = Y.comm.exscan(Y.nodes) or 0
    numbers, weights, places = (
        np.concatenate(Y.comm.allgather(part)) for part in (first + mine, Y.weights[mine], Y.coordinates[mine])
    )
    if not numbers.size:
        raise ValueError(
            f"which: expected a part with nodes, got one without a node of {Y!r}; those of DG of degree 0 are in the middle "
            f"of cells, those of CG of degree 1 at corners"
        )
    keys = places if Y.numbers is None else np.concatenate(Y.comm.allgather(Y.numbers[mine]))[:, None].astype(float)
    order = in_order(keys)
    graph = None if Y.graph is None else Y.graph[keys[order, 0].astype(int)][:, keys[order, 0].astype(int)]
    space = point_space(weights[order], places[order], graph, Y.comm)
    return space, numbers[order][space.numbers]


def _picking(Y: LabelSpace, space: LabelSpace, numbers: np.ndarray) -> PETSc.Mat:
    """The matrix that picks, for each owned node of a part, the value at the node of Y of this number. Collective."""
    sizes = (space.nodes, space.size), (Y.nodes, Y.size)
    csr = np.arange(numbers.size + 1, dtype=PETSc.IntType), numbers.astype(PETSc.IntType), np.ones(numbers.size)
    return PETSc.Mat().createAIJ(sizes, csr=csr, comm=Y.comm)  # type: ignore[arg-type]  # stubs lack mpi4py's
