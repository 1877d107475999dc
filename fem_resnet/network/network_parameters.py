"""The parameters of a network: bias and kernel, and where they are learned layer times and the kernel's factors.

They follow from the `Settings` and start at zero (a kernel of a set at the start of the set). All that layers take of them
is here too: `coefficients` says which coefficients a layer takes, `layer_inputs` what they are now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from fem_resnet.fixed import read_only
from fem_resnet.label_domain.basis import Basis
from fem_resnet.layers.inputs import LayerCoefficients, LayerInputs, LayerUse
from fem_resnet.network.settings import Kernel, Settings
from fem_resnet.parameters.kernel import KernelCoefficients, LowRankKernel, kernel_coefficients
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.retraction import Retraction
from fem_resnet.parameters.space_basis import BasisCoefficients, LayerTimes, NodalValues, SpaceBasis
from fem_resnet.parameters.time_basis import Once, TimeBasis, get_time_basis
from fem_resnet.tape.kernel_controls import KernelSetParameter

__all__ = ["NetworkParameters"]

_T = TypeVar("_T", bound=SpaceBasis)


class NetworkParameters:
    """Bias, kernel, and what else of a network can be learned.

    Parameters
    ----------
    settings
        What the network is made of.

    Attributes
    ----------
    bias, kernel : Parameter
        a and beta.
    layer_times : Parameter or None
        t_1 .. t_L, where they are learned.
    factors : tuple of Parameter
        "phi" and "psi", where they are learned.
    """

    def __init__(self, settings: Settings):
        kernel, bias, layers = settings.kernel, settings.bias, settings.layers
        self._Y, self._given_times = settings.Y, read_only(np.array(settings.times))
        self._given_factors = {"phi": settings.phi[0], "psi": settings.psi[0]} if kernel.learn_factors else {}
        self.bias = Parameter("bias", _one_or_one_a_layer(self._bias_basis, settings.bias_bases), self._in_time(bias.in_time))
        in_space = _one_or_one_a_layer(partial(_kernel_basis, kernel), settings.phi, settings.psi)
        in_time = self._in_time(kernel.in_time)
        self.kernel: Parameter = (
            Parameter("kernel", in_space, in_time)
            if kernel.among is None
            else KernelSetParameter(kernel.among, in_space, in_time)
        )
        self.layer_times = self._learned_times() if layers.learn_times else None
        self.factors = tuple(
            Parameter(name, Retraction(basis).inputs[0], Once(), penalised=False)
            for name, basis in self._given_factors.items()
        )

    def _bias_basis(self, basis: Basis | None) -> SpaceBasis:
        return NodalValues(self._Y) if basis is None else BasisCoefficients(basis)

    def _in_time(self, choice: str | Sequence[int]) -> TimeBasis:
        return get_time_basis(choice, self._given_times.tolist())

    def _learned_times(self) -> Parameter:
        times = Parameter("layer_times", LayerTimes(self._Y, self._given_times.size - 1), Once(), penalised=False)
        times.set(0, self._given_times[1:])
        return times

    @property
    def learned(self) -> list[Parameter]:
        """Bias, and kernel or the controls that it is made of; layer times and factors, where they are learned."""
        return [self.bias, self.kernel.learned, *([] if self.layer_times is None else [self.layer_times]), *self.factors]

    @property
    def times(self) -> np.ndarray:
        """Layer times t_0 .. t_L, shape (L + 1,), float64; no unit. Collective where they are learned."""
        return self._given_times if self.layer_times is None else read_only(np.append(0.0, self.layer_times.get(0)))

    def retractions(self) -> list[Retraction]:
        """New operators from the parameters "phi" and "psi" to the values of learned factors."""
        return list(map(Retraction, self._given_factors.values()))

    def coefficients(self) -> LayerCoefficients:
        """Which coefficients of bias and kernel each layer takes, at the present layer times."""
        return LayerCoefficients(self.bias, self.kernel, self.times, range(self._given_times.size - 1))

    def learned_on(self, layers: range) -> LayerCoefficients:
        """Which coefficients these layers take of all that is learned: layer times and factors too."""
        times = self._given_times if self.layer_times is None else self.layer_times
        return LayerCoefficients(self.bias, self.kernel, times, layers, [p.space_basis for p in self.factors])

    def layer_inputs(self) -> list[LayerInputs]:
        """What each layer takes at the present parameters: times, factors, a and beta over time. Collective."""
        coefficients = self.coefficients()
        inputs = coefficients.on_layers([slot.read(p) for slot, p in zip(coefficients.slots, coefficients.functions)])
        if not self.factors:
            return inputs
        learned = self.learned_factors()
        return [part._replace(factors=learned) for part in inputs]

    def learned_factors(self) -> LowRankKernel:
        """The factors at present: the given ones, or what training has made of them. Collective."""
        if not self.factors:
            return kernel_coefficients(self.kernel.space_basis).kernel
        phi, psi = (
            Basis(self._Y, retraction.forward([p.get(0)], False), "given")
            for retraction, p in zip(self.retractions(), self.factors)
        )
        return LowRankKernel(phi, psi)

    def factors_on(self, layer: int) -> LowRankKernel:
        """The factors of a layer's kernel, where they are fixed."""
        return kernel_coefficients(self.kernel.on_layer(layer)).kernel

    def is_constant(self, layer: int) -> bool:
        """Whether a layer takes nothing that varies in its time, and no times or factors that are learned."""
        fixed = not self.factors and self.layer_times is None
        return fixed and all(LayerUse(p, layer).is_constant for p in (self.bias, self.kernel))

    def kind(self, layer: int) -> tuple[int, ...]:
        """What of a layer its stepper depends on: the rank of psi, and the numbers of coefficients."""
        rank = self.factors_on(layer).psi.rank
        uses = (LayerUse(p, layer) for p in (self.bias, self.kernel))
        return rank, *(len(use.active) * math.prod(use.basis.shape) for use in uses)


def _one_or_one_a_layer(make: Callable[..., _T], *bases: Sequence[Basis | None]) -> _T | list[_T]:
    """Space bases from bases that are one for all layers, or one a layer; the same object from the same bases."""
    layers = max(map(len, bases))
    columns = [list(given) * layers if len(given) == 1 else given for given in bases]
    made = {key: make(*key) for key in dict.fromkeys(zip(*columns))}
    return [made[key] for key in zip(*columns)] if layers > 1 else next(iter(made.values()))


def _kernel_basis(kernel: Kernel, phi: Basis, psi: Basis) -> KernelCoefficients:
    couplings = None if kernel.among is None else kernel.among.couplings()
    return KernelCoefficients(LowRankKernel(phi, psi, couplings), kernel.learn_factors)
