"""Eigenfunctions of the Laplace-Beltrami operator with Neumann condition, or of the Laplacian of a graph, as a basis.

    K x = lambda M x,      K_ij = int_Y grad(p_i) . grad(p_j) dy,     M = diag(w),

so they are orthonormal in the label measure itself. They depend on Y and not on its mesh. But under refinement modes change
their order, and in a repeated eigenvalue any rotation is as good. On another mesh (Q, with M_2) they are therefore turned
onto the original (P, with M_1) by the polar factor of the cross Gram matrix X. Both bases are seen through plane waves w,
so that no function of one mesh need be evaluated on the other, and X takes one stiffness into the other:

    A = P^T M_1 w,   B = Q^T M_2 w,     B^T X ~ A^T,   (Q^T K_2 Q) X ~ X (P^T K_1 P),
    X = U S V^T,     P on the new mesh = Q U V^T.

The waves see the old functions as mixtures of the new ones. The singular values of these mixtures are 1, up to the part of
the old functions that the new mesh does not resolve.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import NoneType

import numpy as np
from petsc4py import PETSc

from fem_resnet.arguments import instance, integer
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.label_domain.mode_cache import cache_key, cached
from fem_resnet.label_domain.modes import Modes, count_on, eigenfunctions, made_orthonormal, told_apart
from fem_resnet.label_domain.other_domains import difference
from fem_resnet.label_domain.plane_waves import PlaneWaves, cross_gram
from fem_resnet.label_domain.repeated_basis import RepeatedBasis
from fem_resnet.log import log
from fem_resnet.options import checked_options, checked_prefix
from fem_resnet.ranks import same

__all__ = ["laplace_at_most", "laplace_basis", "laplace_up_to", "move_laplace"]

#: By how much eigenvalues of a mesh may exceed those of the domain.
_MESHES = 1.05


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
    largest part in the eigenspace gives the first function, and so on. Some eigenspaces need waves of other frequencies
    too, such as the eigenvalue 0 where Y has several pieces.

    On a discontinuous space the eigenfunctions of the continuous space of the same degree (at least 1) are taken, averaged
    over the cells for DG of degree 0, else at the nodes; these are then made orthonormal by the closest orthonormal set. On
    a graph (`point_space`) they are the eigenvectors of its Laplacian. The inertia of `K - s M` (Sylvester) checks that no
    eigenvalue was missed.

    Collective over the communicator of `Y`.

    Parameters
    ----------
    Y
        The label domain, of any cell type or embedding. With channels, each channel has these functions.
    rank
        How many functions, at least 1 and at most the number of nodes; with channels, in each.
    solver_parameters
        Options of SLEPc's EPS, over `fem_resnet.label_domain.eigensolver.EIGENSOLVER_PARAMETERS`. There eigenvalues are in
        units of 1 / l^2, l the root of the mean squared distance from Y's centre; on a graph, in units of about their mean.
    options_prefix
        Prefix of these options.
    cache
        A directory where eigenfunctions are kept, and looked for first: files of each rank, by a key made of the mesh's
        nodes and cells on all ranks, the space, the rank and `solver_parameters` (not of options on the command line). A file
        that is damaged or was changed is made anew; where none can be written, a warning says so.

    Returns
    -------
    Basis
        With `eigenvalues`, ascending, in 1 / (unit of length)^2.

    Raises
    ------
    TypeError
        If `Y` is no LabelSpace, or another argument is of another kind.
    ValueError
        If the rank is no integer in that range, SLEPc refuses an option or does not ask for it, or an argument differs between
        ranks; if the space is discontinuous and does not tell so many eigenfunctions apart;
        if Y is a set of points without a graph, or lies upon itself, so that its coordinates do not fix the functions.
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
    if isinstance(Y, Channels):
        options = {"solver_parameters": solver_parameters, "options_prefix": options_prefix, "cache": cache}
        return RepeatedBasis(Y, laplace_basis(Y.one, rank, **options))
    same(Y.comm, rank=rank, solver_parameters=solver_parameters, options_prefix=options_prefix, cache=cache)
    if Y.numbers is not None and Y.graph is None:
        raise ValueError(
            f"Y: {Y!r} is a set of points, which has a Laplacian only with a graph; point_space(.., graph=A) has one"
        )
    rank = integer("rank", rank, most=Y.size)
    parameters, prefix = checked_options(solver_parameters), checked_prefix(options_prefix)
    instance("cache", cache, (str, os.PathLike, NoneType), "a directory")

    def find() -> Modes:
        modes = eigenfunctions(Y, rank, parameters, prefix)
        values = modes.values[:, :rank]
        seen = told_apart(Y, values)
        if seen < rank:
            raise ValueError(
                f"rank: expected at most {seen}, the number of eigenfunctions that {Y.V.ufl_element()} on this mesh tells "
                f"apart, got {rank}; by its values the next one, of the eigenvalue {modes.eigenvalues[seen]:.6g}, is 0 or a "
                f"sum of those before it. Refine the mesh, or take a continuous space"
            )
        return modes._replace(values=made_orthonormal(Y, values))

    modes = find() if cache is None else cached(Path(cache), cache_key(Y, rank, solver_parameters), Y, find)
    ends = modes.ends.tolist()
    if rank not in ends:
        below, above = max([end for end in ends if end < rank], default=0), min(end for end in ends if end > rank)
        log(
            Y.comm, logging.WARNING,
            "rank %d cuts through the repeated eigenvalue %.6g: ranks %d and %d keep it whole",
            rank, modes.eigenvalues[rank - 1], below, above,
        )  # fmt: skip
    move = move_laplace if Y.graph is None else None
    return Basis(Y, modes.values, "laplace", modes.eigenvalues[:rank], move, modes.stiffness[:rank, :rank])


def move_laplace(basis: Basis, Y: LabelSpace) -> Basis:
    """A Laplace basis on another label space of the same Y. Collective over the communicators of both.

    How much of the functions the new space does not resolve is logged, at level INFO; from a tenth on as a warning.
    The `eigenvalues` of the result are the functions' Rayleigh quotients.

    Parameters
    ----------
    basis
        The original.
    Y
        Another label space of the same label domain.

    Raises
    ------
    ValueError
        If Y is clearly another domain, a set of points among them, or tells fewer eigenfunctions apart than the basis has.
    """
    if (what := difference(basis.Y, Y)) is not None:
        raise ValueError(
            f"Y: expected a label space of the same Y, {basis.Y!r}; {Y!r} is {what}. Kernels of LaplaceFunctions and "
            f"functions that are constant go to other domains, other eigenfunctions do not"
        )
    available = count_on(Y)
    if available < basis.rank:
        raise ValueError(f"Y: expected at least {basis.rank} nodes, one a function; {Y!r} has {available}")
    # A buffer, since modes that were among the first need not be so on the other mesh.
    modes = eigenfunctions(Y, min(basis.rank + max(4, basis.rank // 4), available), {}, None)
    seen = told_apart(Y, modes.values)
    if seen < basis.rank:
        raise ValueError(f"Y: expected one that tells {basis.rank} eigenfunctions apart, {Y!r} tells {seen}; refine its mesh")
    values, stiffness = made_orthonormal(Y, modes.values[:, :seen]), modes.stiffness[:seen, :seen]
    turn, lost = _turn(basis, PlaneWaves(Y), values, stiffness)
    log(
        Y.comm, logging.WARNING if lost > 0.1 else logging.INFO,
        "%d functions moved from %s to %s: a part of %.1e is lost", basis.rank, basis.Y, Y, lost,
    )  # fmt: skip
    stiffness = turn.T @ stiffness @ turn
    return Basis(Y, values @ turn, "laplace", np.diag(stiffness).copy(), move_laplace, stiffness)


def laplace_up_to(Y: LabelSpace, highest: float, about: int) -> Basis:
    """The eigenfunctions of all eigenvalues up to one, in whole eigenspaces. Collective.

    Parameters
    ----------
    Y
        The label domain, with channels or without: then each channel has these functions.
    highest
        The eigenvalue, in 1 / (unit of length)^2; those of a mesh may exceed it by a twentieth.
    about
        How many there may be.

    Raises
    ------
    ValueError
        If the space does not tell them apart.
    """
    if isinstance(Y, Channels):
        return RepeatedBasis(Y, laplace_up_to(Y.one, highest, about))
    available, count = count_on(Y), about
    while True:
        modes = eigenfunctions(Y, min(count, available), {}, None)
        if count >= available or modes.eigenvalues[-1] > _MESHES * highest:
            break
        count *= 2
    # At least the constants, of the eigenvalue 0.
    rank = max(end for end in modes.ends.tolist() if end == modes.ends[0] or modes.eigenvalues[end - 1] <= _MESHES * highest)
    seen = told_apart(Y, modes.values[:, :rank])
    if seen < rank:
        raise ValueError(
            f"Y: expected one that tells {rank} eigenfunctions apart, as many as have eigenvalues up to {highest:.6g}, {Y!r} "
            f"tells {seen}; refine its mesh"
        )
    return _of_modes(Y, modes, rank)


def laplace_at_most(Y: LabelSpace, most: int) -> Basis:
    """As many eigenfunctions of whole eigenspaces as there are, up to `most`; the first eigenspace in any case. Collective.

    Parameters
    ----------
    Y
        The label domain, without channels.
    most
        How many there may be.
    """
    modes = eigenfunctions(Y, min(most, count_on(Y)), {}, None)
    most = min(most, told_apart(Y, modes.values))
    return _of_modes(Y, modes, max(end for end in modes.ends.tolist() if end == modes.ends[0] or end <= most))


def _of_modes(Y: LabelSpace, modes: Modes, rank: int) -> Basis:
    """The basis of the first `rank` eigenfunctions, which are whole eigenspaces. Collective."""
    move = move_laplace if Y.graph is None else None
    values = made_orthonormal(Y, modes.values[:, :rank])
    return Basis(Y, values, "laplace", modes.eigenvalues[:rank], move, modes.stiffness[:rank, :rank])


def _turn(basis: Basis, new: PlaneWaves, values: np.ndarray, stiffness: np.ndarray) -> tuple[np.ndarray, float]:
    """U V^T, which turns the new functions onto the basis, and the largest part of a function that is lost."""
    # Waves that depend on the original alone, so that all its copies have one limit.
    old = PlaneWaves(basis.Y)
    # Pieces that do not hang together, or hardly, are told apart by waves of their size.
    pieces = np.count_nonzero(basis.eigenvalues < 1e-2 * old.unit)
    highest = max(max(basis.eigenvalues.max(), 0.0) ** 0.5, pieces / old.length)
    frequencies = highest * np.random.default_rng(2021).uniform(0, 1.2, 16 * basis.rank + 64)
    A = old.integrals(basis.values, frequencies)
    B = new.integrals(values, frequencies, old.centre)
    U, _, V = np.linalg.svd(cross_gram(A, B, basis.stiffness, stiffness, old.unit), full_matrices=False)
    turn = U @ V
    # The waves see each original function as a mixture of the turned ones, of singular values 1 where nothing is lost.
    return turn, float(np.abs(1 - np.linalg.svdvals(np.linalg.lstsq(B.T @ turn, A.T)[0])).max())
