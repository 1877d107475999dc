"""Parameters: a space basis times a time basis.

The bias a(y, t) and the kernel b(y, z, t) are both of the form

    p(t) = sum_k theta_k(t) E c_k,

theta_k a time basis (`time_basis`), c_k coefficients in space, each held in a Firedrake Function that is a control,
and E what a layer takes: the values at the nodes for a bias, the matrix beta for a kernel. Each c_k may have a space
basis of its own, E = E_k, so that layers differ in their bases. With the measure of label domain and time, lumped in t,
the inner product of coefficients is

    (c_k, d_k) = tau_k <R_k c_k, d_k>,      tau_k = int_0^T theta_k dt,

R_k the Riesz operator of the space basis (M; a Gram matrix; a pair of them). Every Control carries its inverse.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np
import scipy.linalg
from pyadjoint import Control

from fem_resnet.basis import Basis
from fem_resnet.kernel import LowRankKernel
from fem_resnet.label_space import BatchValues, LabelSpace
from fem_resnet.time_basis import AtStart, Once, TimeBasis

__all__ = ["BasisCoefficients", "KernelCoefficients", "LayerCoefficients", "NodalValues", "Parameter", "StateValues"]


class SpaceBasis(ABC):
    """How coefficients in space are held, and what they stand for.

    Laws: `expand` is linear and `pull_back` its transpose, `<d, expand(c)> = <pull_back(d), c>` with the plain sums
    over what all ranks own; `primal(dual(c)) = c`.
    """

    #: The label domain, whose communicator is that of everything collective here.
    Y: LabelSpace
    #: Firedrake space of the Functions that hold coefficients.
    space: fd.functionspaceimpl.WithGeometry
    #: Shape of the coefficients on this rank.
    shape: tuple[int, ...]

    @abstractmethod
    def read(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """The coefficients held by a Function (or Cofunction) of `space`. Collective."""

    @abstractmethod
    def write(self, function: fd.Function | fd.Cofunction, coefficients: np.ndarray) -> None:
        """Make a Function (or Cofunction) of `space` hold coefficients."""

    @abstractmethod
    def expand(self, coefficients: np.ndarray) -> np.ndarray:
        """What a layer takes: `E c`."""

    @abstractmethod
    def pull_back(self, dual: np.ndarray) -> np.ndarray:
        """`E^T d`. Collective."""

    @abstractmethod
    def dual(self, coefficients: np.ndarray) -> np.ndarray:
        """`R c`."""

    @abstractmethod
    def primal(self, dual: np.ndarray) -> np.ndarray:
        """`R^-1 d`."""

    @abstractmethod
    def stiffness(self, coefficients: np.ndarray) -> np.ndarray:
        """`S c`, so that `<S c, c>` is the integral of the squared gradients. Collective."""

    @abstractmethod
    def pair(self, dual: np.ndarray, coefficients: np.ndarray) -> float:
        """`<d, c>`, the sum over what all ranks own. Collective."""


class NodalValues(SpaceBasis):
    """Values at the nodes of a label domain: R = M."""

    def __init__(self, Y: LabelSpace):
        self.Y = Y
        self.space = Y.V
        self.shape = (Y.nodes,)

    def read(self, function):
        return function.dat.data_ro.copy()

    def write(self, function, coefficients):
        function.dat.data_wo[...] = coefficients

    def expand(self, coefficients):
        return coefficients

    def pull_back(self, dual):
        return dual

    def dual(self, coefficients):
        return self.Y.weights * coefficients

    def stiffness(self, coefficients):
        return self.Y.apply_stiffness(coefficients[:, None])[:, 0]

    def primal(self, dual):
        return dual / self.Y.weights

    def pair(self, dual, coefficients):
        return float(self.Y.sum(dual @ coefficients))


class StateValues(SpaceBasis):
    """Values of a batch at the nodes of a label domain, shape (nodes, samples): R = M for each sample."""

    def __init__(self, Y: LabelSpace, space: fd.functionspaceimpl.WithGeometry):
        self._values = BatchValues(Y, space)
        self.Y = Y
        self.space = space
        self.shape = (Y.nodes, self._values.samples)

    def read(self, function):
        return self._values.read(function).copy()

    def write(self, function, coefficients):
        self._values.write(function, coefficients)

    def expand(self, coefficients):
        return coefficients

    def pull_back(self, dual):
        return dual

    def dual(self, coefficients):
        return self.Y.weights[:, None] * coefficients

    def stiffness(self, coefficients):
        return self.Y.apply_stiffness(coefficients)

    def primal(self, dual):
        return dual / self.Y.weights[:, None]

    def pair(self, dual, coefficients):
        return float(self.Y.sum(np.einsum("is,is->", dual, coefficients)))


class _Replicated(SpaceBasis):
    """A few numbers, the same on every rank: one cell of a mesh of its own holds them, and its owner broadcasts."""

    def __init__(self, Y: LabelSpace, shape: tuple[int, ...]):
        mesh, self._owner = Y.coefficient_mesh
        self.Y = Y
        self.shape = shape
        self.space = fd.TensorFunctionSpace(mesh, "DG", 0, shape=shape)

    def read(self, function):
        coefficients = np.empty(self.shape)
        if self.Y.comm.rank == self._owner:
            coefficients[...] = function.dat.data_ro.reshape(self.shape)
        if self.Y.comm.size > 1:
            self.Y.comm.Bcast(coefficients, root=self._owner)
        return coefficients

    def write(self, function, coefficients):
        values = function.dat.data_wo
        if self.Y.comm.rank == self._owner:
            values[...] = np.reshape(coefficients, values.shape)

    def pair(self, dual, coefficients):
        return float(np.sum(dual * coefficients))


class BasisCoefficients(_Replicated):
    """Coefficients alpha of `a = X alpha` in a basis: R = G."""

    def __init__(self, basis: Basis):
        super().__init__(basis.Y, (basis.rank,))
        self.basis = basis
        self._factor = scipy.linalg.cho_factor(basis.gram)

    def expand(self, coefficients):
        return self.basis.values @ coefficients

    def pull_back(self, dual):
        return self.Y.sum(self.basis.values.T @ dual)

    def dual(self, coefficients):
        return self.basis.gram @ coefficients

    def stiffness(self, coefficients):
        return self.basis.stiffness @ coefficients

    def primal(self, dual):
        return scipy.linalg.cho_solve(self._factor, dual)


class KernelCoefficients(_Replicated):
    """The matrix beta of a low-rank kernel: R = G_Phi x G_Psi."""

    def __init__(self, kernel: LowRankKernel):
        super().__init__(kernel.phi.Y, kernel.shape)
        self.kernel = kernel

    def expand(self, coefficients):
        return coefficients

    def pull_back(self, dual):
        return dual

    def dual(self, coefficients):
        return self.kernel.dual(coefficients)

    def stiffness(self, coefficients):
        return self.kernel.stiffness(coefficients)

    def primal(self, dual):
        return self.kernel.primal(dual)


class Parameter:
    """A bias or kernel that the network may learn: coefficients c_k in space, one set a time basis function.

    Parameters
    ----------
    name
        How messages, files and Functions call it.
    space_basis
        The basis in space: one for all layers, or a list with one a layer.
    time_basis
        The basis in time. Layers on which one of its functions is active have the same basis in space.
    functions
        What holds the coefficients; new Functions if left out.

    Attributes
    ----------
    space_bases : list of SpaceBasis
        The basis in space of each c_k.
    functions : list of Function
        The coefficients c_k, zero at first. Assign to them, or use `set`.

    Raises
    ------
    ValueError
        If layers of different bases in space share coefficients.
    """

    def __init__(
        self,
        name: str,
        space_basis: SpaceBasis | Sequence[SpaceBasis],
        time_basis: TimeBasis | Once | AtStart,
        functions: Sequence[fd.Function] | None = None,
    ):
        self.name = name
        self.time_basis = time_basis
        self._space_basis = space_basis
        if isinstance(space_basis, SpaceBasis):
            self.space_bases = [space_basis] * len(time_basis.measures)
        else:
            self.space_bases = _of_time_functions(name, space_basis, time_basis)
        self.functions = (
            [fd.Function(basis.space, name=f"{name}_{k}") for k, basis in enumerate(self.space_bases)]
            if functions is None
            else list(functions)
        )

    def __repr__(self) -> str:
        kinds = ", ".join(sorted({type(basis).__name__ for basis in self.space_bases}))
        return f"Parameter({self.name}, {kinds}, {len(self.functions)} in time)"

    @property
    def space_basis(self) -> SpaceBasis:
        """The basis in space, where it is one for all times.

        Raises
        ------
        ValueError
            If layers have bases of their own; `space_bases` has them.
        """
        if isinstance(self._space_basis, SpaceBasis):
            return self._space_basis
        if any(basis is not self.space_bases[0] for basis in self.space_bases):
            raise ValueError(f"space_basis: {self.name} has bases of its own in each layer; space_bases lists them")
        return self.space_bases[0]

    @property
    def dim(self) -> int:
        """Number of coefficients in all, over all ranks."""
        return sum(function.function_space().dim() for function in self.functions)

    def get(self, k: int) -> np.ndarray:
        """Coefficients c_k: a copy; the owned nodes for nodal values, else all of them. Collective."""
        return self.space_bases[k].read(self.functions[k])

    def set(self, k: int, coefficients: np.ndarray) -> None:
        """Assign coefficients c_k. Collective.

        Raises
        ------
        ValueError
            If their shape does not fit, or one is not finite; on all ranks alike.
        """
        coefficients = np.asarray(coefficients, dtype=float)
        basis = self.space_bases[k]
        basis.Y.agree(
            coefficients.shape == basis.shape,
            f"coefficients: shape {basis.shape} is wanted for {self.name}, {coefficients.shape} was given",
        )
        basis.Y.agree(
            bool(np.isfinite(coefficients).all()),
            f"coefficients: the ones given for {self.name}_{k} are not all finite",
        )
        basis.write(self.functions[k], coefficients)

    def controls(self) -> list[Control]:
        """One pyadjoint Control a time basis function, with the Riesz map of label domain and time."""
        return [Control(function, riesz_map=self.riesz_map(k)) for k, function in enumerate(self.functions)]

    def riesz_map(self, k: int):
        """The map from functionals of c_k (Cofunctions) to their representatives, `d -> R^-1 d / tau_k`."""
        basis, measure = self.space_bases[k], self.time_basis.measures[k]

        def riesz_map(dual: fd.Cofunction) -> fd.Function:
            primal = fd.Function(basis.space)
            basis.write(primal, basis.primal(basis.read(dual)) / measure)
            return primal

        return riesz_map

    def inner(self, k: int, c: np.ndarray, d: np.ndarray) -> float:
        """`tau_k <R c, d>`, the inner product of two sets of coefficients for basis function k. Collective."""
        basis = self.space_bases[k]
        return self.time_basis.measures[k] * basis.pair(basis.dual(c), d)

    def on_layer(self, layer: int) -> SpaceBasis:
        """The basis in space of the coefficients that are active on a layer."""
        return self.space_bases[self.time_basis.active(layer)[0]]


def _of_time_functions(name: str, bases: Sequence[SpaceBasis], time_basis: TimeBasis) -> list[SpaceBasis]:
    """The basis in space of each function in time, from those of the layers where it is active."""
    first: dict[int, int] = {}
    for layer, basis in enumerate(bases):
        for k in time_basis.active(layer):
            other = first.setdefault(k, layer)
            if bases[other] is not basis:
                raise ValueError(
                    f"{name}_in_time: layers {other} and {layer} share coefficients of {name}, but have different "
                    f'bases in space; give both one basis, or coefficients of their own ("layers")'
                )
    return [bases[first[k]] for k in range(len(time_basis.measures))]


class OnLayer:
    """What one layer sees of a parameter: its active coefficients, expanded once, as a function of time.

    The time is the fraction s in [0, 1] of the layer.
    """

    def __init__(self, parameter: Parameter, layer: int, coefficients: Sequence[np.ndarray]):
        self._basis = parameter.on_layer(layer)
        self._weights = lambda s: parameter.time_basis.weights(layer, s)
        self._values = [self._basis.expand(c) for c in coefficients]
        #: Number of active coefficients on this rank.
        self.size = sum(np.size(c) for c in coefficients)

    def coefficients(self, s: float) -> np.ndarray:
        """`p`, what the layer takes at the fraction s of its time."""
        weights = self._weights(s)
        if weights == (1.0,):
            return self._values[0]
        return sum(weight * value for weight, value in zip(weights, self._values))

    def pull_back(self, s: float, dual: np.ndarray) -> np.ndarray:
        """Transpose of `coefficients(s)`: functionals of all active coefficients, one after the other. Collective."""
        pulled = self._basis.pull_back(dual).ravel()
        return np.concatenate([weight * pulled for weight in self._weights(s)])


@dataclass(frozen=True)
class LayerInputs:
    """All that one solve of a layer takes besides its initial state: its times, the kernel's factors, a and beta."""

    start: float
    end: float
    factors: LowRankKernel
    bias: OnLayer
    beta: OnLayer


class LayerCoefficients:
    """Which coefficients of bias and kernel a run of layers sees, each once, though several layers may share it.

    Parameters
    ----------
    bias, kernel
        The parameters.
    times
        All layer times.
    layers
        Numbers of the layers, consecutive.

    Attributes
    ----------
    slots : list of SpaceBasis
        One a set of coefficients.
    functions : list of Function
        What holds them.
    layers : range
        The numbers of the layers.
    """

    def __init__(self, bias: Parameter, kernel: Parameter, times: Sequence[float], layers: range):
        self.layers = layers
        self._times = times
        self._kernel = kernel
        self._layers = [
            (layer, [(p, [(p.name, k) for k in p.time_basis.active(layer)]) for p in (bias, kernel)])
            for layer in layers
        ]
        keys = dict.fromkeys(key for _, uses in self._layers for _, active in uses for key in active)
        parameters = {bias.name: bias, kernel.name: kernel}
        self._position = {key: position for position, key in enumerate(keys)}
        self.slots = [parameters[name].space_bases[k] for name, k in keys]
        self.functions = [parameters[name].functions[k] for name, k in keys]

    def on_layers(self, arrays: Sequence[np.ndarray]) -> list[LayerInputs]:
        """What each layer takes, for coefficients in the order of `slots`. Collective."""
        return [
            LayerInputs(
                self._times[layer],
                self._times[layer + 1],
                self._kernel.on_layer(layer).kernel,
                *(OnLayer(p, layer, [arrays[self._position[key]] for key in active]) for p, active in uses),
            )
            for layer, uses in self._layers
        ]

    def collect(self, functionals: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Transpose of `on_layers`: functionals in the order of `slots` from those of each layer."""
        total = [np.zeros(slot.shape) for slot in self.slots]
        for (_, uses), functional in zip(self._layers, functionals):
            start = 0
            for _, active in uses:
                for key in active:
                    target = total[self._position[key]]
                    target += functional[start : start + target.size].reshape(target.shape)
                    start += target.size
        return total
