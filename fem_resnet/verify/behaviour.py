"""That the same question gets the same answer: again, on another tape, in other Blocks, on other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from mpi4py import MPI
from pyadjoint.enlisting import Enlist

from fem_resnet.costate_comparison import costate_check
from fem_resnet.evolution import TYPES
from fem_resnet.methods import METHODS
from fem_resnet.objective import LearningProblem
from fem_resnet.verify.point import Point, close, names, own
from fem_resnet.verify.reference import raw
from fem_resnet.verify.report import Check, Line

__all__ = ["blocks", "convergence", "ranks", "replay", "reproducibility"]


def _difference(comm, these, those) -> float:
    """Largest difference of arrays over all ranks, in parts of the largest entry of its array."""
    pairs = [
        (comm.allreduce(float(np.abs(a - b).max(initial=0.0)), op=MPI.MAX), comm.allreduce(float(np.abs(b).max(initial=0.0)), op=MPI.MAX))
        for a, b in zip(these, those, strict=True)
    ]
    return max((gap / size if size else gap for gap, size in pairs), default=0.0)


def _answer(point: Point) -> list[np.ndarray]:
    """J and its gradient."""
    return [np.array([point.value()]), *point.derivative()]


def reproducibility(point: Point) -> Iterator[Check]:
    """The same bits: again, after an evaluation elsewhere, after an unrecorded run, recorded again."""
    problem, comm = point.problem, point.comm
    # Where a method begins Newton's iteration with what an earlier solve ended with, its last step squared may differ.
    bits = 1e-12 if METHODS[problem.net.solver_parameters["ts_type"]].solves_for_first_slope else 0.0
    first = _answer(point)
    yield Check.of("same bits", "again", _difference(comm, _answer(point), first), bits)
    h = [point.direction(k) for k in range(len(point.functions))]
    point.value(h, 0.5)
    point.derivative()
    yield Check.of("same bits", "after another point", _difference(comm, _answer(point), first), bits)
    point.value(h, -0.5)
    yield Check.of("same bits", "after a value elsewhere", _difference(comm, _answer(point), first), bits)
    value = point.value()
    states = [np.array(point.run.state(layer).dat.data_ro) for layer in range(problem.net.layers + 1)]
    problem.net.run(_half(problem))
    now = [np.array(point.run.state(layer).dat.data_ro) for layer in range(problem.net.layers + 1)]
    yield Check.of("same bits", "states after an unrecorded run", _difference(comm, now, states), bits)
    derivative = point.derivative()
    yield Check.of("same bits", "after an unrecorded run", _difference(comm, [np.array([value]), *derivative], first), bits)
    derivative = point.derivative()
    yield Check.of("same bits", "derivative of a used trajectory", _difference(comm, derivative, first[1:]), bits)
    unrecorded = float(problem.evaluate()[0])
    # Adapted steps are those of the recording, here of its first evaluation, at the same point.
    yield Check.of("same bits", "unrecorded", abs(unrecorded - value) / max(abs(value), 1e-300), 1e-12)
    J, _ = problem.record()
    again = [np.array([float(J(problem.functions))]), *(np.array(d.dat.data_ro) for d in Enlist(J.derivative()))]
    yield Check.of("same bits", "recorded again", _difference(comm, again, first), 1e-12)
    unchanged = [np.array(function.dat.data_ro) for function in point.functions]
    yield Check.of("parameters", "left as they were", _difference(comm, unchanged, point.base), 0.0)


def _half(problem: LearningProblem):
    """Other inputs, of the same shape."""
    inputs = problem.batch.inputs.copy(deepcopy=True)
    inputs.dat.data_wo[...] *= 0.5
    return inputs


def blocks(point: Point) -> Iterator[Check]:
    """One Block a layer against one Block for all: J, gradient, Hessian action, co-states."""
    problem = point.problem
    net = problem.net
    if net.layers < 2:
        return
    h = [point.direction(k) for k in range(len(point.functions))]
    answers = []
    sizes = sorted({1, 2, net.layers})
    for size in sizes:
        other = problem.replace(net=net.replace(layers_per_block=size))
        J, run = other.record()
        value = float(J(other.functions))
        gradient = [np.array(d.dat.data_ro) for d in Enlist(J.derivative())]
        costates = [np.array(run.costate(layer).dat.data_ro) for layer in range(net.layers + 1)]
        states = [np.array(run.state(layer).dat.data_ro) for layer in range(net.layers + 1)]
        try:
            action = [np.array(d.dat.data_ro) for d in Enlist(J.hessian(h))]
        except NotImplementedError:
            action = []
        answers.append([[np.array([value])], gradient, states, costates, action])
    bound = max(1e-10, 10 * close(problem))
    if problem.net.solver_parameters.get("ts_adapt_type", "none") != "none":
        bound = max(bound, 1e-9)
    for size, answer in zip(sizes[1:], answers[1:]):
        for name, these, those in zip(("J", "gradient", "states", "co-states", "Hessian"), answer, answers[0]):
            if these:
                lengths = [np.linalg.norm(part) for part in those]
                keep = [n for n, length in enumerate(lengths) if point.comm.allreduce(length, op=MPI.MAX) > 1e-12]
                difference = _difference(point.comm, [these[n] for n in keep], [those[n] for n in keep])
                yield Check.of("layers a Block", f"1 and {size}: {name}", difference, bound)


def replay(point: Point) -> Iterator[Check]:
    """Replay of checkpoints: J and gradient where one state in memory has to do for all layers."""
    problem, net = point.problem, point.problem.net
    if net.layers < 2 or net.factors or net.stable_kernel is not None or problem.derivatives is not None or problem.checkpoints is not None:
        yield Check.left_out("checkpoints", "replay", "one layer, or what goes with no schedule")
        return
    other = problem.replace(net=net.replace(layers_per_block=1), checkpoints=1)
    J, _ = other.record()
    answer = [np.array([float(J(other.functions))]), *(np.array(d.dat.data_ro) for d in Enlist(J.derivative()))]
    adapts = net.solver_parameters.get("ts_adapt_type", "none") != "none"
    bound = 10 * close(problem) if net.precision == "single" else 1e-9 if adapts else 1e-10
    yield Check.of("checkpoints", "replay", _difference(point.comm, answer, _answer(point)), bound)


def convergence(problem: LearningProblem, quick: bool, lines: list[Line]) -> Iterator[Check]:
    """Co-state and gradient against (4.2) - (4.4) solved on their own, by `costate_check`."""
    net = problem.net
    kind, what = net.solver_parameters["ts_type"], "co-state orders"
    reasons = {
        "the network has no layers": not net.layers,
        "(4.2) belongs to (2.8), and the network is a gradient flow": net.gradient_flow,
        "the kernel is made of other controls": net.stable_kernel is not None,
        f"(4.2) is not stepped on its own by {kind!r}": kind not in TYPES,
        "steps are adapted": net.solver_parameters.get("ts_adapt_type", "none") != "none",
        "sigma' or sigma'' jumps": bool(net.activation.joints),
        "only the initial state is learned": problem.learn == "initial",
        "left to the full verification": quick,
    }
    for reason, holds in reasons.items():
        if holds:
            yield Check.left_out(what, "(4.2) - (4.4)", reason)
            return
    check = costate_check(problem, refinements=(1, 2, 4))
    bound = max(1e-9, close(problem))
    if check.partner_costate:
        yield Check.of("co-state by the partner", "(4.2)", max(check.partner_costate), bound)
        yield Check.of("gradient by the partner", "(4.3), (4.4)", max(check.partner_gradient), bound)
    for name, values, orders in (
        ("co-state", check.costate, check.costate_orders), ("gradient", check.gradient, check.gradient_orders)
    ):  # fmt: skip
        lines.append(Line(f"{name} against (4.2)", max(1, round(orders[-1])) if np.isfinite(orders[-1]) else 1, check.step_sizes, values))
        # It falls, or is round-off already.
        fall = values[-1] / max(values[0], 1e-300)
        shown = "orders " + " / ".join(f"{order:.2f}" for order in orders)
        yield Check("co-state orders", name, fall, 0.6, bool(fall < 0.6 or values[-1] < 1e-8), shown)


def ranks(point: Point, make: Callable | None) -> Iterator[Check]:
    """Replicated numbers on all ranks; and the same problem on one rank alone, where it can be made."""
    comm, problem = point.comm, point.problem
    replicated = [np.array([point.value()])]
    for parameter in problem.parameters:
        replicated += [parameter.get(k) for k in range(len(parameter.functions)) if parameter.functions[k].function_space().mesh() is not point.Y.V.mesh()]
    everywhere = comm.bcast(replicated, root=0)
    differs = any(not np.array_equal(a, b) for a, b in zip(everywhere, replicated, strict=True))
    yield Check.of("ranks", f"replicated numbers on {comm.size}", float(comm.allreduce(differs, op=MPI.LOR)), 0.0)
    if comm.size == 1 or make is None:
        reason = "this is one rank" if comm.size == 1 else "the problem cannot be made on one rank; give `verify` what makes it"
        yield Check.left_out("ranks", "against one rank", reason)
        return
    alone = Point(own(make(MPI.COMM_SELF)))
    try:
        bound = max(1e-9, 10 * close(problem))
        here, there = _probes(point), _probes(alone)
        for name, a, b in zip(here[0], here[1], there[1]):
            gap = comm.allreduce(abs(a - b), op=MPI.MAX) / max(abs(b), 1e-8 * max(map(abs, there[1])), 1e-300)
            yield Check.of("ranks", f"{comm.size} and 1: {name}", gap, bound)
    finally:
        alone.restore()


def _probes(point: Point) -> tuple[list[str], list[float]]:
    """Numbers that no partition changes: J, its slopes in each control, and their changes."""
    rng, point._rng = point._rng, np.random.default_rng(31)
    h = [point.random(function) for function in point.functions]
    point._rng = rng
    value, gradient = point.value(), point.derivative()
    labels, numbers = ["J"], [value]
    for k, name in enumerate(names(point.problem)):
        labels.append(f"slope in {name}")
        numbers.append(point.pair(gradient, point.alone(k, h[k])))
    try:
        labels.append("curvature")
        numbers.append(point.pair(point.hessian(h), h))
    except NotImplementedError:
        labels.pop()
    state = raw(point.run.final, point.Y, (point.Y.nodes, point.problem.batch.samples))
    return [*labels, "sum of f(T)"], [*numbers, float(point.comm.allreduce(float(np.abs(state).sum())))]
