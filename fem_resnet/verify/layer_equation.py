"""The equation of a layer, (2.8), as it is written, and a PETSc TS that steps it in f itself.

    f_t = sigma(a - Phi beta int Psi f),      f of shape (nodes, samples), t in [t_l, t_(l+1)].

The package steps coefficients of f where it can; here no step does. Implicit types are solved by products with the
Jacobian alone, so no matrix of size nodes x nodes occurs. With a running cost f has one more row: this rank's part of the
cost L of each sample, summed up over t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import petsctools
from petsc4py import PETSc

from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.verify.formulas import NotWrittenOut
from fem_resnet.verify.measure import Measure

__all__ = ["FieldTS", "LayerEquation"]

#: sigma' and l_f at the nodes; l_f is None without a running cost.
_Slope = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True, eq=False)
class LayerEquation:
    """f_t = sigma(a - B f) on one layer, or f_t = B^T sigma(a - B f), and the product with its Jacobian.

    Times are of the network; fields have the shape (nodes, samples), and with a running cost one row more.

    Attributes
    ----------
    sigma
        The activation.
    measure
        The measure of the label domain.
    phi, psi
        Values of the factors at the nodes, shape (nodes, rank).
    start, end
        t_l and t_(l+1).
    bias, beta
        a, shape (nodes,), and beta, shape (rank of phi, rank of psi), at a fraction in [0, 1] of the layer.
    gradient_flow
        Whether B^T stands before sigma.
    cost
        The running cost, if there is one.
    """

    sigma: Callable[[np.ndarray], np.ndarray]
    measure: Measure
    phi: np.ndarray
    psi: np.ndarray
    start: float
    end: float
    bias: Callable[[float], np.ndarray]
    beta: Callable[[float], np.ndarray]
    gradient_flow: bool
    cost: RunningCost | None

    def _fraction(self, t: float) -> float:
        return (t - self.start) / (self.end - self.start)

    def _fields(self, f: np.ndarray) -> np.ndarray:
        return f if self.cost is None else f[:-1]

    def _operator(self, t: float, f: np.ndarray) -> np.ndarray:
        """B f."""
        return self.phi @ (self.beta(self._fraction(t)) @ self.measure.integrals(self.psi, f))

    def _preactivation(self, t: float, f: np.ndarray) -> np.ndarray:
        return self.bias(self._fraction(t))[:, None] - self._operator(t, f)

    def _before_sigma(self, t: float, v: np.ndarray) -> np.ndarray:
        """B^T v for a gradient flow, else v."""
        if not self.gradient_flow:
            return v
        return self.psi @ (self.beta(self._fraction(t)).T @ self.measure.integrals(self.phi, v))

    def _density(self, cost: RunningCost, t: float, f: np.ndarray) -> np.ndarray:
        return np.broadcast_to(cost.density.value(f, self.bias(self._fraction(t))[:, None]), f.shape)

    def _pairs(self, cost: RunningCost, rows: np.ndarray) -> np.ndarray | float:
        """The integral of p(y, z, b(y, z)) over z at this rank's y, shape (nodes,), where b(y, .) = rows psi(.)."""
        if cost.pairs is None:
            return 0.0
        measure, y = self.measure, self.measure.Y.coordinates
        psi, z, w = (np.concatenate(measure.comm.allgather(part)) for part in (self.psi, y, measure.weights))
        p = cost.pairs.density.value(rows @ psi.T, y[:, None], z[None])
        return np.broadcast_to(p, (len(rows), len(w))) @ w

    def rate(self, t: float, f: np.ndarray) -> np.ndarray:
        """f_t, of the shape of f."""
        f = self._fields(f)
        s = self._before_sigma(t, self.sigma(self._preactivation(t, f)))
        if self.cost is None:
            return s
        # b at this rank's y and at all z: the integral of its square over z is a sum over i, j of int psi_i psi_j dz.
        rows, measure = self.phi @ self.beta(self._fraction(t)), self.measure
        squares = np.sum((rows @ measure.integrals(self.psi, self.psi)) * rows, axis=1)
        of_b = self.cost.kernel / 2 * squares + self._pairs(self.cost, rows)
        L = measure.weights @ (self._density(self.cost, t, f) + of_b[:, None])
        return np.vstack([s, L[None]])

    def slope(self, t: float, f: np.ndarray) -> _Slope:
        """sigma'(u) and l_f by differences, which is accurate enough for Newton's method."""
        f = self._fields(f)
        u = self._preactivation(t, f)
        slope = (self.sigma(u + 1e-6) - self.sigma(u - 1e-6)) / 2e-6
        if self.cost is None:
            return slope, None
        return slope, (self._density(self.cost, t, f + 1e-6) - self._density(self.cost, t, f - 1e-6)) / 2e-6

    def product(self, t: float, slope: _Slope, v: np.ndarray) -> np.ndarray:
        """The derivative of `rate` in the direction v, where `slope` was taken; of the shape of v."""
        sigma_slope, l_f = slope
        v = self._fields(v)
        ds = self._before_sigma(t, -sigma_slope * self._operator(t, v))
        return ds if l_f is None else np.vstack([ds, (self.measure.weights @ (l_f * v))[None]])


class _ResidualJacobian:
    """The derivative of the residual f_t - rate(f) at one point, as PETSc multiplies by it."""

    def __init__(self, equation: LayerEquation, t: float, f: np.ndarray, shift: float):
        self._equation, self._t, self._shift, self._shape = equation, t, shift, f.shape
        self._slope = equation.slope(t, f)
        self._scale = 1.0

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        product = self._equation.product(self._t, self._slope, x.array_r.reshape(self._shape))
        y.array_w[:] = self._scale * (self._shift * x.array_r - product.ravel())

    def scale(self, mat: PETSc.Mat, factor: float) -> None:
        self._scale *= factor


@dataclass(frozen=True)
class _Layer:
    """The layer that a TS steps, and the lengths of the steps."""

    equation: LayerEquation
    steps: list[float]


class FieldTS:
    """A TS of the network's type that steps f with given steps. Collective; `ts` is to be destroyed at the end.

    Parameters
    ----------
    parameters
        The network's options of PETSc.
    Y
        The label domain.
    shape
        The shape of f on this rank, with the row of a running cost.

    Raises
    ------
    NotWrittenOut
        If the steps of this type are not PETSc's own, or have no second form here.
    """

    def __init__(self, parameters: dict, Y: LabelSpace, shape: tuple[int, int]):
        self._shape = shape
        options = {name: value for name, value in parameters.items() if name.startswith("ts_") and "adapt" not in name}
        for name in ("ts_rtol", "ts_atol"):
            options.pop(name, None)
        options |= {
            "ts_adapt_type": "none", "snes_rtol": 1e-50, "snes_atol": 1e-15, "snes_stol": 1e-9, "ksp_type": "gmres",
            "ksp_gmres_restart": 100, "ksp_rtol": 1e-11, "ksp_atol": 1e-50, "pc_type": "none",
        }  # fmt: skip
        kind = options["ts_type"]
        if kind in ("irk", "glle", "discrete_gradient"):
            raise NotWrittenOut(f"the steps of {kind!r} are not made a second time")
        self.ts = ts = PETSc.TS().create(comm=Y.comm)
        self._y = PETSc.Vec().createMPI((int(np.prod(shape)), PETSc.DETERMINE), comm=Y.comm)
        size = self._y.getLocalSize(), self._y.getSize()
        if kind in ("rk", "euler", "ssp"):
            ts.setRHSFunction(self._rate, self._y.duplicate())
        else:
            ts.setIFunction(self._residual, self._y.duplicate())
            # Each Newton step puts a _ResidualJacobian into it; a Mat is set up with some object before.
            jacobian = PETSc.Mat().createPython((size, size), object(), comm=Y.comm)
            jacobian.setUp()
            ts.setIJacobian(self._set_jacobian, jacobian, jacobian)
            if kind == "arkimex":
                ts.setRHSFunction(lambda ts, t, y, F: F.set(0.0), self._y.duplicate())
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)  # type: ignore[arg-type]  # petsc4py types its constants int
        ts.setPreStep(self._set_step)
        manager = petsctools.OptionsManager(options, options_prefix=None, default_prefix="fem_resnet_verify_")
        ts.setOptionsPrefix(manager.options_prefix)
        with manager.inserted_options():
            ts.setFromOptions()
        self._manager = manager

    def solve(self, equation: LayerEquation, f: np.ndarray, steps: Sequence[float]) -> np.ndarray:
        """The state at the end of a layer, from f at its start, by the given steps in parts of the layer."""
        length = equation.end - equation.start
        layer = _Layer(equation, [length * step for step in steps])
        self._y.array_w[:] = f.ravel()
        ts = self.ts
        ts.setAppCtx(layer)
        ts.setTime(0.0)  # the time since t_l: a new dirk takes its first slope at time 0, wherever it starts
        ts.setMaxTime(length)
        ts.setMaxSteps(len(steps))
        ts.setStepNumber(0)
        ts.setTimeStep(layer.steps[0])
        ts.solve(self._y)
        return self._y.array_r.reshape(self._shape).copy()

    @staticmethod
    def _set_step(ts: PETSc.TS) -> None:
        steps = ts.getAppCtx().steps
        ts.setTimeStep(steps[min(ts.getStepNumber(), len(steps) - 1)])

    def _field(self, vec: PETSc.Vec) -> np.ndarray:
        return vec.array_r.reshape(self._shape)

    def _rate(self, ts: PETSc.TS, t: float, y: PETSc.Vec, F: PETSc.Vec) -> None:
        equation = ts.getAppCtx().equation
        F.array_w[:] = equation.rate(equation.start + t, self._field(y)).ravel()

    def _residual(self, ts: PETSc.TS, t: float, y: PETSc.Vec, y_t: PETSc.Vec, F: PETSc.Vec) -> None:
        equation = ts.getAppCtx().equation
        F.array_w[:] = y_t.array_r - equation.rate(equation.start + t, self._field(y)).ravel()

    def _set_jacobian(
        self, ts: PETSc.TS, t: float, y: PETSc.Vec, y_t: PETSc.Vec, shift: float, J: PETSc.Mat, P: PETSc.Mat
    ) -> None:
        equation = ts.getAppCtx().equation
        J.setPythonContext(_ResidualJacobian(equation, equation.start + t, self._field(y), shift))
