"""Layers driven by PETSc TS.

A layer sees f only through g = Psi^T M f, so TS steps (3.5a) for a general low-rank kernel, and f follows by (3.3):

    g_t = Psi^T M sigma(a - Phi beta g),        f(t_1) = f(t_0) + int sigma(a - Phi beta g) dt,

with the quadrature of the method itself, f(t_1) = f(t_0) + sum_n h_n sum_i b_i sigma(u_ni). Runge-Kutta methods commute
with the projection f -> g, so these are the numbers that stepping f would give. The state carries one more scalar a
sample, q_t = <lambda, sigma(u)>, lambda the adjoint value of f at the segment's end; in the forward solve q_t is 0, in
the adjoint its adjoint is the constant 1 and brings lambda to every stage. Backwards

    lambda(t_0) = lambda(t_1) + M Psi gamma,      gamma the adjoint of g,

so that layers with the same psi hand on gamma alone. TS vectors are samples x (rank + 1), sample-major, and the same on
every rank (COMM_SELF).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import petsctools
from mpi4py import MPI
from petsc4py import PETSc

from fem_resnet.basis import Basis
from fem_resnet.layer import Stage, StageValue
from fem_resnet.label_space import BatchValues
from fem_resnet.parameter import LayerCoefficients, LayerInputs
from fem_resnet.petsc import adapt_type, keep_trajectory_in_memory, rk_quadrature, stage_values, transposed, weakly

__all__ = ["SOLVER_PARAMETERS", "LayerStepper", "NonFiniteState", "Segment"]

#: A network has a fixed depth: no adaptivity.
SOLVER_PARAMETERS = {"ts_type": "rk", "ts_rk_type": "4", "ts_adapt_type": "none"}


class NonFiniteState(ArithmeticError):
    """The state of a layer is not finite after its last step.

    Attributes
    ----------
    layer : int
        Number of the layer.
    time : float
        Its end.
    """

    def __init__(self, layer: int, time: float):
        super().__init__(
            f"the state is not finite at the end of layer {layer}, t = {time:.6g}: smaller parameters or more steps a "
            f"layer may help"
        )
        self.layer = layer
        self.time = time


class LayerStepper:
    """One layer on its own PETSc TS, with its TSAdjoint.

    Parameters
    ----------
    stage
        Stage evaluations.
    layer
        Number of the layer, for messages.
    rank
        Rank of psi on this layer.
    steps
        Number of equal steps.
    options
        PETSc options of the TS, with their prefix.

    Raises
    ------
    ValueError
        If the options ask for anything but Runge-Kutta steps of fixed size.
    """

    def __init__(self, stage: Stage, layer: int, rank: int, steps: int, options: petsctools.OptionsManager):
        self.stage = stage
        self.layer = layer
        self.steps = steps
        #: The stages of the last forward solve, for `Stage.advance`.
        self.stages: list[StageValue] = []
        self._rank = rank
        self._samples = stage.samples
        self._options = options
        self._create()

    def _create(self) -> None:
        size = self._samples * (self._rank + 1)
        ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
        ts.setOptionsPrefix(self._options.options_prefix)
        ts.setRHSFunction(weakly(self._rate), PETSc.Vec().createSeq(size))
        jacobian = transposed(weakly(self._state_transpose), (size, size))
        ts.setRHSJacobian(weakly(self._set_stage), jacobian, jacobian)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)
        ts.setTimeStep(1.0)
        ts.setMaxTime(float(self.steps))
        ts.setPostStep(weakly(self._keep_stages))
        _set_options(ts, self._options, self.steps)
        self._weights, self._nodes = rk_quadrature(ts)
        self._ts = ts
        self._y = PETSc.Vec().createSeq(size)
        self._gamma = PETSc.Vec().createSeq(size)
        self._mu: PETSc.Vec | None = None
        #: Whether the last forward solve was saved and no adjoint has used it up.
        self.has_trajectory = False

    def forward(self, g: np.ndarray, inputs: LayerInputs, save: bool) -> np.ndarray:
        """Solve the layer from g, shape (rank, samples); returns g at its end and leaves its stages in `stages`.

        Parameters
        ----------
        g
            Coefficients at the start.
        inputs
            Times, factors and parameters of this layer.
        save
            Whether to keep the trajectory for `adjoint`.

        Raises
        ------
        NonFiniteState
            If the result is not finite.
        """
        self._inputs = inputs
        self.stages = []
        self._state(self._y)[:, :-1] = g.T
        self._state(self._y)[:, -1] = 0.0
        self.has_trajectory = False
        ts = self._ts
        ts.removeTrajectory()
        if save:
            ts.setSaveTrajectory()
            keep_trajectory_in_memory(ts)
        # TS counts the time from the start of the layer: round-off in t then does not grow with depth.
        ts.setTime(0.0)
        ts.setMaxTime(inputs.end - inputs.start)
        ts.setStepNumber(0)
        ts.setTimeStep((inputs.end - inputs.start) / self.steps)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is reported below
                ts.solve(self._y)
        except PETSc.Error as error:
            self._create()  # a failed callback leaves vectors locked
            raise error.__cause__ or error
        self.has_trajectory = save
        end = self._state(self._y)[:, :-1].T.copy()
        if not np.isfinite(end).all():
            raise NonFiniteState(self.layer, inputs.end)
        return end

    def adjoint(self, gamma: np.ndarray, adjoint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adjoint of the last forward solve: gamma at the start, and functionals of the layer's coefficients.

        Parameters
        ----------
        gamma
            Adjoint of g at the end of the layer, shape (rank, samples).
        adjoint
            Adjoint value lambda of f at the end of the segment, shape (nodes, samples).

        Returns
        -------
        gamma : numpy.ndarray
            At the start of the layer.
        functionals : numpy.ndarray
            Of the active coefficients of the bias, then of the kernel, one after the other.

        Raises
        ------
        RuntimeError
            If there was no forward solve that kept its trajectory since the last adjoint.
        """
        if not self.has_trajectory:
            raise RuntimeError(f"layer {self.layer}: the adjoint wants a forward solve that saves, just before it")
        self.has_trajectory = False
        self._adjoint = adjoint
        self._state(self._gamma)[:, :-1] = gamma.T
        self._state(self._gamma)[:, -1] = 1.0
        if self._mu is None:
            self._attach_parameters()
        self._mu.set(0.0)
        self._ts.setCostGradients([self._gamma], [self._mu])
        try:
            self._ts.adjointSolve()
        except PETSc.Error as error:
            self._create()
            raise error.__cause__ or error
        return self._state(self._gamma)[:, :-1].T.copy(), self._mu.array_r.copy()

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def _state(self, vec: PETSc.Vec) -> np.ndarray:
        return vec.array.reshape(self._samples, self._rank + 1)

    def _fraction(self, t: float) -> float:
        return t / (self._inputs.end - self._inputs.start)

    def _coefficients(self, s: float) -> tuple[np.ndarray, np.ndarray]:
        return self._inputs.bias.coefficients(s), self._inputs.beta.coefficients(s)

    def _rate(self, ts, t, y, F):
        g = y.array_r.reshape(self._samples, -1)[:, :-1].T
        a, beta = self._coefficients(self._fraction(t))
        rate = F.array_w.reshape(self._samples, -1)
        rate[:, :-1] = self.stage.rate(self._inputs.factors, a, beta @ g).T
        rate[:, -1] = 0.0

    def _keep_stages(self, ts):
        h = ts.getTime() - ts.getPrevTime()
        for weight, node, y in zip(self._weights, self._nodes, stage_values(ts, self._y.getSize())):
            if weight != 0.0:
                a, beta = self._coefficients(self._fraction(ts.getPrevTime() + node * h))
                g = y.reshape(self._samples, -1)[:, :-1].T
                self.stages.append(StageValue(h * weight, self._inputs.factors.phi, a, beta @ g))

    def _set_stage(self, ts, t, y, J, P):
        self._s = self._fraction(t)
        self._g = y.array_r.reshape(self._samples, -1)[:, :-1].T.copy()
        return True

    def _state_transpose(self, x, y):
        # PETSc asks for J^T x and then, of the same stage and x, for Jp^T x: one pass serves both.
        x = x.array_r.reshape(self._samples, -1)
        a, beta = self._coefficients(self._s)
        D, by_node = self.stage.transpose(self._inputs.factors, a, beta @ self._g, x[:, :-1].T, x[:, -1], self._adjoint)
        self._functionals = np.concatenate(
            [self._inputs.bias.pull_back(self._s, by_node), self._inputs.beta.pull_back(self._s, -D @ self._g.T)]
        )
        result = y.array_w.reshape(self._samples, -1)
        result[:, :-1] = -(D.T @ beta)
        result[:, -1] = 0.0

    def _parameter_transpose(self, x, y):
        y.array_w[:] = self._functionals

    def _attach_parameters(self) -> None:
        size = self._samples * (self._rank + 1)
        parameters = self._inputs.bias.size + self._inputs.beta.size
        self._mu = PETSc.Vec().createSeq(parameters)
        self._ts.setRHSJacobianP(
            lambda ts, t, y, J: True, transposed(weakly(self._parameter_transpose), (size, parameters))
        )


class Segment:
    """Consecutive layers: an operator from f at the start and coefficients to f at the end (see `blocks.Operator`).

    Parameters
    ----------
    steppers
        The layers in order, at least one.
    coefficients
        What these layers see of bias and kernel.
    values
        How Functions hold the state.
    """

    def __init__(self, steppers: Sequence[LayerStepper], coefficients: LayerCoefficients, values: BatchValues):
        self.steppers = list(steppers)
        self._stage = self.steppers[0].stage
        self._Y = values.Y
        self._coefficients = coefficients
        self.output = values
        self.inputs = [self.output, *coefficients.slots]
        #: The Functions that hold the coefficients.
        self.functions = coefficients.functions
        # For each layer: lambda at the end of its run of layers with one psi, that psi, and gamma at its own start.
        self._costates: list[tuple[np.ndarray, Basis, np.ndarray]] = []

    @property
    def ready(self) -> bool:
        """Whether every layer keeps the trajectory of the last forward solve."""
        return all(stepper.has_trajectory for stepper in self.steppers)

    @PETSc.Log.EventDecorator("fem_resnet:forward")
    def forward(self, arrays: Sequence[np.ndarray], save: bool) -> np.ndarray:
        """f at the end, a new array of shape (nodes, samples); `state` then gives f at any layer. Collective.

        Parameters
        ----------
        arrays
            f at the start, then the coefficients.
        save
            Whether an adjoint may follow.
        """
        f, *coefficients = arrays
        psi = None
        self._costates = []
        self._layers = self._coefficients.on_layers(coefficients)
        for l, (stepper, layer) in enumerate(zip(self.steppers, self._layers)):
            if layer.factors.psi is not psi:
                psi = layer.factors.psi
                g = psi.project(self.state(f, l))
            g = stepper.forward(g, layer, save)
        self._check_ranks_agree(g)
        return self.state(f, len(self.steppers))

    def _check_ranks_agree(self, g: np.ndarray) -> None:
        # Every rank steps its own copy of g. If they ever differ, all that follows is wrong without a word.
        probe = np.array([g.sum(), -g.sum()])
        if self._Y.comm.size > 1:
            self._Y.comm.Allreduce(MPI.IN_PLACE, probe, op=MPI.MAX)
        if probe[0] != -probe[1]:
            raise RuntimeError(
                f"the ranks' copies of the coefficients differ after layer {self.steppers[-1].layer}, by "
                f"{probe[0] + probe[1]:.1e} in their sum: do all ranks run on the same kind of processor?"
            )

    def stages(self) -> list[list[StageValue]]:
        """The stages of each layer in the last forward solve: what `Stage.advance` rebuilds f from."""
        return [stepper.stages for stepper in self.steppers]

    def state(self, f: np.ndarray, layers: int) -> np.ndarray:
        """f after so many layers of the last forward solve, a new array of shape (nodes, samples)."""
        return self.advance(f, self.stages()[:layers])

    def advance(self, f: np.ndarray, layers: Sequence[list[StageValue]]) -> np.ndarray:
        """f after layers with these stages, by the quadrature (3.3)."""
        return self._stage.advance(f, list(chain.from_iterable(layers)))

    @PETSc.Log.EventDecorator("fem_resnet:adjoint")
    def adjoint(self, arrays: Sequence[np.ndarray], dual: np.ndarray) -> list[np.ndarray]:
        """lambda at the start, then functionals of the coefficients, all new arrays. Collective.

        Parameters
        ----------
        arrays
            Those of the last forward solve.
        dual
            lambda at the end, dual to the node values, shape (nodes, samples); kept for `costate`.
        """
        functionals, self._costates = [], []
        psi, gamma = None, None
        for stepper, layer in zip(reversed(self.steppers), reversed(self._layers)):
            if layer.factors.psi is not psi:
                if psi is not None:
                    dual = dual + psi.weighted @ gamma
                psi = layer.factors.psi
                gamma = np.zeros((psi.rank, self._stage.samples))
            gamma, functional = stepper.adjoint(gamma, dual)
            functionals.append(functional)
            self._costates.append((dual, psi, gamma))
        self._costates.reverse()
        return [dual + psi.weighted @ gamma, *self._coefficients.collect(functionals[::-1])]

    def costate(self, layer: int) -> np.ndarray | None:
        """r = M^-1 lambda after so many layers of the segment, shape (nodes, samples).

        None if there was no adjoint since the last forward solve.
        """
        if not self._costates:
            return None
        if layer == len(self.steppers):
            return self._costates[-1][0] / self._Y.weights[:, None]
        dual, psi, gamma = self._costates[layer]
        return dual / self._Y.weights[:, None] + psi.values @ gamma


def _set_options(ts: PETSc.TS, options: petsctools.OptionsManager, steps: int) -> None:
    """Let PETSc read the options, and refuse what no layer can do."""
    with options.inserted_options():
        try:
            ts.setFromOptions()
        except PETSc.Error as error:
            raise ValueError(
                f"solver_parameters: PETSc refuses {options.parameters}; {SOLVER_PARAMETERS} is the default, and "
                f"'ts_rk_type' may name any of PETSc's tableaus"
            ) from error
        database = PETSc.Options()
        unused = [name for name in options.parameters if not database.used(options.options_prefix + name)]
    if ts.getType() != PETSc.TS.Type.RK:
        raise ValueError(f"solver_parameters: 'ts_type' is {ts.getType()!r}; only 'rk' is supported")
    if "ts_rk_multirate" in options.parameters:
        raise ValueError("solver_parameters: 'ts_rk_multirate' wants slow and fast unknowns, which a layer has not")
    if adapt_type(ts) != "none":
        raise ValueError(
            f"solver_parameters: 'ts_adapt_type' is {adapt_type(ts)!r}; only 'none' (fixed steps) is supported"
        )
    if ts.getTimeStep() != 1.0 or ts.getMaxTime() != steps or ts.getMaxSteps() < steps:
        raise ValueError(
            "solver_parameters: 'ts_time_step', 'ts_max_time', 'ts_max_steps' follow from the layers; give the network "
            "layer times and a number of steps a layer instead"
        )
    if unused:
        raise ValueError(f"solver_parameters: {', '.join(unused)}: no option of an explicit Runge-Kutta TS; drop it")
