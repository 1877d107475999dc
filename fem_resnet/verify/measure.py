"""The measure of a label domain, assembled a second time; coefficients as they lie in Functions; relative differences."""

from __future__ import annotations

from functools import cached_property

import firedrake as fd
import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["Measure", "raw", "relative"]


def raw(function: fd.Function | fd.Cofunction, Y: LabelSpace, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers in a Function, read without the package's help. Collective.

    Parameters
    ----------
    function
        The Function or Cofunction.
    Y
        The label domain.
    shape
        The shape of the result. Of a Function on the mesh of `Y`, each rank gets its own nodes, in place of ``shape[0]``.
        Of any other Function, all ranks get all numbers.

    Returns
    -------
    ndarray
        The numbers, of that shape.
    """
    values = np.array(function.dat.data_ro)
    if function.function_space().mesh() is Y.V.mesh():
        return by_channels(values, Y).reshape((len(values) * Y.channels, *shape[1:]))
    return np.concatenate([part.ravel() for part in Y.comm.allgather(values)]).reshape(shape)


def by_channels(data: np.ndarray, Y: LabelSpace) -> np.ndarray:
    """The data of a Function on `Y`, one channel after the other: shape (nodes,), or (nodes, samples)."""
    return data if Y.channels == 1 else np.concatenate([data[:, c] for c in range(Y.channels)])


def by_nodes(values: np.ndarray, Y: LabelSpace) -> np.ndarray:
    """The data of the Function on `Y` that has these values, as Firedrake stores them; the inverse of `by_channels`."""
    return values if Y.channels == 1 else np.stack(np.split(values, Y.channels), axis=1)


def relative(a: ArrayLike, b: ArrayLike, comm: MPI.Comm | None = None) -> float:
    """The largest difference of two arrays of one shape, relative to the largest entry of the second one.

    With `comm`, over all its ranks; then collective.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        return np.inf
    pair = np.array([np.abs(a - b).max(initial=0.0), np.abs(b).max(initial=0.0)])
    if comm is not None:
        comm.Allreduce(MPI.IN_PLACE, pair, op=MPI.MAX)
    return float(pair[0] / pair[1]) if pair[1] > 0 else float(pair[0])


class Measure:
    """The measure of a label domain, assembled a second time: its weights w are row sums of the mass matrix.

    All methods are collective over the communicator of the label domain.

    Parameters
    ----------
    Y
        The label domain.

    Attributes
    ----------
    weights : ndarray
        w at the nodes of this rank, shape (nodes,).
    """

    def __init__(self, Y: LabelSpace):
        self.Y, self.comm = Y, Y.comm
        with stop_annotating():
            one = fd.Function(Y.V)
            one.dat.data_wo[...] = 1.0
            form = fd.inner(one, fd.TestFunction(Y.V)) * fd.dx
            self.weights = by_channels(fd.assemble(form).dat.data_ro.copy(), Y)

    def total(self, values: ArrayLike) -> np.ndarray:
        """The sum of arrays of any one shape over the ranks."""
        values = np.array(values, dtype=float)
        result = np.empty_like(values)
        self.comm.Allreduce(values, result, op=MPI.SUM)
        return result

    def integrals(self, test: np.ndarray, f: np.ndarray) -> np.ndarray:
        """Integrals of test_i f_s, shape (functions, samples), from node values (nodes, functions) and (nodes, samples)."""
        return self.total(test.T @ (self.weights[:, None] * f))

    def gram(self, basis: Basis) -> np.ndarray:
        """Inner products of the basis functions, shape (rank, rank)."""
        return self.integrals(basis.values, basis.values)

    def inner(self, f: np.ndarray, g: np.ndarray) -> float:
        """The inner product of node values, shape (nodes,), or summed over the samples of shape (nodes, samples)."""
        return float(self.total(np.sum(self.weights * (f * g).T)))

    def norm(self, f: np.ndarray) -> float:
        """The norm of node values, shaped as in `inner`."""
        return self.inner(f, f) ** 0.5

    def stiffness(self, values: np.ndarray) -> np.ndarray:
        """K x for node values x: the functionals v -> int grad x . grad v; on a graph sums of differences.

        Both are of shape (nodes, columns).
        """
        Y = self.Y
        if Y.graph is not None:
            A = Y.graph.toarray()
            whole = np.zeros((Y.size, values.shape[1]))
            whole[Y.numbers] = values
            whole = self.total(whole)
            return (A.sum(axis=1)[:, None] * whole - A @ whole)[Y.numbers]
        result = np.empty_like(values)
        x, y = self._gradients.createVecRight(), self._gradients.createVecLeft()
        for k in range(values.shape[1]):
            x.array_w[:] = by_nodes(values[:, k], Y).ravel()
            self._gradients.mult(x, y)
            result[:, k] = by_channels(y.array_r.reshape(-1, *Y.V.value_shape), Y)
        return result

    @cached_property
    def _gradients(self) -> PETSc.Mat:
        u, v = fd.TrialFunction(self.Y.V), fd.TestFunction(self.Y.V)
        with stop_annotating():
            return fd.assemble(fd.inner(fd.grad(u), fd.grad(v)) * fd.dx).petscmat

    def basis_stiffness(self, basis: Basis) -> np.ndarray:
        """Inner products of the gradients of basis functions, shape (rank, rank).

        On a discontinuous space, where gradients have no such inner product, the matrix that the basis came with.
        """
        if self.Y.V.ufl_element() not in fd.H1 and self.Y.graph is None:
            return basis.stiffness
        return self.total(basis.values.T @ self.stiffness(basis.values))
