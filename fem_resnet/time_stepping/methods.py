"""What time stepping methods give a layer: an adjoint, and the weights by which f follows from the stages.

With fixed steps a method whose weights b_i and stage values are to be had steps the coefficients g alone, and f follows by
its own quadrature (3.3). Any other carries f in its state: `layer_state`. One type is not PETSc's but the package's own:
"discrete_gradient" (`discrete_gradient`), energy-stable at any step size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import petsctools
from petsc4py import PETSc

from fem_resnet.options import checked_options, checked_prefix, petsc_refusals, refuse_unread, unread
from fem_resnet.time_stepping.options import in_force, refuse_time_options
from fem_resnet.time_stepping.petsc import adapt_type, rk_tableau

__all__ = ["DEFAULTS", "METHODS", "Method", "configure", "set_from_options", "solver_options", "tableau"]


@dataclass(frozen=True)
class Method:
    """A type of PETSc's TS, or the package's own.

    Attributes
    ----------
    implicit : bool
        Whether it solves with the Jacobian.
    quadrature : callable or None
        ``quadrature(ts)`` returns the weights b_i and nodes c_i of its stages; None where PETSc does not give them away.
    matrix : callable or None
        ``matrix(ts)`` returns a_ij, with which and the weights it is a Runge-Kutta method; None as above.
    instead : str or None
        For a type that PETSc cannot adjoin, the nearest that it can; None for one that has an adjoint.
    partitioned : bool
        Whether it splits the right-hand side, so that the explicit part, which is zero here, must be there.
    stages_by_call : bool
        Whether its stages are known only as the last arguments of the implicit function.
    overruns : bool
        Whether it goes on, with a step of length 0, when a step happens to end at the end.
    solves_for_first_slope : bool
        Whether it solves for the slope at its start before the first stage; PETSc then hands over the time of the stage
        that was solved for last, be it another solve's.
    estimate : str or None
        By what PETSc estimates the error of a step: "tableau", by an embedded method, which some tableaus have; "values", by
        differences of the values at the ends of steps; None, not at all, so that steps cannot be adapted.
    judges_first_step : bool
        Whether there is an estimate for the first step too.
    to_adapt : str
        What to take where there is no estimate.
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
    # PETSc takes theta = 1, backward Euler, for a method of two stages, start and end of the step, too.
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
    """Collocation: a_ij integrates what is 1 at node j and 0 at the others from 0 to node i."""
    _, c = _gauss(ts)
    powers = np.arange(len(c))
    return np.linalg.solve((c[:, None] ** powers).T, (c[:, None] ** (powers + 1) / (powers + 1)).T).T


#: By the name that `ts_type` has.
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

#: Options where the user gives none. A network has a fixed depth: no adaptivity.
DEFAULTS = {"ts_type": "rk", "ts_adapt_type": "none"}
#: The stages are solved to round-off: Newton's last step is below 1e-8 of the state, and what is left its square. That
#: is what the adjoint, and the quadrature by which f follows, take for granted.
_NEWTON = {"snes_rtol": 1e-50, "snes_atol": 1e-15, "snes_stol": 1e-8}
_BY_TYPE = {"rk": {"ts_rk_type": "4"}} | {name: _NEWTON for name, method in METHODS.items() if method.implicit}
_BY_TYPE["rosw"] = {}  # solves linear systems only


def solver_options(parameters: dict | None, prefix: str | None) -> petsctools.OptionsManager:
    """Options of a layer's TS: the user's over the defaults of the type that they name.

    Parameters
    ----------
    parameters
        PETSc options; {} for Runge-Kutta of order 4 with fixed steps.
    prefix
        Prefix of these options, by which they come from the command line too; one of its own if left out.

    Raises
    ------
    TypeError, ValueError
        If they are no options and no prefix, or the type is none of `METHODS`.
    """
    given, prefix = checked_options(parameters), checked_prefix(prefix)
    # What the database has for the prefix goes before what is given, and decides on defaults too.
    known = DEFAULTS | (given if prefix is None else petsctools.OptionsManager(given, options_prefix=prefix).parameters)
    name = known["ts_type"]
    if name == "mprk":
        raise ValueError("solver_parameters: 'ts_type' 'mprk' wants slow and fast unknowns, which a layer has not; take 'rk'")
    if name not in METHODS:
        raise ValueError(f"solver_parameters: 'ts_type' is {name!r}; a layer is stepped by {', '.join(METHODS)}")
    defaults = DEFAULTS | _BY_TYPE.get(name, {})
    if name == "rk" and known["ts_adapt_type"] != "none":
        defaults["ts_rk_type"] = "5dp"  # the classical method has no estimate of its error
    return petsctools.OptionsManager(defaults | given, options_prefix=prefix, default_prefix="fem_resnet_")


def set_from_options(ts: PETSc.TS | PETSc.SNES, options: petsctools.OptionsManager, read: tuple[str, ...] = ()) -> list[str]:
    """Let PETSc read the options of a layer's TS, or of a SNES; returns those that it did not ask for, but for those in `read`.

    Raises
    ------
    ValueError
        If PETSc does not know a name that an option has, or a layer cannot have an option of a TS.
    """
    with options.inserted_options():
        if isinstance(ts, PETSc.TS):
            known = in_force(options.options_prefix)
            refuse_time_options(known)
            _refuse_without_estimate(known)
        _read(ts, options)
        return unread(options, (name for name in options.parameters if name not in read))


def _read(ts: PETSc.TS | PETSc.SNES, options: petsctools.OptionsManager) -> None:
    ts.setOptionsPrefix(options.options_prefix)
    with petsc_refusals(options.parameters):
        ts.setFromOptions()


def tableau(options: petsctools.OptionsManager) -> tuple[np.ndarray, np.ndarray] | None:
    """Matrix a_ij and weights b_i of the Runge-Kutta method that the options name.

    None if it is none, or PETSc does not give its coefficients away.
    """
    method = METHODS[options.parameters["ts_type"]]
    if method.matrix is None:
        return None
    ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
    set_from_options(ts, options)
    with options.inserted_options():
        found = method.matrix(ts), method.quadrature(ts)[0]
    ts.destroy()
    return found


def configure(ts: PETSc.TS, options: petsctools.OptionsManager, read: tuple[str, ...]) -> None:
    """Let PETSc read the options of a layer's TS, and refuse those that no layer can have.

    Parameters
    ----------
    ts
        The TS.
    options
        See `solver_options`.
    read
        Options that the layer itself has read.
    """
    unused = set_from_options(ts, options, read)
    if not METHODS[options.parameters["ts_type"]].implicit:  # PETSc reads them all the same
        unused += [name for name in options.parameters if name.startswith(("snes_", "ksp_", "pc_")) and name not in unused]
    refuse_unread(unused, f"a TS of type {ts.getType()!r} with adaptivity {adapt_type(ts)!r}")


def _refuse_without_estimate(options: dict[str, str]) -> None:
    """Refuse to adapt steps whose errors PETSc does not estimate: it would take them all, or end in an error of its own."""
    name, rule = options["ts_type"], options.get("ts_adapt_type", "none")
    method, option = METHODS[name], f"ts_{name}_type"
    if rule == "none" or method.estimate == "values":
        return
    if method.estimate == "tableau" and _has_estimate(name, option, options.get(option)):
        return
    what = f"{name!r} with {option!r} {options[option]!r}" if method.estimate else repr(name)
    raise ValueError(
        f"solver_parameters: 'ts_adapt_type' {rule!r} wants an estimate of the error of a step, which 'ts_type' {what} has not; "
        f"take {method.to_adapt}, or fixed steps"
    )


def _has_estimate(name: str, option: str, tableau: str | None) -> bool:
    """Whether a tableau has an embedded method: where it has, PETSc adapts the steps if nobody says otherwise."""
    probe = PETSc.TS().create(comm=PETSc.COMM_SELF)
    chosen = {} if tableau is None else {option: tableau}
    options = petsctools.OptionsManager({"ts_type": name} | chosen, None, "fem_resnet_probe_")
    with options.inserted_options():
        _read(probe, options)
    adapts = adapt_type(probe) != "none"
    probe.destroy()
    return adapts
