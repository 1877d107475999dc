"""Objects whose public attributes cannot be set after they were made.

A network makes what it computes with, such as steppers, compiled stages and tapes, from its settings once. If a setting
changed later, some of these would see the change and others would not. So public attributes cannot be set, and each class
says what to do instead. Values that are meant to change, such as coefficients, are held in Functions.
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
                f"{name}: a {type(self).__name__} stays what it was made with, since others were made from it; {self._instead}"
            )


def _ending(constructor: Callable) -> Callable:
    """The constructor, after which an object of its own class is fixed; an object of a derived class is not fixed yet."""

    @wraps(constructor)
    def __init__(self, *args, **kwargs):
        constructor(self, *args, **kwargs)
        if type(self).__init__ is __init__:
            vars(self)["_is_made"] = True

    return __init__


class OnMesh(Fixed):
    """A fixed object that lives on a mesh. It does not pickle. A deep copy is the object itself, since it never changes."""

    #: What a message says to do instead of pickling.
    _instead_of_pickling = "store the arguments it was made with, and make it again"

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
    """The array itself, made read-only."""
    array.flags.writeable = False
    return array
