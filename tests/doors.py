"""Every public door: how it is called soundly, and how `test_public_doors.py` calls it wrongly.

A door is a public function, class or method. Its row says how it is called with every argument given. The tests replace one
argument after the other: by what no argument can be, which must be refused by name; and on one rank alone by another sound
value, which must be refused on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

__all__ = ["Door", "WRONG", "another"]


@dataclass(frozen=True)
class Door:
    """A public function, class or method and its arguments.

    Attributes
    ----------
    call
        What is called, with keywords.
    sound
        Makes the arguments of a sound call, all that there are, in the order of the signature. Made anew for each call
        where the call changes them; keep what is dear in a `functools.cache`.
    takes
        Of an argument, the kinds of `WRONG` that are not wrong for it.
    parted
        Arguments of which each rank has its own part, or that live on a communicator: they are not compared.
    another
        Of a replicated argument, another sound value for the last rank, where `another` knows none.
    dear
        Whether a call takes seconds: its walk is then `slow`, and a few kinds of `WRONG` stay in the default run.
    """

    call: Callable[..., Any]
    sound: Callable[[], dict[str, Any]]
    takes: Mapping[str, set[str]] = field(default_factory=dict)
    parted: tuple[str, ...] = ()
    another: Mapping[str, Any] = field(default_factory=dict)
    dear: bool = False


class Anything:
    """An object that no argument can be."""

    def __repr__(self) -> str:
        return "<anything>"


#: What arguments are replaced by. An argument that may be one of these says so in `Door.takes`.
WRONG: dict[str, Callable[[], Any]] = {
    "an object": Anything,
    "a class": lambda: Anything,
    "a function": lambda: lambda *_, **__: None,
    "None": lambda: None,
    "a bool": lambda: True,
    "a string": lambda: "no such name",
    "an empty string": lambda: "",
    "bytes": lambda: b"bytes",
    "a path": lambda: Path("/no/such/folder/file"),
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
    """Another value of the same kind, which a door takes as well as the given one; None where there is none to be had."""
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
