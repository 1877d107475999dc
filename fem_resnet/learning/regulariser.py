"""Regularisers: sums of weighted terms, which are functionals of the parameters.

These are quadratic forms, 1/2 <m, A m>:

    Tikhonov         lambda/2 ( int |a|^2 dy dt + int |b|^2 dy dz dt + int |W|^2 dy dz + int |mu|^2 dy )     (2.11), (4.6)
    smooth in y      lambda/2 ( int |grad_y a|^2 dy dt + int |grad_y b|^2 + |grad_z b|^2 dy dz dt )
    smooth in t      lambda/2 sum_k ( ||a_(k+1) - a_k||^2 + ||b_(k+1) - b_k||^2 ) / d_k

d_k is the distance in t between neighbours: between the centres of layers, or of groups of layers, with a value each; between
layer times where controls are linear in t. So the last one is the integral of the squared derivative of the interpolant.
Integrals over t are lumped, as the Riesz maps are. The initial state f_I, where it is learned, has the first two without
the integral over t, added up over the samples.

The factor 1/2 makes (4.7) hold: the gradient of Tikhonov's functional in a is lambda a. (The paper prints Remark 4.2 without
it.) Sums of regularisers are regularisers, and so are their multiples ``lam * R``. Further terms stand in files of their own:

========================================  ==========================================  ====================  =================
term                                      parameters                                  quadratic, convex     needs
========================================  ==========================================  ====================  =================
`tikhonov`                                all                                         quadratic
`smooth_in_space`                         bias, kernel, initial                       quadratic             gradients
`smooth_in_time`                          bias, kernel                                quadratic
`locality.locality`                       kernel                                      quadratic             phi = psi
`pointwise_terms.smoothed_l1`             all                                         convex                fixed factors
`pointwise_terms.huber`                   all                                         convex                fixed factors
`field_terms.total_variation`             bias, initial                               convex                CG on a mesh
`field_terms.ufl_functional`              one of bias, initial, mu                    as you say            a mesh
========================================  ==========================================  ====================  =================

"All" are bias, kernel, W, mu, and the initial state where it is learned; learned factors are orthonormal and learned
times have a scale of their own, so no term takes these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
from pyadjoint import AdjFloat

from fem_resnet.arguments import function, instance, number, real_array
from fem_resnet.learning.term import Coefficients, Form, Term, Weights, checked_weights, scaled_weight, weight_on
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.time_basis import Once
from fem_resnet.ranks import may_fail_alone, together
from fem_resnet.tape.recording import apply

__all__ = ["PENALISED", "Regulariser", "smooth_in_space", "smooth_in_time", "tikhonov", "tikhonov_weight"]

#: The names of the parameters that regularisers take.
PENALISED = ("bias", "kernel", "V", "W", "mu", "initial")


@dataclass(frozen=True)
class Regulariser:
    """A sum of weighted terms. Get one from `tikhonov`, `smooth_in_space`, `huber` and their relatives; add them.

    A number >= 0 times a regulariser is one too.

    Attributes
    ----------
    terms : tuple of (float or Weights, callable or Term)
        Weights, which may differ between parameters, and terms. A term that is a function is a quadratic form, given by its
        functional A c.
    names : tuple of str
        Names of the terms, "" for none; `verify` knows a term by its name.

    Raises
    ------
    TypeError, ValueError
        If a term is not a pair of a weight >= 0 and a function, a name is not a string, or there are more names than terms.
    """

    terms: tuple[tuple[float | Weights, Form | Term], ...]
    names: tuple[str, ...] = ()

    def __post_init__(self):
        for term in instance("terms", self.terms, (tuple, list)):
            if not (isinstance(term, (tuple, list)) and len(term) == 2):
                raise TypeError(f"terms: expected pairs of a weight and a form, got {term!r}")
            if not isinstance(term[0], Weights):
                number("terms", term[0], least=0)
            if not isinstance(term[1], Term):
                function("terms", term[1], "a form, which is a function of a parameter and its coefficients,")
        for name in instance("names", self.names, (tuple, list)):
            instance("names", name, str)
        if len(self.names) > len(self.terms):
            raise ValueError(f"names: expected at most {len(self.terms)}, one a term, got {len(self.names)}")
        object.__setattr__(self, "terms", tuple(map(tuple, self.terms)))
        object.__setattr__(self, "names", tuple(self.names))

    def __add__(self, other: Regulariser) -> Regulariser:
        if not isinstance(other, Regulariser):
            return NotImplemented
        return Regulariser(self.terms + other.terms, self._all_names() + other._all_names())

    def __mul__(self, factor: float) -> Regulariser:
        if isinstance(factor, (bool, np.bool_)) or not isinstance(factor, Real):
            return NotImplemented
        factor = number("factor", factor, least=0)
        return Regulariser(tuple((scaled_weight(weight, factor), term) for weight, term in self.terms), self.names)

    __rmul__ = __mul__

    @property
    def quadratic(self) -> bool:
        """Whether all terms are quadratic forms."""
        return all(term.quadratic for _, term in self.terms if isinstance(term, Term))

    @property
    def convex(self) -> bool:
        """Whether all terms are convex in the coefficients; a form of your own is taken to be so."""
        return all(term.convex for _, term in self.terms if isinstance(term, Term))

    def functionals(self, parameter: Parameter, coefficients: Coefficients) -> list[np.ndarray]:
        """The derivative in the coefficients of one parameter: a functional of each of its functions in time. Collective.

        Parameters
        ----------
        parameter
            The parameter, as `LearningProblem.penalised` gives it.
        coefficients
            One array a function in time, of the shape that `Parameter.get` gives.

        Raises
        ------
        TypeError, ValueError
            If the parameter is none, the coefficients have another shape, or a term has no formula for the parameter.
        """
        instance("parameter", parameter, Parameter, "LearningProblem.penalised() gives them")
        instance("coefficients", coefficients, (list, tuple), "Parameter.get(k) gives each")
        shapes = [basis.shape for basis in parameter.space_bases]
        if [np.shape(c) for c in coefficients] != shapes:
            raise ValueError(f"coefficients: expected arrays of shape {shapes}, got {[np.shape(c) for c in coefficients]}")
        coefficients = [
            real_array("coefficients", c, comm=parameter.space_bases[k].Y.comm) for k, c in enumerate(coefficients)
        ]
        return _RegulariserOperator(self, [parameter]).adjoint(coefficients, 1.0)

    def _all_names(self) -> tuple[str, ...]:
        return (*self.names, *[""] * (len(self.terms) - len(self.names)))

    def __call__(self, parameters: Sequence[Parameter]) -> AdjFloat:
        """The value at these parameters, recorded while annotating. Collective.

        Raises
        ------
        TypeError
            If this is not a list of parameters.
        """
        for parameter in instance("parameters", parameters, (list, tuple), "LearningProblem.penalised() gives them"):
            instance("parameters", parameter, Parameter)
        functions = [function for parameter in parameters for function in parameter.functions]
        return apply(_RegulariserOperator(self, parameters), functions)[0]


class _RegulariserOperator:
    ready = True
    output = None

    def __init__(self, regulariser: Regulariser, parameters: Sequence[Parameter]):
        self._parameters = parameters
        self._forms = [(weight, term) for weight, term in regulariser.terms if not isinstance(term, Term)]
        self.inputs = [basis for parameter in parameters for basis in parameter.space_bases]
        #: Weight, penalty and place among the inputs of all that is no form.
        self._penalties = []
        start = 0
        for parameter in parameters:
            part = slice(start, start + len(parameter.space_bases))
            start = part.stop
            for weight, term in regulariser.terms:
                weight = weight_on(weight, parameter)
                penalty = term.on(parameter) if isinstance(term, Term) and weight > 0 and parameter.space_bases else None
                if penalty is not None:
                    self._penalties.append((weight, penalty, part))

    def forward(self, arrays, save):
        value = 0.0
        if self._forms:
            functionals = self._of_forms(arrays, 1.0)
            value = 0.5 * sum(slot.pair(d, c) for slot, d, c in zip(self.inputs, functionals, arrays))
        for weight, penalty, part in self._penalties:
            value += weight * penalty.value(arrays[part])
        return value

    def adjoint(self, arrays, dual):
        functionals = self._of_forms(arrays, dual)
        for weight, penalty, part in self._penalties:
            _add(functionals[part], dual * weight, penalty.functionals(arrays[part]))
        return functionals

    def _of_forms(self, arrays, dual):
        # What a form of the user's raises on one rank is raised on all.
        users = self.inputs and may_fail_alone(*(form for _, form in self._forms))
        return together(self.inputs[0].Y.comm if users else None, lambda: self._functionals(arrays, dual))

    def _functionals(self, arrays, dual):
        functionals, start = [], 0
        for parameter in self._parameters:
            coefficients = arrays[start : start + len(parameter.functions)]
            start += len(coefficients)
            total = [np.zeros(np.shape(c)) for c in coefficients]
            for weights, form in self._forms:
                weight = weight_on(weights, parameter)
                if weight == 0:
                    continue
                for sum_so_far, functional in zip(total, form(parameter, coefficients)):
                    if np.shape(functional) != sum_so_far.shape:
                        raise ValueError(
                            f"terms: expected a functional of shape {sum_so_far.shape} for {parameter.name}, got shape "
                            f"{np.shape(functional)} from {form}"
                        )
                    sum_so_far += dual * weight * functional
            functionals += total
        return functionals

    def tangent(self, arrays, directions):
        return sum(slot.pair(d, v) for slot, d, v in zip(self.inputs, self.adjoint(arrays, 1.0), directions))

    def second_adjoint(self, arrays, directions, dual, dual_dot):
        functionals = [a + b for a, b in zip(self._of_forms(arrays, dual_dot), self._of_forms(directions, dual))]
        for weight, penalty, part in self._penalties:
            if dual_dot != 0:  # it is 0 where R is a term of J alone
                _add(functionals[part], dual_dot * weight, penalty.functionals(arrays[part]))
            _add(functionals[part], dual * weight, penalty.actions(arrays[part], directions[part]))
        return functionals


def _add(totals: Sequence[np.ndarray], factor: float, functionals: Sequence[np.ndarray]) -> None:
    for sum_so_far, functional in zip(totals, functionals, strict=True):
        sum_so_far += factor * functional


def _mass(parameter, coefficients):
    return [
        tau * basis.functional(c) for tau, basis, c in zip(parameter.time_basis.measures, parameter.space_bases, coefficients)
    ]


def _stiffness(parameter, coefficients):
    if isinstance(parameter.time_basis, Once):
        return []  # a head: an output over classes has no gradient
    return [
        tau * basis.stiffness(c) for tau, basis, c in zip(parameter.time_basis.measures, parameter.space_bases, coefficients)
    ]


def _variation(parameter, coefficients):
    functionals = [np.zeros(np.shape(c)) for c in coefficients]
    for k, m, distance in parameter.time_basis.neighbours:
        basis = parameter.space_bases[k]
        if basis is not parameter.space_bases[m]:
            raise ValueError(
                f"smooth_in_time: {parameter.name}_{k} and {parameter.name}_{m}, which follow each other in time, have "
                f"different bases, so their coefficients cannot be subtracted; give both one basis"
            )
        step = basis.functional(coefficients[m] - coefficients[k]) / distance
        functionals[m] += step
        functionals[k] -= step
    return functionals


def tikhonov(weight: float, **own: float) -> Regulariser:
    """Tikhonov regularisation (2.11), (4.6) of all parameters, in the label measure.

    It has the factor 1/2, without which the paper prints Remark 4.2, and with which (4.7) holds.

    Parameters
    ----------
    weight
        lambda >= 0.
    **own
        Weights of single parameters in the place of lambda: bias, kernel, V, W, mu, initial.

    Raises
    ------
    TypeError, ValueError
        If a weight is not >= 0, or one of a parameter that the term does not take.

    Examples
    --------
    >>> R = tikhonov(1e-4, kernel=1e-3, W=0.0, mu=0.0)
    """
    return Regulariser(((checked_weights(weight, own, PENALISED), _mass),), ("tikhonov",))


def smooth_in_space(weight: float, **own: float) -> Regulariser:
    """Squared gradients of bias, kernel and initial state over the label domain (H1 seminorm); heads are left out.

    It needs continuous spaces or Laplace bases.

    Parameters
    ----------
    weight
        lambda >= 0.
    **own
        Weights of single parameters in the place of lambda: bias, kernel, initial.

    Raises
    ------
    TypeError, ValueError
        If a weight is not >= 0, or one of a parameter that the term does not take.
    """
    return Regulariser(((checked_weights(weight, own, ("bias", "kernel", "initial")), _stiffness),), ("smooth_in_space",))


def smooth_in_time(weight: float, **own: float) -> Regulariser:
    """Squared differences of bias and kernel between neighbours in time, divided by their distance.

    It is zero where all layers share one value.

    Parameters
    ----------
    weight
        lambda >= 0.
    **own
        Weights of single parameters in the place of lambda: bias, kernel.

    Raises
    ------
    TypeError, ValueError
        If a weight is not >= 0, or one of a parameter that the term does not take.
    """
    return Regulariser(((checked_weights(weight, own, ("bias", "kernel")), _variation),), ("smooth_in_time",))


def tikhonov_weight(regulariser: Regulariser | None, parameter: Parameter) -> float | None:
    """lambda where all terms that act on a parameter are Tikhonov's, 0 where none acts; None where another one does.

    Parameters
    ----------
    regulariser
        The regulariser, or None.
    parameter
        The parameter, of which the terms see `Parameter.acting`.
    """
    total = 0.0
    for weights, term in () if regulariser is None else regulariser.terms:
        weight = weight_on(weights, parameter)
        if weight == 0:
            continue
        if term is _mass:
            total += weight
        elif not isinstance(term, Term) or term.on(parameter.acting()) is not None:
            return None
    return total
