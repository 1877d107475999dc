"""Terms that are functionals of a function on Y, written in UFL: total variation, and the user's own.

    int F(a) dy dt,        F(a) dy any form of UFL without arguments, of a and its gradients

a is the bias, the initial state (then added up over the samples), or a bias mu of the output on a label domain with a mesh.
The integral over y is UFL's, with its quadrature; that over t is lumped. Derivatives are UFL's, so they are exact.

    total variation, smoothed       F = (|grad a|^2 + epsilon^2)^(1/2) - epsilon
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import firedrake as fd
import numpy as np
import ufl
from firedrake.assemble import get_assembler
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives

from fem_resnet.arguments import choice, flag, function, number
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.learning.loss import checked_form
from fem_resnet.learning.regulariser import Regulariser
from fem_resnet.learning.term import Penalty, Term, checked_weights
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients, NodalValues, SpaceBasis, StateValues
from fem_resnet.ranks import together

__all__ = ["FieldTerm", "TotalVariation", "ufl_functional", "total_variation"]

#: Parameters that are functions on a label domain.
_FIELDS = ("bias", "mu", "initial")
_SMOOTH = ("bias", "initial")


class _OfField(Penalty):
    """A UFL functional of each function in time of a parameter."""

    def __init__(self, parameter: Parameter, density: Callable[[fd.Function], ufl.Form], name: str):
        self._tau, self._bases = parameter.time_basis.measures, parameter.space_bases
        made: dict[LabelSpace, _Forms] = {}
        for basis in self._bases:
            if not isinstance(basis, (NodalValues, BasisCoefficients, StateValues)) or basis.Y.numbers is not None:
                raise ValueError(
                    f"{name}: expected a function on a label domain with a mesh, got {parameter!r}; UFL has no other integrals"
                )
            if basis.Y not in made:
                made[basis.Y] = _Forms(basis.Y, density, name)
        self._forms = [made[basis.Y] for basis in self._bases]

    def value(self, c):
        return float(
            sum(
                tau * forms.value(a)
                for tau, basis, forms, c_k in zip(self._tau, self._bases, self._forms, c)
                for a in _columns(basis, c_k)
            )
        )

    def functionals(self, c):
        return [
            tau * _pull_back(basis, [forms.functional(a) for a in _columns(basis, c_k)])
            for tau, basis, forms, c_k in zip(self._tau, self._bases, self._forms, c)
        ]

    def actions(self, c, v):
        return [
            tau * _pull_back(basis, [forms.action(a, b) for a, b in zip(_columns(basis, c_k), _columns(basis, v_k))])
            for tau, basis, forms, c_k, v_k in zip(self._tau, self._bases, self._forms, c, v)
        ]


def _columns(basis: SpaceBasis, c: np.ndarray) -> list[np.ndarray]:
    """The functions that coefficients stand for, by their values at the nodes."""
    values = basis.expand(c)
    return [values] if values.ndim == 1 else list(values.T)


def _pull_back(basis: SpaceBasis, functionals: list[np.ndarray]) -> np.ndarray:
    return basis.pull_back(np.column_stack(functionals) if isinstance(basis, StateValues) else functionals[0])


class _Forms:
    """The functional of one function on a label domain, and its derivatives. All methods are collective."""

    def __init__(self, Y: LabelSpace, density: Callable[[fd.Function], ufl.Form], name: str):
        with stop_annotating():
            self._a, self._v = fd.Function(Y.V), fd.Function(Y.V)
            value = together(Y.comm, lambda: checked_form(name, density(self._a), "a**4 * dx"))
            functional = expand_derivatives(fd.derivative(value, self._a))
            action = expand_derivatives(fd.derivative(functional, self._a, self._v))
            # Assemblers keep what UFL makes of a form, which takes longer than to assemble it. None is zero.
            self._value, self._functional, self._action = (
                None if form.empty() else get_assembler(form) for form in (expand_derivatives(value), functional, action)
            )
        self._Y = Y

    def value(self, a: np.ndarray) -> float:
        with stop_annotating():
            self._Y.write(self._a, a)
            return 0.0 if self._value is None else float(self._value.assemble())

    def functional(self, a: np.ndarray) -> np.ndarray:
        return self._assembled(self._functional, a, np.zeros(self._Y.nodes))

    def action(self, a: np.ndarray, v: np.ndarray) -> np.ndarray:
        return self._assembled(self._action, a, v)

    def _assembled(self, assembler: Any, a: np.ndarray, v: np.ndarray) -> np.ndarray:
        if assembler is None:  # as of a functional that is linear
            return np.zeros(self._Y.nodes)
        with stop_annotating():
            self._Y.write(self._a, a)
            self._Y.write(self._v, v)
            return self._Y.values(assembler.assemble())[:, 0].copy()


@dataclass(frozen=True)
class FieldTerm(Term):
    """A functional of one parameter that the user writes in UFL; see `ufl_functional`.

    Attributes
    ----------
    density : callable
        From a Function to a form.
    of : str
        The parameter.
    convex : bool
        Whether the user says that it is convex.
    """

    density: Callable[[fd.Function], ufl.Form]
    of: str
    convex: bool

    def on(self, parameter: Parameter) -> Penalty | None:
        return _OfField(parameter, self.density, "density") if parameter.name == self.of else None


@dataclass(frozen=True)
class TotalVariation(Term):
    """The smoothed total variation of bias and initial state; see `total_variation`.

    Attributes
    ----------
    epsilon : float
        In the unit of the gradients.
    """

    epsilon: float

    def on(self, parameter: Parameter) -> Penalty | None:
        if parameter.name not in _SMOOTH:
            return None
        for basis in parameter.space_bases:
            if basis.Y.numbers is None and basis.Y.V.ufl_element() not in fd.H1:
                raise ValueError(
                    f"Y: expected continuous functions, whose total variation is an integral, got {basis.Y.V.ufl_element()}; "
                    f"use CG"
                )
        return _OfField(parameter, self._form, "total_variation")

    def _form(self, a: fd.Function) -> ufl.Form:
        # Of the degree of the squared gradient, whatever UFL guesses for a root.
        degree = max(2 * (a.function_space().ufl_element().embedded_superdegree - 1), 1)
        square = fd.inner(fd.grad(a), fd.grad(a))
        return square / (fd.sqrt(square + self.epsilon**2) + self.epsilon) * fd.dx(degree=degree)


def total_variation(weight: float, epsilon: float, **own: float) -> Regulariser:
    """The total variation of bias and initial state over the label domain, smoothed: few jumps in the place of slopes.

    It is the integral of (|grad a|^2 + epsilon^2)^(1/2) - epsilon over y and t, convex and smooth. Kernels and heads are left
    out. It needs a continuous space on a mesh.

    Parameters
    ----------
    weight
        lambda >= 0.
    epsilon
        epsilon > 0, in the unit of the gradients. Slopes far below it have a square, and far above it their modulus.
    **own
        Weights of single parameters in the place of lambda: bias, initial.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind.

    Examples
    --------
    >>> R = total_variation(1e-3, 1e-2)
    """
    term = TotalVariation(number("epsilon", epsilon, above=0))
    return Regulariser(((checked_weights(weight, own, _SMOOTH), term),), ("total_variation",))


def ufl_functional(
    weight: float, density: Callable[[fd.Function], ufl.Form], of: str = "bias", *, convex: bool = False
) -> Regulariser:
    """A functional of one parameter that is a function on the label domain, written in UFL and integrated over t.

    Parameters
    ----------
    weight
        lambda >= 0.
    density
        A function that takes a Function a of the label domain and returns a form without arguments: ``lambda a: a**4 * dx``.
        It is called once a recording, and need be twice differentiable.
    of
        The parameter: "bias", "initial" (added up over the samples), or "mu" of a head onto a label domain with a mesh.
    convex
        Whether the functional is convex. Gauss and Newton's operator takes convex ones only; nobody checks what you say.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind; where it is evaluated, if the density returns no such form.

    Examples
    --------
    >>> from firedrake import dx
    >>> R = ufl_functional(1e-2, lambda a: (a**2 - 1) ** 2 * dx)
    """
    function("density", density, "a function from a Function to a form of UFL")
    term = FieldTerm(density, choice("of", of, _FIELDS), flag("convex", convex))
    return Regulariser(((number("weight", weight, least=0), term),), ("ufl_functional",))
