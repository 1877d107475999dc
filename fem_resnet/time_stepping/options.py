"""PETSc's options of a layer: which options a layer may have, and how they are read.

A layer starts and ends at its times. It takes the steps that it is given, or adapts steps so that the estimated error of each
is below the tolerances. An option that would change this in silence is refused, wherever it comes from: a dictionary, the
options database, the command line. `OPTIONS` says for each option when a layer may have it; an option that is not in the table
is refused too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import petsctools
from petsc4py import PETSc

from fem_resnet.options import checked_options, checked_prefix, petsc_refusals, refuse_unread, unread
from fem_resnet.petsc import adapt_type
from fem_resnet.time_stepping.methods import METHODS

__all__ = [
    "ADAPTIONS", "OPTIONS", "TimeOption", "configure", "in_force", "refuse_time_options", "set_from_options", "solver_options",
]  # fmt: skip

#: The rules by which steps are adapted: a step is accepted if its estimated error is below the tolerances.
ADAPTIONS = ("basic", "dsp")


_Rule = Callable[[str, Mapping[str, str]], bool]


@dataclass(frozen=True)
class TimeOption:
    """When a layer may have an option.

    Attributes
    ----------
    allowed : callable
        ``allowed(value, options)``: whether a layer may have the option with this value, given all options, as text.
    says : str
        For other values, what is wrong and what to do: the rest of a sentence that begins with option and value.
    """

    allowed: _Rule
    says: str


def _always(value: str, options: Mapping[str, str]) -> bool:
    return True


def _never(value: str, options: Mapping[str, str]) -> bool:
    return False


def _if_adapted(value: str, options: Mapping[str, str]) -> bool:
    return options.get("ts_adapt_type", "none") != "none"


def _one_of(*values: str) -> _Rule:
    return lambda value, options: value.lower() in values


def _of_type(*names: str) -> _Rule:
    return lambda value, options: options.get("ts_type") in names


def _fraction(value: str, options: Mapping[str, str]) -> bool:
    try:
        return 0.0 < float(value) <= 1.0
    except ValueError:
        return False


def _finds_its_jacobian(value: str, options: Mapping[str, str]) -> bool:
    return value not in _EXPLICIT_BETWEEN or options.get("ts_rosw_recompute_jacobian", "false").lower() not in _FALSE


def _all(names: Iterable[str], allowed: _Rule, says: str = "") -> dict[str, TimeOption]:
    return dict.fromkeys(names, TimeOption(allowed, says))


_BY_LAYERS = (
    "would change start, end or steps, which follow from the layers; give the network layer times and a number of steps a "
    "layer instead"
)
_NO_SPLIT = "needs slow and fast unknowns, which a layer does not have"
_FALSE = ("false", "no", "0", "off")
#: Tableaus of rosw with an explicit stage before an implicit one, which would reuse the Jacobian of the explicit stage.
_EXPLICIT_BETWEEN = ("ark3", "lassp3p4s2c", "llssp3p4s2c")

#: The options by name. PETSc itself refuses an option that the type does not have.
OPTIONS: dict[str, TimeOption] = {
    **_all(
        (
            "ts_max_time", "ts_final_time", "ts_init_time", "ts_time_step", "ts_dt", "ts_time_span", "ts_eval_times",
            "ts_run_steps",
        ),
        _never, _BY_LAYERS,
    ),
    "ts_max_steps": TimeOption(_if_adapted, _BY_LAYERS),  # a limit, at which the solve fails
    "ts_exact_final_time": TimeOption(_one_of("matchstep"), "would end a layer elsewhere than at its end; drop it"),
    "ts_type": TimeOption(_always, ""),
    "ts_adapt_type": TimeOption(
        _one_of("none", *ADAPTIONS), "is no rule for steps that a layer can have; take 'none', 'basic' or 'dsp'"
    ),
    # Options of adapted steps.
    **_all(
        (
            "ts_rtol", "ts_atol", "ts_adapt_safety", "ts_adapt_reject_safety", "ts_adapt_clip", "ts_adapt_wnormtype",
            "ts_adapt_scale_solve_failed", "ts_adapt_time_step_increase_delay", "ts_adapt_dsp_filter",
            "ts_max_step_rejections", "ts_max_reject", "ts_max_snes_failures",
        ),
        _if_adapted, "has no effect on fixed steps; give 'ts_adapt_type': 'basic' too, or drop it",
    ),
    "ts_adapt_dt_min": TimeOption(
        _never, "would accept steps of that length whatever their error; drop it: 'ts_max_steps' bounds the work"
    ),
    "ts_adapt_dt_max": TimeOption(
        _never, "would be a fraction of a layer, as TS steps a layer from 0 to 1; give smaller tolerances or more layers"
    ),
    "ts_adapt_always_accept": TimeOption(_one_of(*_FALSE), "would accept steps whatever their error; drop it"),
    "ts_adapt_max_ignore": TimeOption(_never, "would ignore the error in small values of f; give 'ts_atol' instead"),
    "ts_adapt_glee_use_local": TimeOption(_never, "needs a method that estimates its global error; drop it"),
    **_all(
        ("ts_adapt_dsp_pid", "ts_adapt_dsp_kbeta", "ts_adapt_dsp_alpha"),
        _never, "may accept steps whatever their error; give 'ts_adapt_dsp_filter' instead",
    ),
    # Options of the types.
    **_all(
        ("ts_rk_multirate", "ts_rk_dtratio", "ts_use_splitrhsfunction", "ts_arkimex_fastslowsplit"),
        _never, f"{_NO_SPLIT}; drop it",
    ),
    "ts_theta_theta": TimeOption(
        lambda value, options: _of_type("theta")(value, options) and _fraction(value, options),
        "must be a number in (0, 1] and belongs to 'ts_type': 'theta' alone",
    ),
    "ts_theta_endpoint": TimeOption(_of_type("theta"), "belongs to 'ts_type': 'theta' alone"),
    "ts_arkimex_fully_implicit": TimeOption(_never, "needs an assembled matrix; take 'ts_type': 'dirk'"),
    "ts_rosw_type": TimeOption(
        _finds_its_jacobian, "mixes explicit and implicit stages; give 'ts_rosw_recompute_jacobian': True too"
    ),
    "ts_bdf_order": TimeOption(
        lambda value, options: value != "1" or not _if_adapted(value, options),
        "has a first step whose error PETSc does not estimate; take 'ts_type': 'beuler', or fixed steps",
    ),
    **_all(
        (
            "ts_rk_type", "ts_theta_initial_guess_extrapolate", "ts_arkimex_type", "ts_arkimex_initial_guess_extrapolate",
            "ts_dirk_type", "ts_irk_type", "ts_irk_nstages", "ts_ssp_type", "ts_ssp_num_stages", "ts_rosw_recompute_jacobian",
            "ts_bdf_initial_guess_extrapolate", "ts_alpha_radius", "ts_alpha_alpha_m", "ts_alpha_alpha_f", "ts_alpha_gamma",
            "ts_gl_type", "ts_gl_complete", "ts_gl_error_direction", "ts_gl_extrapolate", "ts_gl_max_order",
            "ts_gl_min_order", "ts_gl_start_order", "ts_gl_accept_type", "ts_gl_max_step_rejections", "ts_gl_rtol",
            "ts_gl_atol",
        ),
        _always,
    ),
    # Options of output, and of how a failure is reported.
    **_all(("ts_adapt_monitor", "ts_error_if_step_fails", "ts_view", "ts_view_pre", "ts_view_solution"), _always),
    **_all(
        ("ts_save_trajectory", "ts_trajectory_type"),
        _never, "has no effect: a layer keeps its trajectory in memory; drop it",
    ),
}  # fmt: skip

#: What is wrong with single values, and what to do.
_VALUES = {
    ("ts_adapt_type", "cfl"): "needs a bound by Courant, Friedrichs and Lewy, which a layer does not have; take 'basic'",
    ("ts_adapt_type", "glee"): "needs a method that estimates its global error; take 'basic'",
    ("ts_adapt_type", "history"): "needs a history of steps; recorded runs replay their own steps, take 'basic'",
}


def in_force(prefix: str) -> dict[str, str]:
    """The options that a PETSc object with this prefix would read now: names without the prefix, and values as text."""
    every = PETSc.Options().getAll().items()
    return {name.removeprefix(prefix): value or "" for name, value in every if name.startswith(prefix)}


def refuse_time_options(options: Mapping[str, str]) -> None:
    """Refuse options of a TS that a layer cannot have.

    Parameters
    ----------
    options
        The options in force. Names that do not begin with "ts_" are not looked at.

    Raises
    ------
    ValueError
        If a layer cannot have one; the message names the option, its value and what to do.
    """
    for name, value in options.items():
        if not name.startswith("ts_") or name.startswith("ts_monitor"):
            continue
        given = f"solver_parameters: {name!r} {value!r}" if value else f"solver_parameters: {name!r}"
        if name not in OPTIONS:
            raise ValueError(f"{given} is no option that a layer is known to take; drop it")
        if not OPTIONS[name].allowed(value, options):
            raise ValueError(f"{given} {_VALUES.get((name, value), OPTIONS[name].says)}")


#: The defaults. A network has a fixed depth, so steps are not adapted.
_DEFAULTS = {"ts_type": "rk", "ts_adapt_type": "none"}
#: Newton's method stops when its step is below 1e-8 of the state; the error is then about the square of that. The adjoint, and
#: the quadrature by which f follows, rely on stages that are solved to round-off.
_NEWTON = {"snes_rtol": 1e-50, "snes_atol": 1e-15, "snes_stol": 1e-8}
_BY_TYPE = {"rk": {"ts_rk_type": "4"}} | {name: _NEWTON for name, method in METHODS.items() if method.implicit}
_BY_TYPE["rosw"] = {}  # it solves linear systems only


def solver_options(parameters: Mapping | None, prefix: str | None) -> petsctools.OptionsManager:
    """Options of a layer's TS: the user's options, and defaults of the type that these name.

    Parameters
    ----------
    parameters
        PETSc options; {} for Runge-Kutta of order 4 with fixed steps.
    prefix
        Prefix of these options, with which they may also come from the command line; a new prefix if left out.

    Raises
    ------
    TypeError, ValueError
        If they are not options or the prefix is not one, or the type is none of `METHODS`.
    """
    given, prefix = checked_options(parameters), checked_prefix(prefix)
    # Options in the database with this prefix override the given ones, and decide on defaults too.
    known = _DEFAULTS | (given if prefix is None else petsctools.OptionsManager(given, options_prefix=prefix).parameters)
    name = known["ts_type"]
    if name == "mprk":
        raise ValueError(f"solver_parameters: 'ts_type' 'mprk' {_NO_SPLIT}; take 'rk'")
    if name not in METHODS:
        raise ValueError(f"solver_parameters: 'ts_type' is {name!r}; a layer is stepped by {', '.join(METHODS)}")
    defaults = _DEFAULTS | _BY_TYPE.get(name, {})
    if name == "rk" and known["ts_adapt_type"] != "none":
        defaults["ts_rk_type"] = "5dp"  # the classical method has no estimate of its error
    return petsctools.OptionsManager(defaults | given, options_prefix=prefix, default_prefix="fem_resnet_")


def set_from_options(ts: PETSc.TS | PETSc.SNES, options: petsctools.OptionsManager, read: tuple[str, ...] = ()) -> list[str]:
    """Let PETSc read the options of a layer's TS, or of a SNES.

    Parameters
    ----------
    ts
        The TS or the SNES.
    options
        From `solver_options`.
    read
        Options that the layer itself has read.

    Returns
    -------
    list of str
        The options that neither PETSc nor the layer has read.

    Raises
    ------
    ValueError
        If PETSc does not know the value of an option, or a layer cannot have an option.
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


def configure(ts: PETSc.TS, options: petsctools.OptionsManager, read: tuple[str, ...]) -> None:
    """Let PETSc read the options of a layer's TS, and refuse those that nothing reads.

    Parameters
    ----------
    ts
        The TS.
    options
        From `solver_options`.
    read
        Options that the layer itself has read.

    Raises
    ------
    ValueError
        As of `set_from_options`, or if nothing reads an option.
    """
    unused = set_from_options(ts, options, read)
    if not METHODS[options.parameters["ts_type"]].implicit:  # PETSc reads these without using them
        unused += [name for name in options.parameters if name.startswith(("snes_", "ksp_", "pc_")) and name not in unused]
    refuse_unread(unused, f"a TS of type {ts.getType()!r} with adaptivity {adapt_type(ts)!r}")


def _refuse_without_estimate(options: dict[str, str]) -> None:
    """Refuse to adapt steps if PETSc does not estimate their errors: it would accept all steps, or fail."""
    name, rule = options["ts_type"], options.get("ts_adapt_type", "none")
    method, option = METHODS[name], f"ts_{name}_type"
    if rule == "none" or method.estimate == "values":
        return
    if method.estimate == "tableau" and _has_estimate(name, option, options.get(option)):
        return
    what = f"{name!r} with {option!r} {options[option]!r}" if method.estimate else repr(name)
    raise ValueError(
        f"solver_parameters: 'ts_adapt_type' {rule!r} needs an estimate of the error of a step, which 'ts_type' {what} does "
        f"not have; take {method.to_adapt}, or fixed steps"
    )


def _has_estimate(name: str, option: str, tableau: str | None) -> bool:
    """Whether a tableau has an embedded method, for which PETSc adapts the steps by default."""
    probe = PETSc.TS().create(comm=PETSc.COMM_SELF)
    chosen = {} if tableau is None else {option: tableau}
    options = petsctools.OptionsManager({"ts_type": name} | chosen, None, "fem_resnet_probe_")
    with options.inserted_options():
        _read(probe, options)
    adapts = adapt_type(probe) != "none"
    probe.destroy()
    return adapts
