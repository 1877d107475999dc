"""First and second derivatives, held against differences.

A rate of a remainder is shown, but does not decide: where a coefficient of the Taylor series happens to be small, rates are
erratic though all is well, and a wrong part of a gradient below the curvature's does not show in them. What decides is
the coefficient itself. With J even and odd in the step e,

    (J(m + e h) - J(m - e h)) / (2 e) = <J', h> + c e^2 + ...,

extrapolated to e = 0 until its own error is least (Ridders), must be <J', h>; and the same of gradients and J'' h, part by
part. Where sigma has joints (kinks, or jumps of sigma''), J is smooth between crossings of them only: short steps then
decide, the best of several, since a crossing inside a short step is rare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from mpi4py import MPI
from pyadjoint.enlisting import Enlist

from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.parameters.space_basis import SeenBatch
from fem_resnet.tape.blocks import made
from fem_resnet.time_stepping.ts_stepper import TSStepper
from fem_resnet.verify.point import Point, close, names, part, random_like
from fem_resnet.verify.reference import Reference, relative
from fem_resnet.verify.report import Check, Line

__all__ = [
    "adjoint_identities", "costates", "elsewhere", "extrapolated", "gauss_newton", "given_steps", "jacobians", "second_order",
    "taylor",
]  # fmt: skip

#: Steps in parts of the direction, longest first.
_STEPS = 0.02 * 0.4 ** np.arange(8)
_SHORT = np.array([1e-5, 1e-6, 1e-7])
#: Relative differences: of an extrapolated difference, and of one over a short step.
_SMOOTH, _BETWEEN_JOINTS = 1e-6, 1e-4
#: So many controls are tested one by one; of more, this many, and all together.
_MOST = 8


def extrapolated(
    difference: Callable[[float], np.ndarray], steps: np.ndarray, size: float, comm=None
) -> tuple[np.ndarray, float]:
    """Limit for step -> 0 of differences even in the step (arrays), by Ridders' table; with an estimate of its error.

    Where the arrays differ between ranks, with their communicator.
    """
    columns, best, error = [], None, np.inf
    for n, step in enumerate(steps):
        row = [np.asarray(difference(step), dtype=float)]
        for order in range(1, n + 1):
            factor = (steps[n - order] / step) ** 2
            row.append((factor * row[-1] - columns[-1][order - 1]) / (factor - 1))
            gaps = [np.abs(row[-1] - other).max(initial=0.0) for other in (row[-2], columns[-1][order - 1])]
            estimate = float(max(gaps)) if comm is None else comm.allreduce(float(max(gaps)), op=MPI.MAX)
            if estimate < error:
                best, error = row[-1], estimate
        columns.append(row)
        if best is None:
            best = row[-1]
        if error < 1e-11 * size:
            break
    return best, error


def _chosen(point: Point, quick: bool) -> list[int]:
    count = len(point.functions)
    if count <= _MOST and not quick:
        return list(range(count))
    seen, chosen, index = set(), [], 0
    for parameter in point.problem.parameters:
        for k in range(len(parameter.functions)):
            # The first and the last of each parameter.
            if k in (0, len(parameter.functions) - 1) and (not quick or parameter.name not in seen):
                seen.add(parameter.name)
                chosen.append(index)
            index += 1
    return chosen[: 2 * _MOST]


def _directions(point: Point, quick: bool) -> Iterator[tuple[str, list]]:
    """One in each of the chosen controls, and one in all of them."""
    labels = names(point.problem)
    parts = [point.direction(k) for k in range(len(point.functions))]
    if len(parts) > 1:
        for k in _chosen(point, quick):
            yield labels[k], point.alone(k, parts[k])
        yield "all controls", parts
    else:
        yield labels[0], parts


def taylor(point: Point, quick: bool, lines: list[Line]) -> Iterator[Check]:
    """R0, R1, R2 of each control and of all together; tangent against adjoint."""
    joints = point.problem.net.activation.joints
    J0, tiny = point.value(), np.finfo(float).eps
    # What a difference of two values of J may be wrong by, in parts of J.
    noise = max(64 * tiny, 1e-2 * close(point.problem) if close(point.problem) > 1e-10 else 0.0)
    noise = noise * abs(J0) + point.round_off
    bound = max(_BETWEEN_JOINTS if joints else _SMOOTH, close(point.problem) * 10)
    for name, h in _directions(point, quick):
        expected = point.pair(point.gradient, h)
        size = abs(expected) + 1e-9 * abs(J0)
        values: dict[float, tuple[float, float]] = {}

        def central(step, h=h, values=values):
            values[step] = point.value(h, step), point.value(h, -step)
            return (values[step][0] - values[step][1]) / (2 * step)

        if joints:
            defect = min(abs(central(step) - expected) for step in _SHORT)
            allowed = bound * size + noise / _SHORT[1]
        else:
            limit, error = extrapolated(central, _STEPS, size)
            defect = abs(float(limit) - expected)
            allowed = bound * size + 10 * min(error, 0.01 * size) + noise / _STEPS[3]
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


def _tangent(point: Point, h) -> float | None:
    """J' h where the tape stands, by its tangents; None where something on it has none."""
    try:
        return float(point.J.tlm(h))
    except NotImplementedError:
        return None


def _hessian(point: Point, h) -> list[np.ndarray] | None:
    try:
        return point.hessian(h)
    except NotImplementedError:
        return None


def _rates(name, J0, slope, curvature, values, noise, lines) -> Iterator[float | None]:
    """Lines of the remainders, above round-off, and their rates."""
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
        line = Line(f"R{order} of {name}", order + 1, *map(tuple, zip(*points)))
        lines.append(line)
        yield line.rate


def second_order(point: Point, quick: bool) -> Iterator[Check]:
    """Hessian actions against differences of gradients, part by part; their symmetry."""
    joints, labels = point.problem.net.activation.joints, names(point.problem)
    accuracy = close(point.problem)
    if point.problem.net.precision == "single":
        yield Check.left_out("Hessian", "against differences", "gradients in single precision are too coarse; see 'double'")
        return
    bound = max(_BETWEEN_JOINTS if joints else _SMOOTH, accuracy * 100)
    actions = []
    for name, h in _directions(point, quick):
        try:
            action = point.hessian(h)
        except NotImplementedError as error:
            yield Check.left_out("Hessian", name, str(error))
            return
        actions.append((name, h, action))

        def central(step, h=h):
            ahead = _gradient_at(point, h, step)
            behind = _gradient_at(point, h, -step)
            return np.concatenate([((a - b) / (2 * step)).ravel() for a, b in zip(ahead, behind)])

        steps = np.array([1e-6, 1e-7]) if joints else np.array([4e-3, 1e-3, 2.5e-4])
        if not joints and quick:
            steps = steps[1:]
        cuts = np.cumsum([part.size for part in action])[:-1]
        flat = np.concatenate([part.ravel() for part in action])
        if joints:
            defects = np.min([point.lengths(np.split(central(step) - flat, cuts)) for step in steps], axis=0)
            error = 0.0
        else:
            table = [central(step) for step in steps]
            first = [(16 * b - a) / 15 for a, b in zip(table, table[1:])]
            limit = (256 * first[1] - first[0]) / 255 if len(first) > 1 else first[0]
            error = point.lengths(np.split(limit - first[-1], cuts))
            defects = point.lengths(np.split(limit - flat, cuts))
        sizes = point.lengths(action)
        slopes = point.lengths(point.gradient)
        # Each part by its own size, not below what round-off in the gradient, or the whole, makes of it.
        scale = sizes + 1e-3 * np.linalg.norm(sizes) + 1e-5 * slopes + 1e-8 * np.linalg.norm(slopes)
        allowed = bound * scale + 3 * np.minimum(error, 1e-3 * scale) + 1e2 * accuracy * 1e-2 * np.linalg.norm(slopes) * 1e-3
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
    size = max(abs(forth), abs(back), 1e-6 * np.linalg.norm(point.lengths(action)) * lengths[1], 1e-300)
    yield Check.of("Hessian symmetric", name, abs(forth - back) / size, max(1e-8, 100 * accuracy, point.coarseness))
    point.value()


def elsewhere(point: Point) -> Iterator[Check]:
    """What the tape says far from where it was recorded and first differentiated: against itself, and a tape recorded there.

    Whatever a tape, a Block or an operator keeps of another point shows here, and nowhere else if it was kept at the first.
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
    if problem.net.precision == "double":
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
        if not problem.net.activation.joints:  # between them short steps may cross one
            yield Check.of("elsewhere", "Hessian", part(abs(found - curvature), size), bound + point.coarseness / short)
    if problem.net.solver_parameters.get("ts_adapt_type", "none") != "none":
        return  # another recording adapts its own steps
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
    """Largest difference of parts, in parts of the whole."""
    gaps = point.lengths([a - b for a, b in zip(these, those, strict=True)])
    return part(float(gaps.max()), float(np.linalg.norm(point.lengths(those))))


def _gradient_at(point: Point, h, step):
    point.value(h, step)
    return point.derivative()


def gauss_newton(point: Point) -> Iterator[Check]:
    """Actions of Gauss and Newton: <h, A h> against the loss's own curvature along the difference of outputs; symmetry."""
    problem = point.problem
    loss, joints = problem.loss.name, problem.net.activation.joints
    if loss not in ("least_squares", "cross_entropy", "binary_cross_entropy"):
        yield Check.left_out("Gauss-Newton", "all controls", f"the loss {loss!r} is the user's own")
        return
    if problem.running is not None or problem.derivatives is not None or problem.checkpoints is not None:
        yield Check.left_out(
            "Gauss-Newton", "all controls", "a running cost, derivatives of the output and checkpoints have none"
        )
        return
    h = [point.direction(k) for k in range(len(point.functions))]
    other = [point.random(function) for function in point.functions]
    J, run = problem.record(gauss_newton=True)
    actions = []
    for direction in (h, other):
        J.derivative()
        actions.append([np.array(d.dat.data_ro) for d in Enlist(J.hessian(direction))])
    adapted = problem.net.solver_parameters.get("ts_adapt_type", "none") != "none"
    taken = [trace.steps for piece in run._pieces for trace in piece.segment.traces()] if adapted else None

    def move(step):
        for function, values, direction in zip(point.functions, point.base, h):
            function.dat.data_wo[...] = values + step * direction.dat.data_ro

    def seen(step):
        """What the loss is convex in: C_pre, or O."""
        move(step)
        O = reference.output(reference.states(reference.initial, taken)[-1])
        return reference.prediction(O) if loss == "least_squares" else O

    def penalty(step):
        move(step)
        return reference.regulariser()

    with Reference(problem) as reference:
        try:
            steps = np.array([1e-6]) if joints else _STEPS[:6]
            change, _ = extrapolated(lambda step: (seen(step) - seen(-step)) / (2 * step), steps, 1.0, point.comm)
            R = penalty(0.0)
            expected = penalty(1.0) + penalty(-1.0) - 2 * R + float(reference.omega @ reference.curvature(seen(0.0), change))
        finally:
            move(0.0)
    value, size = point.pair(actions[0], h), abs(expected) + 1e-9 * abs(R)
    if problem.net.stable_kernel is not None and problem.regulariser is not None:
        why = "the kernel is made of other controls, in which the regulariser is not quadratic"
        yield Check.left_out("Gauss-Newton", "<h, A h>", why)
    else:
        bound = max(1e-5 if joints else 1e-6, 10 * close(problem), point.coarseness)
        yield Check.of("Gauss-Newton", "<h, A h>", part(abs(value - expected), size), bound)
    forth, back = point.pair(actions[0], other), point.pair(actions[1], h)
    size = max(abs(forth), abs(back), 1e-6 * size)
    yield Check.of("Gauss-Newton", "symmetric", part(abs(forth - back), size), max(1e-8, close(problem), point.coarseness))
    point.value()


# -- layer by layer --------------------------------------------------------------------------------------------------


def adjoint_identities(point: Point) -> Iterator[Check]:
    """<dF v, w> = <v, dF^* w> of every operator on the tape, layers one by one."""
    problem = point.problem
    rng = np.random.default_rng([7, point.comm.rank])
    shared = np.random.default_rng(8)
    bound = max(1e-10, close(problem))
    state = None
    for layer, segment in enumerate(_layer_segments(problem)):
        factors = [
            np.array(slot.read(_factor(problem.net, k))) for k, slot in enumerate(segment.inputs[len(segment.functions) + 1 :])
        ]
        if state is None:
            state = np.array(segment.inputs[0].read(problem.batch.inputs))
        arrays = [state, *(slot.read(fn) for slot, fn in zip(segment.inputs[1:], segment.functions)), *factors]
        new = segment.forward(arrays, save=True)
        yield _identity(f"layer {layer}", segment, arrays, point, rng, shared, bound)
        state = new if problem.running is None else new[0]
    for block in point.J.tape.get_blocks():
        operator = getattr(block, "operator", None)
        if operator is None or hasattr(operator, "steppers") or not hasattr(operator, "tangent"):
            continue
        arrays = [np.array(slot.read(v.saved_output)) for slot, v in zip(operator.inputs, block.get_dependencies())]
        name = type(operator).__name__.strip("_").removesuffix("Operator").lower()
        yield _identity(name, operator, arrays, point, rng, shared, 1e-10)


def given_steps(point: Point) -> Iterator[Check]:
    """Layers that take steps they are given, of unequal lengths: f at their ends, and adjoint identities."""
    problem = point.problem
    net = problem.net
    adapts = net.solver_parameters.get("ts_adapt_type", "none") != "none"
    if not net.layers or net.factors or adapts or net.solver_parameters["ts_type"] == "discrete_gradient":
        return
    rng, shared = np.random.default_rng([17, point.comm.rank]), np.random.default_rng(18)
    lengths, bound = [0.5, 0.2, 0.3], max(1e-10, close(problem))
    state = None
    with Reference(problem) as reference:
        expected = reference.states(reference.initial, [lengths] * net.layers)[1:]
        for layer, (segment, f) in enumerate(zip(_layer_segments(problem), expected)):
            segment.replay([lengths])
            if state is None:
                state = np.array(segment.inputs[0].read(problem.batch.inputs))
            arrays = [state, *(slot.read(fn) for slot, fn in zip(segment.inputs[1:], segment.functions))]
            new = segment.forward(arrays, save=True)
            state = new if problem.running is None else new[0]
            yield Check.of("given steps", f"f(t_{layer + 1})", relative(state, f[: net.Y.nodes], point.comm), bound)
            yield _identity(f"layer {layer}, given steps", segment, arrays, point, rng, shared, bound)


def _layer_segments(problem):
    omega = None if problem.running is None else sample_weights(problem.batch.weights, problem.batch.samples)
    return problem.net.layer_segments(problem.batch.inputs.function_space(), problem.running, omega)


def _factor(net, k):
    kernel = net.learned_factors()
    basis = (kernel.phi, kernel.psi)[k]
    return net.Y.batch(basis.values)


def _replicated(slot, Y) -> bool:
    """Whether all ranks hold the same numbers, which then count once."""
    return isinstance(slot, SeenBatch) or slot.space.mesh() is not Y.V.mesh() and slot.space.mesh().cell_set.total_size <= 1


def _identity(name, operator, arrays, point: Point, rng, shared, bound) -> Check:
    Y = point.Y

    def random(slot, shape):
        return (shared if _replicated(slot, Y) else rng).normal(size=shape)

    def paired(slot, x, y):
        part = float(np.sum(x * y))
        return part if _replicated(slot, Y) else point._sum(part)

    v = [random(slot, np.shape(array)) for slot, array in zip(operator.inputs, arrays)]
    value = operator.forward(arrays, save=True)
    moved = operator.tangent(arrays, v)
    several = isinstance(operator.output, tuple)
    outputs = zip(*((operator.output, value, moved) if several else ((operator.output,), (value,), (moved,))))
    duals, forth, size = [], 0.0, 0.0
    for slot, part, change in outputs:
        if slot is None:
            duals.append(1.7)
            forth += 1.7 * float(change)
            size += abs(1.7 * float(change))
        else:
            duals.append(random(slot, np.shape(part)))
            forth += paired(slot, duals[-1], change)
            size += (paired(slot, duals[-1], duals[-1]) * paired(slot, change, change)) ** 0.5
    w = duals if several else duals[0]
    back_parts = [paired(slot, made(d), x) for slot, d, x in zip(operator.inputs, operator.adjoint(arrays, w), v)]
    size = max(size * 1e-2, abs(forth), *map(abs, back_parts), 1e-300)
    return Check.of("<dF v, w> = <v, dF* w>", name, abs(forth - sum(back_parts)) / size, bound)


def jacobians(point: Point) -> Iterator[Check]:
    """Of PETSc's implicit types: Jacobian of the residual against a difference, its transpose, and its linear solver."""
    net = point.problem.net
    segments = _layer_segments(point.problem)
    stepper = segments[0].steppers[0] if segments else None
    if not isinstance(stepper, TSStepper) or not stepper.solver.method.implicit:
        return
    segment = segments[0]
    factors = [np.array(slot.read(_factor(net, k))) for k, slot in enumerate(segment.inputs[len(segment.functions) + 1 :])]
    f = np.array(segment.inputs[0].read(point.problem.batch.inputs))
    segment.forward([f, *(s.read(fn) for s, fn in zip(segment.inputs[1:], segment.functions)), *factors], save=False)
    solver = stepper.solver
    ts, J, u = solver.ts, solver.jacobian, solver.y.copy()
    rng = np.random.default_rng([3, 0 if solver.state.comm.size == 1 else point.comm.rank])
    x, y, a, b, zero = (u.duplicate() for _ in range(5))
    for vec in (x, y):
        vec.array_w[:] = rng.normal(size=vec.getLocalSize())
    zero.set(0.0)
    shift, t, step = 2.0, 0.4, 1e-6
    imex = solver.method.partitioned
    ts.computeIJacobian(t, u, zero, shift, J, J, imex)
    for sign, F in ((1, a), (-1, b)):
        at, rate = u.copy(), zero.copy()
        at.axpy(sign * step, x)
        rate.axpy(sign * step * shift, x)
        ts.computeIFunction(t, at, rate, F, imex)
    a.axpy(-1.0, b)
    a.scale(1 / (2 * step))
    J.mult(x, b)
    forth = b.dot(y)
    size = b.norm()
    a.axpy(-1.0, b)
    bound = 1e-2 if net.activation.joints else 1e-6
    yield Check.of("Jacobian of the residual", "layer 0", a.norm() / size, bound)
    J.multTranspose(y, a)
    yield Check.of("Jacobian and its transpose", "layer 0", abs(forth - a.dot(x)) / (size * y.norm()), 1e-10)
    ksp = ts.getSNES().getKSP()
    ksp.setOperators(J, J)
    b.copy(a)
    ksp.solve(a, y)
    y.axpy(-1.0, x)
    bound = 1e-8 if ksp.getType() == "preonly" else max(1e-5, 1e2 * ksp.getTolerances()[0])
    yield Check.of("linear solver of a stage", "layer 0", y.norm() / x.norm(), bound)


# -- co-states -------------------------------------------------------------------------------------------------------


def costates(point: Point, taken) -> Iterator[Check]:
    """r(t_l) of (4.2) against differences of J in f(t_l), the rest of the network written out a second time."""
    problem = point.problem
    net, joints = problem.net, problem.net.activation.joints
    if not net.layers:
        return
    if problem.derivatives is not None:
        yield Check.left_out("co-state", "r(t_l)", "derivatives of the output depend on it too")
        return
    point.value()
    point.J.derivative()
    bound = max(_BETWEEN_JOINTS if joints else 1e-6, 10 * close(problem))
    rng = np.random.default_rng(12)
    with Reference(problem) as reference:
        states = reference.states(reference.initial, taken)
        for layer in range(net.layers + 1):
            try:
                r = net.Y.values(point.run.costate(layer))
            except RuntimeError as error:
                yield Check.left_out("co-state", f"r(t_{layer})", str(error))
                continue
            v = random_like(point.run.final, rng, net.Y)
            v = np.array(v.dat.data_ro).reshape(r.shape)
            v += r / max(reference.measure.norm(r), 1e-300) * reference.measure.norm(v)

            def central(step, layer=layer, v=v):
                moved = [states[layer].copy() for _ in range(2)]
                for f, e in zip(moved, (step, -step)):
                    f[: net.Y.nodes] += e * v
                tails = [reference.states(f, taken, layer)[-1] for f in moved]
                return (reference.loss(tails[0]) - reference.loss(tails[1])) / (2 * step)

            found = reference.measure.inner(r, v)
            size = abs(found) + 1e-9 * max(
                abs(reference.loss(states[-1])), reference.measure.norm(r) * reference.measure.norm(v)
            )
            if joints:
                defect = min(abs(central(step) - found) for step in _SHORT)
            else:
                defect = abs(float(extrapolated(central, _STEPS, size)[0]) - found)
            noise = 1e-11 * abs(reference.loss(states[-1])) + point.round_off / _STEPS[3]
            yield Check.of("co-state", f"r(t_{layer})", part(defect, size), bound + part(noise, size))
