"""Coefficients in a subspace of a space basis, such as those of a head that keeps symmetries."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from fem_resnet.parameters.space_basis import Replicated, SpaceBasis

__all__ = ["Within"]


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
