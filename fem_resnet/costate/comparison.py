"""The co-state and gradient of a network, by pyadjoint and TSAdjoint, compared with solutions of (4.2).

Over step sizes dt, dt/2, dt/4, .. the differences from an accurate solution of (4.2) fall with the order of the network's
scheme. If (4.2) is stepped by the partner of that scheme, the differences are round-off (`costate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import firedrake as fd
import numpy as np

from fem_resnet.arguments import integer, integer_array
from fem_resnet.costate.costate import Costate, solve_costate
from fem_resnet.costate.terminal import terminal_costate
from fem_resnet.costate.trajectory import solve_trajectory
from fem_resnet.features import REGULARISED, supports
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.run import Run
from fem_resnet.time_stepping.evolution import TYPES

__all__ = ["CostateCheck", "costate_check"]


@dataclass(frozen=True)
class CostateCheck:
    """Differences of a network's co-state and gradient, by pyadjoint and TSAdjoint, from those that (4.2) gives.

    All differences are relative, without unit. For co-states it is the largest one over the layer interfaces, in the norm of
    L2(Y); for gradients it is one in the norm of bias and kernel together. Each tuple has one entry for each refinement.

    Attributes
    ----------
    step_sizes : tuple of float
        The largest step of the network, in the unit of time.
    costate, gradient : tuple of float
        Differences from an accurate solution of (4.2).
    partner_costate, partner_gradient : tuple of float
        Differences where (4.2) is stepped by the partner of the network's scheme: round-off. Empty if there is no partner.
    """

    step_sizes: tuple[float, ...]
    costate: tuple[float, ...]
    gradient: tuple[float, ...]
    partner_costate: tuple[float, ...]
    partner_gradient: tuple[float, ...]

    @property
    def costate_orders(self) -> tuple[float, ...]:
        """The observed orders of the co-state between neighbouring step sizes."""
        return _orders(self.step_sizes, self.costate)

    @property
    def gradient_orders(self) -> tuple[float, ...]:
        """The observed orders of the gradient between neighbouring step sizes."""
        return _orders(self.step_sizes, self.gradient)

    def __str__(self) -> str:
        lines = [
            f"{'step':>10}{'co-state':>12}{'order':>7}{'gradient':>12}{'order':>7}"
            + (f"{'co-state':>12}{'gradient':>12}  (by the partner)" if self.partner_costate else "")
        ]
        orders = zip((None, *self.costate_orders), (None, *self.gradient_orders))
        for n, (h, (of_costate, of_gradient)) in enumerate(zip(self.step_sizes, orders)):
            first, second = ("" if order is None else f"{order:.2f}" for order in (of_costate, of_gradient))
            line = f"{h:>10.5f}{self.costate[n]:>12.2e}{first:>7}{self.gradient[n]:>12.2e}{second:>7}"
            if self.partner_costate:
                line += f"{self.partner_costate[n]:>12.1e}{self.partner_gradient[n]:>12.1e}"
            lines.append(line)
        return "\n".join(lines)


@supports(
    "channels", "learned_factors", "learned_times", "nodal_bias", "bases_by_layer", "linear_in_time", "shared_in_time",
    "discrete_gradient", "single_precision", "head", *REGULARISED, "running", "running_of_controls", "learned_both",
    "many_samples", "weights",
)  # fmt: skip
def costate_check(
    problem: LearningProblem,
    *,
    refinements: Sequence[int] = (1, 2, 4, 8),
    steps: int | None = None,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> CostateCheck:
    """Compare the co-state and the gradient in a and b of a learning problem with (4.2) - (4.4), (4.7). Collective.

    The problem, its parameters and the tape are not changed.

    Parameters
    ----------
    problem
        The problem, at its present parameters, with a smooth activation.
    refinements
        Factors of the number of the network's steps, one after the other: integers, shape (refinements,).
    steps
        The number of steps in each layer for (4.2); twice the finest of the network's if left out.
    solver_parameters, options_prefix
        PETSc options of the TS that solves (2.8) and (4.2), over `fem_resnet.time_stepping.evolution.SOLVER_PARAMETERS`.

    Returns
    -------
    CostateCheck

    Raises
    ------
    TypeError, ValueError
        If an argument or option does not fit; if the network has no layers or adapts its steps; or if its kernel is made of
        other controls, for which (4.4) is not the gradient.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Batch, LabelSpace, LearningProblem, ResidualNetwork, laplace_basis, least_squares
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 4), layers=2)
    >>> for l in range(2):
    ...     net.kernel.set(l, [[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 2]])
    >>> x = Y.coordinates
    >>> problem = LearningProblem(net, None, least_squares, None, Batch(Y.batch(x[:, 0]), Y.batch(x[:, 1])))
    >>> check = costate_check(problem, refinements=[1, 2])
    >>> [round(order) for order in check.costate_orders + check.gradient_orders]
    [4, 4]
    >>> max(check.partner_costate + check.partner_gradient) < 1e-12
    True
    """
    net = problem.net
    refinements = [integer("refinements", n) for n in integer_array("refinements", refinements, ("refinements",)).tolist()]
    steps = 2 * max(refinements) * net.steps if steps is None else steps
    options = {"solver_parameters": solver_parameters, "options_prefix": options_prefix}
    trajectory = solve_trajectory(net, problem.batch.inputs, steps=steps, **options)
    cost = {"running": problem.running, "weights": problem.batch.weights}
    exact = solve_costate(trajectory, terminal_costate(problem, trajectory.final), **cost, **options)
    exact_gradient = exact.gradient(problem.regulariser)
    sizes, costates, gradients, by_partner = [], [], [], []
    for refinement in refinements:
        finer = net.replace(layers=replace(net.settings.layers, steps=refinement * net.steps))
        J, run = problem.replace(net=finer).record()
        gradient = J.derivative(apply_riesz=True)[: len(exact_gradient)]
        sizes.append(float(np.diff(net.times).max()) / finer.steps)
        costates.append(_costate_difference(run, exact))
        gradients.append(_gradient_difference(net, gradient, exact_gradient))
        partner = _by_partner(problem, finer, cost)
        if partner is not None:
            difference = _gradient_difference(net, gradient, partner.gradient(problem.regulariser))
            by_partner.append((_costate_difference(run, partner), difference))
    of_partner = tuple(zip(*by_partner)) or ((), ())
    return CostateCheck(tuple(sizes), tuple(costates), tuple(gradients), *of_partner)


def _by_partner(problem: LearningProblem, net: ResidualNetwork, cost: dict) -> Costate | None:
    """(4.2), stepped by the partner of the network's scheme with the network's steps; None if there is no partner."""
    own = {name: value for name, value in net.solver_parameters.items() if name.startswith("ts_")}
    if own["ts_type"] not in TYPES:
        return None
    initial = problem.batch.inputs
    trajectory = solve_trajectory(net, initial, steps=net.steps, keep_stages=True, solver_parameters=own)
    if trajectory.scheme.partner() is None:
        return None
    return solve_costate(trajectory, terminal_costate(problem, trajectory.final), partner=True, **cost)


def _costate_difference(run: Run, costate: Costate) -> float:
    """The largest difference over the layer interfaces in L2(Y), divided by the largest co-state unless this is 0."""
    Y = run.net.Y
    exact = [costate.at_layer(layer) for layer in range(run.net.layers + 1)]
    size = max(Y.norm(r) for r in exact)
    if size == 0.0:
        return max(Y.norm(run.costate(layer)) for layer in range(run.net.layers + 1))
    return max(Y.norm(Y.like(r, Y.values(run.costate(layer)) - Y.values(r))) for layer, r in enumerate(exact)) / size


def _gradient_difference(net: ResidualNetwork, these: Sequence[fd.Function], those: Sequence[fd.Function]) -> float:
    """The norm of the difference of two gradients, divided by the norm of the second unless this is 0."""
    owners = [(parameter, k) for parameter in (net.bias, net.kernel) for k in range(len(parameter.functions))]
    squares = np.zeros(2)
    for (parameter, k), this, that in zip(owners, these, those, strict=True):
        this, that = (parameter.space_bases[k].read(function) for function in (this, that))
        squares += [parameter.inner(k, this - that, this - that), parameter.inner(k, that, that)]
    difference, size = np.sqrt(squares)
    return float(difference / size if size else difference)


def _orders(sizes: Sequence[float], differences: Sequence[float]) -> tuple[float, ...]:
    with np.errstate(divide="ignore", invalid="ignore"):
        falls = np.log(np.divide(differences[:-1], differences[1:]))
        return tuple((falls / np.log(np.divide(sizes[:-1], sizes[1:]))).tolist())
