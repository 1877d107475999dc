"""What layers take of the parameters: coefficients in time, times and kernel factors, and the transpose of that map.

`LayerCoefficients` maps the arrays of coefficients of consecutive layers to one `LayerInputs` a layer. There `OnLayer` is the
bias or the kernel as a function of time on that layer.
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
from fem_resnet.layers.sample_functionals import SampleFunctionals
from fem_resnet.parameters.kernel import LowRankKernel, kernel_coefficients
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import NodalValues, SpaceBasis
from fem_resnet.parameters.time_basis import TimeBasis

__all__ = ["FactorDirections", "LayerCoefficients", "LayerInputs", "LayerUse", "OnLayer"]


class LayerUse:
    """How one layer uses a parameter, whatever its coefficients are.

    Parameters
    ----------
    parameter
        The bias or the kernel.
    layer
        Number of the layer.

    Attributes
    ----------
    active : tuple of int
        Numbers of the coefficients that are active on the layer.
    basis : SpaceBasis
        The basis in space of these coefficients.
    weights : callable
        ``weights(s)``: the values of their time functions at the fraction s of the layer.
    is_constant, is_nodal : bool
        Whether the parameter is the same at all times of the layer, and whether its coefficients are values at the nodes.
    """

    def __init__(self, parameter: Parameter, layer: int):
        time_basis = parameter.time_basis
        assert isinstance(time_basis, TimeBasis), "bias and kernel have a basis in time"
        self.active = time_basis.active(layer)
        self.basis = parameter.on_layer(layer)
        self.weights = partial(time_basis.weights, layer)
        self.is_constant = self.weights(0.0) == self.weights(1.0) == (1.0,)
        self.is_nodal = isinstance(self.basis, NodalValues)


class OnLayer:
    """A parameter on one layer, as a function of the fraction s in [0, 1] of the layer's time.

    Parameters
    ----------
    use
        How the layer uses the parameter.
    coefficients
        The active coefficients, each of the shape of the basis in space.

    Attributes
    ----------
    is_constant, is_nodal : bool
        As for `LayerUse`.
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

    def equals(self, other: OnLayer) -> bool:
        """Whether another one is of the same basis and has the same coefficients."""
        same_basis = self._basis is other._basis and len(self._coefficients) == len(other._coefficients)
        return same_basis and all(map(np.array_equal, self._coefficients, other._coefficients))

    def coefficients(self, s: float) -> np.ndarray:
        """The bias at the nodes, shape (nodes,), or beta, shape (rank of phi, rank of psi), at the fraction s."""
        if self.is_constant:
            return self._values[0]
        weights = self._weights(s)
        values = (weight * value for weight, value in zip(weights, self._values))
        return sum(values)  # type: ignore[return-value]  # there is at least one

    def pull_back(self, s: float, functional: np.ndarray) -> np.ndarray:
        """Transpose of `coefficients(s)`. Collective.

        Parameters
        ----------
        s
            The fraction of the layer.
        functional
            The functional in the value at s, of the shape of that value.

        Returns
        -------
        numpy.ndarray
            The functionals in all active coefficients, one after the other, shape (size,).
        """
        pulled = self._basis.pull_back(functional).ravel()
        if self.is_constant:
            return pulled
        weights = self._weights(s)
        return np.concatenate([weight * pulled for weight in weights])


@dataclass(frozen=True)
class FactorDirections:
    """Directions of the values of Phi and Psi at the nodes, and of M Psi, each of shape (nodes, rank)."""

    phi: np.ndarray
    psi: np.ndarray
    weighted: np.ndarray


class LayerInputs(NamedTuple):
    """All that one solve of a layer takes besides its initial state; or a direction of all that.

    Attributes
    ----------
    start, length : float
        When the layer begins, and its length, in the unit of t.
    factors : LowRankKernel or None
        The kernel's factors; None in a direction.
    bias, beta : OnLayer
        a and beta.
    learns_length, learns_factors : bool
        Whether the length, and the factors' values, are learned, so that an adjoint computes functionals in them.
    factor_directions : FactorDirections or None
        In a direction, the directions of the factors; None where the factors are fixed.
    apart : SampleFunctionals or None
        What makes functionals of each sample apart, in an adjoint; None where they are added up over the samples.
    """

    start: float
    length: float
    factors: LowRankKernel
    bias: OnLayer
    beta: OnLayer
    learns_length: bool = False
    learns_factors: bool = False
    factor_directions: FactorDirections | None = None
    apart: SampleFunctionals | None = None


class LayerCoefficients:
    """The coefficients that consecutive layers see, each once, though several layers may share it.

    Parameters
    ----------
    bias, kernel
        The parameters.
    times
        All layer times, shape (L + 1,), where they are fixed; or the parameter that holds t_1 .. t_L.
    layers
        Numbers of the layers, consecutive.
    factors
        The slots of Phi and of Psi, where the factors are learned.

    Attributes
    ----------
    slots : list of SpaceBasis
        One a set of coefficients. The slots of the factors come last.
    functions : list of Function
        The Functions that hold the coefficients, without the factors.
    keys : list of (str, int)
        The names of their parameters, and their numbers there.
    layers : range
        As above.
    """

    def __init__(
        self,
        bias: Parameter,
        kernel: Parameter,
        times: Sequence[float] | np.ndarray | Parameter,
        layers: range,
        factors: Sequence[SpaceBasis] = (),
    ):
        self.layers = layers
        self._factors = list(factors)
        #: The factors of each layer's kernel, where they are fixed.
        self._kernels = [kernel_coefficients(kernel.on_layer(layer)).kernel for layer in layers]
        uses = [[(p, LayerUse(p, layer)) for p in (bias, kernel)] for layer in layers]
        keys = list(dict.fromkeys((p.name, k) for layer in uses for p, use in layer for k in use.active))
        parameters = {bias.name: bias, kernel.name: kernel}
        #: The layer times where they are fixed, else None; and where they are learned, their position among the slots.
        self._fixed_times: Sequence[float] | np.ndarray | None = None
        self._times_at: int | None = None
        if isinstance(times, Parameter):
            self._times_at = len(keys)
            keys.append((times.name, 0))
            parameters[times.name] = times
        else:
            self._fixed_times = times
        position = {key: position for position, key in enumerate(keys)}
        #: The number of each layer, and for its bias and its kernel the use and the positions of the active coefficients.
        self._layers = [
            (number, [(use, [position[p.name, k] for k in use.active]) for p, use in layer])
            for number, layer in zip(layers, uses)
        ]
        taken = Counter(at for _, layer in self._layers for _, positions in layer for at in positions)
        self._shared = [at for at in range(len(keys) + len(self._factors)) if taken[at] != 1]
        self.slots: list[SpaceBasis] = [parameters[name].space_bases[k] for name, k in keys]
        self.slots += self._factors
        self.functions = [parameters[name].functions[k] for name, k in keys]
        self.keys = keys

    def on_layers(self, arrays: Sequence[np.ndarray], directions: bool = False) -> list[LayerInputs]:
        """What each layer takes. Collective.

        Parameters
        ----------
        arrays
            The coefficients in the order of `slots`, each of the shape of its slot; or directions of the coefficients.
        directions
            Whether they are directions.
        """
        learned, moved = self._learned_factors(arrays, directions)
        times = self._all_times(arrays, directions)
        layers = []
        for kernel, (layer, uses) in zip(self._kernels, self._layers):
            bias, beta = (OnLayer(use, [arrays[at] for at in positions]) for use, positions in uses)
            layers.append(
                LayerInputs(
                    times[layer],
                    times[layer + 1] - times[layer],
                    None if directions else learned or kernel,
                    bias,
                    beta,
                    self._times_at is not None,
                    bool(self._factors),
                    moved,
                )
            )
        return layers

    def _all_times(self, arrays: Sequence[np.ndarray], directions: bool) -> Sequence[float] | np.ndarray:
        if self._fixed_times is None:
            return np.concatenate([[0.0], arrays[self._times_at]])
        return np.zeros(len(self._fixed_times)) if directions else self._fixed_times

    def _learned_factors(
        self, arrays: Sequence[np.ndarray], directions: bool
    ) -> tuple[LowRankKernel | None, FactorDirections | None]:
        """The learned factors, or their directions."""
        if not self._factors:
            return None, None
        Y = self._factors[0].Y
        phi, psi = arrays[-2:]
        if directions:
            return None, FactorDirections(phi, psi, Y.weights[:, None] * psi)
        return LowRankKernel(Basis(Y, phi, "learned"), Basis(Y, psi, "learned")), None

    def collect(self, functionals: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Transpose of `on_layers`.

        Parameters
        ----------
        functionals
            Of each layer the functionals in its coefficients, one after the other, shape (number of coefficients,).

        Returns
        -------
        list of numpy.ndarray
            The functional in each set of coefficients, in the order of `slots`, of the slot's shape.
        """
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
                if total[at] is None:  # no other layer has these coefficients
                    total[at] = part
                else:
                    total[at] += part

            for _, positions in uses:
                for at in positions:
                    add(at)
            if self._times_at is not None:
                times = total[self._times_at]
                times[layer] += functional[start]  # t_(layer + 1), the end of this layer
                if layer > 0:
                    times[layer - 1] -= functional[start]
                start += 1
            for at in range(len(total) - len(self._factors), len(total)):
                add(at)
        return total
