"""One step of (5.1a), (5.1b): J plus a proximal term in one group of parameters, while the others do not move.

    x <- argmin_x  J(.., x, ..) + 1/(2 tau) |x - centre|^2

The norm is the one of label domain and time, `Parameter.inner`, to which the Riesz maps of the controls belong. TAO
minimises from the centre until

    |gradient| <= accuracy |x - centre| / tau.

At the minimum |x - centre| / tau is |D_x J|.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np
from pyadjoint import AdjFloat, Control, ReducedFunctional
from pyadjoint.enlisting import Enlist
from pyadjoint.reduced_functional import AbstractReducedFunctional

from fem_resnet.arguments import flag, number
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.training.tao import Minimiser

__all__ = ["Evaluation", "ProximalFunctional", "ProximalGroup", "ProximalStep"]


@dataclass(frozen=True)
class ProximalStep:
    """How a group of parameters moves in one iteration of `train_pam`.

    Parameters
    ----------
    tau
        The step size, positive: 1/tau is the weight of half the squared distance that a group moves. Its unit is the
        unit of a squared distance over J.
    accuracy
        An inner problem is solved until its gradient is no larger than this times |x - x_i| / tau, which at its minimum is
        |D_i J|. No unit; 0 leaves the end to TAO's own tests.
    adapt
        Whether tau changes. It is doubled after an iteration in which each inner problem took TAO 5 iterations at most. It is
        halved after one in which an inner problem was not solved or its result not taken. The inequality below (5.1) holds
        with the tau of each iteration.
    inertial
        Whether groups move from x^k + (t_k - 1)/t_(k+1) (x^k - x^(k-1)), which is then also the centre of the proximal
        term; t_k are Nesterov's. If J rises so in a group, the group is minimised again from x^k, and the next iteration
        starts afresh with t = 1. So J never rises, but the inequality below (5.1) does *not* hold in its form, and its
        slack may be negative.

    Raises
    ------
    TypeError, ValueError
        If a number is out of its range, or a flag is no bool.

    Examples
    --------
    >>> ProximalStep(tau=10.0, adapt=True)
    ProximalStep(tau=10.0, accuracy=0.1, adapt=True, inertial=False)
    """

    tau: float = 1.0
    accuracy: float = 0.1
    adapt: bool = False
    inertial: bool = False

    def __post_init__(self):
        number("tau", self.tau, above=0)
        number("accuracy", self.accuracy, least=0)
        flag("adapt", self.adapt)
        flag("inertial", self.inertial)


@dataclass(frozen=True)
class Evaluation:
    """J at coefficients x, the arrays x - centre, and |x - centre|^2."""

    value: float
    offset: list[np.ndarray]
    square: float


class ProximalFunctional(AbstractReducedFunctional):
    """J + 1/(2 tau) |x - centre|^2 as a function of the coefficients x of one group; the tape holds all others.

    Parameters
    ----------
    J
        The functional of all that is learned, recorded.
    controls
        The controls of the group, some of the controls of J.
    parameters
        The group.

    Attributes
    ----------
    tau : float
        The step size; may be set.
    centre : list of numpy.ndarray
        The coefficients of the centre; may be set. At first the coefficients of the parameters.
    latest : Evaluation
        The latest evaluation; at first the recorded one.
    """

    def __init__(self, J: ReducedFunctional, controls: Sequence[Control], parameters: Sequence[Parameter]):
        self._J = ReducedFunctional(J.functional, list(controls), tape=J.tape)
        self._sets = [(parameter, k) for parameter in parameters for k in range(len(parameter.functions))]
        self.tau, self._seed = 1.0, 1.0
        self.centre: Sequence[np.ndarray] = [parameter.get(k) for parameter, k in self._sets]
        self.latest = Evaluation(float(J.functional), [np.zeros_like(c) for c in self.centre], 0.0)

    @property
    def controls(self):
        return self._J.controls

    @property
    def tape(self):
        """The tape on which J is recorded."""
        return self._J.tape

    def _read(self, functions: Sequence[fd.Function]) -> list[np.ndarray]:
        return [p.space_bases[k].read(function) for (p, k), function in zip(self._sets, functions)]

    def inner(self, c: Sequence[np.ndarray], d: Sequence[np.ndarray]) -> float:
        """(c, d) in the measure of label domain and time, for coefficients as in `centre`. Collective."""
        return sum(p.pair(k, c_k, d_k) for (p, k), c_k, d_k in zip(self._sets, c, d))

    def __call__(self, values) -> AdjFloat:
        values = Enlist(values)
        value = float(self._J(values))
        offset = [c - d for c, d in zip(self._read(values), self.centre)]
        self.latest = Evaluation(value, offset, self.inner(offset, offset))
        return AdjFloat(value + self.latest.square / (2 * self.tau))

    def derivative(self, adj_input=1.0, apply_riesz=False):
        self._seed = float(adj_input)
        return self._with_term(self._J.derivative(adj_input), self.latest.offset, self._seed, apply_riesz)

    def hessian(self, m_dot, hessian_input=None, evaluate_tlm=True, apply_riesz=False):
        # pyadjoint differentiates the latest derivative again, with its seed.
        actions = self._J.hessian(m_dot, hessian_input, evaluate_tlm)
        return self._with_term(actions, self._read(Enlist(m_dot)), self._seed, apply_riesz)

    def _with_term(self, functionals, coefficients: Sequence[np.ndarray], scale: float, apply_riesz: bool):
        """Functionals of J plus the proximal term, whose gradient is coefficients / tau."""
        functionals = Enlist(functionals)
        for (p, k), functional, c in zip(self._sets, functionals, coefficients):
            basis = p.space_bases[k]
            term = scale * p.time_basis.measures[k] / self.tau * basis.functional(c)
            basis.write(functional, basis.read(functional) + term)
        if apply_riesz:
            functionals = [control.riesz_map(functional) for control, functional in zip(self.controls, functionals)]
        return self.controls.delist(functionals)

    def tlm(self, m_dot):
        return self._J.tlm(m_dot) + self.inner(self.latest.offset, self._read(Enlist(m_dot))) / self.tau


class ProximalGroup:
    """Parameters that are minimised over together, and the TAO that does it.

    Parameters
    ----------
    name
        The name of the group.
    parameters
        The group.
    J, controls
        As for `ProximalFunctional`.
    solver_parameters, options_prefix
        TAO's options.
    given
        The names of the options that the user gave.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[Parameter],
        J: ReducedFunctional,
        controls: Sequence[Control],
        solver_parameters: dict,
        options_prefix: str | None,
        given: Iterable[str],
    ):
        self.name = name
        self.functional = ProximalFunctional(J, controls, parameters)
        self._sets = [(parameter, k) for parameter in parameters for k in range(len(parameter.functions))]
        self._bases = [parameter.space_bases[k] for parameter, k in self._sets]
        self._functions = [parameter.functions[k] for parameter, k in self._sets]
        self._minimiser = Minimiser(
            self.functional, self._functions, self._bases, solver_parameters,
            comm=self._bases[0].Y.comm, options_prefix=options_prefix, given=given,
        )  # fmt: skip

    def get(self) -> list[np.ndarray]:
        """The coefficients of the parameters, an array for each Function."""
        return [parameter.read(k) for parameter, k in self._sets]

    def set(self, coefficients: Sequence[np.ndarray]) -> None:
        """Give the parameters these coefficients, as from `get`."""
        for (parameter, k), c in zip(self._sets, coefficients):
            parameter.write(k, c)

    def square_from(self, coefficients: Sequence[np.ndarray]) -> float:
        """|x - coefficients|^2 for the present coefficients x. Collective."""
        offset = [c - d for c, d in zip(self.get(), coefficients)]
        return self.functional.inner(offset, offset)

    def put_back(self, coefficients: Sequence[np.ndarray]) -> None:
        """Give the parameters and the tape these coefficients, as from `get`. Collective."""
        self.set(coefficients)
        self.functional(self._functions)

    def minimise(self, tau: float, centre: Sequence[np.ndarray], accuracy: float) -> tuple[int, bool]:
        """Minimise from the centre. Returned are the number of TAO's iterations and whether it converged. Collective.

        Parameters, tape and `functional` are then at the result.
        """
        functional, iterations = self.functional, 0
        functional.tau, functional.centre = tau, centre
        self.set(centre)

        def watch(iteration: int, value: float, gradient_norm: float) -> None:
            nonlocal iterations
            iterations = iteration

        def accurate(norm: float) -> bool:
            return norm <= accuracy * np.sqrt(self.square_from(centre)) / tau

        end = self._minimiser.solve(watch, accurate)
        return iterations, end.converged
