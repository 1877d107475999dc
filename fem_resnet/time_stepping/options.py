"""Which options of PETSc's TS a layer may have.

A layer starts and ends with its times. It takes the steps that it is given, or those that keep the estimated error of each
below the tolerances. What would change this in silence is refused, wherever it comes from: a dictionary, the options
database, the command line. `OPTIONS` says of each option when a layer may have it; options that are not in it are refused too.

What comes from a file is to run no code and to write no file: of it `refuse_in_file` takes names and values on a list alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from petsc4py import PETSc

__all__ = ["ADAPTIONS", "OPTIONS", "TimeOption", "in_force", "refuse_in_file", "refuse_time_options"]

#: The rules by which steps are adapted: a step is taken if its estimated error is below the tolerances.
ADAPTIONS = ("basic", "dsp")


_Rule = Callable[[str, Mapping[str, str]], bool]


@dataclass(frozen=True)
class TimeOption:
    """When a layer may have an option.

    Attributes
    ----------
    allowed : callable
        ``allowed(value, options)``: whether it may have this value among these options, all as text.
    says : str
        What is wrong with another, and what to do: a sentence of which option and value are the subject.
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
    "would change start, end or steps, which follow from the layers; give the network layer times and a number of steps a layer "
    "instead"
)
_SPLIT = "wants slow and fast unknowns, which a layer has not; drop it"
_FALSE = ("false", "no", "0", "off")
#: Tableaus of rosw with an explicit stage before an implicit one, which then finds the explicit one's Jacobian.
_EXPLICIT_BETWEEN = ("ark3", "lassp3p4s2c", "llssp3p4s2c")

#: By name. PETSc itself refuses those that the type does not have.
OPTIONS: dict[str, TimeOption] = {
    **_all(
        (
            "ts_max_time", "ts_final_time", "ts_init_time", "ts_time_step", "ts_dt", "ts_time_span", "ts_eval_times",
            "ts_run_steps",
        ),
        _never, _BY_LAYERS,
    ),
    "ts_max_steps": TimeOption(_if_adapted, _BY_LAYERS),  # a limit, which is an error if it is reached
    "ts_exact_final_time": TimeOption(_one_of("matchstep"), "would end a layer elsewhere than at its end; drop it"),
    "ts_type": TimeOption(_always, ""),
    "ts_adapt_type": TimeOption(_one_of("none", *ADAPTIONS), "is no rule for steps; take 'none', 'basic' or 'dsp'"),
    # Of adapted steps.
    **_all(
        (
            "ts_rtol", "ts_atol", "ts_adapt_safety", "ts_adapt_reject_safety", "ts_adapt_clip", "ts_adapt_wnormtype",
            "ts_adapt_scale_solve_failed", "ts_adapt_time_step_increase_delay", "ts_adapt_dsp_filter",
            "ts_max_step_rejections", "ts_max_reject", "ts_max_snes_failures",
        ),
        _if_adapted, "says nothing of fixed steps; give 'ts_adapt_type': 'basic' too, or drop it",
    ),
    "ts_adapt_dt_min": TimeOption(
        _never, "would let steps as short as that be taken whatever their error; drop it: 'ts_max_steps' bounds the work"
    ),
    "ts_adapt_dt_max": TimeOption(
        _never, "would count in parts of a layer, which TS steps from 0 to 1; give smaller tolerances or more layers instead"
    ),
    "ts_adapt_always_accept": TimeOption(_one_of(*_FALSE), "would let steps be taken whatever their error; drop it"),
    "ts_adapt_max_ignore": TimeOption(_never, "would leave small values of f unjudged; give 'ts_atol' instead"),
    "ts_adapt_glee_use_local": TimeOption(_never, "wants a method that estimates its global error; drop it"),
    **_all(
        ("ts_adapt_dsp_pid", "ts_adapt_dsp_kbeta", "ts_adapt_dsp_alpha"),
        _never, "may let steps be taken whatever their error; give 'ts_adapt_dsp_filter' instead",
    ),
    # Of the types.
    **_all(
        ("ts_rk_multirate", "ts_rk_dtratio", "ts_use_splitrhsfunction", "ts_arkimex_fastslowsplit"), _never, _SPLIT
    ),
    "ts_theta_theta": TimeOption(
        lambda value, options: _of_type("theta")(value, options) and _fraction(value, options),
        "is to be a number in (0, 1], and goes with 'ts_type': 'theta' alone",
    ),
    "ts_theta_endpoint": TimeOption(_of_type("theta"), "goes with 'ts_type': 'theta' alone"),
    "ts_arkimex_fully_implicit": TimeOption(_never, "wants an assembled matrix; take 'ts_type': 'dirk'"),
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
    # What is seen, or how a failure is told.
    **_all(("ts_adapt_monitor", "ts_error_if_step_fails", "ts_view", "ts_view_pre", "ts_view_solution"), _always),
    **_all(
        ("ts_save_trajectory", "ts_trajectory_type"),
        _never, "has no effect: a layer keeps its trajectory in memory; drop it",
    ),
}  # fmt: skip

#: What is wrong with single values.
_VALUES = {
    ("ts_adapt_type", "cfl"): "wants a bound by Courant, Friedrichs and Lewy, which a layer has not; take 'basic'",
    ("ts_adapt_type", "glee"): "wants a method that estimates its global error; take 'basic'",
    ("ts_adapt_type", "history"): "wants a history; recorded runs replay their own, take 'basic'",
}


def in_force(prefix: str) -> dict[str, str]:
    """All options that a PETSc object with this prefix would read now, by their names without it, as text."""
    every = PETSc.Options().getAll().items()
    return {name.removeprefix(prefix): value or "" for name, value in every if name.startswith(prefix)}


def refuse_time_options(options: Mapping[str, str]) -> None:
    """Refuse options of a TS that a layer cannot have.

    Parameters
    ----------
    options
        Those in force; names that do not begin with "ts_" are left alone.

    Raises
    ------
    ValueError
        With the option, its value, and what to do.
    """
    for name, value in options.items():
        if not name.startswith("ts_") or name.startswith("ts_monitor"):
            continue
        given = f"solver_parameters: {name!r} {value!r}" if value else f"solver_parameters: {name!r}"
        if name not in OPTIONS:
            raise ValueError(f"{given} is no option that a layer is known to take; drop it")
        if not OPTIONS[name].allowed(value, options):
            raise ValueError(f"{given} {_VALUES.get((name, value), OPTIONS[name].says)}")


#: Options of solvers that a file may have.
_OF_SOLVERS = {
    "mat_type",
    *(f"snes_{name}" for name in (
        "rtol", "atol", "stol", "max_it", "max_funcs", "max_fail", "divergence_tolerance", "force_iteration", "lag_jacobian",
        "lag_preconditioner", "error_if_not_converged", "converged_reason", "monitor", "linesearch_damping", "linesearch_max_it",
        "linesearch_order", "linesearch_minlambda",
    )),
    *(f"ksp_{name}" for name in (
        "rtol", "atol", "divtol", "max_it", "gmres_restart", "initial_guess_nonzero", "norm_type", "pc_side",
        "error_if_not_converged", "converged_reason", "monitor", "richardson_scale",
    )),
    *(f"pc_{name}" for name in (
        "factor_levels", "factor_shift_type", "factor_shift_amount", "factor_mat_ordering_type", "factor_mat_solver_type",
        "factor_fill", "jacobi_type", "sor_omega", "sor_its", "sor_lits",
    )),
}  # fmt: skip
#: Types that a file may have; among others are those that run Python, a program or a library by its name.
_TYPES = {
    "snes_type": {"newtonls", "newtontr", "ksponly", "ngmres", "qn", "nrichardson"},
    "snes_linesearch_type": {"basic", "none", "bt", "l2", "cp", "secant"},
    "ksp_type": {"preonly", "gmres", "fgmres", "cg", "bcgs", "tfqmr", "minres", "richardson", "chebyshev", "lgmres", "cgs"},
    "pc_type": {"none", "jacobi", "pbjacobi", "bjacobi", "sor", "lu", "ilu", "cholesky", "icc", "qr", "asm", "redundant"},
}


def refuse_in_file(options: Mapping[str, object]) -> None:
    """Refuse options that a file is not to have.

    Parameters
    ----------
    options
        As given to a network: numbers, bools, text or None.

    Raises
    ------
    ValueError
        With the option, its value, and what to do.
    """
    for name, value in options.items():
        given = f"solver_parameters: {name!r} {value!r}"
        harmless = name in OPTIONS or name in _OF_SOLVERS or name in _TYPES or name in ("ts_monitor", "ts_adapt_monitor")
        if not harmless:
            raise ValueError(
                f"{given} is none of the options that a file may have; drop it by net.replace(solver_parameters=..)"
            )
        allowed = _TYPES.get(name)
        if allowed is not None and value not in allowed:
            raise ValueError(f"{given} is none of {', '.join(sorted(allowed))}, which a file may have")
        if name.endswith("_type") and not (isinstance(value, str) and value):
            raise ValueError(f"{given} is no name of a type")
        # Values with other characters name files, viewers and libraries.
        plain = (
            isinstance(value, (bool, int, float, type(None)))
            or isinstance(value, str)
            and re.fullmatch(r"[\w.+-]{0,40}", value)
        )
        on_or_off = value in (None, "", True, False, "true", "false", "1", "0")
        if not plain or re.search("monitor|reason|view", name) and not on_or_off:
            raise ValueError(f"{given} has a value that no file may have; expected numbers and single words")
        if re.search("stages|restart|levels|its$|order$|fill", name) and not _is_small(value):
            raise ValueError(f"{given} is no number from 0 to {_MOST}, as a file may have")


#: Of what takes memory or time with the number.
_MOST = 1000


def _is_small(value: object) -> bool:
    try:
        return 0 <= float(value) <= _MOST
    except (TypeError, ValueError):
        return False
