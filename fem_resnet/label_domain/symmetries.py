"""Matrices of symmetries of Y in a basis of Laplace eigenfunctions.

A symmetry is a map R of Y onto itself that keeps distances, or a flow of such maps, given by its Killing field X. It takes
each eigenspace of the Laplacian into itself:

    p_j(R y) = sum_i p_i(y) A_ij,  A^T A = 1,            X p_j = sum_i p_i A_ij,  A = -A^T.

Neither p_j(R y) nor X p_j need be known on the mesh. Integrals with plane waves w say what they are, since R and the flow of X
keep the measure:

    int p_j(R y) w(y) dy = int p_j(y) w(R^-1 y) dy,      int (X p_j) w dy = -int p_j (X w) dy.

The right-hand sides take p_j at the nodes alone, so a space without gradients serves too, and no point is sought that R takes
off a polygonal mesh. The derivative X w is exact. So on a circle of equal cells frequencies are integers up to round-off,
while derivatives of CG1 see the frequencies k and n/2 - k of n nodes as one. A follows by least squares, and
is made antisymmetric, or orthogonal by its polar factor, in invariant blocks of functions. What A then misses of these
integrals is what the mesh breaks of the symmetry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import ufl
from scipy.sparse.csgraph import connected_components

from fem_resnet.arguments import integer_array, real_array
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.eigensolver import eigenspace_ends
from fem_resnet.label_domain.plane_waves import PlaneWaves
from fem_resnet.ranks import together

__all__ = ["SymmetryMatrices", "eigenspaces", "symmetry_matrices"]

#: Functions of which A mixes parts of at least this size, relative to its smallest frequency, belong to one invariant block.
_MIXED = 0.05
#: Functions whose frequencies, the roots of eigenvalues, differ by this part may be of one eigenspace that a mesh splits.
_NEAR = 0.08
#: The highest frequency of waves by which a function is seen, relative to its own.
_HIGHEST = 1.3
#: A block of eigenvalues that differ by more than this part is no eigenspace that a mesh has split.
_SPREAD = 0.3
#: What may be missed of the image of a function. A basis that cuts an eigenspace misses more, but for reflections that happen
#: to keep what is left of it nearly; `broken` shows that.
_MISSED = 0.4
#: A frequency below this part of the largest one is taken for 0.
_ZERO = 5e-3


@dataclass(frozen=True)
class SymmetryMatrices:
    """The matrices A of symmetries.

    Attributes
    ----------
    matrices : tuple of numpy.ndarray
        A of each symmetry, shape (rank, rank): antisymmetric of a field, orthogonal of a map.
    frequencies : tuple of float
        The smallest frequency of each: the least singular value of A, or of A - 1 for a map, that is not 0.
    are_maps : tuple of bool
        Whether each is a map, and not a field.
    blocks : tuple of numpy.ndarray
        The numbers of the functions of each invariant block: an eigenspace, or several that the mesh has split.
    broken : float
        The largest part of a function's image that the matrices miss: 0 where the mesh has the symmetries.
    """

    matrices: tuple[np.ndarray, ...]
    frequencies: tuple[float, ...]
    are_maps: tuple[bool, ...]
    blocks: tuple[np.ndarray, ...]
    broken: float


def eigenspaces(phi: Basis, split: float = 1e-3) -> list[np.ndarray]:
    """The numbers of the functions of each eigenspace of a Laplace basis. Collective.

    Parameters
    ----------
    phi
        The basis.
    split
        Neighbouring eigenvalues that differ by less than this part of their value count as one.

    Raises
    ------
    ValueError
        If the functions are no orthonormal eigenfunctions.
    """
    if phi.eigenvalues is None or np.abs(phi.gram - np.eye(phi.rank)).max() > 1e-8:
        raise ValueError(f"phi: expected orthonormal eigenfunctions, as laplace_basis makes them, got {phi!r}")
    order = np.argsort(phi.eigenvalues, kind="stable")
    ends = eigenspace_ends(phi.eigenvalues[order] / PlaneWaves(phi.Y).unit, split)
    return [np.sort(part) for part in np.split(order, ends[:-1])]


def symmetry_matrices(phi: Basis, symmetries: Sequence[Any]) -> SymmetryMatrices:
    """The matrices of symmetries in a Laplace basis. Collective.

    Parameters
    ----------
    phi
        The basis, which should hold whole eigenspaces.
    symmetries
        Killing fields (UFL vectors), maps of arrays of coordinates, or permutations of the points of a graph.

    Raises
    ------
    TypeError, ValueError
        If a symmetry is of another kind, or none of Y, or the mesh does not resolve it on these functions.
    """
    spaces, waves = eigenspaces(phi), PlaneWaves(phi.Y)
    seen = [_seen(f"symmetries[{n}]", phi, waves, given) for n, given in enumerate(symmetries)]
    links = np.zeros((phi.rank,) * 2, bool)
    for space in spaces:
        links[np.ix_(space, space)] = True
    for image in seen:
        links |= np.abs(image.fitted) > _MIXED * image.frequency
    count, label = connected_components(scipy.sparse.csr_array(links), directed=False)
    blocks = [np.flatnonzero(label == n) for n in range(count)]
    for block in blocks:
        low, high = phi.eigenvalues[block].min(), phi.eigenvalues[block].max()
        if high - low > _SPREAD * (high + 1e-3 * waves.unit):
            raise ValueError(
                f"symmetries: expected symmetries of Y, which keep eigenvalues, got some that mix functions of the "
                f"eigenvalues {low:.6g} and {high:.6g}; if they are symmetries, take fewer functions, or a finer mesh"
            )
    matrices, missed = [], 0.0
    for n, image in enumerate(seen):
        A = image.cleaned(blocks)
        parts = image.missed(A)
        worst = int(np.argmax(parts))
        if parts[worst] > _MISSED:
            raise ValueError(
                f"symmetries[{n}]: expected a symmetry of Y that takes the basis into itself, got one that takes a part of "
                f"{min(parts[worst], 1.0):.2g} of function {worst}, of the eigenvalue {phi.eigenvalues[worst]:.6g}, "
                f"elsewhere; take a rank that keeps eigenspaces whole, fewer functions, or a finer mesh"
            )
        missed = max(missed, float(parts[worst]))
        matrices.append(A + np.eye(phi.rank) if image.is_map else A)
    return SymmetryMatrices(
        tuple(matrices), tuple(image.frequency for image in seen), tuple(image.is_map for image in seen), tuple(blocks), missed
    )


class _Seen:
    """What is seen of the functions p_j, and of what a symmetry makes of them: X p_j, or p_j(R y) - p_j(y).

    Parameters
    ----------
    before, after
        Of p_j and of its image, shape (rank, waves): integrals with waves, or coefficients of orthonormal functions.
    near
        Which functions p_j may become, shape (rank, rank): i of column j.
    by
        By which waves each function is seen, shape (rank, waves).
    is_map
        Whether it belongs to a map, and not to a field.

    Attributes
    ----------
    fitted : numpy.ndarray
        A of X, or A - 1 of R, by least squares, shape (rank, rank).
    frequency : float
        The smallest singular value of A that is not 0 but for errors of the mesh.
    """

    def __init__(self, before: np.ndarray, after: np.ndarray, near: np.ndarray, by: np.ndarray, is_map: bool):
        self.before, self.after, self.by, self.is_map = before, after, by, is_map
        fitted = np.zeros(near.shape)
        for j, (rows, waves) in enumerate(zip(near.T, by)):
            fitted[rows, j] = np.linalg.lstsq(before[np.ix_(rows, waves)].T, after[j, waves])[0]
        self.fitted = fitted if is_map else (fitted - fitted.T) / 2
        self.frequency = _smallest_frequency(np.linalg.svd(self.fitted, compute_uv=False))

    def cleaned(self, blocks: Sequence[np.ndarray]) -> np.ndarray:
        """A, or A - 1 with an orthogonal A, without what leads out of the blocks."""
        result = np.zeros_like(self.fitted)
        for block in blocks:
            inside, one = np.ix_(block, block), np.eye(len(block))
            part = self.fitted[inside]
            if self.is_map:
                U, _, V = np.linalg.svd(part + one)
                part = U @ V - one
            result[inside] = part
        return result

    def missed(self, A: np.ndarray) -> np.ndarray:
        """How much of the images A does not explain, shape (rank,).

        That is relative to the function times the smallest frequency; of a field, times its own where that is larger.
        """
        rest = np.linalg.norm((self.after - A.T @ self.before) * self.by, axis=1)
        # The frequencies of a field grow, and the errors of the mesh with them.
        own = 0.0 if self.is_map else np.linalg.norm(A, axis=0)
        return rest / (np.maximum(own, self.frequency) * np.linalg.norm(self.before * self.by, axis=1))


def _smallest_frequency(sizes: np.ndarray) -> float:
    """The smallest of these numbers that is not 0 but for errors; 1 if all are 0.

    The constant function has the frequency 0. So the numbers have a gap, over which they grow more than anywhere else.
    """
    sizes = np.sort(sizes)
    if sizes[-1] < 1e-12:  # the identity, or the field 0
        return 1.0
    floored = np.maximum(sizes, _ZERO * sizes[-1])
    return float(sizes[1 + np.argmax(floored[1:] / floored[:-1])])


def _seen(name: str, phi: Basis, waves: PlaneWaves, given: Any) -> _Seen:
    """What is seen of the functions and their images under a symmetry from outside. Collective."""
    if phi.Y.graph is not None:
        return _permuted(name, phi, given)
    own = np.sqrt(np.maximum(phi.eigenvalues, 0.0))
    frequencies = np.sort(
        _HIGHEST * max(own.max(), waves.unit**0.5) * np.random.default_rng(2021).uniform(0, 1, 16 * phi.rank + 64)
    )
    # Waves that are much shorter than a function see the mesh.
    number = np.maximum(np.searchsorted(frequencies, _HIGHEST * own), 64)
    by = np.arange(frequencies.size) < number[:, None]
    before = waves.integrals(phi.values, frequencies, periodic=True)
    is_map = not isinstance(given, ufl.core.expr.Expr)
    if is_map:
        if not callable(given):
            raise TypeError(
                f"{name}: expected a Killing field in UFL, or a function that maps an array of coordinates, got "
                f"{type(given).__name__}"
            )
        # Integrals of p_j(y) with w(R y) belong to the inverse of R, whose matrix is A^T.
        after = waves.integrals(phi.values, frequencies, periodic=True, to=lambda x: _mapped(name, phi, given, x)) - before
    else:
        after = -waves.integrals(phi.values, frequencies, periodic=True, along=waves.at_places(name, given))
    high = np.maximum(own, own[:, None])
    return _Seen(before, after, np.abs(own - own[:, None]) <= _NEAR * high + 1e-3 * waves.unit**0.5, by, is_map)


def _mapped(name: str, phi: Basis, given: Callable, x: np.ndarray) -> np.ndarray:
    """The places where a user's map takes places, shape (places, dimension). Collective."""

    def image() -> np.ndarray:
        try:
            places = given(x.copy())
        except Exception as error:  # whatever a user's function raises
            raise ValueError(f"{name}: expected a map of arrays of shape {x.shape}, got {error!r} from it") from error
        return real_array(name, places, x.shape)

    return together(phi.Y.comm, image)


def _permuted(name: str, phi: Basis, given: Any) -> _Seen:
    """What a permutation of the points of a graph does, exactly. Collective."""
    Y = phi.Y
    if isinstance(given, ufl.core.expr.Expr) or callable(given):
        raise TypeError(f"{name}: expected a permutation of the points of {Y!r}, got {type(given).__name__}")
    to = integer_array(name, given, (Y.size,))
    if (np.sort(to) != np.arange(Y.size)).any():
        raise ValueError(f"{name}: expected each number from 0 to {Y.size - 1} once, got {to.tolist()[:9]} ..")
    order = np.argsort(np.concatenate(Y.comm.allgather(Y.numbers)))
    values, weights = (np.concatenate(Y.comm.allgather(np.array(mine)))[order] for mine in (phi.values, Y.weights))
    changed = abs(Y.graph[to][:, to] - Y.graph).max()
    if changed > 1e-10 * Y.graph.max() or np.abs(weights[to] - weights).max() > 1e-6 * weights.max():
        raise ValueError(f"{name}: expected a permutation that keeps edges and weights of {Y!r}, got one that changes them")
    root = np.sqrt(weights)[:, None]
    before, after = root * values, root * (values[to] - values)
    everything = np.ones((phi.rank,) * 2, bool)
    return _Seen(before.T, after.T, everything, np.ones(before.T.shape, bool), True)
