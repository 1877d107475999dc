"""Coefficients in the first functions of bases, and the way back: padded by zeros, they give the same function of y.

With channels these are the first functions in each. A parameter that does not depend on a rank, such as a bias at the nodes or
the layer times, is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fem_resnet.label_domain.basis import Basis
from fem_resnet.parameters.kernel import KernelCoefficients
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients, SpaceBasis
from fem_resnet.parameters.subspace import Within

__all__ = ["begin_with", "copy_leading", "pad"]


def copy_leading(parameters: Sequence[Parameter], to: Sequence[Parameter]) -> None:
    """Give parameters in the first functions the leading coefficients of the same ones in more. Collective.

    Raises
    ------
    ValueError
        If one is a kernel of a set that does not have them.
    """
    for many, few in zip(parameters, to):
        for k, (large, small) in enumerate(zip(many.space_bases, few.space_bases)):
            few.set(k, small.of_whole(large.whole(many.get(k))[_leading(large, small)]))


def pad(parameters: Sequence[Parameter], of: Sequence[Parameter]) -> None:
    """Give parameters the coefficients of the same ones in the first functions, and zero in the others. Collective."""
    for many, few in zip(parameters, of):
        for k, (large, small) in enumerate(zip(many.space_bases, few.space_bases)):
            padded = np.zeros_like(large.whole(many.get(k)))
            padded[_leading(large, small)] = small.whole(few.get(k))
            many.set(k, large.of_whole(padded))


def begin_with(bases: Iterable[Basis | None], fewer: Iterable[Basis | None]) -> bool:
    """Whether each basis begins with the functions of the other one; None, for values at the nodes, with None."""
    return all(more is one or None not in (more, one) and more.begins_with(one) for more, one in zip(bases, fewer))


def _leading(large: SpaceBasis, small: SpaceBasis):
    """Where the coefficients in fewer functions stand among those in more."""
    pairs = list(zip(_bases(large), _bases(small)))
    return np.ix_(*(_numbers(more, fewer) for more, fewer in pairs)) if pairs else slice(None)


def _bases(of: SpaceBasis) -> tuple[Basis, ...]:
    """The basis of each axis of coefficients."""
    if isinstance(of, Within):
        return _bases(of.space_of_whole)
    if isinstance(of, KernelCoefficients):
        return of.kernel.phi, of.kernel.psi
    return (of.basis,) if isinstance(of, BasisCoefficients) else ()


def _numbers(more: Basis, fewer: Basis) -> np.ndarray:
    """The numbers that functions of one basis have among those of another, which begins with them in each channel."""
    first = np.arange(0, more.rank, more.one.rank)
    return (first[:, None] + np.arange(fewer.one.rank)).ravel()
