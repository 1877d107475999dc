"""Finite bases of functions on the label domain.

A basis is a list of functions p_1 .. p_rank on Y, held by their values P at the nodes (nodes x rank), with the Gram
matrix G = P^T M P of the label measure. The kernel factors phi and psi are bases, and a bias may be given in one.

Functions that do not depend on the mesh, such as Laplace eigenfunctions, can be moved to another mesh of the same Y by
`Basis.on`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property

import firedrake as fd
import numpy as np
import ufl
from mpi4py import MPI
from numpy.typing import DTypeLike
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import function, instance, integer, number, real_array, text
from fem_resnet.fixed import OnMesh, read_only
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.eigensolver import eigenspace_ends
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.log import log
from fem_resnet.ranks import same, together

__all__ = ["Basis", "cell_indicators", "given_basis", "in_order", "node_numbers", "spread_columns"]


class Basis(OnMesh):
    """Functions on a label domain, by their values at the nodes.

    Collective over the communicator of `Y`.

    Parameters
    ----------
    Y
        The label domain.
    values
        P, shape (nodes, rank), float64: the values at the owned nodes.
    kind
        What the basis is, for messages and files: "laplace", "given" or "cells".
    eigenvalues
        Of eigenfunctions, shape (rank,). A function may be a mixture of several eigenfunctions, where a
        mesh splits a repeated eigenvalue; the gradients are then those of `stiffness`.
    move
        ``move(basis, Y2)`` gives the same functions on another label space of the same Y; None where there is no way.
    stiffness
        Gram matrix of the gradients, shape (rank, rank), where it is known; `P^T K P` if left out.

    Attributes
    ----------
    rank : int
        Number of functions.
    gram : numpy.ndarray
        G = P^T M P, shape (rank, rank), the same on every rank of the communicator.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If the functions are linearly dependent at the nodes, or their values are not finite or have another shape; if another
        argument has another shape, or differs between ranks; on all ranks alike.
    """

    def __init__(
        self,
        Y: LabelSpace,
        values: np.ndarray,
        kind: str,
        eigenvalues: np.ndarray | None = None,
        move: Callable[[Basis, LabelSpace], Basis] | None = None,
        stiffness: np.ndarray | None = None,
    ):
        check_label_space(Y)
        same(Y.comm, kind=kind, eigenvalues=eigenvalues, move=move, stiffness=stiffness)
        text("kind", kind)
        if move is not None:
            function("move", move, "a function of a basis and a label space, or None,")
        values = real_array("values", values, comm=Y.comm, finite=False)
        given = Y.comm.allgather((Y.nodes, values.shape))
        for nodes, shape in given:
            if len(shape) != 2 or shape[0] != nodes or shape[1] < 1:
                raise ValueError(f"values: expected shape (nodes, rank) = ({nodes}, at least 1), got {shape}")
        ranks = [shape[1] for _, shape in given]
        if len(set(ranks)) > 1:
            raise ValueError(f"values: expected as many functions on all ranks of the communicator, got {ranks}")
        self.Y = Y
        self.kind = kind
        #: One function after the other in memory: loops over nodes read each in one stream.
        self.values = read_only(spread_columns(values))
        self._move = move
        self.rank = rank = self.values.shape[1]
        self._firsts: dict[int, Basis] = {}  # by rank, shared with these; a basis itself is not among them
        self._stiffness = None if stiffness is None else read_only(real_array("stiffness", stiffness, (rank, rank)).copy())
        self.eigenvalues = None if eigenvalues is None else read_only(real_array("eigenvalues", eigenvalues, (rank,)).copy())
        self.gram = read_only(Y.sum(self.values.T @ (self.values * Y.weights[:, None])))
        if not np.isfinite(self.gram).all():
            column = int(np.flatnonzero(~np.isfinite(np.diag(self.gram)))[0])
            raise ValueError(f"values: expected finite numbers, function {column} of the basis has others")
        size = np.sqrt(np.diag(self.gram))
        correlation = np.linalg.eigvalsh(self.gram / np.outer(size, size)) if size.all() else np.zeros(1)
        if correlation[0] < 1e-12:
            raise ValueError(
                f"values: expected linearly independent functions, these {self.rank} are dependent at the {Y.size} nodes "
                f"(smallest eigenvalue of their normalised Gram matrix {correlation[0]:.1e}); drop some"
            )

    @property
    def one(self) -> Basis:
        """The functions of one channel: the basis itself, unless it is a `RepeatedBasis`."""
        return self

    @property
    def description(self) -> tuple[str, int]:
        """Kind and rank: what all ranks must give alike."""
        return self.kind, self.rank

    def __repr__(self) -> str:
        return f"Basis({self.kind}, rank {self.rank}, {self.Y!r})"

    @cached_property
    def root(self) -> np.ndarray:
        """R, upper triangular with R^T R = G, shape (rank, rank): `P R^-1` is orthonormal, |R c| the norm of `P c`."""
        return read_only(np.linalg.cholesky(self.gram)).T

    @cached_property
    def weighted(self) -> np.ndarray:
        """M P, shape (nodes, rank)."""
        return read_only(self.values * self.Y.weights[:, None])

    @cached_property
    def stiffness(self) -> np.ndarray:
        """Gram matrix of the gradients, `P^T K P`, shape (rank, rank), on every rank.

        Eigenfunctions on a discontinuous space have the gradients of the continuous functions of which they were made.

        Raises
        ------
        ValueError
            If the functions are discontinuous, so that they have no gradient, and are no eigenfunctions.
        """
        if self._stiffness is not None:
            return self._stiffness
        return read_only(self.Y.sum(self.values.T @ self.Y.apply_stiffness(self.values)))

    def expand(self, coefficients: np.ndarray) -> np.ndarray:
        """`P c` at the owned nodes, shape (nodes,) or (nodes, samples), for c of shape (rank,) or (rank, samples)."""
        return self.values @ coefficients

    def pull_back(self, functional: np.ndarray) -> np.ndarray:
        """`P^T d` for functionals d at the owned nodes, of the shape of c: the transpose of `expand`. Collective."""
        return self.Y.sum(self.values.T @ functional)

    def project(self, values: np.ndarray) -> np.ndarray:
        """`P^T M f`: inner products with all functions, shape (rank, samples), on every rank. Collective.

        Parameters
        ----------
        values
            f at the owned nodes, shape (nodes, samples).
        """
        return self.pull_back(self.Y.weights[:, None] * values)

    def functional(self, coefficients: np.ndarray) -> np.ndarray:
        """The functional f -> (P c, f): `M P c` at the owned nodes, shape (nodes, samples). The transpose of `project`.

        Parameters
        ----------
        coefficients
            c, shape (rank, samples).
        """
        values = self.expand(coefficients)
        values *= self.Y.weights[:, None]
        return values

    def on(self, Y: LabelSpace) -> Basis:
        """The same functions on another label space of the same Y: finer, coarser, of other cells. Collective.

        One function that is constant goes to any label domain.

        Raises
        ------
        TypeError
            If `Y` is no LabelSpace.
        ValueError
            If the functions are tied to their mesh, as indicators of cells are, or the other mesh does not resolve them.
        """
        check_label_space(Y)
        if Y is self.Y:
            return self
        if self._move is None:
            if (constant := self._constant()) is not None:
                return Basis(Y, np.full((Y.nodes, 1), constant), "given")
            raise ValueError(
                f"on: expected functions that can move, those of {self!r} are tied to their mesh; a Laplace basis is not"
            )
        moved = self._move(self, Y)
        if moved.rank != self.rank:
            raise ValueError(f"move: expected a function that moves the {self.rank} functions of {self!r}, got {moved.rank}")
        return moved

    def _constant(self) -> float | None:
        """The value of the only function, if that is constant on Y; else None. Collective."""
        if self.rank > 1 or self.kind == "cells":
            return None
        mean = float(self.project(np.ones((self.Y.nodes, 1)))[0, 0]) / self.Y.measure
        off = self.Y.comm.allreduce(float(np.abs(self.values - mean).max(initial=0.0)), op=MPI.MAX)
        return mean if off <= 1e-12 * abs(mean) else None

    def first(self, rank: int) -> Basis:
        """The basis of the first functions: the same object each time, and this one if it has no more. Collective.

        A rank that cuts an eigenspace of eigenfunctions is logged as a warning.

        Parameters
        ----------
        rank
            How many, at least 1.

        Raises
        ------
        ValueError
            If that is no positive integer or differs between ranks, or the functions have no order: indicators of cells.

        Examples
        --------
        >>> from firedrake import FunctionSpace, UnitDiskMesh
        >>> from fem_resnet import LabelSpace, laplace_basis
        >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 6)
        >>> phi.first(3).rank, phi.first(5).first(3) is phi.first(3), phi.first(9) is phi
        (3, True, True)
        """
        same(self.Y.comm, rank=rank)
        rank = integer("rank", rank, most=np.inf)
        if rank >= self.rank:
            return self
        if rank not in self._firsts:
            if self.kind == "cells":
                raise ValueError(
                    f"rank: expected {self.rank} or more of {self!r}, whose functions have no order, got {rank}; "
                    f"take a Laplace basis"
                )
            self._warn_of_cut(rank)
            eigenvalues = None if self.eigenvalues is None else self.eigenvalues[:rank]
            stiffness = None if self._stiffness is None else self._stiffness[:rank, :rank]
            first = Basis(self.Y, self.values[:, :rank], self.kind, eigenvalues, self._move, stiffness)
            first._firsts = self._firsts
            self._firsts[rank] = first
        return self._firsts[rank]

    def begins_with(self, other: Basis) -> bool:
        """Whether `first` gives this other basis."""
        return other is self or other.rank < self.rank and self._firsts.get(other.rank) is other

    def _warn_of_cut(self, rank: int) -> None:
        if self.eigenvalues is None:
            return
        ends = eigenspace_ends(self.eigenvalues / (self.eigenvalues.max() or 1.0))
        if rank not in ends:
            log(
                self.Y.comm, logging.WARNING,
                "rank %d cuts through the repeated eigenvalue %.6g: ranks %d and %d keep it whole",
                rank, self.eigenvalues[rank - 1], max([end for end in ends if end < rank], default=0),
                min(end for end in ends if end > rank),
            )  # fmt: skip

    def function(self, coefficients: np.ndarray) -> fd.Function:
        """The function `P c` of `Y.V`, or a batch. Collective.

        Parameters
        ----------
        coefficients
            c, shape (rank,), the same on every rank; or shape (rank, samples) for a batch.

        Raises
        ------
        TypeError, ValueError
            If the coefficients are no real numbers, have another shape, or differ between ranks.
        """
        same(self.Y.comm, coefficients=coefficients)
        coefficients = real_array("coefficients", coefficients)
        if coefficients.ndim not in (1, 2) or len(coefficients) != self.rank:
            raise ValueError(
                f"coefficients: expected shape ({self.rank},) or ({self.rank}, samples), got {coefficients.shape}"
            )
        values = self.expand(coefficients)
        if coefficients.ndim == 2:
            return self.Y.batch(values)
        function = fd.Function(self.Y.V)
        self.Y.write(function, values)
        return function


def given_basis(Y: LabelSpace, functions: Sequence) -> Basis:
    """Basis of functions that the user gives.

    Parameters
    ----------
    Y
        The label domain.
    functions
        Functions of `Y.V`, UFL expressions of the mesh's coordinates, or numbers.

    Raises
    ------
    TypeError
        If `Y` is no LabelSpace, or `functions` no list.
    ValueError
        If the list is empty, an entry is no function or number or lives on another space, or they are linearly dependent.
    """
    check_label_space(Y)
    same(Y.comm, functions=functions)
    instance("functions", functions, (list, tuple), "a list of functions; Basis takes arrays")
    if not functions:
        raise ValueError("functions: expected at least one function, got an empty list")
    for each in functions:
        if isinstance(each, fd.Function):
            if each.function_space() != Y.V:
                raise ValueError(f"functions: expected Functions of {Y.V}, got one of {each.function_space()}")
        elif not isinstance(each, ufl.core.expr.Expr):
            number("functions", each)
    with stop_annotating():
        columns = [_at_nodes(Y, each) for each in functions]
    values = real_array("functions", np.column_stack(columns), comm=Y.comm)
    try:
        return Basis(Y, values, "given")
    except ValueError as error:  # they are dependent
        raise ValueError(str(error).replace("values", "functions", 1)) from error


def _at_nodes(Y: LabelSpace, given: fd.Function | ufl.core.expr.Expr | float) -> np.ndarray:
    """Values at the owned nodes. Collective."""
    if isinstance(given, fd.Function):
        return Y.values(given)[:, 0].copy()

    def interpolate() -> fd.Function:
        try:
            return fd.Function(Y.V).interpolate(fd.as_ufl(given))
        except Exception as error:  # whatever UFL and its compiler say of an expression
            raise ValueError(f"functions: expected expressions that {Y.V} can interpolate, got {given} ({error})") from error

    return Y.values(together(Y.comm, interpolate))[:, 0].copy()


def cell_indicators(Y: LabelSpace) -> Basis:
    """The indicators of the cells: a basis of full rank, in which a kernel is any matrix between neurons.

    Its rank is the number N of cells, so that a kernel has N x N coefficients, and every rank holds them all. `node_numbers`
    says how the cells are numbered.

    Raises
    ------
    TypeError
        If `Y` is no LabelSpace.
    ValueError
        If `Y.V` is not DG of degree 0, or two cells have the same midpoint.
    """
    check_label_space(Y)
    element = Y.V.ufl_element()
    if element.embedded_superdegree != 0:
        raise ValueError(f"Y: expected DG of degree 0, which cell indicators span, got {element}")
    values = np.zeros((Y.nodes, Y.size))
    values[np.arange(Y.nodes), node_numbers(Y)] = 1.0
    return Basis(Y, values, "cells")


def node_numbers(Y: LabelSpace) -> np.ndarray:
    """Numbers from 0 of the owned nodes, shape (nodes,), whatever the partition. Collective.

    The nodes are in the order of their coordinates, the last coordinate slowest; points of `point_space` have their own
    numbers. Nodes of DG of degree 0 are the midpoints of cells. Every rank sees the coordinates of all nodes.

    Raises
    ------
    ValueError
        If two nodes have the same coordinates.
    """
    if Y.numbers is not None:
        return Y.numbers
    if isinstance(Y, Channels):
        numbers, count = node_numbers(Y.one), Y.one.size
        return np.concatenate([numbers + c * count for c in range(Y.channels)])
    first = Y.comm.exscan(Y.nodes) or 0
    return np.argsort(in_order(np.concatenate(Y.comm.allgather(Y.coordinates))))[first : first + Y.nodes]


def in_order(places: np.ndarray) -> np.ndarray:
    """The numbers of places in the order of their coordinates, the last one slowest, shape (places,).

    Parameters
    ----------
    places
        Shape (places, dimension).

    Raises
    ------
    ValueError
        If two places are the same.
    """
    # Round-off in a midpoint depends on how the cell's vertices are numbered; it must not decide an order.
    extent = np.ptp(places, axis=0).max() or 1.0
    keys = np.round((places - places.min(axis=0)) / extent, 9)
    order = np.lexsort(keys.T)
    if (keys[order[1:]] == keys[order[:-1]]).all(axis=1).any():
        raise ValueError(
            "Y: expected nodes (or midpoints of cells) at different places, got two that coincide, so they cannot be numbered "
            "the same on every partition; point_space numbers them itself"
        )
    return order


def spread_columns(values: np.ndarray, dtype: DTypeLike = float) -> np.ndarray:
    """A copy whose columns begin at different places of the caches, shape (nodes, rank), each one stream in memory.

    Compiled loops read some nodes of all columns again and again. Columns that lie a power of two apart, as with 2^n nodes,
    fall on the same few lines of a cache and drive each other out. Here they lie an odd number of 64 entries apart, and begin
    where a cache line does.

    Parameters
    ----------
    values
        Shape (nodes, rank).
    dtype
        The type of the copy.
    """
    nodes, rank = np.shape(values)
    apart = 64 * (-(-nodes // 64) | 1)
    itemsize = np.dtype(dtype).itemsize
    room = np.empty(apart * rank + 64 // itemsize, dtype)
    start = -(room.ctypes.data // itemsize) % (64 // itemsize)
    columns = room[start : start + apart * rank].reshape((apart, rank), order="F")[:nodes]
    columns[...] = values
    return columns
