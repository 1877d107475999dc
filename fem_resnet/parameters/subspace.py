"""Coefficients in a subspace of a space basis, such as those of a head that keeps symmetries.

A subspace has orthonormal elements E_k, matrices, each as one column of a sparse array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse

from fem_resnet.arguments import integer_array, real_array
from fem_resnet.parameters.space_basis import Replicated, SpaceBasis

__all__ = ["ELEMENTS", "Within", "as_arrays", "from_arrays", "in_first"]

#: The arrays that elements are written as, with the kinds of their numbers.
ELEMENTS = {"places": "i", "controls": "i", "values": "f8"}


def as_arrays(elements: scipy.sparse.csc_array) -> dict[str, np.ndarray]:
    """The entries of all E_k: places in E_k, the numbers k, and values, shape (entries,) each."""
    E = elements.tocoo()
    return {"places": E.coords[0], "controls": E.coords[1], "values": E.data}


def from_arrays(size: int, count: int, arrays: Mapping[str, np.ndarray]) -> scipy.sparse.csc_array:
    """The elements that `as_arrays` has written.

    Parameters
    ----------
    size
        How many entries a matrix has.
    count
        How many elements there are.
    arrays
        From `as_arrays`.

    Raises
    ------
    TypeError, ValueError
        If they describe no orthonormal matrices.
    """
    values = real_array("values", arrays["values"], ("entries",))
    if count > values.size:
        raise ValueError(f"count: expected at most one control an entry, {values.size}, got {count}")
    places, controls = (integer_array(name, arrays[name], values.shape).astype(int) for name in ("places", "controls"))
    for name, array, end in (("places", places, size), ("controls", controls, count)):
        if array.size and not (0 <= array.min() and array.max() < end):
            raise ValueError(f"{name}: expected numbers from 0 to {end - 1}, got others among them")
    elements = scipy.sparse.csc_array((values, (places, controls)), shape=(size, count))
    gram = (elements.T @ elements - scipy.sparse.eye_array(count)).tocoo()
    if np.abs(gram.data).max(initial=0.0) > 1e-8:
        raise ValueError("values: expected orthonormal matrices, got others")
    return elements


def in_first(
    name: str, of: str, elements: scipy.sparse.csc_array, sides: Sequence[tuple[int, int]], rank: int
) -> scipy.sparse.csc_array:
    """The elements that live on the first functions of each channel, as matrices on these.

    Parameters
    ----------
    name, of
        What messages call the argument, and what it belongs to.
    elements
        Matrices on two sets of functions, shape (functions x other functions, count).
    sides
        How many functions rows and columns belong to, in all channels, and how many channels.
    rank
        How many functions of each channel to take, at least 1.

    Raises
    ------
    ValueError
        If an element lives on some of these functions and on others too.
    """
    one = [functions // channels for functions, channels in sides]
    left = [min(rank, functions) for functions in one]
    # How many functions it takes to see the first entry of each element, and all of them.
    taken = np.maximum(*(number % size for number, size in zip(np.divmod(elements.indices, sides[1][0]), one))) + 1
    least, most = (end.reduceat(taken, elements.indptr[:-1]) if taken.size else taken for end in (np.minimum, np.maximum))

    def cut(size: int) -> bool:
        return bool(((least <= size) & (size < most)).any())

    if cut(rank):
        below = next((str(size) for size in range(rank - 1, 0, -1) if not cut(size)), None)
        above = next(str(size) for size in range(rank + 1, max(one) + 1) if not cut(size))
        whole = above if below is None else f"{below} or {above}"
        raise ValueError(f"{name}: expected a number of functions that cuts no eigenspace of {of}, got {rank}; take {whole}")
    inside = most <= rank
    entries = elements[:, np.flatnonzero(inside)].tocoo()
    i, j = (
        number // size * fewer + number % size
        for number, size, fewer in zip(np.divmod(entries.coords[0], sides[1][0]), one, left)
    )
    rows, columns = (fewer * channels for fewer, (_, channels) in zip(left, sides))
    return scipy.sparse.csc_array(
        (entries.data, (i * columns + j, entries.coords[1])), shape=(rows * columns, int(inside.sum()))
    )


class Within(Replicated, SpaceBasis):
    """Coefficients theta, shape (count,), of those in a subspace of another space: `sum_k theta_k E_k`, R = 1.

    Parameters
    ----------
    space
        The whole space, whose coefficients all ranks share.
    elements
        The E_k, each as one column, shape (coefficients of `space`, count), orthonormal in the inner product of `space`.

    Attributes
    ----------
    space_of_whole : SpaceBasis
        The whole space.
    """

    def __init__(self, space: SpaceBasis, elements: scipy.sparse.csc_array | np.ndarray):
        super().__init__(space.Y, (elements.shape[1],))
        self.space_of_whole, self._elements = space, scipy.sparse.csr_array(elements)
        self._transposed = scipy.sparse.csr_array(self._elements.T)

    @property
    def amplitude(self):
        return self.space_of_whole.amplitude

    @property
    def unit(self):
        return self.space_of_whole.unit

    @property
    def elements(self) -> scipy.sparse.csr_array:
        """The E_k, shape (coefficients of the whole space, count)."""
        return self._elements

    def whole(self, coefficients):
        return (self._elements @ coefficients).reshape(self.space_of_whole.shape)

    def of_whole(self, functional):
        return self._transposed @ np.ravel(functional)

    def expand(self, coefficients):
        return self.space_of_whole.expand(self.whole(coefficients))

    def pull_back(self, functional):
        return self.of_whole(self.space_of_whole.pull_back(functional))

    def functional(self, coefficients):
        return coefficients.copy()

    def riesz(self, functional):
        return functional.copy()

    def coordinates(self, coefficients):
        return coefficients / np.sqrt(self.unit)

    def from_coordinates(self, coordinates):
        return coordinates * np.sqrt(self.unit)

    def stiffness(self, coefficients):
        return self.of_whole(self.space_of_whole.stiffness(self.whole(coefficients)))
