"""The solution of (2.8) as a function of time, stepped in the nodal values.

    f_t(y, t) = sigma( a(y, t) - int_Y b(y, z, t) f(z, t) dz ),    f(y, 0) = f_I(y)                               (2.8)

A network's run knows f at the layer times, by steps in the coefficients that a layer sees (`time_stepping`). Here f
itself is stepped, with no more than the kernel's product, and known between the steps too: what (4.2) is solved along
(`costate`).
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

__all__ = ["LayerTrajectory", "Trajectory", "follow_trajectory", "like", "solve_trajectory"]


@dataclass(frozen=True)
class LayerTrajectory:
    """The solution of (2.8) on one layer.

    Attributes
    ----------
    inputs : LayerInputs
        What the layer takes.
    path : Path or None
        f, shape (nodes, samples), at all times of the layer; None in the hands of a monitor (`follow_trajectory`).
    stages : list of Step
        The steps with their stages, if they have been kept.
    """

    inputs: LayerInputs
    path: Path | None
    stages: list[Step]

    def argument(self, t: float, f: np.ndarray) -> np.ndarray:
        """U = a - B f at the time t, shape (nodes, samples)."""
        return self.inputs.bias.coefficients(self.fraction(t))[:, None] - self.inputs.factors.apply(self.beta(t), f)

    @property
    def end(self) -> float:
        """When the layer ends."""
        return self.inputs.start + self.inputs.length

    def fraction(self, t: float) -> float:
        """The time t as a fraction of the layer, in [0, 1]."""
        return (t - self.inputs.start) / self.inputs.length

    def beta(self, t: float) -> np.ndarray:
        """The kernel's coefficients at the time t."""
        return self.inputs.beta.coefficients(self.fraction(t))


@dataclass(frozen=True)
class Trajectory:
    """A solution of (2.8), of which f(t) is known at all times. Get one from `solve_trajectory`.

    Attributes
    ----------
    net : ResidualNetwork
    final : Function
        f(T).
    scheme : Tableau
        How it was stepped.
    steps : int
        Steps a layer.
    layers : list of LayerTrajectory
    """

    net: ResidualNetwork
    final: fd.Function
    scheme: Tableau
    steps: int
    layers: list[LayerTrajectory]

    def __call__(self, t: float) -> fd.Function:
        """f(t), 0 <= t <= T, between the steps by interpolation: a new Function. Collective."""
        same(self.net.Y.comm, t=t)
        return like(self.final, self.layers[self.layer_at(t)].path(t))

    def layer_at(self, t: float) -> int:
        """Number of the layer at the time t; at a layer time that which starts there, at T the last.

        Raises
        ------
        ValueError
            If the network has no layers, or t is not in [0, T].
        """
        times, t = self.net.times, number("t", t)
        if not (self.layers and times[0] <= t <= times[-1]):
            raise ValueError(f"t: expected a time in a layer, from 0 to T = {times[-1]:g}, got {t!r}")
        return min(int(np.searchsorted(times, t, side="right")) - 1, len(self.layers) - 1)


@supports("no_layers", *HELD, *STEPPED)
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

    With its controls and f_I it is (4.1), along which `solve_costate` goes back.

    Parameters
    ----------
    net
        The network, at its present coefficients.
    initial
        f_I, as for ``net.run``.
    steps
        Steps a layer; 8 times those of the network if left out. If they are even, f between them is right to O(h^6),
        else to O(h^4). All are kept: steps x layers fields and their slopes.
    keep_stages
        Keep the stages of all steps as well, for `solve_costate` with `partner`.
    solver_parameters, options_prefix
        PETSc options of the TS, over `fem_resnet.time_stepping.evolution.SOLVER_PARAMETERS`: `rk`, `theta`, `beuler`, `cn` with
        fixed steps.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
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


@supports("no_layers", *HELD, *STEPPED)
def follow_trajectory(
    net: ResidualNetwork,
    initial: fd.Function,
    monitor: Callable[[LayerTrajectory, Step], None],
    *,
    steps: int | None = None,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> fd.Function:
    """Solve (2.8) as `solve_trajectory` does, but keep nothing: what is wanted of f, a monitor takes from each step.

    With the solver parameters and steps of a network that is stepped by rk, theta, beuler or cn, f is that of the
    network to round-off, for such methods commute with the projection onto coefficients. Collective.

    Parameters
    ----------
    net, initial
        As for `solve_trajectory`.
    monitor
        ``monitor(layer, step)``, called after each step: its times count from the start of the layer, ``step.first``
        and ``step.last`` are f at its ends, ``step.values`` its stages. It must not change them. What it raises on one rank
        ends the solution on all.
    steps
        Steps a layer; those of the network if left out.
    solver_parameters, options_prefix
        As for `solve_trajectory`.

    Returns
    -------
    Function
        f(T).

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    StepFailure
        If f overflows.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, ResidualNetwork, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 6), layers=2, activation="identity")
    >>> _ = net.bias.functions[0].assign(1.0)
    >>> largest = []
    >>> _ = follow_trajectory(net, Y.batch(0 * Y.weights), lambda layer, step: largest.append(step.last.max()))
    >>> [round(float(f), 12) for f in largest]
    [0.5, 0.5]
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
    """Step through all layers; ``one_layer(stepper, layer, f, steps)`` makes those of one and returns f at its end."""
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
    return like(initial, f), scheme, steps


def like(function: fd.Function, values: np.ndarray) -> fd.Function:
    """A new Function of the same space with these values at the owned nodes, shape (nodes, samples)."""
    other = fd.Function(function.function_space())
    other.dat.data_wo[...] = values.reshape(other.dat.data_wo.shape)
    return other
