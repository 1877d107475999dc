"""What TS steps of a layer: g alone, or g together with f.

A layer sees f only through g = Psi^T M f. So a method whose weights are known steps g and one number q a sample,

    CoefficientState    (g, q),  q_t = <lambda, s>        samples x (rank + 1) numbers, the same on every rank.

Here lambda is the functional in f at the end of the segment. In the forward solve q_t is 0. In the adjoint solve the
functional in q is the constant 1 and brings lambda to every stage. Where the weights are unknown, or where steps are judged by
the error of f, TS steps f too,

    CarriedState        (g, f)                            g on rank 0, then f at the nodes of each rank,

or (g, f, c) with a running cost, where c is one number a sample that stands beside g. This state lives on the communicator of
the label domain: norms must see all of f, or ranks would take different steps. With a tangent (two orders), g stands for
(g, g_1) and f for (f, f_1). In vectors all numbers g of one sample follow each other, so that a Jacobian has one dense matrix
a sample. The *rest* of a state is what goes with g.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from petsc4py import PETSc

from fem_resnet.layers.stage import Stage, StageFunctional

__all__ = ["CarriedState", "CoefficientState", "LayerState"]


class LayerState(ABC):
    """How vectors of TS hold g and the rest.

    Parameters
    ----------
    stage
        Stage evaluations.
    rank
        Rank of psi on this layer.
    orders
        1, or 2 with a tangent.
    """

    #: Communicator of the vectors.
    comm: PETSc.Comm
    #: Length of a vector on this rank.
    size: int

    def __init__(self, stage: Stage, rank: int, orders: int):
        self.stage = stage
        self.rank = rank
        self.orders = orders

    @abstractmethod
    def vector(self) -> PETSc.Vec:
        """A new vector."""

    @abstractmethod
    def read(self, vec: PETSc.Vec) -> tuple[list[np.ndarray], np.ndarray]:
        """g, copies of shape (rank, samples), one an order, on every rank, and the rest. Collective."""

    @abstractmethod
    def write(self, vec: PETSc.Vec, g: Sequence[np.ndarray], rest: ArrayLike) -> None:
        """Write g, shape (rank, samples), one an order, and the rest into a vector."""

    @abstractmethod
    def new_rest(self) -> list[np.ndarray] | None:
        """Arrays for the s_k of a stage, with a row for each node and one for c; None for a state without f."""

    @abstractmethod
    def rates(self, s: list[np.ndarray] | None) -> ArrayLike:
        """The rates of the rest, from the arrays of `new_rest` when they hold the s_k."""

    @abstractmethod
    def start(self, f: Sequence[np.ndarray] | None) -> ArrayLike:
        """The rest at the start of the layer, for f there."""

    @abstractmethod
    def end(self, vec: PETSc.Vec) -> list[np.ndarray] | None:
        """f, and its tangent, with a row for c, shape (nodes, samples); None for a state without f."""

    @abstractmethod
    def adjoint_start(self, by_f: Sequence[np.ndarray]) -> ArrayLike:
        """The rest of the adjoint at the end of the layer, for the functionals lambda in f; an empty sequence stands for 0."""

    @abstractmethod
    def stage_functional(self, vec: PETSc.Vec, by_f: Sequence[np.ndarray] | None) -> StageFunctional:
        """The functional in a stage that an adjoint vector stands for; `by_f` is None in a forward solve."""

    def split(self, rest: ArrayLike) -> tuple[np.ndarray, np.ndarray] | None:
        """The parts f and c of the rest, shapes (orders, nodes, samples) and (orders, samples); None without a c."""
        return None


class CoefficientState(LayerState):
    """The state (g, q), the same on every rank. Parameters as for `LayerState`."""

    comm = PETSc.COMM_SELF

    def __init__(self, stage: Stage, rank: int, orders: int):
        super().__init__(stage, rank, orders)
        #: How many numbers a sample has.
        self.width = orders * rank + 1
        self.size = stage.samples * self.width

    def vector(self):
        vec = PETSc.Vec().create(self.comm)
        vec.setSizes(self.size)
        vec.setUp()
        return vec

    def read(self, vec):
        values = vec.array_r.reshape(self.stage.samples, self.width)
        return [values[:, k * self.rank : (k + 1) * self.rank].T.copy() for k in range(self.orders)], values[:, -1].copy()

    def write(self, vec, g, rest):
        values = vec.array_w.reshape(self.stage.samples, self.width)
        for k, part in enumerate(g):
            values[:, k * self.rank : (k + 1) * self.rank] = part.T
        values[:, -1] = rest

    def new_rest(self):
        return None

    def rates(self, s):
        return 0.0

    def start(self, f):
        return 0.0

    def end(self, vec):
        return None

    def adjoint_start(self, by_f):
        return 1.0 if by_f else 0.0

    def stage_functional(self, vec, by_f):
        x, x_q = self.read(vec)
        if not by_f or not x_q.any():  # in a forward solve q_t is 0
            return StageFunctional(tuple(x), None, ())
        return StageFunctional(tuple(x), x_q, tuple(by_f))


class CarriedState(LayerState):
    """The state (g, f), or (g, f, c), on the communicator of the label domain.

    The rest has the shape (orders, nodes, samples). With a running cost it has one row more, c, the same on every rank.

    Parameters
    ----------
    stage, rank, orders
        As for `LayerState`.
    with_cost
        Whether the state has c.
    """

    def __init__(self, stage: Stage, rank: int, orders: int, with_cost: bool = False):
        super().__init__(stage, rank, orders)
        self.comm = stage.Y.comm
        self._shape = (orders, stage.Y.nodes, stage.samples)
        self._rest_shape = (orders, stage.Y.nodes + with_cost, stage.samples)
        # On rank 0 stand, for each sample and order, g and c.
        self._columns = rank + with_cost
        self._with_cost = with_cost
        self._coefficients = stage.samples * orders * self._columns if self.comm.rank == 0 else 0
        self.size = self._coefficients + int(np.prod(self._shape))

    def vector(self):
        vec = PETSc.Vec().create(self.comm)
        vec.setSizes((self.size, PETSc.DETERMINE))
        vec.setUp()
        return vec

    def read(self, vec):
        g = np.empty((self.stage.samples, self.orders, self._columns))
        values = vec.array_r
        if self.comm.rank == 0:
            g[...] = values[: self._coefficients].reshape(g.shape)
        if self.comm.size > 1:
            self.comm.Bcast(g)
        rest = np.empty(self._rest_shape)
        rest[:, : self.stage.Y.nodes] = self._f(values)
        if self._with_cost:
            rest[:, -1] = g[:, :, -1].T
        return [g[:, k, : self.rank].T.copy() for k in range(self.orders)], rest

    def write(self, vec, g, rest):
        values = vec.array_w
        rest = np.broadcast_to(rest, self._rest_shape)
        if self.comm.rank == 0:
            coefficients = values[: self._coefficients].reshape(self.stage.samples, self.orders, self._columns)
            for k, part in enumerate(g):
                coefficients[:, k, : self.rank] = part.T
                if self._with_cost:
                    coefficients[:, k, -1] = rest[k, -1]
        self._f(values)[...] = rest[:, : self.stage.Y.nodes]

    def _f(self, values: np.ndarray) -> np.ndarray:
        return values[self._coefficients :].reshape(self._shape)

    def new_rest(self):
        return list(np.empty(self._rest_shape))

    def rates(self, s):
        return s

    def start(self, f):
        return f

    def end(self, vec):
        return list(self.read(vec)[1])

    def adjoint_start(self, by_f):
        return by_f

    def split(self, rest):
        if not self._with_cost:
            return None
        rest = np.asarray(rest)
        return rest[:, :-1], rest[:, -1]

    def stage_functional(self, vec, by_f):
        x, rest = self.read(vec)
        parts = self.split(rest)
        f, c = (rest, None) if parts is None else parts
        return StageFunctional(tuple(x), np.ones(self.stage.samples), tuple(f), c)

    def tolerances(self, rtol: float, atol: float, pointwise: bool) -> tuple[PETSc.Vec, PETSc.Vec]:
        """Vectors of tolerances with which TS judges a step by the error of f alone. Collective.

        TS takes the root mean square over all entries of error / (atol + rtol |f|). With these vectors it is the root mean
        square over Y, in the label measure, and over the samples.

        Parameters
        ----------
        rtol, atol
            The tolerances.
        pointwise
            Whether TS takes the maximum norm. The tolerances at the nodes are then the plain ones.

        Returns
        -------
        tuple of petsc4py.PETSc.Vec
            The relative and the absolute tolerances.
        """
        Y, total = self.stage.Y, self.vector().getSize()
        scale = np.ones(Y.nodes) if pointwise else np.sqrt(Y.measure * self.stage.samples / (total * Y.weights))
        relative, absolute = self.vector(), self.vector()
        for tolerance, vec in ((rtol, relative), (atol, absolute)):
            vec.set(1e150)  # the error of g is not judged; the square of this number is still finite
            self._f(vec.array_w)[...] = tolerance * scale[:, None]
        return relative, absolute
