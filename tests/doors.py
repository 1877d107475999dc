"""Every public door, the right arguments for it, and the wrong ones with which `test_public_doors.py` calls it.

A door is a public function, class or method. Its row says how it is called with every argument given. The tests replace one
argument after the other: by what no argument can be, which must be refused by name; and on one rank alone by another sound
value, which must be refused on all ranks.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import firedrake as fd
import numpy as np
import scipy.sparse

__all__ = ["Door", "WRONG", "another", "fault", "holds_nan"]


@dataclass(frozen=True)
class Door:
    """A public function, class or method and its arguments.

    Attributes
    ----------
    call
        What is called, with keywords. A method is that of its class, ``Parameter.set``: the object is the argument "self".
    sound
        Makes the arguments of a sound call, all that there are, in the order of the signature. Made anew for each call
        where the call changes them; keep what is dear in a `functools.cache`.
    takes
        Of an argument, the kinds of `WRONG` that are not wrong for it.
    parted
        Arguments of which each rank has its own part, or that live on a communicator: they are not compared.
    another
        Of a replicated argument, another sound value for the last rank, where `another` knows none.
    called
        Of an argument, what messages call it, where that is not its own name; of one that is to fit another, both.
    through
        Arguments of which NaN may come out as it went in.
    fitting
        Arguments that are right if they fit each other: two that are wrong alone may be right together.
    dear
        Whether a call takes seconds: its walk is then `slow`, and a few kinds of `WRONG` stay in the default run.
    """

    call: Callable[..., Any]
    sound: Callable[[], dict[str, Any]]
    takes: Mapping[str, set[str]] = field(default_factory=dict)
    parted: tuple[str, ...] = ()
    another: Mapping[str, Any] = field(default_factory=dict)
    called: Mapping[str, str] = field(default_factory=dict)
    through: tuple[str, ...] = ()
    fitting: tuple[str, ...] = ()
    dear: bool = False

    def names(self, argument: str, error: Exception) -> bool:
        """Whether the message of an error begins with the name of an argument."""
        return re.match(rf"({self.called.get(argument, argument)})\b", str(error)) is not None

    def arguments(self) -> list[str]:
        """The arguments, without the object of a method."""
        return [name for name in self.sound() if name != "self"]

    def differing(self) -> Iterator[tuple[str, Any]]:
        """Each argument that must be the same on all ranks, with another value of it."""
        given = self.sound()
        for name in self.arguments():
            other = self.another[name] if name in self.another else another(given[name])
            if name not in self.parted and other is not None:
                yield name, other

    def signature(self) -> list[str] | None:
        """The names in the signature, without * and **; None if there is no signature."""
        try:
            parameters = inspect.signature(self.call).parameters.values()
        except ValueError:
            return None
        return [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]


class Anything:
    """An object that is right for no argument."""

    def __repr__(self) -> str:
        return "<anything>"


#: Arguments are replaced by these. `Door.takes` lists those that a door takes.
WRONG: dict[str, Callable[[], Any]] = {
    "an object": Anything,
    "a class": lambda: Anything,
    "a function": lambda: lambda *_, **__: None,
    "None": lambda: None,
    "a bool": lambda: True,
    "a string": lambda: "no such name",
    "an empty string": lambda: "",
    "bytes": lambda: b"bytes",
    "a path": lambda: Path("/dev/null/no/such/file"),
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "a complex number": lambda: 1j,
    "a negative number": lambda: -1,
    "zero": lambda: 0,
    "a fraction": lambda: 1.5,
    "a huge integer": lambda: 10**30,
    "an empty list": list,
    "a list of strings": lambda: ["a", "b"],
    "a ragged list": lambda: [[1.0], [1.0, 2.0]],
    "an empty dict": dict,
    "a dict": lambda: {"no such option": 1},
    "an array of NaN": lambda: np.full((3, 2), np.nan),
    "an array of another shape": lambda: np.zeros((1, 2, 3, 4)),
    "a complex array": lambda: np.ones((3, 2), complex),
    "a masked array": lambda: np.ma.masked_all((3, 2)),
    "an array of objects": lambda: np.array([None, Anything()], dtype=object),
    "a sparse matrix": lambda: scipy.sparse.eye_array(3).tocsr(),
}


def another(value: Any) -> Any:
    """Another value of the same kind, which a door takes too; None if there is none."""
    if isinstance(value, (bool, np.bool_)):
        return not value
    if isinstance(value, (int, np.integer)):
        return value + 1
    if isinstance(value, float):
        return value * 1.25
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return value[::-1].copy() if value.ndim and (value[::-1] != value).any() else None
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value * 1.25
    if isinstance(value, Path):
        return value.with_name("another" + value.name)
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, float) for entry in value):
        return type(value)(1.25 * entry for entry in value)
    return None


def holds_nan(result: Any, depth: int = 3) -> bool:
    """Whether numbers in a result are NaN."""
    if isinstance(result, (float, complex, np.ndarray, np.generic)):
        array = np.asarray(result)
        return array.dtype.kind in "fc" and bool(np.isnan(array).any())
    if isinstance(result, fd.Function):
        return bool(np.isnan(result.dat.data_ro).any())
    if depth and isinstance(result, (list, tuple)):
        return any(holds_nan(part, depth - 1) for part in result)
    if depth and dataclasses.is_dataclass(result):
        return any(holds_nan(getattr(result, part.name, None), depth - 1) for part in dataclasses.fields(result))
    return False


def fault(door: Door, wrong: Mapping[str, str]) -> str | None:
    """The fault of a call in which arguments are replaced by these kinds of `WRONG`; None if it ends as it should.

    It is refused by the name of one of the arguments that do not take their kind; or taken where all take theirs, and then
    has no NaN in its result.
    """
    refused = [name for name, kind in wrong.items() if kind not in door.takes.get(name, ())]
    try:
        result = door.call(**door.sound() | {name: WRONG[kind]() for name, kind in wrong.items()})
    except (TypeError, ValueError) as error:
        if not any(door.names(name, error) for name in (refused or wrong)):
            return f"{type(error).__name__}: {error}"
        return None if refused else f"refused, though it is said to be taken: {error}"
    except OSError as error:
        # What the operating system says of a name of a file that may be one; files are looked at first.
        named = any(door.names(name, error) for name in wrong)
        return f"{type(error).__name__}: {error}" if refused and not named else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if refused:
        return "taken"
    return "NaN" if holds_nan(result) and not set(wrong) & set(door.through) else None
