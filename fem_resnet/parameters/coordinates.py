"""All coefficients of some parameters as one vector, in coordinates in which the Riesz map is the identity.

Coordinates are those of `SpaceBasis.coordinates` times the root of tau_k (`parameter`), in which the inner product of each set
of coefficients is its `unit` times the identity. A step that treats all directions alike then sees no basis, no unit of length
in Y and no lengths of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import firedrake as fd
import numpy as np
import scipy.sparse

from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import read_all

__all__ = ["Coordinates"]

#: Entries below this part of the largest one are round-off in what is the identity.
_ROUND_OFF = 1e-15


class Coordinates:
    """Coordinates of all coefficients of some parameters, as one vector.

    Parameters
    ----------
    parameters
        The parameters, with coefficients that are the same on every rank.

    Attributes
    ----------
    sets : list of (Parameter, int)
        The parameter of each set of coefficients, and its number there.
    places : list of slice
        The part of the vector that each set has.
    size : int
        Length of the vector.
    matrix : scipy.sparse.csr_array
        From coordinates to coefficients, each array of these in the order of its rows, shape (size, size).
    units : numpy.ndarray
        Of each coordinate the factor of its square in the squared norm of the label measure, shape (size,).
    """

    def __init__(self, parameters: Sequence[Parameter]):
        self.sets = [(p, k) for p in parameters for k in range(len(p.functions))]
        self._bases = [p.space_bases[k] for p, k in self.sets]
        self._shapes = [basis.shape for basis in self._bases]
        ends = np.cumsum([0, *(int(np.prod(shape)) for shape in self._shapes)])
        self.places = [slice(int(start), int(end)) for start, end in pairwise(ends)]
        self.size = int(ends[-1])
        made: dict = {}
        blocks = []
        for (p, k), basis in zip(self.sets, self._bases):
            if basis not in made:
                made[basis] = _columns(basis.from_coordinates, basis.shape)
            blocks.append(made[basis] / np.sqrt(p.time_basis.measures[k]))
        self.matrix = scipy.sparse.block_diag(blocks, format="csr") if blocks else scipy.sparse.csr_array((0, 0))
        self.units = np.repeat([basis.unit for basis in self._bases], [place.stop - place.start for place in self.places])

    def read(self) -> list[np.ndarray]:
        """The present coefficients, one array a set. Collective."""
        return [p.read(k) for p, k in self.sets]

    def write(self, coefficients: Sequence[np.ndarray]) -> None:
        """Give the parameters coefficients, one array a set."""
        for (p, k), c in zip(self.sets, coefficients):
            p.write(k, c)

    def moved(self, coefficients: Sequence[np.ndarray], step: np.ndarray) -> list[np.ndarray]:
        """Coefficients, one array a set, and the step in coordinates, shape (size,), added up."""
        change = self.matrix @ step
        return [c + change[place].reshape(c.shape) for c, place in zip(coefficients, self.places)]

    def functional(self, functionals: Sequence[fd.Cofunction]) -> np.ndarray:
        """The functional of coordinates, shape (size,), from those of the coefficients, one a set. Collective."""
        return self.matrix.T @ np.concatenate([np.ravel(part) for part in read_all(self._bases, functionals)])

    def norm(self, functional: np.ndarray) -> float:
        """The norm in the label measure of the gradient of a functional of coordinates, shape (size,)."""
        return float(np.sqrt(np.sum(functional**2 / self.units)))


def _columns(linear: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> scipy.sparse.csr_array:
    """The matrix of a linear map between arrays of one shape, without what is round-off."""
    matrix = np.column_stack([linear(unit.reshape(shape)).ravel() for unit in np.eye(int(np.prod(shape)))])
    matrix[np.abs(matrix) <= _ROUND_OFF * np.abs(matrix).max()] = 0.0
    return scipy.sparse.csr_array(matrix)
