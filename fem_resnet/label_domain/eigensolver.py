"""The eigenproblem K x = lambda M x of the Laplacian: the smallest eigenvalues, in whole eigenspaces, none missed.

SLEPc finds eigenpairs by shift and invert. Sylvester's law of inertia then says how many eigenvalues lie below a number: as
many as `K - s M` has negative pivots. Where some were missed, they are sought again orthogonal to those that were found.
"""

from __future__ import annotations

import numpy as np
import petsctools
from petsc4py import PETSc
from slepc4py import SLEPc

from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.options import petsc_refusals, reason_name, refuse_unread, unread

__all__ = ["EIGENSOLVER_PARAMETERS", "eigenspace_ends", "whole_eigenspaces"]

#: Options of SLEPc's EPS. Shift-invert about a negative number, in units of Y's own: the Neumann Laplacian is singular at 0.
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

#: Neighbouring eigenvalues that differ by less than this part of their value count as one repeated eigenvalue that a mesh has
#: split.
_SPLIT = 1e-3
#: In Y's units; smaller eigenvalues count as this one. The eigenvalue 0, which Y has once for each connected piece, is known
#: only up to round-off of the largest eigenvalue.
_SMALLEST = 1e-5


def whole_eigenspaces(
    C: LabelSpace, unit: float, rank: int, parameters: dict, prefix: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """At least `rank` smallest eigenpairs of (K, M), up to the end of an eigenspace. Collective.

    Parameters
    ----------
    C
        A label space that has a stiffness matrix K.
    unit
        The size of an eigenvalue. The problem is solved in this unit and with |Y| = 1.
    rank
        How many eigenpairs are needed, at most the number of nodes.
    parameters
        Options of SLEPc's EPS, over `EIGENSOLVER_PARAMETERS`.
    prefix
        The prefix of these options.

    Returns
    -------
    eigenvalues : numpy.ndarray
        Ascending, shape (count,), count >= rank.
    modes : numpy.ndarray
        Eigenfunctions at the owned nodes, orthonormal in the label measure, shape (nodes, count).

    Raises
    ------
    RuntimeError
        If the eigensolver does not find them all.
    ValueError
        If SLEPc refuses an option or does not ask for it.
    """
    # Libraries have absolute thresholds, which do not see the unit of length in Y.
    K = C.stiffness.copy()
    K.scale(1 / (unit * C.measure))
    w = K.createVecRight()
    w.array_w[:] = C.weights / C.measure
    M = K.duplicate()
    M.setDiagonal(w)
    M.assemble()
    wanted = min(rank + 4, C.size)
    eigenvalues, modes = _smallest_eigenpairs(K, M, wanted, parameters, prefix)
    for _ in range(10):
        if len(eigenvalues) == C.size:
            return eigenvalues * unit, modes / C.measure**0.5
        # The last eigenspace may have more eigenpairs than were found.
        complete = eigenspace_ends(eigenvalues)[-2:-1]
        if not complete or complete[0] < rank:
            wanted = min(wanted + max(4, wanted // 2), C.size)
            eigenvalues, modes = _smallest_eigenpairs(K, M, wanted, parameters, prefix)
            continue
        end = complete[0]
        missing = _count_below(K, M, (eigenvalues[end - 1] + eigenvalues[end]) / 2) - end
        if missing == 0:
            return eigenvalues[:end] * unit, modes[:, :end] / C.measure**0.5
        # Krylov spaces may hold one copy only of a repeated eigenvalue: the others are orthogonal to those that were found.
        more, more_modes = _smallest_eigenpairs(K, M, missing, parameters, prefix, orthogonal_to=modes)
        order = np.argsort(np.concatenate([eigenvalues, more]), kind="stable")
        eigenvalues = np.concatenate([eigenvalues, more])[order]
        modes = np.column_stack([modes, more_modes])[:, order]
    raise RuntimeError(
        f"laplace_basis: the eigensolver keeps missing eigenvalues below {eigenvalues[-1] * unit:.6g}; "
        f"a larger 'eps_ncv' or a smaller 'eps_tol' in solver_parameters may help"
    )


def eigenspace_ends(eigenvalues: np.ndarray, split: float = _SPLIT) -> list[int]:
    """How many of these eigenvalues lie in the first eigenspace, the first two, and so on; ascending.

    Parameters
    ----------
    eigenvalues
        Ascending, shape (count,), in the unit of `whole_eigenspaces`.
    split
        Neighbours that differ by less than this part of their value count as one eigenvalue.
    """
    gaps = np.diff(eigenvalues) > split * np.maximum(np.abs(eigenvalues[1:]), _SMALLEST)
    return [*(np.flatnonzero(gaps) + 1).tolist(), len(eigenvalues)]


def _smallest_eigenpairs(
    K: PETSc.Mat, M: PETSc.Mat, count: int, parameters: dict, prefix: str | None, orthogonal_to: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """So many eigenvalues, ascending, and eigenvectors; of these some may be missed."""
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
    with petsc_refusals(parameters):
        petsctools.set_from_options(
            eps, parameters=EIGENSOLVER_PARAMETERS | parameters, options_prefix=prefix, default_prefix="fem_resnet_laplace"
        )
    with petsctools.inserted_options(eps):
        eps.setUp()  # the linear solver reads its options here
        refuse_unread(unread(petsctools.get_options(eps), parameters), f"SLEPc's EPS of type {eps.getType()!r}")
        eps.solve()
    found = eps.getConverged()
    if found < count:
        raise RuntimeError(
            f"laplace_basis: SLEPc found {found} of {count} eigenvalues in {eps.getIterationNumber()} iterations, "
            f"{reason_name(SLEPc.EPS, eps.getConvergedReason())}; try a larger 'eps_ncv' or 'eps_max_it' in solver_parameters"
        )
    x = K.createVecRight()
    eigenvalues, modes = np.empty(count), np.empty((x.getLocalSize(), count))
    for k in range(count):
        eigenvalues[k] = eps.getEigenpair(k, x).real
        modes[:, k] = x.array_r
    eps.destroy()
    order = np.argsort(eigenvalues, kind="stable")
    return eigenvalues[order], modes[:, order]


def _count_below(K: PETSc.Mat, M: PETSc.Mat, shift: float) -> int:
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
