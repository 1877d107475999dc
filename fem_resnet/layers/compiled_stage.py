"""The stage of a layer as compiled loops: `stage.c` with the formulas of an activation, instead of `Stage`'s NumPy.

Compiled are the value of a stage, its transpose and the quadrature (3.3). Tangents, second derivatives, the Jacobian and
functionals in learned factors come from `Stage`. Both ways give the same numbers up to round-off.

The environment variable FEM_RESNET_COMPILED=0 switches compiled code off. If there is no C compiler, or if C cannot evaluate
the activation, a warning is logged once and NumPy is used. All ranks do the same: the environment of rank 0 counts, since many
launchers do not pass it on to other machines, and if one rank cannot load the compiled code then no rank uses it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Iterator
from importlib.resources import files
from weakref import WeakKeyDictionary

import numpy as np
from petsc4py import PETSc
from petsctools import get_petsc_dirs
from pyop2.exceptions import CompilationError

from fem_resnet.activation.activation import Activation
from fem_resnet.activation.code import activation_code
from fem_resnet.arguments import choice
from fem_resnet.compiler import layout, library
from fem_resnet.label_domain.basis import Basis, spread_columns
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.channel_stage import ChannelStage
from fem_resnet.layers.stage import Argument, Functionals, Stage
from fem_resnet.log import log
from fem_resnet.ranks import on_first

__all__ = ["CompiledStage", "LayerStruct", "Outcome", "address", "new_stage"]

# PyOP2's own flags have -ffast-math, under which a NaN is not noticed.
_FLAGS = ("-fno-fast-math", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
_SINGLE = ("-fsingle-precision-constant",)
_BY_MACHINE = {"x86_64": ("-mprefer-vector-width=512",)}

#: From this number of samples on, the samples of a node fill a page of memory. A processor does not prefetch across pages, so
#: that f and lambda are then packed chunk by chunk.
_PACKED_SAMPLES = 512


_pointer = ctypes.c_void_p


class _Basis(ctypes.Structure):
    _fields_ = [("values", _pointer), ("rank", ctypes.c_long), ("stride", ctypes.c_long)]


class _LabelSpace(ctypes.Structure):
    _fields_ = [("nodes", ctypes.c_long), ("samples", ctypes.c_long), ("weights", _pointer), ("packed", ctypes.c_long)]


class LayerStruct(ctypes.Structure):
    """`struct layer` of `layer.c`, where the fields are explained."""

    _fields_ = [
        *((name, _pointer) for name in ("Y", "phi", "psi", "a", "beta", "lambda_", "f", "weights", "C", "D")),
        *((name, _pointer) for name in ("bias", "by_beta", "stages", "lengths")), ("length", ctypes.c_double),
        *((name, _pointer) for name in ("ts", "y", "adjoint", "parameters", "point")),
        *((name, ctypes.c_long) for name in ("method_stages", "reuses", "step", "steps", "replays", "max_steps", "asked")),
        ("reductions", ctypes.c_long), ("comm", ctypes.c_int),
    ]  # fmt: skip


class Outcome(ctypes.Structure):
    """How a solve of several layers ended: `struct outcome` of `layer.c`."""

    _fields_ = [("layer", ctypes.c_long), ("reason", ctypes.c_long), ("finite", ctypes.c_long)]


_STRUCTS = {"basis": _Basis, "label_space": _LabelSpace, "layer": LayerStruct, "outcome": Outcome}
_AT = "const struct label_space *, const struct basis *, const struct basis *, const REAL *, const double *, long, double"
_PROTOTYPES = (
    "int nodes_are_innermost(const struct label_space *)",
    "long chunk(void)",
    f"int rate({_AT}, double *, long, double *, double *, double)",
    f"int transpose({_AT}, const double *, long, const REAL *, double *, double *, double, double *)",
    "PetscErrorCode layer_attach(struct layer *, Mat, Mat)",
    "PetscErrorCode layers_forward(struct layer **, long, double *, long, struct outcome *)",
    "PetscErrorCode layers_adjoint(struct layer **, long, double *, struct outcome *)",
)

_warned: set[str] = set()


def new_stage(Y: LabelSpace, activation: Activation, samples: int, precision: str = "double") -> Stage:
    """Stage evaluations, compiled where that is possible and not switched off. Collective.

    Parameters
    ----------
    Y, activation, samples, precision
        As for `Stage`.

    Raises
    ------
    ValueError
        If FEM_RESNET_COMPILED is neither 0 nor 1.
    """
    if isinstance(Y, Channels):
        return ChannelStage(_of_one, Y, activation, samples, precision)
    return _of_one(Y, activation, samples, precision)


def _of_one(Y: LabelSpace, activation: Activation, samples: int, precision: str) -> Stage:
    """A stage that does not see channels. Collective."""
    if on_first(Y.comm, _switched_on):
        try:
            return CompiledStage(Y, activation, samples, precision)
        except (CompilationError, OSError, ValueError) as error:
            if str(error) not in _warned:
                _warned.add(str(error))
                log(Y.comm, logging.WARNING, "layers are not compiled; NumPy runs them, which is slower: %s", error)
    return Stage(Y, activation, samples, precision)


def _switched_on() -> bool:
    return choice("FEM_RESNET_COMPILED", os.environ.get("FEM_RESNET_COMPILED", "1"), ("0", "1")) == "1"


class CompiledStage(Stage[Argument]):
    """The stage of a layer by compiled loops. Collective over the communicator of the label domain.

    Parameters
    ----------
    Y, activation, samples, precision
        As for `Stage`.

    Raises
    ------
    pyop2.exceptions.CompilationError, OSError
        If there is no compiler, if it fails, or if the library cannot be written or loaded; on all ranks alike.
    ValueError
        If C cannot evaluate the activation.
    """

    def __init__(self, Y: LabelSpace, activation: Activation, samples: int, precision: str = "double"):
        super().__init__(Y, activation, samples, precision)
        flags = _FLAGS + (() if precision == "double" else _SINGLE) + _BY_MACHINE.get(platform.machine(), ())
        flags += get_petsc_dirs(prefix="-I", subdir="include")
        libraries = (
            "-lm",
            *get_petsc_dirs(prefix="-L", subdir="lib"),
            "-lpetsc",
            *get_petsc_dirs(prefix="-Wl,-rpath,", subdir="lib"),
        )
        self._code = library(Y.comm, lambda: self._text(activation), flags, libraries, _PROTOTYPES)
        self._weights = np.asarray(Y.weights, self.real)
        self._plain, self._packed = (_LabelSpace(Y.nodes, samples, address(self._weights), packed) for packed in (0, 1))
        self._chunk = self._code.chunk()
        self._order = "F" if self._code.nodes_are_innermost(self.space) else "C"
        self._bases: WeakKeyDictionary[Basis, tuple[_Basis, np.ndarray]] = WeakKeyDictionary()

    def _text(self, activation: Activation) -> str:
        real = "double" if self.real == np.float64 else "float"
        return "\n".join([activation_code(activation, real), _source(), layout(**_STRUCTS), _petsc_of_python()])

    def basis(self, basis: Basis) -> int:
        """Address of the C struct of a basis, valid as long as the basis lives."""
        if basis not in self._bases:
            values = basis.values if self.real == basis.values.dtype else spread_columns(basis.values, self.real)
            self._bases[basis] = _Basis(address(values), basis.rank, values.strides[1] // values.itemsize), values
        return ctypes.addressof(self._bases[basis][0])

    @property
    def space(self) -> int:
        """Address of the C struct of the label domain."""
        return ctypes.addressof(self._plain)

    @property
    def packed_space(self) -> int:
        """Address of the C struct of the label domain for stages whose f and lambda are packed by `pack`."""
        return ctypes.addressof(self._packed if self.samples >= _PACKED_SAMPLES else self._plain)

    def pack(self, field: np.ndarray) -> np.ndarray:
        """An array in the order of memory in which many stages go over it fastest.

        Parameters
        ----------
        field
            Shape (nodes, samples).

        Returns
        -------
        numpy.ndarray
            With few samples the array itself; else a copy with one chunk of samples after the other, shape (nodes x samples,).
        """
        if self.samples < _PACKED_SAMPLES:
            return field
        packed = np.empty(field.size, field.dtype)
        for samples, part in self._chunks(packed):
            part[...] = field[:, samples]
        return packed

    def unpack(self, packed: np.ndarray, field: np.ndarray) -> None:
        """Write the result of `pack`, shape (nodes x samples,), back into the array of shape (nodes, samples) it came from."""
        if packed is not field:
            for samples, part in self._chunks(packed):
                field[:, samples] = part

    def _chunks(self, packed: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """The samples of each chunk, and their part of a packed array, shape (nodes, samples of the chunk)."""
        for first in range(0, self.samples, self._chunk):
            samples = slice(first, min(first + self._chunk, self.samples))
            yield (
                samples,
                packed[first * self.Y.nodes : samples.stop * self.Y.nodes].reshape(self.Y.nodes, samples.stop - first),
            )

    def call(self, name: str, *arguments) -> None:
        """Call a function of `layer.c`, which returns an error code of PETSc.

        Raises
        ------
        petsc4py.PETSc.Error
            If the code is not 0.
        """
        if code := getattr(self._code, name)(*arguments):
            raise PETSc.Error(code)

    def _call(self, name: str, *arguments) -> None:
        """Call a function of `stage.c`, which returns 1 without memory."""
        if getattr(self._code, name)(self.space, *arguments):
            raise MemoryError(f"{name} of a stage: no memory for its sums")

    def arranged(self, by_f):
        return np.asarray(by_f, self.real, order=self._order)

    def rate(self, at, out=None):
        if len(at.a) > 1 or out is not None and not out[0].flags.c_contiguous:
            return super().rate(at, out)
        Q = np.empty((at.factors.psi.rank, self.samples), order="F")
        self._rate(at, Q, None if out is None else out[0], None, 0.0)
        return [self.Y.sum(Q)]

    def _rate(self, at: Argument, Q: np.ndarray | None, s: np.ndarray | None, f: np.ndarray | None, weight: float) -> None:
        a, C = np.ascontiguousarray(at.a[0], self.real), np.asfortranarray(at.C[0])
        self._call(
            "rate", self.basis(at.factors.phi), self.basis(at.factors.psi), address(a), address(C), len(C),
            at.length[0], address(Q), at.factors.psi.rank, address(s), address(f), weight,
        )  # fmt: skip

    def transpose(self, at, by_s, with_length=False, with_factors=False):
        if len(at.a) > 1 or with_factors:
            return super().transpose(at, by_s, with_length, with_factors)
        phi, psi = at.factors.phi, at.factors.psi
        a, C = np.ascontiguousarray(at.a[0], self.real), np.asfortranarray(at.C[0])
        x = np.empty((psi.rank + 1, self.samples), order="F")
        x[:-1], x[-1] = by_s.x[0], 0.0 if by_s.x_q is None else by_s.x_q
        by_f = None if by_s.x_q is None else self.arranged(by_s.by_f[0])
        D, bias, length = np.empty((phi.rank, self.samples), order="F"), np.zeros(self.Y.nodes), np.zeros(1)
        self._call(
            "transpose", self.basis(phi), self.basis(psi), address(a), address(C), len(C), at.length[0],
            address(x), len(x), address(by_f), address(D), address(bias), 1.0, address(length) if with_length else None,
        )  # fmt: skip
        return Functionals([self.Y.sum(D)], bias, float(self.Y.sum(length)[0]) if with_length else 0.0)

    def advance(self, f, stages):
        if len(f) > 1:
            return super().advance(f, stages)
        result = np.array(f[0], order="C")
        for stage in stages:
            self._rate(stage.argument, None, None, result, stage.weight)
        return [result]


def _source() -> str:
    return "\n".join((files("fem_resnet") / name).read_text() for name in ("layers/stage.c", "time_stepping/layer.c"))


def _petsc_of_python() -> str:
    """C code that compiles only with the headers of the PETSc that Python has loaded."""
    version = ", ".join(map(str, PETSc.Sys.getVersion()))
    claim = f"PETSC_VERSION_EQ({version}) && sizeof(PetscInt) == {np.dtype(PETSc.IntType).itemsize}"
    return f'_Static_assert({claim}, "PETSc has the headers of the version that Python has loaded");'


def address(array: np.ndarray | None) -> int | None:
    """The address at which an array begins, or None for None; `array.ctypes` would take three times as long."""
    return None if array is None else array.__array_interface__["data"][0]
