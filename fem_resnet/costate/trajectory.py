"""The solution of (2.8) as a function of time, stepped in the nodal values.

    f_t(y, t) = sigma( a(y, t) - int_Y b(y, z, t) f(z, t) dz ),    f(y, 0) = f_I(y)                               (2.8)

A network's run steps the few coefficients of f that a layer depends on (`time_stepping`), and knows f at the layer times.
Here f itself is stepped, with the kernel's product as the only tool, and is known between the steps too. The co-state
equation (4.2) is solved along such a trajectory (`costate`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import firedrake as fd
import numpy as np

from fem_resnet.arguments import flag, function, integer, number
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import same, together
from fem_resnet.time_stepping.evolution import FieldStepper, Moment, Path, Step
from fem_resnet.time_stepping.stepper import StepFailure
from fem_resnet.time_stepping.tableau import Tableau

__all__ = ["LayerTrajectory", "Trajectory", "follow_trajectory", "solve_trajectory"]


@dataclass(frozen=True)
class LayerTrajectory:
    """The solution of (2.8) on one layer.

    Attributes
    ----------
    inputs : LayerInputs
        The layer's coefficients, factors and times.
    path : Path or None
        f at all times of the layer, shape (nodes, samples). None in the calls of a monitor (`follow_trajectory`).
    stages : list of Step
        The steps with their stages, if they were kept.
    """

    inputs: LayerInputs
    path: Path | None
    stages: list[Step]

    def argument(self, t: float, f: np.ndarray) -> np.ndarray:
        """The preactivation u = a - B f at the time t, shape (nodes, samples).

        Parameters
        ----------
        t
            A time in the layer.
        f
            The state at this rank's nodes, shape (nodes, samples).
        """
        return self.inputs.bias.coefficients(self.fraction(t))[:, None] - self.inputs.factors.apply(self.beta(t), f)

    @property
    def end(self) -> float:
        """The time at which the layer ends."""
        return self.inputs.start + self.inputs.length

    def fraction(self, t: float) -> float:
        """The time t as a fraction of the layer, in [0, 1]."""
        return (t - self.inputs.start) / self.inputs.length

    def beta(self, t: float) -> np.ndarray:
        """The kernel's coefficients at the time t, shape (rank of phi, rank of psi)."""
        return self.inputs.beta.coefficients(self.fraction(t))


@dataclass(frozen=True)
class Trajectory:
    """A solution of (2.8) that is known at all times. Get one from `solve_trajectory`.

    Attributes
    ----------
    net : ResidualNetwork
        The network.
    final : Function
        f(T).
    scheme : Tableau
        The scheme that stepped it.
    steps : int
        The number of steps in each layer.
    layers : list of LayerTrajectory
        The solution on each layer.
    """

    net: ResidualNetwork
    final: fd.Function
    scheme: Tableau
    steps: int
    layers: list[LayerTrajectory]

    def __call__(self, t: float) -> fd.Function:
        """f(t), 0 <= t <= T, interpolated between the steps: a new Function. Collective.

        Raises
        ------
        ValueError
            If t is not in [0, T] or differs between ranks, or the network has no layers.
        """
        same(self.net.Y.comm, t=t)
        return self.net.Y.like(self.final, self.layers[self.layer_at(t)].path(t))

    def layer_at(self, t: float) -> int:
        """The number of the layer at the time t. A layer time belongs to the layer that starts there, T to the last one.

        Raises
        ------
        ValueError
            If the network has no layers, or t is not in [0, T].
        """
        times, t = self.net.times, number("t", t)
        if not (self.layers and times[0] <= t <= times[-1]):
            raise ValueError(f"t: expected a time in a layer, from 0 to T = {times[-1]:g}, got {t!r}")
        return min(int(np.searchsorted(times, t, side="right")) - 1, len(self.layers) - 1)


@supports("channels", "no_layers", *HELD, *STEPPED)
def solve_trajectory(
    net: ResidualNetwork,
    initial: fd.Function,
    *,
    steps: int | None = None,
    keep_stages: bool = False,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> Trajectory:
    """Solve (2.8) in the nodal values, layer by layer, and keep f at the ends of all steps. Collective.

    For the network's bias and kernel, and f_I, this is (4.1). `solve_costate` goes back along the result.

    Parameters
    ----------
    net
        The network, at its present coefficients.
    initial
        f_I, as for ``net.run``.
    steps
        The number of steps in each layer. If left out, 8 times as many as the network takes. The interpolation of f between
        the steps is right to O(h^6) for an even number, to O(h^4) for an odd one. All are kept: steps x layers fields and
        their slopes.
    keep_stages
        Whether the stages of all steps are kept too, for `solve_costate` with `partner`.
    solver_parameters, options_prefix
        PETSc options of the TS, over `fem_resnet.time_stepping.evolution.SOLVER_PARAMETERS`: `rk`, `theta`, `beuler`, `cn`
        with fixed steps.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks.
    StepFailure
        If f overflows.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, ResidualNetwork, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 6), layers=2, activation="identity")
    >>> _ = net.bias.functions[0].assign(1.0)
    >>> f = solve_trajectory(net, Y.batch(0 * Y.weights))
    >>> [round(float(f(t).dat.data_ro.max()), 12) for t in (0.1, 0.5, 1.0)]
    [0.1, 0.5, 0.5]
    """
    keep_stages, layers = flag("keep_stages", keep_stages), []

    def keep(stepper: FieldStepper, layer: LayerTrajectory, f: np.ndarray, steps: int) -> np.ndarray:
        start, length = layer.inputs.start, layer.inputs.length
        values = stepper.solve(f, length, steps, layer.stages.append if keep_stages else lambda step: None)
        times = np.linspace(0.0, length, steps + 1)
        slopes = np.array([stepper.rate(Moment(t, n, 0), values[n]) for n, t in enumerate(times)])
        layers.append(replace(layer, path=Path(start, start + length, values, slopes)))
        return values[-1]

    final, scheme, steps = _layer_by_layer(net, initial, steps, solver_parameters, options_prefix, keep)
    return Trajectory(net, final, scheme, steps, layers)


@supports("channels", "no_layers", *HELD, *STEPPED)
def follow_trajectory(
    net: ResidualNetwork,
    initial: fd.Function,
    monitor: Callable[[LayerTrajectory, Step], None],
    *,
    steps: int | None = None,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> fd.Function:
    """Solve (2.8) as `solve_trajectory` does, and show each step to a monitor. Nothing is kept. Collective.

    With the solver parameters and steps of a network that is stepped by rk, theta, beuler or cn, f equals the state of the
    network up to round-off, since these methods commute with the projection onto coefficients.

    Parameters
    ----------
    net, initial
        The network and f_I, as for `solve_trajectory`.
    monitor
        ``monitor(layer, step)``, called after each step. Its times count from the start of the layer; ``step.first`` and
        ``step.last`` are f at its ends, and ``step.values`` its stages, which must not be changed. An error that the monitor
        raises on one rank ends the solution on all ranks.
    steps
        The number of steps in each layer. If left out, as many as the network takes.
    solver_parameters, options_prefix
        As for `solve_trajectory`.

    Returns
    -------
    Function
        f(T).

    Raises
    ------
    TypeError, ValueError, StepFailure
        As for `solve_trajectory`.

    Examples
    --------
    >>> from fem_resnet import ResidualNetwork, class_space, given_basis
    >>> Y = class_space(2)
    >>> net = ResidualNetwork(given_basis(Y, [1.0]), layers=2, activation="identity")
    >>> net.bias.set(1, 1 + 0 * Y.weights)  # f_t is 0 on the first layer and 1 on the second
    >>> seen = []
    >>> _ = follow_trajectory(net, Y.batch(0 * Y.weights), lambda layer, step: seen.append(step.last.max()))
    >>> [round(float(f), 12) for f in seen]
    [0.0, 0.5]
    """
    function("monitor", monitor, "a function of layer and step")

    def show(stepper: FieldStepper, layer: LayerTrajectory, f: np.ndarray, steps: int) -> np.ndarray:
        return stepper.run(f, layer.inputs.length, steps, lambda step: together(net.Y.comm, lambda: monitor(layer, step)))

    steps = net.steps if steps is None else steps
    return _layer_by_layer(net, initial, steps, solver_parameters, options_prefix, show)[0]


def _layer_by_layer(
    net: ResidualNetwork,
    initial: fd.Function,
    steps: int | None,
    solver_parameters: dict | None,
    options_prefix: str | None,
    one_layer: Callable[[FieldStepper, LayerTrajectory, np.ndarray, int], np.ndarray],
) -> tuple[fd.Function, Tableau, int]:
    """Step through all layers: ``one_layer(stepper, layer, f, steps)`` takes the steps of one and returns f at its end.

    Returned are f(T), the scheme and the number of steps in each layer.
    """
    Y, sigma = net.Y, net.activation
    Y.check_batch(initial, "initial")
    steps = 8 * net.steps if steps is None else integer("steps", steps)
    f = np.array(Y.values(initial))
    layer: LayerTrajectory

    def rate(moment: Moment, f: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return sigma(layer.argument(layer.inputs.start + moment.t, f))

    def linearised(moment: Moment, f: np.ndarray, w: np.ndarray) -> np.ndarray:
        t = layer.inputs.start + moment.t
        Bw = layer.inputs.factors.apply(layer.beta(t), w)
        return -sigma.derivative(layer.argument(t, f)) * Bw

    with FieldStepper(Y, f.shape[1], rate, linearised, solver_parameters, options_prefix) as stepper:
        for l, part in enumerate(net.layer_inputs()):
            layer = LayerTrajectory(part, None, [])
            f = one_layer(stepper, layer, f, steps)
            if Y.sum(not np.isfinite(f).all()):
                raise StepFailure(l, part.start + part.length, "NOT_FINITE")
        scheme = stepper.scheme
    return Y.like(initial, f), scheme, steps
