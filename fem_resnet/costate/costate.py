"""The co-state r of section 4.1, solved on its own and held against the discrete network's.

With u = a - B_b f along a solution f of (2.8), in the sign of section 4.1 (J is minimised; Remark 4.3 and section 4.2
have r* = -r, for maximising),

    r_t = B_bT( sigma'(u) r ) - L_f                                                                       (4.2a)
    r(T) = f(T) - ftilde                                                                                  (4.2b)
    r(z, T) = int (C_pre - C)(y) h'(O(y)) W(y, z) dy         with an output and least squares             (Remark 4.3)
    D_a J(y, t) = sigma'(u) r                                                                             (4.3)
    D_b J(y, z, t) = - f(z, t) sigma'(u) r(y, t)             of rank one a sample                         (4.4)

Both gradients are Proposition 4.1. A pair (a, b) is stationary for one sample where

    sigma'(u) r = 0                                                                                       (4.5)

and then D_b J = 0 too. Where sigma' > 0 this is r = 0, a target that is reached; where relu is 0, a <= B f, it holds
whatever J is (Remark 4.1). For more samples it is the sums over them that vanish, also where targets are not reached.

L_f is the gradient of a running cost int L(f) dt, if there is one; (4.7) adds lambda a and lambda b. (Section 5.1
prints (4.3), (4.4) with sigma for sigma', Algorithm 2 prints (4.2a) without r: neither holds.) All of it is meant in
the label measure; J is the sum over the samples, whose weights are in r(T).

Here (4.2a) is stepped backwards as it stands, in the nodal values, along an interpolated solution of (2.8) that is
stepped in the nodal values as well. Nothing is shared with the layers' own stepping and its adjoint, by which
pyadjoint gets its gradients, but the kernel's transpose and the way that coefficients make a parameter.
`costate_comparison` compares the two: they agree to the order of the network's scheme, and to round-off where (4.2) is
stepped by that scheme's partner (`tableau`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import flag, function, instance, integer, real_array
from fem_resnet.costate.trajectory import LayerTrajectory, Trajectory, like
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.label_domain.label_space import LabelSpace, sample_weights
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.learning.head import PREDICTIONS, Prediction
from fem_resnet.learning.loss import Loss, binary_cross_entropy, cross_entropy, least_squares
from fem_resnet.learning.objective import LearningProblem
from fem_resnet.learning.regulariser import Regulariser
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.ranks import same, together
from fem_resnet.time_stepping.evolution import SOLVER_PARAMETERS, FieldStepper, Moment, Path, Step

__all__ = ["Costate", "solve_costate", "terminal_costate"]

#: ``L_f(t, f)``: the gradient in L2(Y) of a running cost, arrays of shape (nodes, samples).
RunningGradient = Callable[[float, np.ndarray], np.ndarray]


# -- the co-state ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costate:
    """A solution of (4.2) along a trajectory, and the gradients that it gives. Get one from `solve_costate`.

    Attributes
    ----------
    trajectory : Trajectory
    """

    trajectory: Trajectory
    _interfaces: list[np.ndarray]
    _paths: list[Path]
    _functionals: list[np.ndarray]

    def at_layer(self, layer: int) -> fd.Function:
        """r(t_l), l = 0 .. L. Collective."""
        same(self.trajectory.net.Y.comm, layer=layer)
        layer = integer("layer", layer, least=0, most=len(self._interfaces) - 1)
        return like(self.trajectory.final, self._interfaces[layer])

    def __call__(self, t: float) -> fd.Function:
        """r(t), 0 <= t <= T, between the steps by interpolation. Collective."""
        return like(self.trajectory.final, self._at(t)[1])

    def bias_gradient(self, t: float) -> fd.Function:
        """D_a J(., t) of (4.3), Proposition 4.1 (i), summed over the samples: a Function of V.

        At t_l that of the layer that starts there. For one sample it is 0 where (a, b) is stationary, (4.5), which for
        sigma' > 0 is where the target is reached (Remark 4.1).
        """
        v = self._at(t)[2]
        gradient = fd.Function(self.trajectory.net.Y.V)
        gradient.dat.data_wo[...] = v.sum(axis=1)
        return gradient

    def kernel_gradient(self, t: float) -> tuple[fd.Function, fd.Function]:
        """D_b J(., ., t) of (4.4), Proposition 4.1 (ii): batches p, q with D_b J(y, z) = sum_s p_s(y) q_s(z)."""
        f, _, v = self._at(t)
        return like(self.trajectory.final, -v), like(self.trajectory.final, f)

    def gradient(self, regulariser: Regulariser | None = None) -> list[fd.Function]:
        """The gradient in the coefficients of bias and kernel: (4.3) and (4.4) projected onto them; (4.7).

        The representatives of ``J.derivative(apply_riesz=True)``, in the order of the controls of bias and kernel. Where
        factors or layer times are learned too, they are as they stand. The integrals
        over t are those of the scheme that stepped r. Collective.

        Parameters
        ----------
        regulariser
            R in J + R, if its gradient is to be added: lambda a and lambda b for Tikhonov's.
        """
        net = self.trajectory.net
        same(net.Y.comm, regulariser=regulariser)
        instance("regulariser", regulariser, (Regulariser, type(None)))
        coefficients = net.coefficients()
        of = {id(p): d for p, d in zip(coefficients.functions, coefficients.collect(self._functionals))}
        slots = {id(p): slot for p, slot in zip(coefficients.functions, coefficients.slots)}
        gradients = []
        for parameter in (net.bias, net.kernel):
            added = _regulariser_functionals(regulariser, parameter)
            for k, function in enumerate(parameter.functions):
                dual = fd.Cofunction(function.function_space().dual())
                slots[id(function)].write(dual, of[id(function)] + added[k])
                gradients.append(parameter.riesz_map(k)(dual))
        return gradients

    def _at(self, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """f, r and sigma'(u) r at the time t."""
        same(self.trajectory.net.Y.comm, t=t)
        number = self.trajectory.layer_at(t)
        layer = self.trajectory.layers[number]
        f, r = layer.path(t), self._paths[number](t)
        return f, r, self.trajectory.net.activation.derivative(layer.argument(t, f)) * r


@supports("no_layers", *HELD, *STEPPED)
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
        r(T), a batch as f: `terminal_costate`.
    running
        A running cost; or L_f alone, its gradient: ``running(t, f)``, arrays of shape (nodes, samples), the nodes of this
        rank, with the weights of the samples in it.
    weights
        Weights of the samples in a `RunningCost`, of which only the proportions matter; equal ones if left out.
    partner
        Step it by the partner of the scheme that stepped the trajectory, on its stages, which have been kept: this is
        the discrete adjoint of that scheme. `solver_parameters` then choose no scheme.
    solver_parameters, options_prefix
        PETSc options of the TS, over `SOLVER_PARAMETERS`: `rk`, `theta`, `beuler`, `cn` with fixed steps.

    Raises
    ------
    TypeError, ValueError
        If `terminal` does not fit, a scheme has no partner, or the stages have not been kept.

    Examples
    --------
    With the activation s and b = 1 on a domain of measure one, r_t = int r dy:

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
    if terminal.function_space().value_size != trajectory.final.function_space().value_size:
        raise ValueError("terminal: it has another number of samples than the trajectory")
    defaults = _partner_parameters(trajectory) if flag("partner", partner) else SOLVER_PARAMETERS
    if not isinstance(running, (RunningCost, type(None))):
        function("running", running, "a RunningCost, a function of t and f, or None")
    omega = sample_weights(weights, trajectory.final.function_space().value_size)
    used = trajectory.scheme.used[::-1] if partner else None
    r = np.array(Y.values(terminal))
    equation: _Backward

    def rate(moment: Moment, r: np.ndarray) -> np.ndarray:
        return equation.rate(moment, r)

    def linear_part(moment: Moment, r: np.ndarray, x: np.ndarray) -> np.ndarray:
        return equation.linear_part(*equation.state(moment), x)

    interfaces, paths, functionals = [r], [], []
    with FieldStepper(Y, r.shape[1], rate, linear_part, solver_parameters, options_prefix, defaults) as stepper:
        for layer in reversed(trajectory.layers):
            equation = _Backward(layer, net, running, omega, used)
            values = stepper.solve(r, layer.inputs.length, trajectory.steps, equation.integrate)
            r = values[-1]
            interfaces.append(r)
            functionals.append(equation.functional)
            paths.append(equation.path(values))
    return Costate(trajectory, interfaces[::-1], paths[::-1], functionals[::-1])


class _Backward:
    """(4.2a) on one layer, in the time s = t_(l+1) - t that runs backwards, and the integrals of (4.3) and (4.4).

    `used` are the numbers of the forward stages in the order in which a partner takes them; without them f comes from
    the interpolated trajectory.
    """

    def __init__(
        self,
        layer: LayerTrajectory,
        net: ResidualNetwork,
        running: RunningCost | RunningGradient | None,
        omega: np.ndarray,
        used: np.ndarray | None,
    ):
        self._layer, self._inputs, self._running, self._used = layer, layer.inputs, running, used
        self._omega = omega
        self._derivative, self._weights, self._comm = net.activation.derivative, net.Y.weights, net.Y.comm
        self._step = 0
        #: Of the layer's active coefficients of the bias, then of the kernel.
        self.functional: np.ndarray | float = 0.0

    def state(self, moment: Moment) -> tuple[float, np.ndarray]:
        """T and f where the scheme asks for them."""
        if self._used is None:
            return self._between_steps(moment.t)
        step, stage = self._layer.stages[-1 - moment.step], self._used[moment.stage]
        return self._inputs.start + step.times[stage], step.values[stage]

    def _between_steps(self, s: float) -> tuple[float, np.ndarray]:
        t = self._layer.end - s
        return t, self._layer.path(t)

    def _slope_times(self, t: float, f: np.ndarray, r: np.ndarray) -> np.ndarray:
        """sigma'(u) r."""
        return self._derivative(self._layer.argument(t, f)) * r

    def linear_part(self, t: float, f: np.ndarray, r: np.ndarray) -> np.ndarray:
        """- B^T(sigma'(u) r)."""
        return -self._inputs.factors.transpose(self._layer.beta(t), self._slope_times(t, f, r))

    def rate(self, moment: Moment, r: np.ndarray) -> np.ndarray:
        """r_s: (4.2a) with the other sign."""
        return self._rate(*self.state(moment), r)

    def _rate(self, t: float, f: np.ndarray, r: np.ndarray) -> np.ndarray:
        r_s = self.linear_part(t, f, r)
        if isinstance(self._running, RunningCost):
            return r_s + self._cost_slopes(t, f)[0]
        if self._running is None:
            return r_s
        # A user's function: what one rank raises all raise.
        return r_s + together(self._comm, lambda: real_array("running", self._running(t, f), f.shape))

    def _cost_slopes(self, t: float, f: np.ndarray) -> list[np.ndarray]:
        """L_f and L_a, each sample with its weight."""
        a = self._inputs.bias.coefficients(self._layer.fraction(t))
        return [self._omega * part for part in together(self._comm, lambda: self._running.slopes(f, a))]

    def integrate(self, step: Step) -> None:
        """Add what a step contributes, by the scheme's own quadrature."""
        phi, psi = self._inputs.factors.phi, self._inputs.factors.psi
        for stage, i in enumerate(np.flatnonzero(step.weights)):
            t, f = self.state(Moment(step.times[i], self._step, stage))
            v = self._slope_times(t, f, step.values[i])
            fraction = self._layer.fraction(t)
            in_a, in_b = v.sum(axis=1), -phi.project(v) @ psi.project(f).T
            if isinstance(self._running, RunningCost):
                in_a = in_a + self._cost_slopes(t, f)[1].sum(axis=1)
                in_b += self._running.kernel * self._inputs.factors.dual(self._layer.beta(t))
            in_bias = self._inputs.bias.pull_back(fraction, self._weights * in_a)
            in_kernel = self._inputs.beta.pull_back(fraction, in_b)
            self.functional = self.functional + step.length * step.weights[i] * np.concatenate([in_bias, in_kernel])
        self._step += 1

    def path(self, values: np.ndarray) -> Path:
        """R between the steps, from its values in the order of s."""
        times = np.linspace(0.0, self._inputs.length, len(values))
        slopes = np.array([-self._rate(*self._between_steps(s), r) for s, r in zip(times, values)])
        return Path(self._inputs.start, self._layer.end, values[::-1], slopes[::-1])


def _partner_parameters(trajectory: Trajectory) -> dict:
    parameters = trajectory.scheme.partner()
    if parameters is None:
        raise ValueError(
            f"partner: the scheme of the trajectory, {trajectory.scheme.name}, has none: all its b_i must be different "
            f"from 0, and an implicit one must have one stage, as the implicit midpoint rule"
        )
    if trajectory.layers and not trajectory.layers[0].stages:
        raise ValueError("partner: solve the trajectory with keep_stages=True")
    return parameters


# -- terminal values -------------------------------------------------------------------------------------------------


@supports(
    "no_layers", "gradient_flow", *HELD, *STEPPED, "head", "regulariser", "running", "running_of_controls", "checkpoints",
    "learned_initial", "learned_both", "many_samples", "weights",
)  # fmt: skip
def terminal_costate(problem: LearningProblem, final: fd.Function) -> fd.Function:
    """r(T) of a learning problem by (4.2b) or Remark 4.3, in the sign of section 4.1. Collective.

    For the losses of `fem_resnet.learning.loss` it is written out here; a functional in UFL is asked for its own derivative. The
    weights of the samples, divided by their sum, are in it.

    Parameters
    ----------
    problem
        Its head, loss and batch.
    final
        f(T).
    """
    net, head, batch = problem.net, problem.head, problem.batch
    net.Y.check_batch(final, "final")
    samples = final.function_space().value_size
    if samples != batch.samples:
        raise ValueError(f"final: expected as many samples as the problem's batch has, {batch.samples}, got {samples}")
    Y = net.Y if head is None else head.Y
    prediction = PREDICTIONS[problem.loss.prediction or "identity"] if head is None else head.prediction
    targets = batch.targets if isinstance(batch.targets, fd.Function) else head.observations(batch.targets)
    with stop_annotating():
        O = Y.values(final if head is None else head(final))
    omega = sample_weights(batch.weights, batch.samples)
    r = omega * _output_costate(Y, problem.loss, prediction, O, Y.values(targets))
    if head is not None:
        # int .. W(y, z) dy: the first argument of W is that of the output, here as in (2.9).
        r = LowRankKernel(head.onto, head.psi).transpose(head.W.get(0), r)
    return like(final, r)


def _output_costate(Y: LabelSpace, loss: Loss, h: Prediction, O: np.ndarray, C: np.ndarray) -> np.ndarray:
    """The gradient in L2 of a sample's loss in its output O."""
    if loss == least_squares:
        p = h.value(Y, O)
        return _prediction_derivative(Y, h, p, p - C)
    if loss == cross_entropy:
        p = PREDICTIONS["softmax"].value(Y, O)
        return p * Y.sum(Y.weights @ C) - C
    if loss == binary_cross_entropy:
        return PREDICTIONS["logistic"].value(Y, O) - C
    return loss.gradient(Y, O, C, h) / Y.weights[:, None]


def _prediction_derivative(Y: LabelSpace, h: Prediction, p: np.ndarray, d: np.ndarray) -> np.ndarray:
    """h'(O) d, which is symmetric for all predictions, from p = h(O)."""
    if h.name == "identity":
        return d
    if h.name == "logistic":
        return p * (1 - p) * d
    if h.name == "softmax":
        return p * (d - Y.sum(Y.weights @ (p * d)))
    raise ValueError(f"head: the derivative of the prediction {h.name!r} is not known here")


# -- small things ----------------------------------------------------------------------------------------------------


def _regulariser_functionals(regulariser: Regulariser | None, parameter: Parameter) -> list:
    """The gradient of R in the coefficients of a parameter, as functionals."""
    count = len(parameter.functions)
    total = [0.0] * count
    if regulariser is not None:
        coefficients = [parameter.get(k) for k in range(count)]
        for weight, form in regulariser.terms:
            total = [sum_so_far + weight * d for sum_so_far, d in zip(total, form(parameter, coefficients))]
    return total
