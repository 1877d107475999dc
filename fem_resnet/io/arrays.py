"""The arrays and functions that belong to the settings of a file, with the shapes that follow from its bases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from fem_resnet.io.group import Group, Wrong, are_all, slices
from fem_resnet.io.meshes import Values
from fem_resnet.io.settings import GROUP
from fem_resnet.parameters.kernel_sets import KernelSet
from fem_resnet.parameters.known_kernel_sets import ARRAYS, kernel_set_from
from fem_resnet.parameters.subspace import ELEMENTS, from_arrays
from fem_resnet.parameters.time_basis import get_time_basis

__all__ = ["GRAPH", "OUTPUT", "check_arrays", "of_laplace"]

#: With this begin the names of what belongs to the label space of a head's output, where that is another one.
OUTPUT = "output_"
#: The arrays of a graph, a sparse matrix by rows.
GRAPH = ("data", "indices", "indptr")
#: How many entries the matrix of cell indicators may have, where no kernel of the file has as many coefficients.
_MOST_INDICATORS = 1 << 27


def of_laplace(basis: str) -> tuple[str, str]:
    """The names of the eigenvalues and the stiffness of a basis, from the name of its functions."""
    return basis.replace("basis", "eigenvalues"), basis.replace("basis", "stiffness")


def check_arrays(group: Group, settings: Mapping[str, Any], functions: Mapping[str, Values]) -> None:
    """Check that a file holds the arrays and functions that its settings ask for, and no others.

    Parameters
    ----------
    group
        The arrays.
    settings
        From `checked_settings`.
    functions
        From `check_meshes`.

    Raises
    ------
    Wrong
        The message begins with the field that is wrong.
    """
    of_output = {name: values for name, values in functions.items() if name.startswith(OUTPUT)}
    held = _Functions({name: functions[name] for name in functions if name not in of_output}, settings["channels"] or 1)
    _check_label_space(group, held)
    ranks = _check_bases(group, settings, held)
    output = settings["output"] and _check_output(group, settings["output"], of_output)
    if of_output and not output:
        raise Wrong(f"/{GROUP}: expected no function {min(of_output)!r}, since no head leads onto another label space")
    among = _kernel_set(group, settings["network"]["kernel_set"])
    for k, active in enumerate(_active_bases(settings, "bias")):
        if active["bias"] is None:
            held.take(f"bias_{k}", 1)
        else:
            group.array(f"bias_{k}", "f8", (ranks[active["bias"]],))
    for k, active in enumerate(_active_bases(settings, "kernel")):
        shape = ranks[active["phi"]], ranks[active["psi"]]
        if among is None:
            group.array(f"kernel_{k}", "f8", shape)
        else:
            try:
                expected = among.shape(*shape)
            except ValueError as error:
                raise Wrong(f"/{GROUP}/settings/{error}") from error
            group.array(f"kernel_controls_{k}", "f8", expected)
    network, roles, head = settings["network"], settings["roles"], settings["head"]
    if network["learn_times"]:
        group.array("layer_times_0", "f8", (len(network["times"]) - 1,))
    if network["learn_factors"]:
        for name in ("phi", "psi"):
            held.take(f"{name}_0", ranks[roles[name][0]])
    if head is not None:
        outputs = head["classes"] or output or ranks[roles["onto"][0]] // (held.channels if head["one_channel"] else 1)
        _check_head(group, head["kept"], {"W": (outputs, ranks[roles["head"][0]]), "mu": (outputs,)})
    if settings["lift"] is not None:
        shape = held.channels, settings["lift"]["fields"]
        group.array("V_0", "f8", shape)
        if not group.array("V_allowed", "i", shape, 0, 2)[...].any(axis=0).all():
            raise Wrong(f"{group.name}/V_allowed: expected a channel for each field, got a field that none takes")
    held.refuse_rest()


def _check_output(group: Group, given: Mapping[str, Any], functions: Mapping[str, Values]) -> int:
    """Check the label space and the basis of a head's output; the rank of the basis."""
    held = _Functions(functions, given["channels"] or 1, OUTPUT)
    _check_label_space(group, held)
    rank = _check_basis(group, held, f"{OUTPUT}basis", given["kind"], given["repeated"])
    if given["kind"] == "cells" and held.nodes**2 > _MOST_INDICATORS:
        raise Wrong(f"/{GROUP}/settings/output: expected fewer than {held.nodes} cells, each with its indicator")
    held.refuse_rest()
    return rank


def _check_head(group: Group, kept: Mapping[str, int] | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check W and mu, and what symmetries leave free of them."""
    for name, shape in shapes.items():
        if kept is None:
            group.array(f"{name}_0", "f8", shape)
            continue
        if not kept[name]:
            continue
        arrays = {each: group.array(f"{name}_{each}", kind, (None,))[...] for each, kind in ELEMENTS.items()}
        try:
            from_arrays(math.prod(shape), kept[name], arrays)
        except (TypeError, ValueError) as error:
            raise Wrong(f"{group.name}/{name}_{error}") from error
        group.array(f"{name}_0", "f8", (kept[name],))


def _kernel_set(group: Group, description: Mapping[str, Any] | None) -> KernelSet | None:
    """The set of kernels, of its description and its arrays."""
    names = ARRAYS.get((description or {}).get("set", ""), {})
    arrays = {name: group.array(f"kernel_set_{name}", kind, (None,))[...] for name, kind in names.items()}
    try:
        return kernel_set_from(description, arrays)
    except (TypeError, ValueError, KeyError) as error:
        raise Wrong(f"{group.name}/kernel_set: it is none: {error}") from error


class _Functions:
    """The functions of a file, of which each is to be asked for once."""

    def __init__(self, functions: Mapping[str, Values], channels: int, prefix: str = ""):
        self.channels, self.prefix = channels, prefix
        self._left = dict(functions)
        self.places = self._pop(f"{prefix}label_space").data
        self.nodes = self.places.size

    def _pop(self, name: str) -> Values:
        if name not in self._left:
            raise Wrong(f"/{GROUP}: expected the function {name!r}, found none")
        return self._left.pop(name)

    def take(self, name: str, numbers: int | None = None, repeated: bool = False) -> int:
        """How many numbers a function has at each node of a channel, of all channels unless it is `repeated`."""
        block_size, data = self._pop(name)
        channels = 1 if repeated else self.channels
        expected = block_size if numbers is None else numbers * channels
        if block_size != expected or block_size % channels or data.size != block_size * self.nodes:
            raise Wrong(
                f"{data.name}: expected {expected} numbers at each of {self.nodes} nodes, of {channels} channels, got "
                f"{data.size} in all"
            )
        return block_size // channels

    def refuse_rest(self) -> None:
        if self._left:
            raise Wrong(f"/{GROUP}: expected no function {min(self._left)!r}; the settings ask for none of this name")


def _check_label_space(group: Group, held: _Functions) -> None:
    """Check the numbers of the points, and their graph."""
    are_points = _are_points(held.places)
    names = [f"{held.prefix}graph_{name}" for name in GRAPH]
    if any(name in group for name in names):
        if not are_points:
            raise Wrong(f"{group.name}/{names[0]}: expected a graph of numbered points, got one of a mesh")
        _check_graph(group, names, held.nodes)


def _are_points(places: h5py.Dataset) -> bool:
    """Whether nodes have numbers, which are then 0, 1, 2, ..., each once; otherwise all numbers are -1."""
    if all((part < -0.5).all() for part in slices(places)):  # -1, or what a projection makes of it
        return False
    whole = all((part == np.rint(part)).all() and part.min() >= 0 for part in slices(places))
    if not (whole and are_all(slices(places), places.size)):
        raise Wrong(f"{places.name}: expected the numbers of all points, each once, or -1 everywhere")
    return True


def _check_graph(group: Group, names: Sequence[str], nodes: int) -> None:
    data, indices, indptr = names
    entries = group.array(data, "f8", (None,), 0.0).size
    group.array(indices, "i", (entries,), 0, nodes)
    starts = group.array(indptr, "i", (nodes + 1,), 0, entries + 1)
    last = 0
    for part in slices(starts):
        if part[0] < last or (np.diff(part) < 0).any():
            raise Wrong(f"{starts.name}: expected numbers that do not fall")
        last = part[-1]
    if starts[0] != 0 or last != entries:
        raise Wrong(f"{starts.name}: expected numbers from 0 to {entries}, got {starts[0]} to {last}")


def _check_bases(group: Group, settings: Mapping[str, Any], held: _Functions) -> list[int]:
    """The ranks of all bases."""
    ranks = [
        _check_basis(group, held, f"basis_{position}", kind, repeated)
        for position, (kind, repeated) in enumerate(zip(settings["kinds"], settings["repeated"]))
    ]
    if "cells" in settings["kinds"] and held.nodes**2 > _MOST_INDICATORS:
        cells = settings["kinds"].index("cells")
        if cells not in settings["roles"]["phi"] or cells not in settings["roles"]["psi"]:
            raise Wrong(f"/{GROUP}/settings/kinds: expected indicators of {held.nodes} cells in a kernel, got them elsewhere")
    return ranks


def _check_basis(group: Group, held: _Functions, name: str, kind: str, repeated: bool) -> int:
    """The rank of a basis."""
    rank = held.nodes if kind == "cells" else held.take(name, repeated=repeated)
    eigenvalues, stiffness = of_laplace(name)
    if eigenvalues in group or stiffness in group:
        group.array(eigenvalues, "f8", (rank,))
        group.array(stiffness, "f8", (rank, rank))
    return rank * held.channels if repeated or kind == "cells" else rank


def _active_bases(settings: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """For each function in time of the bias or the kernel, the bases by their roles on the layers where it is active."""
    network, roles = settings["network"], settings["roles"]
    times = get_time_basis(network[f"{name}_in_time"], network["times"])
    first_layer: dict[int, int] = {}
    for layer in range(len(network["times"]) - 1):
        for k in times.active(layer):
            first_layer.setdefault(k, layer)
    return [
        {role: of[first_layer.get(k, 0) if len(of) > 1 else 0] for role, of in roles.items()}
        for k in range(len(times.measures))
    ]
