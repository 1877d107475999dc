"""Sets of points and graphs on them.

The points have numbers. A graph has edge weights A_ij >= 0 between all points, and a Laplacian K,

    <K f, f> = 1/2 sum_ij A_ij (f_i - f_j)^2.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
from mpi4py import MPI
from petsc4py import PETSc

from fem_resnet.arguments import integer_array, real_array
from fem_resnet.fixed import read_only

__all__ = ["checked_graph", "checked_numbers", "graph_laplacian"]


def checked_numbers(numbers: np.ndarray, owned: int, comm: MPI.Comm) -> np.ndarray:
    """The numbers of the points that this rank owns, from outside: a read-only copy, shape (owned,). Collective.

    Parameters
    ----------
    numbers
        Integers from 0, shape (owned,), each once on all ranks together.
    owned
        Number of points that this rank owns.
    comm
        The communicator.

    Raises
    ------
    TypeError, ValueError
        If the numbers are not these; on all ranks alike.
    """
    numbers = integer_array("numbers", numbers, (owned,), comm=comm).astype(int)
    every = np.sort(np.concatenate(comm.allgather(numbers)))
    if (every != np.arange(every.size)).any():
        raise ValueError(
            f"numbers: expected each number from 0 to {every.size - 1} once on all ranks together, got {every.tolist()[:9]} .."
        )
    return read_only(numbers)


def checked_graph(graph: scipy.sparse.sparray | np.ndarray, size: int) -> scipy.sparse.csr_array:
    """Edge weights between so many points, from outside: a copy without a diagonal, which nobody may write into.

    Parameters
    ----------
    graph
        A symmetric matrix of numbers >= 0, shape (size, size), sparse or dense.
    size
        Number of points.

    Raises
    ------
    TypeError, ValueError
        If the graph is no such matrix.
    """
    if isinstance(graph, (scipy.sparse.sparray, scipy.sparse.spmatrix)):
        graph = graph.tocsr(copy=True)
        graph.sum_duplicates()
        data = real_array("graph", graph.data, least=0)
        A = scipy.sparse.csr_array((data, graph.indices, graph.indptr), graph.shape)
    else:
        A = scipy.sparse.csr_array(real_array("graph", graph, (size, size), least=0))
    if A.shape != (size, size):
        raise ValueError(f"graph: expected a matrix of shape ({size}, {size}), got {A.shape}")
    if abs(A - A.T).max() > 0:
        raise ValueError("graph: expected a symmetric matrix, got one that is not; (A + A.T) / 2 is symmetric")
    A.setdiag(0.0)
    A.eliminate_zeros()
    read_only(A.data)
    return A


def graph_laplacian(graph: scipy.sparse.csr_array, numbers: np.ndarray, comm: MPI.Intracomm) -> PETSc.Mat:
    """K, with rows and columns in the order of the nodes, by rank. Collective.

    Parameters
    ----------
    graph
        Edge weights between all points, without a diagonal.
    numbers
        The numbers of the points that this rank owns, shape (nodes,).
    comm
        The communicator.
    """
    size, nodes = graph.shape[0], numbers.size
    position = np.argsort(np.concatenate(comm.allgather(numbers)))
    rows = graph[numbers].tocoo()
    first = comm.exscan(nodes) or 0
    diagonal = np.arange(nodes)
    # In this form isolated points keep an entry on the diagonal, which solvers need.
    K = scipy.sparse.csr_array(
        (
            np.concatenate([-rows.data, graph[numbers].sum(axis=1)]),
            (np.concatenate([rows.row, diagonal]), np.concatenate([position[rows.col], first + diagonal])),
        ),
        shape=(nodes, size),
    )
    indptr, indices = (index.astype(PETSc.IntType) for index in (K.indptr, K.indices))
    csr = indptr, indices, K.data
    return PETSc.Mat().createAIJ(((nodes, size),) * 2, csr=csr, comm=comm)  # type: ignore[arg-type]  # stubs lack mpi4py's
