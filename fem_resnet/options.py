"""PETSc options from users: checked where they are given, and refused where no object reads them.

PETSc takes any name and says nothing of an option that it never reads: "tao_maxit" in place of "tao_max_it" would have no
effect and no message. So once an object has read its options, those that it did not ask for are refused. Options that only
show something, such as "tao_view", are read when there is something to show; these are accepted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from numbers import Real
from types import NoneType

import petsctools
from petsc4py import PETSc

from fem_resnet.arguments import instance

__all__ = ["checked_options", "checked_prefix", "last_words", "petsc_refusals", "reason_name", "refuse_unread", "unread"]

_NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
#: Options that are read when there is something to show.
_SEEN_LATER = re.compile(r"(^|_)(view|monitor)(_|$)|(^|_)converged_reason$")


def checked_options(given: Mapping | None, name: str = "solver_parameters") -> dict[str, object]:
    """Options from outside as a new, flat dictionary. Options in an inner dictionary get its name as a prefix.

    Parameters
    ----------
    given
        Names of options without a hyphen, and their values: strings, numbers, bools, None for an option without a value, or
        dictionaries of these. An option that ends in "python_type" may have a class as its value.
    name
        The name of the argument in messages.

    Raises
    ------
    TypeError
        If it is no dictionary, or a value is of another type.
    ValueError
        If a name cannot be the name of an option, or a number is NaN.

    Examples
    --------
    >>> checked_options({"tao_type": "nls", "tao_nls": {"ksp_rtol": 0.1}})
    {'tao_type': 'nls', 'tao_nls_ksp_rtol': 0.1}
    """
    instance(name, given, (Mapping, NoneType), "give PETSc's options by name, such as {'ksp_rtol': 1e-8}")
    flat: dict[str, object] = {}
    for key, value in (given or {}).items():
        if not (isinstance(key, str) and _NAME.fullmatch(key)):
            raise ValueError(f"{name}: expected names of options without a hyphen, such as 'ksp_rtol', got {key!r}")
        if isinstance(value, Mapping):
            inner = checked_options(value, name)
            flat |= {f"{key}{'' if key.endswith('_') else '_'}{end}": one for end, one in inner.items()}
        else:
            _check_value(name, key, value)
            flat[key] = value
    return flat


def _check_value(name: str, key: str, value: object) -> None:
    if value is None or isinstance(value, type) and key.endswith("python_type"):
        return
    if not isinstance(value, (str, Real)):
        raise TypeError(f"{name}: expected a string, a number, a bool or None for {key!r}, got {type(value).__name__}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return
    if math.isnan(number):
        raise ValueError(f"{name}: expected a number for {key!r}, got {value!r}")


def checked_prefix(given: str | None, name: str = "options_prefix") -> str | None:
    """A prefix of options from outside: a letter, then letters, digits, ``_``, ``-`` and dots; "" or None for none.

    Raises
    ------
    TypeError, ValueError
        If it is anything else.
    """
    instance(name, given, (str, NoneType), "give a prefix such as 'mine_'")
    if given and not _NAME.fullmatch(given):
        raise ValueError(f"{name}: expected a letter, then letters, digits and '_', got {given!r}; take one such as 'mine_'")
    return given


def unread(options: petsctools.OptionsManager, given: Iterable[str]) -> list[str]:
    """The user's options that PETSc has not asked for so far, while or after their manager has inserted them.

    Parameters
    ----------
    options
        The manager of the options.
    given
        The names of the user's options, without the manager's prefix.
    """
    used = PETSc.Options().used
    return [
        key
        for key in given
        if not (key in options._used_options or used(options.options_prefix + key) or _SEEN_LATER.search(key))
    ]


#: Options that are often given, and misspelled. PETSc has no list of those that an object asks for.
_USUAL = (
    "tao_type", "tao_max_it", "tao_max_funcs", "tao_gatol", "tao_grtol", "tao_gttol", "tao_ls_type",
    "tao_lmvm_mat_lmvm_hist_size",
    "ts_type", "ts_rk_type", "ts_max_steps", "ts_adapt_type", "ts_rtol", "ts_atol", "ts_theta_theta",
    "snes_type", "snes_rtol", "snes_atol", "snes_max_it", "ksp_type", "ksp_rtol", "ksp_max_it", "pc_type",
    "eps_type", "eps_tol", "eps_max_it", "svd_type", "svd_tol", "svd_max_it",
)  # fmt: skip


def refuse_unread(names: Sequence[str], what: str, name: str = "solver_parameters") -> None:
    """Refuse these options, if there are any.

    Parameters
    ----------
    names
        The options that `unread` found.
    what
        The object that did not ask for them: "a TAO of type 'lmvm'".
    name
        The name of the argument in messages.

    Raises
    ------
    ValueError
        The message lists all of them.
    """
    if names:
        several = len(names) > 1
        kind, remedy = ("options", "leave them out") if several else ("an option", "leave it out")
        near = [match for each in names for match in get_close_matches(each, _USUAL, 1)]
        meant = f" (did you mean {', '.join(map(repr, near))}?)" if near else ""
        raise ValueError(f"{name}: expected {kind} of {what}, got {', '.join(names)}; correct the name{meant}, or {remedy}")


@contextmanager
def petsc_refusals(given: Mapping[str, object], name: str = "solver_parameters") -> Iterator[None]:
    """Around code in which PETSc reads options: raise what PETSc refuses as a ValueError that names the argument."""
    try:
        yield
    except (PETSc.Error, SystemError) as error:
        said = error if isinstance(error, PETSc.Error) else error.__cause__  # slepc4py's comes as a SystemError
        if not isinstance(said, PETSc.Error) or said.__cause__ is not None:
            raise
        raise ValueError(f"{name}: PETSc refuses {dict(given)}: {last_words(said)}") from said


def last_words(error: PETSc.Error) -> str:
    """The line of PETSc's message that says what is wrong."""
    return str(error).splitlines()[-1].partition("] ")[2]


def reason_name(kind: type, reason: int) -> str:
    """PETSc's name of the reason why a solver ended, such as "DIVERGED_MAX_IT".

    Parameters
    ----------
    kind
        The class of the solver, in petsc4py or slepc4py, such as `PETSc.TS`.
    reason
        The number that its ``getConvergedReason`` returns.

    Returns
    -------
    str
        The name, or the number in words where the class has no name for it.

    Examples
    --------
    >>> reason_name(PETSc.KSP, 2)
    'CONVERGED_RTOL'
    """
    return _names_of_reasons(kind).get(reason, f"PETSc's reason {reason}")


@cache
def _names_of_reasons(kind: type) -> dict[int, str]:
    names = kind.ConvergedReason  # type: ignore[attr-defined]  # each solver has it, and PETSc declares no base class that does
    # petsc4py lacks one name, that of an adjoint.
    missing = {-4: "ADJOINT_DIVERGED_LINEAR_SOLVE"} if kind is PETSc.TS else {}
    return missing | {getattr(names, name): name for name in dir(names) if name.isupper()}
