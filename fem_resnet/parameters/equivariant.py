"""Linear maps and functions that keep given symmetries of Y, in Laplace bases with or without channels.

A symmetry acts on functions of Y x {1 .. C}, a map R of Y with a sign s_c for each channel,

    (S f)_c(y) = s_c f_c(R y),

and a field X without signs, as its flow begins with the identity. The functions f_c are neither even nor odd. With the
matrices A of `symmetry_matrices`, maps beta with beta S = S beta have couplings X of channel d and block J of functions to
channel c and block I, such that

    A_I X - s_c s_d X A_J = 0    for each symmetry.

That is solved for every pair of blocks by a singular value decomposition. It leaves the basis of a null space open, which
would differ between numbers of ranks: `_gram_schmidt` takes one that is the null space's own. A function v of channel c and
block I keeps the symmetries where s_c A_I v = v, or A_I v = 0 for a field. Frequencies are in parts of the smallest one, so
that singular values below the tolerance are 0 but for the mesh, and those above three times the tolerance are not. Those in
between are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.sparse
import ufl

from fem_resnet.arguments import instance, integer, integer_array, number
from fem_resnet.fixed import read_only
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.symmetries import SymmetryMatrices, symmetry_matrices
from fem_resnet.parameters.subspace import in_first
from fem_resnet.ranks import on_first, same

__all__ = [
    "Action", "HeadSymmetries", "Parity", "acting_on", "equivariant_maps", "head_symmetries", "invariant_coefficients",
    "invariant_functions",
]  # fmt: skip

#: Singular values above this many tolerances belong to couplings that do not commute.
_DROPPED = 3.0
#: A projected unit vector serves if it is this part as long as the longest. Symmetries make many of one length, or of lengths
#: whose ratio is the root of a simple fraction; of those none is near this number, so that round-off does not choose.
_LONG_ENOUGH = 0.93


@dataclass(frozen=True)
class Parity:
    """A map of Y that acts on each channel with a sign: (S f)_c(y) = s_c f_c(R y).

    A kernel that keeps it obeys b_cd(R y, R z) = s_c s_d b_cd(y, z), a bias a_c(R y) = s_c a_c(y). So a bias that is constant
    on Y has s_c = 1. Where a sign is -1, sigma must be odd.

    Parameters
    ----------
    map
        R, a function of an array of coordinates, or a permutation of the points of a graph, as for `Symmetric`.
    signs
        s_c, 1 or -1 a channel, shape (C,).
    output
        The sign of the output of a head that keeps the symmetry; or one a channel of it.
    inputs
        The sign of the fields that a `Lift` takes; or one a field.

    Raises
    ------
    TypeError, ValueError
        If a sign is neither 1 nor -1, or `map` neither a function nor a list of integers.

    Examples
    --------
    Burgers' equation takes -u(-x) to minus its solution at -x:

    >>> Parity(lambda x: -x, (-1, -1, 1, 1), output=-1).signs
    (-1, -1, 1, 1)
    """

    map: Callable[[np.ndarray], np.ndarray] | Sequence[int]
    signs: Sequence[int]
    output: int | Sequence[int] = 1
    inputs: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        if not callable(self.map):
            object.__setattr__(self, "map", read_only(integer_array("map", self.map, ("points",)).copy()))
        output, inputs = (
            given if isinstance(given, (list, tuple, np.ndarray)) else (given,) for given in (self.output, self.inputs)
        )
        for name, given in (("signs", self.signs), ("output", output), ("inputs", inputs)):
            signs = tuple(integer(name, sign, least=-1, most=1) for sign in instance(name, given, (list, tuple, np.ndarray)))
            if not signs or 0 in signs:
                raise ValueError(f"{name}: expected 1 or -1 for each channel, got {given!r}")
            object.__setattr__(self, name, signs)


@dataclass(frozen=True)
class Action:
    """How symmetries act on the functions of a basis.

    Attributes
    ----------
    basis : Basis
        The basis.
    found : SymmetryMatrices
        The matrices of the symmetries on these.
    signs : numpy.ndarray
        The sign of each symmetry on each channel, shape (channels, symmetries).
    tolerance : float
        Singular values below it are taken for 0.
    """

    basis: Basis
    found: SymmetryMatrices
    signs: np.ndarray
    tolerance: float


def acting_on(
    name: str, basis: Basis, symmetries: Sequence[Any], tolerance: float = 0.1, *, is_output: bool = False
) -> Action:
    """How symmetries from outside act on the functions of a basis. Collective.

    Parameters
    ----------
    name
        What messages call the basis.
    basis
        A Laplace basis of whole eigenspaces.
    symmetries
        Killing fields, maps, permutations, or these in a `Parity`.
    tolerance
        As for `Symmetric`.
    is_output
        Whether signs are those of the output.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or differs between ranks.
    """
    instance(name, basis, Basis, "laplace_basis(Y, rank) makes one")
    kinds = ["a field" if isinstance(each, ufl.core.expr.Expr) else each for each in symmetries]
    same(basis.Y.comm, symmetries=kinds, tolerance=tolerance)
    tolerance = number("tolerance", tolerance, above=0, most=0.25)
    if not symmetries:
        raise ValueError("symmetries: expected at least one Killing field, map or permutation, got none")
    channels, columns = basis.Y.channels, []
    for n, each in enumerate(symmetries):
        given = np.atleast_1d(
            (each.output if is_output else each.signs) if isinstance(each, Parity) else np.ones(channels, int)
        )
        if len(given) != channels:
            what = "output" if is_output else "signs"
            raise ValueError(f"symmetries[{n}].{what}: expected {channels}, one a channel of {name}, got {len(given)}")
        columns.append(given)
    found = symmetry_matrices(basis.one, [each.map if isinstance(each, Parity) else each for each in symmetries])
    for n, is_map in enumerate(found.are_maps):
        if isinstance(symmetries[n], Parity) and not is_map:
            raise TypeError(f"symmetries[{n}]: expected a map in a Parity, got a field, which has no sign")
    return Action(basis, found, np.array(columns).T, tolerance)


def equivariant_maps(to: Action, of: Action) -> tuple[scipy.sparse.csc_array, float]:
    """An orthonormal basis of the matrices that commute with symmetries. Collective.

    Parameters
    ----------
    to, of
        How the same symmetries act on the functions that rows, and columns, of the matrices belong to.

    Returns
    -------
    elements : scipy.sparse.csc_array
        Each matrix as one column, shape (rank of `to` x rank of `of`, count).
    kept : float
        The largest singular value taken for 0.

    Raises
    ------
    ValueError
        If a singular value is neither 0 nor clearly different from it.
    """

    @cache
    def couplings(products: tuple[int, ...]) -> tuple[list[tuple[np.ndarray, np.ndarray, np.ndarray]], float]:
        found, largest = [], 0.0
        for I in to.found.blocks:
            for J in of.found.blocks:
                X, kept = _couplings(to, of, I, J, products)
                found += [(np.repeat(I, len(J)), np.tile(J, len(I)), one) for one in X]
                largest = max(largest, kept)
        return found, largest

    def solve() -> tuple[scipy.sparse.csc_array, float]:
        rows, columns, values = [], [], []
        controls: list[np.ndarray] = []
        largest = 0.0
        for c, ours in enumerate(to.signs):
            for d, theirs in enumerate(of.signs):
                found, kept = couplings(tuple((ours * theirs).tolist()))
                largest = max(largest, kept)
                for i, j, one in found:
                    entries = np.abs(one) > 1e-14
                    rows.append(c * to.basis.one.rank + i[entries])
                    columns.append(d * of.basis.one.rank + j[entries])
                    controls.append(np.full(np.count_nonzero(entries), len(controls)))
                    values.append(one[entries])
        places = np.concatenate(rows) * of.basis.rank + np.concatenate(columns)
        shape = (to.basis.rank * of.basis.rank, len(controls))
        return scipy.sparse.csc_array((np.concatenate(values), (places, np.concatenate(controls))), shape=shape), largest

    # Rounding must not make other elements on other ranks.
    return on_first(of.basis.Y.comm, solve)


def _couplings(to: Action, of: Action, I: np.ndarray, J: np.ndarray, products: Sequence[int]) -> tuple[np.ndarray, float]:
    """Orthonormal X with A_I X = s X A_J, each as a row of shape (size of I * size of J,); the largest singular value kept."""
    one, other = np.eye(len(I)), np.eye(len(J))
    rows = [
        (np.kron(A[np.ix_(I, I)], other) - sign * np.kron(one, B[np.ix_(J, J)].T)) / frequency
        for A, B, frequency, sign in zip(to.found.matrices, of.found.matrices, of.found.frequencies, products)
    ]
    _, sizes, V = np.linalg.svd(np.vstack(rows), full_matrices=False)
    return _kept(of, sizes, V, (to.basis.one.eigenvalues[I], of.basis.one.eigenvalues[J]))


def _kept(of: Action, sizes: np.ndarray, V: np.ndarray, eigenvalues: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """The rows of V whose singular values are 0 but for the mesh, and the largest of these."""
    tolerance = of.tolerance
    unclear = sizes[(sizes >= tolerance) & (sizes <= _DROPPED * tolerance)]
    if unclear.size:
        raise ValueError(
            f"symmetries: expected a mesh that tells which functions a kernel may couple, got the singular value "
            f"{unclear.max():.2g}, neither below {tolerance:g} nor above {_DROPPED * tolerance:g}, for functions of the "
            f"eigenvalues {' and '.join(f'{part.mean():.6g}' for part in eigenvalues)}; the mesh breaks a part of "
            f"{of.found.broken:.2g} of the symmetries: refine it, take fewer functions, or another tolerance"
        )
    kept = sizes < tolerance
    return _gram_schmidt(V[kept]), float(sizes[kept].max(initial=0.0))


def _gram_schmidt(N: np.ndarray) -> np.ndarray:
    """Orthonormal rows of the same span as the orthonormal rows N that depend on the span alone, shape as N.

    They come by Gram and Schmidt from projections of unit vectors: in each step of the first one that is long enough.
    """
    turn, left = np.empty((len(N), len(N))), N
    for row in turn:
        lengths = np.linalg.norm(left, axis=0)
        first = np.argmax(lengths >= _LONG_ENOUGH * lengths.max())
        row[:] = left[:, first] / lengths[first]
        left = left - np.outer(row, row @ left)
    return turn @ N


def invariant_coefficients(action: Action) -> np.ndarray:
    """Orthonormal coefficients of the functions that keep the symmetries, shape (rank, count), count >= 0. Collective.

    The functions are in the order of their eigenvalues.
    """
    eigenvalues = action.basis.eigenvalues

    def vectors() -> Iterator[np.ndarray]:
        for c, signs in enumerate(action.signs):
            for I in action.found.blocks:
                one = np.eye(len(I))
                rows = [
                    (sign * A[np.ix_(I, I)] - one if is_map else A[np.ix_(I, I)]) / frequency
                    for A, frequency, is_map, sign in zip(
                        action.found.matrices, action.found.frequencies, action.found.are_maps, signs
                    )
                ]
                _, sizes, V = np.linalg.svd(np.vstack(rows), full_matrices=False)
                for v in _kept(action, sizes, V, (action.basis.one.eigenvalues[I],))[0]:
                    whole = np.zeros(action.basis.rank)
                    whole[c * action.basis.one.rank + I] = v
                    yield whole

    def ordered() -> np.ndarray:
        found = sorted(vectors(), key=lambda v: round(float(v**2 @ eigenvalues), 9))
        return np.array(found).reshape(-1, action.basis.rank).T

    return on_first(action.basis.Y.comm, ordered)


@dataclass(frozen=True)
class HeadSymmetries:
    """The W and mu of a head that keep symmetries, in Laplace bases: they serve on each mesh that these move to.

    Attributes
    ----------
    of_W : scipy.sparse.csc_array
        Orthonormal W, each as one column, shape (rank of onto x rank of psi, count).
    of_mu : scipy.sparse.csc_array
        Orthonormal mu, shape (rank of onto, count), count >= 0.
    """

    of_W: scipy.sparse.csc_array
    of_mu: scipy.sparse.csc_array

    def in_first(self, psi: Basis, onto: Basis, rank: int) -> HeadSymmetries:
        """Those on the first functions of the bases, in each channel.

        Parameters
        ----------
        psi, onto
            The bases of the head.
        rank
            How many functions.

        Raises
        ------
        ValueError
            If they cut an eigenspace.
        """
        rows, columns = ((basis.rank, basis.Y.channels) for basis in (onto, psi))
        return HeadSymmetries(
            in_first("rank", "the head", self.of_W, (rows, columns), rank),
            in_first("rank", "the head", self.of_mu, (rows, (1, 1)), rank),
        )


def head_symmetries(psi: Basis, onto: Basis, symmetries: Sequence[Any]) -> HeadSymmetries:
    """What a head from `psi` onto `onto` may be if it keeps symmetries. Collective.

    Parameters
    ----------
    psi, onto
        Laplace bases.
    symmetries
        As for `Symmetric`.

    Raises
    ------
    TypeError, ValueError
        As of `Symmetric`.
    """
    to = acting_on("onto", onto, symmetries, is_output=True)
    of_W, _ = equivariant_maps(to, acting_on("psi", psi, symmetries))
    return HeadSymmetries(of_W, scipy.sparse.csc_array(invariant_coefficients(to)))


def invariant_functions(phi: Basis, *symmetries: Any, tolerance: float = 0.1) -> Basis:
    """The functions in the span of a Laplace basis that keep symmetries: a basis for a bias that keeps them. Collective.

    Parameters
    ----------
    phi
        The basis, of whole eigenspaces.
    *symmetries
        As for `Symmetric`.
    tolerance
        As for `Symmetric`.

    Returns
    -------
    Basis
        Orthonormal functions, on the label domain of phi, that move as phi does.

    Raises
    ------
    TypeError, ValueError
        As of `Symmetric`; or if no function but 0 keeps the symmetries.

    Examples
    --------
    Under rotations of a disk, the radial functions:

    >>> from firedrake import FunctionSpace, SpatialCoordinate, UnitDiskMesh, as_vector
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> mesh = UnitDiskMesh(3)
    >>> x, y = SpatialCoordinate(mesh)
    >>> invariant_functions(laplace_basis(LabelSpace(FunctionSpace(mesh, "CG", 1)), 6), as_vector([-y, x])).rank
    2
    """
    found = invariant_coefficients(acting_on("phi", phi, symmetries, tolerance))
    if not found.size:
        raise ValueError("symmetries: expected some that a function other than 0 keeps, got others; the bias is 0 then")
    return _combined(phi, found)


def _combined(phi: Basis, found: np.ndarray) -> Basis:
    return Basis(phi.Y, phi.expand(found), "given", move=lambda basis, Y: _combined(phi.on(Y), found))
