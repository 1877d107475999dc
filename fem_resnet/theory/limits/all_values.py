"""Compression of a kernel by SLEPc's singular value decomposition of all its values, while these are affordable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import petsctools
from petsc4py import PETSc
from slepc4py import SLEPc

from fem_resnet.options import petsc_refusals, reason_name, refuse_unread, unread
from fem_resnet.theory.limits.compression import Compression, KernelError, least_rank, low_rank_kernel, norms_of_rest
from fem_resnet.theory.limits.kernel_values import KernelValues

__all__ = ["SVD_PARAMETERS", "compress_all_values"]

#: The randomised method of Halko, Martinsson and Tropp, to 1e-10 of the largest singular value.
SVD_PARAMETERS = {"svd_type": "randomized", "svd_conv_norm": None, "svd_tol": 1e-10, "svd_max_it": 1000}


def compress_all_values(
    b: KernelValues, tolerance: float, largest_rank: int, parameters: dict, prefix: str | None
) -> Compression:
    """The best kernel of low rank, from all values. Collective; each rank holds its rows of the matrix.

    Parameters
    ----------
    b
        The values of the kernel.
    tolerance, largest_rank
        As for `compress`.
    parameters, prefix
        Options of SLEPc's SVD, over `SVD_PARAMETERS`, and their prefix.
    """
    Y, Z = b.y.Y, b.z.Y
    roots = np.sqrt(Y.weights)[:, None], np.sqrt(Z.weights)[:, None]
    A = _matrix(b, roots)
    norm = _norm(A)
    if not norm > 0:
        raise ValueError("kernel: it is zero; a kernel of positive rank is not")
    found = _Truncated.of(A, min(Y.size, Z.size), tolerance, largest_rank, parameters, prefix)
    rest = _without(A, found.s, found.left, found.right)
    left_over = _norm(rest)
    operator = float(_singular_triplets(rest, 1, {"svd_type": "trlanczos"}, None)[0][0]) if left_over > 0 else 0.0
    for matrix in (A, rest):
        matrix.destroy()
    return Compression(
        low_rank_kernel((Y, Z), [found.left / roots[0], found.right / roots[1]]),
        found.s,
        "svd",
        norm,
        KernelError(left_over, found.rest),
        KernelError(operator, found.next_value),
        None,
        None,
        int(Y.comm.allreduce(b.evaluations)),
    )


@dataclass(frozen=True)
class _Truncated:
    """A truncated decomposition: singular values, owned rows of the vectors, and the optimal errors in both norms."""

    s: np.ndarray
    left: np.ndarray
    right: np.ndarray
    rest: float
    next_value: float

    @classmethod
    def of(
        cls, A: PETSc.Mat, all_of_them: int, tolerance: float, largest_rank: int, parameters: dict, prefix: str | None
    ) -> _Truncated:
        """Ask for twice as many singular triplets until they decide the rank. Collective."""
        wanted, r = 16, None
        while r is None:
            # One more than the rank is needed: the operator norm of the rest is the next singular value.
            wanted = min(wanted, all_of_them)
            s, left, right = _singular_triplets(A, wanted, parameters, prefix)
            difference = _without(A, s, left, right)
            # With all triplets the difference is round-off.
            beyond = 0.0 if wanted == all_of_them else _norm(difference)
            difference.destroy()
            rest = norms_of_rest(s, beyond)
            r = least_rank(s, rest, tolerance, largest_rank, complete=wanted == all_of_them)
            wanted *= 2
        return cls(s[:r], left[:, :r], right[:, :r], float(rest[r]), float(s[r]) if r < s.size else 0.0)


def _matrix(b: KernelValues, roots: tuple[np.ndarray, np.ndarray]) -> PETSc.Mat:
    """M^(1/2) b N^(1/2), each rank with the rows of its nodes. Collective."""
    Y, Z = b.y.Y, b.z.Y
    places, root = (np.concatenate(Z.comm.allgather(part)) for part in (b.z.places, roots[1][:, 0]))
    A = PETSc.Mat().createDense(((Y.nodes, Y.size), (Z.nodes, Z.size)), comm=Y.comm)
    local = A.getDenseArray()
    local[...] = b.between(b.y.places, places)
    local *= roots[0] * root
    A.assemble()
    return A


def _norm(A: PETSc.Mat) -> float:
    """The Frobenius norm; PETSc's stubs also allow for two norms in one call. Collective."""
    return cast(float, A.norm())


def _without(A: PETSc.Mat, s: np.ndarray, left: np.ndarray, right: np.ndarray) -> PETSc.Mat:
    """A - U S V^T, a new matrix, from the rows of U and V that this rank owns. Collective."""
    rest = A.duplicate(copy=True)
    local = rest.getDenseArray()
    local -= (left * s) @ np.concatenate(A.comm.tompi4py().allgather(right)).T
    rest.assemble()
    return rest


def _singular_triplets(
    A: PETSc.Mat, count: int, parameters: dict, prefix: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values, and the owned rows of the singular vectors, shape (rows, count). Collective."""
    svd = SLEPc.SVD().create(comm=A.comm)
    svd.setOperator(A)
    svd.setDimensions(nsv=count)
    with petsc_refusals(parameters):
        petsctools.set_from_options(
            svd, parameters=SVD_PARAMETERS | parameters, options_prefix=prefix, default_prefix="fem_resnet_svd"
        )
    with petsctools.inserted_options(svd):
        svd.solve()
    refuse_unread(unread(petsctools.get_options(svd), parameters), f"an SVD of type {svd.getType()!r}")
    found = svd.getConverged()
    if found < count:
        raise RuntimeError(
            f"compress: SLEPc found {found} of {count} singular values in {svd.getIterationNumber()} iterations, "
            f"{reason_name(SLEPc.SVD, svd.getConvergedReason())}; try 'svd_type': 'trlanczos' or a larger 'svd_max_it' in "
            f"solver_parameters"
        )
    # PETSc's stubs call the pair of vectors one vector.
    v, u = A.createVecs()  # type: ignore[misc]
    s, left, right = np.empty(count), np.empty((u.getLocalSize(), count)), np.empty((v.getLocalSize(), count))
    for k in range(count):
        s[k] = svd.getSingularTriplet(k, u, v)
        left[:, k], right[:, k] = u.array_r, v.array_r
    for thing in (svd, u, v):
        thing.destroy()
    return s, left, right
