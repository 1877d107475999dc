"""Kernels of low rank from full kernels: the one call, and how it samples.

The best kernel of low rank is a truncated singular value decomposition in the label measures (`compression`). There are
three ways to it. A kernel that has factors is decomposed in these. While the N_y N_z values of a kernel are affordable,
SLEPc decomposes the matrix of all of them (`all_values`). Otherwise adaptive cross approximation finds factors from some
rows and columns, and a sample judges the error (`crosses`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from petsc4py import PETSc

from fem_resnet.arguments import instance, integer, number, real_array
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.options import checked_options, checked_prefix
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.ranks import same
from fem_resnet.theory.limits.all_values import compress_all_values
from fem_resnet.theory.limits.compression import Compression, compress_factors
from fem_resnet.theory.limits.crosses import compress_by_crosses
from fem_resnet.theory.limits.kernel_values import KernelValues

__all__ = ["KernelSampling", "compress"]


@dataclass(frozen=True)
class KernelSampling:
    """When `compress` samples a kernel instead of computing all its values, and how sure the error of a sample is.

    Parameters
    ----------
    affordable
        The largest number N_y N_z of values that is computed. For more values, cross approximation computes some rows and
        columns: about rank (N_y + N_z) values.
    confidence
        The probability with which a sampled error holds, between 0 and 1. It supposes that the sample has met what is large:
        a bump of b on less than a hundredth of Y and of Z may be missed by all pairs and rows.
    seed
        The seed of what is drawn at random.

    Raises
    ------
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> KernelSampling(affordable=0, confidence=0.999)
    KernelSampling(affordable=0, confidence=0.999, seed=0)
    """

    affordable: int = 4096**2
    confidence: float = 0.99
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "affordable", integer("affordable", self.affordable, least=0))
        object.__setattr__(self, "confidence", number("confidence", self.confidence, above=0, below=1))
        object.__setattr__(self, "seed", integer("seed", self.seed, least=0))


@PETSc.Log.EventDecorator("fem_resnet:compress")
def compress(
    kernel: LowRankKernel | Callable | tuple | ArrayLike,
    tolerance: float,
    Y: LabelSpace | None = None,
    Z: LabelSpace | None = None,
    *,
    beta: np.ndarray | None = None,
    largest_rank: int = 512,
    sampling: KernelSampling | None = None,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> Compression:
    """A kernel of low rank with `norm(b - b_r) <= tolerance norm(b)` in L2(Y x Z), the Hilbert-Schmidt norm.

    The operator norm of the error is at most that. The rank is the least one that cuts no repeated singular value in
    two. The result is the same on any number of ranks, up to the tolerance of the singular value decomposition. A rank
    holds its own rows of the N_y x N_z values while they are affordable, and no such array otherwise, unless the kernel is
    given as a matrix. Collective over the ranks of Y.

    Parameters
    ----------
    kernel
        b, as one of

        - a callback ``b(y, z)`` of coordinates, NumPy arrays of shape (.., d), which broadcasts over the axes before
          the last one: ``lambda y, z: np.exp(-((y - z) ** 2).sum(axis=-1))``;
        - a UFL expression with the symbols that are its arguments, ``(exp(-dot(y - z, y - z)), y, z)``, where y is the
          SpatialCoordinate of the mesh, and z a Constant of the same shape or the SpatialCoordinate of the other mesh;
        - a matrix of the values b(y_i, z_j), shape (N_y, N_z), the same on every rank, in the order of `node_numbers`;
          a matrix B between neurons stands for b = B / w_j, (2.4b);
        - a `LowRankKernel`, with `beta`: a layer of a trained network, also of a dense one (``net.learned_factors()``,
          ``net.kernel.get(l)``).
    tolerance
        From 0 to 1, exclusive; no unit.
    Y, Z
        The label domains of y and z; Z = Y if left out. A LowRankKernel has its own: leave both out.
    beta
        The coefficients of a LowRankKernel, shape ``kernel.shape``; left out for other kernels.
    largest_rank
        The largest rank that is allowed.
    sampling
        When the kernel is sampled, and how. If left out ``KernelSampling()``, which samples above 4096 x 4096 values.
    solver_parameters, options_prefix
        Options of SLEPc's SVD, over `fem_resnet.theory.limits.all_values.SVD_PARAMETERS`, and their prefix.

    Returns
    -------
    Compression

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described above, or b is zero or not finite; on all ranks alike.
    Exception
        What a callback raises on one rank, on all ranks.
    RuntimeError
        If the rank would exceed the largest one, SLEPc does not converge, or a sampled error is not known to be within the
        tolerance.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(3), "DG", 0))
    >>> found = compress(lambda y, z: np.exp(-((y - z) ** 2).sum(axis=-1)), 1e-3, Y)
    >>> found.rank, found.hilbert_schmidt.value < 1e-3 * found.norm
    (15, True)
    """
    for name, X in (("Y", Y), ("Z", Z)):
        if isinstance(kernel, LowRankKernel):
            if X is not None:
                raise TypeError(f"{name}: a LowRankKernel has label domains of its own; leave it out")
        elif X is not None or name == "Y":
            check_label_space(X, name)
    same(
        kernel.phi.Y.comm if isinstance(kernel, LowRankKernel) else Y.comm, kernel=kernel, tolerance=tolerance, beta=beta,
        largest_rank=largest_rank, sampling=sampling, solver_parameters=solver_parameters, options_prefix=options_prefix,
    )  # fmt: skip
    tolerance, largest_rank = number("tolerance", tolerance, above=0, below=1), integer("largest_rank", largest_rank)
    instance("sampling", sampling, (KernelSampling, type(None)))
    sampling = sampling or KernelSampling()
    options = checked_options(solver_parameters), checked_prefix(options_prefix)
    if isinstance(kernel, LowRankKernel):
        return compress_factors(kernel, real_array("beta", beta, kernel.shape), tolerance, largest_rank)
    if beta is not None:
        raise ValueError(
            f"beta: expected None, as coefficients belong to a LowRankKernel and not to a {type(kernel).__name__}"
        )
    Z = Y if Z is None else Z
    b = KernelValues(kernel, Y, Z)
    if Y.size * Z.size <= sampling.affordable:
        return compress_all_values(b, tolerance, largest_rank, *options)
    return compress_by_crosses(b, tolerance, largest_rank, sampling.confidence, sampling.seed)
