"""One step of (5.1a), (5.1b): J plus a proximal term in some of what is learned, the rest staying as it is.

    x <- argmin_x  J(.., x, ..) + 1/(2 tau) |x - centre|^2

in the norm of label domain and time, `Parameter.inner`, whose Riesz maps the controls have. By TAO, from the centre, until

    |gradient| <= accuracy |x - centre| / tau,

|x - centre| / tau being |D_x J| at the minimum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import firedrake as fd
import numpy as np
from pyadjoint import AdjFloat, ReducedFunctional
from pyadjoint.enlisting import Enlist
from pyadjoint.reduced_functional import AbstractReducedFunctional

from fem_resnet.arguments import instance, real_array
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.training.tao import Minimiser

__all__ = ["ProximalBlock", "ProximalFunctional"]


class ProximalFunctional(AbstractReducedFunctional):
    """J + 1/(2 tau) |x - centre|^2 as a function of the coefficients x of one block; the others are as the tape has them.

    Parameters
    ----------
    J
        The functional of all that is learned, recorded.
    controls
        Those of the block, among the controls of J.
    parameters
        The block.

    Attributes
    ----------
    tau : float
    centre : list of numpy.ndarray
    value, square : float
        J and |x - centre|^2 at the latest evaluation.
    """

    def __init__(self, J: ReducedFunctional, controls: Sequence, parameters: Sequence[Parameter]):
        self._J = ReducedFunctional(J.functional, list(controls), tape=J.tape)
        self._sets = [(parameter, k) for parameter in parameters for k in range(len(parameter.functions))]
        self.tau, self.centre, self._seed = 1.0, [parameter.get(k) for parameter, k in self._sets], 1.0

    @property
    def controls(self):
        return self._J.controls

    @property
    def tape(self):
        """Where J is recorded."""
        return self._J.tape

    def _read(self, functions: Sequence[fd.Function]) -> list[np.ndarray]:
        return [p.space_bases[k].read(function) for (p, k), function in zip(self._sets, functions)]

    def inner(self, c: Sequence[np.ndarray], d: Sequence[np.ndarray]) -> float:
        """(c, d) in the measure of label domain and time. Collective."""
        return sum(p.pair(k, c_k, d_k) for (p, k), c_k, d_k in zip(self._sets, c, d))

    def __call__(self, values) -> AdjFloat:
        values = Enlist(values)
        self.value = float(self._J(values))
        self._offset = [c - d for c, d in zip(self._read(values), self.centre)]
        self.square = self.inner(self._offset, self._offset)
        return AdjFloat(self.value + self.square / (2 * self.tau))

    def derivative(self, adj_input=1.0, apply_riesz=False):
        self._seed = float(adj_input)
        return self._with_term(self._J.derivative(adj_input), self._offset, self._seed, apply_riesz)

    def hessian(self, m_dot, hessian_input=None, evaluate_tlm=True, apply_riesz=False):
        # As pyadjoint's: that of what was last differentiated.
        actions = self._J.hessian(m_dot, hessian_input, evaluate_tlm)
        return self._with_term(actions, self._read(Enlist(m_dot)), self._seed, apply_riesz)

    def _with_term(self, duals, coefficients, scale, apply_riesz):
        """Functionals of J, with those of the proximal term added, whose gradient is coefficients / tau."""
        duals = Enlist(duals)
        for (p, k), dual, c in zip(self._sets, duals, coefficients):
            basis = p.space_bases[k]
            basis.write(dual, basis.read(dual) + scale * p.time_basis.measures[k] / self.tau * basis.functional(c))
        if apply_riesz:
            duals = [control.riesz_map(dual) for control, dual in zip(self.controls, duals)]
        return self.controls.delist(duals)

    def tlm(self, m_dot):
        return self._J.tlm(m_dot) + self.inner(self._offset, self._read(Enlist(m_dot))) / self.tau


class ProximalBlock:
    """Parameters that are minimised over together, with the TAO that does it.

    Parameters
    ----------
    name
        What the block is called.
    parameters
        The block.
    J, controls
        As in `ProximalFunctional`.
    solver_parameters, options_prefix
        TAO's options.
    given
        Names of those that the user gave.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[Parameter],
        J: ReducedFunctional,
        controls: Sequence,
        solver_parameters: dict,
        options_prefix: str | None,
        given: Iterable[str],
    ):
        self.name = name
        self.functional = ProximalFunctional(J, controls, parameters)
        self._sets = [(parameter, k) for parameter in parameters for k in range(len(parameter.functions))]
        self._functions = [parameter.functions[k] for parameter, k in self._sets]
        comm = parameters[0].space_bases[0].Y.comm
        self._minimiser = Minimiser(
            self.functional, self._functions, [parameter.space_bases[k] for parameter, k in self._sets],
            solver_parameters, comm=comm, options_prefix=options_prefix, given=given,
        )  # fmt: skip

    def get(self) -> list[np.ndarray]:
        """The coefficients that the parameters have."""
        return [parameter.read(k) for parameter, k in self._sets]

    def set(self, coefficients: Sequence[np.ndarray]) -> None:
        """Give them to the parameters."""
        for (parameter, k), c in zip(self._sets, coefficients):
            parameter.write(k, c)

    def checked(self, coefficients: Sequence[np.ndarray], name: str) -> list[np.ndarray]:
        """Coefficients from outside, on all ranks alike."""
        instance(name, coefficients, (list, tuple))
        if len(coefficients) != len(self._sets):
            raise ValueError(f"{name}: expected {len(self._sets)} arrays for {self.name}, got {len(coefficients)}")
        bases = [parameter.space_bases[k] for parameter, k in self._sets]
        return [real_array(name, c, basis.shape, comm=basis.Y.comm) for c, basis in zip(coefficients, bases)]

    def square_from(self, coefficients: Sequence[np.ndarray]) -> float:
        """|x - coefficients|^2 of what the parameters have."""
        offset = [c - d for c, d in zip(self.get(), coefficients)]
        return self.functional.inner(offset, offset)

    def put_back(self, coefficients: Sequence[np.ndarray]) -> None:
        """Give them to parameters and tape."""
        self.set(coefficients)
        self.functional(self._functions)

    def minimise(self, tau: float, centre: Sequence[np.ndarray], accuracy: float) -> tuple[int, bool]:
        """TAO's iterations, and whether it converged. Parameters, tape and `functional` are then at what it found."""
        functional, iterations = self.functional, 0
        functional.tau, functional.centre = tau, centre
        self.set(centre)

        def watch(iteration, value, gradient_norm):
            nonlocal iterations
            iterations = iteration

        def accurate(norm):
            return norm <= accuracy * np.sqrt(self.square_from(centre)) / tau

        end = self._minimiser.solve(watch, accurate)
        return iterations, end.converged
