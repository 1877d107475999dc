"""The solution of (2.8) as a function of time, stepped in the nodal values.

    f_t(y, t) = sigma( a(y, t) - int_Y b(y, z, t) f(z, t) dz ),    f(y, 0) = f_I(y)                               (2.8)

A network's run knows f at the layer times, by steps in the coefficients that a layer sees (`time_stepping`). Here f
itself is stepped, with no more than the kernel's product, and known between the steps too: what (4.2) is solved along
(`costate`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import firedrake as fd
import numpy as np

from fem_resnet.evolution import SOLVER_PARAMETERS, FieldStepper, Moment, Path, Scheme, Step
from fem_resnet.layer_inputs import LayerCoefficients, LayerInputs
from fem_resnet.network import ResidualNetwork
from fem_resnet.time_stepping import StepFailure

__all__ = ["LayerTrajectory", "Trajectory", "like", "solve_trajectory"]


@dataclass(frozen=True)
class LayerTrajectory:
    """The solution of (2.8) on one layer.

    Attributes
    ----------
    inputs : LayerInputs
        What the layer takes.
    path : Path
        f, shape (nodes, samples), at all times of the layer.
    stages : list of Step
        The steps with their stages, if they have been kept.
    """

    inputs: LayerInputs
    path: Path
    stages: list[Step]

    def argument(self, t: float, f: np.ndarray) -> np.ndarray:
        """u = a - B f at the time t, shape (nodes, samples)."""
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
    scheme : Scheme
        How it was stepped.
    steps : int
        Steps a layer.
    layers : list of LayerTrajectory
    """

    net: ResidualNetwork
    final: fd.Function
    scheme: Scheme
    steps: int
    layers: list[LayerTrajectory]

    def __call__(self, t: float) -> fd.Function:
        """f(t), 0 <= t <= T, between the steps by interpolation: a new Function."""
        return like(self.final, self.layers[self.layer_at(t)].path(t))

    def layer_at(self, t: float) -> int:
        """Number of the layer at the time t; at a layer time that which starts there, at T the last.

        Raises
        ------
        ValueError
            If the network has no layers, or t is not in [0, T].
        """
        times = self.net.times
        if not (self.layers and times[0] <= t <= times[-1]):
            raise ValueError(f"t: a time in a layer, from 0 to T = {times[-1]:g}, is wanted, {t!r} was given")
        return min(int(np.searchsorted(times, t, side="right")) - 1, len(self.layers) - 1)


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
        PETSc options of the TS, over `fem_resnet.evolution.SOLVER_PARAMETERS`: `rk`, `theta`, `beuler`, `cn` with
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
    net.refuse_gradient_flow("solve_trajectory")
    Y, sigma = net.Y, net.activation
    Y.check_batch(initial, "initial")
    steps = 8 * net.steps if steps is None else steps
    coefficients = LayerCoefficients(net.bias, net.kernel, net.times, range(net.layers))
    inputs = coefficients.on_layers([slot.read(p) for slot, p in zip(coefficients.slots, coefficients.functions)])
    if net.factors:
        learned = net.learned_factors()
        inputs = [replace(part, factors=learned) for part in inputs]
    f = np.array(Y.values(initial))
    layer: LayerTrajectory

    def rate(moment: Moment, f: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return sigma(layer.argument(layer.inputs.start + moment.t, f))

    def linearised(moment: Moment, f: np.ndarray, w: np.ndarray) -> np.ndarray:
        t = layer.inputs.start + moment.t
        Bw = layer.inputs.factors.apply(layer.beta(t), w)
        return -sigma.derivative(layer.argument(t, f)) * Bw

    layers = []
    parameters = SOLVER_PARAMETERS | (solver_parameters or {})
    with FieldStepper(Y, f.shape[1], rate, linearised, parameters, options_prefix) as stepper:
        for number, part in enumerate(inputs):
            layer, stages = LayerTrajectory(part, None, []), []
            keep = stages.append if keep_stages else lambda step: None
            values = stepper.solve(f, part.length, steps, keep)
            f = values[-1]
            if Y.sum(not np.isfinite(f).all()):
                raise StepFailure(number, part.start + part.length, "NOT_FINITE")
            times = np.linspace(0.0, part.length, steps + 1)
            slopes = np.array([rate(Moment(t, n, 0), values[n]) for n, t in enumerate(times)])
            layers.append(LayerTrajectory(part, Path(part.start, part.start + part.length, values, slopes), stages))
        scheme = stepper.scheme
    return Trajectory(net, like(initial, f), scheme, steps, layers)


def like(function: fd.Function, values: np.ndarray) -> fd.Function:
    """A new Function of the same space with these values at the owned nodes, shape (nodes, samples)."""
    other = fd.Function(function.function_space())
    other.dat.data_wo[...] = values.reshape(other.dat.data_wo.shape)
    return other
