"""What layers take of the parameters: coefficients in time, times, kernel factors, and the transpose of all that.

A segment of layers sees its coefficients as a list of arrays; each layer takes from it what is active there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np

from fem_resnet.label_domain.basis import Basis
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import NodalValues, StateValues

__all__ = ["FactorDirections", "LayerCoefficients", "LayerInputs", "LayerUse", "OnLayer"]


class LayerUse:
    """How one layer uses a parameter, whatever its coefficients are.

    Parameters
    ----------
    parameter
        The parameter.
    layer
        Number of the layer.

    Attributes
    ----------
    active : sequence of int
        Numbers of the coefficients that are active there.
    basis : SpaceBasis
        Their basis in space.
    is_constant, is_nodal : bool
        Whether it is the same at all times of the layer, and whether what is expanded are the coefficients themselves.
    """

    def __init__(self, parameter: Parameter, layer: int):
        self.active = parameter.time_basis.active(layer)
        self.basis = parameter.on_layer(layer)
        self.weights = partial(parameter.time_basis.weights, layer)
        self.is_constant = self.weights(0.0) == self.weights(1.0) == (1.0,)
        self.is_nodal = isinstance(self.basis, NodalValues)


class OnLayer:
    """What one layer sees of a parameter: its active coefficients, expanded once, as a function of time.

    The time is the fraction s in [0, 1] of the layer.
    """

    def __init__(self, use: LayerUse, coefficients: Sequence[np.ndarray]):
        self._basis, self._weights = use.basis, use.weights
        self.is_constant, self.is_nodal = use.is_constant, use.is_nodal
        self._coefficients = coefficients
        self._values = [self._basis.expand(c) for c in coefficients]

    @property
    def size(self) -> int:
        """Number of active coefficients on this rank."""
        return sum(c.size for c in self._coefficients)

    def coefficients(self, s: float) -> np.ndarray:
        """`p`, what the layer takes at the fraction s of its time."""
        if self.is_constant:
            return self._values[0]
        weights = self._weights(s)
        return sum(weight * value for weight, value in zip(weights, self._values))

    def pull_back(self, s: float, dual: np.ndarray) -> np.ndarray:
        """Transpose of `coefficients(s)`: functionals of all active coefficients, one after the other. Collective."""
        pulled = self._basis.pull_back(dual).ravel()
        if self.is_constant:
            return pulled
        weights = self._weights(s)
        return np.concatenate([weight * pulled for weight in weights])


@dataclass(frozen=True)
class FactorDirections:
    """Directions of the values of Phi and Psi at the nodes, shape (nodes, rank), and of M Psi."""

    phi: np.ndarray
    psi: np.ndarray
    weighted: np.ndarray


class LayerInputs(NamedTuple):
    """All that one solve of a layer takes besides its initial state; or the directions of all that.

    Attributes
    ----------
    start, length : float
        When the layer begins, and its length in t.
    factors : LowRankKernel or FactorDirections or None
        The kernel's factors; of directions None where the factors are fixed.
    bias, beta : OnLayer
        a and beta.
    learns_length, learns_factors : bool
        Whether functionals of the length, and of the factors' values, are wanted.
    """

    start: float
    length: float
    factors: LowRankKernel | FactorDirections | None
    bias: OnLayer
    beta: OnLayer
    learns_length: bool = False
    learns_factors: bool = False


class LayerCoefficients:
    """Which coefficients a run of layers sees, each once, though several layers may share it.

    Parameters
    ----------
    bias, kernel
        The parameters.
    times
        All layer times, shape (L + 1,), where they are fixed; or the parameter that holds t_1 .. t_L.
    factors
        How values of Phi and Psi are held, where they are learned.
    layers
        Numbers of the layers, consecutive.

    Attributes
    ----------
    slots : list of SpaceBasis
        One a set of coefficients; those of the factors come last.
    functions : list of Function
        What holds them, but for the factors.
    layers : range
        The numbers of the layers.
    """

    def __init__(
        self,
        bias: Parameter,
        kernel: Parameter,
        times: Sequence[float] | Parameter,
        layers: range,
        factors: Sequence[StateValues] = (),
    ):
        self.layers = layers
        self._times = times
        self._learns_times = isinstance(times, Parameter)
        self._kernel = kernel
        self._factors = list(factors)
        uses = [[(p, LayerUse(p, layer)) for p in (bias, kernel)] for layer in layers]
        keys = list(dict.fromkeys((p.name, k) for layer in uses for p, use in layer for k in use.active))
        parameters = {bias.name: bias, kernel.name: kernel}
        if self._learns_times:
            keys.append((times.name, 0))
            parameters[times.name] = times
            self._times_at = len(keys) - 1
        position = {key: position for position, key in enumerate(keys)}
        #: Each layer's number, and of bias and kernel the use and the positions of the active coefficients.
        self._layers = [
            (number, [(use, [position[p.name, k] for k in use.active]) for p, use in layer])
            for number, layer in zip(layers, uses)
        ]
        taken = Counter(at for _, layer in self._layers for _, positions in layer for at in positions)
        self._shared = [at for at in range(len(keys) + len(self._factors)) if taken[at] != 1]
        self.slots = [parameters[name].space_bases[k] for name, k in keys] + self._factors
        self.functions = [parameters[name].functions[k] for name, k in keys]

    def on_layers(self, arrays: Sequence[np.ndarray], directions: bool = False) -> list[LayerInputs]:
        """What each layer takes, for coefficients in the order of `slots`; or the directions of that. Collective."""
        factors = self._factors_from(arrays, directions)
        times = self._all_times(arrays, directions)
        return [
            LayerInputs(
                times[layer],
                times[layer + 1] - times[layer],
                factors or (None if directions else self._kernel.on_layer(layer).kernel),
                *[OnLayer(use, [arrays[at] for at in positions]) for use, positions in uses],
                learns_length=self._learns_times,
                learns_factors=bool(self._factors),
            )
            for layer, uses in self._layers
        ]

    def _all_times(self, arrays, directions) -> np.ndarray:
        if self._learns_times:
            return np.concatenate([[0.0], arrays[self._times_at]])
        return np.zeros(len(self._times)) if directions else self._times

    def _factors_from(self, arrays, directions) -> LowRankKernel | FactorDirections | None:
        if not self._factors:
            return None
        Y = self._factors[0].Y
        phi, psi = arrays[-2:]
        if directions:
            return FactorDirections(phi, psi, Y.weights[:, None] * psi)
        return LowRankKernel(Basis(Y, phi, "learned"), Basis(Y, psi, "learned"))

    def collect(self, functionals: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Transpose of `on_layers`: functionals in the order of `slots` from those of each layer."""
        total: list = [None] * len(self.slots)
        for at in self._shared:
            total[at] = np.zeros(self.slots[at].shape)
        for (layer, uses), functional in zip(self._layers, functionals):
            start = 0

            def add(at):
                nonlocal start
                shape = self.slots[at].shape
                part = functional[start : start + prod(shape)].reshape(shape)
                start += part.size
                if total[at] is None:  # no other layer has it
                    total[at] = part
                else:
                    total[at] += part

            for _, positions in uses:
                for at in positions:
                    add(at)
            if self._learns_times:
                times = total[self._times_at]
                times[layer] += functional[start]  # t_(layer + 1), the end of this layer
                if layer > 0:
                    times[layer - 1] -= functional[start]
                start += 1
            for at in range(len(total) - len(self._factors), len(total)):
                add(at)
        return total
