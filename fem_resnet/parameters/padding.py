"""Coefficients in the first functions of bases, and the way back: padded by zeros, they give the same function of y.

With channels these are the first functions in each. A parameter that does not depend on a rank, such as a bias at the nodes or
the layer times, is copied.
"""

from __future__ import annotations

import numpy as np

from fem_resnet.label_domain.basis import Basis
from fem_resnet.parameters.kernel import KernelCoefficients
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients, SpaceBasis, Within

__all__ = ["copy_leading", "pad"]


def copy_leading(parameter: Parameter, to: Parameter) -> None:
    """Give a parameter in the first functions the leading coefficients of the same one in more. Collective.

    Raises
    ------
    ValueError
        If it is a kernel of a set that does not have them.
    """
    for k, (large, small) in enumerate(zip(parameter.space_bases, to.space_bases)):
        to.set(k, small.of_whole(large.whole(parameter.get(k))[_leading(large, small)]))


def pad(parameter: Parameter, of: Parameter) -> None:
    """Give a parameter the coefficients of the same one in the first functions, and zero in the others. Collective."""
    for k, (large, small) in enumerate(zip(parameter.space_bases, of.space_bases)):
        padded = np.zeros_like(large.whole(parameter.get(k)))
        padded[_leading(large, small)] = small.whole(of.get(k))
        parameter.set(k, large.of_whole(padded))


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
