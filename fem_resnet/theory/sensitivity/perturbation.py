"""Perturbations of a solution in continuous time: (3.6), the formulas of Duhamel in 4.1, the identity of 3.5.

Along a solution f of (2.8), with u = a - B_b f, let M(t, s) be the flow of

    w_t = - sigma'(u) B_b w.                                                                              (3.6)

The derivatives of f(T) in directions alpha of a and beta of b, g = D_a f(alpha) and h = D_b f(beta), solve (3.6) with the
sources sigma'(u) alpha and - sigma'(u) B_beta f. So (Duhamel, section 4.1)

    g(T) =   int_0^T M(T, s) ( sigma'(u(s)) alpha(s) ) ds,
    h(T) = - int_0^T M(T, s) ( sigma'(u(s)) B_beta f(s) ) ds.

Paired with r(T), by M(T, s)^T r(T) = r(s), these are the gradients (4.3) and (4.4). Where sigma' > 0, (3.6) times
w / sigma'(u) is

    1/2 d/dt int w^2 / sigma'(u) dy = - (B w, w) - 1/2 int sigma''(u) u_t w^2 / sigma'(u)^2 dy.

(The formula in section 3.5 has u(t) in place of u_t, which is wrong; the sentence below it has u_t.)

This module shares no code with the steps and tangents of the layers, except for the evaluation of (2.8) along a trajectory.
It has the formulas as they stand, to O(h^6) in the steps of the trajectory. A network agrees with them to the order of its
scheme. `conditioning` has the flow of the discrete network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import firedrake as fd
import numpy as np

from fem_resnet.arguments import instance, number
from fem_resnet.costate.trajectory import LayerTrajectory, Trajectory
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.time_stepping.evolution import FieldStepper, Moment

__all__ = ["WeightedIdentity", "duhamel", "solve_linearised", "weighted_identity"]

#: Gauss's rule with three points in [0, 1]. Its order is 6, the order of the trajectory.
_POINTS = 0.5 + np.array([-1.0, 0.0, 1.0]) * np.sqrt(0.15)
_WEIGHTS = np.array([5.0, 8.0, 5.0]) / 18

#: ``advance(layer, w, start, end, steps)``: w at the time `end` from w at `start`, both in one layer.
Advance = Callable[[LayerTrajectory, np.ndarray, float, float, int], np.ndarray]


@supports("channels", "no_layers", *HELD, *STEPPED)
def solve_linearised(
    trajectory: Trajectory,
    direction: fd.Function,
    start: float = 0.0,
    end: float | None = None,
    *,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> fd.Function:
    """`M(t, s) w` of (3.6) along a trajectory, in continuous time. Collective over the ranks of the label domain.

    Parameters
    ----------
    trajectory
        f, from `solve_trajectory`; (3.6) is solved with its steps.
    direction
        w at the time `start`, a Function of the space of f.
    start, end
        s and t, 0 <= s <= t <= T; `end` is T if left out.
    solver_parameters, options_prefix
        PETSc options of the TS of (3.6), over `fem_resnet.time_stepping.evolution.SOLVER_PARAMETERS`, and their prefix:
        `rk`, `theta`, `beuler` or `cn` with fixed steps.

    Returns
    -------
    Function
        w at the time `end`, a new Function.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    final = float(trajectory.net.times[-1])
    start = number("start", start, least=0, most=final)
    end = final if end is None else number("end", end, least=start, most=final)
    w = _read(trajectory, direction)
    with _linearised(trajectory, solver_parameters, options_prefix) as advance:
        for layer in trajectory.layers:
            begin, stop = max(start, layer.inputs.start), min(end, layer.end)
            if begin < stop:
                steps = int(np.ceil(trajectory.steps * (stop - begin) / layer.inputs.length - 1e-9))
                w = advance(layer, w, begin, stop, steps)
    return trajectory.net.Y.like(direction, w)


@supports(
    "channels", "no_layers", "learned_times", "kernel_set", "nodal_bias", "bases_by_layer", "linear_in_time", "shared_in_time",
    *STEPPED,
)  # fmt: skip
def duhamel(
    trajectory: Trajectory,
    directions: Sequence[fd.Function],
    *,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> fd.Function:
    """D_a f(alpha) + D_b f(beta) at T by Duhamel's integrals of 4.1, the transposes of (4.3) and (4.4).

    Collective over the ranks of the label domain.

    Parameters
    ----------
    trajectory
        f, from `solve_trajectory`.
    directions
        The coefficients of alpha and then of beta: a Function for each one of ``net.bias.functions`` and
        ``net.kernel.functions``, of the same space.
    solver_parameters, options_prefix
        As for `solve_linearised`.

    Raises
    ------
    TypeError, ValueError
        If the number of the directions or their spaces do not fit, the factors of the kernel are learned, or PETSc refuses
        the options.

    Examples
    --------
    >>> from firedrake import Function, FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, ResidualNetwork, laplace_basis, solve_trajectory
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 3), layers=2, activation="identity")
    >>> alpha = [Function(Y.V).assign(1.0), Function(Y.V).assign(3.0)]
    >>> beta = [Function(p.function_space()) for p in net.kernel.functions]
    >>> g = duhamel(solve_trajectory(net, Y.batch(0 * Y.weights)), alpha + beta)
    >>> round(float(g.dat.data_ro.max()), 12)  # without a kernel M = I, and g(T) is the integral of alpha
    2.0
    """
    net = trajectory.net
    own = [*net.bias.functions, *net.kernel.functions]
    for direction in instance(
        "directions", directions, Sequence, "give a Function for each one of net.bias.functions and net.kernel.functions"
    ):
        instance("directions", direction, fd.Function)
    spaces = [function.function_space() for function in own]
    if [d.function_space() for d in directions] != spaces:
        raise ValueError(
            f"directions: expected {len(own)} Functions of the spaces of net.bias.functions and net.kernel.functions, "
            f"got {len(directions)}" + (", of other spaces" if len(directions) == len(own) else "")
        )
    coefficients, of = net.coefficients(), {id(function): d for function, d in zip(own, directions)}
    moved = coefficients.on_layers(
        [slot.read(of[id(p)]) for slot, p in zip(coefficients.slots, coefficients.functions)], directions=True
    )
    w = np.zeros_like(net.Y.values(trajectory.final))

    def add_source(layer: LayerTrajectory, direction: LayerInputs, t: float, weight: float, w: np.ndarray) -> None:
        f, s = layer.path(t), layer.fraction(t)
        source = direction.bias.coefficients(s)[:, None]
        source = source - layer.inputs.factors.apply(direction.beta.coefficients(s), f)
        w += weight * net.activation.derivative(layer.argument(t, f)) * source

    with _linearised(trajectory, solver_parameters, options_prefix) as advance:
        for layer, direction in zip(trajectory.layers, moved):
            w = _through(layer, w, trajectory.steps, advance, partial(add_source, layer, direction))
    return net.Y.like(trajectory.final, w)


@dataclass(frozen=True)
class WeightedIdentity:
    """The identity of section 3.5, integrated over each layer: `change = kernel + non_autonomous`.

    Get it from `weighted_identity`. All terms are sums over the samples, shape (layers,).

    Attributes
    ----------
    change : numpy.ndarray
        The change of 1/2 int w^2 / sigma'(u) dy from the start to the end of each layer. Between two layers it may jump, as
        u does.
    kernel : numpy.ndarray
        - int (B w, w) dt.
    non_autonomous : numpy.ndarray
        - 1/2 int int sigma''(u) u_t w^2 / sigma'(u)^2 dy dt.
    as_printed : numpy.ndarray
        The same with u in place of u_t, with which the identity does not hold.
    """

    change: np.ndarray
    kernel: np.ndarray
    non_autonomous: np.ndarray
    as_printed: np.ndarray

    @property
    def defect(self) -> np.ndarray:
        """`change - kernel - non_autonomous`, the error of the steps in t, shape (layers,)."""
        return self.change - self.kernel - self.non_autonomous


@supports("channels", "no_layers", *HELD, *STEPPED)
def weighted_identity(
    trajectory: Trajectory,
    direction: fd.Function,
    *,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> WeightedIdentity:
    """Both sides of the identity of section 3.5 for the solution w of (3.6) with w(0) = direction.

    Collective over the ranks of the label domain.

    Parameters
    ----------
    trajectory
        f, from `solve_trajectory`.
    direction
        w(0), a Function of the space of f.
    solver_parameters, options_prefix
        As for `solve_linearised`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, sigma' is not positive or jumps, or sigma'(u) underflows to 0.
    """
    Y, sigma = trajectory.net.Y, trajectory.net.activation
    if not sigma.properties.strictly_increasing or sigma.kinks:
        raise ValueError(f"trajectory: expected an activation with a continuous sigma' > 0, got {sigma.name}")
    w = _read(trajectory, direction)

    def integral(values: np.ndarray) -> float:
        return float(Y.sum(np.sum(Y.weights @ values)))

    def energy(layer: LayerTrajectory, t: float, w: np.ndarray) -> float:
        slope = sigma.derivative(layer.argument(t, layer.path(t)))
        Y.agree(bool((slope > 0).all()), f"trajectory: sigma'(u) is 0 in double precision at t = {t:g}")
        return integral(w**2 / slope) / 2

    def integrands(layer: LayerTrajectory, terms: np.ndarray, t: float, weight: float, w: np.ndarray) -> None:
        f = layer.path(t)
        u = layer.argument(t, f)
        of_kernel = integral(layer.inputs.factors.apply(layer.beta(t), w) * w)
        part = sigma.second_derivative(u) * (w / sigma.derivative(u)) ** 2 / 2
        terms -= weight * np.array([of_kernel, integral(part * _argument_rate(layer, t, f, sigma(u))), integral(part * u)])

    rows = []
    with _linearised(trajectory, solver_parameters, options_prefix) as advance:
        for layer in trajectory.layers:
            terms, before = np.zeros(3), energy(layer, layer.inputs.start, w)
            w = _through(layer, w, trajectory.steps, advance, partial(integrands, layer, terms))
            rows.append((energy(layer, layer.end, w) - before, *terms))
    return WeightedIdentity(*np.array(rows).reshape(len(rows), 4).T)


def _argument_rate(layer: LayerTrajectory, t: float, f: np.ndarray, f_t: np.ndarray) -> np.ndarray:
    """u_t = a_t - B_t f - B f_t, shape (nodes, samples); inside of a layer a and b are linear in t."""
    bias, beta, length = layer.inputs.bias, layer.inputs.beta, layer.inputs.length
    a_t = (bias.coefficients(1.0) - bias.coefficients(0.0)) / length
    beta_t = (beta.coefficients(1.0) - beta.coefficients(0.0)) / length
    apply = layer.inputs.factors.apply
    return a_t[:, None] - apply(beta_t, f) - apply(layer.beta(t), f_t)


@contextmanager
def _linearised(trajectory: Trajectory, solver_parameters: dict | None, options_prefix: str | None) -> Iterator[Advance]:
    """The function that steps (3.6) along a trajectory, in the nodal values. Collective."""
    Y, sigma = trajectory.net.Y, trajectory.net.activation
    layer: LayerTrajectory
    start: float

    def rate(moment: Moment, w: np.ndarray) -> np.ndarray:
        t = start + moment.t
        slope = sigma.derivative(layer.argument(t, layer.path(t)))
        return -slope * layer.inputs.factors.apply(layer.beta(t), w)

    samples = Y.values(trajectory.final).shape[1]
    with FieldStepper(Y, samples, rate, lambda moment, w, x: rate(moment, x), solver_parameters, options_prefix) as stepper:

        def advance(of_layer: LayerTrajectory, w: np.ndarray, begin: float, end: float, steps: int) -> np.ndarray:
            nonlocal layer, start
            layer, start = of_layer, begin
            return stepper.solve(w, end - begin, steps)[-1]

        yield advance


def _through(
    layer: LayerTrajectory,
    w: np.ndarray,
    steps: int,
    advance: Advance,
    visit: Callable[[float, float, np.ndarray], None],
) -> np.ndarray:
    """W at the end of a layer, after a visit to all points of Gauss's rule on it.

    ``visit(t, weight, w)`` gets the time, the weight and w there, and may add to w.
    """
    start, h = layer.inputs.start, layer.inputs.length / steps
    times = start + h * np.add.outer(np.arange(steps), _POINTS).ravel()
    for t, weight in zip(times, np.tile(h * _WEIGHTS, steps)):
        w = advance(layer, w, start, t, 1)
        visit(t, weight, w)
        start = t
    return advance(layer, w, start, layer.end, 1)


def _read(trajectory: Trajectory, direction: fd.Function) -> np.ndarray:
    """Values of a direction from outside at the owned nodes, shape (nodes, samples)."""
    trajectory.net.Y.check_batch(direction, "direction")
    space = trajectory.final.function_space()
    if direction.function_space() != space:
        raise ValueError(f"direction: expected a Function of {space}, got {direction.function_space()}")
    return np.array(trajectory.net.Y.values(direction))
