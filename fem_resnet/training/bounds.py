"""Bounds on the coefficients of learned parameters, as pairs of Functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import firedrake as fd
import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import instance, real_array
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import Replicated

__all__ = ["bounds_of_controls", "replicated_bounds"]


def bounds_of_controls(
    parameters: Sequence[Parameter], bounds: Mapping[str, tuple[ArrayLike | None, ArrayLike | None]], eliminated: bool = False
) -> list[tuple[fd.Function, fd.Function]]:
    """A pair of Functions for each Function of the parameters. Collective.

    `bounds` has the least and largest coefficients by the name of a parameter; None stands for no end. `eliminated` says
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
    pairs = []
    for basis in parameter.space_bases:
        # PETSc takes the largest number for no bound.
        ends = [
            real_array("bounds", sign * np.finfo(float).max if end is None else end, comm=basis.Y.comm, finite=False)
            for end, sign in ((low, -1), (high, 1))
        ]
        shapes = [end.shape in ((), basis.shape) for end in ends]
        basis.Y.agree(
            all(shapes) and bool(np.all(ends[0] <= ends[1])),
            f"bounds: expected (low, high) for {parameter.name} with low <= high, numbers, None or arrays of shape "
            f"{basis.shape}; got ({low!r}, {high!r})",
        )
        pair = fd.Function(basis.space), fd.Function(basis.space)
        for function, end in zip(pair, ends):
            basis.write(function, np.broadcast_to(end, basis.shape))
        pairs.append(pair)
    return pairs
