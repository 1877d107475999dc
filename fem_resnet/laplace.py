"""Eigenfunctions of the Laplace-Beltrami operator with Neumann condition, or of the Laplacian of a graph.

    K x = lambda M x,      K_ij = int_Y grad(p_i) . grad(p_j) dy,     M = diag(w),

so they are orthonormal in the label measure itself. They depend on Y and not on its mesh; but under refinement modes
change their order, and in repeated eigenvalues any rotation is as good. On another mesh (Q, with M_2) they are turned
onto the original (P, with M_1) by the polar factor of the cross Gram matrix. Both bases are seen through plane waves w,
so that no function of one mesh need be evaluated on the other:

    A = P^T M_1 w,   B = Q^T M_2 w,     (A B^+)^T = U S V^T,     P on the new mesh = Q U V^T.

The singular values S are 1 up to what the new mesh does not resolve.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import firedrake as fd
import numpy as np
import petsctools
import scipy.linalg
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating
from slepc4py import SLEPc
from ufl import H1

from fem_resnet.arguments import integer
from fem_resnet.basis import Basis
from fem_resnet.label_space import LabelSpace, check_label_space
from fem_resnet.log import log

__all__ = ["laplace_basis", "move_laplace"]

#: Shift-invert about a negative number: the Neumann Laplacian is singular at 0.
EIGENSOLVER_PARAMETERS = {
    "eps_gen_hermitian": None,
    "eps_target": -1.0,
    "eps_target_magnitude": None,
    "eps_tol": 1e-13,
    "eps_max_it": 500,
    "eps_purify": False,  # it would solve once more a mode to purge the kernel of M, which has none
    "st_type": "sinvert",
    "st_ksp_type": "preonly",
    "st_pc_type": "cholesky",
    "st_pc_factor_mat_solver_type": "mumps",
    "st_mat_mumps_icntl_14": 200,  # per cent of room to spare: its estimate is at times too small in parallel
}

#: Neighbours closer than this part of their value count as one repeated eigenvalue, which a mesh has split.
CLUSTER_TOLERANCE = 1e-3



@PETSc.Log.EventDecorator("fem_resnet:laplace_basis")
def laplace_basis(
    Y: LabelSpace,
    rank: int,
    *,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
    cache: str | Path | None = None,
) -> Basis:
    """Eigenfunctions of the Laplace-Beltrami operator (Neumann) to the `rank` smallest eigenvalues.

    Orthonormal in the label measure. Signs, and rotations within a repeated eigenvalue, are fixed by a rule that does
    not see the partition: among plane waves of the eigenvalue's frequency, fixed once and for all, the one with the
    largest part in the eigenspace gives the first function, and so on. On a discontinuous space the eigenfunctions
    of the continuous space of the same degree (at least 1) are taken: averaged over the cells for DG of degree 0,
    else at the nodes; then made orthonormal by the closest orthonormal set. On a graph (`point_space`) they are the
    eigenvectors of its Laplacian. That no eigenvalue was missed is checked
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
    cache
        A directory where what was computed is kept, and looked for first: files of each rank, by a key made of the mesh's
        nodes and cells on all ranks, the space, the rank and `solver_parameters` (not of options on the command line).

    Returns
    -------
    Basis
        With `eigenvalues`, ascending, in 1 / (unit of length)^2.

    Raises
    ------
    TypeError
        If `Y` is no LabelSpace.
    ValueError
        If the rank is no integer in that range, or Y a set of points without a graph.
    RuntimeError
        If the eigensolver does not find them all.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitSquareMesh
    >>> Y = LabelSpace(FunctionSpace(UnitSquareMesh(16, 16), "CG", 1))
    >>> laplace_basis(Y, 4).eigenvalues.round(1) + 0.0
    array([ 0. ,  9.8,  9.9, 19.7])
    """
    check_label_space(Y)
    if Y.numbers is not None and Y.graph is None:
        raise ValueError("Y: points have no neighbours, and so no Laplacian, unless a graph says them; give point_space a graph")
    rank = integer("rank", rank, most=Y.size)

    def find() -> tuple[np.ndarray, np.ndarray]:
        eigenvalues, modes, to_nodes = _eigenfunctions(Y, rank, solver_parameters or {}, options_prefix)
        return eigenvalues, to_nodes(modes[:, :rank])

    eigenvalues, values = find() if cache is None else _kept(Path(cache), _key(Y, rank, solver_parameters), Y, find)
    ends = _cluster_ends(eigenvalues)
    if rank not in ends:
        below, above = max([end for end in ends if end < rank], default=0), min(end for end in ends if end > rank)
        log(
            Y.comm, logging.WARNING,
            "rank %d cuts through the repeated eigenvalue %.6g: ranks %d and %d keep it whole",
            rank, eigenvalues[rank - 1], below, above,
        )  # fmt: skip
    return Basis(
        Y, values, "laplace", eigenvalues[:rank], move_laplace if Y.graph is None else None
    )


def _key(Y: LabelSpace, rank: int, parameters: dict | None) -> str:
    """What tells apart all that the eigenfunctions, and how the ranks hold them, depend on. Collective."""
    mine = hashlib.sha256(repr((Y.V.ufl_element(), rank, sorted((parameters or {}).items()))).encode())
    graph = Y.graph
    hangs = [Y.V.cell_node_map().values_with_halo] if graph is None else [graph.data, graph.indices, graph.indptr, Y.numbers]
    for array in (Y.coordinates, Y.weights, *hangs):
        mine.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return hashlib.sha256("".join(Y.comm.allgather(mine.hexdigest())).encode()).hexdigest()


def _kept(
    directory: Path, key: str, Y: LabelSpace, find: Callable[[], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and values at the nodes, from the files of an earlier call; else from `find`, kept for later calls."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{key}-{Y.comm.rank}.npz"
    if Y.comm.allreduce(file.exists(), op=MPI.LAND):
        with np.load(file) as arrays:
            return arrays["eigenvalues"], arrays["values"]
    eigenvalues, values = find()
    with tempfile.NamedTemporaryFile(dir=directory, suffix=".part", delete=False) as part:
        np.savez(part, eigenvalues=eigenvalues, values=values)
    os.replace(part.name, file)  # no reader ever sees half of a file
    return eigenvalues, values


def _eigenfunctions(
    Y: LabelSpace, rank: int, parameters: dict, prefix: str | None
) -> tuple[np.ndarray, np.ndarray, Callable]:
    """At least `rank` eigenpairs, whole eigenspaces in a fixed rotation, and what turns them into functions on Y."""
    C, to_nodes = _with_stiffness(Y)
    if rank > C.size:
        raise ValueError(f"rank: {C.size} eigenfunctions exist on {C.V.ufl_element()}, {rank} were asked for")
    eigenvalues, modes = _whole_clusters(C, rank, parameters, prefix)
    ends = _cluster_ends(eigenvalues)
    for start, end in zip([0, *ends], ends):
        modes[:, start:end] = _fix_rotation(modes[:, start:end], eigenvalues[start:end].mean(), C)
    return eigenvalues, modes, to_nodes


def _with_stiffness(Y: LabelSpace) -> tuple[LabelSpace, Callable]:
    """A continuous space in which eigenfunctions are sought, and the map from its node values to those of Y."""
    element = Y.V.ufl_element()
    if element in H1 or Y.graph is not None:
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
    K = C.stiffness
    w = K.createVecRight()
    w.array_w[:] = C.weights
    M = K.duplicate()
    M.setDiagonal(w)
    M.assemble()
    wanted = min(rank + 4, C.size)
    eigenvalues, modes = _smallest_eigenpairs(K, M, wanted, parameters, prefix)
    for _ in range(10):
        if len(eigenvalues) == C.size:
            return eigenvalues, modes
        # The last cluster may go on beyond what was found.
        complete = _cluster_ends(eigenvalues)[-2:-1]
        if not complete or complete[0] < rank:
            wanted = min(wanted + max(4, wanted // 2), C.size)
            eigenvalues, modes = _smallest_eigenpairs(K, M, wanted, parameters, prefix)
            continue
        end = complete[0]
        missing = _count_below(K, M, (eigenvalues[end - 1] + eigenvalues[end]) / 2) - end
        if missing == 0:
            return eigenvalues[:end], modes[:, :end]
        # Krylov spaces may hold one copy only of a repeated eigenvalue: the others are orthogonal to what was found.
        more, more_modes = _smallest_eigenpairs(K, M, missing, parameters, prefix, orthogonal_to=modes)
        order = np.argsort(np.concatenate([eigenvalues, more]), kind="stable")
        eigenvalues = np.concatenate([eigenvalues, more])[order]
        modes = np.column_stack([modes, more_modes])[:, order]
    raise RuntimeError(
        f"laplace_basis: the eigensolver keeps missing eigenvalues below {eigenvalues[-1]:.6g}; "
        f"a larger 'eps_ncv' or a smaller 'eps_tol' in solver_parameters may help"
    )


def _smallest_eigenpairs(
    K, M, count: int, parameters: dict, prefix: str | None, orthogonal_to: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    eps = SLEPc.EPS().create(comm=K.comm)
    eps.setOperators(K, M)
    eps.setDimensions(nev=count)
    if orthogonal_to is not None:
        space = []
        for mode in orthogonal_to.T:
            x = K.createVecRight()
            x.array_w[:] = mode
            space.append(x)
        eps.setDeflationSpace(space)
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
            "mat_mumps_icntl_14": 200,
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
    count = 2 * modes.shape[1] + 6
    if C.graph is None:
        parts = _seen_through_waves(C, modes, C.coordinates - _centre(C), np.full(count, np.sqrt(max(eigenvalue, 0.0))))
    else:
        # A graph may have a multiple eigenvalue 0: waves of any frequency, in the points' numbers.
        parts = _seen_through_waves(C, modes, C.numbers[:, None], np.random.default_rng(2022).uniform(0, np.pi, count))
    Q, R, _ = scipy.linalg.qr(parts, mode="economic", pivoting=True)
    return modes @ (Q * np.sign(np.diag(R)))


def move_laplace(basis: Basis, Y: LabelSpace) -> Basis:
    """A Laplace basis on another label space of the same Y. Collective over the communicators of both.

    What the new space does not resolve, `1 - S`, is logged: its largest value at level INFO, from a tenth on as a warning.

    Parameters
    ----------
    basis
        The original.
    Y
        Another label space of the same label domain.

    Raises
    ------
    ValueError
        If Y is a set of points, lies in a space of another dimension, or has fewer eigenfunctions than the basis.
    """
    dimensions = [space.coordinates.shape[1] for space in (basis.Y, Y)]
    if Y.numbers is not None or dimensions[0] != dimensions[1]:
        what = "a set of points" if Y.numbers is not None else "in a space of {1} dimensions, not {0}".format(*dimensions)
        raise ValueError(f"Y: a label space of the same Y, {basis.Y!r}, is wanted; {Y!r} is {what}")
    available = min(Y.size, _with_stiffness(Y)[0].size)
    if available < basis.rank:
        raise ValueError(f"Y: at least {basis.rank} nodes are wanted, one a function; {Y!r} has {available}")
    # A buffer, since modes that were among the first need not be so on the other mesh.
    eigenvalues, modes, to_nodes = _eigenfunctions(Y, min(basis.rank + max(4, basis.rank // 4), available), {}, None)
    modes, eigenvalues = modes[:, : Y.size], eigenvalues[: Y.size]  # with a whole eigenspace there may be more
    values = to_nodes(modes)
    # Waves that depend on the original alone, so that all its copies have one limit.
    frequencies = np.sqrt(basis.eigenvalues[-1]) * np.random.default_rng(2021).uniform(0, 1.2, 16 * basis.rank + 64)
    centre = _centre(basis.Y)
    A = _seen_through_waves(basis.Y, basis.values, basis.Y.coordinates - centre, frequencies)
    B = _seen_through_waves(Y, values, Y.coordinates - centre, frequencies)
    U, S, V = np.linalg.svd(np.linalg.lstsq(B.T, A.T)[0], full_matrices=False)
    turn = U @ V
    lost = float(np.abs(1 - S).max())
    log(
        Y.comm, logging.WARNING if lost > 0.1 else logging.INFO,
        "%d functions moved from %s to %s: a part of %.1e is lost", basis.rank, basis.Y, Y, lost,
    )  # fmt: skip
    return Basis(Y, values @ turn, "laplace", np.einsum("ij,i,ij->j", turn, eigenvalues, turn), move_laplace)


def _centre(Y: LabelSpace) -> np.ndarray:
    return Y.sum(Y.weights @ Y.coordinates) / Y.measure


def _seen_through_waves(Y: LabelSpace, values: np.ndarray, x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Integrals of functions times plane waves of these frequencies in x, shape (functions, waves)."""
    # Directions and phases without any symmetry, so that no two waves tie and none misses an eigenspace.
    generator = np.random.default_rng(2020)
    directions = generator.standard_normal((x.shape[1], len(frequencies)))
    directions *= frequencies / np.linalg.norm(directions, axis=0)
    waves = np.cos(x @ directions + generator.uniform(0, 2 * np.pi, len(frequencies)))
    return Y.sum((values * Y.weights[:, None]).T @ waves)
