"""Objects that stay what they were made with.

What a network computes with is made of its settings once: steppers, compiled stages, tapes. A setting that changed later
would be seen by some of these and not by others, so public attributes cannot be set; each class says what to do instead.
Values that are meant to change, such as coefficients, are held in Functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Self

import numpy as np

__all__ = ["Fixed", "OnMesh", "read_only"]


class Fixed:
    """An object whose public attributes cannot be set once its constructor has ended."""

    #: What a message says to do instead of setting an attribute.
    _instead = "make a new one"

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _ending(cls.__init__)

    def __setattr__(self, name: str, value: object) -> None:
        self._refuse(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse(name)
        super().__delattr__(name)

    def _refuse(self, name: str) -> None:
        if not name.startswith("_") and "_is_made" in vars(self):
            raise AttributeError(
                f"{name}: a {type(self).__name__} stays what it was made with, as what follows from it is made once; "
                f"{self._instead}"
            )


def _ending(constructor: Callable) -> Callable:
    """The constructor, which says of an object of its own class that it is made; that of a base class does not."""

    @wraps(constructor)
    def __init__(self, *args, **kwargs):
        constructor(self, *args, **kwargs)
        if type(self).__init__ is __init__:
            vars(self)["_is_made"] = True

    return __init__


class OnMesh(Fixed):
    """One that lives on a mesh, which neither pickles nor is copied: a deep copy is the object itself, which never changes."""

    #: What a message says to do instead of pickling.
    _instead_of_pickling = "store what it was made of, and make it again"

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: Mapping) -> Self:
        return self

    def __reduce__(self):
        raise TypeError(
            f"pickle: a {type(self).__name__} lives on a mesh, which several processes may share, and does not pickle; "
            f"{self._instead_of_pickling}"
        )


def read_only(array: np.ndarray) -> np.ndarray:
    """The array, which nobody may write into any more."""
    array.flags.writeable = False
    return array
