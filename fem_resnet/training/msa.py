"""The method of successive approximations: Algorithm 2 of section 5.2, in three variants.

An iteration solves (4.1) forwards and (4.2) backwards at the present controls, with r* = -r and r(T) = ftilde - f(T) in the
sign of section 4.2, and takes new controls in each layer. (Algorithm 2 prints the backward equation without r. It is r_t =
B^T(sigma'(u) r).) Let theta = (a, b) be the present controls and e the extremal controls of (4.10). The new controls are

    "basic"      e, as printed. J may rise or oscillate.
    "damped"     theta + s (e - theta), with s = 1, 1/2, 1/4, ... until J falls. For convex control sets only.
    "extended"   theta + s(y) (e(y) - theta(y)), with s(y) in [0, 1] such that the augmented Hamiltonian is no less than at
    theta
                 (`augmented_hamiltonian`). Its penalty rho is raised until J falls, and lowered again after that. rho = 0
                 gives s = 1, the basic variant. For convex control sets only.

No layer needs the new controls of another one: the maximisation "is decoupled for different network layers". So members of an
ensemble share the layers out among them (`dealt_layers`), as the ranks of each share the nodes. f and r are taken in the
middle of a layer, to second order in its length. So near a stationary point of J no rho makes J fall, and the method ends
there.

For many samples (4.10) does not hold. Then A is a box or ball of rows (`row_sets`), and e(y) is the row found by ascent
from the present one.

J may have Tikhonov's terms and a running cost of the controls. They are a part of H (`hamiltonian`), and e is not bang-bang
then: in a box the controls of `costly_controls`, in sets of rows those of the same ascent.

With `learn_head` W and mu are controls of the last step. An iteration first makes J smaller over (W, mu) at f(T), by L-BFGS,
and solves (4.2) from there: as Remark 4.3 says, they change no more than the terminal value of r*. The network is not
stepped for that, and J does not rise by it.

New controls leave any fixed span. So each iteration makes a new network, whose layers have bases of their own of least
rank: 2 for the basic variant, for the others 2 more in each iteration at most. (Controls with a cost have more: see
`costly_controls`.) Data stay as they are, and the head without `learn_head`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import firedrake as fd
import numpy as np
from petsc4py import PETSc
from pyadjoint import ReducedFunctional

from fem_resnet.arguments import choice, flag, integer, number
from fem_resnet.control.controls import Controls
from fem_resnet.control.costly_controls import check_costly, controls_with_cost
from fem_resnet.control.extremal_controls import extremal_controls
from fem_resnet.control.hamiltonian import Hamiltonian, Pair, middle_pairs
from fem_resnet.control.row_controls import raise_controls
from fem_resnet.control.row_sets import RowBall, RowBox, SpanBox, distance, nearest_controls
from fem_resnet.control.sets.control_set import ControlSet
from fem_resnet.control.sets_of_layers import AnySet, is_pointwise, sets_of_layers
from fem_resnet.control.violation import controls_within, refuse_controls_outside
from fem_resnet.features import STEPPED, supports
from fem_resnet.learning.head import Head
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.run import Run
from fem_resnet.network.settings import Kernel
from fem_resnet.training.augmented_hamiltonian import augmented_step
from fem_resnet.training.dealt_layers import DealtLayers
from fem_resnet.training.last_step import better_head
from fem_resnet.training.progress import Report, Watch, check_monitor

__all__ = ["MSAProgress", "MSAResult", "msa", "problem_of"]

_VARIANTS = ("basic", "damped", "extended")
#: Controls that are outside of a set of rows by this part of their size count as inside: bases of least rank leave round-off.
_ROUND_OFF = 1e-10
#: The least share s of "damped".
_LEAST_SHARE = 2.0**-40


@dataclass(frozen=True)
class MSAProgress(Report):
    """One iteration.

    Attributes
    ----------
    iteration, iterations : int
        Its number, and the largest number that is allowed.
    value : float
        J.
    step : float
        rho of "extended", the share s of the others.
    seconds : float
        Wall time since the start.
    evaluations : int
        How many networks have been run.
    problem : LearningProblem
        The problem with the network of the present controls.
    """

    iteration: int
    iterations: int
    value: float
    step: float
    seconds: float
    evaluations: int
    problem: LearningProblem = field(repr=False)

    @property
    def counted(self) -> tuple[str, int, int]:
        return "iteration", self.iteration, self.iterations

    @property
    def numbers(self) -> str:
        return f"J = {self.value:.8e}   step {self.step:.2e}"


@dataclass(frozen=True, repr=False)
class MSAResult:
    """How the method ended. ``msa(result.problem, ..)`` continues it, with ``rho=result.steps[-1] / 2`` for "extended".

    `save` writes its network and head to a file. A new script goes on from it, with data on the label space that `load` makes.
    So a monitor writes checkpoints: ``lambda progress: save("msa.h5", progress.problem.net, progress.problem.head)``.

    Attributes
    ----------
    problem : LearningProblem
        The problem with the network of the last controls; if `variant` is not "basic", of those with the least J.
    controls : list of Controls
        These controls, one for each layer.
    value : float
        Their J.
    iterations : int
        The number of iterations.
    converged : bool
        Whether no step made J fall.
    reason : str
        "NO_STEP_LOWERS_J", "ITERATIONS", "STOPPED" by the monitor, "INTERRUPTED" by Ctrl-C, or "TERMINATED" by SIGTERM.
    values : numpy.ndarray
        J at the start and after each iteration, shape (iterations + 1,).
    changes : numpy.ndarray
        The change of J in each iteration, shape (iterations,).
    predicted : numpy.ndarray
        The estimate of Li et al. for the change, minus the integral over t of the change of H at fixed f and r. It is right to
        first order in the change of the controls and to second order in the length of the layers. Shape (iterations,).
    steps : numpy.ndarray
        rho of "extended", s of the others, shape (iterations,).
    evaluations : int
        How many networks were run.
    seconds : float
        Wall time.
    """

    problem: LearningProblem
    controls: list[Controls]
    value: float
    iterations: int
    converged: bool
    reason: str
    values: np.ndarray
    changes: np.ndarray
    predicted: np.ndarray
    steps: np.ndarray
    evaluations: int
    seconds: float

    def __repr__(self) -> str:
        return (
            f"MSAResult(J = {self.value:.6g}, {self.iterations} iterations, {self.evaluations} evaluations, {self.reason}, "
            f"{self.seconds:.1f} s)"
        )


@supports(
    "channels", "nodal_bias", "bases_by_layer", *STEPPED, "head", "regulariser", "running", "running_of_controls",
    "many_samples", "weights",
)  # fmt: skip
@supports(
    "channels", "nodal_bias", "bases_by_layer", *STEPPED, "head", "regulariser", "running", "running_of_controls", "weights",
    tool="msa, A pointwise",
    when=lambda problem, A, **options: is_pointwise(A), instead="give A as a RowBox, RowBall or SpanBox",
)  # fmt: skip
@PETSc.Log.EventDecorator("fem_resnet:msa")
def msa(
    problem: LearningProblem,
    A: AnySet | Sequence[AnySet],
    *,
    variant: str = "extended",
    iterations: int = 50,
    rho: float = 1.0,
    largest_rho: float = 1e8,
    restarts: int = 0,
    project: bool = False,
    learn_head: bool = False,
    monitor: Callable[[MSAProgress], bool | None] | None = None,
    quiet: bool = False,
    ensemble: fd.Ensemble | None = None,
) -> MSAResult:
    """Train by Algorithm 2 from the present controls, which lie in A. Collective, over all members of an ensemble.

    Parameters
    ----------
    problem
        Bias and kernel have a value on each layer. Where it acts on these, a regulariser is Tikhonov's. Any head and loss are
        taken. The problem is not changed: the result has a problem of its own.
    A
        The set in which (a, b) lies at all y and z, for one sample, which may depend on y (`NodalBox`, `NodalSets`); or a
        `RowBox`, `RowBall` or `SpanBox`, for any number. If it depends on t, a list of such sets, one for each layer. Sets of
        the first kind are a `Box` where controls have a cost: Tikhonov's, or a running cost l_0(f) + c_1 a + c_2/2 a^2.
    variant
        "basic", "damped" or "extended".
    iterations
        The largest number of iterations.
    rho, largest_rho
        The rho with which "extended" starts, and the one above which it gives up.
    restarts
        How often the method goes on where no step lowers J: by a step to the extremal controls, as in the basic variant, after
        which J is higher. The result has the controls of least J.
    project
        Whether it may start from controls outside of A. It then takes the nearest controls in a `RowBox`, `RowBall` or
        `SpanBox`; in other sets, which must be convex, mixtures with a point of A.
    learn_head
        Whether W and mu are controls too, of the last step. If left out, the head stays as it is.
    monitor
        Called after each iteration on every rank. If it returns True on any rank, the method stops. If left out, each
        iteration is shown on rank 0, as by `train`; Ctrl-C stops after the present one.
    quiet
        Whether nothing is shown.
    ensemble
        An ensemble whose members share out the layers: each maximises in its own, and all solve (4.1) and (4.2). Each member
        has the same problem with the same data on its own communicator (``comm=ensemble.comm`` of the mesh), and gets the same
        result.

    Returns
    -------
    MSAResult

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks, or between members of an ensemble; if the present controls are
        not in A, or A is not convex and mixtures are needed; if the cost of the controls is another than above, or there is no
        head to learn.

    Examples
    --------
    >>> result = msa(problem, Box((-1, 1), (-1, 1)), variant="extended")  # doctest: +SKIP
    """
    dealt = DealtLayers(
        problem, ensemble, A=A, variant=variant, iterations=iterations, rho=rho, largest_rho=largest_rho, restarts=restarts,
        project=project, learn_head=learn_head, monitor=monitor is None,
    )  # fmt: skip
    sets = _checked_sets(problem, A, variant)
    project, learn_head = flag("project", project), flag("learn_head", learn_head)
    if learn_head and problem.head is None:
        raise ValueError("learn_head: expected a problem with a head, got head=None; give it a Head, or leave learn_head out")
    check_monitor(monitor, quiet)
    iterations, restarts = integer("iterations", iterations, least=0), integer("restarts", restarts, least=0)
    rho, largest_rho = number("rho", rho, above=0), number("largest_rho", largest_rho, above=0)
    start = time.perf_counter()
    method = _Method(problem, variant, largest_rho, dealt)
    for one in sets if method.H.charges_controls else []:
        if isinstance(one, ControlSet):
            check_costly(method.H, one)
    best = at = method.evaluate(_start(problem.net, sets, project))
    values, reason = [at.value], None  # None where the iterations run out
    predicted: list[float] = []
    steps: list[float] = []
    with Watch(dealt.comm, monitor, quiet) as watch:
        while len(steps) < iterations:
            before = at
            at = method.with_better_head(at) if learn_head else at
            pairs = at.pairs()
            extremal = dealt.each(lambda l: _best(method.H, sets[l], pairs[l], at.controls[l]))
            new, step = method.step(at, pairs, extremal, rho)
            if variant != "basic" and not new.value < at.value:
                if at.value < before.value:
                    new = at  # the head alone has made J fall: rho stays
                elif restarts == 0:
                    reason = "NO_STEP_LOWERS_J"
                    break
                else:
                    restarts -= 1
                    new, step = method.evaluate(extremal, at.problem.head), rho
            # The change by the head is no estimate.
            predicted.append(at.value - before.value + method.predicted_change(pairs, at.controls, new.controls))
            steps.append(step)
            values.append(new.value)
            rho = step / 2 if variant == "extended" and new is not at else rho
            at = new.as_in_its_network()
            if at.value <= best.value or variant == "basic":
                best = at
            seconds = time.perf_counter() - start
            progress = MSAProgress(len(steps), iterations, at.value, step, seconds, method.evaluations, at.problem)
            reason = watch.reason(progress)
            if reason is not None:
                break
    return MSAResult(
        problem=best.problem, controls=best.controls, value=best.value, iterations=len(steps),
        converged=reason == "NO_STEP_LOWERS_J", reason=reason or "ITERATIONS",
        values=np.array(values), changes=np.diff(np.array(values)),
        predicted=np.array(predicted), steps=np.array(steps), evaluations=method.evaluations,
        seconds=time.perf_counter() - start,
    )  # fmt: skip


@dataclass(frozen=True)
class _Point:
    """Controls, one for each layer, with the problem of their network, its recorded functional and run, and J."""

    controls: list[Controls]
    problem: LearningProblem
    J: ReducedFunctional
    run: Run
    value: float

    def pairs(self) -> list[Pair]:
        """State and co-state in the middle of each layer."""
        self.J.derivative()
        return middle_pairs(self.run, "maximise")

    def as_in_its_network(self) -> _Point:
        """The same point, with the controls of least rank that its network has."""
        net = self.problem.net
        return replace(self, controls=[Controls.of_layer(net, l) for l in range(net.layers)])


class _Method:
    """A variant of the method, and how many networks it has run.

    Attributes
    ----------
    H : Hamiltonian
        The problem's, to be maximised.
    evaluations : int
    """

    def __init__(self, problem: LearningProblem, variant: str, largest_rho: float, dealt: DealtLayers):
        self._dealt = dealt
        self._problem, self._variant, self._largest_rho = problem, variant, largest_rho
        self._lengths = np.diff(problem.net.times)
        self.H = Hamiltonian.of(problem, "maximise")
        self.evaluations = 0

    def evaluate(self, controls: list[Controls], head: Head | None = None) -> _Point:
        """Record the problem with the network of these controls, and this head in the place of the problem's."""
        self.evaluations += 1
        problem = self._problem if head is None else self._problem.replace(head=head)
        changed = problem_of(problem, controls)
        J, run = changed.record()
        return _Point(controls, changed, J, run, self._dealt.first(float(J.functional)))

    def with_better_head(self, at: _Point) -> _Point:
        """The same controls with W and mu that make J smaller, or the same point if none were found."""
        new = self.evaluate(at.controls, better_head(at.problem, at.run.final))
        return new if new.value < at.value else at

    def step(self, at: _Point, pairs: list[Pair], extremal: list[Controls], rho: float) -> tuple[_Point, float]:
        """The first trial that lowers J, or the last one if none does, with its rho or share; "basic" has one trial."""
        if self._variant == "basic":
            return self.evaluate(extremal, at.problem.head), 1.0
        extended = self._variant == "extended"
        step = rho if extended else 1.0
        while True:
            new = self.evaluate(
                self._dealt.each(lambda l: augmented_step(self.H, pairs[l], at.controls[l], extremal[l], step)[0])
                if extended else [c.towards(e, step) if step < 1 else e for c, e in zip(at.controls, extremal)],
                at.problem.head,
            )  # fmt: skip
            if new.value < at.value:
                return new, step
            step = step * 4 if extended else step / 2
            if step > self._largest_rho or step < _LEAST_SHARE:
                return new, step

    def predicted_change(self, pairs: list[Pair], controls: list[Controls], new: list[Controls]) -> float:
        """Minus the integral over t of the change of H at fixed f and r."""
        H = self.H
        return -sum(tau * (H(p, n) - H(p, c)) for tau, p, n, c in zip(self._lengths, pairs, new, controls))


def _best(H: Hamiltonian, A: AnySet, pair: Pair, present: Controls) -> Controls:
    """The extremal controls of (4.10), those of a box with a cost, or rows that are raised from the present ones."""
    if isinstance(A, ControlSet):
        if H.charges_controls:
            return controls_with_cost(H, check_costly(H, A), pair, present).controls
        return extremal_controls(H.Y, A, pair).controls
    return raise_controls(H, A, pair, present)[0]


def _start(net: ResidualNetwork, sets: list[AnySet], project: bool) -> list[Controls]:
    """The present controls, one for each layer, if they are in its set, or controls in it made of them."""
    Y, controls = net.Y, [Controls.of_layer(net, l) for l in range(net.layers)]
    if project:
        return [
            controls_within(Y, A, c) if isinstance(A, ControlSet) else nearest_controls(A, c) for A, c in zip(sets, controls)
        ]
    remedy = "project=True starts within A"
    for l, (A, c) in enumerate(zip(sets, controls)):
        if isinstance(A, ControlSet):
            refuse_controls_outside(Y, l, A, c, remedy)
            continue
        apart, y = distance(Y, c, nearest_controls(A, c))
        if apart > _ROUND_OFF:
            at = ", ".join(f"{x:.4g}" for x in y)
            raise ValueError(
                f"A: expected a set with the controls of all layers in it and in the span of its bases; layer {l} has "
                f"controls outside by {apart:.1e} of their size at y = ({at}); {remedy}"
            )
    return controls


def _checked_sets(problem: LearningProblem, A: AnySet | Sequence[AnySet], variant: str) -> list[AnySet]:
    """The set of each layer."""
    sets = sets_of_layers(A, problem.net, ControlSet, RowBox, RowBall, SpanBox)
    choice("variant", variant, _VARIANTS)
    if variant != "basic" and not all(one.convex for one in sets if isinstance(one, ControlSet)):
        raise ValueError(
            f"A: expected a convex set, as variant {variant!r} mixes controls; use the variant 'basic' with this one"
        )
    return sets


def problem_of(problem: LearningProblem, controls: list[Controls]) -> LearningProblem:
    """The same problem with a new network of these controls, one for each layer. Collective."""
    net = problem.net
    phis, psis, betas = zip(*(c.in_bases(net.Y) for c in controls))
    new = net.replace(kernel=Kernel(list(phis), list(psis)), bias=None)
    for l, (c, beta) in enumerate(zip(controls, betas)):
        new.bias.set(l, c.a)
        new.kernel.set(l, beta)
    return problem.replace(net=new)
