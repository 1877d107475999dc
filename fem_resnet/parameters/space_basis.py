"""Space bases: the coefficients in space of a parameter, what a layer makes of them, and their inner product.

===================  ===========================================  =========================  ==================
space basis          coefficients c                               a layer takes E c          R
===================  ===========================================  =========================  ==================
`NodalValues`        values of the bias at the nodes              the same                   M
`BasisCoefficients`  coefficients of the bias in a basis P        node values `P c`          G
`KernelCoefficients` the matrix beta of the kernel                the same                   G_Phi x G_Psi
`StateValues`        a batch, or the values of kernel factors     the same                   M, for each sample
`MatrixControls`     the free controls X of a stable kernel       the same                   G x H
`LayerTimes`         the layer times                              the same                   1
===================  ===========================================  =========================  ==================

R gives the inner product `(c, d) = <R c, d>`, in the label measure M or by Gram matrices G. R takes coefficients to
functionals, and its inverse is the Riesz map.
"""

from __future__ import annotations

from abc import abstractmethod

import firedrake as fd
import numpy as np
import scipy.linalg

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.parameters.slots import BatchValues, Replicated, Slot, new_cofunction

__all__ = [
    "BasisCoefficients",
    "KernelCoefficients",
    "LayerTimes",
    "MatrixControls",
    "NodalValues",
    "SpaceBasis",
    "StateValues",
    "kernel_coefficients",
]


class SpaceBasis(Slot):
    """A slot whose arrays are coefficients in space, with an inner product.

    Laws: `expand` is linear and `pull_back` its transpose, `<d, expand(c)> = <pull_back(d), c>` with the plain sums
    over what all ranks own; `riesz(functional(c)) = c`.
    """

    @property
    def amplitude(self) -> float:
        """How large coefficients are for a parameter of size one: it depends on the unit of length in Y."""
        return 1.0

    @property
    def unit(self) -> float:
        """The squared norm of coefficients of that amplitude on all of the label domain."""
        return self.Y.measure

    def expand(self, coefficients: np.ndarray) -> np.ndarray:
        """What a layer takes, `E c`: the coefficients themselves, unless they are those of a bias in a basis."""
        return coefficients

    def pull_back(self, functional: np.ndarray) -> np.ndarray:
        """`E^T d`: a functional of the coefficients, of their shape, from one of what a layer takes. Collective."""
        return functional

    @abstractmethod
    def functional(self, coefficients: np.ndarray) -> np.ndarray:
        """`R c`, of the shape of c: the functional d -> (c, d)."""

    @abstractmethod
    def riesz(self, functional: np.ndarray) -> np.ndarray:
        """`R^-1 d`, of the shape of d: the coefficients that represent a functional."""

    @abstractmethod
    def stiffness(self, coefficients: np.ndarray) -> np.ndarray:
        """`S c`, of the shape of c, so that `<S c, c>` is the integral of the squared gradients. Collective."""

    @abstractmethod
    def pair(self, functional: np.ndarray, coefficients: np.ndarray) -> float:
        """`<d, c>`, the sum over what all ranks own. Collective."""


class NodalValues(SpaceBasis):
    """Values at the owned nodes of a label domain, shape (nodes,): R = M.

    Parameters
    ----------
    Y
        The label domain.

    Attributes
    ----------
    dual_space
        The space of Cofunctions. Kept, since asking Firedrake for it takes as long as making a Cofunction.
    """

    def __init__(self, Y: LabelSpace):
        self.Y = Y
        self.space = Y.V
        self.dual_space = Y.V.dual()
        self.shape = (Y.nodes,)

    def read(self, function):
        return self.view(function).copy()

    def view(self, function):
        return function.dat.data_ro

    def write(self, function, coefficients):
        function.dat.data_wo[...] = coefficients

    def new_functional(self, functional: np.ndarray) -> fd.Cofunction:
        """A new Cofunction that holds a functional, shape (nodes,), in that very array where it has no halo. Collective."""
        values, size = functional, self.space.dof_dset.total_size
        if size > self.Y.nodes:
            # As large as what the functional came in: then what is freed of one has room for the other.
            came_in = functional if functional.base is None else functional.base
            values = np.zeros(max(size, came_in.size))[:size]
            values[: self.Y.nodes] = functional
        return new_cofunction(self.dual_space, values)

    def functional(self, coefficients):
        return self.Y.weights * coefficients

    def riesz(self, functional):
        return functional / self.Y.weights

    def stiffness(self, coefficients):
        return self.Y.apply_stiffness(coefficients[:, None])[:, 0]

    def pair(self, functional, coefficients):
        return float(self.Y.sum(functional @ coefficients))


class StateValues(BatchValues, SpaceBasis):
    """Values of a batch at the owned nodes of a label domain, shape (nodes, samples): R = M for each sample.

    Parameters
    ----------
    Y
        The label domain.
    space
        The batch's space: `Y.V`, or `Y.batch_space(samples)`.
    unit
        As of `SpaceBasis`; 1 for functions of norm one.
    """

    def __init__(self, Y: LabelSpace, space: fd.functionspaceimpl.WithGeometry, unit: float | None = None):
        super().__init__(Y, space)
        self._unit = Y.measure if unit is None else unit

    @property
    def unit(self):
        return self._unit

    def read(self, function):
        return self.view(function).copy()

    def functional(self, coefficients):
        return self.Y.weights[:, None] * coefficients

    def riesz(self, functional):
        return functional / self.Y.weights[:, None]

    def stiffness(self, coefficients):
        return self.Y.apply_stiffness(coefficients)

    def pair(self, functional, coefficients):
        return float(self.Y.sum(np.einsum("is,is->", functional, coefficients)))


class ReplicatedCoefficients(Replicated, SpaceBasis):
    """Coefficients that are the same on every rank."""

    def pair(self, functional, coefficients):
        return float(np.sum(functional * coefficients))


class BasisCoefficients(ReplicatedCoefficients):
    """Coefficients alpha of a bias `a = P alpha` in a basis P, shape (rank,): R = G.

    Parameters
    ----------
    basis
        P.
    """

    def __init__(self, basis: Basis):
        super().__init__(basis.Y, (basis.rank,))
        self.basis = basis
        self._factor = scipy.linalg.cho_factor(basis.gram)

    def expand(self, coefficients):
        return self.basis.values @ coefficients

    def pull_back(self, functional):
        return self.Y.sum(self.basis.values.T @ functional)

    def functional(self, coefficients):
        return self.basis.gram @ coefficients

    def riesz(self, functional):
        return scipy.linalg.cho_solve(self._factor, functional)

    def stiffness(self, coefficients):
        return self.basis.stiffness @ coefficients


class KernelCoefficients(ReplicatedCoefficients):
    """The matrix beta of a low-rank kernel, shape (rank of phi, rank of psi): R = G_Phi x G_Psi.

    Parameters
    ----------
    kernel
        The factors; where they are learned, the orthonormal ones at the start.
    learned
        Whether the factors are learned.
    """

    def __init__(self, kernel: LowRankKernel, learned: bool = False):
        super().__init__(kernel.phi.Y, kernel.shape)
        self.kernel = kernel
        self._learned = learned

    @property
    def amplitude(self):
        return 1 / self.kernel.psi.Y.measure  # b is integrated over it

    @property
    def unit(self):
        return self.kernel.phi.Y.measure / self.kernel.psi.Y.measure

    def functional(self, coefficients):
        return self.kernel.functional(coefficients)

    def riesz(self, functional):
        return self.kernel.riesz(functional)

    def stiffness(self, coefficients):
        if self._learned:
            raise ValueError(
                "smooth_in_space: expected a kernel with fixed factors, got learned ones, for whose gradients there is no "
                "formula here; fix the factors, or regularise by smooth_in_time or tikhonov"
            )
        return self.kernel.stiffness(coefficients)


def kernel_coefficients(basis: SpaceBasis) -> KernelCoefficients:
    """The space basis of a kernel, of which more is known than of any space basis."""
    assert isinstance(basis, KernelCoefficients), "a kernel is expanded in factors"
    return basis


class MatrixControls(ReplicatedCoefficients):
    """A matrix X of controls of which a kernel is made (`stable_kernels`): R = G x H for Gram matrices, or 1 for either.

    Parameters
    ----------
    Y
        The label domain.
    shape
        Shape of X.
    left, right
        G and H, square, shapes (rows of X,) * 2 and (columns of X,) * 2; the identity if left out.
    """

    def __init__(self, Y: LabelSpace, shape: tuple[int, int], left: np.ndarray | None = None, right: np.ndarray | None = None):
        super().__init__(Y, shape)
        self.grams = [np.eye(size) if gram is None else gram for size, gram in zip(shape, (left, right))]

    @property
    def unit(self):
        return 1.0

    def functional(self, coefficients):
        left, right = self.grams
        return left @ coefficients @ right

    def riesz(self, functional):
        left, right = self.grams
        return np.linalg.solve(right, np.linalg.solve(left, functional).T).T

    def stiffness(self, coefficients):
        return np.zeros(self.shape)


class LayerTimes(ReplicatedCoefficients):
    """The layer times t_1 .. t_L, t_0 being 0, shape (L,), in the unit of time: R = 1.

    Parameters
    ----------
    Y
        The label domain.
    layers
        L.
    """

    def __init__(self, Y: LabelSpace, layers: int):
        super().__init__(Y, (layers,))

    @property
    def unit(self):
        return 1.0

    def functional(self, coefficients):
        return coefficients.copy()

    def riesz(self, functional):
        return functional.copy()

    def stiffness(self, coefficients):
        return np.zeros(self.shape)
