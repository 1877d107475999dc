"""Adjoints of single operators: the identity <dF v, w> = <v, dF^* w>, and the Jacobian of implicit types."""

from __future__ import annotations

from typing import Any

import firedrake as fd
import numpy as np

from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.segment import Segment
from fem_resnet.parameters.kernel import KernelCoefficients
from fem_resnet.parameters.space_basis import Replicated, SeenBatch, Slot
from fem_resnet.tape.operator import SecondOrderOperator, made
from fem_resnet.time_stepping.ts_stepper import TSStepper
from fem_resnet.verify.measure import relative
from fem_resnet.verify.point import Point, close
from fem_resnet.verify.reference import Reference
from fem_resnet.verify.report import Check, Checks

__all__ = ["adjoint_identities", "given_steps", "jacobians"]


def adjoint_identities(point: Point) -> Checks:
    """Check <dF v, w> = <v, dF^* w> for every operator on the tape; for layers, one by one."""
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
            state = np.array(segment.inputs[0].read(problem.initial_state()))
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


def given_steps(point: Point) -> Checks:
    """Check f at the ends of layers that take given steps of unequal lengths, and their adjoint identities."""
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
                state = np.array(segment.inputs[0].read(problem.initial_state()))
            arrays = [state, *(slot.read(fn) for slot, fn in zip(segment.inputs[1:], segment.functions))]
            new = segment.forward(arrays, save=True)
            state = new if problem.running is None else new[0]
            yield Check.of("given steps", f"f(t_{layer + 1})", relative(state, f[: net.Y.nodes], point.comm), bound)
            yield _identity(f"layer {layer}, given steps", segment, arrays, point, rng, shared, bound)


def _layer_segments(problem: LearningProblem) -> list[Segment]:
    omega = None if problem.running is None else sample_weights(problem.batch.weights, problem.batch.samples)
    return problem.net.layer_segments(problem.net.Y.batch_space(problem.batch.samples), problem.running, omega)


def _factor(net: ResidualNetwork, k: int) -> fd.Function:
    """A Function with the values of phi (0) or psi (1)."""
    kernel = net.learned_factors()
    basis = (kernel.phi, kernel.psi)[k]
    return net.Y.batch(basis.values)


def _replicated(slot: Slot) -> bool:
    """Whether all ranks hold the same numbers, so that sums take them once."""
    return isinstance(slot, (SeenBatch, Replicated))


def _identity(
    name: str, operator: SecondOrderOperator | Segment, arrays: list, point: Point,
    rng: np.random.Generator, shared: np.random.Generator,
    bound: float,
) -> Check:  # fmt: skip
    """Check the adjoint of an operator at given inputs. `rng` differs between ranks, `shared` does not."""

    def random(slot, shape: tuple[int, ...]) -> np.ndarray:
        x = (shared if _replicated(slot) else rng).normal(size=shape)
        # A kernel of a set is zero where it couples nothing.
        return slot.kernel.outer(x, np.eye(shape[1])) if isinstance(slot, KernelCoefficients) else x

    def paired(slot, x: np.ndarray, y: np.ndarray) -> float:
        mine = float(np.sum(x * y))
        return mine if _replicated(slot) else point.sum(mine)

    v = [random(slot, np.shape(array)) for slot, array in zip(operator.inputs, arrays)]
    value = operator.forward(arrays, save=True)
    moved = operator.tangent(arrays, v)
    several = isinstance(operator.output, tuple)
    outputs = zip(*((operator.output, value, moved) if several else ((operator.output,), (value,), (moved,))))
    functionals: list = []
    forth, size = 0.0, 0.0
    for slot, values, change in outputs:
        if slot is None:  # the output is a number
            functionals.append(1.7)
            forth += 1.7 * float(change)
            size += abs(1.7 * float(change))
        else:
            functionals.append(random(slot, np.shape(values)))
            forth += paired(slot, functionals[-1], change)
            size += (paired(slot, functionals[-1], functionals[-1]) * paired(slot, change, change)) ** 0.5
    w: Any = functionals if several else functionals[0]
    back_parts = [paired(slot, made(d), x) for slot, d, x in zip(operator.inputs, operator.adjoint(arrays, w), v)]
    size = max(size * 1e-2, abs(forth), *map(abs, back_parts), 1e-300)
    return Check.of("<dF v, w> = <v, dF* w>", name, abs(forth - sum(back_parts)) / size, bound)


def jacobians(point: Point) -> Checks:
    """Check the Jacobian of the residual of implicit types by a difference, its transpose, and its linear solver."""
    net = point.problem.net
    segments = _layer_segments(point.problem)
    stepper = segments[0].steppers[0] if segments else None
    if not isinstance(stepper, TSStepper) or not stepper.solver.method.implicit:
        return
    segment = segments[0]
    factors = [np.array(slot.read(_factor(net, k))) for k, slot in enumerate(segment.inputs[len(segment.functions) + 1 :])]
    f = np.array(segment.inputs[0].read(point.problem.initial_state()))
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
