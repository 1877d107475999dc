"""The stage of a layer on Y x {1 .. C}, whose factors repeat a basis of Y in each channel.

There Phi and Psi are block diagonal. So the stage of one channel is a stage on Y, with that channel's bias, and with its rows
of coefficients and functionals. Only beta, outside of the stage, couples channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.repeated_basis import RepeatedBasis
from fem_resnet.layers.stage import Argument, Functionals, Stage, StageFunctional, StageValue
from fem_resnet.parameters.kernel import LowRankKernel

__all__ = ["ChannelStage"]


class ChannelStage(Stage[Argument]):
    """Stage evaluations on Y x {1 .. C}, with the methods of `Stage`: channel by channel where both factors allow it.

    Parameters
    ----------
    new
        Makes the stage on a label domain from the other arguments: on Y, and on Y x {1 .. C} for other factors.
    Y, activation, samples, precision
        As for `Stage`.
    """

    def __init__(
        self, new: Callable[..., Stage[Argument]], Y: Channels, activation: Activation, samples: int, precision: str = "double"
    ):
        super().__init__(Y, activation, samples, precision)
        self._channels = Y.channels
        self._new, self._one = new, new(Y.one, activation, samples, precision)
        self._latest: tuple[LowRankKernel, LowRankKernel] | None = None

    @cached_property
    def _whole(self) -> Stage[Argument]:
        """For factors that are no repeated bases."""
        return self._new(self.Y, self.activation, self.samples, self.real.name)

    def arranged(self, by_f):
        return by_f

    def _parts(self, at: Argument) -> Iterator[Argument]:
        """The stage's argument in each channel."""
        factors = self._of_one(at.factors)
        for a, C in zip(self._split(at.a), self._split(at.C)):
            yield replace(at, factors=factors, a=a, C=C)

    def _of_one(self, factors: LowRankKernel) -> LowRankKernel:
        """The factors of one channel; made once, since `LowRankKernel` factorises Gram matrices."""
        if self._latest is None or self._latest[0] is not factors:
            assert isinstance(factors.phi, RepeatedBasis) and isinstance(factors.psi, RepeatedBasis)
            self._latest = factors, LowRankKernel(factors.phi.one, factors.psi.one)
        return self._latest[1]

    def _split(self, arrays: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, ...]]:
        """What each channel has of arrays of nodes or of coefficients."""
        return zip(*(np.split(array, self._channels) for array in arrays))

    def _fields(self, out: Sequence[np.ndarray] | None) -> Iterator[tuple[np.ndarray, ...] | None]:
        return iter([None] * self._channels) if out is None else self._split(out)

    def rate(self, at, out=None):
        if not _repeat(at.factors):
            return self._whole.rate(at, out)
        return _joined([self._one.rate(part, fields) for part, fields in zip(self._parts(at), self._fields(out))])

    def derivative(self, at, dC, out=None):
        if not _repeat(at.factors):
            return self._whole.derivative(at, dC, out)
        parts = zip(self._parts(at), self._split(dC), self._fields(out))
        return _joined([self._one.derivative(part, d, fields) for part, d, fields in parts])

    def transpose(self, at, by_s, with_length=False, with_factors=False):
        if with_factors or not _repeat(at.factors):
            return self._whole.transpose(at, by_s, with_length, with_factors)
        by_f = self._split(by_s.by_f) if by_s.by_f else iter([()] * self._channels)
        found = [
            self._one.transpose(part, StageFunctional(x, by_s.x_q, tuple(map(self._one.arranged, fields))), with_length)
            for part, x, fields in zip(self._parts(at), self._split(by_s.x), by_f)
        ]
        return Functionals(
            _joined([one.D for one in found]), np.concatenate([one.bias for one in found]), sum(one.length for one in found)
        )

    def jacobian(self, at):
        if not _repeat(at.factors):
            return self._whole.jacobian(at)
        found = [self._one.jacobian(part) for part in self._parts(at)]
        result = []
        for blocks in zip(*found):
            samples, rows, columns = blocks[0].shape
            K = np.zeros((samples, len(blocks), rows, len(blocks), columns))
            for c, block in enumerate(blocks):
                K[:, c, :, c] = block
            result.append(K.reshape(samples, len(blocks) * rows, len(blocks) * columns))
        return result

    def advance(self, f, stages):
        if not all(_repeat(stage.argument.factors) for stage in stages):
            return self._whole.advance(f, stages)
        parts = [[StageValue(stage.weight, part) for part in self._parts(stage.argument)] for stage in stages]
        nodes = self.Y.nodes  # below them f has a row for a running cost, which belongs to no channel
        fields = zip(self._split([part[:nodes] for part in f]), zip(*parts) if parts else [()] * self._channels)
        moved = _joined([self._one.advance(part, terms) for part, terms in fields])
        return [np.concatenate([new, part[nodes:]]) if len(part) > nodes else new for new, part in zip(moved, f)]


def _repeat(factors: LowRankKernel) -> bool:
    return isinstance(factors.phi, RepeatedBasis) and isinstance(factors.psi, RepeatedBasis)


def _joined(parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The arrays of all channels, one after the other, for each order."""
    return [np.concatenate(arrays) for arrays in zip(*parts)]
