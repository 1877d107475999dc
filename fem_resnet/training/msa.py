"""The method of successive approximations, Algorithm 2, and what makes it work.

An iteration solves (4.1) forward and (4.2) backward at the present controls, r* = -r with r(T) = ftilde - f(T) in the sign of
section 4.2, and takes new controls in each layer. (Algorithm 2 prints the backward equation without r: it is
r_t = B^T(sigma'(u) r).) With theta = (a, b) and e the extremal controls of (4.10):

    "basic"      theta = e, as printed. J may rise or oscillate.
    "damped"     theta + s (e - theta), s = 1, 1/2, 1/4, ... until J falls. Convex control sets only.
    "extended"   Li, Chen, Tai and E (2018): in place of H the augmented Hamiltonian is made larger,

                     H(f, r, theta) - rho/2 |f_t - H_r(f, r, theta)|^2 - rho/2 |r_t + H_f(f, r, theta)|^2,

                 with f_t and r_t those of the present controls, in L2(Y); rho is raised until J falls, and lowered again
                 after that. H_f couples all y, so it is one problem a layer, over theta + s(y) (e(y) - theta(y)) with a share
                 s(y) in [0, 1] at each y, all y at once, by projected ascent from s = 0, where the augmented Hamiltonian
                 is H(f, r, theta), below which it never is. rho = 0 gives s = 1, basic MSA. Convex control sets only.

No step needs another layer's, so they can be made in parallel; here the ranks share the nodes of each. f and r are taken at
a layer's middle, to second order in its length: near a stationary point of J no rho makes J fall, and the method ends there.

For many samples (4.10) does not hold; A is then a box or ball of rows (`row_controls`), and e(y) the row found by ascent
from the present one.

New controls leave any fixed span, so each iteration has a new network, whose layers have bases of their own, of least rank:
2 for basic MSA, for the others 2 more an iteration at most. Head and data stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from petsc4py import PETSc

from fem_resnet.arguments import choice, flag, instance, integer, number
from fem_resnet.control.control_set import ControlSet
from fem_resnet.control.hamiltonian import Controls, Hamiltonian, Pair, middle_pairs
from fem_resnet.control.maximum_principle import controls_within, extremal_controls, refuse_controls_outside
from fem_resnet.control.row_controls import RowBall, RowBox, SpanBox, distance, nearest_controls, raise_controls
from fem_resnet.features import STEPPED, supports
from fem_resnet.learning.objective import LearningProblem
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.training.gradient import check_monitor, tell

__all__ = ["MSAProgress", "MSAResult", "augmented_step", "msa"]

_VARIANTS = ("basic", "damped", "extended")
#: Controls this far from a set of rows, in parts of their size, are in it: bases of least rank leave round-off.
_ROUND_OFF = 1e-10


@dataclass(frozen=True)
class MSAProgress:
    """One iteration: its number of at most `iterations`, J, rho or the share s, seconds since the start, networks run so far,
    and the problem whose parameters these are.
    """

    iteration: int
    iterations: int
    value: float
    step: float
    seconds: float
    evaluations: int
    problem: LearningProblem = field(repr=False)

    def __str__(self) -> str:
        return (
            f"iteration {self.iteration:4d} of {self.iterations}   J = {self.value:.8e}   "
            f"step {self.step:.2e}   {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class MSAResult:
    """How the method ended. Continue with ``msa(result.problem, ..)``.

    Attributes
    ----------
    problem : LearningProblem
        With the network of the last controls, those of least J where `variant` is not "basic".
    controls : list of Controls
        One a layer.
    value : float
        J of these.
    iterations : int
    converged : bool
        Whether nothing was left to gain: no step, or no share, made J fall.
    reason : str
    values : numpy.ndarray
        J, the start included.
    changes, predicted : numpy.ndarray
        J's change in each iteration, and minus the integral over t of the change of H at fixed f and r, which is what Li et
        al. estimate it by, to first order in the change of the controls and second in the length of layers.
    steps : numpy.ndarray
        rho of "extended", s of the others.
    evaluations : int
        How many networks were run.
    seconds : float
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


# (4.10) asks for a J that depends on (a, b) through f alone.
@supports("nodal_bias", "bases_by_layer", *STEPPED, "head", "running", "many_samples", "weights")
@supports(
    "nodal_bias", "bases_by_layer", *STEPPED, "head", "running", "weights", tool="msa, A pointwise",
    when=lambda problem, A, **options: isinstance(A, ControlSet), instead="give A as a RowBox, RowBall or SpanBox",
)  # fmt: skip
@PETSc.Log.EventDecorator("fem_resnet:msa")
def msa(
    problem: LearningProblem,
    A: ControlSet | RowBox | RowBall | SpanBox,
    *,
    variant: str = "extended",
    iterations: int = 50,
    rho: float = 1.0,
    largest_rho: float = 1e8,
    restarts: int = 0,
    project: bool = False,
    monitor: Callable[[MSAProgress], bool | None] | None = None,
) -> MSAResult:
    """Train by Algorithm 2 from the present controls, which lie in A. Collective.

    Parameters
    ----------
    problem
        Bias and kernel with a value on each layer, no regulariser; any head and loss, which stay. It is not changed: the
        result has a problem of its own.
    A
        Where (a, b) lies pointwise, for one sample; `RowBox`, `RowBall` or `SpanBox` for any number.
    variant
        "basic", "damped" or "extended".
    iterations
        At most so many.
    rho, largest_rho
        Where "extended" starts, and above which it gives up.
    restarts
        How often, where no step lowers J, it goes on from the extremal controls all the same, a step of basic MSA; J rises
        there, and the result has the controls of least J.
    project
        Whether it starts from controls in A that are made of the present ones: the nearest for `RowBox`, `RowBall` and
        `SpanBox`; else mixtures with a point of A, which is to be convex then.
    monitor
        Called after each iteration on every rank with its `MSAProgress`; returning True (on one rank at least) stops. If
        left out, a line is logged on rank 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what is said above, or differs between ranks; if the present controls are not in A, or A is not convex and mixtures are
        asked for.

    Examples
    --------
    >>> result = msa(problem, Box((-1, 1), (-1, 1)), variant="extended")  # doctest: +SKIP
    """
    _check(problem, A, variant)
    project = flag("project", project)
    check_monitor(monitor)
    iterations, restarts = integer("iterations", iterations, least=0), integer("restarts", restarts, least=0)
    rho, largest_rho = number("rho", rho, above=0), number("largest_rho", largest_rho, above=0)
    start = time.perf_counter()
    net = problem.net
    H = Hamiltonian.of(problem, "maximise")
    lengths = np.diff(net.times)
    controls = _start(net, A, project)
    evaluations = 0

    def evaluate(controls: list[Controls]):
        nonlocal evaluations
        evaluations += 1
        changed = problem_of(problem, controls)
        J, run = changed.record()
        return changed, J, run, float(J.functional)

    changed, J, run, value = evaluate(controls)
    best, restarted = (value, changed, controls), 0
    values, predicted, steps, reason = [value], [], [], "ITERATIONS"
    for iteration in range(1, iterations + 1):
        J.derivative()
        pairs = middle_pairs(run, "maximise")
        extremal = [_best(H, A, pair, c) for pair, c in zip(pairs, controls)]
        step = rho if variant == "extended" else 1.0
        while True:
            if variant == "extended":
                new = [augmented_step(H, p, c, e, step)[0] for p, c, e in zip(pairs, controls, extremal)]
            else:
                new = [c.towards(e, step) if step < 1 else e for c, e in zip(controls, extremal)]
            trial = evaluate(new)
            if variant == "basic" or trial[-1] < value:
                break
            step = step * 4 if variant == "extended" else step / 2
            if step > largest_rho or step < 2.0**-40:
                break
        if variant != "basic" and not trial[-1] < value:
            if restarted == restarts:
                reason = "NO_STEP_LOWERS_J"
                break
            restarted += 1
            new, step = extremal, rho
            trial = evaluate(new)
        predicted.append(-sum(tau * (H(p, n) - H(p, c)) for tau, p, n, c in zip(lengths, pairs, new, controls)))
        steps.append(step)
        changed, J, run, value = trial
        controls = [Controls.of_layer(changed.net, l) for l in range(net.layers)]
        values.append(value)
        if value <= best[0] or variant == "basic":
            best = value, changed, controls
        rho = step / 2 if variant == "extended" else rho
        progress = MSAProgress(iteration, iterations, value, step, time.perf_counter() - start, evaluations, changed)
        if tell(net.Y.comm, progress, monitor):
            reason = "STOPPED"
            break
    values = np.array(values)
    value, changed, controls = best
    return MSAResult(
        problem=changed, controls=controls, value=value, iterations=len(steps), converged=reason == "NO_STEP_LOWERS_J",
        reason=reason, values=values, changes=np.diff(values), predicted=np.array(predicted), steps=np.array(steps),
        evaluations=evaluations, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _best(H: Hamiltonian, A: ControlSet | RowBox | RowBall | SpanBox, pair: Pair, present: Controls) -> Controls:
    if isinstance(A, ControlSet):
        return extremal_controls(H.Y, A, pair).controls
    return raise_controls(H, A, pair, present)[0]


def _start(net: ResidualNetwork, A: ControlSet | RowBox | RowBall | SpanBox, project: bool) -> list[Controls]:
    """The present controls, one a layer, in A."""
    Y, controls, remedy = net.Y, [Controls.of_layer(net, l) for l in range(net.layers)], "project=True starts within A"
    if isinstance(A, ControlSet):
        if project:
            return [controls_within(Y, A, c) for c in controls]
        refuse_controls_outside(Y, A, controls, remedy)
        return controls
    within = [nearest_controls(A, c) for c in controls]
    if project:
        return within
    for l, (c, nearest) in enumerate(zip(controls, within)):
        apart, y = distance(Y, c, nearest)
        if apart > _ROUND_OFF:
            at = ", ".join(f"{x:.4g}" for x in y)
            raise ValueError(
                f"A: the controls of layer {l} are outside of it, or of the span of its bases, by {apart:.1e} of their size "
                f"at y = ({at}); {remedy}"
            )
    return controls


def _check(problem: LearningProblem, A: ControlSet | RowBox | RowBall | SpanBox, variant: str) -> None:
    net, pointwise = problem.net, isinstance(A, ControlSet)
    instance("A", A, (ControlSet, RowBox, RowBall, SpanBox))
    if not (pointwise or A.psi.Y is net.Y):
        raise ValueError(f"A: expected rows on the network's label space {net.Y!r}, got rows on {A.psi.Y!r}")
    choice("variant", variant, _VARIANTS)
    if pointwise and variant != "basic" and not A.convex:
        raise ValueError(
            f"A: expected a convex set, as variant {variant!r} mixes controls; use the variant 'basic' with this one"
        )


def problem_of(problem: LearningProblem, controls: list[Controls]) -> LearningProblem:
    """The same problem with a new network of these controls, one a layer. Collective."""
    net = problem.net
    phis, psis, betas = zip(*(c.in_bases(net.Y) for c in controls))
    new = net.replace(phi=list(phis), psi=list(psis), bias=None)
    for l, (c, beta) in enumerate(zip(controls, betas)):
        new.bias.set(l, c.a)
        new.kernel.set(l, beta)
    return problem.replace(net=new)


def augmented_step(
    H: Hamiltonian, pair: Pair, controls: Controls, extremal: Controls, rho: float, iterations: int = 30
) -> tuple[Controls, np.ndarray]:
    """Controls of a larger augmented Hamiltonian, and its values, which never fall, the start included. Collective.

    The values are those without a running cost, which is of f alone and the same for all controls. Over controls + s(y) (extremal - controls), 0 <= s <= 1, by projected ascent with backtracking, from s = 0.
    """
    Y, sigma = H.Y, H.activation
    f, r, weights = pair.f, pair.r, Y.weights[:, None]
    u, e = controls.argument(Y, f), extremal.argument(Y, f)
    difference, rate = e - u, sigma(u)
    slope = -controls.transpose(Y, H.slope_times_costate(pair, controls))  # a running cost of f alone drops out

    def evaluate(s):
        """The augmented Hamiltonian, and its gradient in s in L2(Y)."""
        v = u + s[:, None] * difference
        excess = sigma(v) - rate
        inner = sigma.derivative(v) * r
        mine, theirs = (1 - s)[:, None] * inner, s[:, None] * inner
        change = -controls.transpose(Y, mine) - extremal.transpose(Y, theirs) - slope
        value = Y.sum(np.sum(weights * (sigma(v) * r - rho / 2 * (excess**2 + change**2))))
        # d change = -(B_s)^T(sigma'' r du) - (B_e - B_c)^T(sigma' r ds): tested with `change`.
        B_c, B_e = (-(c.argument(Y, change) - c.a[:, None]) for c in (controls, extremal))
        B_s = (1 - s)[:, None] * B_c + s[:, None] * B_e
        gradient = difference * (inner - rho * excess * sigma.derivative(v)) + rho * (
            B_s * sigma.second_derivative(v) * r * difference + (B_e - B_c) * inner
        )
        return float(value), np.sum(gradient, axis=1)

    s = np.zeros(Y.nodes)
    value, gradient = evaluate(s)
    history, length = [value], 1.0 / max(1e-300, float(max(Y.comm.allgather(np.abs(gradient).max(initial=0.0)))))
    if rho == 0:
        s = np.ones(Y.nodes)
        return extremal, np.array([value, evaluate(s)[0]])
    for _ in range(iterations):
        while True:
            trial = np.clip(s + length * gradient, 0, 1)
            new_value, new_gradient = evaluate(trial)
            moved = float(Y.sum(Y.weights @ (trial - s) ** 2))
            if new_value >= value + 1e-4 * moved / length or moved == 0 or length < 1e-300:
                break
            length /= 2
        if moved <= 1e-24 * Y.measure or new_value < value:
            break
        s, value, gradient = trial, new_value, new_gradient
        history.append(value)
        length *= 2
    return controls.towards(extremal, s), np.array(history)
