"""The value function near one optimal trajectory, and the feedback that it gives for nearby inputs.

The value function of section 4.3, from t = 0 and for J_mod (2.11), (4.6),

    F(v) = min_u J(u, v),       u = (a, b), and a learned head,       v = f_I,

solves the Hamilton-Jacobi-Bellman equation (4.11) in the space of all inputs. The paper asks, at the end of section
4.3, for a local, Lagrangian way to it. That is this one: where u is optimal for v and J_uu > 0 there, F is smooth
near v, and

    D_v F = J_v = r(0)                                          the co-state of (4.2), in the sign of section 4.1
    D^2 F = J_vv - J_vu J_uu^-1 J_uv
    u(v + w) = u - J_uu^-1 J_uv w + O(|w|^2)                    the feedback
    F(v + w) = F + (r, w) + 1/2 (w, D^2 F w) + O(|w|^3)

so all that is wanted are Hessian actions of the discrete network along this one trajectory, on a mesh of any size.
What the feedback costs above F(v + w) is O(|w|^4), what the controls of v cost above it is O(|w|^2). Gradients and
D^2 F are those of the inner product of the label measure. F is a local minimum's value: another minimum may be lower,
and controls must be free (with active bounds F is not smooth).

The paper has one sample. For a batch all samples share u, so v stands for all of them together: the formulas hold,
with one co-state a sample times its weight, and the feedback wants all new inputs at once and answers with one u. To
answer each input with controls of its own, as the feedback of section 4.3 does, take a problem with one sample.
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

from fem_resnet.arguments import instance, number
from fem_resnet.features import STEPPED, supports
from fem_resnet.fixed import OnMesh
from fem_resnet.learning.objective import LearningProblem
from fem_resnet.options import checked_options, checked_prefix, petsc_refusals, reason_name, refuse_unread, unread

__all__ = ["NO_MINIMUM", "SOLVER_PARAMETERS", "LocalFeedback"]

#: What messages add where J_uu is not positive definite.
NO_MINIMUM = "it is not positive definite where the parameters are no strict minimum (is there a regulariser?)"
#: Options of the KSP for J_uu where the user gives none.
SOLVER_PARAMETERS = {
    "ksp_type": "cg",
    "ksp_rtol": 1e-10,
    "ksp_max_it": 1000,
    "pc_type": "python",
    "pc_python_type": f"{RieszMapPC.__module__}.{RieszMapPC.__name__}",
}


class LocalFeedback(OnMesh):
    """F, D_v F, D^2 F and the feedback at the optimum of a learning problem, without any matrix.

    It keeps the optimum that it was made at: what later happens to the parameters is not seen. Everything is
    collective over the communicator of the network.

    Parameters
    ----------
    problem
        A learning problem at a minimum over its parameters, ``learn="parameters"``; v is the inputs of its batch.
    gradient_tolerance
        Up to which norm (label measure) the gradient in the parameters counts as zero; in the unit of J.
    solver_parameters, options_prefix
        Options over `SOLVER_PARAMETERS` of the KSP that solves with J_uu: conjugate gradients with the Riesz maps of
        the controls as preconditioner. "minres" also solves where J_uu is indefinite, which is no minimum.

    Attributes
    ----------
    problem : LearningProblem
        The one that was given.
    batch : Batch
        Its batch then.
    controls : list of Function
        u, in the order of ``problem.functions``.
    inputs, final : Function
        v and f(T).
    value : float
        F(v) = J.
    gradient : Function
        D_v F, of the space of the inputs: for one sample r(0).
    gradient_norm : float
        That of the gradient in the parameters, at most the tolerance.

    Raises
    ------
    TypeError, ValueError
        If `problem` is no learning problem over the parameters alone, is not at a stationary point, or has first derivatives
        only: with `Derivatives`, checkpoints or an ensemble.
    NotImplementedError
        If its loss has no Hessian.

    Examples
    --------
    Where the input is its own target the best controls are 0. What does it cost to bring 1 + w to 1?

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

    # Where factors are learned too, those and beta make the same kernel in many ways: no minimum is strict.
    @supports(
        "no_layers", "gradient_flow", "learned_times", "stable_kernel", "nodal_bias", "bases_by_layer", "linear_in_time",
        "shared_in_time", *STEPPED, "head", "regulariser", "running", "running_of_controls", "many_samples", "weights",
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
        own = problem.replace()  # nobody gives it another batch
        with stop_annotating():
            functional, run = own.record()
            self.controls = [function.copy(deepcopy=True) for function in own.functions]
            self.inputs = self.batch.inputs.copy(deepcopy=True)
            start = Control(self.batch.inputs, riesz_map=self.Y.riesz_map)
            self._joint = ReducedFunctional(functional.functional, [*functional.controls, start], tape=functional.tape)
            self.value = float(self._joint([*self.controls, self.inputs]))
            *gradient, self.gradient = self._joint.derivative(apply_riesz=True)
        self.final = run.final.copy(deepcopy=True)
        self.gradient_norm = self._norm(gradient)
        if not self.gradient_norm <= gradient_tolerance:
            raise ValueError(
                f"problem: its parameters are not optimal, |gradient| = {self.gradient_norm:.1e} is above "
                f"gradient_tolerance = {gradient_tolerance:g}; train further, as with 'tao_type': 'nls' and "
                f"a smaller 'tao_gatol'"
            )
        comm = self.Y.comm
        context = ReducedFunctionalHessianMat(functional, comm=comm)
        self._interface: PETScVecInterface = context.control_interface
        sizes = (self._interface.n, self._interface.N)
        matrix = PETSc.Mat().createPython((sizes, sizes), context, comm=comm)
        matrix.setUp()
        self._ksp = PETSc.KSP().create(comm)
        self._ksp.setOperators(matrix)
        with petsc_refusals(given):
            petsctools.set_from_options(
                self._ksp, parameters=SOLVER_PARAMETERS | given, options_prefix=prefix, default_prefix="fem_resnet_feedback"
            )
        refuse_unread(unread(petsctools.get_options(self._ksp), given), f"a KSP of type {self._ksp.getType()!r}")

    def _norm(self, gradient: Sequence[fd.Function]) -> float:
        of = iter(gradient)
        squares = 0.0
        for parameter in self.problem.parameters:
            for k, basis in enumerate(parameter.space_bases):
                c = basis.read(next(of))
                squares += parameter.inner(k, c, c)
        return float(np.sqrt(squares))

    def __call__(self, inputs: fd.Function) -> list[fd.Function]:
        """The feedback: controls for these inputs, in the order of ``problem.functions``; new Functions.

        Parameters
        ----------
        inputs
            v + w, of the space of the problem's inputs.
        """
        changed = self.change_of_controls(self._difference(inputs))
        for control, change in zip(self.controls, changed):
            change += control
        return changed

    def predicted_value(self, inputs: fd.Function) -> float:
        """F + (r, w) + 1/2 (w, D^2 F w) for the inputs v + w."""
        w = self._difference(inputs)
        return self.value + self.Y.inner(self.gradient, w) + 0.5 * self.Y.inner(w, self.hessian(w))

    def change_of_controls(self, w: fd.Function) -> list[fd.Function]:
        """- J_uu^-1 J_uv w, in the order of ``problem.functions``.

        Raises
        ------
        RuntimeError
            If the KSP does not converge, as where J_uu is not positive definite.
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
            reason = self._ksp.getConvergedReason()
            if reason < 0:
                raise RuntimeError(
                    f"LocalFeedback: no solution with J_uu in {self._ksp.getIterationNumber()} iterations, "
                    f"{reason_name(PETSc.KSP, reason)}; {NO_MINIMUM}, or 'ksp_max_it' in solver_parameters is too small"
                )
            change = [fd.Function(function.function_space()) for function in self.controls]
            self._interface.from_petsc(x, change)
        return change

    def hessian(self, w: fd.Function) -> fd.Function:
        """D^2 F w, in the label measure: a new Function of the space of the inputs."""
        change = self.change_of_controls(w)
        with stop_annotating():
            return self.Y.riesz_map(self.action(change, w)[-1])

    def action(self, change: Sequence[fd.Function] | None, w: fd.Function | None) -> list[fd.Cofunction]:
        """J's second derivative in u and v together, in the direction (change, w), None for zero: Cofunctions. Collective."""
        functions = [*self.controls, self.inputs]
        if w is not None:
            self.check(w, "w")
        if change is not None:
            for direction in instance("change", change, (Sequence, type(None))):
                instance("change", direction, fd.Function)
            if [d.function_space() for d in change] != [f.function_space() for f in self.controls]:
                raise ValueError(f"change: expected {len(self.controls)} Functions of the spaces of `controls`, got others")
        given = [*(len(self.controls) * [None] if change is None else change), w]
        # pyadjoint keeps directions on the tape.
        direction = [
            fd.Function(function.function_space()) if part is None else part.copy(deepcopy=True)
            for function, part in zip(functions, given)
        ]
        return self._joint.hessian(direction)

    def _difference(self, inputs: fd.Function) -> fd.Function:
        self.check(inputs, "inputs")
        w = inputs.copy(deepcopy=True)
        w -= self.inputs
        return w

    def check(self, function: fd.Function, name: str) -> None:
        """Raise unless this is a batch as the problem's inputs. Collective."""
        self.Y.check_batch(function, instance("name", name, str))
        if function.function_space() != self.inputs.function_space():
            raise ValueError(
                f"{name}: expected a Function of {self.inputs.function_space()}, as the problem's inputs, "
                f"got {function.function_space()}; many inputs of one sample go to LowRankFeedback"
            )
