"""Arguments from outside: arrays, numbers, flags, names and objects. Each is checked once, where a user gives it.

Inside of the package an array is real, finite, float64 and C-contiguous, and nothing checks it again. Some values NumPy would
make real by leaving something out, such as an imaginary part or a mask; these are refused. So are other shapes, and numbers
out of range. A message names the argument, what is expected and what was given, and where it helps what to do:
`layers: expected an integer >= 0, got -1`.

Arrays of which each rank holds a part are checked on all ranks together: an error on one rank is raised on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, TypeVar, overload

import numpy as np
import scipy.sparse

from fem_resnet.ranks import together

__all__ = [
    "choice",
    "did_you_mean",
    "flag",
    "function",
    "instance",
    "integer",
    "integer_array",
    "number",
    "real_array",
    "text",
]

_T = TypeVar("_T")

#: The shape of an array. A length that may be any from 1 on is None, or the name that messages give it.
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
    """An array from outside as float64, C-contiguous. If the given array is that, it is returned itself.

    Parameters
    ----------
    name
        The name of the argument in messages.
    value
        What `numpy.asarray` takes: lists, arrays, objects with ``__array__``.
    shape
        The expected shape; any if left out. A length that may be any from 1 on is None, or the name that messages give it.
    comm
        A communicator, if an error of one rank is to be raised on all of them; then the call is collective.
    least, above
        All entries are >= `least` and > `above`.
    finite
        Whether entries that are not finite are refused.

    Raises
    ------
    TypeError
        If the entries are no real numbers, or the value is sparse or no array.
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
            raise ValueError(f"{name}: expected finite {expected()}, got {bad} of {array.size} that are not finite")
        if array.size and max(least, above) > -np.inf and not (array.min() >= least and array.min() > above):
            raise ValueError(f"{name}: expected {expected()}, got {array.min():g} among them")
        return array

    return together(comm, check)


def integer_array(name: str, value: Any, shape: Shape | None = None, *, comm=None) -> np.ndarray:
    """An array of integers from outside, checked as by `real_array`."""

    def expected() -> str:
        return f"integers{_written(shape)}"

    return together(comm, lambda: _numbers(name, value, expected, shape, "iu"))


def _numbers(name: str, value: Any, expected: Callable[[], str], shape: Shape | None, kinds: str) -> np.ndarray:
    """The value as an array. Refused are values of which `numpy.asarray` drops a part, and other shapes and types.

    `expected` makes the text of a message, and is called only where an array is wrong: most are right.
    """
    if scipy.sparse.issparse(value):
        raise TypeError(f"{name}: expected {expected()}, got a sparse {type(value).__name__}; .toarray() makes it dense")
    if _has_masked(value):
        raise ValueError(f"{name}: expected {expected()}, got masked entries; fill them with .filled, or leave them out")
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever an object's __array__ raises
        raise ValueError(f"{name}: expected {expected()}, got {type(value).__name__}, which is no array: {error}") from error
    if shape is not None and not _fits(array.shape, shape):
        raise ValueError(f"{name}: expected {expected()}, got shape {array.shape}")
    if array.dtype.kind == "c":
        raise TypeError(f"{name}: expected real {expected()}, got complex ones; take .real if that is what you mean")
    if array.dtype.kind not in kinds:
        what = type(value).__name__ if array.ndim == 0 else f"{type(value).__name__} with entries of type {array.dtype}"
        raise TypeError(f"{name}: expected {expected()}, got {what}")
    return array


def _has_masked(value: Any) -> bool:
    """Whether NumPy would drop the mask of an array, or of an array in a list."""
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
    name: str, value: object, *, least: float = -np.inf, above: float = -np.inf, most: float = np.inf, below: float = np.inf
) -> float:
    """A finite real number from outside, >= `least`, > `above`, <= `most` and < `below`.

    Raises
    ------
    ValueError
        If it is out of range, not finite, or no real number; a bool is none.

    Examples
    --------
    >>> number("final_time", 2, above=0)
    2.0
    """
    given = _scalar(value)
    if isinstance(given, Real) and not isinstance(given, (bool, np.bool_)):
        try:
            found = float(given)
        except OverflowError:  # a large integer
            found = math.inf
        if math.isfinite(found) and least <= found <= most and above < found < below:
            return found
    raise ValueError(f"{name}: expected {_range('a number', least, above, most, below)}, got {value!r}")


#: The largest integer that PETSc and MPI take for a size.
LARGEST = 2**31 - 1


def integer(name: str, value: Any, *, least: int = 1, most: float = LARGEST) -> int:
    """An integer from outside, from `least` to `most`.

    Raises
    ------
    ValueError
        If it is out of range, or no integer; a bool and a float are none.
    """
    given = _scalar(value)
    found = int(given) if isinstance(given, Integral) and not isinstance(given, bool) else None
    if found is not None and least <= found <= most:
        return found
    end = np.inf if most == LARGEST else most
    expected = "a positive integer" if (least, end) == (1, np.inf) else _range("an integer", least, most=end)
    if most == LARGEST and found is not None and found > most:
        expected += f" of at most {most}"
    raise ValueError(f"{name}: expected {expected}, got {value!r}")


def flag(name: str, value: Any) -> bool:
    """True or False from outside.

    Raises
    ------
    TypeError
        If it is anything else, such as 0, None or "no".
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def function(name: str, value: Any, expected: str) -> Callable:
    """A function from outside, or another object that can be called.

    Parameters
    ----------
    name
        The name of the argument in messages.
    value
        What was given.
    expected
        The expected function in words: "a function of prediction and observation".

    Raises
    ------
    TypeError
        If it cannot be called, or is a class.
    """
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    return value


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """A name from outside that is one of those allowed.

    Raises
    ------
    ValueError
        If it is none of them; the message lists them, and says which is near.
    """
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, names))}, got {value!r}{did_you_mean(value, names)}")
    return value


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """The end of a message about a wrong name: the nearest right one, or nothing where none is near.

    Examples
    --------
    >>> did_you_mean("thanh", ["relu", "tanh"])
    "; did you mean 'tanh'?"
    """
    near = get_close_matches(value, list(names), 1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def text(name: str, value: Any) -> str:
    """A text from outside that says something, as a name for messages.

    Raises
    ------
    TypeError, ValueError
        If it is no string, or is empty.
    """
    if not instance(name, value, str):
        raise ValueError(f"{name}: expected a text, got an empty string")
    return value


@overload
def instance(name: str, value: object, kind: type[_T], remedy: str = "") -> _T: ...
@overload
def instance(name: str, value: object, kind: tuple[type, ...], remedy: str = "") -> Any: ...
def instance(name: str, value: object, kind: type | tuple[type, ...], remedy: str = "") -> Any:
    """An object from outside that is of a class, or of one of several.

    Parameters
    ----------
    name
        The name of the argument in messages.
    value
        What was given.
    kind
        The class, or a tuple of classes. ``type(None)`` among them allows None.
    remedy
        What to do, as the end of the message: "laplace_basis(Y, rank) makes one".

    Raises
    ------
    TypeError
        If it is an object of another class.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join("None" if one is type(None) else one.__name__ for one in kinds)
        article = "an" if expected[0] in "AEIOUaeiou" else "a"
        end = f"; {remedy}" if remedy else ""
        raise TypeError(f"{name}: expected {article} {expected}, got {type(value).__name__}{end}")
    return value


def _scalar(value: Any) -> Any:
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _range(kind: str, least: float, above: float = -np.inf, most: float = np.inf, below: float = np.inf) -> str:
    """A range in words: "a positive number", "numbers >= 0", "a number > 0 and < 1", "an integer from 1 to 5"."""
    if (least, above, most, below) == (-np.inf, 0, np.inf, np.inf):
        return " ".join([*kind.split()[:-1], "positive", kind.split()[-1]])
    if least > -np.inf and most < np.inf:
        return f"{kind} from {least:g} to {most:g}"
    ends = ((">=", least), (">", above), ("<=", most), ("<", below))
    return f"{kind} {' and '.join(f'{sign} {end:g}' for sign, end in ends if np.isfinite(end))}".rstrip()
