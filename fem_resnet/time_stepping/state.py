"""What TS steps of a layer: its coefficients alone, or with f.

A layer sees f only through g = Psi^T M f, so that a method with known weights steps g and one scalar a sample,

    CoefficientState    (g, q),  q_t = <lambda, s>        samples x (rank + 1) numbers, the same on every rank,

lambda the adjoint value of f at the segment's end: in the forward solve q_t is 0, in the adjoint its adjoint is the
constant 1 and brings lambda to every stage. Where the weights are unknown, or the steps are judged by the error of f,

    CarriedState        (g, f)                            g on rank 0, then f at each rank's nodes,

or, with a running cost, (g, f, c), c one number a sample beside g, on the communicator of the label domain: norms must see all of f, or ranks take different steps. With a tangent (two
orders) g is (g, g_1) and f is (f, f_1). Vectors are sample-major in g, so that Jacobians have one dense block a sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from petsc4py import PETSc

from fem_resnet.layers.stage import Cotangent, Stage

__all__ = ["CarriedState", "CoefficientState", "LayerState"]


class LayerState(ABC):
    """How vectors of TS hold coefficients, and what goes with them ("the rest").

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
    def read(self, vec: PETSc.Vec) -> tuple[list[np.ndarray], object]:
        """Coefficients, a copy of shape (rank, samples) an order on every rank, and the rest. Collective."""

    @abstractmethod
    def write(self, vec: PETSc.Vec, g: Sequence[np.ndarray], rest: object) -> None:
        """Make a vector hold coefficients and the rest."""

    @abstractmethod
    def new_rest(self) -> list[np.ndarray] | None:
        """Arrays of a row a node, and of one for c, that take the s_k of a stage, where the state has f."""

    @abstractmethod
    def rates(self, s: list[np.ndarray] | None) -> object:
        """The rest of the right-hand side, for what `new_rest` took."""

    @abstractmethod
    def start(self, f: Sequence[np.ndarray] | None) -> object:
        """The rest at the start of the layer."""

    @abstractmethod
    def end(self, vec: PETSc.Vec) -> list[np.ndarray] | None:
        """f, and its tangent, where the state has them."""

    @abstractmethod
    def adjoint_start(self, adjoint: Sequence[np.ndarray]) -> object:
        """The rest of the adjoint at the end of the layer, lambda the adjoint value of f; none where it is 0."""

    @abstractmethod
    def cotangent(self, vec: PETSc.Vec, adjoint: Sequence[np.ndarray] | None) -> Cotangent:
        """The functionals of a stage that an adjoint vector stands for; `adjoint` is None in a forward solve."""

    def split(self, rest: object) -> tuple[np.ndarray, np.ndarray] | None:
        """Of the rest, f and c, shapes (orders, nodes, samples) and (orders, samples); None without a running cost."""
        return None


class CoefficientState(LayerState):
    """(g, q), the same on every rank; see above."""

    comm = PETSc.COMM_SELF

    def __init__(self, stage: Stage, rank: int, orders: int):
        super().__init__(stage, rank, orders)
        #: Numbers a sample.
        self.block = orders * rank + 1
        self.size = stage.samples * self.block

    def vector(self):
        vec = PETSc.Vec().create(self.comm)
        vec.setSizes(self.size)
        vec.setUp()
        return vec

    def read(self, vec):
        values = vec.array_r.reshape(self.stage.samples, self.block)
        return [values[:, k * self.rank : (k + 1) * self.rank].T.copy() for k in range(self.orders)], values[:, -1].copy()

    def write(self, vec, g, rest):
        values = vec.array_w.reshape(self.stage.samples, self.block)
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

    def adjoint_start(self, adjoint):
        return 1.0 if adjoint else 0.0

    def cotangent(self, vec, adjoint):
        x, x_q = self.read(vec)
        if not adjoint or not x_q.any():  # forward, q_t is 0
            return Cotangent(tuple(x), None, ())
        return Cotangent(tuple(x), x_q, tuple(adjoint))


class CarriedState(LayerState):
    """(g, f), or (g, f, c), on the communicator of the label domain; see above.

    The rest has the shape (orders, nodes, samples); with a running cost it has one row more, c, the same on every rank.
    """

    def __init__(self, stage: Stage, rank: int, orders: int, with_cost: bool = False):
        super().__init__(stage, rank, orders)
        self.comm = stage.Y.comm
        self._shape = (orders, stage.Y.nodes, stage.samples)
        self._rest_shape = (orders, stage.Y.nodes + with_cost, stage.samples)
        # Of each sample and order: what stands on rank 0, g and c.
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

    def adjoint_start(self, adjoint):
        return adjoint

    def split(self, rest):
        if not self._with_cost:
            return None
        rest = np.asarray(rest)
        return rest[:, :-1], rest[:, -1]

    def cotangent(self, vec, adjoint):
        x, rest = self.read(vec)
        parts = self.split(rest)
        f, c = (rest, None) if parts is None else parts
        return Cotangent(tuple(x), np.ones(self.stage.samples), tuple(f), c)

    def tolerances(self, rtol: float, atol: float, pointwise: bool) -> tuple[PETSc.Vec, PETSc.Vec]:
        """Vectors of tolerances by which TS judges a step by the error of f alone.

        TS takes the root mean square over all entries of error / (atol + rtol |f|). With these it is that over Y and
        the samples in the label measure; or, `pointwise`, for TS's maximum norm, the plain tolerances at the nodes.
        """
        Y, total = self.stage.Y, self.vector().getSize()
        scale = np.ones(Y.nodes) if pointwise else np.sqrt(Y.measure * self.stage.samples / (total * Y.weights))
        result = []
        for tolerance in (rtol, atol):
            vec = self.vector()
            vec.set(1e150)  # of g, whose error is not judged; its square is still finite
            self._f(vec.array_w)[...] = tolerance * scale[:, None]
            result.append(vec)
        return tuple(result)
