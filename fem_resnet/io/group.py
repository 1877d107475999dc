"""One group of an HDF5 file that nobody trusts: each field is asked for by name, type, shape and range.

What was not asked for is refused. Datasets are read in slices, so that a check needs little memory. `are_all` finds out
whether indices are a permutation by the sum of their hashes with a random key, which needs no memory at all.
"""

from __future__ import annotations

import ast
import io
import pickle
from collections.abc import Iterator
from typing import Any, TypeVar

import h5py
import numpy as np

__all__ = ["Group", "Wrong", "are_all", "slices"]

_M = TypeVar("_M", h5py.Group, h5py.Dataset)


class Wrong(ValueError):
    """A field of a file is not what it should be; the message begins with the name of the field."""


#: Entries that are checked at a time.
_SLICE = 1 << 20
#: The highest degree of an element that is accepted: Firedrake tabulates its nodes when it makes the element.
_HIGHEST_DEGREE = 10


class Group:
    """A group of an HDF5 file. At the end of a ``with`` block, fields that nobody has asked for are refused.

    Parameters
    ----------
    group
        The group as h5py has it.
    name
        Its path in the file, with which messages begin; "" for the file itself.

    Raises
    ------
    Wrong
        From all methods, where a field is missing or is not what was asked for.
    """

    def __init__(self, group: h5py.Group, name: str = ""):
        self._group, self.name = group, name
        self._links, self._attributes = set(group), set(group.attrs)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind, *error) -> None:
        rest = sorted(self._links | self._attributes)
        if kind is None and rest:
            raise Wrong(f"{self.name}/{rest[0]}: save writes nothing of this name")

    def __contains__(self, name: str) -> bool:
        return name in self._group

    def has_attribute(self, name: str) -> bool:
        """Whether there is an attribute of this name."""
        return name in self._group.attrs

    def again(self) -> Group:
        """The same group, of which nothing has been asked for yet."""
        return Group(self._group, self.name)

    @property
    def left(self) -> list[str]:
        """Names of the groups and datasets that nobody has asked for yet."""
        return sorted(self._links)

    def _member(self, name: str, kind: type[_M]) -> _M:
        path, expected = f"{self.name}/{name}", f"a {kind.__name__.lower()}"
        if not isinstance(self._group.get(name, getlink=True), h5py.HardLink):
            raise Wrong(f"{path}: expected {expected}, found none")
        member = self._group[name]
        if not isinstance(member, kind):
            raise Wrong(f"{path}: expected {expected}, got a {type(member).__name__.lower()}")
        self._links.discard(name)
        return member

    def group(self, name: str) -> Group:
        """A group inside this one."""
        return Group(self._member(name, h5py.Group), f"{self.name}/{name}")

    def same(self, name: str, other: Group) -> None:
        """Check that a group inside this one is a second name of a group inside another one."""
        if self._member(name, h5py.Group) != other._group[name]:
            raise Wrong(f"{self.name}/{name}: expected a second name of {other.name}/{name}, got another group")

    def array(
        self, name: str, dtype: str, shape: tuple[int | None, ...], least: float = -np.inf, below: float = np.inf
    ) -> h5py.Dataset:
        """A dataset, checked in slices.

        Parameters
        ----------
        name
            Its name in this group.
        dtype
            "f8" for finite float64, "i" for int32 or int64.
        shape
            Its shape; None stands for any length.
        least, below
            All entries are >= `least` and < `below`.
        """
        path = f"{self.name}/{name}"
        data = self._member(name, h5py.Dataset)
        if data.dtype not in ((np.int32, np.int64) if dtype == "i" else (np.float64,)):
            raise Wrong(f"{path}: expected {'integers' if dtype == 'i' else 'float64'}, got {data.dtype}")
        given = data.shape
        if given is None or len(given) != len(shape) or any(n not in (None, m) for n, m in zip(shape, given)):
            written = ", ".join("any" if n is None else str(n) for n in shape)
            raise Wrong(f"{path}: expected shape ({written}), got {given}")
        if data.id.get_create_plist().get_nfilters() or data.is_virtual or data.external or len(data.attrs):
            raise Wrong(f"{path}: expected plain numbers, got a dataset that is filtered, virtual, external or has attributes")
        if data.id.get_storage_size() < data.nbytes:
            raise Wrong(f"{path}: expected {data.nbytes} bytes, as its shape says, got {data.id.get_storage_size()}")
        for part in slices(data):
            if not (part >= least).all() or not (part < below).all() or dtype == "f8" and not np.isfinite(part).all():
                limits = "finite numbers" if dtype == "f8" else f"integers from {least:g} to {below - 1:g}"
                raise Wrong(f"{path}: expected {limits}, got others among them")
        return data

    def _attribute(self, name: str) -> Any:
        path = f"{self.name}/{name}"
        if name not in self._attributes:
            raise Wrong(f"{path}: expected an attribute, found none")
        self._attributes.discard(name)
        attribute = self._group.attrs.get_id(name)
        if attribute.shape != ():
            raise Wrong(f"{path}: expected one value, got shape {attribute.shape}")
        if attribute.dtype.kind == "O" and h5py.check_string_dtype(attribute.dtype) is None:
            raise Wrong(f"{path}: expected a text or a number, got an object")
        try:
            return self._group.attrs[name]
        except (OSError, ValueError, UnicodeDecodeError) as error:
            raise Wrong(f"{path}: cannot be read: {error}") from error

    def text(self, name: str) -> str:
        """An attribute that is text."""
        value = self._attribute(name)
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace")
        if not isinstance(value, str):
            raise Wrong(f"{self.name}/{name}: expected text, got {type(value).__name__}")
        return value

    def integer(self, name: str, least: int, most: int) -> int:
        """An attribute that is an integer from `least` to `most`, or a bool."""
        value = self._attribute(name)
        if not isinstance(value, (np.integer, np.bool_)) or not least <= value <= most:
            raise Wrong(f"{self.name}/{name}: expected an integer from {least} to {most}, got {str(value)[:40]}")
        return int(value)

    def names(self, name: str) -> dict[str, str]:
        """An attribute that is a pickled dictionary of names. Anything else in the pickle is refused before it is made."""
        value = self._attribute(name)
        try:
            found = _NamesOnly(io.BytesIO(value.tobytes())).load()
            if not (isinstance(found, dict) and all(isinstance(part, str) for pair in found.items() for part in pair)):
                raise pickle.UnpicklingError("it is another object")
        except Exception as error:  # whatever a damaged pickle raises
            raise Wrong(f"{self.name}/{name}: expected a pickled dictionary of names: {error}") from error
        return found

    def element(self, name: str) -> int:
        """The number of components of a finite element, of which an attribute has the name.

        The name is Python code, which Firedrake evaluates. Here it is parsed and compared with what elements look like.
        """
        text = self.text(name)
        try:
            if len(text) > 2000:
                raise ValueError("the text is too long")
            node = ast.parse(text, mode="eval").body
            components = 1
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "VectorElement":
                match node:
                    case ast.Call(args=[scalar], keywords=[ast.keyword(arg="dim", value=ast.Constant(value=int(components)))]):
                        node = scalar
                    case _:
                        raise ValueError("a VectorElement has one element and dim")
            _check_element(node)
            return components
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise Wrong(f"{self.name}/{name}: expected a finite element, got {text[:80]!r}: {error}") from error


class _NamesOnly(pickle.Unpickler):
    """An unpickler that makes dictionaries and strings, and refuses whatever names code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to an object outside of the file")


_ELEMENTS = {"FiniteElement", "TensorProductElement", "TensorProductCell", "EnrichedElement", "BrokenElement"}
_CELLS = {"interval", "triangle", "quadrilateral", "tetrahedron", "hexahedron"}


def _check_element(node: ast.AST) -> None:
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in _ELEMENTS:
            for part in (*node.args, *(keyword.value for keyword in node.keywords)):
                _check_element(part)
            if any(keyword.arg is None for keyword in node.keywords):
                raise ValueError("it has ** among its arguments")
        case ast.Name(id=name) if name in _CELLS:
            pass
        case ast.Constant(value=str() | None):
            pass
        case ast.Constant(value=int(degree)) if not isinstance(degree, bool) and 0 <= degree <= _HIGHEST_DEGREE:
            pass
        case _:
            raise ValueError(f"{ast.unparse(node)[:40]} is no part of an element")


def slices(data: h5py.Dataset) -> Iterator[np.ndarray]:
    """All entries of a dataset, some rows at a time."""
    if data.size:
        rows = max(1, _SLICE * data.shape[0] // data.size)
        for start in range(0, data.shape[0], rows):
            yield data[start : start + rows]


#: A new key in each process, so that nobody can make a file for it.
_KEY = np.random.SeedSequence().generate_state(2, np.uint64)


def _sum_of_hashes(numbers: np.ndarray) -> int:
    """The sum of the numbers' hashes (splitmix64), modulo 2^64."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + _KEY[0]
    x = (x ^ (x >> np.uint64(30)) ^ _KEY[1]) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))


def are_all(parts: Iterator[np.ndarray], size: int) -> bool:
    """Whether the parts together are the numbers 0 to size - 1, each once, in any order."""
    found = count = expected = 0
    for part in parts:
        found, count = found + _sum_of_hashes(part.ravel()), count + part.size
    for start in range(0, size, _SLICE):
        expected += _sum_of_hashes(np.arange(start, min(start + _SLICE, size)))
    return count == size and (found - expected) % (1 << 64) == 0
