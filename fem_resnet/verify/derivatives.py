"""First and second derivatives of J on the tape, compared with differences.

The rate at which a remainder of Taylor's formula falls is shown, but does not decide. If a coefficient of the Taylor series
happens to be small, rates are erratic although all is right; and a wrong part of the gradient that is smaller than the
curvature does not change a rate. What decides is the coefficient itself: the limit of differences (`differences`) must be
<J', h>, and the limit of differences of gradients must be J'' h, control by control.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import firedrake as fd
import numpy as np
from pyadjoint.enlisting import Enlist

from fem_resnet.verify.differences import BETWEEN_JOINTS, SHORT, SMOOTH, STEPS, extrapolated
from fem_resnet.verify.point import Point, close, has_joints, names, part
from fem_resnet.verify.report import Check, Checks, Line

__all__ = ["elsewhere", "second_order", "taylor"]

#: The largest number of controls that are tested one by one. Of more controls, at most twice as many are tested.
_MOST = 8


def _chosen(point: Point, quick: bool) -> list[int]:
    """The controls that are tested one by one: all if they are few, else the first and the last of each parameter."""
    count = len(point.functions)
    if count <= _MOST and not quick:
        return list(range(count))
    seen: set[str] = set()
    chosen, index = [], 0
    for parameter in point.problem.parameters:
        for k in range(len(parameter.functions)):
            if k in (0, len(parameter.functions) - 1) and (not quick or parameter.name not in seen):
                seen.add(parameter.name)
                chosen.append(index)
            index += 1
    return chosen[: 2 * _MOST]


def _directions(point: Point, quick: bool) -> Iterator[tuple[str, list[fd.Function]]]:
    """A direction in each of the chosen controls, and one in all controls, with their names."""
    labels = names(point.problem)
    parts = [point.direction(k) for k in range(len(point.functions))]
    if len(parts) > 1:
        for k in _chosen(point, quick):
            yield labels[k], point.alone(k, parts[k])
        yield "all controls", parts
    else:
        yield labels[0], parts


def taylor(point: Point, quick: bool, lines: list[Line]) -> Checks:
    """Compare <J', h> with differences of J in each chosen control and in all; tangent with adjoint.

    The remainders R0, R1 and R2 of Taylor's formula are added to `lines`.
    """
    joints = has_joints(point.problem)
    J0, tiny = point.value(), np.finfo(float).eps
    # A bound of the error of a difference of two values of J.
    noise = max(64 * tiny, 1e-2 * close(point.problem) if close(point.problem) > 1e-10 else 0.0)
    noise = noise * abs(J0) + point.round_off
    bound = max(BETWEEN_JOINTS if joints else SMOOTH, close(point.problem) * 10)
    for name, h in _directions(point, quick):
        expected = point.pair(point.gradient, h)
        size = abs(expected) + 1e-9 * abs(J0)
        values: dict[float, tuple[float, float]] = {}

        def central(step, h=h, values=values):
            values[step] = point.value(h, step), point.value(h, -step)
            return (values[step][0] - values[step][1]) / (2 * step)

        if joints:
            defect = min(abs(central(step) - expected) for step in SHORT)
            allowed = bound * size + noise / SHORT[1]
        else:
            limit, error = extrapolated(central, STEPS, size)
            defect = abs(float(limit) - expected)
            allowed = bound * size + 10 * min(error, 0.01 * size) + noise / STEPS[3]
        curvature, action = None, _hessian(point, h)
        if action is not None:
            curvature = point.pair(action, h)
        rates = list(_rates(name, J0, expected, curvature, values, noise, lines)) if not joints else []
        shown = (
            "rates " + " / ".join("-" if rate is None else f"{rate:.2f}" for rate in rates) if rates else "one-sided at joints"
        )
        yield Check("Taylor R0/R1/R2", name, part(defect, size), part(allowed, size), bool(defect <= allowed), shown)
        point.value()
        tangent = _tangent(point, h)
        if tangent is None:
            continue
        yield Check.of(
            "tangent = adjoint", name, part(abs(tangent - expected), size), max(1e-9, close(point.problem), point.coarseness)
        )


def _tangent(point: Point, h: list[fd.Function]) -> float | None:
    """J' h by tangents, at the values that the tape holds; None if a Block has no tangent."""
    try:
        return float(point.J.tlm(h))
    except NotImplementedError:
        return None


def _hessian(point: Point, h: list[fd.Function]) -> list[np.ndarray] | None:
    try:
        return point.hessian(h)
    except NotImplementedError:
        return None


def _rates(
    name: str, J0: float, slope: float, curvature: float | None, values: Mapping[float, tuple[float, float]], noise: float,
    lines: list[Line],
) -> Iterator[float | None]:  # fmt: skip
    """The rates at which the remainders R0, R1 and R2 fall, as far as they are above round-off; adds their lines."""
    for order in (0, 1, 2):
        if order == 2 and curvature is None:
            yield None
            continue
        points = []
        for step, (ahead, _) in values.items():
            remainder = ahead - J0
            if order > 0:
                remainder -= step * slope
            if order > 1:
                remainder -= step**2 / 2 * curvature
            points.append((step, abs(remainder) if abs(remainder) > 20 * noise else 0.0))
        steps, remainders = zip(*points)
        line = Line(f"R{order} of {name}", order + 1, steps, remainders)
        lines.append(line)
        yield line.rate


def second_order(point: Point, quick: bool) -> Checks:
    """Compare Hessian actions with differences of gradients, control by control; check that the Hessian is symmetric."""
    joints, labels = has_joints(point.problem), names(point.problem)
    accuracy = close(point.problem)
    if point.problem.net.settings.precision == "single":
        yield Check.left_out("Hessian", "against differences", "gradients in single precision are too coarse; see 'double'")
        return
    bound = max(BETWEEN_JOINTS if joints else SMOOTH, accuracy * 100)
    actions = []
    for name, h in _directions(point, quick):
        try:
            action = point.hessian(h)
        except NotImplementedError as error:
            yield Check.left_out("Hessian", name, str(error))
            return
        actions.append((name, h, action))

        def central(step: float, h: list[fd.Function] = h) -> np.ndarray:
            ahead = _gradient_at(point, h, step)
            behind = _gradient_at(point, h, -step)
            return np.concatenate([((a - b) / (2 * step)).ravel() for a, b in zip(ahead, behind)])

        steps = np.array([1e-6, 1e-7]) if joints else np.array([4e-3, 1e-3, 2.5e-4])
        cuts = np.cumsum([part.size for part in action])[:-1]
        flat = np.concatenate([part.ravel() for part in action])
        if joints:
            defects = np.min([point.lengths(np.split(central(step) - flat, cuts)) for step in steps], axis=0)
            errors = np.zeros(len(defects))
        else:
            table = [central(step) for step in steps]
            first = [(16 * b - a) / 15 for a, b in zip(table, table[1:])]
            limit = (256 * first[1] - first[0]) / 255
            errors = point.lengths(np.split(limit - first[-1], cuts))
            defects = point.lengths(np.split(limit - flat, cuts))
        sizes = point.lengths(action)
        slopes = point.lengths(point.gradient)
        # Each part is compared with its own size, or if that is larger with the round-off of the gradient or of the whole.
        scale = sizes + 1e-3 * np.linalg.norm(sizes) + 1e-5 * slopes + 1e-8 * np.linalg.norm(slopes)
        allowed = bound * scale + 3 * np.minimum(errors, 1e-3 * scale) + 1e2 * accuracy * 1e-2 * np.linalg.norm(slopes) * 1e-3
        allowed += 4 * point.coarseness * np.linalg.norm(slopes) / steps[-1]
        scale = np.maximum(scale, np.finfo(float).tiny)
        worst = int(np.argmax(defects / allowed))
        yield Check(
            "Hessian", f"{name}: on {labels[worst]}", float(defects[worst] / scale[worst]),
            float(allowed[worst] / scale[worst]), bool((defects <= allowed).all()),
        )  # fmt: skip
    (name, h, action), other = actions[-1], [point.random(function) for function in point.functions]
    forth, back = point.pair(action, other), point.pair(point.hessian(other), h)
    lengths = [np.linalg.norm(point.lengths([v.dat.data_ro for v in vs])) for vs in (h, other)]
    size = max(abs(forth), abs(back), 1e-6 * float(np.linalg.norm(point.lengths(action)) * lengths[1]), 1e-300)
    yield Check.of("Hessian symmetric", name, abs(forth - back) / size, max(1e-8, 100 * accuracy, point.coarseness))
    point.value()


def elsewhere(point: Point) -> Checks:
    """Check the derivatives of the tape far from the point where it was recorded.

    They are compared with each other, and with those of a new tape that is recorded there. If a tape, a Block or an operator
    still holds a value from another point, it shows here; no other check sees a value from the first point.
    """
    problem, step, short = point.problem, 0.5, 1e-5
    h = [point.direction(k) for k in range(len(point.functions))]
    value, gradient = point.value(h, step), point.derivative()
    slope, tangent = point.pair(gradient, h), _tangent(point, h)
    size = abs(slope) + 1e-9 * abs(value)
    if tangent is not None:
        yield Check.of(
            "elsewhere", "tangent = adjoint", part(abs(tangent - slope), size), max(1e-9, close(problem), point.coarseness)
        )
    action = None
    if problem.net.settings.precision == "double":
        try:
            action = point.hessian(h, step)
        except NotImplementedError as error:
            yield Check.left_out("elsewhere", "Hessian", str(error))
    if action is not None:
        slopes = []
        for sign in (1, -1):
            point.value(h, step + sign * short)
            slopes.append(point.pair(point.derivative(), h))
        curvature, found = (slopes[0] - slopes[1]) / (2 * short), point.pair(action, h)
        size = abs(curvature) + 1e-3 * abs(slope)
        bound = 1e-5 + max(1e-13, 1e-2 * close(problem) if close(problem) > 1e-10 else 0.0) / short
        if not has_joints(problem):  # a short step may cross one
            yield Check.of("elsewhere", "Hessian", part(abs(found - curvature), size), bound + point.coarseness / short)
    if problem.net.solver_parameters.get("ts_adapt_type", "none") != "none":
        return  # a new tape adapts its steps anew
    point.stand(h, step)
    try:
        J, _ = problem.record()
        fresh = [np.array(d.dat.data_ro) for d in Enlist(J.derivative())]
        differences = {"J": part(abs(float(J.functional) - value), abs(value)), "gradient": _apart(point, gradient, fresh)}
        if action is not None:
            differences["Hessian"] = _apart(point, action, [np.array(d.dat.data_ro) for d in Enlist(J.hessian(h))])
    finally:
        point.stand()
    for name, difference in differences.items():
        yield Check.of("elsewhere", f"{name} of a tape recorded there", difference, max(1e-10, 10 * close(problem)))


def _apart(point: Point, these: list[np.ndarray], those: list[np.ndarray]) -> float:
    """The largest difference of a part of a functional, relative to the size of the whole."""
    gaps = point.lengths([a - b for a, b in zip(these, those, strict=True)])
    return part(float(gaps.max()), float(np.linalg.norm(point.lengths(those))))


def _gradient_at(point: Point, h: list[fd.Function], step: float) -> list[np.ndarray]:
    point.value(h, step)
    return point.derivative()
