"""The label domain Y as a discrete measure space.

State, bias and basis live at the nodes y_i of a scalar Firedrake space V on the mesh of Y, and every integral over Y
is the nodal quadrature of that space,

    int_Y f dy = sum_i w_i f(y_i),        w_i = int_Y (basis function i) dy,        |Y| = sum_i w_i,

so that the measure of Y is the diagonal matrix M = diag(w). All inner products, norms and Riesz maps of the package
are taken in M. The rule makes sense where the degrees of freedom are point values and all weights are positive.
`nodal_space` looks at the space itself for both, and not at its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod

import firedrake as fd
import numpy as np
import scipy.sparse
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import annotate_tape, stop_annotating
from pyop2 import op2
from ufl import H1

from fem_resnet.arguments import instance, integer, real_array, text
from fem_resnet.fixed import OnMesh, read_only
from fem_resnet.label_domain.coefficient_spaces import CoefficientSpaces
from fem_resnet.label_domain.graph import checked_graph, checked_numbers, graph_laplacian
from fem_resnet.label_domain.images import Extent, as_pictures, pictures_at, pixel_centres
from fem_resnet.label_domain.located_points import located_points
from fem_resnet.label_domain.nodal_space import WHAT_WORKS, check_space
from fem_resnet.label_domain.other_spaces import AtNodes
from fem_resnet.petsc import apply_columns
from fem_resnet.ranks import same, together, watched

__all__ = ["LabelSpace", "check_label_space"]

#: How far from a cell the centre of a pixel may be, as a part of the cell's size: round-off.
_IN_A_CELL = 1e-6


class LabelSpace(OnMesh):
    """Nodes, weights and inner product of a label domain.

    Collective over the communicator of the mesh. Arrays hold the nodes that this rank owns, in Firedrake's order.

    Parameters
    ----------
    V
        Scalar function space, nodal and with positive weights, on a mesh of any dimension, cell type or embedding; its
        coordinates may be of any degree.
    numbers
        For a set of points: the numbers of this rank's nodes, shape (nodes,), from 0, each once on all ranks together.
    graph
        For a graph: the edge weights A >= 0 between all points, a symmetric matrix of shape (K, K), sparse or dense, whose
        diagonal does not matter; the same on every rank. `point_space` gives both.

    Attributes
    ----------
    V : FunctionSpace
        The space of one function on Y.
    comm : mpi4py.MPI.Comm
        The communicator of the mesh.
    weights : numpy.ndarray
        w, shape (nodes,), float64, in the unit of the mesh's measure; read-only.
    measure : float
        |Y|.
    numbers : numpy.ndarray or None
        The numbers of the owned points, shape (nodes,); None on a mesh.
    graph : scipy.sparse.csr_array or None
        The edge weights between all points, shape (K, K); None where there is no graph.
    coefficients : CoefficientSpaces
        The spaces of numbers that are the same on every rank.
    channels : int
        C of Y x {1 .. C}; 1 unless it is a `Channels`.

    Raises
    ------
    TypeError
        If V is not a scalar function space, or is part of another one; or numbers or graph are no arrays.
    ValueError
        If V is not nodal, a weight is not clearly positive, or cells of the mesh lie on each other; if `numbers` does not have
        each point once; if the graph is not symmetric, has negative weights, or comes without numbers.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "DG", 0))
    >>> round(Y.measure, 2)
    3.12
    """

    channels = 1

    def __init__(
        self,
        V: fd.functionspaceimpl.WithGeometry,
        *,
        numbers: np.ndarray | None = None,
        graph: scipy.sparse.sparray | np.ndarray | None = None,
    ):
        if not isinstance(V, fd.functionspaceimpl.WithGeometry):
            raise TypeError(f"V: expected a FunctionSpace, got {type(V).__name__}")
        self.comm = watched(V.mesh().comm)
        same(self.comm, numbers=numbers is None, graph=graph)
        check_space(V, neighbours=numbers is None)
        self.V = V
        self._batch_spaces: dict[int, fd.functionspaceimpl.WithGeometry] = {}
        self.coefficients = CoefficientSpaces(self.comm)
        self.numbers = None if numbers is None else checked_numbers(numbers, V.dof_dset.size, self.comm)
        if graph is not None and numbers is None:
            raise ValueError(
                "numbers: expected the numbers of a graph's points, got None; point_space(weights, graph=A) gives both"
            )
        self.graph = None if graph is None else checked_graph(graph, self.size)
        with stop_annotating():
            self.weights = read_only(fd.assemble(fd.TestFunction(V) * fd.dx).dat.data_ro.copy())
            volume = fd.assemble(fd.Constant(1.0) * fd.dx(domain=V.mesh()))
        smallest = self.comm.allreduce(self.weights.min(initial=np.inf), op=MPI.MIN)
        if not smallest > 0:
            raise ValueError(
                f"V: a node of {V.ufl_element()} has the weight {smallest:.3g} on this mesh; all must be positive. "
                f"{WHAT_WORKS}"
            )
        self.measure = float(self.sum(self.weights.sum()))
        # On curved cells the two integrals may be taken by different rules: a space with the constants differs too.
        if abs(self.measure - volume) > 1e-10 * volume and _without_constants(V, volume):
            raise ValueError(
                f"V: the weights of {V.ufl_element()} add up to {self.measure:.6g}, the measure of the mesh is "
                f"{volume:.6g}: the space does not hold the constants. {WHAT_WORKS}"
            )

    def __repr__(self) -> str:
        return f"LabelSpace({self.size} nodes, {self.V.ufl_element()}, |Y| = {self.measure:.6g})"

    @property
    def one(self) -> LabelSpace:
        """The label domain of one channel: itself, unless it is a `Channels`."""
        return self

    @property
    def size(self) -> int:
        """Number of nodes on all ranks."""
        return self.V.dof_dset.layout_vec.getSize()

    @property
    def nodes(self) -> int:
        """Number of nodes that this rank owns."""
        return self.weights.size

    @cached_property
    def coordinates(self) -> np.ndarray:
        """Coordinates of the owned nodes, shape (nodes, geometric dimension), float64; read-only. Collective.

        Where they jump between cells, as at the seam of a periodic mesh, each is the smallest that the node's cells give.
        """
        mesh = self.V.mesh()
        space = fd.VectorFunctionSpace(mesh, self.V.ufl_element(), dim=mesh.geometric_dimension)
        with stop_annotating():
            # Without MIN the last cell that a rank comes to would decide.
            x = fd.assemble(fd.interpolate(fd.SpatialCoordinate(mesh), space, access=op2.MIN)).dat.data_ro
        return read_only(np.array(x).reshape(self.nodes, mesh.geometric_dimension))

    @cached_property
    def stiffness(self) -> PETSc.Mat:
        """K_ij = int grad p_i . grad p_j dy, an assembled matrix; on a graph its Laplacian. Collective.

        Raises
        ------
        ValueError
            If the functions of V have no gradient in L2(Y), being discontinuous.
        """
        if self.graph is not None:
            return graph_laplacian(self.graph, self.numbers, self.comm)
        if self.V.ufl_element() not in H1:
            raise ValueError(f"Y: expected continuous functions, which have gradients, got {self.V.ufl_element()}; use CG")
        with stop_annotating():
            u, v = fd.TrialFunction(self.V), fd.TestFunction(self.V)
            return fd.assemble(fd.inner(fd.grad(u), fd.grad(v)) * fd.dx).petscmat

    def apply_stiffness(self, values: np.ndarray) -> np.ndarray:
        """`K x` at the owned nodes, of the shape of x, (nodes, any). Collective."""
        return apply_columns(self.stiffness, values)

    def sum(self, x: float | np.ndarray) -> np.ndarray:
        """The sum of an array over the ranks, of its shape, the same bits on all; in place if it is float64. Collective."""
        x = np.asarray(x, dtype=float, order="C")
        if self.comm.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, x)
        return x

    def batch_space(self, samples: int) -> fd.functionspaceimpl.WithGeometry:
        """Space of a batch: one function on Y a sample, as the components of a vector-valued Function; `V` for one sample.

        With C channels its values have shape (C, samples), for one sample too: shape (C,) is that of C samples of one channel.

        Parameters
        ----------
        samples
            Number of samples.

        Raises
        ------
        ValueError
            If `samples` is no integer >= 1, or differs between ranks.
        """
        same(self.comm, samples=samples)
        return self._space_of(integer("samples", samples))

    def samples(self, space: fd.functionspaceimpl.WithGeometry) -> int:
        """How many samples a Function of a space holds: of `V` one, else as many as it has components for each channel."""
        return space.value_size // self.channels

    def _space_of(self, samples: int) -> fd.functionspaceimpl.WithGeometry:
        """Of one sample `V` itself, whose Functions Firedrake plots and integrates as numbers."""
        if samples not in self._batch_spaces:
            one, V = samples == 1, self.V
            self._batch_spaces[samples] = V if one else fd.VectorFunctionSpace(V.mesh(), V.ufl_element(), dim=samples)
        return self._batch_spaces[samples]

    def batch(self, values: np.ndarray | fd.Function | Sequence[fd.Function], name: str = "values") -> fd.Function:
        """A batch from the values at the owned nodes: a new Function, of which no tape knows. Collective.

        Parameters
        ----------
        values
            Real and finite, of shape (nodes, samples), or (nodes,) for one sample. Or a Function of `V`, a batch, or a list
            of these, each a sample or more. They may also be continuous Functions of other spaces and on other meshes of Y,
            of all ranks or of each rank alone: their values at the nodes are taken, and at nodes near their mesh those of the
            nearest cell. `image` takes pictures, `Sensors` values at points.
        name
            How messages call the array.

        Raises
        ------
        TypeError
            If `values` is no array of real numbers, or a list with Functions and something else.
        ValueError
            If the shape does not fit, there is no sample, a value is not finite, or a Function's mesh does not cover Y, or
            its values at the nodes are not one number each; or if Functions are given while a tape annotates, which would not
            see them. On all ranks alike.
        """
        same(self.comm, name=name, values=_has_functions(values))
        text("name", name)
        if _has_functions(values):
            values = self._columns(values, name)
        values = real_array(name, values, comm=self.comm, finite=False)
        if values.ndim == 1:
            values = values[:, None]
        self.agree(
            values.ndim == 2 and values.shape[0] == self.nodes and values.shape[1] > 0,
            f"{name}: expected shape (nodes, samples) = ({self.nodes}, at least 1), got {values.shape}",
        )
        samples = self.comm.allgather(values.shape[1])
        self.agree(len(set(samples)) == 1, f"{name}: the ranks give different numbers of samples, {samples}")
        self._refuse_not_finite(values, name)
        function = fd.Function(self._space_of(values.shape[1]), name=name)
        self.write(function, values)
        return function

    def _columns(self, functions: fd.Function | Sequence[fd.Function], name: str) -> np.ndarray:
        """Node values of Functions side by side, shape (nodes, samples)."""
        if annotate_tape():
            raise ValueError(
                f"{name}: the tape is annotating, and would not see that the batch is made of these Functions; make the batch "
                f"before, or use a Function of Y.V or Y.batch_space(samples) as the batch itself"
            )
        functions = [functions] if isinstance(functions, fd.Function) else list(functions)
        at_nodes = AtNodes(self.one.V, self.one.coordinates)
        return np.column_stack([self._values_of(function, name, at_nodes) for function in functions])

    def _values_of(self, function: fd.Function, name: str, at_nodes: AtNodes) -> np.ndarray:
        """Node values of a Function of any space, shape (nodes, samples)."""
        together(self.comm, lambda: instance(name, function, fd.Function))
        space = function.function_space()
        if self.comm.allreduce(space.mesh() is self.V.mesh() and self._holds(space), op=MPI.LAND):
            return self.values(function)
        if not self._fits(space.value_shape):
            raise ValueError(f"{name}: expected Functions whose values fit those of {self!r}, got shape {space.value_shape}")
        return self.from_data(at_nodes.values(function, name))

    def values(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """Values of a Function or batch at the owned nodes, shape (nodes, samples); a read-only view, with channels a copy."""
        return self.from_data(function.dat.data_ro)

    def function(self, batch: fd.Function, sample: int = 0) -> fd.Function:
        """One sample of a batch as a new Function of `V`, to be plotted or evaluated, of which no tape knows. Collective.

        Parameters
        ----------
        batch
            A Function of `V`, or a batch.
        sample
            The number of the sample, from 0.

        Raises
        ------
        TypeError, ValueError
            If the batch is none on this label domain, or there is no such sample; if the number differs between ranks.
        """
        same(self.comm, sample=sample)
        self.check_batch(batch, "batch")
        values = self.values(batch)
        function = fd.Function(self.V, name=batch.name())
        self.write(function, values[:, integer("sample", sample, least=0, most=values.shape[1] - 1)])
        return function

    def image(
        self,
        pixels: np.ndarray,
        *,
        extent: Sequence[float],
        method: str = "linear",
        outside: float | None = None,
        places: np.ndarray | None = None,
    ) -> fd.Function:
        """A batch from pictures, on a label domain in the plane. Collective; `pixels` is the way back.

        Parameters
        ----------
        pixels
            One picture, shape (rows, columns), or many, shape (samples, rows, columns); with C channels one more length, C.
            Row 0 is on top, as matplotlib's `imshow` shows a picture. The same on every rank.
        extent
            (left, right, bottom, top), shape (4,): where the edges of the picture are in Y's coordinates, as for `imshow`.
        method
            "linear": linear between the centres of pixels. "mean": the mean over the square around a node whose area is the
            node's weight, for pictures that are finer than the mesh.
        outside
            The value of all pixels around the picture. If left out, there are none: the picture must cover all nodes.
        places
            Where each picture is seen in place of the owned nodes' `coordinates`, shape (samples, nodes, 2): pictures that
            are turned or shifted.

        Raises
        ------
        TypeError, ValueError
            If Y is not in the plane, an argument does not fit or differs between ranks, or a node is outside of the picture.

        Examples
        --------
        >>> from firedrake import FunctionSpace, RectangleMesh
        >>> Y = LabelSpace(FunctionSpace(RectangleMesh(2, 2, 2.0, 2.0, quadrilateral=True), "DG", 0))
        >>> Y.pixels(Y.image([[1, 2], [3, 4]], extent=(0, 2, 0, 2)), (2, 2), extent=(0, 2, 0, 2)).tolist()
        [[[1.0, 2.0], [3.0, 4.0]]]
        """
        same(self.comm, pixels=pixels, extent=extent, method=method, outside=outside, places=places is None)
        self._refuse_out_of_plane()
        one, edges = self.one, Extent(extent)
        pictures = as_pictures(pixels, None if one is self else self.channels)
        at = one.coordinates
        if places is not None:
            at = real_array("places", places, (len(pictures), one.nodes, 2), comm=self.comm)
        values = together(self.comm, lambda: pictures_at(at, pictures, edges, method, outside, one.weights))
        return self.batch(values.reshape(self.nodes, len(pictures)))

    def pixels(self, batch: fd.Function, shape: tuple[int, int], *, extent: Sequence[float]) -> np.ndarray:
        """Pictures of functions on a label domain in the plane: values at the centres of pixels. Collective.

        Parameters
        ----------
        batch
            A Function of `V`, or a batch.
        shape
            (rows, columns).
        extent
            As for `image`, shape (4,).

        Returns
        -------
        numpy.ndarray
            Shape (samples, rows, columns), with C channels (samples, rows, columns, C), the same on every rank; NaN where
            there is no cell.

        Raises
        ------
        TypeError, ValueError
            If Y is not in the plane, or an argument does not fit or differs between ranks.
        """
        same(self.comm, shape=shape, extent=extent)
        self._refuse_out_of_plane()
        self.check_batch(batch, "batch")
        centres, (m, n) = pixel_centres(Extent(extent), shape)
        located, values = located_points(self.one.V, centres, _IN_A_CELL), self.values(batch)
        samples = values.shape[1]
        columns = np.moveaxis(values.reshape(self.channels, self.one.nodes, samples), 0, 1)
        pictures = located.apply(located.interpolation, np.ascontiguousarray(columns).reshape(-1, self.channels * samples))
        pictures[located.missing] = np.nan
        pictures = pictures.reshape(m, n, self.channels, samples).transpose(3, 0, 1, 2)
        return np.ascontiguousarray(pictures if self.one is not self else pictures[..., 0])

    def _refuse_out_of_plane(self) -> None:
        mesh = self.V.mesh()
        if self.numbers is not None or (mesh.topological_dimension, mesh.geometric_dimension) != (2, 2):
            what = "a set of points" if self.numbers is not None else f"in space of {mesh.geometric_dimension} dimensions"
            raise ValueError(
                f"Y: expected a label domain in the plane, onto which pictures can be laid, got {self!r}, {what}; evaluate "
                f"the picture at Y.coordinates, and give the values to Y.batch"
            )

    def write(self, function: fd.Function | fd.Cofunction, values: np.ndarray) -> None:
        """Make a Function or batch hold values at the owned nodes.

        Parameters
        ----------
        function
            The Function, or Cofunction.
        values
            Values, shape (nodes, samples), or shape (nodes,) for one sample.
        """
        data = function.dat.data_wo
        data[...] = self.to_data(values).reshape(data.shape)

    def like(self, function: fd.Function, values: np.ndarray) -> fd.Function:
        """A new Function of the space of another one, with other values at the owned nodes.

        Parameters
        ----------
        function
            The other one.
        values
            Values, shape (nodes, samples).
        """
        other = fd.Function(function.function_space())
        self.write(other, values)
        return other

    def from_data(self, data: np.ndarray) -> np.ndarray:
        """Values at nodes, shape (nodes, samples), from an array in the order in which Firedrake stores them."""
        return data.reshape(len(data), prod(data.shape[1:]))

    def to_data(self, values: np.ndarray) -> np.ndarray:
        """The array in the order in which Firedrake stores these values at nodes, the inverse of `from_data`.

        Of shape (nodes, samples); with C channels of shape (nodes of one, C, samples).
        """
        return values

    def check_batch(self, function: fd.Function, name: str) -> None:
        """Raise unless `function` is a batch on this label domain, with finite values. Collective.

        Parameters
        ----------
        function
            A Function of `V`, or a batch.
        name
            How messages call the function.

        Raises
        ------
        TypeError
            If it is no Function.
        ValueError
            If it lives on another mesh or element, or a value is not finite (the message names the sample).
        """
        self.check_where(function, name)
        self._refuse_not_finite(self.values(function), name)

    def check_values(self, function: fd.Function, name: str) -> None:
        """As `check_batch`, for a function that is a batch on all ranks, or on none: one communication less. Collective.

        Parameters
        ----------
        function
            A Function of `V`, or a batch.
        name
            How messages call the function.
        """
        self._refuse_elsewhere(function, name, fd.Function)
        self._refuse_not_finite(self.values(function), name)

    def check_where(self, function: fd.Function | fd.Cofunction, name: str, kind: type = fd.Function) -> None:
        """Raise unless `function` is a batch on this label domain, whatever its values; on all ranks alike. Collective.

        Parameters
        ----------
        function
            A Function of `V`, or a batch; or a functional of these.
        name
            How messages call the function.
        kind
            `Function`, or `Cofunction` for a functional.
        """
        together(self.comm, lambda: self._refuse_elsewhere(function, name, kind))

    def _refuse_elsewhere(self, function: fd.Function | fd.Cofunction, name: str, kind: type) -> None:
        instance(name, function, kind)
        space = function.function_space()
        if space.mesh() is not self.V.mesh():
            raise ValueError(
                f"{name}: expected a Function on the mesh {self.V.mesh()}, got one on {space.mesh()}; batch() of this label "
                "space evaluates Functions of other meshes, and each network that is read from a file has a mesh of its own"
            )
        if not self._holds(space):
            raise ValueError(
                f"{name}: expected a Function of {self.V.ufl_element()} or a batch of it (LabelSpace.batch_space), "
                f"got one of {space.ufl_element()}"
            )

    def _fits(self, shape: tuple[int, ...]) -> bool:
        """Whether values of this shape are those of a function on this label domain, or of a batch."""
        return len(shape) <= 1

    def _holds(self, space: fd.functionspaceimpl.WithGeometry) -> bool:
        """Whether Functions of a space on this mesh are functions on this label domain, or batches."""
        element = space.ufl_element()
        return (element.sub_elements[0] if len(space.value_shape) == 1 else element) == self.V.ufl_element()

    def _refuse_not_finite(self, values: np.ndarray, name: str) -> None:
        bad = np.flatnonzero(self.sum((~np.isfinite(values)).any(axis=0)))
        if bad.size:
            raise ValueError(f"{name}: sample {bad[0]} has values that are not finite ({bad.size} samples have)")

    def agree(self, holds: bool, message: str) -> None:
        """Raise an error on all ranks if a condition fails on one. Collective.

        Parameters
        ----------
        holds
            The condition, on this rank.
        message
            What the error says if it is this rank's; the first rank on which the condition fails speaks for all.

        Raises
        ------
        ValueError
            If `holds` is false on some rank.
        """
        messages = self.comm.allgather(None if holds else message)
        for one in messages:
            if one is not None:
                raise ValueError(one)

    def inner(self, f: fd.Function, g: fd.Function) -> float:
        """Inner product `(f, g) = sum_i w_i f_i g_i` in L2(Y), summed over the samples of batches. Collective.

        Parameters
        ----------
        f, g
            Functions of `V`, or batches of as many samples.

        Raises
        ------
        TypeError, ValueError
            If f or g is no Function on this label domain, or they have different numbers of samples.
        """
        self.check_where(f, "f")
        self.check_where(g, "g")
        f, g = self.values(f), self.values(g)
        if f.shape != g.shape:
            raise ValueError(f"g: expected {f.shape[1]} samples, as many as of f, got {g.shape[1]}")
        return float(self.sum(np.einsum("i,is,is->", self.weights, f, g)))

    def norm(self, f: fd.Function) -> float:
        """Norm in L2(Y), of all samples of a batch together; errors as of `inner`. Collective."""
        return float(np.sqrt(self.inner(f, f)))

    def riesz_map(self, functional: fd.Cofunction) -> fd.Function:
        """The gradient M^-1 d of a functional d on functions or batches: (M^-1 d, f) = <d, f> for all f. Collective.

        Raises
        ------
        TypeError, ValueError
            If `functional` is no Cofunction on this label domain.
        """
        self.check_where(functional, "functional", fd.Cofunction)
        gradient = fd.Function(functional.function_space().dual())
        self.write(gradient, self.values(functional) / self.weights[:, None])
        return gradient


def check_label_space(Y: LabelSpace, name: str = "Y") -> None:
    """Raise a TypeError unless Y is a LabelSpace."""
    instance(name, Y, LabelSpace, "LabelSpace(V) makes one of a FunctionSpace V")


def _without_constants(V: fd.functionspaceimpl.WithGeometry, volume: float) -> bool:
    """Whether the function whose values at all nodes are 1 is not 1 between them. Collective."""
    with stop_annotating():
        return fd.assemble((fd.Function(V).assign(1.0) - 1) ** 2 * fd.dx) > 1e-20 * volume


def _has_functions(values: object) -> bool:
    return (
        isinstance(values, fd.Function)
        or isinstance(values, (list, tuple))
        and any(isinstance(value, fd.Function) for value in values)
    )
