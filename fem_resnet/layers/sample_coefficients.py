"""The coefficients that layers take, with functionals of each sample apart in all that is learned of bias and kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import numpy as np

from fem_resnet.label_domain.basis import Basis
from fem_resnet.layers.inputs import LayerCoefficients, LayerInputs
from fem_resnet.layers.sample_functionals import JoinedBasis, Products, SampleFunctionals, outer_products
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients, SpaceBasis
from fem_resnet.tape.kernel_controls import KernelSetParameter

__all__ = ["SampleCoefficients"]


class SampleCoefficients(LayerCoefficients):
    """The learned coefficients of bias and kernel as consecutive layers see them: for a kernel of a set its free controls.

    `collect` gives functionals of each sample apart.

    Parameters
    ----------
    bias, kernel
        The parameters; the bias has a basis on each layer.
    times
        All layer times, shape (L + 1,).
    layers
        Numbers of the layers, consecutive.
    samples
        Number of samples.
    """

    def __init__(self, bias: Parameter, kernel: Parameter, times: Sequence[float] | np.ndarray, layers: range, samples: int):
        super().__init__(bias, kernel, times, layers)
        self._samples = samples
        self._kernel = kernel if isinstance(kernel, KernelSetParameter) else None
        learned = {"bias": bias, "kernel": kernel.learned}
        self.slots = [learned[name].space_bases[k] for name, k in self.keys]
        self.functions = [learned[name].functions[k] for name, k in self.keys]
        #: Of each layer the basis of the bias, and what joins it with phi.
        self._bias_bases = [_basis(uses[0][0].basis) for _, uses in self._layers]
        self._joined = cache(JoinedBasis.of)
        #: Of linear sets, which have one derivative, by the bases of their kernels.
        self._of_linear: dict[SpaceBasis, Products] = {}

    def on_layers(self, arrays: Sequence[np.ndarray], directions: bool = False) -> list[LayerInputs]:
        """What each layer takes, with what makes functionals of each sample apart. Collective.

        Parameters
        ----------
        arrays
            The coefficients in the order of `slots`, each of the shape of its slot.
        directions
            False: there are no directions here.
        """
        made = list(arrays)
        products: dict[int, Products] = {}
        for at, (name, k) in enumerate(self.keys):
            if name == "kernel":
                products[at], made[at] = self._of_kernel(k, arrays[at])
        found = []
        for inputs, (_, uses), of_bias in zip(super().on_layers(made), self._layers, self._bias_bases):
            (bias, in_bias), (kernel, in_kernel) = uses
            size = sum(prod(self.slots[at].shape) for at in (*in_bias, *in_kernel))
            joined = self._joined(inputs.factors.phi, of_bias)
            in_time = bias.weights, kernel.weights
            apart = SampleFunctionals(inputs.factors, joined, in_time, [products[at] for at in in_kernel], size)
            found.append(inputs._replace(apart=apart))
        return found

    def _of_kernel(self, k: int, X: np.ndarray) -> tuple[Products, np.ndarray]:
        """What makes functionals in the controls of beta_k, and beta_k."""
        if self._kernel is None:
            return outer_products(np.shape(X)), X
        made = self._kernel.map(k)
        beta = made.forward([X], False)
        if not made.linear:
            return outer_products(beta.shape, made.derivative(X)), beta
        kind = self._kernel.space_bases[k]
        if kind not in self._of_linear:
            self._of_linear[kind] = outer_products(beta.shape, made.derivative(X))
        return self._of_linear[kind], beta

    def collect(self, functionals: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Transpose of `on_layers`, of each sample apart.

        Parameters
        ----------
        functionals
            Of each layer the functionals of its samples, shape (number of coefficients x samples,).

        Returns
        -------
        list of numpy.ndarray
            For each of `slots` an array of shape (number of coefficients, samples).
        """
        total = [np.zeros((prod(slot.shape), self._samples)) for slot in self.slots]
        for (_, uses), functional in zip(self._layers, functionals):
            rows, start = functional.reshape(-1, self._samples), 0
            for at in (at for _, positions in uses for at in positions):
                end = start + len(total[at])
                total[at] += rows[start:end]
                start = end
        return total


def _basis(space_basis: SpaceBasis) -> Basis:
    """The basis of a bias."""
    if not isinstance(space_basis, BasisCoefficients):
        raise ValueError("bias: expected a basis on each layer, got a value at every node; give the Bias a basis")
    return space_basis.basis
