"""Coefficients in the first functions of bases, and the way back: padded by zeros, they give the same function of y.

A parameter that does not depend on a rank, such as a bias at the nodes or the layer times, is copied.
"""

from __future__ import annotations

import numpy as np

from fem_resnet.parameters.parameter import Parameter

__all__ = ["copy_leading", "pad"]


def copy_leading(parameter: Parameter, to: Parameter) -> None:
    """Give a parameter in the first functions the leading coefficients of the same one in more. Collective.

    Raises
    ------
    ValueError
        If it is a kernel of a set that does not have them.
    """
    for k, basis in enumerate(to.space_bases):
        to.set(k, parameter.get(k)[_leading(basis.shape)])


def pad(parameter: Parameter, of: Parameter) -> None:
    """Give a parameter the coefficients of the same one in the first functions, and zero in the others. Collective."""
    for k, basis in enumerate(parameter.space_bases):
        padded = np.zeros(basis.shape)
        padded[_leading(of.space_bases[k].shape)] = of.get(k)
        parameter.set(k, padded)


def _leading(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(map(slice, shape))
