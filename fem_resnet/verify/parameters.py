"""Parameters written out a second time: values in time, inner products and gradients of what coefficients stand for."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.parameters.kernel import KernelCoefficients, LowRankKernel
from fem_resnet.parameters.kernel_sets import MatrixControls
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients, NodalValues, StateValues
from fem_resnet.parameters.time_basis import TimeBasis
from fem_resnet.verify.formulas import NotWrittenOut
from fem_resnet.verify.measure import Measure, raw

__all__ = ["Parameters"]


class Parameters:
    """The parameters of a problem at the present values of their Functions. Methods are collective.

    Parameters
    ----------
    problem
        The learning problem.
    """

    def __init__(self, problem: LearningProblem):
        self.net, self.head = problem.net, problem.head
        self.measure = Measure(self.net.Y)
        self._grams: dict[Basis, np.ndarray] = {}
        self._stiffness: dict[Basis, np.ndarray] = {}

    def coefficients(self, parameter: Parameter, k: int) -> np.ndarray:
        """c_k, of the shape of its space basis; values at nodes are those of this rank."""
        return raw(parameter.functions[k], self.net.Y, parameter.space_bases[k].shape)

    @staticmethod
    def kernel(parameter: Parameter, k: int) -> LowRankKernel:
        """The factors that belong to coefficients of a kernel."""
        basis = parameter.space_bases[k]
        if not isinstance(basis, KernelCoefficients):
            raise NotWrittenOut(f"{parameter.name}_{k} does not hold the coefficients of a kernel")
        return basis.kernel

    # -- time ---------------------------------------------------------------------------------------------------------

    @property
    def times(self) -> np.ndarray:
        """t_0 .. t_L, shape (layers + 1,)."""
        if self.net.layer_times is not None:
            return np.append(0.0, self.coefficients(self.net.layer_times, 0))
        return np.array(self.net.times)

    @property
    def _given_times(self) -> np.ndarray:
        return np.array(self.net.settings.layers.times)

    @staticmethod
    def _in_time(parameter: Parameter) -> str | list[int]:
        if not isinstance(parameter.time_basis, TimeBasis):
            raise NotWrittenOut(f"{parameter.name} does not depend on time")
        return parameter.time_basis.description

    def hats(self, parameter: Parameter, layer: int, s: float) -> list[tuple[int, float]]:
        """The functions in time that act at the fraction s of a layer: their numbers and their values there."""
        how = self._in_time(parameter)
        if how == "linear":
            return [(layer, 1.0 - s), (layer + 1, s)]
        return [({"layers": layer, "shared": 0}[how] if isinstance(how, str) else how[layer], 1.0)]

    def lengths(self, parameter: Parameter) -> np.ndarray:
        """tau_k = int theta_k dt over [0, T], shape (functions in time,), by the times that the network was made with."""
        if parameter not in (self.net.bias, self.net.kernel, self.net.kernel.learned):
            return np.ones(len(parameter.functions))
        tau, times = np.zeros(len(parameter.functions)), self._given_times
        for layer in range(self.net.layers):
            # Simpson's rule is exact for linear functions.
            for s, weight in ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)):
                for k, theta in self.hats(parameter, layer, s):
                    tau[k] += weight * theta * (times[layer + 1] - times[layer])
        return tau

    def steps_in_time(self, parameter: Parameter) -> list[tuple[int, int, float]]:
        """Pairs of functions that follow each other in t, and the distance of their centres."""
        if parameter not in (self.net.bias, self.net.kernel) or not self.net.layers:
            return []
        times = self._given_times
        if self._in_time(parameter) == "linear":
            return [(l, l + 1, times[l + 1] - times[l]) for l in range(self.net.layers)]
        pieces: list[tuple[int, float, float]] = []  # number, start and end of each function
        for layer in range(self.net.layers):
            ((k, _),) = self.hats(parameter, layer, 0.0)
            start = times[layer]
            if pieces and pieces[-1][0] == k:
                _, start, _ = pieces.pop()
            pieces.append((k, start, times[layer + 1]))
        return [(a[0], b[0], (b[1] + b[2] - a[1] - a[2]) / 2) for a, b in zip(pieces, pieces[1:])]

    # -- space --------------------------------------------------------------------------------------------------------

    def measure_of(self, Y: LabelSpace) -> Measure:
        """The measure of the network's label domain, or of the head's."""
        return self.measure if Y is self.net.Y else self._head_measure

    @cached_property
    def _head_measure(self) -> Measure:
        return Measure(self.head.Y)

    def gram(self, basis: Basis) -> np.ndarray:
        """Inner products of basis functions, shape (rank, rank); computed once."""
        if basis not in self._grams:
            self._grams[basis] = self.measure_of(basis.Y).gram(basis)
        return self._grams[basis]

    def stiffness(self, basis: Basis) -> np.ndarray:
        """Inner products of the gradients of basis functions, shape (rank, rank); computed once."""
        if basis not in self._stiffness:
            self._stiffness[basis] = self.measure.basis_stiffness(basis)
        return self._stiffness[basis]

    def product(self, parameter: Parameter, k: int, c: np.ndarray, d: np.ndarray) -> float:
        """The inner product in L2 of the functions that two sets of coefficients stand for, without tau_k.

        The functions live on the label domain, or on pairs of its points. Both arrays have the shape of `coefficients`.
        """
        basis = parameter.space_bases[k]
        if isinstance(basis, (NodalValues, StateValues)):
            return self.measure_of(basis.Y).inner(c, d)
        if isinstance(basis, BasisCoefficients):
            values = basis.basis.values
            return self.measure_of(basis.Y).inner(values @ c, values @ d)
        if isinstance(basis, KernelCoefficients):
            return float(np.trace(c.T @ self.gram(basis.kernel.phi) @ d @ self.gram(basis.kernel.psi)))
        if isinstance(basis, MatrixControls):
            left, right = basis.grams
            d = d if left is None else left @ d
            d = d if right is None else d @ right
        return float(np.sum(c * d))

    def square_of_gradients(self, parameter: Parameter, k: int, c: np.ndarray) -> float:
        """The integral of the squared gradient of the function that coefficients stand for."""
        basis = parameter.space_bases[k]
        if isinstance(basis, (NodalValues, StateValues)):
            columns = c.reshape(c.shape[0], -1)
            return float(self.measure.total(np.sum(columns * self.measure.stiffness(columns))))
        if isinstance(basis, BasisCoefficients):
            return float(c @ self.stiffness(basis.basis) @ c)
        if isinstance(basis, KernelCoefficients):
            phi, psi = basis.kernel.phi, basis.kernel.psi
            G, H, K, L = self.gram(phi), self.gram(psi), self.stiffness(phi), self.stiffness(psi)
            return float(np.trace(c.T @ K @ c @ H) + np.trace(c.T @ G @ c @ L))
        return 0.0

    def factor(self, basis: Basis, X: np.ndarray | None) -> np.ndarray:
        """Values of Phi or Psi at the nodes, shape (nodes, rank).

        They are the given ones, or moved from there by X, of the same shape, and made orthonormal by Gram and Schmidt.
        """
        if X is None:
            return basis.values
        w = self.measure.weights[:, None]
        moved = basis.values + X - basis.values @ self.measure.total(basis.values.T @ (w * X))
        R = np.linalg.cholesky(self.measure.total(moved.T @ (w * moved))).T
        return np.linalg.solve(R.T, moved.T).T
