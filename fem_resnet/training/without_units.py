"""A functional as TAO sees it, in which nothing has a unit.

int a^2 dy grows with |Y|. int int b^2 dy dz does not, as b falls like 1 / |Y|. J has a unit of its own. But TAO adds
squares of both controls, and has absolute numbers: first radii, steps, the round-off of J. So TAO sees

    J / |J(start)|        with        sum_k |x_k|^2 / u_k,        u_k = `SpaceBasis.unit` of the control k.

A problem in other units then takes the same steps.

- If the gradient of J / |J(start)| is steep, the inner product is scaled: the first step of steepest descent promises to
  lower J by no more than 2 J(start). J >= 0 cannot fall further, and a longer step would leave the domain of J where that
  has an end, for example where layer times cross.
- TAO compares coefficients themselves in active sets, in curvatures, and in types without Riesz maps. So it sees x_k
  divided by `SpaceBasis.amplitude`, rounded to a power of two, so that no coefficient is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np
from pyadjoint import AdjFloat, Control
from pyadjoint.enlisting import Enlist
from pyadjoint.reduced_functional import AbstractReducedFunctional

from fem_resnet.ranks import watched

__all__ = ["WithoutUnits", "scaled"]


def scaled(function: fd.Function | fd.Cofunction, factor: float) -> fd.Function | fd.Cofunction:
    """A multiple of a Function or Cofunction; itself for the factor 1.

    The largest number, which means no bound, stays as it is.
    """
    if factor == 1.0:
        return function
    product, most = function._ad_copy(), np.finfo(float).max
    with np.errstate(over="ignore"):
        product.dat.data[...] = np.clip(function.dat.data_ro * factor, -most, most)
    return product


@dataclass
class _Scales:
    """The divisor of J, None before the first evaluation, and the factor of Riesz maps, None before the first gradient."""

    value: float | None = None
    share: float | None = None


class WithoutUnits(AbstractReducedFunctional):
    """J / |J(start)|, as a function of coefficients over amplitudes, with the Riesz maps of |x_k|^2 / u_k.

    Parameters
    ----------
    J
        The functional.
    amplitudes, units
        One positive number for each control.
    """

    def __init__(self, J: AbstractReducedFunctional, amplitudes: Sequence[float], units: Sequence[float]):
        self._J, self._amplitudes, self._scales = J, amplitudes, _Scales()
        self._controls = Enlist([self._in_units(*each) for each in zip(J.controls, amplitudes, units, strict=True)])

    def start(self, scale: float | None = None, share: float | None = None) -> None:
        """Take the next evaluation and the next derivative for the start, which scales all that follow.

        Parameters
        ----------
        scale, share
            Those of an earlier start, where a minimisation goes on.
        """
        self._scales = _Scales(scale, share)

    @property
    def scale(self) -> float:
        """|J(start)|, by which J is divided."""
        if self._scales.value is None:
            raise RuntimeError("scale: expected an evaluation of J before this, got none")
        return self._scales.value

    @property
    def share(self) -> float:
        """The factor of Riesz maps, 1 unless the first gradient was steep."""
        return 1.0 if self._scales.share is None else self._scales.share

    @property
    def controls(self):
        return self._controls

    @property
    def tape(self):
        """The tape on which J is recorded."""
        return self._J.tape

    def _in_units(self, control: Control, amplitude: float, unit: float) -> Control:
        """The same control, with the Riesz map of |amplitude x|^2 / unit."""

        def riesz_map(functional):
            gradient = control.control._ad_convert_riesz(functional, riesz_map=control.riesz_map)
            gradient.dat.data[...] *= self.share * unit / amplitude**2
            return gradient

        return Control(control.control, riesz_map=riesz_map)

    def _share_of(self, functionals: Sequence[fd.Cofunction]) -> float:
        """The factor of Riesz maps for this first derivative."""
        steepness = 0.0
        for control, functional in zip(self._controls, functionals):
            comm = watched(control.control.function_space().mesh().comm)
            steepness += comm.allreduce(float(np.sum(functional.dat.data_ro * control.riesz_map(functional).dat.data_ro)))
        return 2 / max(2.0, steepness)

    def _multiplied(self, functions) -> list:
        return [scaled(function, amplitude) for function, amplitude in zip(Enlist(functions), self._amplitudes)]

    def _in_amplitudes(self, functionals, apply_riesz: bool):
        """Functionals in the coefficients over amplitudes, or their gradients."""
        functionals = self._multiplied(functionals)
        if apply_riesz:
            functionals = [control.riesz_map(functional) for control, functional in zip(self._controls, functionals)]
        return self._controls.delist(functionals)

    def __call__(self, values) -> AdjFloat:
        value = float(self._J(self._multiplied(values)))
        if self._scales.value is None:
            if not np.isfinite(value):
                raise ArithmeticError(f"J is {value} at the start; begin with other parameters, or scale the data")
            self._scales.value = abs(value) or 1.0
        return AdjFloat(value / self.scale)

    def derivative(self, adj_input=1.0, apply_riesz=False):
        functionals = self._J.derivative(adj_input / self.scale)
        if self._scales.share is None:
            self._scales.share = self._share_of(self._multiplied(functionals))
        return self._in_amplitudes(functionals, apply_riesz)

    def hessian(self, m_dot, hessian_input=None, evaluate_tlm=True, apply_riesz=False):
        # pyadjoint differentiates the latest derivative again, whose seed was divided already.
        directions = self._multiplied(m_dot)
        actions = self._J.hessian(directions, hessian_input=hessian_input, evaluate_tlm=evaluate_tlm)
        return self._in_amplitudes(actions, apply_riesz)

    def tlm(self, m_dot):
        return self._J.tlm(self._multiplied(m_dot)) / self.scale
