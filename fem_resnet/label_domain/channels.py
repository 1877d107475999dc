"""The label domain Y x {1 .. C}: C channels on one Y, with the product of the measures.

    int_{Y x {1..C}} f = sum_c int_Y f_c dy,        |Y x {1..C}| = C |Y|,

"the label set Y and its dimension can be chosen freely" (section 2). It is C copies of Y, so all that lives on a label domain
lives on this one. A Function has C components. Arrays of values at the nodes hold one channel after the other: row
c * nodes + n is node n of channel c.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import firedrake as fd
import numpy as np
import scipy.sparse
from petsc4py import PETSc

from fem_resnet.arguments import instance, integer
from fem_resnet.fixed import read_only
from fem_resnet.label_domain.coefficient_spaces import CoefficientSpaces
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.ranks import same

__all__ = ["Channels"]


class Channels(LabelSpace):
    """C copies of a label domain: Y x {1 .. C}.

    Collective over the communicator of the mesh.

    Parameters
    ----------
    Y
        The label domain of one channel.
    channels
        C, at least 1.

    Attributes
    ----------
    channels : int
        C.
    V : VectorFunctionSpace
        One function on Y x {1 .. C}: a Function with C components.
    weights : numpy.ndarray
        Those of Y in each channel, shape (C * nodes of Y,).

    Raises
    ------
    TypeError, ValueError
        If `Y` is no LabelSpace, or one with channels; or `channels` is no integer >= 1, or differs between ranks.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> Y = Channels(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 3)
    >>> laplace_basis(Y, 6).rank  # six functions in each channel
    18
    """

    def __init__(self, Y: LabelSpace, channels: int):
        check_label_space(Y)
        same(Y.comm, channels=channels)
        if Y.one is not Y:
            raise ValueError(f"Y: expected the label domain of one channel, got {Y!r}; give its `one`")
        C = self.channels = integer("channels", channels)
        self._one = Y
        self.comm = Y.comm
        self.V = fd.VectorFunctionSpace(Y.V.mesh(), Y.V.ufl_element(), dim=C)
        self._batch_spaces, self.coefficients = {}, CoefficientSpaces(Y.comm)
        self.numbers = None if Y.numbers is None else np.concatenate([Y.numbers + c * Y.size for c in range(C)])
        self.graph = None if Y.graph is None else scipy.sparse.block_diag([Y.graph] * C, format="csr")
        self.weights = read_only(np.tile(Y.weights, C))
        self.measure = C * Y.measure

    def __repr__(self) -> str:
        return f"Channels({self.one!r}, {self.channels})"

    @property
    def one(self) -> LabelSpace:
        """Y, the label domain of one channel."""
        return self._one

    @property
    def coordinates(self) -> np.ndarray:
        """Coordinates of the owned nodes, those of Y in each channel, shape (nodes, geometric dimension)."""
        return np.tile(self.one.coordinates, (self.channels, 1))

    @property
    def stiffness(self) -> PETSc.Mat:
        """There is none: one channel has that of `one`, and `apply_stiffness` applies it to each.

        Raises
        ------
        AttributeError
            Always.
        """
        raise AttributeError("stiffness: each channel has that of `one`; apply_stiffness applies it to all")

    def apply_stiffness(self, values: np.ndarray) -> np.ndarray:
        return np.vstack([self.one.apply_stiffness(part) for part in np.split(values, self.channels)])

    def from_data(self, data: np.ndarray) -> np.ndarray:
        parts = data.reshape(len(data), self.channels, prod(data.shape[2:]))
        return parts.transpose(1, 0, 2).reshape(self.channels * len(data), parts.shape[2])

    def to_data(self, values: np.ndarray) -> np.ndarray:
        return np.moveaxis(values.reshape(self.channels, len(values) // self.channels, *values.shape[1:]), 0, 1)

    def _space_of(self, samples: int) -> fd.functionspaceimpl.WithGeometry:
        if samples not in self._batch_spaces:
            one = self.one.V
            self._batch_spaces[samples] = fd.TensorFunctionSpace(one.mesh(), one.ufl_element(), shape=(self.channels, samples))
        return self._batch_spaces[samples]

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) in (1, 2) and shape[0] == self.channels

    def _holds(self, space: fd.functionspaceimpl.WithGeometry) -> bool:
        return self._fits(space.value_shape) and space.ufl_element().sub_elements[0] == self.one.V.ufl_element()

    def join(self, fields: Sequence[fd.Function | None]) -> fd.Function:
        """A batch from one batch a channel. Collective.

        Parameters
        ----------
        fields
            C batches on Y of as many samples; None stands for 0. So ``Y.join([u, None, None])`` puts data into one channel.

        Returns
        -------
        Function
            A new batch, of which no tape knows.

        Raises
        ------
        TypeError, ValueError
            If there is not one a channel, one is no batch on Y, all are None, or they have different numbers of samples.
        """
        fields = instance("fields", fields, (list, tuple), "one batch a channel, or None")
        same(self.comm, fields=[field is None for field in fields])
        if len(fields) != self.channels or all(field is None for field in fields):
            raise ValueError(
                f"fields: expected {self.channels}, one a channel, and at least one that is not None, got {fields!r}"
            )
        values = {c: self.one.values(self.one.batch(field, "fields")) for c, field in enumerate(fields) if field is not None}
        samples = {part.shape[1] for part in values.values()}
        if len(samples) > 1:
            raise ValueError(f"fields: expected as many samples in each channel, got {sorted(samples)}")
        nothing = np.zeros((self.one.nodes, samples.pop()))
        return self.batch(np.vstack([values.get(c, nothing) for c in range(self.channels)]), "fields")

    def part(self, function: fd.Function) -> list[fd.Function]:
        """The channels of a Function or batch, each a new batch on Y. Collective."""
        self.check_batch(function, "function")
        return [self.one.batch(np.ascontiguousarray(part)) for part in np.split(self.values(function), self.channels)]
