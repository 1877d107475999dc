"""Finite bases of functions on the label domain.

A basis is a list of functions p_1 .. p_rank on Y, held by their values P at the nodes (nodes x rank), with the Gram
matrix G = P^T M P of the label measure. Kernel factors phi and psi and a bias in a basis are such lists.

The eigenfunctions of the Laplace-Beltrami operator with Neumann condition solve

    K x = lambda M x,      K_ij = int_Y grad(p_i) . grad(p_j) dy,     M = diag(w),

so they are orthonormal in the label measure itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import firedrake as fd
import numpy as np
import petsctools
import scipy.linalg
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating
from slepc4py import SLEPc
from ufl import H1

from fem_resnet.label_space import LabelSpace
from fem_resnet.log import log

__all__ = ["Basis", "cell_indicators", "given_basis", "laplace_basis"]

#: Shift-invert about a negative number: the Neumann Laplacian is singular at 0.
EIGENSOLVER_PARAMETERS = {
    "eps_gen_hermitian": None,
    "eps_target": -1.0,
    "eps_target_magnitude": None,
    "eps_tol": 1e-13,
    "eps_max_it": 500,
    "st_type": "sinvert",
    "st_ksp_type": "preonly",
    "st_pc_type": "cholesky",
    "st_pc_factor_mat_solver_type": "mumps",
}

#: Neighbours closer than this part of their value count as one repeated eigenvalue, which a mesh has split.
CLUSTER_TOLERANCE = 1e-3


class Basis:
    """Functions on a label domain, by their values at the nodes.

    Collective over the communicator of `Y`.

    Parameters
    ----------
    Y
        The label domain.
    values
        P, shape (nodes, rank), float64: the values at the owned nodes.
    kind
        What the basis is, for messages and files: "laplace", "given" or "cells".
    eigenvalues
        One a function, where they are eigenfunctions.

    Attributes
    ----------
    rank : int
        Number of functions.
    gram : numpy.ndarray
        G = P^T M P, shape (rank, rank), the same on every rank of the communicator.

    Raises
    ------
    ValueError
        If the functions are linearly dependent at the nodes, or their values are not finite.
    """

    def __init__(self, Y: LabelSpace, values: np.ndarray, kind: str, eigenvalues: np.ndarray | None = None):
        self.Y = Y
        self.kind = kind
        self.values = np.ascontiguousarray(values, dtype=float)
        self.eigenvalues = eigenvalues
        self.rank = self.values.shape[1]
        #: M P, which projects: g = P^T M f.
        self.weighted = self.values * Y.weights[:, None]
        self.gram = Y.sum(self.weighted.T @ self.values)
        if not np.isfinite(self.gram).all():
            column = int(np.flatnonzero(~np.isfinite(np.diag(self.gram)))[0])
            raise ValueError(f"functions: number {column} of the basis has values that are not finite")
        size = np.sqrt(np.diag(self.gram))
        correlation = np.linalg.eigvalsh(self.gram / np.outer(size, size)) if size.all() else np.zeros(1)
        if correlation[0] < 1e-12:
            raise ValueError(
                f"functions: the {self.rank} functions are linearly dependent at the {Y.size} nodes "
                f"(smallest eigenvalue of their normalised Gram matrix {correlation[0]:.1e}); drop some"
            )

    def __repr__(self) -> str:
        return f"Basis({self.kind}, rank {self.rank}, {self.Y!r})"

    def project(self, values: np.ndarray) -> np.ndarray:
        """`P^T M f`: inner products with all functions, shape (rank, samples), on every rank. Collective.

        Parameters
        ----------
        values
            f at the owned nodes, shape (nodes, samples).
        """
        return self.Y.sum(self.weighted.T @ values)

    def function(self, coefficients: np.ndarray) -> fd.Function:
        """The function `P c` of V for coefficients c, shape (rank,); for a matrix (rank, samples) a batch."""
        coefficients = np.asarray(coefficients, dtype=float)
        values = self.values @ coefficients
        if coefficients.ndim == 2:
            return self.Y.batch(values)
        function = fd.Function(self.Y.V)
        function.dat.data_wo[...] = values
        return function


def given_basis(Y: LabelSpace, functions: Sequence) -> Basis:
    """Basis of functions that the user gives.

    Parameters
    ----------
    Y
        The label domain.
    functions
        Functions of `Y.V`, UFL expressions of the mesh's coordinates, or numbers.

    Raises
    ------
    ValueError
        If there is none, one lives on another space, or they are linearly dependent.
    """
    functions = list(functions)
    if not functions:
        raise ValueError("functions: at least one function is wanted, an empty list was given")
    columns = []
    with stop_annotating():
        for function in functions:
            if not isinstance(function, fd.Function):
                function = fd.Function(Y.V).interpolate(fd.as_ufl(function))
            elif function.function_space() != Y.V:
                raise ValueError(f"functions: {function.function_space()} was given, a Function of {Y.V} is wanted")
            columns.append(function.dat.data_ro.copy())
    return Basis(Y, np.column_stack(columns), "given")


def cell_indicators(Y: LabelSpace) -> Basis:
    """The indicators of the cells: the basis of full rank, with which a kernel is any matrix between neurons.

    Its rank is the number of cells N; coefficients of a kernel are then N x N and stand on every rank. The cells are
    numbered by their midpoints (last coordinate slowest), so that the numbering does not see the partition.

    Raises
    ------
    ValueError
        If `Y.V` is not DG of degree 0, or two cells have the same midpoint.
    """
    element = Y.V.ufl_element()
    if element.embedded_superdegree != 0:
        raise ValueError(f"Y: cell indicators span DG of degree 0, the space is {element}")
    midpoints = np.concatenate(Y.comm.allgather(Y.coordinates))
    # Round-off in a midpoint depends on how the cell's vertices are numbered; it must not decide an order.
    extent = np.ptp(midpoints, axis=0).max() or 1.0
    keys = np.round((midpoints - midpoints.min(axis=0)) / extent, 9)
    order = np.lexsort(keys.T)
    if (keys[order[1:]] == keys[order[:-1]]).all(axis=1).any():
        raise ValueError("Y: two cells have the same midpoint, so they cannot be numbered the same on every partition")
    first = Y.comm.exscan(Y.nodes) or 0
    number = np.argsort(order)[first : first + Y.nodes]
    values = np.zeros((Y.nodes, Y.size))
    values[np.arange(Y.nodes), number] = 1.0
    return Basis(Y, values, "cells")


@PETSc.Log.EventDecorator("fem_resnet:laplace_basis")
def laplace_basis(
    Y: LabelSpace, rank: int, *, solver_parameters: dict | None = None, options_prefix: str | None = None
) -> Basis:
    """Eigenfunctions of the Laplace-Beltrami operator (Neumann) to the `rank` smallest eigenvalues.

    Orthonormal in the label measure. Signs, and rotations within a repeated eigenvalue, are fixed by a rule that does
    not see the partition: among plane waves of the eigenvalue's frequency, fixed once and for all, the one with the
    largest part in the eigenspace gives the first function, and so on. On a discontinuous space the eigenfunctions
    of the continuous space of the same degree (at least 1) are taken: averaged over the cells for DG of degree 0,
    else at the nodes; then made orthonormal by the closest orthonormal set. That no eigenvalue was missed is checked
    by the inertia of `K - s M` (Sylvester).

    Collective over the communicator of `Y`.

    Parameters
    ----------
    Y
        The label domain, of any cell type or embedding.
    rank
        How many functions, at least 1 and at most the number of nodes.
    solver_parameters
        Options of SLEPc's EPS, over `EIGENSOLVER_PARAMETERS`.
    options_prefix
        Prefix of these options.

    Returns
    -------
    Basis
        With `eigenvalues`, ascending, in 1 / (unit of length)^2.

    Raises
    ------
    ValueError
        If the rank is no integer in that range.
    RuntimeError
        If the eigensolver does not find them all.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitSquareMesh
    >>> Y = LabelSpace(FunctionSpace(UnitSquareMesh(16, 16), "CG", 1))
    >>> laplace_basis(Y, 4).eigenvalues.round(1) + 0.0
    array([ 0. ,  9.8,  9.9, 19.7])
    """
    if not isinstance(rank, (int, np.integer)) or not 1 <= rank <= Y.size:
        raise ValueError(f"rank: an integer from 1 to the number of nodes, {Y.size}, is wanted; {rank!r} was given")
    C, to_nodes = _continuous(Y)
    if rank > C.size:
        raise ValueError(f"rank: {C.size} eigenfunctions exist on {C.V.ufl_element()}, {rank} were asked for")
    eigenvalues, modes = _whole_clusters(C, rank, solver_parameters or {}, options_prefix)
    ends = _cluster_ends(eigenvalues)
    for start, end in zip([0, *ends], ends):
        modes[:, start:end] = _fix_rotation(modes[:, start:end], eigenvalues[start:end].mean(), C)
    if rank not in ends:
        below, above = max([end for end in ends if end < rank], default=0), min(end for end in ends if end > rank)
        log(
            Y.comm, logging.WARNING,
            "rank %d cuts through the repeated eigenvalue %.6g: ranks %d and %d keep it whole",
            rank, eigenvalues[rank - 1], below, above,
        )  # fmt: skip
    return Basis(Y, to_nodes(modes[:, :rank]), "laplace", eigenvalues[:rank])


def _continuous(Y: LabelSpace) -> tuple[LabelSpace, Callable]:
    """A continuous space in which eigenfunctions are sought, and the map from its node values to those of Y."""
    element = Y.V.ufl_element()
    if element in H1:
        return Y, lambda modes: modes
    degree = max(element.embedded_superdegree, 1) if element.embedded_superdegree <= 1 else element.embedded_subdegree
    C = LabelSpace(fd.FunctionSpace(Y.V.mesh(), "CG", degree))
    with stop_annotating():
        if element.embedded_superdegree == 0:
            to_Y = fd.assemble(fd.inner(fd.TrialFunction(C.V), fd.TestFunction(Y.V)) * fd.dx).petscmat
            scale = 1 / Y.weights
        else:
            to_Y = fd.assemble(fd.interpolate(fd.TrialFunction(C.V), Y.V)).petscmat
            scale = np.ones(Y.nodes)

    def to_nodes(modes: np.ndarray) -> np.ndarray:
        x, y = to_Y.createVecs()
        values = np.empty((Y.nodes, modes.shape[1]))
        for k in range(modes.shape[1]):
            x.array_w[:] = modes[:, k]
            to_Y.mult(x, y)
            values[:, k] = scale * y.array_r
        # The closest orthonormal functions: G^(-1/2) turns with a rotation of the modes, a QR would not.
        gram = Y.sum((values * Y.weights[:, None]).T @ values)
        return values @ scipy.linalg.inv(scipy.linalg.sqrtm(gram)).real

    return C, to_nodes


def _whole_clusters(C: LabelSpace, rank: int, parameters: dict, prefix: str | None) -> tuple[np.ndarray, np.ndarray]:
    """At least `rank` smallest eigenpairs of (K, M), up to the end of a repeated eigenvalue."""
    with stop_annotating():
        u, v = fd.TrialFunction(C.V), fd.TestFunction(C.V)
        K = fd.assemble(fd.inner(fd.grad(u), fd.grad(v)) * fd.dx).petscmat
    w = K.createVecRight()
    w.array_w[:] = C.weights
    M = K.duplicate()
    M.setDiagonal(w)
    M.assemble()
    wanted = rank + 4
    for _ in range(6):
        wanted = min(wanted, C.size)
        eigenvalues, modes = _smallest_eigenpairs(K, M, wanted, parameters, prefix)
        if wanted == C.size:
            return eigenvalues, modes
        # The last cluster may go on beyond what was found.
        complete = _cluster_ends(eigenvalues)[-2:-1]
        if complete and complete[0] >= rank:
            end = complete[0]
            if _count_below(K, M, (eigenvalues[end - 1] + eigenvalues[end]) / 2) == end:
                return eigenvalues[:end], modes[:, :end]
        wanted += max(4, wanted // 2)
    raise RuntimeError(
        f"laplace_basis: the eigensolver keeps missing eigenvalues below {eigenvalues[-1]:.6g}; "
        f"a larger 'eps_ncv' or a smaller 'eps_tol' in solver_parameters may help"
    )


def _smallest_eigenpairs(K, M, count: int, parameters: dict, prefix: str | None) -> tuple[np.ndarray, np.ndarray]:
    eps = SLEPc.EPS().create(comm=K.comm)
    eps.setOperators(K, M)
    eps.setDimensions(nev=count)
    petsctools.set_from_options(
        eps, parameters=EIGENSOLVER_PARAMETERS | parameters, options_prefix=prefix, default_prefix="fem_resnet_laplace"
    )
    with petsctools.inserted_options(eps):
        eps.solve()
    found = eps.getConverged()
    if found < count:
        raise RuntimeError(
            f"laplace_basis: SLEPc found {found} of {count} eigenvalues in {eps.getIterationNumber()} iterations "
            f"(reason {eps.getConvergedReason()}); try a larger 'eps_ncv' or 'eps_max_it' in solver_parameters"
        )
    x = K.createVecRight()
    eigenvalues, modes = np.empty(count), np.empty((x.getLocalSize(), count))
    for k in range(count):
        eigenvalues[k] = eps.getEigenpair(k, x).real
        modes[:, k] = x.array_r
    eps.destroy()
    order = np.argsort(eigenvalues, kind="stable")
    return eigenvalues[order], modes[:, order]


def _count_below(K, M, shift: float) -> int:
    """How many eigenvalues lie below `shift`: the negative pivots of `K - shift M`."""
    A = K.copy()
    A.axpy(-shift, M)
    pc = PETSc.PC().create(comm=K.comm)
    pc.setOperators(A)
    petsctools.set_from_options(
        pc,
        parameters={
            "pc_type": "cholesky",
            "pc_factor_mat_solver_type": "mumps",
            "mat_mumps_icntl_13": 1,  # no ScaLAPACK at the root, which does not count pivots
            "mat_mumps_icntl_24": 1,
        },
        default_prefix="fem_resnet_inertia",
    )
    with petsctools.inserted_options(pc):
        pc.setUp()
        negative, _, _ = pc.getFactorMatrix().getInertia()
    pc.destroy()
    A.destroy()
    return negative


def _cluster_ends(eigenvalues: np.ndarray) -> list[int]:
    gaps = np.diff(eigenvalues) > CLUSTER_TOLERANCE * np.maximum(np.abs(eigenvalues[1:]), 1e-8)
    return [*(np.flatnonzero(gaps) + 1).tolist(), len(eigenvalues)]


def _fix_rotation(modes: np.ndarray, eigenvalue: float, C: LabelSpace) -> np.ndarray:
    """The orthonormal basis of the span of `modes` that plane waves of this frequency single out."""
    centre = C.sum(C.weights @ C.coordinates) / C.measure
    size = modes.shape[1]
    # Directions and phases without any symmetry, so that no two waves tie and none misses the eigenspace.
    generator = np.random.default_rng(2020)
    directions = generator.standard_normal((C.coordinates.shape[1], 2 * size + 6))
    directions /= np.linalg.norm(directions, axis=0)
    phases = generator.uniform(0, 2 * np.pi, 2 * size + 6)
    waves = np.cos(np.sqrt(max(eigenvalue, 0.0)) * (C.coordinates - centre) @ directions + phases)
    parts = C.sum((modes * C.weights[:, None]).T @ waves)
    Q, R, _ = scipy.linalg.qr(parts, mode="economic", pivoting=True)
    return modes @ (Q * np.sign(np.diag(R)))
