r"""The stage of the discrete gradient: tau D(u_0, u_1) in the place of tau sigma(u).

D(u_0, u_1) = (Sigma(u_1) - Sigma(u_0)) / (u_1 - u_0) with Sigma' = sigma is the mean of sigma between the preactivations at
the start and at the end of a step (`activation.secant`). So this stage is evaluated at two ends, s = tau D(a - Phi C_0, a -
Phi C_1), and its transpose has functionals in C at both. `time_stepping.discrete_gradient` has the step and its equations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.activation.secant import Secant
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.stage import Argument, Functionals, Stage, StageFunctional

__all__ = ["DiscreteGradientStage", "EndFunctionals", "Ends"]


@dataclass(frozen=True)
class Ends(Argument):
    """The two ends of a step: this is the `Argument` of its end, and `start` the one of its start.

    Attributes
    ----------
    start : Argument
        The same as this one but for C.
    """

    start: Argument | None = None

    @classmethod
    def standing(cls, start: Argument) -> Ends:
        """The step that ends where it starts."""
        return cls(start.factors, start.length, start.a, start.C, start.directions, start=start)

    def with_end(self, C: tuple[np.ndarray, ...]) -> Ends:
        """The step from the same start to another end, C of shape (rank of phi, samples)."""
        return replace(self, C=C)


@dataclass
class EndFunctionals(Functionals):
    """The functionals in the arguments of a step.

    Attributes
    ----------
    D : list of numpy.ndarray
        Minus the functional in C_k at the end, shape (rank of phi, samples), the same on every rank.
    start_D : list of numpy.ndarray
        Minus the functional in C_k at the start.
    """

    start_D: list[np.ndarray] = field(default_factory=list)


class DiscreteGradientStage(Stage[Ends]):
    """Stage evaluations tau D(u_0, u_1), in NumPy. Collective as `Stage` is.

    Parameters
    ----------
    Y, activation, samples, precision
        As for `Stage`.
    """

    def __init__(self, Y: LabelSpace, activation: Activation, samples: int, precision: str = "double"):
        super().__init__(Y, activation, samples, precision)
        self._secant = Secant(activation)

    def _both_affine(self, nodes: slice, at: Ends, order: int) -> tuple[np.ndarray, np.ndarray]:
        """u_0 and u_1 (order 0), or their tangents (order 1), on a node block, in new arrays."""
        shape = (nodes.stop - nodes.start, self.samples)
        return (
            self._affine(nodes, at.start, order, np.empty(shape)),
            self._affine(nodes, at, order, np.empty(shape)),
        )

    def _values(self, nodes: slice, at: Ends) -> Iterator[np.ndarray]:
        u = self._both_affine(nodes, at, 0)
        D, *slopes = self._secant(*u, order=len(at.a) - 1)
        yield at.length[0] * D
        if len(at.a) == 2:
            moved = self._both_affine(nodes, at, 1)
            yield at.length[0] * (slopes[0] * moved[0] + slopes[1] * moved[1]) + at.length[1] * D

    def jacobian(self, at: Ends) -> list[np.ndarray]:
        """K = `Psi^T M diag(tau D_1) Phi`, one matrix a sample, as in `Stage`; of the value alone."""
        phi, psi = at.factors.phi, at.factors.psi
        K = np.zeros((self.samples, psi.rank, phi.rank))
        for nodes in self._node_blocks():
            slope = at.length[0] * self._secant(*self._both_affine(nodes, at, 0), order=1)[2]
            for total, c in zip(K, slope.T):
                total += (psi.weighted[nodes] * c[:, None]).T @ phi.values[nodes]
        return [self.Y.sum(K)]

    def transpose(
        self, at: Ends, by_s: StageFunctional, with_length: bool = False, with_factors: bool = False
    ) -> EndFunctionals:
        """As in `Stage`, with functionals in C at both ends."""
        orders, phi, psi = len(at.a), at.factors.phi, at.factors.psi
        both = np.zeros((2, orders, phi.rank, self.samples))
        result = EndFunctionals([], np.empty(self.Y.nodes))
        if with_factors:
            result.phi, result.psi = np.empty_like(phi.values), np.empty_like(psi.values)
        for nodes in self._node_blocks():
            w = [self._functional_at_nodes(nodes, at, by_s, k).copy() for k in range(orders)]
            s = list(self._values(nodes, at)) if with_length or with_factors else []
            if with_length:
                result.length += self._pair_with_length(at, w, s)
            if with_factors:
                result.psi[nodes] = sum(part @ x.T for part, x in zip(s, by_s.x)) * self.Y.weights[nodes, None]
                result.phi[nodes] = 0.0
            v = self._by_both_u(nodes, at, w)
            result.bias[nodes] = sum(np.sum(part[0], axis=1) for part in v)
            for total, part, end in zip(both, v, (at.start, at)):
                for k in range(orders):
                    total[k] += phi.values[nodes].T @ part[k]
                if at.directions is not None:
                    total[0] += at.directions.phi[nodes].T @ part[1]
                if with_factors:
                    result.phi[nodes] -= sum(p @ C.T for p, C in zip(part, end.C))
        if with_length:
            result.length = float(self.Y.sum(result.length))
        start, end = self.Y.sum(both)
        result.start_D, result.D = list(start), list(end)
        return result

    def _pair_with_length(self, at: Ends, w: list[np.ndarray], s: list[np.ndarray]) -> float:
        """The functional in tau, the part of a node block, from s_0 = tau D and s_1 = tau D' + tau_1 D."""
        paired = np.sum(w[0] * s[0])
        if len(w) == 2:
            paired += np.sum(w[1] * (s[1] - at.length[1] / at.length[0] * s[0]))
        return float(paired / at.length[0])

    def _by_both_u(self, nodes: slice, at: Ends, w: list[np.ndarray]) -> list[list[np.ndarray]]:
        """The functionals in u_0, then in u_1, on a node block, each with one entry an order."""
        u, tau = self._both_affine(nodes, at, 0), at.length
        if len(w) == 1:
            _, *slopes = self._secant(*u, order=1)
            return [[tau[0] * slope * w[0]] for slope in slopes]
        _, D_0, D_1, D_00, D_01, D_11 = self._secant(*u, order=2)
        moved = self._both_affine(nodes, at, 1)
        result = []
        for slope, bends in ((D_0, (D_00, D_01)), (D_1, (D_01, D_11))):
            bend = bends[0] * moved[0] + bends[1] * moved[1]
            result.append([slope * (tau[0] * w[0] + tau[1] * w[1]) + tau[0] * bend * w[1], tau[0] * slope * w[1]])
        return result
