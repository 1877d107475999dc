"""Which directions the data determine: the spectrum of the loss's Hessian at the present parameters.

With H the second derivative of the loss alone, without regulariser, and R the inner product of the controls (label measure
and time),

    H v_i = mu_i R v_i,       <R v_i, v_j> = delta_ij,       mu_1 >= mu_2 >= ..

At a minimum of J = loss + lambda/2 <R m, m> of (2.11), take the Gaussian with the second derivative of J: the Laplace
approximation of the posterior with the prior (lambda R)^-1. Its variance in the direction v_i is 1 / (lambda + mu_i); without
data it would be 1 / lambda. So the data determine the directions with mu_i >> lambda, and the prior the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import firedrake as fd
import numpy as np
import petsctools
from petsc4py import PETSc
from pyadjoint.optimization.tao_solver import PETScVecInterface
from pyadjoint.tape import stop_annotating
from slepc4py import SLEPc

from fem_resnet.arguments import flag, integer, number
from fem_resnet.features import HELD, REGULARISED, STEPPED, supports
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.options import checked_options, checked_prefix, petsc_refusals, refuse_unread, unread
from fem_resnet.petsc import shell

__all__ = ["EIGENSOLVER_PARAMETERS", "Spectrum", "hessian_spectrum"]

EIGENSOLVER_PARAMETERS = {"eps_gen_hermitian": None, "eps_largest_real": None, "eps_tol": 1e-9, "eps_max_it": 200}


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of a loss's Hessian.

    Attributes
    ----------
    values : numpy.ndarray
        mu_i, shape (count,), falling; in the unit of the loss.
    directions : list of list of Function
        v_i, one Function a control, in the order of ``problem.functions``.
    residuals : numpy.ndarray
        |R^-1 H v_i - mu_i v_i| in the norm of R, shape (count,).
    """

    values: np.ndarray
    directions: list[list[fd.Function]]
    residuals: np.ndarray

    def variance(self, weight: float) -> np.ndarray:
        """The part lambda / (lambda + mu_i) of the prior's variance that is left in each v_i, shape (count,).

        Parameters
        ----------
        weight
            lambda > 0 of Tikhonov's functional.

        Raises
        ------
        ValueError
            If the weight is not positive.
        """
        weight = number("weight", weight, above=0)
        return weight / (weight + self.values)


@supports(
    "channels",
    "no_layers", "gradient_flow", *HELD, *STEPPED, "head", *REGULARISED, "running", "running_of_controls",
    "running_of_pairs", "observed_times",
    "learned_initial", "learned_both", "lift", "many_samples", "weights",
)  # fmt: skip
def hessian_spectrum(
    problem: LearningProblem,
    count: int,
    *,
    gauss_newton: bool = False,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> Spectrum:
    """The largest eigenvalues of the loss's Hessian at the present parameters, by SLEPc, without any matrix. Collective.

    Parameters
    ----------
    problem
        The learning problem; its regulariser is left out.
    count
        Number of eigenvalues, at least 1.
    gauss_newton
        Whether to take the Hessian of Gauss and Newton, which has no negative eigenvalues (`tape.recording.gauss_newton`).
    solver_parameters, options_prefix
        Options of SLEPc's EPS, over `EIGENSOLVER_PARAMETERS`.

    Raises
    ------
    ValueError
        If `count` is no integer from 1 to the number of coefficients, or J has first derivatives only: with `Derivatives`,
        checkpoints or an ensemble.
    RuntimeError
        If the eigensolver does not find them all.

    Examples
    --------
    >>> spectrum = hessian_spectrum(problem, 10)  # doctest: +SKIP
    >>> spectrum.variance(1e-2)  # doctest: +SKIP
    """
    size = sum(parameter.dim for parameter in problem.parameters)
    count, gauss_newton = integer("count", count, most=size), flag("gauss_newton", gauss_newton)
    given, prefix = checked_options(solver_parameters), checked_prefix(options_prefix)
    loss = problem.replace(regulariser=None)
    functional = loss.reduced_functional(gauss_newton=gauss_newton)
    comm, functions = problem.net.Y.comm, problem.functions
    with stop_annotating():
        functional(functions)
        functional.derivative()
        pencil = _Pencil(loss, functional, PETScVecInterface(functions, comm=comm))
        eps = SLEPc.EPS().create(comm=comm)
        eps.setOperators(*pencil.matrices(comm))
        eps.setDimensions(nev=int(count))
        ksp = eps.getST().getKSP()
        ksp.setType("preonly")
        ksp.getPC().setType("python")
        ksp.getPC().setPythonContext(_Inverse(pencil))
        with petsc_refusals(given):
            petsctools.set_from_options(
                eps, parameters=EIGENSOLVER_PARAMETERS | given, options_prefix=prefix, default_prefix="fem_resnet_curvature"
            )
            with petsctools.inserted_options(eps):
                eps.setUp()  # what solvers of their own read, and refuse, they do here
        refuse_unread(unread(petsctools.get_options(eps), given), f"an EPS of type {eps.getType()!r}")
        with petsctools.inserted_options(eps):
            eps.solve()
        if eps.getConverged() < count:
            raise RuntimeError(
                f"hessian_spectrum: SLEPc found {eps.getConverged()} of {count} eigenvalues in "
                f"{eps.getIterationNumber()} iterations; try a larger 'eps_ncv' or 'eps_max_it' in solver_parameters"
            )
        return pencil.spectrum(eps, int(count))


class _Pencil:
    """H and R on vectors that hold all controls."""

    def __init__(self, problem: LearningProblem, functional, interface: PETScVecInterface):
        self.functional = functional
        self.interface = interface
        self.blocks = [
            (parameter.space_bases[k], parameter.time_basis.measures[k])
            for parameter in problem.parameters
            for k in range(len(parameter.functions))
        ]
        self._functions = [fd.Function(basis.space) for basis, _ in self.blocks]

    def matrices(self, comm) -> tuple[PETSc.Mat, PETSc.Mat]:
        local = self.interface.new_petsc().getLocalSize()
        return shell(_Action(self.hessian), (local,) * 2, comm), shell(_Action(self.metric), (local,) * 2, comm)

    def read(self, x: PETSc.Vec) -> list[fd.Function]:
        self.interface.from_petsc(x, self._functions)
        return self._functions

    def hessian(self, x: PETSc.Vec, y: PETSc.Vec) -> None:
        actions = self.functional.hessian([f.copy(deepcopy=True) for f in self.read(x)], apply_riesz=False)
        self.interface.to_petsc(y, actions)

    def metric(self, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self._map(x, y, lambda basis, tau, c: tau * basis.functional(c))

    def inverse(self, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self._map(x, y, lambda basis, tau, d: basis.riesz(d) / tau)

    def _map(self, x, y, on_coefficients) -> None:
        functions = self.read(x)
        for (basis, tau), function in zip(self.blocks, functions):
            basis.write(function, on_coefficients(basis, tau, basis.read(function)))
        self.interface.to_petsc(y, functions)

    def spectrum(self, eps: SLEPc.EPS, count: int) -> Spectrum:
        x, values, directions, residuals = self.interface.new_petsc(), [], [], []
        Hx, Rx = x.duplicate(), x.duplicate()
        for i in range(count):
            values.append(eps.getEigenpair(i, x).real)
            self.metric(x, Rx)
            x.scale(1 / np.sqrt(x.dot(Rx)))
            self.hessian(x, Hx)
            self.metric(x, Rx)
            Hx.axpy(-values[-1], Rx)
            self.inverse(Hx, Rx)
            residuals.append(np.sqrt(max(Hx.dot(Rx), 0.0)))
            directions.append([f.copy(deepcopy=True) for f in self.read(x)])
        order = np.argsort(values)[::-1]
        return Spectrum(np.array(values)[order], [directions[i] for i in order], np.array(residuals)[order])


class _Action:
    def __init__(self, action):
        self._action = action

    def mult(self, mat, x, y):
        self._action(x, y)


class _Inverse:
    def __init__(self, pencil: _Pencil):
        self._pencil = pencil

    def apply(self, pc, x, y):
        self._pencil.inverse(x, y)
