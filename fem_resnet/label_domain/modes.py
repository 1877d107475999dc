"""Laplace eigenfunctions in whole eigenspaces, with a rotation that sees neither partition nor eigensolver.

On a discontinuous space they are eigenfunctions of a continuous space of the same mesh, as the discontinuous one sees them:
averaged over the cells for DG of degree 0, else at the nodes.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import NamedTuple

import firedrake as fd
import numpy as np
from pyadjoint.tape import stop_annotating
from ufl import H1

from fem_resnet.label_domain.eigensolver import eigenspace_ends, whole_eigenspaces
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.orthonormal import closest_orthonormal, gram_matrix
from fem_resnet.label_domain.plane_waves import PlaneWaves, fix_rotation
from fem_resnet.petsc import apply_columns

__all__ = ["Modes", "count_on", "eigenfunctions", "made_orthonormal", "told_apart"]

#: Functions of a discontinuous space that are as dependent as this are round-off.
_DEPENDENT = 1e-10


class Modes(NamedTuple):
    """Eigenfunctions, in whole eigenspaces of a fixed rotation.

    Attributes
    ----------
    eigenvalues : numpy.ndarray
        Ascending, shape (count,), in 1 / (unit of length)^2.
    ends : numpy.ndarray
        How many functions lie in the first eigenspace, the first two, and so on, ascending.
    values : numpy.ndarray
        Values at the owned nodes, shape (nodes, count). On a discontinuous space these are means or nodal values of the
        continuous functions, and not orthonormal before `made_orthonormal`.
    stiffness : numpy.ndarray
        Gram matrix of the gradients of the continuous functions, shape (count, count). In an eigenspace that the mesh has
        split, rotated functions are no eigenfunctions, and the matrix is diagonal only up to these eigenspaces.
    """

    eigenvalues: np.ndarray
    ends: np.ndarray
    values: np.ndarray
    stiffness: np.ndarray


def eigenfunctions(Y: LabelSpace, rank: int, parameters: dict, prefix: str | None) -> Modes:
    """The first `rank` eigenpairs, and the others of the last one's eigenspace. Collective.

    Parameters
    ----------
    Y
        The label domain.
    rank
        How many.
    parameters
        Options of SLEPc's EPS.
    prefix
        The prefix of these options.

    Raises
    ------
    ValueError
        If there are not so many, or coordinates do not tell them apart, or SLEPc refuses an option or does not ask for it.
    RuntimeError
        If the eigensolver does not find them all.
    """
    C, to_nodes = _with_stiffness(Y)
    if rank > C.size:
        raise ValueError(f"rank: expected at most {C.size}, the number of eigenfunctions on {C.V.ufl_element()}, got {rank}")
    waves = PlaneWaves(C)
    eigenvalues, modes = whole_eigenspaces(C, waves.unit, rank, parameters, prefix)
    ends = eigenspace_ends(eigenvalues / waves.unit)
    # How many more were found depends on the eigensolver.
    ends = ends[: 1 + bisect.bisect_left(ends, rank)]
    eigenvalues, modes = eigenvalues[: ends[-1]], modes[:, : ends[-1]]
    for start, end in zip([0, *ends], ends):
        modes[:, start:end] = fix_rotation(modes[:, start:end], eigenvalues[start:end].mean(), waves)
    stiffness = C.sum(modes.T @ C.apply_stiffness(modes))
    return Modes(eigenvalues, np.array(ends), to_nodes(modes), (stiffness + stiffness.T) / 2)


def count_on(Y: LabelSpace) -> int:
    """How many eigenfunctions a label space may hold: at most one a node of it, and of the space where they are sought."""
    return min(Y.size, _with_stiffness(Y)[0].size)


def told_apart(Y: LabelSpace, values: np.ndarray) -> int:
    """How many of these functions, the first ones, are linearly independent at the nodes. Collective.

    Parameters
    ----------
    Y
        The label domain.
    values
        Shape (nodes, functions).
    """
    gram = gram_matrix(Y, values)
    # The smallest eigenvalue of a leading block falls with its size.
    return bisect.bisect_left(
        range(1, len(gram) + 1), True, key=lambda size: np.linalg.eigvalsh(gram[:size, :size])[0] < _DEPENDENT
    )


def made_orthonormal(Y: LabelSpace, values: np.ndarray) -> np.ndarray:
    """The same functions, shape (nodes, functions), made orthonormal where a discontinuous space has lost that. Collective.

    Parameters
    ----------
    Y
        The label domain.
    values
        `Modes.values`, or the first columns of these, shape (nodes, functions).
    """
    return values if _has_gradients(Y) else closest_orthonormal(Y, values)


def _has_gradients(Y: LabelSpace) -> bool:
    return Y.V.ufl_element() in H1 or Y.graph is not None


def _with_stiffness(Y: LabelSpace) -> tuple[LabelSpace, Callable[[np.ndarray], np.ndarray]]:
    """A label space with gradients in which eigenfunctions are sought, and the map from its node values to those of Y."""
    if _has_gradients(Y):
        return Y, lambda modes: modes
    element = Y.V.ufl_element()
    degree = max(element.embedded_superdegree, 1) if element.embedded_superdegree <= 1 else element.embedded_subdegree
    C = LabelSpace(fd.FunctionSpace(Y.V.mesh(), "CG", degree))
    with stop_annotating():
        if element.embedded_superdegree == 0:
            to_Y = fd.assemble(fd.inner(fd.TrialFunction(C.V), fd.TestFunction(Y.V)) * fd.dx).petscmat
            scale = 1 / Y.weights
        else:
            to_Y = fd.assemble(fd.interpolate(fd.TrialFunction(C.V), Y.V)).petscmat
            scale = np.ones(Y.nodes)

    return C, lambda modes: scale[:, None] * apply_columns(to_Y, modes)
