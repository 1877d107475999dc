"""All checks of a learning problem, or of the built-in ones."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import Tape, set_working_tape
from pyadjoint.tape import annotate_tape, continue_annotation, pause_annotation

from fem_resnet.arguments import flag, function, instance, number
from fem_resnet.features import HELD, REGULARISED, STEPPED, supports
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.head import Head
from fem_resnet.learning.lift import Lift
from fem_resnet.learning.loss import binary_cross_entropy, cross_entropy, least_squares
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.regulariser import tikhonov
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import same, together
from fem_resnet.time_stepping.methods import METHODS
from fem_resnet.verify import activations, adjoints, behaviour, derivatives, quantities
from fem_resnet.verify.costates import costates
from fem_resnet.verify.formulas import NotWrittenOut
from fem_resnet.verify.gauss_newton import gauss_newton
from fem_resnet.verify.measure import raw
from fem_resnet.verify.other_nodes import moved
from fem_resnet.verify.point import Point, own, random_like
from fem_resnet.verify.problems import BUILT_IN, built_in
from fem_resnet.verify.report import Check, Checks, Report
from fem_resnet.verify.watch import Watch

__all__ = ["BUILT_IN", "built_in", "problem_of", "verify"]

#: Seconds that a check may take on several ranks, if no limit is given.
_TIME_LIMIT = 600.0


def verify(
    problem: LearningProblem | Callable[..., LearningProblem] | None = None,
    *,
    quick: bool = False,
    exit_first: bool = False,
    time_limit: float | None = None,
) -> Report:
    """Check a learning problem: its value, its derivatives, its measures. Collective over its communicator.

    Each check compares a number with a bound; the report lists both. Derivatives are checked at the problem's parameters,
    moved by a tenth of their size: at zero or at a minimum they vanish, and a check would show nothing. If J and its
    gradient had the same mistake, no Taylor test would see it; so J is also compared with formulas that are written out a
    second time. At the end the parameters have their values again.

    Parameters
    ----------
    problem
        The problem, or a function that makes it. A function with an argument is called as ``problem(comm)``; on several
        ranks it also makes the problem on one rank, for comparison. If left out, the built-in problems, which together run
        all layers of the package.
    quick
        Whether to test fewer directions, and no convergence of co-states.
    exit_first
        Whether to stop at the first check that fails.
    time_limit
        Seconds that one check may take. Then all ranks are ended, with a message and their stacks: if one rank leaves out a
        collective call, the others wait in it for ever. If left out, 600 on several ranks, and no limit on one.

    Returns
    -------
    Report
        It has `passed`, `failures`, a table as its text, `to_json` and `draw`.

    Raises
    ------
    TypeError
        If `problem` is not a LearningProblem, and does not make one.
    ValueError
        If `time_limit` is not positive, an argument differs between ranks, or the problem has checkpoints, an ensemble or
        observations before T.

    Examples
    --------
    >>> from fem_resnet.verify import built_in, verify
    >>> verify(built_in, quick=True).passed
    True
    """
    comm = problem.net.Y.comm if isinstance(problem, LearningProblem) else MPI.COMM_WORLD
    same(comm, problem=problem, quick=quick, exit_first=exit_first, time_limit=time_limit)
    if not isinstance(problem, (LearningProblem, type(None))):
        function("problem", problem, "a LearningProblem, or a function that makes one")
    quick, exit_first = flag("quick", quick), flag("exit_first", exit_first)
    if time_limit is None:
        time_limit = _TIME_LIMIT if comm.size > 1 else math.inf
    else:
        time_limit = number("time_limit", time_limit, above=0, below=2**31)
    with Watch(comm, time_limit) as watch:
        if problem is not None:
            return _verified(problem, quick, exit_first, watch)
        whole = Report(f"{len(BUILT_IN)} built-in problems")
        for name, make in BUILT_IN.items():
            report = _verified(make, quick, exit_first, watch, name)
            whole.checks += [replace(check, problem=name) for check in report.checks]
            whole.lines += [replace(line, problem=name) for line in report.lines]
            whole.seconds += report.seconds
            if exit_first and comm.allreduce(not report.passed, op=MPI.LOR):
                break
        return whole


def _verified(given: LearningProblem | Callable, quick: bool, exit_first: bool, watch: Watch, name: str = "") -> Report:
    """The report on a problem, or on the problem that a function makes.

    If a problem of `BUILT_IN`, which has a name, cannot be made, that is a failed check and no error.
    """
    start, make = time.perf_counter(), None
    watch.begin(f"{name}: making the problem")
    if isinstance(given, LearningProblem):
        problem = given
    else:
        function, takes_comm = given, takes_communicator(given)
        make = given if takes_comm else None
        try:
            problem = together(MPI.COMM_WORLD, lambda: _problem_by(function, *[MPI.COMM_WORLD] * takes_comm))
        except Exception as error:
            if not name:
                raise
            return Report(name, [Check.broken("problem", "made", error)])
    was_annotating = annotate_tape()
    report = Report(_title(problem))
    pause_annotation()
    try:
        with set_working_tape(Tape()):
            _all_checks(own(problem), make, quick, exit_first, report, lambda what: watch.begin(f"{name}: {what}"))
    finally:
        if was_annotating:
            continue_annotation()
    report.seconds = problem.net.Y.comm.allreduce(time.perf_counter() - start, op=MPI.MAX)
    return report


def _problem_by(make: Callable[..., LearningProblem], *arguments: MPI.Comm) -> LearningProblem:
    return instance("problem", make(*arguments), LearningProblem, "this is what the function returned")


def takes_communicator(make: Callable) -> bool:
    """Whether the first argument is `comm`, or has no default."""
    for name, parameter in inspect.signature(make).parameters.items():
        is_positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        return is_positional and (name == "comm" or parameter.default is parameter.empty)
    return False


def _title(problem: LearningProblem) -> str:
    head = "no head" if problem.head is None else repr(problem.head)
    kind = problem.net.solver_parameters["ts_type"]
    return f"{problem.net!r}, {kind}, {head}, {problem.loss.name}, {problem.batch.samples} samples, learns {problem.learn}"


class _Failed(Exception):
    """A check has failed, and the verification is to end there."""


# Observations before T and the members of an ensemble add terms to J that `reference` does not have. With a schedule of
# checkpoints, no states are on the tape to be checked.
@supports(
    "channels",
    "no_layers", "gradient_flow", *HELD, *STEPPED, "head", *REGULARISED, "running", "running_of_controls",
    "derivatives", "learned_initial", "learned_both", "lift", "many_samples", "weights", tool="verify",
)  # fmt: skip
def _all_checks(
    problem: LearningProblem,
    make: Callable | None,
    quick: bool,
    exit_first: bool,
    report: Report,
    begin: Callable[[str], None],
) -> None:
    comm = problem.net.Y.comm

    def keep(check: Check) -> None:
        report.checks.append(check)
        begin(f"{check.group}, after {check.name!r}")
        if exit_first and comm.allreduce(not check.passed, op=MPI.LOR):
            raise _Failed

    def run(group: str, checks: Callable[[], Checks]) -> None:
        begin(group)
        try:
            with closing(checks()) as found:
                for check in found:
                    keep(check)
        except _Failed:
            raise
        except NotWrittenOut as error:
            keep(Check.left_out(group, "all", str(error)))
        except Exception as error:  # whatever a mistake raises is a failed check
            keep(Check.broken(group, "all", error))

    with suppress(_Failed):
        _run_groups(problem, make, quick, report, run)


def _run_groups(problem: LearningProblem, make, quick: bool, report: Report, run: Callable) -> None:
    run("measures", lambda: quantities.measures(problem))
    run("kernel set", lambda: quantities.kernel_set(problem))
    run("activation", lambda: activations.activation(problem))
    run("compiled stage", lambda: activations.compiled_stages(problem))
    run("forward", lambda: quantities.forward(problem))
    instead = METHODS[problem.net.solver_parameters["ts_type"]].instead
    if problem.net.layers and instead is not None:
        report.checks.append(Check.left_out("derivatives", "all", f"PETSc has no adjoint of this method; {instead} has one"))
        return
    points: list[Point] = []

    def record() -> Checks:
        points.append(Point(problem))
        yield from ()

    run("recording", record)
    if not points:
        return
    point = points[0]
    taken = quantities.taken_steps(problem, point.run)
    try:
        run("controls", lambda: behaviour.controls(point))
        run("same bits", lambda: behaviour.reproducibility(point))
        run("forward", lambda: quantities.forward(problem, point))
        run("failure", lambda: behaviour.failure(point))
        run("Taylor", lambda: derivatives.taylor(point, quick, report.lines))
        run("Hessian", lambda: derivatives.second_order(point, quick))
        run("Gauss-Newton", lambda: gauss_newton(point))
        run("elsewhere", lambda: derivatives.elsewhere(point))
        run("adjoint identity", lambda: adjoints.adjoint_identities(point))
        run("given steps", lambda: adjoints.given_steps(point))
        run("Jacobian", lambda: adjoints.jacobians(point))
        run("Riesz map", lambda: quantities.riesz_maps(point))
        run("co-state", lambda: costates(point, taken))
        run("layers a Block", lambda: behaviour.blocks(point))
        run("checkpoints", lambda: behaviour.replay(point))
        run("states", lambda: behaviour.recorded_states(point))
        run("on other nodes", lambda: moved(point))
        run("exchange", lambda: quantities.other_data(problem, point))
        run("co-state orders", lambda: behaviour.convergence(problem, quick, report.lines))
        run("ranks", lambda: behaviour.ranks(point, make))
    finally:
        point.restore()


def problem_of(net: ResidualNetwork, head: Head | None, lift: Lift | None = None, samples: int = 3) -> LearningProblem:
    """A learning problem for a network without data.

    Parameters
    ----------
    net
        The network.
    head, lift
        Its head and its lift, or None.
    samples
        The number of samples.

    Returns
    -------
    LearningProblem
        With smooth inputs, and with targets that the prediction of the head can reach.
    """
    rng = np.random.default_rng(4)
    fields = net.Y if lift is None else lift.fields
    inputs = random_like(fd.Function(fields.batch_space(samples)), rng, fields)
    if head is None:
        targets = random_like(fd.Function(net.Y.batch_space(samples)), rng, net.Y)
        batch = Batch(inputs, targets, [1.0, 2.0, 0.5][:samples])
        return LearningProblem(net, None, least_squares, tikhonov(1e-2), batch, lift=lift)
    loss = {"softmax": cross_entropy, "logistic": binary_cross_entropy}.get(head.prediction.name, least_squares)
    if head.classes is not None and head.prediction.name != "identity":
        targets = np.arange(samples) % head.classes
    else:
        values = raw(random_like(fd.Function(head.Y.batch_space(samples)), rng, head.Y), head.Y, (head.Y.nodes, samples))
        if head.prediction.name != "identity":
            values = 0.5 + 0.4 * np.tanh(values)
        if head.prediction.name == "softmax":
            values = values / head.Y.sum(head.Y.weights @ values)
        targets = head.Y.batch(values)
    return LearningProblem(net, head, loss, tikhonov(1e-2), Batch(inputs, targets, [1.0, 2.0, 0.5][:samples]), lift=lift)
