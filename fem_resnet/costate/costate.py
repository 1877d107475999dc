"""The co-state r of section 4.1, solved on its own.

Let u = a - B_b f along a solution f of (2.8). In the sign of section 4.1, where J is minimised,

    r_t = B_b^T( sigma'(u) r ) - L_f                                                                      (4.2a)
    r(T) = f(T) - ftilde                                                                                  (4.2b)
    r(z, T) = int (C_pre - C)(y) h'(O(y)) W(y, z) dy         with a head and least squares                (Remark 4.3)
    D_a J(y, t) = sigma'(u) r                                                                             (4.3)
    D_b J(y, z, t) = - f(z, t) sigma'(u) r(y, t)             of rank one for each sample                  (4.4)

Both gradients are Proposition 4.1. Remark 4.3 and section 4.2 maximise, and have r* = -r. L_f is the gradient of a running
cost int L(f) dt, if there is one, and (4.7) adds lambda a and lambda b. (Section 5.1 prints (4.3), (4.4) with sigma for
sigma', and Algorithm 2 prints (4.2a) without r: neither holds.) All gradients belong to the label measure. J is the sum
over the samples, and r(T) contains their weights.

A pair (a, b) is stationary for one sample where

    sigma'(u) r = 0                                                                                       (4.5)

and then D_b J = 0 too. If sigma' > 0 this means r = 0: the target is reached. For relu it also holds where a <= B f,
whatever J is (Remark 4.1). For many samples the sums over the samples vanish, which may happen without reaching the
targets.

Here (4.2a) is stepped backwards as it stands, in the nodal values, along an interpolated solution of (2.8) that is stepped
in the nodal values too. It shares with the layers' own stepping, from whose adjoint pyadjoint gets its gradients, only the
kernel's transpose and the map from coefficients to parameters. `comparison` compares both: they agree to the order of the
network's scheme, and to round-off if (4.2) is stepped by the partner of that scheme (`time_stepping.tableau`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np

from fem_resnet.arguments import flag, function, instance, integer
from fem_resnet.costate.backward import LayerBackward, RunningGradient
from fem_resnet.costate.trajectory import Trajectory
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.learning.regulariser import Regulariser
from fem_resnet.ranks import same
from fem_resnet.time_stepping.evolution import SOLVER_PARAMETERS, FieldStepper, Moment, Path

__all__ = ["Costate", "solve_costate"]


@dataclass(frozen=True)
class Costate:
    """A solution of (4.2) along a trajectory, and the gradients that it gives. Get one from `solve_costate`.

    Attributes
    ----------
    trajectory : Trajectory
        f, along which it was solved.
    """

    trajectory: Trajectory
    _interfaces: list[np.ndarray]
    _paths: list[Path]
    _functionals: list[np.ndarray]

    def at_layer(self, layer: int) -> fd.Function:
        """r(t_l), l = 0 .. L: a new Function. Collective.

        Raises
        ------
        ValueError
            If there is no such layer time, or it differs between ranks.
        """
        same(self.trajectory.net.Y.comm, layer=layer)
        layer = integer("layer", layer, least=0, most=len(self._interfaces) - 1)
        return self.trajectory.net.Y.like(self.trajectory.final, self._interfaces[layer])

    def __call__(self, t: float) -> fd.Function:
        """r(t), 0 <= t <= T, interpolated between the steps: a new Function. Collective.

        Raises
        ------
        ValueError
            If t is not in [0, T] or differs between ranks, or the network has no layers.
        """
        return self.trajectory.net.Y.like(self.trajectory.final, self._at(t)[1])

    def bias_gradient(self, t: float) -> fd.Function:
        """D_a J(., t) of (4.3), Proposition 4.1 (i), summed over the samples: a new Function in V. Collective.

        At t_l it belongs to the layer that starts there. For one sample it is 0 where (a, b) is stationary, (4.5); if
        sigma' > 0, this means that the target is reached (Remark 4.1).

        Raises
        ------
        ValueError
            As for a call.
        """
        v = self._at(t)[2]
        gradient = fd.Function(self.trajectory.net.Y.V)
        self.trajectory.net.Y.write(gradient, v.sum(axis=1))
        return gradient

    def kernel_gradient(self, t: float) -> tuple[fd.Function, fd.Function]:
        """D_b J(., ., t) of (4.4), Proposition 4.1 (ii): batches p and q with D_b J(y, z) = sum_s p_s(y) q_s(z). Collective.

        Raises
        ------
        ValueError
            As for a call.
        """
        f, _, v = self._at(t)
        Y, final = self.trajectory.net.Y, self.trajectory.final
        return Y.like(final, -v), Y.like(final, f)

    def gradient(self, regulariser: Regulariser | None = None) -> list[fd.Function]:
        """The gradient in the coefficients of bias and kernel: the projections of (4.3) and (4.4), with (4.7). Collective.

        These are the Functions of ``J.derivative(apply_riesz=True)`` for bias and kernel, in their order. Factors and layer
        times that are learned too are held fixed. The scheme that stepped r gives the integrals over t.

        Parameters
        ----------
        regulariser
            R in J + R, whose gradient is added: lambda a and lambda b for Tikhonov's. None adds nothing.

        Raises
        ------
        TypeError, ValueError
            If this is no regulariser, or it differs between ranks.
        """
        net = self.trajectory.net
        same(net.Y.comm, regulariser=regulariser)
        instance("regulariser", regulariser, (Regulariser, type(None)))
        coefficients = net.coefficients()
        of = {id(p): d for p, d in zip(coefficients.functions, coefficients.collect(self._functionals))}
        slots = {id(p): slot for p, slot in zip(coefficients.functions, coefficients.slots)}
        gradients = []
        for parameter in (net.bias, net.kernel):
            count = len(parameter.functions)
            coefficients_now = [parameter.get(k) for k in range(count)]
            added = [0.0] * count if regulariser is None else regulariser.functionals(parameter, coefficients_now)
            for k, coefficients_k in enumerate(parameter.functions):
                functional = fd.Cofunction(coefficients_k.function_space().dual())
                slots[id(coefficients_k)].write(functional, of[id(coefficients_k)] + added[k])
                gradients.append(parameter.riesz_map(k)(functional))
        return gradients

    def _at(self, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """f, r and sigma'(u) r at the time t, shape (nodes, samples) each."""
        same(self.trajectory.net.Y.comm, t=t)
        l = self.trajectory.layer_at(t)
        layer = self.trajectory.layers[l]
        f, r = layer.path(t), self._paths[l](t)
        return f, r, self.trajectory.net.activation.derivative(layer.argument(t, f)) * r


@supports("channels", "no_layers", *HELD, *STEPPED)
def solve_costate(
    trajectory: Trajectory,
    terminal: fd.Function,
    *,
    running: RunningCost | RunningGradient | None = None,
    weights: Sequence[float] | None = None,
    partner: bool = False,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> Costate:
    """Solve (4.2a) backwards from r(T), layer by layer, with the steps of the trajectory. Collective.

    Parameters
    ----------
    trajectory
        f, along which it is solved.
    terminal
        r(T), a batch with the samples of f. `terminal_costate` makes it.
    running
        A running cost; or only its gradient L_f, a function ``running(t, f)`` from and to arrays of shape (nodes, samples)
        at this rank's nodes, which contains the weights of the samples.
    weights
        Weights of the samples in a `RunningCost`, shape (samples,). Only their proportions matter. If left out, all are equal.
    partner
        Whether (4.2) is stepped by the partner of the scheme that stepped the trajectory, on the stages that the trajectory
        kept. This is the discrete adjoint of that scheme. `solver_parameters` then choose no scheme.
    solver_parameters, options_prefix
        PETSc options of the TS, over `fem_resnet.time_stepping.evolution.SOLVER_PARAMETERS`: `rk`, `theta`, `beuler`, `cn`
        with fixed steps.

    Raises
    ------
    TypeError, ValueError
        If `terminal` or another argument does not fit, the scheme has no partner, or the stages have not been kept.

    Examples
    --------
    With the activation sigma(s) = s and b = 1 on a domain of measure one, r_t = int r dy:

    >>> from firedrake import FunctionSpace, UnitSquareMesh
    >>> from fem_resnet import LabelSpace, ResidualNetwork, given_basis, solve_trajectory
    >>> Y = LabelSpace(FunctionSpace(UnitSquareMesh(2, 2), "CG", 1))
    >>> net = ResidualNetwork(given_basis(Y, [1.0]), layers=1, activation="identity")
    >>> net.kernel.set(0, [[1.0]])
    >>> r = solve_costate(solve_trajectory(net, Y.batch(0 * Y.weights)), Y.batch(1 + 0 * Y.weights))
    >>> [round(float(r(t).dat.data_ro.max()), 4) for t in (0.0, 0.5, 1.0)]
    [0.3679, 0.6065, 1.0]
    """
    net = trajectory.net
    Y = net.Y
    Y.check_batch(terminal, "terminal")
    samples, given = (Y.samples(f.function_space()) for f in (trajectory.final, terminal))
    if given != samples:
        raise ValueError(f"terminal: expected {samples} samples, as in the trajectory, got {given}")
    defaults = _partner_parameters(trajectory) if flag("partner", partner) else SOLVER_PARAMETERS
    if not isinstance(running, (RunningCost, type(None))):
        function("running", running, "a RunningCost, a function of t and f, or None")
    if isinstance(running, RunningCost):
        running.refuse_pairs("solve_costate")
    omega = sample_weights(weights, samples)
    used = trajectory.scheme.used[::-1] if partner else None
    r = np.array(Y.values(terminal))
    equation: LayerBackward

    def rate(moment: Moment, r: np.ndarray) -> np.ndarray:
        return equation.rate(moment, r)

    def linear_part(moment: Moment, r: np.ndarray, x: np.ndarray) -> np.ndarray:
        return equation.linear_part(*equation.state(moment), x)

    interfaces, paths, functionals = [r], [], []
    with FieldStepper(Y, r.shape[1], rate, linear_part, solver_parameters, options_prefix, defaults) as stepper:
        for layer in reversed(trajectory.layers):
            equation = LayerBackward(layer, net, running, omega, used)
            values = stepper.solve(r, layer.inputs.length, trajectory.steps, equation.integrate)
            r = values[-1]
            interfaces.append(r)
            functionals.append(equation.functional)
            paths.append(equation.path(values))
    return Costate(trajectory, interfaces[::-1], paths[::-1], functionals[::-1])


def _partner_parameters(trajectory: Trajectory) -> dict:
    """PETSc options of the partner of the scheme that stepped a trajectory."""
    parameters = trajectory.scheme.partner()
    if parameters is None:
        raise ValueError(
            f"partner: expected a trajectory stepped by a scheme with a partner, got {trajectory.scheme.name}; all its b_i "
            f"must differ from 0, and an implicit scheme must have one stage, like the implicit midpoint rule"
        )
    if trajectory.layers and not trajectory.layers[0].stages:
        raise ValueError("partner: expected a trajectory with its stages, got one without; solve it with keep_stages=True")
    return parameters
