"""What a file of Firedrake's CheckpointFile may hold, looked at before Firedrake reads it.

CheckpointFile takes what it reads on trust: it unpickles dictionaries, evaluates the names of elements as Python, allocates
what a dataset declares, and hands indices to PETSc, which follows them wherever they point. So everything in a file is looked at
first, by h5py on one rank: each group, dataset and attribute is asked for by its place, with type, shape and range, and what
nobody asked for is refused. Datasets are read in slices. That indices are a permutation is told by the sum of their hashes
with a random key, which needs no room.

A mesh is a DMPlex: points of dimension d are numbered stratum by stratum, each has a cone of points of dimension d - 1. A function
space has a section, which says of each point how many numbers it has, and from where on they stand.
"""

from __future__ import annotations

import ast
import io
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import h5py
import numpy as np

__all__ = ["Group", "Wrong", "are_all", "check_meshes", "slices"]


class Wrong(ValueError):
    """A field of a file is not what it should be; the message begins with its name."""


#: Entries that are looked at at a time.
_SLICE = 1 << 20
#: Of the nodes of an element, which are tabulated when it is made.
_HIGHEST_DEGREE = 10


class Group:
    """A group of an HDF5 file, all of which is to be asked for: at the end of a ``with`` the rest is refused."""

    def __init__(self, group: h5py.Group, name: str = ""):
        self._group, self.name = group, name
        self._links, self._attributes = set(group), set(group.attrs)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind, *error) -> None:
        rest = sorted(self._links | self._attributes)
        if kind is None and rest:
            raise Wrong(f"{self.name}/{rest[0]}: nothing of this name is written there")

    def __contains__(self, name: str) -> bool:
        return name in self._group

    @property
    def left(self) -> list[str]:
        """Names of groups and datasets that nobody has asked for yet."""
        return sorted(self._links)

    def _member(self, name: str, kind: type, what: str) -> Any:
        path = f"{self.name}/{name}"
        if not isinstance(self._group.get(name, getlink=True), h5py.HardLink):
            raise Wrong(f"{path}: expected {what}, and is missing")
        member = self._group[name]
        if not isinstance(member, kind):
            raise Wrong(f"{path}: expected {what}, and is a {type(member).__name__.lower()}")
        self._links.discard(name)
        return member

    def group(self, name: str) -> Group:
        """A group in it."""
        return Group(self._member(name, h5py.Group, "a group"), f"{self.name}/{name}")

    def same(self, name: str, other: Group) -> None:
        """A group that is that of another group, by a second name."""
        if self._member(name, h5py.Group, "a group") != other._group[name]:
            raise Wrong(f"{self.name}/{name}: it should be {other.name}/{name}")

    def array(
        self, name: str, dtype: str, shape: tuple[int | None, ...], least: float = -np.inf, below: float = np.inf
    ) -> h5py.Dataset:
        """A dataset of float64 ("f8") or integers ("i") that has this shape and is in this range; not read as a whole."""
        path = f"{self.name}/{name}"
        data = self._member(name, h5py.Dataset, "a dataset")
        wanted = "integers" if dtype == "i" else "float64"
        if data.dtype not in ((np.int32, np.int64) if dtype == "i" else (np.float64,)):
            raise Wrong(f"{path}: expected {wanted}, and it has {data.dtype}")
        given = data.shape
        if given is None or len(given) != len(shape) or any(n not in (None, m) for n, m in zip(shape, given)):
            written = ", ".join("any" if n is None else str(n) for n in shape)
            raise Wrong(f"{path}: expected shape ({written}), and it has {given}")
        if data.id.get_create_plist().get_nfilters() or data.is_virtual or data.external or len(data.attrs):
            raise Wrong(f"{path}: expected plain numbers, and it is filtered, virtual, in another file or has attributes")
        if data.id.get_storage_size() < data.nbytes:
            raise Wrong(f"{path}: it declares {data.nbytes} bytes, and holds {data.id.get_storage_size()}")
        for part in slices(data):
            if not (part >= least).all() or not (part < below).all() or dtype == "f8" and not np.isfinite(part).all():
                limits = "finite numbers" if dtype == "f8" else f"integers from {least:g} to {below - 1:g}"
                raise Wrong(f"{path}: expected {limits}, and not all are")
        return data

    def _attribute(self, name: str) -> Any:
        path = f"{self.name}/{name}"
        if name not in self._attributes:
            raise Wrong(f"{path}: expected an attribute, and is missing")
        self._attributes.discard(name)
        attribute = self._group.attrs.get_id(name)
        if attribute.shape != ():
            raise Wrong(f"{path}: expected one value, and it has shape {attribute.shape}")
        if attribute.dtype.kind == "O" and h5py.check_string_dtype(attribute.dtype) is None:
            raise Wrong(f"{path}: expected a text or a number")
        try:
            return self._group.attrs[name]
        except (OSError, ValueError, UnicodeDecodeError) as error:
            raise Wrong(f"{path}: it cannot be read: {error}") from error

    def text(self, name: str) -> str:
        """An attribute that is text."""
        value = self._attribute(name)
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace")
        if not isinstance(value, str):
            raise Wrong(f"{self.name}/{name}: expected text, and it is {type(value).__name__}")
        return value

    def integer(self, name: str, least: int, most: int) -> int:
        """An attribute that is an integer, or a bool."""
        value = self._attribute(name)
        if not isinstance(value, (np.integer, np.bool_)) or not least <= value <= most:
            raise Wrong(f"{self.name}/{name}: expected an integer from {least} to {most}, and it is {str(value)[:40]}")
        return int(value)

    def names(self, name: str) -> dict[str, str]:
        """An attribute that is a pickled dictionary of names; nothing else is unpickled."""
        value = self._attribute(name)
        try:
            found = _Names(io.BytesIO(value.tobytes())).load()
            if not (isinstance(found, dict) and all(isinstance(part, str) for pair in found.items() for part in pair)):
                raise pickle.UnpicklingError("it is none")
        except Exception as error:  # whatever a damaged pickle raises
            raise Wrong(f"{self.name}/{name}: expected a pickled dictionary of names: {error}") from error
        return found

    def element(self, name: str) -> int:
        """An attribute that names a finite element, as Python would write it: its number of components. Nothing is evaluated."""
        text = self.text(name)
        try:
            if len(text) > 2000:
                raise ValueError("it is too long")
            node = ast.parse(text, mode="eval").body
            components = 1
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "VectorElement":
                match node:
                    case ast.Call(args=[scalar], keywords=[ast.keyword(arg="dim", value=ast.Constant(value=int(components)))]):
                        node = scalar
                    case _:
                        raise ValueError("a VectorElement has an element and a dim")
            _check_element(node)
            return components
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise Wrong(f"{self.name}/{name}: expected a finite element, and it is {text[:80]!r}: {error}") from error


class _Names(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to something outside")


_ELEMENTS = {"FiniteElement", "TensorProductElement", "TensorProductCell", "EnrichedElement", "BrokenElement"}
_CELLS = {"interval", "triangle", "quadrilateral", "tetrahedron", "hexahedron"}


def _check_element(node: ast.AST) -> None:
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in _ELEMENTS:
            for part in (*node.args, *(keyword.value for keyword in node.keywords)):
                _check_element(part)
            if any(keyword.arg is None for keyword in node.keywords):
                raise ValueError("it has other arguments")
        case ast.Name(id=name) if name in _CELLS:
            pass
        case ast.Constant(value=str() | None):
            pass
        case ast.Constant(value=int(degree)) if not isinstance(degree, bool) and 0 <= degree <= _HIGHEST_DEGREE:
            pass
        case _:
            raise ValueError(f"{ast.unparse(node)[:40]} is no part of one")


def slices(data: h5py.Dataset) -> Iterator[np.ndarray]:
    """All entries of a dataset, some rows at a time."""
    if data.size:
        rows = max(1, _SLICE * data.shape[0] // data.size)
        for start in range(0, data.shape[0], rows):
            yield data[start : start + rows]


#: Another one in each process, so that no file can be made for it.
_KEY = np.random.SeedSequence().generate_state(2, np.uint64)


def _hashes(numbers: np.ndarray) -> int:
    """The sum of their hashes (splitmix64), modulo 2^64."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + _KEY[0]
    x = (x ^ (x >> np.uint64(30)) ^ _KEY[1]) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))


def are_all(parts: Iterator[np.ndarray], size: int) -> bool:
    """Whether these are the numbers 0 to size - 1, each once, in any order."""
    found = count = expected = 0
    for part in parts:
        found, count = found + _hashes(part.ravel()), count + part.size
    for start in range(0, size, _SLICE):
        expected += _hashes(np.arange(start, min(start + _SLICE, size)))
    return count == size and (found - expected) % (1 << 64) == 0


# -- meshes ----------------------------------------------------------------------------------------------------------


#: From which to below which one the orientations go of points with a cone of so many: vertices, edges, triangles, quadrilaterals.
_ORIENTATIONS = {0: (0, 1), 2: (-1, 1), 3: (-3, 3), 4: (-4, 4)}


class _Plex(NamedTuple):
    sizes: list[int]
    #: Where points of each dimension begin, in the numbering of all points.
    starts: list[int]

    @property
    def points(self) -> int:
        return sum(self.sizes)


class _Layers(NamedTuple):
    """Of an extruded mesh: how often a point of the base mesh occurs as it is, and stretched over a layer."""

    levels: int = 1
    between: int = 0


def check_meshes(root: Group, name: str) -> tuple[dict[str, tuple[int, h5py.Dataset]], str]:
    """Look at the mesh of that name, and at all functions on it.

    Parameters
    ----------
    root
        The file.
    name
        Of the mesh.

    Returns
    -------
    functions : dict
        Of each function its block size and its numbers.
    topology : str
        The name of the DMPlex.

    Raises
    ------
    Wrong
        With the field that is wrong.
    """
    if root.text("dmplex_storage_version") != "3.0.0":
        raise Wrong("/dmplex_storage_version: expected 3.0.0")
    root.text("petsc_version_git")
    with root.group("topologies") as topologies:
        map_name = "firedrake_mesh_name_topology_name_map"
        of_mesh = topologies.names(map_name)
        if name not in of_mesh:
            raise Wrong(f"{topologies.name}/{map_name}: expected the mesh {name!r} in it")
        with topologies.group(of_mesh[name]) as topology:
            if "firedrake_extruded" not in topology:
                plex = _check_base(topology)
                vectors = _check_sections(topology, plex, _Layers())
                functions = _check_mesh(topology, name, plex, vectors, of_functions=True)
            else:
                layers, base_name = _check_extrusion(topology, topologies)
                if base_name == of_mesh[name]:
                    raise Wrong(f"{topology.name}/firedrake_extruded/firedrake_extruded_base_mesh: it is its own base")
                with topologies.group(base_name) as base:
                    plex = _check_base(base)
                    topology.same("topology", base)
                    vectors = _check_sections(base, plex, _Layers())
                    base_mesh = _base_mesh(topology, name)
                    if of_mesh.get(base_mesh) != base_name:
                        raise Wrong(f"{topologies.name}/{map_name}: expected {base_mesh!r} in it, with {base_name!r}")
                    _check_mesh(base, base_mesh, plex, vectors, of_functions=False)
                vectors = _check_sections(topology, plex, layers, base=base_name)
                functions = _check_mesh(topology, name, plex, vectors, of_functions=True)
                of_mesh[name] = base_name
    return functions, of_mesh[name]


def _base_mesh(topology: Group, name: str) -> str:
    again = Group(topology._group, topology.name)  # that has its own list of what was asked for
    return again.group("firedrake_meshes").group(name).group("firedrake_extruded").text("firedrake_extruded_base_mesh")


def _check_extrusion(topology: Group, topologies: Group) -> tuple[_Layers, str]:
    prefix = "firedrake_extruded_"
    with topology.group("firedrake_extruded") as group:
        base = group.text(f"{prefix}base_mesh")
        periodic = group.integer(f"{prefix}periodic", 0, 1)
        group.integer(f"{prefix}variable_layers", 0, 0)
        layers = group.integer(f"{prefix}layers", 2, 1 << 30)
    return _Layers(layers - periodic, layers - 1), base


def _check_base(topology: Group) -> _Plex:
    """A DMPlex, its labels, and the names of its coordinates."""
    with topology.group("topology") as group:
        dimension = group.integer("cell_dim", 1, 3)
        group.integer("depth", dimension, dimension)
        order = group.array("permutation", "i", (dimension + 1, 1), 0, dimension + 1)[:, 0]
        if sorted(order) != list(range(dimension + 1)):
            raise Wrong(f"{group.name}/permutation: expected the numbers 0 to {dimension}, each once")
        sizes, faces = [], 0
        with group.group("strata") as strata:
            for d in range(dimension + 1):
                with strata.group(str(d)) as stratum:
                    wanted = [{0}, {2}, {3, 4}, {4, 6}][d]
                    cone_sizes = stratum.array("cone_sizes", "i", (None, 1), min(wanted), max(wanted) + 1)
                    size, below = len(cone_sizes), sizes[-1] if sizes else 0
                    cone = int(cone_sizes[0, 0]) if size else -1
                    if cone not in wanted or any((part != cone).any() for part in slices(cone_sizes)):
                        raise Wrong(f"{stratum.name}/cone_sizes: expected all {' or all '.join(map(str, sorted(wanted)))}")
                    if d == 3 and (cone, faces) not in ((4, 3), (6, 4)):
                        raise Wrong(f"{stratum.name}/cone_sizes: {cone} faces of {faces} edges make no cell")
                    stratum.array("cones", "i", (size * cone, 1), 0, below)
                    stratum.array("orientations", "i", (size * cone, 1), *_ORIENTATIONS[faces])
                    sizes.append(size)
                    faces = cone
    starts = [0] * (dimension + 1)
    for before, after in zip(order, order[1:]):
        starts[after] = starts[before] + sizes[before]
    plex = _Plex(sizes, starts)
    with topology.group("labels") as labels:
        for label in labels.left:
            with labels.group(label) as values:
                for value in values.left:
                    if not re.fullmatch(r"-?[0-9]{1,9}", value):
                        raise Wrong(f"{values.name}/{value}: a label has values that are integers")
                    with values.group(value) as stratum:
                        stratum.array("indices", "i", (None, 1), 0, plex.points)
    return plex


def _check_sections(
    topology: Group, plex: _Plex, layers: _Layers, base: str | None = None
) -> dict[str, tuple[int, h5py.Dataset]]:
    """All sections, and all vectors on them: of each its block size and its numbers."""
    coordinates = None if base else (topology.text("coordinateDMName"), topology.text("coordinatesName"))
    vectors: dict[str, tuple[int, h5py.Dataset]] = {}
    with topology.group("dms") as sections:
        for name in sections.left:
            with sections.group(name) as section:
                of_plex = coordinates is not None and name == coordinates[0]
                size, block = _check_section(section, name, plex, layers, of_plex)
                if "vecs" not in section:  # functions of some elements are held as those of others, see _check_mesh
                    continue
                with section.group("vecs") as group:
                    for vector in group.left:
                        with group.group(vector) as holder:
                            block_size = holder.integer("blockSize", 1, 1 << 30)
                            if block is not None and block_size != block:
                                raise Wrong(f"{holder.name}/blockSize: expected {block}, and it is {block_size}")
                            if size % block_size:
                                raise Wrong(f"{holder.name}/blockSize: expected a divisor of {size}, and it is {block_size}")
                            if vector in vectors:
                                raise Wrong(f"{holder.name}: there are two vectors of this name")
                            vectors[vector] = block_size, holder.array(vector, "f8", (size,))
    if coordinates is not None and coordinates[1] not in vectors:
        raise Wrong(f"{topology.name}/coordinatesName: expected the name of a vector, and it is {coordinates[1]!r}")
    return vectors


def _check_section(section: Group, name: str, plex: _Plex, layers: _Layers, of_plex: bool) -> tuple[int, int | None]:
    """How long its vectors are, and their block size where its name says that."""
    numbers, block = ([], None) if of_plex else _numbers_of(section, name, len(plex.sizes))
    order = section.array("order", "i", (None, 1) if of_plex else (plex.points, 1), 0, plex.points)
    if not of_plex and not are_all(slices(order), plex.points):
        raise Wrong(f"{section.name}/order: expected the numbers of all points, each once")
    points = len(order)
    with section.group("section") as group:
        for flag in ("hasConstraints", "includesConstraints"):
            group.integer(flag, 0, 0)
        fields = group.integer("numFields", 0, 1 if of_plex else 0)
        size = _check_offsets(group, points)
        if not of_plex:
            _check_numbers(group, order, plex, [block * (a * layers.levels + b * layers.between) for a, b in numbers])
        if fields:
            with group.group("field0") as field:
                for flag in ("hasConstraints", "includesConstraints"):
                    field.integer(flag, 0, 0)
                field.text("fieldName")
                if _check_offsets(field, points) != size:
                    raise Wrong(f"{field.name}/atlasDof: expected {size} numbers in all")
                for component in range(field.integer("fieldComponents", 1, 64)):
                    with field.group(f"component{component}") as part:
                        part.text("componentName")
    return size, block


def _numbers_of(section: Group, name: str, strata: int) -> tuple[list[tuple[int, int]], int]:
    """By its name, how many nodes a section has on a point of each dimension: on its levels, and between them."""
    match = re.fullmatch(r"firedrake_dm_(.+)_False_([0-9]{1,9})", name)
    parts = (
        [re.fullmatch(r"\(([0-9]{1,6}), ([0-9]{1,6})\)|([0-9]{1,6})", part) for part in match[1].split("_")] if match else []
    )
    if len(parts) != strata or None in parts:
        raise Wrong(f"{section.name}: this is no name of a space on a mesh of dimension {strata - 1}")
    return [(int(part[1] or part[3]), int(part[2] or 0)) for part in parts], int(match[2])


def _check_offsets(group: Group, points: int) -> int:
    """That the numbers of all points fill a vector, which is as long as is returned."""
    counts = group.array("atlasDof", "i", (points, 1), 0, 1 << 30)
    size = sum(int(part.sum(dtype=np.int64)) for part in slices(counts))
    offsets = group.array("atlasOff", "i", (points, 1), 0, size + 1)

    def numbers() -> Iterator[np.ndarray]:
        for count, offset in zip(slices(counts), slices(offsets)):
            count, offset = count[:, 0].astype(np.int64), offset[:, 0].astype(np.int64)
            ends = np.cumsum(count)
            for start in range(0, int(ends[-1]), _SLICE):
                index = np.arange(start, min(start + _SLICE, int(ends[-1])))
                point = np.searchsorted(ends, index, side="right")
                yield offset[point] + index - (ends[point] - count[point])

    if not are_all(numbers(), size):
        raise Wrong(f"{group.name}/atlasOff: expected the numbers 0 to {size - 1}, each of one point")
    return size


def _check_numbers(group: Group, order: h5py.Dataset, plex: _Plex, wanted: list[int]) -> None:
    """That points of each dimension have as many numbers as they should."""
    for number, count in zip(slices(order), slices(group._group["atlasDof"])):
        right = np.zeros(len(number), dtype=np.int64)
        for start, size, numbers in zip(plex.starts, plex.sizes, wanted):
            right[(number[:, 0] >= start) & (number[:, 0] < start + size)] = numbers
        if (count[:, 0] != right).any():
            raise Wrong(f"{group.name}/atlasDof: expected {wanted} numbers a point of each dimension")


def _check_mesh(
    topology: Group, name: str, plex: _Plex, vectors: Mapping[str, tuple[int, h5py.Dataset]], of_functions: bool
) -> dict[str, tuple[int, h5py.Dataset]]:
    """The one mesh of a topology, and its functions: of each its block size and its numbers."""
    functions: dict[str, tuple[int, h5py.Dataset]] = {}
    #: Functions of elements that Firedrake embeds in others: by name, the name of the other one, and the number of components.
    embedded: dict[str, tuple[str, int]] = {}

    def vector(group: Group, key: str, components: int) -> tuple[int, h5py.Dataset]:
        found = group.text(key)
        if found not in vectors or vectors[found][0] != components:
            raise Wrong(
                f"{group.name}/{key}: expected the name of a vector of {components} components, and it is {found[:80]!r}"
            )
        return vectors[found]

    with topology.group("firedrake_meshes") as meshes, meshes.group(name) as mesh:
        vector(mesh, "firedrake_coordinates", mesh.element("firedrake_coordinate_element_repr"))
        if "firedrake_radial_coordinates" in mesh._group.attrs:
            mesh.text("firedrake_radial_coordinate_function")
            vector(mesh, "firedrake_radial_coordinates", mesh.element("firedrake_radial_coordinate_element_repr"))
        if "firedrake_immersed" in mesh:
            with mesh.group("firedrake_immersed") as immersed:
                immersed.text("firedrake_immersed_cell_orientations")
                immersed.array("firedrake_immersed_cell_orientations_iset", "i", (plex.sizes[-1], 1), 0, 2)
        if "firedrake_extruded" in mesh:
            with mesh.group("firedrake_extruded") as extruded:
                extruded.text("firedrake_extruded_base_mesh")
        if of_functions:
            listed = "firedrake_function_name_function_space_name_map"
            spaces_of = mesh.names(listed)
            with mesh.group("firedrake_function_spaces") as spaces:
                for space_name in spaces.left:
                    with spaces.group(space_name) as space:
                        components = space.element("firedrake_ufl_element_repr")
                        with space.group("firedrake_functions") as holders:
                            for function in holders.left:
                                if spaces_of.pop(function, None) != space_name:
                                    raise Wrong(f"{holders.name}/{function}: it is not listed as a function of this space")
                                with holders.group(function) as holder:
                                    if "firedrake_embedded" not in holder:
                                        functions[function] = vector(holder, "firedrake_vec", components)
                                        continue
                                    with holder.group("firedrake_embedded") as group:
                                        embedded[function] = group.text("firedrake_embedded_function"), components
            for function, (other, components) in embedded.items():
                if other not in functions or functions[other][0] != components:
                    raise Wrong(f"{mesh.name}: expected {other!r}, that holds {function!r} with {components} components")
                functions[function] = functions.pop(other)
            if spaces_of:
                raise Wrong(f"{mesh.name}/{listed}: it lists {min(spaces_of)!r}, which is missing")
    return functions
