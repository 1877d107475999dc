"""Values b(y_i, z_j) of a kernel between the nodes of two label domains, and pairs of nodes drawn at random.

Draws and ties are decided by a hash of a node's place and not by its number on a rank. So pairs, and all results that
follow from them, are the same on every partition.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import firedrake as fd
import numpy as np
import ufl
from mpi4py import MPI
from numpy.typing import ArrayLike
from pyadjoint.tape import stop_annotating
from ufl.algorithms import extract_coefficients

from fem_resnet.arguments import function, real_array
from fem_resnet.label_domain.basis import node_numbers
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.ranks import together

__all__ = ["KernelValues", "Nodes", "Sample", "draw_pairs"]

#: The number of values in one call of a callback; its temporaries are d times as large in d dimensions.
_CHUNK = 2**18
#: The number of values of a UFL expression in one interpolation.
_CELLS = 2**14
#: The most rounds of `draw_pairs`.
_ROUNDS = 64


class Nodes:
    """The owned nodes of a label domain with their places.

    Parameters
    ----------
    Y
        The label domain.
    places
        Coordinates of the owned nodes, or their numbers where the kernel is a matrix, shape (nodes, d).
    """

    def __init__(self, Y: LabelSpace, places: np.ndarray):
        self.Y = Y
        self.places = places
        low, minus_high = (
            np.min(Y.comm.allgather((sign * places.astype(float)).min(axis=0, initial=np.inf)), axis=0) for sign in (1, -1)
        )
        # Places are rounded, as in `node_numbers`, so that round-off in coordinates decides nothing.
        extent = (-minus_high - low).max() or 1.0
        self._cells = np.round((places - low) / extent * 1e9).astype(np.uint64)
        #: A number in [0, 1) for each node, determined by its place alone, shape (nodes,).
        self.keys = self.uniform(0)

    def uniform(self, seed: int) -> np.ndarray:
        """A number in [0, 1) for each node, shape (nodes,); independent between nodes and between seeds."""
        state = np.full(len(self._cells), _mixed(np.array([seed], dtype=np.uint64))[0])
        for column in self._cells.T:
            state = _mixed(state ^ column)
        return (state >> np.uint64(11)) * 2.0**-53

    def largest(self, size: np.ndarray) -> tuple[int, int] | None:
        """Rank and index of the node with the largest `size`, of shape (nodes,); None if no size is positive. Collective."""
        comm = self.Y.comm
        greatest = comm.allreduce(size.max(initial=0.0), op=MPI.MAX)
        if not greatest > 0:
            return None
        # Nodes that are equal by symmetry differ by round-off; the key chooses between them.
        ties = np.flatnonzero(size > (1 - 1e-9) * greatest)
        mine = min(((self.keys[index], comm.rank, int(index)) for index in ties), default=None)
        return min(found for found in comm.allgather(mine) if found is not None)[1:]

    def from_owner(self, node: tuple[int, int], *values: np.ndarray) -> list[np.ndarray]:
        """The rows of arrays (nodes, any) at one node, on all ranks. Collective."""
        rank, index = node
        comm = self.Y.comm
        return comm.bcast([array[index].copy() for array in values] if comm.rank == rank else None, root=rank)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, which makes the bits independent."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Sample:
    """Nodes that were drawn, in an order that is the same on all ranks.

    Parameters
    ----------
    nodes
        The nodes.
    local, positions
        The indices of the drawn nodes that this rank owns, and their positions in the sample, shape (n,) each.
    size
        The number of drawn nodes, on all ranks together.
    """

    def __init__(self, nodes: Nodes, local: np.ndarray, positions: np.ndarray, size: int):
        self._nodes = nodes
        self._local, self._positions, self.size = local, positions, size

    def rows(self, values: np.ndarray) -> np.ndarray:
        """The rows of an array (nodes, any) at the drawn nodes, shape (size, any), on all ranks. Collective."""
        rows = np.zeros((self.size, values.shape[1]))
        rows[self._positions] = values[self._local]
        return self._nodes.Y.sum(rows)

    def node(self, position: int) -> tuple[int, int]:
        """Rank and index of the node at a position of the sample. Collective."""
        comm = self._nodes.Y.comm
        mine = [(comm.rank, int(index)) for index in self._local[self._positions == position]]
        return sum(comm.allgather(mine), [])[0]


def draw_pairs(Y: Nodes, Z: Nodes, count: int, seed: int) -> tuple[Sample, Sample]:
    """About `count` pairs (y, z) of nodes, each with the probability w_i w_j / (|Y| |Z|). Collective.

    In each round a node is drawn at most once, with a probability in proportion to its weight. The nodes drawn in Y are
    paired in random order with those drawn in Z.
    """
    drawn: list[tuple[int, list[tuple[np.ndarray, np.ndarray, int]]]] = []
    for round_ in range(_ROUNDS):
        sides = [_draw(nodes, count, 4 * (_ROUNDS * seed + round_) + 2 * side + 1) for side, nodes in enumerate((Y, Z))]
        pairs = min(total for _, _, total in sides)
        drawn.append((pairs, sides))
        if sum(size for size, _ in drawn) >= 0.9 * count:
            break
    total = sum(size for size, _ in drawn)
    samples = []
    for side, nodes in enumerate((Y, Z)):
        local: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        start = 0
        for pairs, sides in drawn:
            indices, ranks, _ = sides[side]
            kept = ranks < pairs
            local.append(indices[kept])
            positions.append(start + ranks[kept])
            start += pairs
        samples.append(Sample(nodes, np.concatenate(local), np.concatenate(positions), total))
    return samples[0], samples[1]


def _draw(nodes: Nodes, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Indices of the owned nodes that are drawn, their positions in a random order of all, and the number of all."""
    Y = nodes.Y
    largest = Y.comm.allreduce(Y.weights.max(initial=0.0), op=MPI.MAX)
    expected = min(count, Y.measure / largest)
    indices = np.flatnonzero(nodes.uniform(seed) < expected * Y.weights / Y.measure)
    mine = nodes.uniform(seed + 1)[indices]
    everywhere = np.sort(np.concatenate(Y.comm.allgather(mine)))
    return indices, np.searchsorted(everywhere, mine), len(everywhere)


class KernelValues:
    """b between the nodes of two label domains on one communicator.

    Parameters
    ----------
    kernel
        A callback, a UFL expression with its two arguments, or a matrix, as for `compress`.
    Y, Z
        The label domains of y and z.

    Attributes
    ----------
    y, z : Nodes
        The nodes of both domains.
    evaluations : int
        How often this rank evaluated b. Pairs count on rank 0 only.
    """

    def __init__(self, kernel: Callable | tuple | ArrayLike, Y: LabelSpace, Z: LabelSpace):
        self.evaluations, self._comm = 0, Y.comm
        self._b: Callable
        if isinstance(kernel, tuple):
            self._b = _of_ufl(*_checked(kernel, Y, Z))
        elif isinstance(kernel, ufl.core.expr.Expr):
            raise TypeError("kernel: expected (expression, y, z) for a UFL expression, with the two points that it depends on")
        elif callable(kernel):
            self._b = function("kernel", kernel, "b(y, z), a UFL expression with its arguments, a matrix or a LowRankKernel")
        else:
            matrix = real_array("kernel", kernel)
            if matrix.shape != (Y.size, Z.size):
                raise ValueError(
                    f"kernel: expected a matrix of shape ({Y.size}, {Z.size}), the values b(y_i, z_j) at the nodes; got shape "
                    f"{matrix.shape}"
                )
            self._b = lambda y, z: matrix[y[..., 0].astype(int), z[..., 0].astype(int)]
            self.y, self.z = (Nodes(X, node_numbers(X)[:, None]) for X in (Y, Z))
            return
        self.y, self.z = (Nodes(X, X.coordinates) for X in (Y, Z))
        # One evaluation on all ranks, also on those without nodes, so that all raise what is wrong with b.
        y, z = (nodes.from_owner(nodes.largest(nodes.Y.weights), nodes.places)[0] for nodes in (self.y, self.z))
        together(self._comm, lambda: self._evaluated(np.tile(y, (2, 1, 1)), np.tile(z, (1, 3, 1))))

    def between(self, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """The values of b for all places y of shape (m, d) and z of shape (n, d), shape (m, n). Collective."""
        values = together(self._comm, lambda: self._between(y, z))
        self.evaluations += values.size
        return self._finite(values)

    def _between(self, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        values = np.empty((len(y), len(z)))
        rows = max(1, _CHUNK // max(len(z), 1))
        columns = _CHUNK
        for i in range(0, len(y), rows):
            for j in range(0, len(z), columns):
                here = y[i : i + rows, None], z[None, j : j + columns]
                values[i : i + rows, j : j + columns] = self._evaluated(*here)
        return values

    def pairs(self, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """The values of b at pairs of places, y and z of shape (m, d), shape (m,); the same on all ranks. Collective."""
        self.evaluations += len(y) if self.y.Y.comm.rank == 0 else 0
        return self._finite(together(self._comm, lambda: self._evaluated(y, z) if len(y) else np.empty(0)))

    def _evaluated(self, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        shape = np.broadcast_shapes(y.shape, z.shape)[:-1]
        values = real_array("kernel", self._b(y, z), finite=False)
        # A kernel that does not depend on y has values of length 1 there.
        if values.ndim > len(shape) or any(n not in (1, m) for n, m in zip(values.shape[::-1], shape[::-1])):
            raise ValueError(
                f"kernel: expected values of shape {shape} for y of shape {y.shape} and z of shape {z.shape}, such as a sum "
                f"over the last axis; got shape {values.shape}"
            )
        return np.broadcast_to(values, shape)

    def _finite(self, values: np.ndarray) -> np.ndarray:
        self.y.Y.agree(bool(np.isfinite(values).all()), "kernel: expected finite values, but some are not finite")
        return values


def _checked(kernel: tuple, Y: LabelSpace, Z: LabelSpace) -> tuple:
    if len(kernel) != 3:
        raise ValueError(f"kernel: expected (expression, y, z) for a UFL expression, got {len(kernel)} entries")
    expression = fd.as_ufl(kernel[0])
    if expression.ufl_shape != ():
        raise ValueError(f"kernel: expected a scalar expression, got one of shape {expression.ufl_shape}")
    for name, argument, X in zip("yz", kernel[1:], (Y, Z)):
        wanted = (X.V.mesh().geometric_dimension,)
        if getattr(argument, "ufl_shape", None) != wanted:
            raise ValueError(
                f"kernel: expected a SpatialCoordinate or a Constant of shape {wanted} as the argument {name} of the UFL "
                f"expression, got {argument!r}"
            )
    if kernel[1] == kernel[2]:
        raise ValueError("kernel: expected two symbols y and z, got the same one twice; make z a Constant of the same shape")
    meshes = {domain for argument in kernel[1:] for domain in ufl.domain.extract_domains(argument)}
    if extract_coefficients(expression) or set(ufl.domain.extract_domains(expression)) - meshes:
        raise ValueError(
            "kernel: expected a UFL expression of y and z alone, got one with a Function or coordinates of a mesh"
        )
    return expression, *kernel[1:]


@cache
def _cells() -> fd.MeshGeometry:
    with stop_annotating():
        return fd.IntervalMesh(_CELLS, 1.0, comm=MPI.COMM_SELF)


def _of_ufl(expression: ufl.core.expr.Expr, y: ufl.core.expr.Expr, z: ufl.core.expr.Expr) -> Callable:
    """A callback from a UFL expression. Its arguments become Functions, which hold a pair of places in each cell of a mesh."""
    cells = _cells()
    places = [fd.Function(fd.VectorFunctionSpace(cells, "DG", 0, dim=X.ufl_shape[0])) for X in (y, z)]
    value = fd.Function(fd.FunctionSpace(cells, "DG", 0))
    replaced = ufl.replace(expression, dict(zip((y, z), places)))

    def b(y: np.ndarray, z: np.ndarray) -> np.ndarray:
        shape = np.broadcast_shapes(y.shape[:-1], z.shape[:-1])
        flat = [np.broadcast_to(x, (*shape, x.shape[-1])).reshape(-1, x.shape[-1]) for x in (y, z)]
        values = np.empty(len(flat[0]))
        with stop_annotating():
            for start in range(0, len(values), _CELLS):
                part = slice(start, min(start + _CELLS, len(values)))
                for function, x in zip(places, flat):
                    data = function.dat.data_wo.reshape(_CELLS, -1)
                    data[: part.stop - start] = x[part]
                values[part] = value.interpolate(replaced).dat.data_ro[: part.stop - start]
        return values.reshape(shape)

    return b
