"""The network of an estimator: made from numbers and a recipe of its label domain, so that it can be made again elsewhere.

    f_I,c = sum_m V_cm u_m,     f_t = sigma(a - B f),  0 < t < L,     O = X (W g(L) + mu)

One step of Euler's method a layer of length one makes it a residual network. Fields u, kernels and the output are in Laplace
eigenfunctions; where the recipe has symmetries, all of them keep these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np

from fem_resnet.estimators.domain import DomainRecipe
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.repeated_basis import RepeatedBasis
from fem_resnet.learning.head import Head
from fem_resnet.learning.lift import Lift
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.settings import Bias, Kernel
from fem_resnet.parameters.equivariant import invariant_functions
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.symmetric_kernels import Symmetric

__all__ = ["Design", "Model"]

#: The size of kernels at the start.
GAIN = 3.0


@dataclass(frozen=True)
class Design:
    """The numbers that say what a network is, beside its label domain.

    Attributes
    ----------
    rank, channels, layers : int
        Functions of a channel, channels, and layers.
    activation : str
        The name of sigma.
    fields : int
        How many fields an input has.
    outputs : int
        How many numbers an output has; 0 for a function on the label domain.
    prediction : str
        "softmax" for classes, else "identity".
    """

    rank: int
    channels: int
    layers: int
    activation: str
    fields: int
    outputs: int
    prediction: str


class Model:
    """A network, its lift and its head. Collective over the communicator of the label domain.

    Parameters
    ----------
    recipe
        How the label domain is made.
    design
        What the network is.

    Attributes
    ----------
    net, lift, head
        The parts.
    """

    def __init__(self, recipe: DomainRecipe, design: Design):
        one, symmetries = recipe.basis(design.rank), recipe.kept_symmetries()
        phi: Basis = RepeatedBasis(Channels(one.Y, design.channels), one) if design.channels > 1 else one
        seen = invariant_functions(phi, *symmetries) if symmetries else phi
        self._of_bias = seen
        self.net = ResidualNetwork(
            Kernel(phi, among=Symmetric(phi, *symmetries) if symmetries else None),
            bias=Bias(seen),
            layers=design.layers,
            final_time=float(design.layers),
            activation=design.activation,
            solver_parameters={"ts_type": "rk", "ts_rk_type": "1fe"},
        )
        self.lift = Lift(phi.Y, design.fields, symmetries=symmetries)
        if design.outputs:
            self.head = Head(seen, design.outputs, design.prediction)
        else:
            self.head = Head(phi, one, design.prediction, symmetries=symmetries)

    @property
    def parameters(self) -> list[Parameter]:
        """Those of the network, the lift and the head."""
        return [*self.net.parameters, *self.lift.parameters, *self.head.parameters]

    def start(self, seed: int) -> None:
        """Starting values that depend on the seed alone. Collective.

        Biases are a random constant in each channel. Without them a network with an odd sigma is an odd map, and where it
        commutes with turns that take waves to minus themselves, no gradient leads away from that.

        Parameters
        ----------
        seed
            Of random numbers.
        """
        self.net.start("random smooth", seed, gain=GAIN)
        random, Y = np.random.default_rng(seed), self.net.Y
        for k in range(self.net.layers):
            constants = np.repeat(random.normal(size=Y.channels), Y.one.nodes)[:, None]
            self.net.bias.write(k, np.linalg.solve(self._of_bias.gram, self._of_bias.project(constants))[:, 0])
        self.lift.start("apart" if self.net.Y.channels == 1 else "random", seed)
        self.head.start("zero")

    def arrays(self) -> list[np.ndarray]:
        """All coefficients, the same on every rank. Collective."""
        return [parameter.read(k) for parameter in self.parameters for k in range(len(parameter.functions))]

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        """Take the coefficients that `arrays` has given. Collective.

        Parameters
        ----------
        arrays
            One for each function in time of each parameter.
        """
        places = [(parameter, k) for parameter in self.parameters for k in range(len(parameter.functions))]
        for (parameter, k), array in zip(places, arrays, strict=True):
            parameter.set(k, array)

    def final(self, fields: fd.Function) -> fd.Function:
        """f(T) for a batch of fields. Collective."""
        return self.net(self.lift(fields))
