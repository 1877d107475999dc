"""Perturbations of a solution as it is in continuous time: (3.6), the formulas of Duhamel in 4.1, the identity of 3.5.

Along a solution f of (2.8), u = a - B_b f, with the flow M(t, s) of

    w_t = - sigma'(u) B_b w                                                                               (3.6)

the derivatives of f(T) in directions alpha of a and beta of b, g = D_a f(alpha) and h = D_b f(beta), solve (3.6) with
the sources sigma'(u) alpha and - sigma'(u) B_beta f, so that (Duhamel, section 4.1)

    g(T) =   int_0^T M(T, s) ( sigma'(u(s)) alpha(s) ) ds,
    h(T) = - int_0^T M(T, s) ( sigma'(u(s)) B_beta f(s) ) ds.

Paired with r(T), and M(T, s)^T r(T) = r(s), these are the gradients (4.3) and (4.4). Where sigma' > 0, (3.6) times
w / sigma'(u) is

    1/2 d/dt int w^2 / sigma'(u) dy = - (B w, w) - 1/2 int sigma''(u) u_t w^2 / sigma'(u)^2 dy

(section 3.5, where the formula has u(t) in place of u_t: that does not hold; the sentence below it has u_t).

Nothing is shared here with the layers' own steps and tangents but the trajectory's way to evaluate (2.8): these are the
formulas as they stand, to O(h^6) in the trajectory's steps, and a network agrees to the order of its scheme.
`conditioning` has the flow of the discrete network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np

from fem_resnet.arguments import instance, number
from fem_resnet.costate.trajectory import LayerTrajectory, Trajectory, like
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.time_stepping.evolution import FieldStepper, Moment

__all__ = ["WeightedIdentity", "duhamel", "solve_linearised", "weighted_identity"]

#: Gauss's rule with three points in [0, 1], of order 6 as the trajectory.
_POINTS = 0.5 + np.array([-1.0, 0.0, 1.0]) * np.sqrt(0.15)
_WEIGHTS = np.array([5.0, 8.0, 5.0]) / 18


@supports("no_layers", *HELD, *STEPPED)
def solve_linearised(
    trajectory: Trajectory,
    direction: fd.Function,
    start: float = 0.0,
    end: float | None = None,
    *,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> fd.Function:
    """`M(t, s) w` of (3.6) along a trajectory, in continuous time: w at the time `end`. Collective.

    Parameters
    ----------
    trajectory
        f, from `solve_trajectory`; its steps are those of (3.6).
    direction
        w at the time `start`, a batch as f.
    start, end
        s and t, 0 <= s <= t <= T; T if left out.
    solver_parameters, options_prefix
        PETSc options of the TS of (3.6), over `fem_resnet.time_stepping.evolution.SOLVER_PARAMETERS`: `rk`, `theta`, `beuler`, `cn` with
        fixed steps.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """
    final = float(trajectory.net.times[-1])
    start = number("start", start, least=0, most=final)
    end = final if end is None else number("end", end, least=start, most=final)
    w = _read(trajectory, direction)
    with _Linearised(trajectory, solver_parameters, options_prefix) as linearised:
        for layer in trajectory.layers:
            begin, stop = max(start, layer.inputs.start), min(end, layer.end)
            if begin < stop:
                steps = int(np.ceil(trajectory.steps * (stop - begin) / layer.inputs.length - 1e-9))
                w = linearised.advance(layer, w, begin, stop, steps)
    return like(direction, w)


@supports(
    "no_layers", "learned_times", "stable_kernel", "nodal_bias", "bases_by_layer", "linear_in_time", "shared_in_time", *STEPPED,
)  # fmt: skip
def duhamel(
    trajectory: Trajectory,
    directions: Sequence[fd.Function],
    *,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> fd.Function:
    """D_a f(alpha) + D_b f(beta) at T by Duhamel's integrals of 4.1, whose adjoint is (4.3), (4.4). Collective.

    Parameters
    ----------
    trajectory
        f, from `solve_trajectory`.
    directions
        Coefficients of alpha, then of beta: one Function each of ``net.bias.functions`` and ``net.kernel.functions``,
        of the same spaces.
    solver_parameters, options_prefix
        PETSc options of the TS of (3.6), over `fem_resnet.time_stepping.evolution.SOLVER_PARAMETERS`: `rk`, `theta`, `beuler`, `cn` with
        fixed steps.

    Raises
    ------
    ValueError
        If their number or spaces do not fit, the factors of the kernel are learned, or PETSc refuses the options.

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
        "directions", directions, Sequence, "one Function each of net.bias.functions and net.kernel.functions"
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
    with _Linearised(trajectory, solver_parameters, options_prefix) as linearised:
        for layer, direction in zip(trajectory.layers, moved):
            for t, weight, w in linearised.through(layer, w):
                f, s = layer.path(t), layer.fraction(t)
                source = direction.bias.coefficients(s)[:, None]
                source = source - layer.inputs.factors.apply(direction.beta.coefficients(s), f)
                w += weight * net.activation.derivative(layer.argument(t, f)) * source
            w = linearised.end
    return like(trajectory.final, w)


@dataclass(frozen=True)
class WeightedIdentity:
    """The identity of section 3.5, integrated over each layer: `change = kernel + non_autonomous`.

    Attributes
    ----------
    change : numpy.ndarray
        Of 1/2 int w^2 / sigma'(u) dy from start to end of each layer, shape (layers,), summed over the samples. Between
        two layers the weight may jump, as u does.
    kernel : numpy.ndarray
        - int (B w, w) dt.
    non_autonomous : numpy.ndarray
        - 1/2 int int sigma''(u) u_t w^2 / sigma'(u)^2 dy dt.
    as_printed : numpy.ndarray
        The same with u for u_t, which does not make up for the change.
    """

    change: np.ndarray
    kernel: np.ndarray
    non_autonomous: np.ndarray
    as_printed: np.ndarray

    @property
    def defect(self) -> np.ndarray:
        """`change - kernel - non_autonomous`, shape (layers,): the error of the steps in t."""
        return self.change - self.kernel - self.non_autonomous


@supports("no_layers", *HELD, *STEPPED)
def weighted_identity(
    trajectory: Trajectory,
    direction: fd.Function,
    *,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> WeightedIdentity:
    """Both sides of the identity of section 3.5 for the solution w of (3.6) with w(0) = direction. Collective.

    Parameters
    ----------
    trajectory
        f, from `solve_trajectory`.
    direction
        w(0), a batch as f.
    solver_parameters, options_prefix
        PETSc options of the TS of (3.6), over `fem_resnet.time_stepping.evolution.SOLVER_PARAMETERS`: `rk`, `theta`, `beuler`, `cn` with
        fixed steps.

    Raises
    ------
    TypeError, ValueError
        If the direction does not fit; or if sigma' is not positive or jumps, or sigma'(u) is 0 up to underflow.
    """
    Y, sigma = trajectory.net.Y, trajectory.net.activation
    if not sigma.properties.strictly_increasing or sigma.kinks:
        raise ValueError(f"trajectory: expected sigma' > 0 that does not jump, that of {sigma.name} is not so")
    w = _read(trajectory, direction)

    def integral(values: np.ndarray) -> float:
        return float(Y.sum(np.sum(Y.weights @ values)))

    def energy(layer: LayerTrajectory, t: float, w: np.ndarray) -> float:
        slope = sigma.derivative(layer.argument(t, layer.path(t)))
        Y.agree(bool((slope > 0).all()), f"trajectory: sigma'(u) is 0 in double precision at t = {t:g}")
        return integral(w**2 / slope) / 2

    rows = []
    with _Linearised(trajectory, solver_parameters, options_prefix) as linearised:
        for layer in trajectory.layers:
            kernel = non_autonomous = as_printed = 0.0
            before = energy(layer, layer.inputs.start, w)
            for t, weight, w in linearised.through(layer, w):
                f = layer.path(t)
                u = layer.argument(t, f)
                kernel -= weight * integral(layer.inputs.factors.apply(layer.beta(t), w) * w)
                part = sigma.second_derivative(u) * (w / sigma.derivative(u)) ** 2 / 2
                non_autonomous -= weight * integral(part * _argument_rate(layer, t, f, sigma(u)))
                as_printed -= weight * integral(part * u)
            w = linearised.end
            rows.append((energy(layer, layer.end, w) - before, kernel, non_autonomous, as_printed))
    return WeightedIdentity(*np.array(rows).reshape(len(rows), 4).T)


def _argument_rate(layer: LayerTrajectory, t: float, f: np.ndarray, f_t: np.ndarray) -> np.ndarray:
    """u_t = a_t - B_t f - B f_t; inside of a layer a and b are linear in t."""
    bias, beta, length = layer.inputs.bias, layer.inputs.beta, layer.inputs.length
    a_t = (bias.coefficients(1.0) - bias.coefficients(0.0)) / length
    beta_t = (beta.coefficients(1.0) - beta.coefficients(0.0)) / length
    apply = layer.inputs.factors.apply
    return a_t[:, None] - apply(beta_t, f) - apply(layer.beta(t), f_t)


class _Linearised:
    """(3.6) along a trajectory, stepped in the nodal values; a context, collective."""

    def __init__(self, trajectory: Trajectory, solver_parameters: dict | None, options_prefix: str | None):
        self._trajectory = trajectory
        Y = trajectory.net.Y
        samples = Y.values(trajectory.final).shape[1]
        self._stepper = FieldStepper(
            Y, samples, self._rate, lambda moment, w, x: self._rate(moment, x), solver_parameters, options_prefix
        )

    def __enter__(self) -> _Linearised:
        return self

    def __exit__(self, *error) -> None:
        self._stepper.__exit__(*error)

    def _rate(self, moment: Moment, w: np.ndarray) -> np.ndarray:
        layer, t = self._layer, self._start + moment.t
        slope = self._trajectory.net.activation.derivative(layer.argument(t, layer.path(t)))
        return -slope * layer.inputs.factors.apply(layer.beta(t), w)

    def advance(self, layer: LayerTrajectory, w: np.ndarray, start: float, end: float, steps: int = 1) -> np.ndarray:
        """W at the time `end` inside of a layer."""
        self._layer, self._start = layer, start
        return self._stepper.solve(w, end - start, steps)[-1]

    def through(self, layer: LayerTrajectory, w: np.ndarray) -> Iterator[tuple[float, float, np.ndarray]]:
        """Times and weights of a quadrature over the layer, with w, which may be added to; `end` has w afterwards."""
        start, h = layer.inputs.start, layer.inputs.length / self._trajectory.steps
        nodes = start + h * np.add.outer(np.arange(self._trajectory.steps), _POINTS).ravel()
        for t, weight in zip(nodes, np.tile(h * _WEIGHTS, self._trajectory.steps)):
            w = self.advance(layer, w, start, t)
            yield t, weight, w
            start = t
        #: w at the end of the last layer that was gone through.
        self.end = self.advance(layer, w, start, layer.end)


def _read(trajectory: Trajectory, direction: fd.Function) -> np.ndarray:
    trajectory.net.Y.check_batch(direction, "direction")
    space = trajectory.final.function_space()
    if direction.function_space() != space:
        raise ValueError(f"direction: expected a Function of {space}, got {direction.function_space()}")
    return np.array(trajectory.net.Y.values(direction))
