"""The sets of kernels that a file may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fem_resnet.arguments import choice
from fem_resnet.parameters.kernel_sets import DampedAntisymmetric, KernelSet, NormBounded, PositiveSemidefinite
from fem_resnet.parameters.linear_kernels import LaplaceFunctions
from fem_resnet.parameters.subspace import ELEMENTS
from fem_resnet.parameters.symmetric_kernels import Symmetric

__all__ = ["ARRAYS", "kernel_set_from"]

_KINDS: dict[str, type[KernelSet]] = {
    kind.__name__: kind for kind in (PositiveSemidefinite, DampedAntisymmetric, NormBounded, LaplaceFunctions, Symmetric)
}

#: The arrays of each set that has some (`KernelSet.arrays`), with the kinds of their numbers.
ARRAYS: dict[str, dict[str, str]] = {
    "LaplaceFunctions": {"label": "i", "eigenvalues": "f8"},
    "Symmetric": ELEMENTS,
}


def kernel_set_from(description: Mapping[str, Any] | None, arrays: Mapping[str, np.ndarray] | None = None) -> KernelSet | None:
    """A set of kernels from its description and arrays; None from None.

    Parameters
    ----------
    description, arrays
        From `KernelSet`.

    Raises
    ------
    TypeError, ValueError
        If they describe no set.
    """
    if description is None:
        return None
    arguments = dict(description)
    return _KINDS[choice("set", arguments.pop("set", None), _KINDS)].of_arrays(arguments, arrays or {})
