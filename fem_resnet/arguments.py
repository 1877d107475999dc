"""What comes from outside: arrays, numbers and names, each checked once, where it enters.

Inside of the package an array is real, finite, float64 and C-contiguous; nothing there looks again. What NumPy would make
so by leaving something out (an imaginary part, a mask) is refused, and so is what has another shape or range than is
wanted. Messages name the argument, what is wanted, and what was given.

Values that the ranks hold in parts are checked on all ranks together: what is wrong on one is raised on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import scipy.sparse

from fem_resnet.ranks import together

__all__ = ["choice", "flag", "function", "instance", "integer", "integer_array", "number", "real_array"]

_T = TypeVar("_T")

#: A length that may be anything from 1 on is None, or what messages call it.
Shape = tuple[int | str | None, ...]


def real_array(
    name: str,
    value: Any,
    shape: Shape | None = None,
    *,
    comm=None,
    least: float = -np.inf,
    above: float = -np.inf,
    finite: bool = True,
) -> np.ndarray:
    """An array from outside as float64, C-contiguous; the given one itself where it is that.

    Parameters
    ----------
    name
        What messages call it.
    value
        What `numpy.asarray` takes: lists, arrays, what has ``__array__``.
    shape
        The one that is wanted, any if left out. A length that may be anything from 1 on is None, or what messages call it.
    comm
        A communicator, on all ranks of which an error is raised alike; then collective.
    least, above
        All entries are >= `least` and > `above`.
    finite
        Whether entries that are not finite are refused.

    Raises
    ------
    TypeError
        If it is not of real numbers: complex, sparse, of strings or objects, no array at all.
    ValueError
        If entries are masked, rows have different lengths, the shape is another one, or an entry is out of range.

    Examples
    --------
    >>> real_array("weights", [1, 2, 3], ("points",), above=0)
    array([1., 2., 3.])
    """

    def wanted() -> str:
        return f"{_range('numbers', least, above)}{_written(shape)} are wanted"

    def check() -> np.ndarray:
        array = _numbers(name, value, wanted, shape, "biuf")
        with np.errstate(over="ignore"):
            array = np.asarray(array, dtype=float, order="C")
        if finite and not np.isfinite(array).all():
            bad = np.count_nonzero(~np.isfinite(array))
            raise ValueError(f"{name}: finite {wanted()}, {bad} of {array.size} are not finite")
        if array.size and max(least, above) > -np.inf and not (array.min() >= least and array.min() > above):
            raise ValueError(f"{name}: {wanted()}, the smallest given is {array.min():g}")
        return array

    return together(comm, check)


def integer_array(name: str, value: Any, shape: Shape | None = None, *, comm=None) -> np.ndarray:
    """An array of integers from outside; otherwise as `real_array`."""

    def wanted() -> str:
        return f"integers{_written(shape)} are wanted"

    return together(comm, lambda: _numbers(name, value, wanted, shape, "iu"))


def _numbers(name: str, value: Any, wanted: Callable[[], str], shape: Shape | None, kinds: str) -> np.ndarray:
    """`numpy.asarray`, refusing what it would leave out or cannot read, and other shapes and kinds of numbers.

    Most arrays are right: what is wanted is written where one is not.
    """
    if scipy.sparse.issparse(value):
        raise TypeError(f"{name}: {wanted()}, a sparse {type(value).__name__} was given; .toarray() makes it dense")
    if _has_masked(value):
        raise ValueError(f"{name}: {wanted()}, some of those given are masked; fill them (.filled) or leave them out")
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever an object's __array__ raises
        raise ValueError(f"{name}: {wanted()}, {type(value).__name__} cannot be read as an array: {error}") from error
    if shape is not None and not _fits(array.shape, shape):
        raise ValueError(f"{name}: {wanted()}, shape {array.shape} was given")
    if array.dtype.kind == "c":
        raise TypeError(f"{name}: real {wanted()}, complex ones were given; take .real if that is what you mean")
    if array.dtype.kind not in kinds:
        what = type(value).__name__ if array.ndim == 0 else f"{type(value).__name__} with entries of type {array.dtype}"
        raise TypeError(f"{name}: {wanted()}, {what} was given")
    return array


def _has_masked(value: Any) -> bool:
    """Whether NumPy would drop a mask: that of an array, or of one in a list of arrays."""
    if isinstance(value, np.ma.MaskedArray):
        return bool(np.ma.getmaskarray(value).any())
    return isinstance(value, (list, tuple)) and any(map(_has_masked, value))


def _fits(given: tuple[int, ...], shape: Shape) -> bool:
    return len(given) == len(shape) and all(
        n == wanted if isinstance(wanted, Integral) else n > 0 for n, wanted in zip(given, shape)
    )


def _written(shape: Shape | None) -> str:
    names = ["any" if n is None else str(n) for n in shape or ()]
    return "" if shape is None else f" of shape ({', '.join(names)}{',' * (len(names) == 1)})"


def number(
    name: str, value: Any, *, least: float = -np.inf, above: float = -np.inf, most: float = np.inf, below: float = np.inf
) -> float:
    """A finite real number from outside, >= `least`, > `above`, <= `most` and < `below`.

    Raises
    ------
    ValueError
        If it is anything else: a string, a bool, an array, complex, not finite, out of range.

    Examples
    --------
    >>> number("final_time", 2, above=0)
    2.0
    """
    given = _scalar(value)
    fits = (
        isinstance(given, Real)
        and not isinstance(given, (bool, np.bool_))
        and least <= given <= most
        and above < given < below
    )
    if not (fits and _is_finite(given)):
        raise ValueError(f"{name}: {_range('a number', least, above, most, below)} is wanted, {value!r} was given")
    return float(given)


#: The largest integer that PETSc and MPI take for a size.
LARGEST = 2**31 - 1


def integer(name: str, value: Any, *, least: int = 1, most: float = LARGEST) -> int:
    """An integer from outside, from `least` to `most`.

    Raises
    ------
    ValueError
        If it is anything else: a float, a bool, a string, out of range.
    """
    given = _scalar(value)
    if not (isinstance(given, Integral) and not isinstance(given, bool) and least <= given <= most):
        end = np.inf if most == LARGEST else most
        wanted = "a positive integer" if (least, end) == (1, np.inf) else _range("an integer", least, most=end)
        if most == LARGEST and isinstance(given, Integral) and given > most:
            wanted += f" of at most {most}"
        raise ValueError(f"{name}: {wanted} is wanted, {value!r} was given")
    return int(given)


def flag(name: str, value: Any) -> bool:
    """True or False from outside.

    Raises
    ------
    TypeError
        If it is anything else: 0, None, "no".
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: True or False is wanted, {value!r} was given")
    return bool(value)


def function(name: str, value: Any, wanted: str) -> Callable:
    """A function from outside, or another object that is called.

    Parameters
    ----------
    wanted
        What it is a function of: "a function of prediction and observation".

    Raises
    ------
    TypeError
        If it is called by nobody, or is a class.
    """
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name}: {wanted} is wanted, {value!r} was given")
    return value


def choice(name: str, value: Any, allowed: Iterable[_T]) -> _T:
    """A value from outside that is one of those allowed.

    Raises
    ------
    ValueError
        If it is none of them; the message lists them.
    """
    allowed = list(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: one of {', '.join(map(repr, allowed))} is wanted, {value!r} was given")
    return value


def instance(name: str, value: Any, kind: type[_T] | tuple[type, ...], remedy: str = "") -> _T:
    """A value from outside that is an object of a class, or of one of several; None among these is written ``type(None)``.

    Parameters
    ----------
    remedy
        What to do, as the end of the message: "laplace_basis(Y, rank) makes one".

    Raises
    ------
    TypeError
        If it is anything else.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join("None" if one is type(None) else one.__name__ for one in kinds)
        article = "an" if wanted[0] in "AEIOUaeiou" else "a"
        end = f"; {remedy}" if remedy else ""
        raise TypeError(f"{name}: {article} {wanted} is wanted, {type(value).__name__} was given{end}")
    return value


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a large integer
        return False


def _scalar(value: Any) -> Any:
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _range(kind: str, least: float, above: float = -np.inf, most: float = np.inf, below: float = np.inf) -> str:
    """Such as "a positive number", "numbers >= 0", "a number > 0 and < 1", "an integer from 1 to 5"."""
    if (least, above, most, below) == (-np.inf, 0, np.inf, np.inf):
        return " ".join([*kind.split()[:-1], "positive", kind.split()[-1]])
    if least > -np.inf and most < np.inf:
        return f"{kind} from {least:g} to {most:g}"
    ends = ((">=", least), (">", above), ("<=", most), ("<", below))
    return f"{kind} {' and '.join(f'{sign} {end:g}' for sign, end in ends if np.isfinite(end))}".rstrip()
