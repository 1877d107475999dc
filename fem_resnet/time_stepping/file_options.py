"""PETSc's options that may come from a file.

Such an option must neither run code nor write files, so `refuse_in_file` allows only names and values on a list. Whether a
layer can have the option is another question: `options` answers it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fem_resnet.time_stepping.options import OPTIONS

__all__ = ["refuse_in_file"]

Value = bool | int | float | str | None

#: Options of solvers that may come from a file.
_OF_SOLVERS = {
    "mat_type",
    *(f"snes_{name}" for name in (
        "rtol", "atol", "stol", "max_it", "max_funcs", "max_fail", "divergence_tolerance", "force_iteration", "lag_jacobian",
        "lag_preconditioner", "error_if_not_converged", "converged_reason", "monitor", "linesearch_damping",
        "linesearch_max_it", "linesearch_order", "linesearch_minlambda",
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
#: Types that may come from a file. Other types run Python, a program, or a library that they name.
_TYPES = {
    "snes_type": {"newtonls", "newtontr", "ksponly", "ngmres", "qn", "nrichardson"},
    "snes_linesearch_type": {"basic", "none", "bt", "l2", "cp", "secant"},
    "ksp_type": {"preonly", "gmres", "fgmres", "cg", "bcgs", "tfqmr", "minres", "richardson", "chebyshev", "lgmres", "cgs"},
    "pc_type": {"none", "jacobi", "pbjacobi", "bjacobi", "sor", "lu", "ilu", "cholesky", "icc", "qr", "asm", "redundant"},
}


def refuse_in_file(options: Mapping[str, Value]) -> None:
    """Refuse options that must not come from a file.

    Parameters
    ----------
    options
        Options as given to a network: numbers, bools, text or None.

    Raises
    ------
    ValueError
        If a layer cannot have one; the message names the option, its value and what to do.
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
            raise ValueError(f"{given} has a type that no file may have; take one of {', '.join(sorted(allowed))}")
        if name.endswith("_type") and not (isinstance(value, str) and value):
            raise ValueError(f"{given} is not the name of a type; give the name as text")
        # Values with other characters could name files, viewers and libraries.
        plain = (
            isinstance(value, (bool, int, float, type(None)))
            or isinstance(value, str)
            and re.fullmatch(r"[\w.+-]{0,40}", value)
        )
        on_or_off = value in (None, "", True, False, "true", "false", "1", "0")
        if not plain or re.search("monitor|reason|view", name) and not on_or_off:
            raise ValueError(f"{given} has a value that no file may have; give a number or a single word")
        if re.search("stages|restart|levels|its$|order$|fill", name) and not _is_small(value):
            raise ValueError(f"{given} has a value that no file may have; give a number from 0 to {_MOST}")


#: The largest number for an option whose memory or time grows with the number.
_MOST = 1000


def _is_small(value: Value) -> bool:
    try:
        return 0 <= float(value) <= _MOST
    except (TypeError, ValueError):
        return False
