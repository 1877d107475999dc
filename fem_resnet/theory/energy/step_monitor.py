"""What the monitors of `energy` and `growth` share: they measure a solution at its start and after every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import numpy as np

from fem_resnet.arguments import instance
from fem_resnet.costate.trajectory import LayerTrajectory
from fem_resnet.fixed import Fixed
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.run import Run
from fem_resnet.time_stepping.evolution import Step

__all__ = ["StepMonitor"]


class StepMonitor(Fixed, ABC):
    """A monitor for `follow_trajectory` that also measures a run at its layer times (`watch`).

    Parameters
    ----------
    net
        The network, at its present coefficients.

    Attributes
    ----------
    times : list of float
        The times of the measurements so far, in the unit of t.
    """

    def __init__(self, net: ResidualNetwork):
        self._net, self._Y, self._sigma = net, net.Y, net.activation
        self.times: list[float] = []

    @abstractmethod
    def _measure_start(self, layer: LayerTrajectory, t: float, f: np.ndarray) -> None:
        """Measure f at the start of the first layer."""

    @abstractmethod
    def _measure_step(self, layer: LayerTrajectory, end: float, step: Step) -> None:
        """Measure after a step that ends at the time `end`."""

    @abstractmethod
    def _measure_layer(self, layer: LayerTrajectory, before: np.ndarray, f: np.ndarray) -> None:
        """Measure f at the end of a layer of a run; `before` is f at its start."""

    def __call__(self, layer: LayerTrajectory, step: Step) -> None:
        """Measure after a step. Collective over the ranks of the label domain.

        Parameters
        ----------
        layer
            The layer that the step belongs to.
        step
            The step.

        Raises
        ------
        TypeError
            If an argument is of another class.
        """
        instance("layer", layer, LayerTrajectory)
        instance("step", step, Step)
        start = layer.inputs.start
        if not self.times:
            self._measure_start(layer, start, step.first)
        self._measure_step(layer, start + step.start + step.length, step)

    def watch(self, run: Run) -> Self:
        """Measure a run at its layer times, and return the monitor. Collective over the ranks of the label domain.

        Parameters
        ----------
        run
            A run of the monitor's network.

        Raises
        ------
        TypeError, ValueError
            If `run` is no Run, or a run of another network.
        """
        if instance("run", run, Run).net is not self._net:
            raise ValueError(f"run: expected a run of {self._net!r}, got a run of {run.net!r}")
        states = (self._Y.values(f) for f in run.states())
        before = next(states)
        for inputs, f in zip(self._net.layer_inputs(), states, strict=True):
            layer = LayerTrajectory(inputs, None, [])
            if not self.times:
                self._measure_start(layer, inputs.start, before)
            self._measure_layer(layer, before, f)
            before = f
        return self

    def _refuse_nothing(self) -> None:
        """Raise a ValueError if nothing was measured yet."""
        if not self.times:
            raise ValueError(
                f"{type(self).__name__}: nothing was measured yet; give it to follow_trajectory, or let it watch a run"
            )
