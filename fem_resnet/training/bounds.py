"""Bounds on the coefficients of learned parameters, as pairs of Functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import firedrake as fd
import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import instance, real_array
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import Replicated, SpaceBasis

__all__ = ["bounds_of_controls", "replicated_bounds"]


def bounds_of_controls(
    parameters: Sequence[Parameter], bounds: Mapping[str, tuple[ArrayLike | None, ArrayLike | None]], eliminated: bool = False
) -> list[tuple[fd.Function, fd.Function]]:
    """A pair of Functions for each Function of the parameters. Collective.

    `bounds` has the least and largest coefficients by the name of a parameter: for all times, or with an axis in front for the
    Functions of the parameter, one after the other in time. None stands for no end. `eliminated` says
    that W and mu of the head are solved for, and so have no bounds.

    Raises
    ------
    TypeError, ValueError
        If a name is not learned, or the ends are no pair (low, high) of numbers or arrays with low <= high.
    """
    names = [parameter.name for parameter in parameters]
    for name, ends in instance("bounds", bounds, Mapping, 'such as {"bias": (-1.0, 1.0)}').items():
        if eliminated and name in ("W", "mu"):
            raise ValueError(f"bounds: expected none on {name}, which eliminate='head' solves for; leave one of the two out")
        if name not in names:
            raise ValueError(f"bounds: expected names of learned parameters, {', '.join(names)}; got {name!r}")
        if not (isinstance(ends, (list, tuple, np.ndarray)) and len(ends) == 2):
            raise ValueError(f"bounds: expected a pair (low, high) for {name}, got {ends!r}")
    return [pair for parameter in parameters for pair in _bounds_of(parameter, *bounds.get(parameter.name, (None, None)))]


def replicated_bounds(problem: LearningProblem, bounds: object) -> object:
    """The part of the bounds that all ranks must give alike: everything but arrays of node values."""
    if not isinstance(bounds, Mapping):
        return bounds
    nodal = {p.name for p in problem.parameters if not all(isinstance(basis, Replicated) for basis in p.space_bases)}

    def replicated(name: str, ends: object) -> object:
        if name in nodal and isinstance(ends, (list, tuple, np.ndarray)):
            return [None if np.ndim(end) else end for end in ends]
        return ends

    return {name: replicated(name, ends) for name, ends in bounds.items()}


def _bounds_of(parameter: Parameter, low: ArrayLike | None, high: ArrayLike | None) -> list[tuple[fd.Function, fd.Function]]:
    bases = parameter.space_bases
    if not bases:
        return []
    Y = bases[0].Y
    # PETSc takes the largest number for no bound.
    given = [
        real_array("bounds", sign * np.finfo(float).max if end is None else end, comm=Y.comm, finite=False)
        for end, sign in ((low, -1), (high, 1))
    ]
    lows, highs = (_in_time(end, bases) for end in given)
    Y.agree(
        lows is not None and highs is not None and all(np.all(low <= high) for low, high in zip(lows, highs)),
        f"bounds: expected (low, high) for {parameter.name} with low <= high: numbers, None, arrays of shape {bases[0].shape} "
        f"for all times, or with one more axis in front of length {len(bases)}, one entry a time; got ({low!r}, {high!r})",
    )
    pairs = []
    for basis, *ends in zip(bases, lows, highs):
        pairs.append((fd.Function(basis.space), fd.Function(basis.space)))
        for function, end in zip(pairs[-1], ends):
            basis.write(function, end)
    return pairs


def _in_time(end: np.ndarray, bases: Sequence[SpaceBasis]) -> list[np.ndarray] | None:
    """The end at the time of each of the parameter's Functions; None if its shape fits neither space nor time and space."""
    varies = end.ndim == len(bases[0].shape) + 1 and len(end) == len(bases)
    ends = []
    for one, basis in zip(end if varies else [end] * len(bases), bases):
        allowed = set(product(*((n, 1) for n in basis.shape))) if varies else {(), basis.shape}
        if one.shape not in allowed:
            return None
        ends.append(np.broadcast_to(one, basis.shape))
    return ends
