"""The mesh and the functions in a file of Firedrake's CheckpointFile, checked before Firedrake reads them.

CheckpointFile trusts what it reads: it unpickles dictionaries, evaluates the names of elements as Python code, allocates
what a dataset declares, and hands indices to PETSc, which follows them wherever they point. So all of it is checked first, by
h5py on one rank.

A mesh is a DMPlex. Its points of dimension d are numbered stratum by stratum, and each has a cone of points of dimension
d - 1. A function space has a section, which says how many numbers each point has and where they begin. An extruded mesh
is a base mesh, of which each point occurs on several levels, and between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import h5py
import numpy as np

from fem_resnet.io.group import Group, Wrong, are_all, slices

__all__ = ["Values", "check_meshes"]


class Values(NamedTuple):
    """The numbers of a function in a file.

    Attributes
    ----------
    block_size : int
        How many numbers a node has.
    data : h5py.Dataset
        The numbers, of shape (nodes times block_size,).
    """

    block_size: int
    data: h5py.Dataset


#: Points whose cones have 0, 2, 3 and 4 points, which are vertices, edges, triangles and quadrilaterals: the least
#: orientation, and the first integer that is none.
_ORIENTATIONS = {0: (0, 1), 2: (-1, 1), 3: (-3, 3), 4: (-4, 4)}
#: Of which sizes the cones of points of dimensions 0 to 3 may be.
_CONE_SIZES = ({0}, {2}, {3, 4}, {4, 6})
#: How many entries of a section Python holds at a time.
_CHUNK = 1 << 20


class _Plex(NamedTuple):
    sizes: list[int]
    #: Where points of each dimension begin, in the numbering of all points.
    starts: list[int]

    @property
    def points(self) -> int:
        return sum(self.sizes)


class _Layers(NamedTuple):
    """How often an extruded mesh has each point of its base mesh: on levels, and stretched between two of them."""

    levels: int = 1
    between: int = 0


def check_meshes(root: Group, names: Iterable[str]) -> tuple[dict[str, Values], list[str]]:
    """Check the meshes of these names, and all functions on them.

    Parameters
    ----------
    root
        The file.
    names
        The names of the meshes, each once. They share nothing.

    Returns
    -------
    functions : dict of Values
        The functions of all meshes by their names.
    topologies : list of str
        The name of the DMPlex of each mesh.

    Raises
    ------
    Wrong
        The message begins with the field that is wrong.
    """
    if root.text("dmplex_storage_version") != "3.0.0":
        raise Wrong("/dmplex_storage_version: expected 3.0.0, got another version")
    root.text("petsc_version_git")
    functions: dict[str, Values] = {}
    plexes = []
    with root.group("topologies") as topologies:
        topology_names = topologies.names(_MAP)
        for name in names:
            if name not in topology_names:
                raise Wrong(f"{topologies.name}/{_MAP}: expected the mesh {name!r} in it, found none")
            found, plex = _check_one(topologies, name, topology_names[name], topology_names)
            if plex in plexes or not functions.keys().isdisjoint(found):
                raise Wrong(f"{topologies.name}/{_MAP}: expected meshes that share nothing, got {name!r} and another one")
            functions |= found
            plexes.append(plex)
    return functions, plexes


def _check_one(
    topologies: Group, name: str, topology_name: str, topology_names: Mapping[str, str]
) -> tuple[dict[str, Values], str]:
    """The functions of one mesh, and the name of its DMPlex."""
    with topologies.group(topology_name) as topology:
        if "firedrake_extruded" in topology:
            return _check_extruded(topology, topologies, name, topology_name, topology_names)
        plex = _check_base(topology)
        vectors = _check_sections(topology, plex, _Layers())
        return _check_mesh(topology, name, plex, vectors, of_functions=True), topology_name


_MAP = "firedrake_mesh_name_topology_name_map"


def _check_extruded(
    topology: Group, topologies: Group, name: str, topology_name: str, topology_names: Mapping[str, str]
) -> tuple[dict[str, Values], str]:
    layers, base_name = _check_extrusion(topology)
    if base_name == topology_name:
        raise Wrong(f"{topology.name}/firedrake_extruded/firedrake_extruded_base_mesh: expected another mesh, got itself")
    with topologies.group(base_name) as base:
        plex = _check_base(base)
        topology.same("topology", base)
        vectors = _check_sections(base, plex, _Layers())
        meshes = topology.again().group("firedrake_meshes")  # _check_mesh asks for the same fields later
        base_mesh = meshes.group(name).group("firedrake_extruded").text("firedrake_extruded_base_mesh")
        if topology_names.get(base_mesh) != base_name:
            raise Wrong(f"{topologies.name}/{_MAP}: expected {base_mesh!r} in it, with {base_name!r}")
        _check_mesh(base, base_mesh, plex, vectors, of_functions=False)
    vectors = _check_sections(topology, plex, layers, base=base_name)
    return _check_mesh(topology, name, plex, vectors, of_functions=True), base_name


def _check_extrusion(topology: Group) -> tuple[_Layers, str]:
    prefix = "firedrake_extruded_"
    with topology.group("firedrake_extruded") as group:
        base = group.text(f"{prefix}base_mesh")
        periodic = group.integer(f"{prefix}periodic", 0, 1)
        group.integer(f"{prefix}variable_layers", 0, 0)
        layers = group.integer(f"{prefix}layers", 2, 1 << 30)
    return _Layers(layers - periodic, layers - 1), base


# -- the DMPlex ------------------------------------------------------------------------------------------------------


def _check_base(topology: Group) -> _Plex:
    """Check a DMPlex and its labels."""
    with topology.group("topology") as group:
        dimension = group.integer("cell_dim", 1, 3)
        group.integer("depth", dimension, dimension)
        order = group.array("permutation", "i", (dimension + 1, 1), 0, dimension + 1)[:, 0]
        if sorted(order) != list(range(dimension + 1)):
            raise Wrong(f"{group.name}/permutation: expected the numbers 0 to {dimension}, each once")
        with group.group("strata") as strata:
            sizes = _check_cones(strata, dimension)
    starts = [0] * (dimension + 1)
    for before, after in zip(order, order[1:]):
        starts[after] = starts[before] + sizes[before]
    plex = _Plex(sizes, starts)
    _check_labels(topology, plex.points)
    return plex


def _check_cones(strata: Group, dimension: int) -> list[int]:
    """How many points of each dimension there are; all cones of a dimension have the same size."""
    sizes: list[int] = []
    faces = 0
    for d in range(dimension + 1):
        expected = _CONE_SIZES[d]
        with strata.group(str(d)) as stratum:
            cone_sizes = stratum.array("cone_sizes", "i", (None, 1), min(expected), max(expected) + 1)
            size, below = len(cone_sizes), sizes[-1] if sizes else 0
            cone = int(cone_sizes[0, 0]) if size else -1
            if cone not in expected or any((part != cone).any() for part in slices(cone_sizes)):
                raise Wrong(f"{stratum.name}/cone_sizes: expected all {' or all '.join(map(str, sorted(expected)))}")
            if d == 3 and (cone, faces) not in ((4, 3), (6, 4)):
                raise Wrong(f"{stratum.name}/cone_sizes: expected tetrahedra or hexahedra, got {cone} faces of {faces} edges")
            stratum.array("cones", "i", (size * cone, 1), 0, below)
            stratum.array("orientations", "i", (size * cone, 1), *_ORIENTATIONS[faces])
            sizes.append(size)
            faces = cone
    return sizes


def _check_labels(topology: Group, points: int) -> None:
    with topology.group("labels") as labels:
        for label in labels.left:
            with labels.group(label) as values:
                for value in values.left:
                    if not re.fullmatch(r"-?[0-9]{1,9}", value):
                        raise Wrong(f"{values.name}/{value}: expected an integer as the value of a label")
                    with values.group(value) as stratum:
                        stratum.array("indices", "i", (None, 1), 0, points)


# -- sections and vectors on them ------------------------------------------------------------------------------------


def _check_sections(topology: Group, plex: _Plex, layers: _Layers, base: str | None = None) -> dict[str, Values]:
    """Check all sections, and all vectors on them; the vectors by their names."""
    coordinates = None if base else (topology.text("coordinateDMName"), topology.text("coordinatesName"))
    vectors: dict[str, Values] = {}
    with topology.group("dms") as sections:
        for name in sections.left:
            with sections.group(name) as section:
                of_plex = coordinates is not None and name == coordinates[0]
                size, block = _check_section(section, name, plex, layers, of_plex)
                if "vecs" in section:  # without, its functions are held as those of another element, see _check_functions
                    with section.group("vecs") as group:
                        _check_vectors(group, size, block, vectors)
    if coordinates is not None and coordinates[1] not in vectors:
        raise Wrong(f"{topology.name}/coordinatesName: expected the name of a vector, got {coordinates[1]!r}")
    return vectors


def _check_vectors(group: Group, size: int, block: int | None, vectors: dict[str, Values]) -> None:
    """Add the vectors of one section, which have `size` numbers, to `vectors`."""
    for name in group.left:
        with group.group(name) as holder:
            block_size = holder.integer("blockSize", 1, 1 << 30)
            if block is not None and block_size != block:
                raise Wrong(f"{holder.name}/blockSize: expected {block}, got {block_size}")
            if size % block_size:
                raise Wrong(f"{holder.name}/blockSize: expected a divisor of {size}, got {block_size}")
            if name in vectors:
                raise Wrong(f"{holder.name}: expected one vector of this name, got two")
            vectors[name] = Values(block_size, holder.array(name, "f8", (size,)))


def _check_section(section: Group, name: str, plex: _Plex, layers: _Layers, of_plex: bool) -> tuple[int, int | None]:
    """How many numbers vectors on a section have, and their block size if the name of the section says it."""
    nodes, block = ([], None) if of_plex else _nodes_of(section, name, len(plex.sizes))
    order = section.array("order", "i", (None, 1) if of_plex else (plex.points, 1), 0, plex.points)
    if not of_plex and not are_all(slices(order), plex.points):
        raise Wrong(f"{section.name}/order: expected the numbers of all points, each once")
    points = len(order)
    with section.group("section") as group:
        for flag in ("hasConstraints", "includesConstraints"):
            group.integer(flag, 0, 0)
        fields = group.integer("numFields", 0, 1 if of_plex else 0)
        size, counts = _check_offsets(group, points)
        if block is not None:
            by_dimension = [block * (a * layers.levels + b * layers.between) for a, b in nodes]
            _check_counts(group.name, order, counts, plex, by_dimension)
        if fields:
            with group.group("field0") as field:
                for flag in ("hasConstraints", "includesConstraints"):
                    field.integer(flag, 0, 0)
                field.text("fieldName")
                if _check_offsets(field, points)[0] != size:
                    raise Wrong(f"{field.name}/atlasDof: expected {size} numbers in all")
                for component in range(field.integer("fieldComponents", 1, 64)):
                    with field.group(f"component{component}") as part:
                        part.text("componentName")
    return size, block


def _nodes_of(section: Group, name: str, strata: int) -> tuple[list[tuple[int, int]], int]:
    """What the name of a section says: the nodes on a point of each dimension, on levels and between; the block size."""
    match = re.fullmatch(r"firedrake_dm_(.+)_False_([0-9]{1,9})", name)
    nodes = []
    for part in match[1].split("_") if match else []:
        found = re.fullmatch(r"\(([0-9]{1,6}), ([0-9]{1,6})\)|([0-9]{1,6})", part)
        if found:
            nodes.append((int(found[1] or found[3]), int(found[2] or 0)))
    if match is None or len(nodes) != strata or len(match[1].split("_")) != strata:
        raise Wrong(f"{section.name}: expected the name of a space on a mesh of dimension {strata - 1}")
    return nodes, int(match[2])


def _check_offsets(group: Group, points: int) -> tuple[int, h5py.Dataset]:
    """Check that the numbers of all points fill a vector; its length, and how many numbers each point has."""
    counts = group.array("atlasDof", "i", (points, 1), 0, 1 << 30)
    size = sum(int(part.sum(dtype=np.int64)) for part in slices(counts))
    offsets = group.array("atlasOff", "i", (points, 1), 0, size + 1)

    def numbers() -> Iterator[np.ndarray]:
        for count, offset in zip(slices(counts), slices(offsets)):
            count, offset = count[:, 0].astype(np.int64), offset[:, 0].astype(np.int64)
            ends = np.cumsum(count)
            for start in range(0, int(ends[-1]), _CHUNK):
                index = np.arange(start, min(start + _CHUNK, int(ends[-1])))
                point = np.searchsorted(ends, index, side="right")
                yield offset[point] + index - (ends[point] - count[point])

    if not are_all(numbers(), size):
        raise Wrong(f"{group.name}/atlasOff: expected the numbers 0 to {size - 1}, each of one point")
    return size, counts


def _check_counts(name: str, order: h5py.Dataset, counts: h5py.Dataset, plex: _Plex, by_dimension: list[int]) -> None:
    """Check that each point has as many numbers as points of its dimension should have."""
    for number, count in zip(slices(order), slices(counts)):
        expected = np.zeros(len(number), dtype=np.int64)
        for start, size, numbers in zip(plex.starts, plex.sizes, by_dimension):
            expected[(number[:, 0] >= start) & (number[:, 0] < start + size)] = numbers
        if (count[:, 0] != expected).any():
            raise Wrong(f"{name}/atlasDof: expected {by_dimension} numbers on points of dimensions 0 to {len(plex.sizes) - 1}")


# -- the mesh and its functions --------------------------------------------------------------------------------------


def _check_mesh(
    topology: Group, name: str, plex: _Plex, vectors: Mapping[str, Values], of_functions: bool
) -> dict[str, Values]:
    """Check the one mesh of a topology, and its functions, if it has any; the functions by their names."""
    with topology.group("firedrake_meshes") as meshes, meshes.group(name) as mesh:
        _vector(mesh, "firedrake_coordinates", mesh.element("firedrake_coordinate_element_repr"), vectors)
        if mesh.has_attribute("firedrake_radial_coordinates"):
            mesh.text("firedrake_radial_coordinate_function")
            components = mesh.element("firedrake_radial_coordinate_element_repr")
            _vector(mesh, "firedrake_radial_coordinates", components, vectors)
        if "firedrake_immersed" in mesh:
            with mesh.group("firedrake_immersed") as immersed:
                immersed.text("firedrake_immersed_cell_orientations")
                immersed.array("firedrake_immersed_cell_orientations_iset", "i", (plex.sizes[-1], 1), 0, 2)
        if "firedrake_extruded" in mesh:
            with mesh.group("firedrake_extruded") as extruded:
                extruded.text("firedrake_extruded_base_mesh")
        return _check_functions(mesh, vectors) if of_functions else {}


def _vector(group: Group, key: str, components: int, vectors: Mapping[str, Values]) -> Values:
    """The vector that an attribute names."""
    found = group.text(key)
    if found not in vectors or vectors[found].block_size != components:
        raise Wrong(f"{group.name}/{key}: expected the name of a vector of {components} components, got {found[:80]!r}")
    return vectors[found]


def _check_functions(mesh: Group, vectors: Mapping[str, Values]) -> dict[str, Values]:
    functions: dict[str, Values] = {}
    # Firedrake stores functions of some elements as functions of others. By the name of the first one: the name of the second
    # one, and the number of components.
    embedded: dict[str, tuple[str, int]] = {}
    listed = "firedrake_function_name_function_space_name_map"
    spaces_of = mesh.names(listed)
    with mesh.group("firedrake_function_spaces") as spaces:
        for space_name in spaces.left:
            with spaces.group(space_name) as space:
                components = space.element("firedrake_ufl_element_repr")
                with space.group("firedrake_functions") as holders:
                    for function in holders.left:
                        if spaces_of.pop(function, None) != space_name:
                            raise Wrong(f"{holders.name}/{function}: expected a function that is listed for this space")
                        with holders.group(function) as holder:
                            if "firedrake_embedded" not in holder:
                                functions[function] = _vector(holder, "firedrake_vec", components, vectors)
                                continue
                            with holder.group("firedrake_embedded") as group:
                                embedded[function] = group.text("firedrake_embedded_function"), components
    for function, (other, components) in embedded.items():
        if other not in functions or functions[other].block_size != components:
            raise Wrong(f"{mesh.name}: expected a function {other!r} of {components} components, which holds {function!r}")
        functions[function] = functions.pop(other)
    if spaces_of:
        raise Wrong(f"{mesh.name}/{listed}: expected the function {min(spaces_of)!r}, which is listed, found none")
    return functions
