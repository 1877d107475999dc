"""What comes from outside: arrays, numbers and names, each checked once, where it enters.

Inside of the package an array is real, finite, float64 and C-contiguous; nothing there looks again. What NumPy would make
so by leaving something out (an imaginary part, a mask) is refused, and so is what has another shape or range
than expected. Messages name the argument, what is expected, and what was given: `layers: expected an integer >= 0, got -1`.

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
        The one that is expected; any if left out. A length that may be anything from 1 on is None, or what messages call it.
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

    def expected() -> str:
        return f"{_range('numbers', least, above)}{_written(shape)}"

    def check() -> np.ndarray:
        array = _numbers(name, value, expected, shape, "biuf")
        with np.errstate(over="ignore"):
            array = np.asarray(array, dtype=float, order="C")
        if finite and not np.isfinite(array).all():
            bad = np.count_nonzero(~np.isfinite(array))
            raise ValueError(f"{name}: expected finite {expected()}, {bad} of {array.size} are not finite")
        if array.size and max(least, above) > -np.inf and not (array.min() >= least and array.min() > above):
            raise ValueError(f"{name}: expected {expected()}, the smallest given is {array.min():g}")
        return array

    return together(comm, check)


def integer_array(name: str, value: Any, shape: Shape | None = None, *, comm=None) -> np.ndarray:
    """An array of integers from outside; otherwise as `real_array`."""

    def expected() -> str:
        return f"integers{_written(shape)}"

    return together(comm, lambda: _numbers(name, value, expected, shape, "iu"))


def _numbers(name: str, value: Any, expected: Callable[[], str], shape: Shape | None, kinds: str) -> np.ndarray:
    """`numpy.asarray`, refusing what it would leave out or cannot read, and other shapes and kinds of numbers.

    Most arrays are right, so `expected` is written only where one is not.
    """
    if scipy.sparse.issparse(value):
        raise TypeError(f"{name}: expected {expected()}, got a sparse {type(value).__name__}; .toarray() makes it dense")
    if _has_masked(value):
        raise ValueError(
            f"{name}: expected {expected()}, some of those given are masked; fill them (.filled) or leave them out"
        )
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever an object's __array__ raises
        raise ValueError(
            f"{name}: expected {expected()}, {type(value).__name__} cannot be read as an array: {error}"
        ) from error
    if shape is not None and not _fits(array.shape, shape):
        raise ValueError(f"{name}: expected {expected()}, got shape {array.shape}")
    if array.dtype.kind == "c":
        raise TypeError(f"{name}: expected real {expected()}, got complex ones; take .real if that is what you mean")
    if array.dtype.kind not in kinds:
        what = type(value).__name__ if array.ndim == 0 else f"{type(value).__name__} with entries of type {array.dtype}"
        raise TypeError(f"{name}: expected {expected()}, got {what}")
    return array


def _has_masked(value: Any) -> bool:
    """Whether NumPy would drop a mask: that of an array, or of one in a list of arrays."""
    if isinstance(value, np.ma.MaskedArray):
        return bool(np.ma.getmaskarray(value).any())
    return isinstance(value, (list, tuple)) and any(map(_has_masked, value))


def _fits(given: tuple[int, ...], shape: Shape) -> bool:
    return len(given) == len(shape) and all(
        n == length if isinstance(length, Integral) else n > 0 for n, length in zip(given, shape)
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
        raise ValueError(f"{name}: expected {_range('a number', least, above, most, below)}, got {value!r}")
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
        expected = "a positive integer" if (least, end) == (1, np.inf) else _range("an integer", least, most=end)
        if most == LARGEST and isinstance(given, Integral) and given > most:
            expected += f" of at most {most}"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return int(given)


def flag(name: str, value: Any) -> bool:
    """True or False from outside.

    Raises
    ------
    TypeError
        If it is anything else: 0, None, "no".
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def function(name: str, value: Any, expected: str) -> Callable:
    """A function from outside, or another object that is called.

    Parameters
    ----------
    expected
        What it is a function of: "a function of prediction and observation".

    Raises
    ------
    TypeError
        If it is called by nobody, or is a class.
    """
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
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
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
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
        expected = " or ".join("None" if one is type(None) else one.__name__ for one in kinds)
        article = "an" if expected[0] in "AEIOUaeiou" else "a"
        end = f"; {remedy}" if remedy else ""
        raise TypeError(f"{name}: expected {article} {expected}, got {type(value).__name__}{end}")
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
