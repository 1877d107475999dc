"""The same question gets the same answer: asked again, on another tape, in other Blocks, on other ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import ReducedFunctional, Tape, set_working_tape
from pyadjoint.enlisting import Enlist
from pyadjoint.tape import continue_annotation, pause_annotation

from fem_resnet.arguments import instance
from fem_resnet.costate.comparison import costate_check
from fem_resnet.learning.loss import least_squares
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.ranks import together, watched
from fem_resnet.tape.checkpoints import is_leaf
from fem_resnet.time_stepping.evolution import TYPES
from fem_resnet.time_stepping.methods import METHODS
from fem_resnet.verify.differences import extrapolated
from fem_resnet.verify.measure import raw
from fem_resnet.verify.point import Point, close, names, own, part
from fem_resnet.verify.report import Check, Checks, Line

__all__ = ["blocks", "controls", "convergence", "failure", "ranks", "recorded_states", "replay", "reproducibility"]


def _difference(comm: MPI.Comm, these: list[np.ndarray], those: list[np.ndarray]) -> float:
    """The largest difference of arrays over all ranks, relative to the largest entry of the array. Collective."""
    pairs = [
        (
            comm.allreduce(float(np.abs(a - b).max(initial=0.0)), op=MPI.MAX),
            comm.allreduce(float(np.abs(b).max(initial=0.0)), op=MPI.MAX),
        )
        for a, b in zip(these, those, strict=True)
    ]
    return max((gap / size if size else gap for gap, size in pairs), default=0.0)


def _answer(point: Point) -> list[np.ndarray]:
    """J and its gradient."""
    return [np.array([point.value()]), *point.derivative()]


def reproducibility(point: Point) -> Checks:
    """Check that J and its gradient are the same to the bit: after other evaluations, after other runs, recorded again."""
    problem, comm = point.problem, point.comm
    # Some methods begin Newton's iteration where an earlier solve ended. Then results differ by the square of its last step.
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
    bound = 1e-12 + part(point.round_off, abs(value))
    # Adapted steps are those of the first evaluation of the recording, which was at the same point.
    yield Check.of("same bits", "unrecorded", part(abs(unrecorded - value), abs(value)), bound)
    J, _ = problem.record()
    again = [np.array([float(J(problem.functions))]), *(np.array(d.dat.data_ro) for d in Enlist(J.derivative()))]
    yield Check.of("same bits", "recorded again", _difference(comm, again, first), bound)
    if hasattr(problem, "replace"):
        copied = float(problem.replace().evaluate()[0])
        yield Check.of("same bits", "of a copy", part(abs(copied - value), abs(value)), bound)
    unchanged = [np.array(function.dat.data_ro) for function in point.functions]
    yield Check.of("parameters", "left as they were", _difference(comm, unchanged, point.base), 0.0)


def controls(point: Point) -> Checks:
    """Check that the leaves of the tape are the controls and the data: none is missing, and there are no others."""
    problem = point.problem
    leaves = {
        id(variable): variable.output
        for block in point.J.tape.get_blocks() for variable in block.get_dependencies()
        if is_leaf(variable) and isinstance(variable.output, fd.Function)
    }  # fmt: skip
    learned = {id(control.block_variable) for control in point.J.controls}
    own = {id(function.block_variable) for function in point.functions}
    missing = [name for name, function in zip(names(problem), point.functions) if id(function.block_variable) not in leaves]
    yield Check("controls", "on the tape", float(len(missing)), 0.0, not missing and learned == own, ", ".join(missing))
    data = [problem.batch.inputs]
    if problem.derivatives is not None:
        data += [problem.derivatives.directions, problem.derivatives.targets]
    if problem.learn == "initial":
        given = [*problem.net.parameters, *([] if problem.head is None else problem.head.parameters)]
        data += [function for parameter in given for function in parameter.functions]
    known = own | {id(function.block_variable) for function in data}
    strange = sorted(str(leaf) for key, leaf in leaves.items() if key not in known and _largest(leaf))
    yield Check("controls", "nothing else on the tape", float(len(strange)), 0.0, not strange, ", ".join(strange))


def _largest(leaf: fd.Function) -> float:
    """The largest absolute value of a Function. Collective."""
    comm = watched(leaf.function_space().mesh().comm)
    return comm.allreduce(float(np.abs(leaf.dat.data_ro).max(initial=0.0)), op=MPI.MAX)


def failure(point: Point) -> Checks:
    """Check that parameters with which the state is not finite are refused, and that the tape is then as it was."""
    problem = point.problem
    if not problem.net.layers or problem.learn == "initial" or problem.checkpoints is not None:
        return
    value, gradient = point.value(), point.derivative()
    lost = point.at()
    position = next(k for k, name in enumerate(names(problem)) if name.startswith("kernel"))
    lost[position].dat.data_wo[...] = np.nan
    try:
        point.J(lost)
        refused = False
    except (ArithmeticError, ValueError):
        refused = True
    yield Check.of("failure", "a state that is not finite is refused", float(not refused), 0.0)
    bits = 1e-12 if METHODS[problem.net.solver_parameters["ts_type"]].implicit else 0.0
    again = [np.array([point.value()]), *point.derivative()]
    yield Check.of(
        "failure", "and leaves nothing behind", _difference(point.comm, again, [np.array([value]), *gradient]), bits
    )


def recorded_states(point: Point) -> Checks:
    """Check the derivative of a functional of the state at a layer time, where that state is on the tape."""
    problem, net = point.problem, point.problem.net
    if problem.checkpoints is not None or net.layers < 2 or problem.learn == "initial":
        return
    middle = net.layers // 2 if net.layers > 2 else 1
    for function in (problem.batch.inputs, *point.functions):
        function.clear_block_variable()
    with set_working_tape(Tape()) as tape:
        continue_annotation()
        try:
            run = net.run(problem.initial_state(), problem.running, problem.batch.weights)
            try:
                state = run.state(middle)
            except RuntimeError as error:
                yield Check.left_out("states", "on a tape", str(error))
                return
            if is_leaf(state.block_variable):
                yield Check.of("states", "on a tape: constants there", 1.0, 0.0)
                return
            target = fd.Function(state.function_space())
            functional = ReducedFunctional(least_squares(net.Y, state, target), problem.controls(), tape=tape)
        finally:
            pause_annotation()
    h = [point.direction(k) for k in range(len(point.functions))]
    functional(point.at())
    slope = point.pair([np.array(d.dat.data_ro) for d in Enlist(functional.derivative())], h)
    bound = 1e-4 if net.activation.joints or net.settings.precision == "single" else 1e-6
    # Where sigma has joints, long steps would cross some of them.
    steps = np.array([1e-6]) if net.activation.joints else 0.02 * 0.4 ** np.arange(6)
    limit, _ = extrapolated(
        lambda e: (float(functional(point.at(h, e))) - float(functional(point.at(h, -e)))) / (2 * e), steps, 1.0
    )
    point.value()
    yield Check.of("states", "on a tape: derivative", part(abs(float(limit) - slope), abs(slope)), bound)


def _half(problem: LearningProblem) -> fd.Function:
    """The initial state, halved."""
    inputs = problem.initial_state().copy(deepcopy=True)
    inputs.dat.data_wo[...] *= 0.5
    return inputs


def blocks(point: Point) -> Checks:
    """Compare J, gradient, Hessian action and co-states with one layer a Block, two layers a Block, and all in one Block."""
    problem = point.problem
    net = problem.net
    if net.layers < 2:
        return
    h = [point.direction(k) for k in range(len(point.functions))]
    answers = []
    sizes = sorted({1, 2, net.layers})
    for size in sizes:
        other = problem.replace(net=net.replace(layers=replace(net.settings.layers, per_block=size)))
        J, run = other.record()
        value = float(J(other.functions))
        gradient = [np.array(d.dat.data_ro) for d in Enlist(J.derivative())]
        # With derivatives of the output, J depends on the states at the start of a Block in another way too.
        costates = (
            []
            if problem.derivatives is not None
            else [np.array(run.costate(layer).dat.data_ro) for layer in range(net.layers + 1)]
        )
        states = [np.array(run.state(layer).dat.data_ro) for layer in range(net.layers + 1)]
        try:
            action = [np.array(d.dat.data_ro) for d in Enlist(J.hessian(h))]
        except NotImplementedError:
            action = []
        answers.append([[np.array([value])], gradient, states, costates, action])
    bound = max(1e-10, 10 * close(problem), point.coarseness)
    if problem.net.solver_parameters.get("ts_adapt_type", "none") != "none":
        bound = max(bound, 1e-9)
    for size, answer in zip(sizes[1:], answers[1:]):
        for name, these, those in zip(("J", "gradient", "states", "co-states", "Hessian"), answer, answers[0]):
            if these:
                lengths = [np.linalg.norm(part) for part in those]
                keep = [n for n, length in enumerate(lengths) if point.comm.allreduce(length, op=MPI.MAX) > 1e-12]
                difference = _difference(point.comm, [these[n] for n in keep], [those[n] for n in keep])
                yield Check.of("layers a Block", f"1 and {size}: {name}", difference, bound)


def replay(point: Point) -> Checks:
    """Check J and gradient where layers are replayed from a checkpoint: one state in memory for all layers."""
    problem, net = point.problem, point.problem.net
    if (
        net.layers < 2
        or net.factors
        or net.settings.kernel.among is not None
        or problem.derivatives is not None
        or problem.checkpoints is not None
        or problem.lift is not None
    ):
        yield Check.left_out("checkpoints", "replay", "there is one layer, or a part that no schedule of checkpoints takes")
        return
    other = problem.replace(net=net.replace(layers=replace(net.settings.layers, per_block=1)), checkpoints=1)
    J, _ = other.record()
    recorded = [np.array(d.dat.data_ro) for d in Enlist(J.derivative())]
    answer = [np.array([float(J(other.functions))]), *(np.array(d.dat.data_ro) for d in Enlist(J.derivative()))]
    adapts = net.solver_parameters.get("ts_adapt_type", "none") != "none"
    bound = max(10 * close(problem) if net.settings.precision == "single" else 1e-9 if adapts else 1e-10, point.coarseness)
    expected = _answer(point)
    yield Check.of("checkpoints", "replay", _difference(point.comm, answer, expected), bound)
    yield Check.of("checkpoints", "of a recording", _difference(point.comm, recorded, expected[1:]), bound)


def convergence(problem: LearningProblem, quick: bool, lines: list[Line]) -> Checks:
    """Compare co-state and gradient with (4.2) - (4.4) solved on their own, by `costate_check`."""
    net = problem.net
    kind, what = net.solver_parameters["ts_type"], "co-state orders"
    reasons = {
        "the network has no layers": not net.layers,
        "(4.2) belongs to (2.8), and the network is a gradient flow": net.gradient_flow,
        "the kernel is made of other controls": net.settings.kernel.among is not None,
        f"(4.2) is not stepped on its own by {kind!r}": kind not in TYPES,
        "steps are adapted": net.solver_parameters.get("ts_adapt_type", "none") != "none",
        "sigma' or sigma'' jumps": bool(net.activation.joints),
        "(4.2) - (4.4) have no lift": problem.lift is not None,
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
        lines.append(
            Line(
                f"{name} against (4.2)", max(1, round(orders[-1])) if np.isfinite(orders[-1]) else 1, check.step_sizes, values
            )
        )
        # It falls with the step, or is round-off already.
        fall = values[-1] / max(values[0], 1e-300)
        shown = "orders " + " / ".join(f"{order:.2f}" for order in orders)
        yield Check("co-state orders", name, fall, 0.6, bool(fall < 0.6 or values[-1] < 1e-8), shown)


def ranks(point: Point, make: Callable | None) -> Checks:
    """Check that all ranks hold the same replicated numbers; compare with the same problem on one rank alone."""
    comm, problem = point.comm, point.problem
    replicated = [np.array([point.value()])]
    for parameter in problem.parameters:
        replicated += [
            parameter.get(k)
            for k in range(len(parameter.functions))
            if parameter.functions[k].function_space().mesh() is not point.Y.V.mesh()
        ]
    everywhere = comm.bcast(replicated, root=0)
    differs = any(not np.array_equal(a, b) for a, b in zip(everywhere, replicated, strict=True))
    yield Check.of("ranks", f"replicated numbers on {comm.size}", float(comm.allreduce(differs, op=MPI.LOR)), 0.0)
    if comm.size == 1 or make is None:
        reason = (
            "this is one rank"
            if comm.size == 1
            else "the problem cannot be made on one rank; give `verify` a function that makes it"
        )
        yield Check.left_out("ranks", "against one rank", reason)
        return
    # Whatever the user's function raises on one rank is a failed check on all.
    alone = together(comm, lambda: Point(own(instance("problem", make(MPI.COMM_SELF), LearningProblem))))
    try:
        bound = max(1e-9, 10 * close(problem))
        here, there = _probes(point), _probes(alone)
        for name, a, b in zip(here[0], here[1], there[1]):
            gap = comm.allreduce(abs(a - b), op=MPI.MAX) / max(abs(b), 1e-8 * max(map(abs, there[1])), 1e-300)
            coarse = part(point.round_off, abs(b)) if name == "J" else point.coarseness
            yield Check.of("ranks", f"{comm.size} and 1: {name}", gap, bound + coarse)
    finally:
        alone.restore()


def _probes(point: Point) -> tuple[list[str], list[float]]:
    """Numbers that no partition changes, with their names: J, its slope in each control, its curvature, the sum of f(T)."""
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
