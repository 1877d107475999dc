"""The co-state equation (4.2a) on one layer, in a time that runs backwards, and the integrals of (4.3) and (4.4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fem_resnet.arguments import real_array
from fem_resnet.costate.trajectory import LayerTrajectory
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import together
from fem_resnet.time_stepping.evolution import Moment, Path, Step

__all__ = ["LayerBackward", "RunningGradient"]

#: ``L_f(t, f)``: the gradient in L2(Y) of a running cost, from and to arrays of shape (nodes, samples).
RunningGradient = Callable[[float, np.ndarray], np.ndarray]


class LayerBackward:
    """(4.2a) on one layer, in the time s = t_(l+1) - t, which runs backwards.

    Parameters
    ----------
    layer
        The trajectory on the layer.
    net
        The network.
    running
        A running cost, its gradient alone, or None.
    omega
        The weights of the samples in a running cost, shape (samples,), with the sum 1.
    used
        The numbers of the forward stages in the order in which a partner takes them, shape (stages,). None if f is
        interpolated instead.
    """

    def __init__(
        self,
        layer: LayerTrajectory,
        net: ResidualNetwork,
        running: RunningCost | RunningGradient | None,
        omega: np.ndarray,
        used: np.ndarray | None,
    ):
        self._layer, self._inputs, self._used = layer, layer.inputs, used
        self._cost = running if isinstance(running, RunningCost) else None
        self._gradient = None if isinstance(running, RunningCost) else running
        self._omega = omega
        self._derivative, self._weights, self._comm = net.activation.derivative, net.Y.weights, net.Y.comm
        self._step = 0
        #: The functional in the layer's coefficients of the bias, then of the kernel; 0 before the first step.
        self.functional: np.ndarray = np.zeros(())

    def state(self, moment: Moment) -> tuple[float, np.ndarray]:
        """The time t and f at a stage of the scheme."""
        if self._used is None:
            return self._between_steps(moment.t)
        step, stage = self._layer.stages[-1 - moment.step], self._used[moment.stage]
        return self._inputs.start + step.times[stage], step.values[stage]

    def _between_steps(self, s: float) -> tuple[float, np.ndarray]:
        t = self._layer.end - s
        return t, self._layer.path(t)

    def _slope_times(self, t: float, f: np.ndarray, r: np.ndarray) -> np.ndarray:
        """sigma'(u) r."""
        return self._derivative(self._layer.argument(t, f)) * r

    def linear_part(self, t: float, f: np.ndarray, r: np.ndarray) -> np.ndarray:
        """- B^T(sigma'(u) r), shape (nodes, samples)."""
        return -self._inputs.factors.transpose(self._layer.beta(t), self._slope_times(t, f, r))

    def rate(self, moment: Moment, r: np.ndarray) -> np.ndarray:
        """r_s, which is minus the r_t of (4.2a), shape (nodes, samples)."""
        return self._rate(*self.state(moment), r)

    def _rate(self, t: float, f: np.ndarray, r: np.ndarray) -> np.ndarray:
        r_s = self.linear_part(t, f, r)
        if self._cost is not None:
            return r_s + self._cost_slopes(self._cost, t, f)[0]
        gradient = self._gradient
        if gradient is None:
            return r_s
        # A user's function may fail on one rank: then all raise.
        return r_s + together(self._comm, lambda: real_array("running", gradient(t, f), f.shape))

    def _cost_slopes(self, cost: RunningCost, t: float, f: np.ndarray) -> list[np.ndarray]:
        """L_f and L_a, each sample with its weight: shape (nodes, samples) each."""
        a = self._inputs.bias.coefficients(self._layer.fraction(t))
        return [self._omega * part for part in together(self._comm, lambda: cost.slopes(f, a))]

    def integrate(self, step: Step) -> None:
        """Add the contribution of a step to the functional, by the quadrature of the scheme."""
        phi, psi = self._inputs.factors.phi, self._inputs.factors.psi
        for stage, i in enumerate(np.flatnonzero(step.weights)):
            t, f = self.state(Moment(step.times[i], self._step, stage))
            v = self._slope_times(t, f, step.values[i])
            fraction = self._layer.fraction(t)
            in_a, in_b = v.sum(axis=1), -phi.project(v) @ psi.project(f).T
            if self._cost is not None:
                in_a = in_a + self._cost_slopes(self._cost, t, f)[1].sum(axis=1)
                in_b += self._cost.kernel * self._inputs.factors.functional(self._layer.beta(t))
            in_bias = self._inputs.bias.pull_back(fraction, self._weights * in_a)
            in_kernel = self._inputs.beta.pull_back(fraction, in_b)
            self.functional = self.functional + step.length * step.weights[i] * np.concatenate([in_bias, in_kernel])
        self._step += 1

    def path(self, values: np.ndarray) -> Path:
        """The co-state at all times of the layer, from its values at the ends of the steps in the order of s.

        The values have shape (steps + 1, nodes, samples).
        """
        times = np.linspace(0.0, self._inputs.length, len(values))
        slopes = np.array([-self._rate(*self._between_steps(s), r) for s, r in zip(times, values)])
        return Path(self._inputs.start, self._layer.end, values[::-1], slopes[::-1])
