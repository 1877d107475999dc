"""The time stepping methods that a layer may have, and what each gives: an adjoint, and the weights by which f follows.

With fixed steps, a method whose weights b_i and stage values PETSc gives away steps g alone, and f follows by the quadrature
(3.3) of the method. Any other method steps f too: `state`. One method is not PETSc's but the package's own:
"discrete_gradient" (`discrete_gradient`), energy-stable at any step size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from petsc4py import PETSc

from fem_resnet.petsc import rk_tableau

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A type of PETSc's TS, or the package's own.

    Attributes
    ----------
    implicit : bool
        Whether it solves with the Jacobian.
    quadrature : callable or None
        ``quadrature(ts)`` returns the weights b_i and the nodes c_i of the stages; None if PETSc does not give them away.
    matrix : callable or None
        ``matrix(ts)`` returns a_ij, which with the weights makes it a Runge-Kutta method; None as for `quadrature`.
    instead : str or None
        For a type for which PETSc has no adjoint, the nearest type for which it has one; None for a type with an adjoint.
    partitioned : bool
        Whether it splits the right-hand side, so that the explicit part, which is zero here, must be there.
    stages_by_call : bool
        Whether its stages are known only as the last arguments of the implicit function.
    overruns : bool
        Whether it goes on with a step of length 0 if a step happens to end at the end of the layer.
    solves_for_first_slope : bool
        Whether it solves for the slope at its start before the first stage. PETSc then passes on the time of the latest stage
        of any solve.
    estimate : str or None
        How PETSc estimates the error of a step: "tableau" by an embedded method, which some tableaus have; "values" by
        differences of the values at the ends of steps; None not at all, so that steps cannot be adapted.
    judges_first_step : bool
        Whether there is an estimate for the first step too.
    to_adapt : str
        The option to give for adapted steps, where there is no estimate.
    """

    implicit: bool
    quadrature: Callable[[PETSc.TS], tuple[np.ndarray, np.ndarray]] | None = None
    matrix: Callable[[PETSc.TS], np.ndarray] | None = None
    instead: str | None = None
    partitioned: bool = False
    stages_by_call: bool = False
    overruns: bool = False
    solves_for_first_slope: bool = False
    estimate: str | None = None
    judges_first_step: bool = True
    to_adapt: str = "'ts_type': 'dirk'"


def _runge_kutta(ts: PETSc.TS) -> tuple[np.ndarray, np.ndarray]:
    _, b, c = rk_tableau(ts)
    return b, c


def _runge_kutta_matrix(ts: PETSc.TS) -> np.ndarray:
    return rk_tableau(ts)[0]


def _theta(ts: PETSc.TS) -> tuple[np.ndarray, np.ndarray]:
    theta = ts.getTheta()
    # PETSc treats theta = 1, backward Euler, as a method of two stages too, at the start and the end of the step.
    if ts.getThetaEndpoint() or theta == 1.0:
        return np.array([1 - theta, theta]), np.array([0.0, 1.0])
    return np.ones(1), np.array([theta])


def _theta_matrix(ts: PETSc.TS) -> np.ndarray:
    b, _ = _theta(ts)
    return np.array([[0.0, 0.0], b]) if len(b) == 2 else np.array([[ts.getTheta()]])


def _gauss(ts: PETSc.TS) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(PETSc.Options(ts.getOptionsPrefix()).getInt("ts_irk_nstages", 3))
    return weights / 2, (nodes + 1) / 2


def _gauss_matrix(ts: PETSc.TS) -> np.ndarray:
    """Collocation: a_ij is the integral from 0 to node i of the polynomial that is 1 at node j and 0 at the other nodes."""
    _, c = _gauss(ts)
    powers = np.arange(len(c))
    return np.linalg.solve((c[:, None] ** powers).T, (c[:, None] ** (powers + 1) / (powers + 1)).T).T


#: The methods, by the name that they have as a `ts_type`.
METHODS = {
    "rk": Method(False, _runge_kutta, _runge_kutta_matrix, estimate="tableau", to_adapt="'ts_rk_type': '5dp'"),
    "theta": Method(True, _theta, _theta_matrix, estimate="values", judges_first_step=False),
    "beuler": Method(True, _theta, _theta_matrix, estimate="values", judges_first_step=False),
    "cn": Method(True, _theta, _theta_matrix, estimate="values", judges_first_step=False),
    "arkimex": Method(True, partitioned=True, estimate="tableau", to_adapt="'ts_arkimex_type': '3'"),
    "dirk": Method(True, solves_for_first_slope=True, estimate="tableau", to_adapt="'ts_dirk_type': 'es213sal'"),
    "irk": Method(True, _gauss, _gauss_matrix, instead="'theta', the implicit midpoint rule, or 'dirk'", stages_by_call=True),
    "euler": Method(False, instead="'rk' with 'ts_rk_type': '1fe'", to_adapt="'ts_type': 'rk'"),
    "ssp": Method(False, instead="'rk' with 'ts_rk_type': '3'", to_adapt="'ts_type': 'rk'"),
    "rosw": Method(True, instead="'arkimex'", estimate="tableau", to_adapt="'ts_rosw_type': 'ra34pw2'"),
    "bdf": Method(True, instead="'cn'", estimate="values"),
    "alpha": Method(True, instead="'theta'", estimate="values"),
    "glle": Method(True, instead="'dirk'", overruns=True),
    "discrete_gradient": Method(True),
}
