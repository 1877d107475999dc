"""The samples of a learning problem: a batch held against the label domains of network and output, and its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import firedrake as fd
import numpy as np

from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.head import Head
from fem_resnet.learning.lift import Lift
from fem_resnet.network.network import ResidualNetwork

__all__ = ["Samples"]


class Samples:
    """A batch that fits a network and its output.

    Collective over the communicator of the network's label domain.

    Parameters
    ----------
    batch
        The batch, from outside.
    net, head
        The network, and its output; None for O = f(T).
    lift
        What makes the initial state of the inputs; None where they are it.

    Attributes
    ----------
    batch : Batch
        The batch.
    at_end : Function
        The targets at T as a batch on the output's label domain, also where the batch has class labels.
    before : list of tuple
        Number of the layer time, targets and weight of each observation before T.

    Raises
    ------
    ValueError
        If the batch does not fit; the message names the part.
    """

    def __init__(self, batch: Batch, net: ResidualNetwork, head: Head | None, lift: Lift | None = None):
        self._Y, self._head = net.Y if lift is None else lift.fields, head
        self._output: LabelSpace = net.Y if head is None else head.Y
        self.batch = batch
        Y = self._Y
        Y.check_batch(batch.inputs, "batch.inputs")
        if Y.samples(batch.inputs.function_space()) != batch.samples:  # with channels one Function has a batch's shape
            raise ValueError(f"batch.inputs: expected a batch of {Y!r}, got a Function of its space; give Y.batch(inputs)")
        self.at_end = self._targets(batch.targets, "batch.targets")
        self.before = self._before_end(net.layers)
        self._check_derivatives()

    def _targets(self, targets: Sequence[int] | fd.Function, name: str) -> fd.Function:
        if not isinstance(targets, fd.Function):
            if self._head is None or self._head.classes is None:
                raise ValueError(f"{name}: expected a batch on {self._output!r}, as there are no classes; got labels")
            targets = self._head.labelled(targets, name)
        self._output.check_batch(targets, name)
        self._check_number(self._output, targets, name)
        return targets

    def _check_number(self, Y: LabelSpace, function: fd.Function, name: str) -> None:
        samples, given = self.batch.samples, Y.samples(function.function_space())
        if given != samples:
            raise ValueError(f"{name}: expected {samples} samples, as many as inputs, got {given}")

    def _before_end(self, L: int) -> list[tuple[int, fd.Function, float]]:
        observations = self.batch.observations
        if observations is None:
            return []
        layers, weights = observations.layers, observations.weights
        weights = (1.0,) * len(layers) if weights is None else weights
        if layers and layers[-1] > L:
            raise ValueError(f"observations.layers: expected increasing integers from 0 to L = {L}, got {layers}")
        targets = [self._targets(part, "observations.targets") for part in observations.targets]
        return list(zip(layers, targets, weights))

    def _check_derivatives(self) -> None:
        derivatives = self.batch.derivatives
        if derivatives is None:
            return
        for name, Y, function in (
            ("directions", self._Y, derivatives.directions), ("targets", self._output, derivatives.targets),
        ):  # fmt: skip
            Y.check_batch(function, f"derivatives.{name}")
            self._check_number(Y, function, f"derivatives.{name}")

    def minibatches(self, size: int, seed: int | None) -> list[Batch]:
        """The batch in pieces, the last padded with samples of weight 0: see `LearningProblem.minibatches`.

        Parameters
        ----------
        size
            Number of samples in each.
        seed
            Shuffles the samples first; left in order without one.
        """
        weights, order = self._ordered(seed)
        chosen, weighted = [], []
        for start in range(0, order.size, size):
            part = order[start : start + size]
            chosen.append(np.concatenate([part, np.repeat(order[:1], size - len(part))]))
            weighted.append(np.where(np.arange(size) < len(part), weights[chosen[-1]], 0.0).tolist())
        return self._parts(chosen, weighted)

    def folds(self, count: int, seed: int | None) -> list[tuple[Batch, Batch]]:
        """The batch without each of its parts, and that part: see `LearningProblem.folds`.

        Parameters
        ----------
        count
            Number of parts, at most that of the samples with a positive weight.
        seed
            Shuffles the samples first; left in order without one.

        Raises
        ------
        ValueError
            If there are fewer samples than parts.
        """
        weights, order = self._ordered(seed)
        if count > order.size:
            raise ValueError(f"count: expected an integer from 2 to {order.size}, the number of samples, got {count}")
        parts = np.array_split(order, count)
        chosen = [np.sort(part) for held_out in range(count) for part in (
            np.concatenate([*parts[:held_out], *parts[held_out + 1 :]]), parts[held_out],
        )]  # fmt: skip
        given = None if self.batch.weights is None else weights
        batches = self._parts(chosen, [None if given is None else given[part].tolist() for part in chosen])
        return list(zip(batches[::2], batches[1::2]))

    def _ordered(self, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The weights of all samples, and the numbers of those whose weight is positive, shuffled by a seed."""
        weights = sample_weights(self.batch.weights, self.batch.samples)
        order = np.arange(weights.size)
        if seed is not None:
            order = np.random.default_rng(seed).permutation(weights.size)
        return weights, order[weights[order] > 0]

    def _parts(self, chosen: Sequence[np.ndarray], weights: Sequence[list[float] | None]) -> list[Batch]:
        """One batch for each array of numbers of samples, with these weights. Collective."""

        def of(Y: LabelSpace, batch: fd.Function) -> list[fd.Function]:
            values = Y.values(batch)  # read once for all parts: with channels that is a copy of the whole batch
            return [Y.batch(values.take(numbers, axis=1)) for numbers in chosen]

        given = self.batch
        inputs, targets = of(self._Y, given.inputs), of(self._output, self.at_end)
        before = [of(self._output, observed) for _, observed, _ in self.before]
        derivatives = given.derivatives
        if derivatives is not None:
            v, C = of(self._Y, derivatives.directions), of(self._output, derivatives.targets)
        return [
            Batch(
                inputs[k], targets[k], omega,
                observations=given.observations and replace(given.observations, targets=[part[k] for part in before]),
                derivatives=derivatives and replace(derivatives, directions=v[k], targets=C[k]),
            )
            for k, omega in enumerate(weights)
        ]  # fmt: skip
