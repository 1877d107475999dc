"""The label domain Y as a discrete measure space.

State, bias and basis live at the nodes y_i of a scalar Firedrake space V on the mesh of Y, and every integral over Y
is the nodal quadrature of that space,

    int_Y f dy = sum_i w_i f(y_i),        w_i = int_Y (basis function i) dy,        |Y| = sum_i w_i,

so that the measure of Y is the diagonal matrix M = diag(w). All inner products, norms and Riesz maps of the package
are those of M. The rule makes sense where the degrees of freedom are point values and all weights are positive; a
space is asked for both, not judged by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import firedrake as fd
import numpy as np
import scipy.sparse
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import annotate_tape, stop_annotating
from pyop2 import op2
from ufl import H1

from fem_resnet.arguments import instance, integer, integer_array, real_array
from fem_resnet.fixed import OnMesh, read_only
from fem_resnet.label_domain.nodal_space import WHAT_WORKS, check_space
from fem_resnet.ranks import same, together

__all__ = ["BatchValues", "LabelSpace", "checked_graph"]


class LabelSpace(OnMesh):
    """Nodes, weights and inner product of a label domain.

    Collective over the communicator of the mesh. Arrays hold the nodes that this rank owns, in Firedrake's order.

    Parameters
    ----------
    V
        Scalar function space, nodal and with positive weights, on a mesh of any dimension, cell type or embedding; its
        coordinates may be of any degree.
    numbers
        Of a set of points, the numbers of this rank's nodes, shape (nodes,): from 0, each once on all ranks together.
    graph
        Of a graph, the edge weights A >= 0 between all points: a symmetric matrix (K, K), sparse or dense, whose diagonal does
        not matter; the same on every rank. `point_space` gives both.

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
        Of a set of points, the numbers of the owned ones, shape (nodes,).
    graph : scipy.sparse.csr_array or None
        Of a graph, its edge weights between all points.

    Raises
    ------
    TypeError
        If V is not a scalar function space, or is part of another one; or numbers or graph are no arrays.
    ValueError
        If V is not nodal, a weight is not clearly positive, or cells of the mesh lie on each other; if the numbers are not those
        of all points, each once, or the graph is not symmetric, has negative weights, or comes without numbers.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "DG", 0))
    >>> round(Y.measure, 2)
    3.12
    """

    def __init__(
        self,
        V: fd.functionspaceimpl.WithGeometry,
        *,
        numbers: np.ndarray | None = None,
        graph: scipy.sparse.sparray | np.ndarray | None = None,
    ):
        if not isinstance(V, fd.functionspaceimpl.WithGeometry):
            raise TypeError(f"V: expected a FunctionSpace, got {type(V).__name__}")
        self.comm = V.mesh().comm
        same(self.comm, numbers=numbers is None, graph=graph)
        check_space(V, neighbours=numbers is None)
        self.V = V
        self.numbers = None if numbers is None else read_only(self._checked_numbers(numbers))
        if graph is not None and numbers is None:
            raise ValueError("numbers: expected those of the points with a graph; point_space(weights, graph=A) has both")
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
        if abs(self.measure - volume) > 1e-10 * volume:
            raise ValueError(
                f"V: the weights of {V.ufl_element()} add up to {self.measure:.6g}, the measure of the mesh is "
                f"{volume:.6g}: the space does not hold the constants. {WHAT_WORKS}"
            )

    def _checked_numbers(self, numbers: np.ndarray) -> np.ndarray:
        owned = self.V.dof_dset.size
        numbers = integer_array("numbers", numbers, (owned,), comm=self.comm).astype(int)
        every = np.sort(np.concatenate(self.comm.allgather(numbers)))
        if (every != np.arange(every.size)).any():
            raise ValueError(f"numbers: expected those from 0 to {every.size - 1}, each once on all ranks together")
        return numbers

    def __repr__(self) -> str:
        return f"LabelSpace({self.size} nodes, {self.V.ufl_element()}, |Y| = {self.measure:.6g})"

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
            # Else the last cell that a rank comes to would decide.
            x = fd.assemble(fd.interpolate(fd.SpatialCoordinate(mesh), space, access=op2.MIN)).dat.data_ro
        return read_only(np.array(x).reshape(self.nodes, mesh.geometric_dimension))

    @cached_property
    def coefficient_mesh(self) -> tuple[fd.MeshGeometry, int]:
        """A mesh of one cell, for coefficients that are the same on every rank, and the rank that owns it."""
        mesh = fd.UnitIntervalMesh(1, comm=self.comm, name="coefficients")
        return mesh, self.comm.allgather(mesh.cell_set.size).index(1)

    @cached_property
    def stiffness(self) -> PETSc.Mat:
        """K_ij = int grad p_i . grad p_j dy, an assembled matrix; on a graph its Laplacian. Collective.

        Raises
        ------
        ValueError
            If the functions of V have no gradient in L2(Y), being discontinuous.
        """
        if self.graph is not None:
            return self._graph_laplacian()
        if self.V.ufl_element() not in H1:
            raise ValueError(f"Y: {self.V.ufl_element()} is discontinuous, so its functions have no gradient; use CG")
        with stop_annotating():
            u, v = fd.TrialFunction(self.V), fd.TestFunction(self.V)
            return fd.assemble(fd.inner(fd.grad(u), fd.grad(v)) * fd.dx).petscmat

    def _graph_laplacian(self) -> PETSc.Mat:
        # Rows and columns in the order of the nodes, by rank.
        order = np.concatenate(self.comm.allgather(self.numbers))
        position = np.argsort(order)
        rows = self.graph[self.numbers].tocoo()
        first = self.comm.exscan(self.nodes) or 0
        diagonal = np.arange(self.nodes)
        # In this form isolated points keep an entry on the diagonal, which solvers want.
        K = scipy.sparse.csr_array(
            (
                np.concatenate([-rows.data, self.graph[self.numbers].sum(axis=1)]),
                (np.concatenate([rows.row, diagonal]), np.concatenate([position[rows.col], first + diagonal])),
            ),
            shape=(self.nodes, self.size),
        )
        sizes = ((self.nodes, self.size),) * 2
        indptr, indices = (index.astype(PETSc.IntType) for index in (K.indptr, K.indices))
        return PETSc.Mat().createAIJ(sizes, csr=(indptr, indices, K.data), comm=self.comm)

    def apply_stiffness(self, values: np.ndarray) -> np.ndarray:
        """`K x` at the owned nodes for x of shape (nodes, any). Collective."""
        return apply_columns(self.stiffness, values)

    def sum(self, x: float | np.ndarray) -> np.ndarray:
        """Sum an array over the ranks, in place where it is one. Collective; every rank gets the same bits."""
        x = np.asarray(x, dtype=float, order="C")
        if self.comm.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, x)
        return x

    def batch_space(self, samples: int) -> fd.functionspaceimpl.WithGeometry:
        """Space of a batch: one function on Y a sample, as the components of a vector-valued Function.

        Parameters
        ----------
        samples
            Number of samples, at least 1.

        Raises
        ------
        ValueError
            If it is no such number, or differs between ranks.
        """
        same(self.comm, samples=samples)
        return self._space_of(integer("samples", samples))

    def _space_of(self, samples: int) -> fd.functionspaceimpl.WithGeometry:
        if samples not in self._batch_spaces:
            self._batch_spaces[samples] = fd.VectorFunctionSpace(self.V.mesh(), self.V.ufl_element(), dim=samples)
        return self._batch_spaces[samples]

    @cached_property
    def _batch_spaces(self) -> dict:
        return {}

    def batch(self, values: np.ndarray | fd.Function | Sequence[fd.Function], name: str = "values") -> fd.Function:
        """A batch from the values at the owned nodes. Collective; a new Function, of which no tape knows.

        Parameters
        ----------
        values
            Shape (nodes, samples) or (nodes,) for one sample; real and finite. Or a Function of `V`, a batch, or a list of
            these, each a sample or more.
        name
            What messages call the array.

        Raises
        ------
        TypeError
            If it is no array of real numbers, or one of a list with Functions is none.
        ValueError
            If the shape does not fit, there is no sample, a value is not finite, or a Function lives on another space, or
            would be lost to a tape that annotates; on all ranks alike.
        """
        same(self.comm, name=name, values=_has_functions(values))
        if not instance("name", name, str):
            raise ValueError("name: expected a name, got an empty string; messages call the array so")
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
        function.dat.data_wo[...] = values.reshape(function.dat.data_wo.shape)
        return function

    def _columns(self, functions: fd.Function | Sequence[fd.Function], name: str) -> np.ndarray:
        """Node values of Functions side by side, shape (nodes, samples)."""
        if annotate_tape():
            raise ValueError(
                f"{name}: the tape is annotating, and would not see that the batch is made of these Functions; make it before, "
                f"or give the Function itself, of Y.V or Y.batch_space(samples), to what takes a batch"
            )
        functions = [functions] if isinstance(functions, fd.Function) else list(functions)
        for function in functions:
            self.check_batch(function, name)
        return np.column_stack([self.values(function) for function in functions])

    def values(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """Values of a Function or batch at the owned nodes, shape (nodes, samples); a read-only view."""
        return function.dat.data_ro.reshape(self.nodes, function.function_space().value_size)

    def check_batch(self, function: fd.Function, name: str) -> None:
        """Raise unless `function` is a finite batch on this label domain. Collective.

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
        """`check_batch` of what is a batch on all ranks, or on none. Collective."""
        self._refuse_elsewhere(function, name, fd.Function)
        self._refuse_not_finite(self.values(function), name)

    def check_where(self, function: fd.Function | fd.Cofunction, name: str, kind: type = fd.Function) -> None:
        """Raise unless it is a batch on this label domain, whatever its values; on all ranks alike."""
        together(self.comm, lambda: self._refuse_elsewhere(function, name, kind))

    def _refuse_elsewhere(self, function: object, name: str, kind: type) -> None:
        instance(name, function, kind)
        space = function.function_space()
        if space.mesh() is not self.V.mesh():
            raise ValueError(f"{name}: expected a Function on the mesh {self.V.mesh()}, got one on {space.mesh()}")
        element = space.ufl_element()
        scalar = element.sub_elements[0] if len(space.value_shape) == 1 else element
        if scalar != self.V.ufl_element():
            raise ValueError(
                f"{name}: expected a Function of {self.V.ufl_element()} or a batch of it (LabelSpace.batch_space), "
                f"got one of {element}"
            )

    def _refuse_not_finite(self, values: np.ndarray, name: str) -> None:
        bad = np.flatnonzero(self.sum((~np.isfinite(values)).any(axis=0)))
        if bad.size:
            raise ValueError(f"{name}: sample {bad[0]} has values that are not finite ({bad.size} samples have)")

    def agree(self, holds: bool, message: str) -> None:
        """Raise ValueError with the message of the first rank where `holds` is false, on all ranks alike."""
        messages = self.comm.allgather(None if holds else message)
        for text in messages:
            if text is not None:
                raise ValueError(text)

    def inner(self, f: fd.Function, g: fd.Function) -> float:
        """Inner product `(f, g) = sum_i w_i f_i g_i` in L2(Y), summed over the samples of batches. Collective.

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
        """Norm of L2(Y), of all samples together for a batch. Collective; as `inner` it wants a Function here."""
        return float(np.sqrt(self.inner(f, f)))

    def riesz_map(self, dual: fd.Cofunction) -> fd.Function:
        """Riesz representative M^-1 d of a functional d on functions or batches. Collective.

        Raises
        ------
        TypeError, ValueError
            If `dual` is no Cofunction on this label domain.
        """
        self.check_where(dual, "dual", fd.Cofunction)
        primal = fd.Function(dual.function_space().dual())
        primal.dat.data_wo[...] = (self.values(dual) / self.weights[:, None]).reshape(primal.dat.data_wo.shape)
        return primal


class BatchValues:
    """Batches as arrays (nodes, samples): how a Function of `space` holds them.

    Parameters
    ----------
    Y
        The label domain.
    space
        `Y.V`, for one sample, or `Y.batch_space(samples)`.
    """

    def __init__(self, Y: LabelSpace, space: fd.functionspaceimpl.WithGeometry):
        self.Y = Y
        self.space = space

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.space.value_size

    def read(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """A read-only view."""
        return self.Y.values(function)

    def write(self, function: fd.Function | fd.Cofunction, array: np.ndarray) -> None:
        """Make the Function hold the array."""
        values = function.dat.data_wo
        values[...] = array.reshape(values.shape)


def check_label_space(Y: LabelSpace, name: str = "Y") -> None:
    """Raise a TypeError unless Y is a LabelSpace."""
    instance(name, Y, LabelSpace, "LabelSpace(V) is that of a space V")


def apply_columns(A: PETSc.Mat, values: np.ndarray) -> np.ndarray:
    """`A x` for each column x: the rows that this rank owns, shape (rows, columns of values). Collective."""
    x, y = A.createVecs()
    result = np.empty((y.getLocalSize(), values.shape[1]))
    for k in range(values.shape[1]):
        x.array_w[:] = values[:, k]
        A.mult(x, y)
        result[:, k] = y.array_r
    return result


def checked_graph(graph: scipy.sparse.sparray | np.ndarray, size: int) -> scipy.sparse.csr_array:
    """Edge weights between so many points, without a diagonal; a copy, which nobody may write into.

    Raises
    ------
    TypeError, ValueError
        If they are no symmetric matrix of numbers >= 0 of that size.
    """
    if scipy.sparse.issparse(graph):
        graph = graph.tocsr(copy=True)
        graph.sum_duplicates()
        data = real_array("graph", graph.data, least=0)
        A = scipy.sparse.csr_array((data, graph.indices, graph.indptr), graph.shape)
    else:
        A = scipy.sparse.csr_array(real_array("graph", graph, (size, size), least=0))
    if A.shape != (size, size):
        raise ValueError(f"graph: expected a matrix of shape ({size}, {size}), got {A.shape}")
    if abs(A - A.T).max() > 0:
        raise ValueError("graph: expected a symmetric matrix; (A + A.T) / 2 is one")
    A.setdiag(0.0)
    A.eliminate_zeros()
    read_only(A.data)
    return A


def sample_weights(weights: Sequence[float] | None, samples: int) -> np.ndarray:
    """Weights of the samples, divided by their sum.

    Raises
    ------
    TypeError, ValueError
        If they are no real numbers, one a sample, one is negative or not finite, or all are 0.
    """
    if weights is None:
        return np.full(samples, 1 / samples)
    weights = real_array("weights", weights, (samples,), least=0)
    largest = weights.max()
    if largest == 0:
        raise ValueError("weights: expected numbers >= 0, not all 0; all are 0")
    weights = weights / largest  # the sum of large ones may overflow
    return weights / weights.sum()


def _has_functions(values: object) -> bool:
    return (
        isinstance(values, fd.Function)
        or isinstance(values, (list, tuple))
        and any(isinstance(value, fd.Function) for value in values)
    )
