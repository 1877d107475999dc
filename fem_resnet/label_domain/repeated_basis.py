"""The functions of a basis in each channel of Y x {1 .. C}.

P is block diagonal, with one block a channel. So a product with P is one product with the smaller matrix of one channel for
each channel, and coefficients, like node values, hold one channel after the other.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from fem_resnet.arguments import instance
from fem_resnet.fixed import read_only
from fem_resnet.label_domain.basis import Basis, spread_columns
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["RepeatedBasis"]


class RepeatedBasis(Basis):
    """The functions of a basis in each channel: function c * rank + i is function i in channel c, and 0 in the others.

    Parameters
    ----------
    Y
        The label domain with channels.
    one
        The basis of one channel, on `Y.one`.

    Raises
    ------
    TypeError, ValueError
        If `Y` has no channels, or `one` is no basis on its `one`.

    Examples
    --------
    Means over Y of each channel, as a head that does not see where things are reads them:

    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Channels, Head, LabelSpace, given_basis
    >>> Y = Channels(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 3)
    >>> Head(RepeatedBasis(Y, given_basis(Y.one, [1.0])), 10).W.get(0).shape
    (10, 3)
    """

    def __init__(self, Y: Channels, one: Basis):
        instance("Y", Y, Channels, "Channels(Y, C) makes one")
        if instance("one", one, Basis, "laplace_basis(Y.one, rank) makes one").Y is not Y.one:
            raise ValueError(f"one: expected a basis on {Y.one!r}, got one on {one.Y!r}")
        self.Y = Y
        self._channels, self._one = Y, one
        self.kind = one.kind
        self.rank = Y.channels * one.rank
        self.eigenvalues = None if one.eigenvalues is None else read_only(np.tile(one.eigenvalues, Y.channels))
        self.gram = read_only(self._in_all(one.gram))
        self._of_rank: dict[int, Basis] = {one.rank: self}

    @property
    def one(self) -> Basis:
        return self._one

    def _in_all(self, block: np.ndarray) -> np.ndarray:
        """The matrix that has this block for each channel, and 0 elsewhere."""
        return np.kron(np.eye(self.Y.channels), block)

    @cached_property
    def values(self) -> np.ndarray:  # type: ignore[override]  # made where it is asked for, as few places need it
        """P, shape (nodes, rank), mostly zeros."""
        return read_only(spread_columns(self._in_all(self.one.values)))

    @cached_property
    def stiffness(self) -> np.ndarray:
        return read_only(self._in_all(self.one.stiffness))

    def expand(self, coefficients: np.ndarray) -> np.ndarray:
        parts = np.split(coefficients, self.Y.channels)
        return np.concatenate([self.one.values @ part for part in parts])

    def pull_back(self, functional: np.ndarray) -> np.ndarray:
        parts = np.split(functional, self.Y.channels)
        return self.Y.sum(np.concatenate([self.one.values.T @ part for part in parts]))

    def first(self, rank: int) -> Basis:
        """The first functions in each channel: see `Basis.first`.

        Parameters
        ----------
        rank
            How many in each channel, at least 1.
        """
        one = self.one.first(rank)
        if one.rank not in self._of_rank:
            first = self._of_rank[one.rank] = RepeatedBasis(self._channels, one)
            first._of_rank = self._of_rank
        return self._of_rank[one.rank]

    def begins_with(self, other: Basis) -> bool:
        return other.one.rank <= self.one.rank and self._of_rank.get(other.one.rank) is other

    def on(self, Y: LabelSpace) -> RepeatedBasis:
        if Y is self.Y:
            return self
        if not isinstance(Y, Channels) or Y.channels != self.Y.channels:
            raise ValueError(f"on: expected a label space with {self.Y.channels} channels, got {Y!r}")
        return RepeatedBasis(Y, self.one.on(Y.one))
