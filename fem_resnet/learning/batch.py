"""The data of a learning problem: samples, and what is known of them besides the targets at the final time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from types import NoneType
from typing import Any

import firedrake as fd
import numpy as np
from mpi4py import MPI

from fem_resnet.arguments import instance, integer, integer_array, number
from fem_resnet.fixed import read_only
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.ranks import same, watched

__all__ = ["Batch", "Derivatives", "Observations"]


def _comm_of(name: str, batch: object) -> MPI.Comm:
    """That of a batch from outside."""
    return watched(instance(name, batch, fd.Function, "Y.batch(values) makes one").function_space().mesh().comm)


def _frozen(given: object) -> object:
    """A copy of a list or an array, which nobody can change."""
    if isinstance(given, np.ndarray):
        return read_only(given.copy())
    return tuple(given) if isinstance(given, list) else given


@dataclass(frozen=True)
class Derivatives:
    """Directional derivatives of the target map, for derivative-informed training.

    Parameters
    ----------
    directions
        v, a batch on the network's label domain, as many samples as the batch has.
    targets
        C' = derivative of the target in v, a batch on the output's label domain.
    weight
        What the half squared difference counts, >= 0; no unit.

    Raises
    ------
    TypeError, ValueError
        If directions or targets are no Functions, or the weight is no such number, or differs between ranks.
    """

    directions: fd.Function
    targets: fd.Function
    weight: float = 1.0

    def __post_init__(self):
        same(_comm_of("directions", self.directions), weight=self.weight)
        instance("targets", self.targets, fd.Function, "Y.batch(values) makes one")
        object.__setattr__(self, "weight", number("weight", self.weight, least=0))


@dataclass(frozen=True)
class Observations:
    """What is observed at layer times, besides the targets of the batch at T.

    Parameters
    ----------
    layers
        Numbers l of the layer times t_l, shape (observations,), from 0 (f_I itself) to L, increasing.
    targets
        C_l, one an entry of `layers`: as the targets of a batch, for the same samples.
    weights
        Shape (observations,): what each counts beside the loss at T. Finite numbers >= 0, not divided by their sum; ones if
        left out. The lengths of layers make an integral over time.

    Raises
    ------
    TypeError, ValueError
        If the layers are no increasing integers >= 0, the weights no finite numbers >= 0, or there is not one of targets and
        weights a layer. `LearningProblem` compares them on all ranks.

    Examples
    --------
    >>> seen = Observations([2, 4], [half_way, later], [0.5, 1.0])  # doctest: +SKIP
    >>> batch = Batch(inputs, final, observations=seen)  # doctest: +SKIP
    """

    layers: Sequence[int]
    targets: Sequence[Sequence[int] | fd.Function]
    weights: Sequence[float] | None = None

    def __post_init__(self):
        layers = tuple(integer("layers", layer, least=0) for layer in _entries("layers", self.layers))
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"layers: expected increasing integers, got {layers}")
        targets = tuple(map(_frozen, _entries("targets", self.targets)))
        weights = self.weights
        if weights is not None:
            weights = tuple(number("weights", weight, least=0) for weight in _entries("weights", weights))
        for name, given in (("targets", targets), ("weights", weights)):
            if given is not None and len(given) != len(layers):
                raise ValueError(f"{name}: expected {len(layers)}, one a layer time, got {len(given)}")
        for target in targets:
            if not isinstance(target, fd.Function):
                integer_array("targets", target, ("samples",))
        for name, value in (("layers", layers), ("targets", targets), ("weights", weights)):
            object.__setattr__(self, name, value)


def _entries(name: str, given: Any) -> list:
    """The entries of a list from outside."""
    if isinstance(instance(name, given, (list, tuple, np.ndarray)), np.ndarray) and given.ndim == 0:
        raise TypeError(f"{name}: expected a list, got {given!r}")
    return list(given)


@dataclass(frozen=True)
class Batch:
    """Samples to learn from.

    Parameters
    ----------
    inputs
        f_I, a batch on the network's label domain.
    targets
        Class labels, one integer a sample, shape (samples,), for a head onto classes; else a batch C on the output's label
        domain.
    weights
        omega, shape (samples,), numbers >= 0 of which only the proportions matter; equal ones if left out.
    observations
        What is observed of these samples before T. J then has all its derivatives, but takes no checkpoints.
    derivatives
        Directional derivatives of the target map, which the output is to match too. J then has first derivatives only.

    Raises
    ------
    TypeError, ValueError
        If the inputs are no Function, labels or weights are not one a sample, another argument is of another kind; or they
        differ between ranks. Label domains and numbers of samples are compared by `LearningProblem`.
    """

    inputs: fd.Function
    targets: Sequence[int] | fd.Function
    weights: Sequence[float] | None = None
    _: KW_ONLY
    observations: Observations | None = None
    derivatives: Derivatives | None = None

    def __post_init__(self) -> None:
        same(
            _comm_of("inputs", self.inputs), targets=self.targets, weights=self.weights, observations=self.observations,
            derivatives=self.derivatives,
        )  # fmt: skip
        if not isinstance(self.targets, fd.Function):
            integer_array("targets", self.targets, (self.samples,))
        sample_weights(self.weights, self.samples)
        instance("observations", self.observations, (Observations, NoneType))
        instance("derivatives", self.derivatives, (Derivatives, NoneType))
        # Copies: what is recorded would not see that a list of the user's has changed, and what is evaluated would.
        for name in ("targets", "weights"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    @property
    def samples(self) -> int:
        """Number of samples."""
        shape = self.inputs.function_space().value_shape
        return shape[-1] if shape else 1
