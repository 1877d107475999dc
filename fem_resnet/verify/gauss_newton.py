"""The operator of Gauss and Newton, compared with the curvature of the loss written out a second time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pyadjoint.enlisting import Enlist

from fem_resnet.learning.problem import LearningProblem
from fem_resnet.verify.differences import STEPS, extrapolated
from fem_resnet.verify.point import Point, close, has_joints, part
from fem_resnet.verify.reference import Reference
from fem_resnet.verify.report import Check, Checks

__all__ = ["gauss_newton"]


def gauss_newton(point: Point) -> Checks:
    """Compare <h, A h> with the curvature of the loss along the derivative of the output; check that A is symmetric.

    A is the operator of Gauss and Newton.
    """
    problem = point.problem
    if why := _no_operator(problem):
        yield Check.left_out("Gauss-Newton", "all controls", why)
        return
    loss, joints = problem.loss.name, has_joints(problem)
    h = [point.direction(k) for k in range(len(point.functions))]
    other = [point.random(function) for function in point.functions]
    J, run = problem.record(gauss_newton=True)
    actions = []
    for direction in (h, other):
        J.derivative()
        actions.append([np.array(d.dat.data_ro) for d in Enlist(J.hessian(direction))])
    adapted = problem.net.solver_parameters.get("ts_adapt_type", "none") != "none"
    taken = [trace.steps for piece in run._pieces for trace in piece.segment.traces()] if adapted else None

    def move(step: float) -> None:
        for function, values, direction in zip(point.functions, point.base, h):
            function.dat.data_wo[...] = values + step * direction.dat.data_ro

    def seen(step: float) -> np.ndarray:
        """The quantity in which the loss is convex: C_pre for least squares, O for entropies."""
        move(step)
        O = reference.output(reference.states(reference.initial, taken)[-1])
        return reference.prediction(O) if loss == "least_squares" else O

    def penalty(step: float) -> float:
        move(step)
        return reference.regulariser()

    def curved(penalty: Callable[[float], float], R: float) -> float:
        """<h, R'' h>: of a quadratic R by its values, of another one by differences that shrink."""
        if problem.regulariser is None or problem.regulariser.quadratic:
            return penalty(1.0) + penalty(-1.0) - 2 * R
        second, _ = extrapolated(
            lambda step: np.array([(penalty(step) - 2 * R + penalty(-step)) / step**2]), STEPS[:6], abs(R), point.comm
        )
        return float(second[0])

    with Reference(problem) as reference:
        try:
            steps = np.array([1e-6]) if joints else STEPS[:6]
            change, _ = extrapolated(lambda step: (seen(step) - seen(-step)) / (2 * step), steps, 1.0, point.comm)
            R = penalty(0.0)
            expected = curved(penalty, R) + float(reference.omega @ reference.curvature(seen(0.0), change))
        finally:
            move(0.0)
    value, size = point.pair(actions[0], h), abs(expected) + 1e-9 * abs(R)
    among = problem.net.settings.kernel.among
    if among is not None and not among.linear and problem.regulariser is not None:
        why = "the kernel is made of other controls, and the regulariser is not quadratic in them"
        yield Check.left_out("Gauss-Newton", "<h, A h>", why)
    elif problem.regulariser is not None and not problem.regulariser.quadratic and joints:
        yield Check.left_out("Gauss-Newton", "<h, A h>", "second differences of the regulariser may cross joints")
    else:
        bound = max(1e-5 if joints else 1e-6, 10 * close(problem), point.coarseness)
        yield Check.of("Gauss-Newton", "<h, A h>", part(abs(value - expected), size), bound)
    forth, back = point.pair(actions[0], other), point.pair(actions[1], h)
    size = max(abs(forth), abs(back), 1e-6 * size)
    yield Check.of("Gauss-Newton", "symmetric", part(abs(forth - back), size), max(1e-8, close(problem), point.coarseness))
    point.value()


def _no_operator(problem: LearningProblem) -> str:
    """Why a problem has no operator of Gauss and Newton that can be compared; nothing if it has."""
    if problem.regulariser is not None and not problem.regulariser.convex:
        return "the regulariser need not be convex"
    if problem.loss.name not in ("least_squares", "cross_entropy", "binary_cross_entropy"):
        return f"the loss {problem.loss.name!r} is the user's own"
    if problem.running is not None or problem.derivatives is not None or problem.checkpoints is not None:
        return "a running cost, derivatives of the output and checkpoints have none"
    return ""
