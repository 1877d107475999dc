r"""Running costs of a kernel at all pairs of nodes, for those that no norm of b tells.

    P(b) = int_Y int_Y p(y, z, b(y, z)) dz dy,            by the label measure: sum_ij w_i w_j p(y_i, y_j, b(y_i, y_j))

With b(y, z) = sum_kl phi_k(y) beta_kl psi_l(z), the functional of P in beta is Phi^T M p' M Psi, where p' is the matrix of the
p_b(y_i, y_j, b(y_i, y_j)). Its derivative along beta_1 has p'' b_1 in the place of p'.

Each rank takes its own nodes y, and all nodes z, in pieces: so the work is nodes^2 x rank, shared by the ranks, once for each
beta. Costs of more than `LARGEST` nodes are refused. `RunningCost(kernel=..)` has the Hilbert-Schmidt norm of b, which takes
rank^2 numbers at any number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import sympy

from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.ranks import together

__all__ = ["LARGEST", "PairCost", "PairDensity", "PairRate"]

#: The most nodes for which b is looked at in all pairs.
LARGEST = 4096
#: How many pairs are looked at in one piece.
_PAIRS = 2**18
#: How many of the latest kernels are remembered: the layers of a network, and the two orders of each.
_KEPT = 64


class PairDensity(Protocol):
    """The density p(y, z, b) of a running cost of the kernel, and its derivatives in b.

    Each method gets b at pairs of nodes, shape (nodes, all nodes), and the coordinates of y and of z, shapes (nodes, 1,
    dimensions) and (1, all nodes, dimensions), all float64. It returns an array of the shape of b, or one that NumPy
    broadcasts to that shape.
    """

    def value(self, b: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """The density p itself.

        Parameters
        ----------
        b
            The kernel, shape (nodes, all nodes).
        y, z
            Coordinates, shapes (nodes, 1, dimensions) and (1, all nodes, dimensions).

        Returns
        -------
        numpy.ndarray
            p, of the shape of b.
        """

    def gradient(self, b: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """The derivative p_b.

        Parameters
        ----------
        b
            The kernel, shape (nodes, all nodes).
        y, z
            Coordinates, shapes (nodes, 1, dimensions) and (1, all nodes, dimensions).

        Returns
        -------
        numpy.ndarray
            p_b, of the shape of b.
        """

    def hessian(self, b: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """The second derivative p_bb. A density without this method has first derivatives alone.

        Parameters
        ----------
        b
            The kernel, shape (nodes, all nodes).
        y, z
            Coordinates, shapes (nodes, 1, dimensions) and (1, all nodes, dimensions).

        Returns
        -------
        numpy.ndarray
            p_bb, of the shape of b.
        """


class PairFormula:
    """The density that a SymPy expression in b describes."""

    def __init__(self, expression: sympy.Expr):
        b = sympy.Symbol("b", real=True)
        expression = expression.subs(sympy.Symbol("b"), b)
        others = sorted(map(str, expression.free_symbols - {b}))
        if others:
            raise ValueError(f"pairs: expected an expression in the symbol b alone, got {', '.join(others)} too")
        if any(atom.is_number and not (atom.is_finite and atom.is_real) for atom in expression.atoms()):
            raise ValueError(f"pairs: expected real, finite numbers in an expression, got {expression}")
        self.expression = expression
        parts = [expression, expression.diff(b), expression.diff(b, 2)]
        self._parts = [sympy.lambdify(b, part, modules=["scipy", "numpy"], cse=True) for part in parts]

    def __repr__(self) -> str:
        return str(self.expression)

    def value(self, b: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return self._parts[0](b)

    def gradient(self, b: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return self._parts[1](b)

    def hessian(self, b: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return self._parts[2](b)


@dataclass(frozen=True)
class PairRate:
    """P at a kernel, with its functional in beta.

    Attributes
    ----------
    value : float
        P.
    by_beta : numpy.ndarray
        The functional in beta, shape (rank of phi, rank of psi), the same on every rank.
    """

    value: float
    by_beta: np.ndarray


class PairCost:
    """P(b) and its derivatives. Collective over the communicator of the kernel's label domain.

    The results for the latest kernels are remembered, as all stages and steps of a layer ask for the same one.

    Parameters
    ----------
    density
        p.
    """

    def __init__(self, density: PairDensity):
        self.density = density
        self._known: list[tuple[LowRankKernel, tuple[np.ndarray, ...], object]] = []
        #: The latest psi, its values, coordinates and weights at the nodes of all ranks, and the number of pieces.
        self._gathered: tuple | None = None

    def rate(self, kernel: LowRankKernel, beta: np.ndarray) -> PairRate:
        """P and its functional in beta.

        Parameters
        ----------
        kernel
            The bases of b.
        beta
            The coefficients, shape (rank of phi, rank of psi).

        Raises
        ------
        ValueError
            If there are more than `LARGEST` nodes.
        """
        return self._remembered(kernel, (beta,), lambda: self._rate(kernel, beta))

    def moved(self, kernel: LowRankKernel, beta: np.ndarray, beta_1: np.ndarray) -> np.ndarray:
        """The derivative of the functional in beta along beta_1, shape (rank of phi, rank of psi), the same on every rank.

        Parameters
        ----------
        kernel, beta
            As for `rate`.
        beta_1
            The direction, of the shape of beta.

        Raises
        ------
        NotImplementedError
            If the density is an object without the method `hessian`.
        """
        if not hasattr(self.density, "hessian"):
            raise NotImplementedError(
                "pairs: expected an object with the method hessian(b, y, z), which second derivatives need, got one without; "
                "give it that method"
            )
        return self._remembered(kernel, (beta, beta_1), lambda: self._moved(kernel, beta, beta_1))

    def _remembered(self, kernel: LowRankKernel, at: tuple[np.ndarray, ...], compute: Callable):
        for known, where, result in reversed(self._known):
            same_bases = known.phi is kernel.phi and known.psi is kernel.psi
            if same_bases and len(where) == len(at) and all(map(np.array_equal, where, at)):
                return result
        result = compute()
        self._known = [*self._known[1 - _KEPT :], (kernel, tuple(np.array(part) for part in at), result)]
        return result

    def _rate(self, kernel: LowRankKernel, beta: np.ndarray) -> PairRate:
        Y, total, by_beta = kernel.phi.Y, 0.0, np.zeros_like(beta)
        for rows, pieces in self._pieces(kernel, beta):
            p, slope = self._of_density(Y, lambda d, at=pieces: (d.value(*at.pairs), d.gradient(*at.pairs)), pieces)
            weighted = pieces.weights * slope
            total += float(np.sum(pieces.weights * p))
            by_beta += kernel.phi.values[rows].T @ weighted @ pieces.psi
        sums = Y.sum(np.append(by_beta.ravel(), total))
        return PairRate(float(sums[-1]), sums[:-1].reshape(beta.shape))

    def _moved(self, kernel: LowRankKernel, beta: np.ndarray, beta_1: np.ndarray) -> np.ndarray:
        Y, by_beta = kernel.phi.Y, np.zeros_like(beta)
        for rows, pieces in self._pieces(kernel, beta):
            (bend,) = self._of_density(Y, lambda d, at=pieces: (d.hessian(*at.pairs),), pieces)
            b_1 = kernel.phi.values[rows] @ beta_1 @ pieces.psi.T
            by_beta += kernel.phi.values[rows].T @ (pieces.weights * bend * b_1) @ pieces.psi
        return Y.sum(by_beta)

    def _of_density(self, Y: LabelSpace, ask: Callable, pieces: _Pieces) -> list[np.ndarray]:
        """Parts of the density at a piece. An error that a user's density raises on one rank is raised on all."""
        formula = isinstance(self.density, PairFormula)
        parts = together(None if formula else Y.comm, lambda: ask(self.density))
        return [np.broadcast_to(part, pieces.pairs[0].shape) for part in parts]

    def _pieces(self, kernel: LowRankKernel, beta: np.ndarray) -> Iterator[tuple[slice, _Pieces]]:
        """The nodes y of this rank in pieces, with all nodes z: as many pieces on every rank, of which some may be empty."""
        Y = kernel.phi.Y
        if Y.size > LARGEST:
            raise ValueError(
                f"pairs: expected a label domain of at most {LARGEST} nodes, as b is looked at in all pairs of nodes, got "
                f"{Y.size}; take a coarser mesh, or the norm of b: RunningCost(kernel=..)"
            )
        if self._gathered is None or self._gathered[0] is not kernel.psi:
            parts = Y.comm.allgather((kernel.psi.values, Y.coordinates, Y.weights))
            count = -(-max(len(part[2]) for part in parts) * Y.size // _PAIRS)
            self._gathered = kernel.psi, *map(np.concatenate, zip(*parts)), count
        _, psi, z, w, count = self._gathered
        x = Y.coordinates
        ends = np.linspace(0, Y.nodes, count + 1).astype(int)
        for first, last in zip(ends, ends[1:]):
            rows = slice(first, last)
            b = kernel.phi.values[rows] @ beta @ psi.T
            yield rows, _Pieces((b, x[rows, None, :], z[None]), np.multiply.outer(Y.weights[rows], w), psi)


@dataclass(frozen=True)
class _Pieces:
    """b and the coordinates at pairs of nodes, the weights w_i w_j, and psi at all nodes z."""

    pairs: tuple[np.ndarray, np.ndarray, np.ndarray]
    weights: np.ndarray
    psi: np.ndarray
