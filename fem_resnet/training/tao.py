"""TAO as the algorithms of this package use it: over pyadjoint's solver, in inner products of the label measure.

TAO's gradient norm and the first matrix of its L-BFGS are the Riesz maps of the controls; they precondition the linear
solves of its Newton methods and measure the radius of their trust regions. Under bounds, Newton methods solve for the
coefficients that are free: with the rows and columns of Hessian and Riesz map that belong to them.

**Units.** int a^2 dy grows with |Y|, int int b^2 dy dz does not, as b falls like 1 / |Y|; and J has a unit of its own. TAO
adds squares up, and has numbers that are absolute (first radii, steps, what it takes for round-off of J). So it sees

    J / |J(start)|        with        sum_k |x_k|^2 / u_k,        u_k = `SpaceBasis.unit` of the control k,

in which nothing has a unit: a problem told in other units takes the same steps. Where the gradient of that is steep, the inner
product is shortened, so that the first step of steepest descent promises no more than 2 J(start): J >= 0 cannot fall by more,
and a longer step leaves the domain of J where that has an end (layer times that cross). Where TAO compares coefficients themselves
(active sets, curvatures, types without Riesz maps), they are in parts of `SpaceBasis.amplitude`, up to a factor 2^(1/2):
a power of two, so that no coefficient is rounded. What is told to the caller are J and the
norm of its gradient in the label measure. TAO's tolerances are tested here, the same for all types: "tao_gatol" is one of
that norm, "tao_grtol" and "tao_gttol" are relative, of the gradient without units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import firedrake as fd
import numpy as np
import petsctools
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint import AdjFloat, Control, MinimizationProblem, TAOSolver
from pyadjoint.enlisting import Enlist
from pyadjoint.optimization.tao_solver import PETScVecInterface, ReducedFunctionalHessianMat
from pyadjoint.reduced_functional import AbstractReducedFunctional
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import LARGEST
from fem_resnet.options import checked_prefix, petsc_refusals, reason_name, refuse_unread, unread
from fem_resnet.parameters.space_basis import SpaceBasis
from fem_resnet.petsc import take_function_lower_bound

__all__ = ["TYPES", "Minimiser", "Outcome", "TAOType"]


@dataclass(frozen=True)
class TAOType:
    """A type of TAO that minimises a function by its gradient, and reports what it reached.

    Attributes
    ----------
    what
        The method.
    bounds
        Whether it keeps to bounds.
    newton
        The prefix of its options where it takes Hessian actions; else None.
    label_measure
        Whether directions come from gradients in the label measure; else from derivatives in the coefficients.
    """

    what: str
    bounds: bool = False
    newton: str | None = None
    label_measure: bool = True


#: The types that are taken. PETSc's others minimise something else than J (owlqn adds |m|_1, bmrm a regulariser; gpcg and
#: bqpip are for quadratics, brgn and pounders for residuals, ssils and its like for complementarity, ipm, pdipm, almm, admm
#: and lcl for constraints), know no gradient (nm), compare changes of J with 1e-6 (tron), or are no methods (shell, snes, python).
TYPES = {
    "lmvm": TAOType("L-BFGS"),
    "blmvm": TAOType("L-BFGS with projections", bounds=True),
    "nls": TAOType("Newton's method with a line search", newton="nls"),
    "ntr": TAOType("Newton's method with a trust region", newton="ntr"),
    "ntl": TAOType("Newton's method with a trust region, then a line search", newton="ntl"),
    "bnls": TAOType("nls with active sets", bounds=True, newton="bnk"),
    "bntr": TAOType("ntr with active sets", bounds=True, newton="bnk"),
    "bntl": TAOType("ntl with active sets", bounds=True, newton="bnk"),
    "cg": TAOType("nonlinear conjugate gradients", label_measure=False),
    "bncg": TAOType("nonlinear conjugate gradients with active sets", bounds=True, label_measure=False),
    "bqnls": TAOType("L-BFGS with active sets", bounds=True, label_measure=False),
}

#: PETSc's code for an operation that a matrix does not have.
_UNSUPPORTED = 83
#: What Newton methods take for round-off of J, where J is one at the start.
_ROUND_OFF = 1e-12
_Reason = PETSc.TAO.ConvergedReason


class Outcome(NamedTuple):
    """How a minimisation ended: J and the norm of its gradient where the Functions are, whether a test was met, and why."""

    value: float
    gradient_norm: float
    converged: bool
    reason: str


class Minimiser:
    """A TAO for one functional, which may be used again and again. Collective.

    Parameters
    ----------
    functional
        What is minimised, a function of its controls.
    functions
        Where a solve starts, and what takes what it found: one Function a control.
    bases
        How they hold coefficients, one a control.
    parameters, options_prefix
        TAO's options; "tao_type" is among them.
    comm
        Communicator of the TAO.
    bounds
        A pair of Functions a control, or none at all.
    given
        Names of those options that the user gave.

    Raises
    ------
    TypeError
        If the options are no dictionary.
    ValueError
        If the type of TAO is none of `TYPES`, does not keep to bounds where there are some, or does not ask for one of
        `given`; or the limit of iterations is no integer >= 0.
    """

    def __init__(
        self,
        functional: AbstractReducedFunctional,
        functions: Sequence[fd.Function],
        bases: Sequence[SpaceBasis],
        parameters: Mapping,
        *,
        comm: MPI.Comm,
        options_prefix: str | None = None,
        bounds: Sequence[tuple[fd.Function, fd.Function]] | None = None,
        given: Iterable[str] = (),
    ):
        self._functional, self._functions, self._comm, self._bounds = functional, functions, comm, bounds
        self._amplitudes = [2.0 ** round(np.log2(basis.amplitude)) for basis in bases]
        units = [basis.unit for basis in bases]
        self._scaled = _WithoutUnits(functional, self._amplitudes, units)
        self._parameters, self._prefix, self._given = dict(parameters), checked_prefix(options_prefix), tuple(given)
        self._type = _checked_type(str(self._option("tao_type")), bounded=bounds is not None)
        #: TAO's limit of iterations.
        self.limit = _checked_limit(self._option("tao_max_it"))
        self._interface = PETScVecInterface(functions, comm=comm)
        self._per_unit = self._interface.new_petsc()
        self._interface.to_petsc(self._per_unit, [1 / unit for unit in units])
        self._create()

    def _option(self, name: str) -> object:
        """What an option is, the command line going first."""
        if self._prefix is None:
            return self._parameters[name]
        prefix = self._prefix if not self._prefix or self._prefix.endswith("_") else self._prefix + "_"
        return PETSc.Options(prefix).getString(name, str(self._parameters[name]))

    def _create(self) -> None:
        limit = {"tao_max_it": max(self.limit, 1)}  # PETSc's own wants one at least
        bounds = self._bounds and [
            tuple(_times(end, 1 / amplitude) for end in pair) for pair, amplitude in zip(self._bounds, self._amplitudes)
        ]
        with _options_of_the_matrix(_defaults_of(self._type) | self._parameters | limit) as parameters:
            with petsc_refusals(self._parameters):
                self._solver = TAOSolver(
                    MinimizationProblem(self._scaled, bounds=bounds), parameters, options_prefix=self._prefix, comm=self._comm
                )
            of_matrix = [name for name in self._given if name not in parameters and not PETSc.Options().used(name)]
            others = [name for name in self._given if name in parameters]
            refuse_unread(of_matrix + unread(petsctools.get_options(self._solver.tao), others), f"TAO's {self._type!r}")
        tao = self._solver.tao
        hessian, *_ = tao.getHessian()
        hessian.setPythonContext(_HessianAtItsPoint(self._scaled, comm=self._comm))
        self._reached = self._solver.x.duplicate()
        # TAO would hold them against norms and values of its own.
        self._tolerances = tao.getTolerances()
        tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
        self._least_value = take_function_lower_bound(tao)

    def solve(
        self,
        watch: Callable[[int, float, float], None],
        stop: Callable[[float], bool] | None = None,
    ) -> Outcome:
        """Minimise from what the Functions hold, and assign to them what the last iteration reached, come what may.

        The tape is there too at the end, unless an evaluation raised.

        Parameters
        ----------
        watch
            Called once an iteration with its number, the value and the norm of the gradient, the Functions holding what
            was reached. Norms are those of the label measure, and under bounds of what does not point out of them.
        stop
            Called once an iteration with the norm of the gradient, the Functions holding what was reached: whether that
            is good enough, besides TAO's own tests.

        Returns
        -------
        Outcome
            Its value is that of J evaluated at the end, whatever TAO says.

        Raises
        ------
        ArithmeticError
            If J is not finite at the start.
        Exception
            What an evaluation or a callback raised.
        """
        if self._solver is None:
            self._create()
        tao, iteration, norm, free, first = self._solver.tao, -1, np.nan, np.nan, np.nan
        self._scaled.start()

        def monitor(tao):
            nonlocal iteration, norm, free, first
            repeated = iteration == tao.getIterationNumber()
            iteration = tao.getIterationNumber()
            tao.getSolution().copy(self._reached)
            self._assign_reached()
            norm, free = self._gradient_norms(tao)
            if iteration == 0:
                first = free
            if not repeated:  # some types report their start twice, and some go on from a better one
                watch(iteration, self._scaled.scale * tao.getSolutionStatus()[1], norm)

        def test(tao):
            value = tao.getSolutionStatus()[1]
            gatol, grtol, gttol = self._tolerances
            if self._scaled.scale * value <= self._least_value:
                return _Reason.CONVERGED_MINF
            if norm <= gatol:
                return _Reason.CONVERGED_GATOL
            if free <= max(grtol, np.finfo(float).eps) * abs(value):  # below that no step changes J
                return _Reason.CONVERGED_GRTOL
            if free <= gttol * first:
                return _Reason.CONVERGED_GTTOL
            if stop is not None and stop(norm):
                return _Reason.CONVERGED_USER
            return _Reason.DIVERGED_MAXITS if tao.getConvergedReason() == 0 and iteration >= self.limit else None

        tao.cancelMonitor()
        tao.setMonitor(monitor)
        tao.setConvergenceTest(test)
        # pyadjoint's own solve() raises at the limit of iterations and drops what was found.
        with stop_annotating(), petsctools.inserted_options(tao):
            self._interface.to_petsc(
                self._solver.x, [_times(function, 1 / a) for function, a in zip(self._functions, self._amplitudes)]
            )
            try:
                tao.solve()
                reason = tao.getConvergedReason()
            except PETSc.Error as error:
                if error.__cause__ is not None or error.ierr != _UNSUPPORTED or iteration < 0:
                    self._solver = None  # its vectors may be locked
                    raise error.__cause__ or error
                # Where the line search cannot go on, L-BFGS starts afresh, but pyadjoint's first matrix does not survive
                # it. PETSc then finds work vectors still in use when it destroys that TAO, and says so once.
                reason = _Reason.DIVERGED_LS_FAILURE
                with suppress(PETSc.Error):
                    tao.destroy()
                self._solver = None
            finally:
                if iteration >= 0:
                    self._assign_reached()
            value = float(self._functional(self._functions))
        return Outcome(value, norm, reason > 0, reason_name(PETSc.TAO, reason))

    def _assign_reached(self) -> None:
        self._interface.from_petsc(self._reached, self._functions)
        for function, amplitude in zip(self._functions, self._amplitudes):
            if amplitude != 1.0:
                function.dat.data[...] *= amplitude

    def _gradient_norms(self, tao: PETSc.TAO) -> tuple[float, float]:
        """Of J in the label measure, and of what TAO sees, without units."""
        gradient, _ = tao.getGradient()
        representative = gradient.duplicate()
        tao.getGradientNorm().mult(gradient, representative)
        free = gradient.dot(representative)
        representative.pointwiseMult(representative, self._per_unit)
        squares = np.maximum(0.0, [gradient.dot(representative), free]) / self._scaled.share
        return float(self._scaled.scale * np.sqrt(squares[0])), float(np.sqrt(squares[1]))


def _times(function: fd.Function | fd.Cofunction, factor: float) -> fd.Function | fd.Cofunction:
    """A multiple of it; itself for the factor 1. No bound stays none."""
    if factor == 1.0:
        return function
    product, most = function._ad_copy(), np.finfo(float).max
    with np.errstate(over="ignore"):
        product.dat.data[...] = np.clip(function.dat.data_ro * factor, -most, most)
    return product


class _WithoutUnits(AbstractReducedFunctional):
    """J / |J| of its first evaluation, of coefficients over amplitudes, with Riesz maps of squared norms over units."""

    def __init__(self, J: AbstractReducedFunctional, amplitudes: Sequence[float], units: Sequence[float]):
        self._J, self._amplitudes = J, amplitudes
        self._controls = Enlist([self._in_units(*each) for each in zip(J.controls, amplitudes, units, strict=True)])
        self.start()

    def start(self) -> None:
        """The next evaluation and derivative are those of the start, which scale all that follow."""
        #: What J is divided by; None before the next evaluation says it.
        self.scale: float | None = None
        #: What Riesz maps are multiplied by.
        self.share = 1.0
        self._at_start = True

    def _in_units(self, control: Control, amplitude: float, unit: float) -> Control:
        """What knows the space of a control, and the Riesz map of |amplitude x|^2 / unit."""

        def riesz_map(dual):
            primal = control.control._ad_convert_riesz(dual, riesz_map=control.riesz_map)
            primal.dat.data[...] *= self.share * unit / amplitude**2
            return primal

        return Control(control.control, riesz_map=riesz_map)

    def _shorten(self, duals) -> None:
        """Set the share by the first gradient."""
        steepness, self._at_start = 0.0, False
        for control, dual in zip(self._controls, duals):
            comm = control.control.function_space().mesh().comm
            steepness += comm.allreduce(float(np.sum(dual.dat.data_ro * control.riesz_map(dual).dat.data_ro)))
        self.share = 2 / max(2.0, steepness)

    @property
    def controls(self):
        return self._controls

    @property
    def tape(self):
        """Where J is recorded."""
        return self._J.tape

    def _multiplied(self, functions) -> list:
        return [_times(function, amplitude) for function, amplitude in zip(Enlist(functions), self._amplitudes)]

    def _dual(self, duals, apply_riesz: bool):
        duals = self._multiplied(duals)
        if apply_riesz:
            duals = [control.riesz_map(dual) for control, dual in zip(self._controls, duals)]
        return self._controls.delist(duals)

    def __call__(self, values) -> AdjFloat:
        value = float(self._J(self._multiplied(values)))
        if self.scale is None:
            if not np.isfinite(value):
                raise ArithmeticError(f"J is {value} at the start: begin with other parameters, or scale the data")
            self.scale = abs(value) or 1.0
        return AdjFloat(value / self.scale)

    def derivative(self, adj_input=1.0, apply_riesz=False):
        duals = self._J.derivative(adj_input / self.scale)
        if self._at_start:
            self._shorten(self._multiplied(duals))
        return self._dual(duals, apply_riesz)

    def hessian(self, m_dot, hessian_input=None, evaluate_tlm=True, apply_riesz=False):
        # pyadjoint's second adjoint is that of the last derivative, whose seed was divided already.
        directions = self._multiplied(m_dot)
        return self._dual(self._J.hessian(directions, hessian_input=hessian_input, evaluate_tlm=evaluate_tlm), apply_riesz)

    def tlm(self, m_dot):
        return self._J.tlm(self._multiplied(m_dot)) / self.scale


def _checked_limit(given: object) -> int:
    """The limit of iterations that was given."""
    if str(given).isdecimal() and int(str(given)) <= LARGEST:
        return int(str(given))
    raise ValueError(f"solver_parameters: expected an integer >= 0 for 'tao_max_it', got {given!r}")


def _checked_type(given: str, *, bounded: bool) -> str:
    """A type of TAO, if it is taken."""
    allowed = {name: kind for name, kind in TYPES.items() if kind.bounds or not bounded}
    if given in allowed:
        return given
    fault = "does not know bounds" if given in TYPES else "is not taken"
    raise ValueError(
        f"solver_parameters: TAO's {given!r} {fault}; expected a 'tao_type' of "
        + ", ".join(f"{name!r} ({kind.what})" for name, kind in allowed.items())
    )  # fmt: skip


class _HessianAtItsPoint(ReducedFunctionalHessianMat):
    """The Hessian at the point where TAO asked for it.

    Trust regions, also that in which a line search starts, evaluate J elsewhere between two actions; pyadjoint's own
    matrix then acts where the tape happens to stand.
    """

    def update_tape_values(self, *, update_adjoint: bool = True):
        super().update_tape_values(update_adjoint=update_adjoint)
        self._evaluation = self.rf.tape.recompute_count

    def mult_impl(self, A, x):
        if self.rf.tape.recompute_count != self._evaluation:
            self.update_tape_values()
        return super().mult_impl(A, x)

    def createSubMatrix(self, A, rows, columns, reused):
        return _on_subset(A, rows)

    def riesz(self, dual, primal):
        """`primal = R^-1 dual`, Vecs of all coefficients."""
        interface, controls = self.control_interface, self.rf.controls
        functionals = [control._ad_init_zero(dual=True) for control in controls]
        interface.from_petsc(dual, functionals)
        interface.to_petsc(primal, [control.riesz_map(f) for control, f in zip(controls, functionals)])


class _OnSubset:
    """Rows and columns of a Hessian and of its Riesz map."""

    def __init__(self, A: PETSc.Mat, rows: PETSc.IS):
        self._A, self._rows, self._shift = A, rows, 0.0
        self._in, self._out = A.createVecs()

    def _apply(self, action, x, y):
        self._in.set(0.0)
        self._in.isaxpy(self._rows, 1.0, x)
        action(self._in, self._out)
        part = self._out.getSubVector(self._rows)
        part.copy(y)
        self._out.restoreSubVector(self._rows, part)

    def mult(self, A, x, y):
        self._apply(self._A.mult, x, y)
        y.axpy(self._shift, x)

    def shift(self, A, alpha):
        self._shift += alpha

    def riesz(self, dual, primal):
        self._apply(self._A.getPythonContext().riesz, dual, primal)


def _on_subset(A: PETSc.Mat, rows: PETSc.IS) -> PETSc.Mat:
    sizes = rows.getLocalSize(), rows.getSize()
    part = PETSc.Mat().createPython((sizes, sizes), _OnSubset(A, rows), comm=A.comm)
    part.setOption(PETSc.Mat.Option.SYMMETRIC, True)
    part.setUp()
    part.assemble()
    return part


class RieszPreconditioner:
    """PETSc's PC of the Riesz map of a Hessian, or of a part of it; pyadjoint's own does not take parts."""

    def apply(self, pc, x, y):
        pc.getOperators()[1].getPythonContext().riesz(x, y)


def _defaults_of(tao_type: str) -> dict:
    """Options that come before the user's: Riesz maps precondition, and J is one at the start."""
    prefix = TYPES[tao_type].newton
    if prefix is None:
        return {}
    return {
        f"tao_{prefix}_pc_type": "python",
        f"tao_{prefix}_pc_python_type": f"{__name__}.{RieszPreconditioner.__name__}",
        # PETSc's first radius comes of a step down the derivative in the coefficients, and a linear solve's tolerance too.
        f"tao_{prefix}_init_type": "constant",
        "tao_trust0": 1.0,
        f"tao_{prefix}_ksp_norm_type": "natural",
        f"tao_{prefix}_epsilon": _ROUND_OFF,
    }


@contextmanager
def _options_of_the_matrix(parameters: dict):
    """Set those of L-BFGS's matrix, such as `tao_lmvm_mat_lmvm_hist_size`, and give the others.

    Whatever the prefix of a TAO, PETSc 3.26 looks for its matrix's options without it. The command line goes first.
    """
    options = PETSc.Options()
    of_matrix = {name: value for name, value in parameters.items() if name.startswith(("tao_lmvm_mat", "tao_blmvm_mat"))}
    added = {name: value for name, value in of_matrix.items() if not options.hasName(name)}
    for name, value in added.items():
        options[name] = value
    try:
        yield {name: value for name, value in parameters.items() if name not in of_matrix}
    finally:
        for name in added:
            options.delValue(name)
