"""Sets of kernels as images of free controls X, beta = P(X), and kernels that are stable by construction.

    B = C C^T                         beta = c c^T,                         phi = psi        B = B^T >= 0
    antisymmetric and damped          beta = (X - X^T) / 2 + eps,           phi = psi        B_s = eps Phi Phi^T M >= 0
    bounded in norm                   R_Phi beta R_Psi^T = 2 c X (1 + X^T X)^-1              norm(B) <= c

with R^T R the Gram matrix of a basis, R = 1 where it is orthonormal. For (2.8) with sigma' >= 0 this means: where B = C C^T,
and a and B are constant in time, two solutions never move apart in norm(B^(1/2) .), though they may in L2. For the other two
sets no norm is known that always falls; solutions move apart by the factor exp(int sup sigma' norm(B)) at most
(`theory.sensitivity.contraction`). All three sets are convex: a kernel that is linear in time stays in a set if its
coefficients are in it.

The map of the last set takes singular values x of X to 2 c x / (1 + x^2), from 0 to c. So it is onto, the boundary is reached
at x = 1, and a minimum of J on the boundary is an ordinary minimum in X. With K = (1 + X^T X)^-1, L = (1 + X X^T)^-1 and
P = X K its derivative

    X_1 -> 2 c (L X_1 K - P X_1^T P),      L_1 = -L (X_1 X^T + X X_1^T) L,      K_1 = -K (X_1^T X + X^T X_1) K,

is its own transpose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from scipy.linalg import solve_triangular

from fem_resnet.arguments import integer, number
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.parameters.couplings import Couplings
from fem_resnet.parameters.kernel import KernelCoefficients, LowRankKernel
from fem_resnet.parameters.space_basis import Replicated, SpaceBasis

__all__ = [
    "DampedAntisymmetric", "KernelMap", "KernelSet", "MatrixControls", "NormBounded", "PositiveSemidefinite",
    "refuse_outside",
]  # fmt: skip

#: How far from a set coefficients may lie and still count as its members, in parts of their size.
_ROUND_OFF = 1e-10


class MatrixControls(Replicated, SpaceBasis):
    """A matrix X of controls of which a kernel is made: R = G x H for Gram matrices, or 1 for either.

    Parameters
    ----------
    Y
        The label domain.
    shape
        Shape of X.
    left, right
        G and H, square, shapes (rows of X,) * 2 and (columns of X,) * 2; the identity if left out.

    Attributes
    ----------
    grams : tuple
        G and H; None for the identity, which is never made: a linear set has thousands of controls in one column.
    """

    def __init__(self, Y: LabelSpace, shape: tuple[int, int], left: np.ndarray | None = None, right: np.ndarray | None = None):
        super().__init__(Y, shape)
        self.grams = left, right
        self._roots = [None if gram is None else np.linalg.cholesky(gram).T for gram in self.grams]

    @property
    def unit(self):
        return 1.0

    def functional(self, coefficients):
        return _on_both_sides(np.matmul, self.grams, coefficients)

    def riesz(self, functional):
        return _on_both_sides(np.linalg.solve, self.grams, functional)

    def coordinates(self, coefficients):
        return _on_both_sides(np.matmul, self._roots, coefficients)

    def from_coordinates(self, coordinates):
        return _on_both_sides(solve_triangular, self._roots, coordinates)

    def stiffness(self, coefficients):
        return np.zeros(self.shape)


def _on_both_sides(
    apply: Callable[[np.ndarray, np.ndarray], np.ndarray], matrices: Sequence[np.ndarray | None], X: np.ndarray
) -> np.ndarray:
    """A new matrix: the first matrix applied to the columns of X, the second to the rows; None is the identity."""
    left, right = matrices
    X = X.copy() if left is None else apply(left, X)
    return X if right is None else apply(right, X.T).T


class KernelSet(ABC):
    """A set of kernels as the image of free controls X, beta = P(X).

    It is one of `PositiveSemidefinite`, `DampedAntisymmetric` and `NormBounded`, or of `LaplaceFunctions` and `Symmetric`
    (`linear_kernels`, `symmetric_kernels`).
    """

    #: Whether phi and psi must be one basis.
    symmetric: bool
    #: Whether P is linear.
    linear = False

    def shape(self, phi: int, psi: int) -> tuple[int, int]:
        """The shape of X, from the ranks of the bases."""
        return phi, psi

    @abstractmethod
    def controls(self, kernel: LowRankKernel) -> MatrixControls:
        """The slot of X."""

    @abstractmethod
    def start(self, kernel: LowRankKernel) -> np.ndarray:
        """The first X."""

    @abstractmethod
    def inverse(self, kernel: LowRankKernel, beta: np.ndarray) -> np.ndarray:
        """An X with P(X) = beta.

        Raises
        ------
        ValueError
            If beta is not in the set.
        """

    @abstractmethod
    def value(self, kernel: LowRankKernel, X: np.ndarray) -> np.ndarray:
        """P(X)."""

    @abstractmethod
    def tangent(self, kernel: LowRankKernel, X: np.ndarray, X_1: np.ndarray) -> np.ndarray:
        """P'(X) X_1."""

    @abstractmethod
    def adjoint(self, kernel: LowRankKernel, X: np.ndarray, functional: np.ndarray) -> np.ndarray:
        """P'(X)^T d, for a functional d of beta."""

    @abstractmethod
    def curvature(self, kernel: LowRankKernel, X: np.ndarray, X_1: np.ndarray, functional: np.ndarray) -> np.ndarray:
        """(P''(X) X_1)^T d, for a functional d of beta."""

    def derivative(self, kernel: LowRankKernel, X: np.ndarray) -> np.ndarray | scipy.sparse.sparray:
        """P'(X) as a matrix, shape (numbers of beta, numbers of X), each in the order of rows; sparse where P is linear."""
        columns = (self.tangent(kernel, X, unit.reshape(X.shape)).ravel() for unit in np.eye(X.size))
        return np.column_stack(list(columns))

    def couplings(self) -> Couplings | None:
        """The functions that kernels of the set couple, where these are few; else None."""
        return None

    def first(self, rank: int) -> KernelSet:
        """The set in the first functions of phi and psi, whose kernels, padded by zeros, are kernels of this set.

        Parameters
        ----------
        rank
            How many functions.

        Raises
        ------
        ValueError
            If there is no such set, or training would not leave it.
        """
        return self

    @property
    def description(self) -> dict[str, object]:
        """The set's name and numbers, of which `kernel_set_from` makes it again, with `arrays`."""
        return {"set": type(self).__name__, **vars(self)}

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """What the set is made of that is too long for `description`: arrays with one axis, by their names."""
        return {}

    @classmethod
    def of_arrays(cls, description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> KernelSet:
        """The set from what `description` and `arrays` give.

        Parameters
        ----------
        description
            `description` without the name of the set.
        arrays
            `arrays`, from outside.

        Raises
        ------
        TypeError, ValueError
            If they describe no set.
        """
        return cls(**description)


@dataclass(frozen=True)
class PositiveSemidefinite(KernelSet):
    """B = C C^T: b(y, z) = sum_k C_k(y) C_k(z), C = Phi c, so that B = B^T >= 0.

    X = 0 is a stationary point of every J. So training starts at B = 0.1 Phi_k Phi_k^T M with the first functions of phi.

    Parameters
    ----------
    rank
        Number of functions C_k, from 1; the rank of phi if left out.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Kernel, LabelSpace, ResidualNetwork, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(Kernel(laplace_basis(Y, 3), among=PositiveSemidefinite(rank=1)), layers=1)
    >>> net.kernel.get(0).round(3).tolist()
    [[0.1, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    rank: int | None = None
    symmetric = True

    def __post_init__(self):
        if self.rank is not None:
            integer("rank", self.rank)

    def first(self, rank):
        if self.rank is None or self.rank > rank:
            raise ValueError(
                f"kernel.among: expected PositiveSemidefinite(rank=..) of {rank} or less in the first {rank} functions, got "
                f"{self!r}; more C_k, padded by zeros, would stay zero, which is a stationary point"
            )
        return self

    def shape(self, phi, psi):
        return phi, phi if self.rank is None else self.rank

    def controls(self, kernel):
        shape = self.shape(*kernel.shape)
        if shape[1] > kernel.phi.rank:
            raise ValueError(f"rank: expected at most the rank of phi, {kernel.phi.rank}, got {shape[1]}")
        return MatrixControls(kernel.phi.Y, shape, kernel.phi.gram)

    def start(self, kernel):
        return np.sqrt(0.1) * np.eye(kernel.phi.rank, self.rank)

    def inverse(self, kernel, beta):
        size = np.linalg.norm(beta, 2)
        values, vectors = np.linalg.eigh((beta + beta.T) / 2)
        values, vectors = values[::-1], vectors[:, ::-1]
        rank = kernel.phi.rank if self.rank is None else self.rank
        missed = max(np.abs(beta - beta.T).max(), -values[-1], np.abs(values[rank:]).max(initial=0.0))
        refuse_outside(missed, size, f"a symmetric, positive semidefinite matrix of rank {rank} or less")
        return vectors[:, :rank] * np.sqrt(np.maximum(values[:rank], 0.0))

    def value(self, kernel, X):
        return X @ X.T

    def tangent(self, kernel, X, X_1):
        half = X_1 @ X.T
        return half + half.T

    def adjoint(self, kernel, X, functional):
        return (functional + functional.T) @ X

    def curvature(self, kernel, X, X_1, functional):
        return (functional + functional.T) @ X_1


@dataclass(frozen=True)
class DampedAntisymmetric(KernelSet):
    """beta = (X - X^T) / 2 + damping: B - B^T is free, B_s = damping Phi Phi^T M >= 0.

    Parameters
    ----------
    damping
        eps >= 0, in the unit of beta.
    """

    damping: float = 0.1
    symmetric = True

    def __post_init__(self):
        number("damping", self.damping, least=0)

    def first(self, rank):
        if self.damping:
            raise ValueError(
                f"kernel.among: expected DampedAntisymmetric(damping=0) in the first {rank} functions, got {self!r}, whose "
                f"kernels padded by zeros are not damped in the others"
            )
        return self

    def controls(self, kernel):
        return MatrixControls(kernel.phi.Y, kernel.shape, kernel.phi.gram, kernel.psi.gram)

    def start(self, kernel):
        return np.zeros(kernel.shape)

    def inverse(self, kernel, beta):
        X = beta - self.damping * np.eye(kernel.phi.rank)
        refuse_outside(np.abs(X + X.T).max(), np.abs(beta).max(), f"an antisymmetric matrix plus {self.damping:g}")
        return X

    def value(self, kernel, X):
        return (X - X.T) / 2 + self.damping * np.eye(kernel.phi.rank)

    def tangent(self, kernel, X, X_1):
        return (X_1 - X_1.T) / 2

    def adjoint(self, kernel, X, functional):
        return (functional - functional.T) / 2

    def curvature(self, kernel, X, X_1, functional):
        return np.zeros_like(X)


@dataclass(frozen=True)
class NormBounded(KernelSet):
    """norm(B) <= bound, the operator norm on L2(Y).

    Parameters
    ----------
    bound
        c > 0, in the unit of B, 1 / time.
    """

    bound: float = 1.0
    symmetric = False

    def __post_init__(self):
        number("bound", self.bound, above=0)

    def controls(self, kernel):
        return MatrixControls(kernel.phi.Y, kernel.shape)

    def start(self, kernel):
        return np.zeros(kernel.shape)

    def inverse(self, kernel, beta):
        phi, psi = kernel.phi.root, kernel.psi.root
        U, sizes, V = np.linalg.svd(phi @ beta @ psi.T / self.bound, full_matrices=False)
        refuse_outside(sizes[0] - 1, 1.0, f"a kernel of operator norm {self.bound:g} or less")
        sizes = np.minimum(sizes, 1.0)
        return (U * (sizes / (1 + np.sqrt(1 - sizes**2)))) @ V

    def value(self, kernel, X):
        return self._scaled(kernel, X @ np.linalg.inv(np.eye(X.shape[1]) + X.T @ X))

    def tangent(self, kernel, X, X_1):
        return self._scaled(kernel, self._derivative(X, X_1))

    def adjoint(self, kernel, X, functional):
        return self._derivative(X, self._scaled_functional(kernel, functional))

    def curvature(self, kernel, X, X_1, functional):
        K, L, P = self._factors(X)
        d = self._scaled_functional(kernel, functional)
        K_1, L_1 = -K @ (X_1.T @ X + X.T @ X_1) @ K, -L @ (X_1 @ X.T + X @ X_1.T) @ L
        P_1 = self._derivative(X, X_1)
        return L_1 @ d @ K + L @ d @ K_1 - P_1 @ d.T @ P - P @ d.T @ P_1

    @staticmethod
    def _factors(X):
        K, L = (np.linalg.inv(np.eye(len(S)) + S) for S in (X.T @ X, X @ X.T))
        return K, L, X @ K

    def _derivative(self, X, V):
        K, L, P = self._factors(X)
        return L @ V @ K - P @ V.T @ P

    def _scaled(self, kernel, F):
        phi, psi = kernel.phi.root, kernel.psi.root
        return 2 * self.bound * solve_triangular(psi, solve_triangular(phi, F).T).T

    def _scaled_functional(self, kernel, functional):
        phi, psi = kernel.phi.root, kernel.psi.root
        return 2 * self.bound * solve_triangular(psi, solve_triangular(phi, functional, trans="T").T, trans="T").T


def refuse_outside(missed: float, size: float, expected: str) -> None:
    """Raise if coefficients are not in a set, up to round-off.

    Parameters
    ----------
    missed
        How far they are from it.
    size
        Their size.
    expected
        What they should be, for the message.

    Raises
    ------
    ValueError
        If they miss it.
    """
    if missed > _ROUND_OFF * size:
        raise ValueError(f"coefficients: expected {expected}, got one that misses it by {missed:.1e}")


class KernelMap:
    """The operator X -> beta: see `tape.operator.Operator`.

    Parameters
    ----------
    choice
        The set of kernels.
    controls
        The slot of X.
    coefficients
        The slot of beta.
    """

    ready = True

    def __init__(self, choice: KernelSet, controls: MatrixControls, coefficients: KernelCoefficients):
        self._choice = choice
        self._kernel = coefficients.kernel
        #: Whether it is linear.
        self.linear = choice.linear
        self.inputs = [controls]
        self.output = coefficients

    def forward(self, arrays: Sequence[np.ndarray], save: bool) -> np.ndarray:
        """beta."""
        return self._choice.value(self._kernel, arrays[0])

    def adjoint(self, arrays: Sequence[np.ndarray], functional: np.ndarray) -> list[np.ndarray]:
        """A functional of X from a functional of beta."""
        return [self._choice.adjoint(self._kernel, arrays[0], functional)]

    def derivative(self, X: np.ndarray) -> np.ndarray | scipy.sparse.sparray:
        """The matrix of `tangent`: see `KernelSet.derivative`."""
        return self._choice.derivative(self._kernel, X)

    def tangent(self, arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray]) -> np.ndarray:
        """beta_1."""
        return self._choice.tangent(self._kernel, arrays[0], directions[0])

    def second_adjoint(
        self,
        arrays: Sequence[np.ndarray],
        directions: Sequence[np.ndarray],
        functional: np.ndarray,
        functional_dot: np.ndarray,
    ) -> list[np.ndarray]:
        """Derivative of `adjoint` where X moves in the directions and the functional in functional_dot."""
        X, X_1 = arrays[0], directions[0]
        return [
            self._choice.adjoint(self._kernel, X, functional_dot) + self._choice.curvature(self._kernel, X, X_1, functional)
        ]
