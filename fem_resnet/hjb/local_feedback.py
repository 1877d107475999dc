"""The value function near one optimal trajectory, and the feedback that it gives for nearby inputs.

The value function of section 4.3 from t = 0 on, for J_mod of (2.11), (4.6), is

    F(v) = min_u J(u, v),       v = f_I,       u = (a, b), with the head where it is learned.

It solves the Hamilton-Jacobi-Bellman equation (4.11) in the space of all inputs. The end of section 4.3 asks for a local,
Lagrangian method. This is one. Let u be optimal for v, with J_uu > 0. Then F is smooth near v, and

    D_v F = J_v = r(0)                                          the co-state of (4.2), in the sign of section 4.1
    D^2 F = J_vv - J_vu J_uu^-1 J_uv
    u(v + w) = u - J_uu^-1 J_uv w + O(|w|^2)                    the feedback
    F(v + w) = F + (r, w) + 1/2 (w, D^2 F w) + O(|w|^3)

So the method needs Hessian actions of the discrete network along this one trajectory, on a mesh of any size. Above F(v + w)
the feedback costs O(|w|^4), and the controls of v cost O(|w|^2). Gradients and D^2 F belong to the inner product of the
label measure. F is the value of a local minimum, and another minimum may be lower. The controls must be free: with active
bounds F is not smooth.

The paper has one sample. In a batch all samples share u, so v stands for all of them together. The formulas hold, each
sample's co-state has its weight as a factor, and the feedback takes all new inputs at once and returns one u. The feedback
of section 4.3 gives each input controls of its own: for that, take a problem with one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import firedrake as fd
import numpy as np
import petsctools
from petsc4py import PETSc
from pyadjoint import Control, ReducedFunctional
from pyadjoint.optimization.tao_solver import PETScVecInterface, ReducedFunctionalHessianMat, RieszMapPC
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import instance, number, text
from fem_resnet.features import REGULARISED, STEPPED, supports
from fem_resnet.fixed import OnMesh
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.options import checked_options, checked_prefix, petsc_refusals, reason_name, refuse_unread, unread

__all__ = ["NO_MINIMUM", "SOLVER_PARAMETERS", "LocalFeedback"]

#: The end of messages where J_uu is not positive definite.
NO_MINIMUM = "J_uu is positive definite at a strict minimum only (is there a regulariser?)"
#: Options of the KSP for J_uu that the user does not give.
SOLVER_PARAMETERS = {
    "ksp_type": "cg",
    "ksp_rtol": 1e-10,
    "ksp_max_it": 1000,
    "pc_type": "python",
    "pc_python_type": f"{RieszMapPC.__module__}.{RieszMapPC.__name__}",
}


class LocalFeedback(OnMesh):
    """F, D_v F, D^2 F and the feedback at the optimum of a learning problem, without any matrix.

    The object keeps the optimum at which it was made: later changes of the parameters have no effect on it. Everything is
    collective over the communicator of the network.

    Parameters
    ----------
    problem
        A learning problem at a minimum over its parameters, ``learn="parameters"``. The inputs of its batch are v.
    gradient_tolerance
        The largest norm of the gradient in the parameters that counts as zero, in the label measure and in the unit of J.
    solver_parameters, options_prefix
        PETSc options, over `SOLVER_PARAMETERS`, of the KSP that solves with J_uu: conjugate gradients, preconditioned by the
        Riesz maps of the controls. "minres" solves also if J_uu is indefinite, but then there is no minimum.

    Attributes
    ----------
    problem : LearningProblem
        The given problem.
    batch : Batch
        Its batch at that time.
    Y : LabelSpace
        The label domain.
    controls : list of Function
        u, in the order of ``problem.functions``.
    inputs, final : Function
        v and f(T).
    value : float
        F(v) = J.
    gradient : Function
        D_v F, in the space of the inputs. For one sample it is r(0).
    gradient_norm : float
        The norm of the gradient in the parameters, at most the tolerance.

    Raises
    ------
    TypeError, ValueError
        If `problem` is no learning problem over the parameters alone, is not at a stationary point, or has first derivatives
        only, as with `Derivatives`, checkpoints or an ensemble; if an option does not fit.
    NotImplementedError
        If its loss has no Hessian.

    Examples
    --------
    The input is its own target, so the best controls are 0. How much does it cost to bring 1 + w to 1?

    >>> from firedrake import FunctionSpace, UnitIntervalMesh
    >>> from fem_resnet import Batch, LabelSpace, ResidualNetwork, laplace_basis, least_squares, tikhonov
    >>> Y = LabelSpace(FunctionSpace(UnitIntervalMesh(4), "DG", 0))
    >>> constants = laplace_basis(Y, 1)
    >>> net = ResidualNetwork(constants, bias=constants, layers=1, activation="identity")
    >>> one = Y.batch(1 + 0 * Y.weights)
    >>> problem = LearningProblem(net, None, least_squares, tikhonov(2.0), Batch(one, one))
    >>> feedback = LocalFeedback(problem)
    >>> round(float(feedback.hessian(one).dat.data_ro.max()), 9)
    0.5

    Controls for another input, which must be near the trained one:

    >>> new_input = Y.batch(1.1 + 0 * Y.weights)
    >>> for function, control in zip(problem.functions, feedback(new_input)):
    ...     _ = function.assign(control)
    """

    # Learned factors are not taken: factors and beta make the same kernel in many ways, so no minimum is strict.
    @supports(
        "channels",
        "no_layers", "gradient_flow", "learned_times", "kernel_set", "nodal_bias", "bases_by_layer", "linear_in_time",
        "shared_in_time", *STEPPED, "head", *REGULARISED, "running", "running_of_controls", "many_samples", "weights",
    )  # fmt: skip
    def __init__(
        self,
        problem: LearningProblem,
        *,
        gradient_tolerance: float = 1e-6,
        solver_parameters: dict | None = None,
        options_prefix: str | None = None,
    ):
        gradient_tolerance = number("gradient_tolerance", gradient_tolerance, least=0)
        given, prefix = checked_options(solver_parameters), checked_prefix(options_prefix)
        self.problem, self.batch = problem, problem.batch
        self.Y = problem.net.Y
        own = problem.replace()  # nobody gives this copy another batch
        with stop_annotating():
            functional, run = own.record()
            self.controls = [function.copy(deepcopy=True) for function in own.functions]
            self.inputs = self.batch.inputs.copy(deepcopy=True)
            start = Control(self.batch.inputs, riesz_map=self.Y.riesz_map)
            self._joint = ReducedFunctional(functional.functional, [*functional.controls, start], tape=functional.tape)
            self.value = float(self._joint([*self.controls, self.inputs]))
            *gradient, self.gradient = self._joint.derivative(apply_riesz=True)
        self.final = run.final.copy(deepcopy=True)
        self.gradient_norm = _norm(problem, gradient)
        if not self.gradient_norm <= gradient_tolerance:
            raise ValueError(
                f"problem: expected optimal parameters, |gradient| up to gradient_tolerance = {gradient_tolerance:g}, "
                f"got |gradient| = {self.gradient_norm:.1e}; train further, for example with 'tao_type': 'nls' and "
                f"a smaller 'tao_gatol'"
            )
        hessian = ReducedFunctionalHessianMat(functional, comm=self.Y.comm)
        self._interface: PETScVecInterface = hessian.control_interface
        self._ksp = _solver_with(hessian, given, prefix)

    def __call__(self, inputs: fd.Function) -> list[fd.Function]:
        """The feedback: new Functions with the controls for these inputs, in the order of ``problem.functions``.

        Parameters
        ----------
        inputs
            v + w, in the space of the problem's inputs.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As for `change_of_controls`.
        """
        changed = self.change_of_controls(self._difference(inputs))
        for control, change in zip(self.controls, changed):
            change += control
        return changed

    def predicted_value(self, inputs: fd.Function) -> float:
        """F + (r, w) + 1/2 (w, D^2 F w) for the inputs v + w, in the unit of J."""
        w = self._difference(inputs)
        return self.value + self.Y.inner(self.gradient, w) + 0.5 * self.Y.inner(w, self.hessian(w))

    def change_of_controls(self, w: fd.Function) -> list[fd.Function]:
        """- J_uu^-1 J_uv w, in the order of ``problem.functions``.

        Raises
        ------
        TypeError, ValueError
            If w is not in the space of the problem's inputs.
        RuntimeError
            If the KSP does not converge, for example because J_uu is not positive definite.
        """
        self.check(w, "w")
        with stop_annotating():
            mixed = self.action(None, w)[:-1]
            b = self._interface.new_petsc()
            x = b.duplicate()
            self._interface.to_petsc(b, mixed)
            b.scale(-1.0)
            with petsctools.inserted_options(self._ksp):
                self._ksp.solve(b, x)
            reason: int = self._ksp.getConvergedReason()  # type: ignore[assignment]  # petsc4py declares a class
            if reason < 0:
                raise RuntimeError(
                    f"LocalFeedback: the KSP found no solution with J_uu in {self._ksp.getIterationNumber()} iterations, "
                    f"{reason_name(PETSc.KSP, reason)}; {NO_MINIMUM}; else take a larger 'ksp_max_it' in solver_parameters"
                )
            change = [fd.Function(function.function_space()) for function in self.controls]
            self._interface.from_petsc(x, change)
        return change

    def hessian(self, w: fd.Function) -> fd.Function:
        """D^2 F w in the label measure: a new Function in the space of the inputs."""
        change = self.change_of_controls(w)
        with stop_annotating():
            return self.Y.riesz_map(self.action(change, w)[-1])

    def action(self, change: Sequence[fd.Function] | None, w: fd.Function | None) -> list[fd.Cofunction]:
        """The second derivative of J in u and v together, applied to a direction. Collective.

        Parameters
        ----------
        change
            The direction in u, Functions in the order of ``problem.functions``; None stands for zero.
        w
            The direction in v, in the space of the problem's inputs; None stands for zero.

        Returns
        -------
        list of Cofunction
            The functionals in u, in the same order, then the functional in v.

        Raises
        ------
        TypeError, ValueError
            If a direction is in another space.
        """
        functions = [*self.controls, self.inputs]
        if w is not None:
            self.check(w, "w")
        if change is not None:
            instance("change", change, (Sequence, type(None)))
            for part in change:
                instance("change", part, fd.Function)
            if [d.function_space() for d in change] != [f.function_space() for f in self.controls]:
                raise ValueError(f"change: expected {len(self.controls)} Functions in the spaces of `controls`, got others")
        given = [*(len(self.controls) * [None] if change is None else change), w]
        # pyadjoint keeps directions on the tape, so they are copied.
        return self._joint.hessian(
            [
                fd.Function(function.function_space()) if part is None else part.copy(deepcopy=True)
                for function, part in zip(functions, given)
            ]
        )

    def _difference(self, inputs: fd.Function) -> fd.Function:
        self.check(inputs, "inputs")
        w = inputs.copy(deepcopy=True)
        w -= self.inputs
        return w

    def check(self, function: fd.Function, name: str) -> None:
        """Raise unless a Function is in the space of the problem's inputs. Collective.

        Parameters
        ----------
        function
            The Function.
        name
            The name of the argument, for messages.

        Raises
        ------
        TypeError, ValueError
            If it is no Function, has values that are not finite, or is in another space.
        """
        self.Y.check_batch(function, text("name", name))
        if function.function_space() != self.inputs.function_space():
            raise ValueError(
                f"{name}: expected a Function of {self.inputs.function_space()}, the space of the problem's inputs, "
                f"got {function.function_space()}; LowRankFeedback takes many inputs of a problem with one sample"
            )


def _norm(problem: LearningProblem, gradient: Sequence[fd.Function]) -> float:
    """The norm in the label measure of a gradient, in the order of ``problem.functions``."""
    of, squares = iter(gradient), 0.0
    for parameter in problem.parameters:
        for k, basis in enumerate(parameter.space_bases):
            c = basis.read(next(of))
            squares += parameter.inner(k, c, c)
    return float(np.sqrt(squares))


def _solver_with(hessian: ReducedFunctionalHessianMat, given: dict[str, object], prefix: str | None) -> PETSc.KSP:
    """A KSP with J_uu, and with the options that the user gave."""
    interface = hessian.control_interface
    sizes = (interface.n, interface.N)
    matrix = PETSc.Mat().createPython((sizes, sizes), hessian, comm=interface.comm)
    matrix.setUp()
    ksp = PETSc.KSP().create(interface.comm)
    ksp.setOperators(matrix)
    with petsc_refusals(given):
        petsctools.set_from_options(
            ksp, parameters=SOLVER_PARAMETERS | given, options_prefix=prefix, default_prefix="fem_resnet_feedback"
        )
    refuse_unread(unread(petsctools.get_options(ksp), given), f"a KSP of type {ksp.getType()!r}")
    return ksp
