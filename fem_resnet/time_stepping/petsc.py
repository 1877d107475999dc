"""What petsc4py does not have: a few functions of PETSc, called through ctypes, and a matrix known by its transpose."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from petsc4py import PETSc

__all__ = [
    "adapt_type", "keep_trajectory_in_memory", "never_adapt", "on_pre_stage", "register_rk", "rk_tableau", "shell",
    "stage_values", "take_function_lower_bound", "weakly",
]  # fmt: skip

_Int = np.ctypeslib.as_ctypes_type(PETSc.IntType)


@cache
def _petsc() -> ctypes.CDLL:
    # Symbols are looked up in the libraries that petsc4py's own is linked to.
    return ctypes.CDLL(PETSc.__file__)


def _call(name: str, *arguments) -> None:
    code = getattr(_petsc(), name)(*arguments)
    if code:
        raise PETSc.Error(code)


def keep_trajectory_in_memory(ts: PETSc.TS) -> None:
    """Keep the trajectory of the next solve in memory.

    By its own options it goes to files, one a step; it does not inherit the prefix of the TS.
    """
    handle, trajectory = ctypes.c_void_p(ts.handle), ctypes.c_void_p()
    _call("TSGetTrajectory", handle, ctypes.byref(trajectory))
    _call("TSTrajectorySetType", trajectory, handle, b"memory")


def rk_tableau(ts: PETSc.TS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrix A_ij, weights b_i and nodes c_i of the Runge-Kutta method."""
    stages, order, fsal = _Int(), _Int(), ctypes.c_int()
    A, b, c, embedded, dense = (ctypes.POINTER(ctypes.c_double)() for _ in range(5))
    _call(
        "TSRKGetTableau", ctypes.c_void_p(ts.handle),
        *map(ctypes.byref, (stages, A, b, c, embedded, order, dense, fsal)),
    )  # fmt: skip
    s = stages.value
    return np.array(A[: s * s]).reshape(s, s), np.array(b[:s]), np.array(c[:s])


@cache
def register_rk(name: str, A: tuple[tuple[float, ...], ...], b: tuple[float, ...], c: tuple[float, ...]) -> str:
    """Make an explicit Runge-Kutta method known to PETSc under the name, as a `ts_rk_type`; returns the name."""

    def reals(values):
        values = np.ravel(values).astype(float)
        return (ctypes.c_double * values.size)(*values)

    # Neither embedded method nor interpolant; PETSc copies all it is given.
    _call("TSRKRegister", name.encode(), _Int(1), _Int(len(b)), reals(A), reals(b), reals(c), None, _Int(0), None)
    return name


def _adapt(ts: PETSc.TS) -> ctypes.c_void_p:
    adapt = ctypes.c_void_p()
    _call("TSGetAdapt", ctypes.c_void_p(ts.handle), ctypes.byref(adapt))
    return adapt


def adapt_type(ts: PETSc.TS) -> str:
    """Name of the rule that adapts the steps."""
    name = ctypes.c_char_p()
    _call("TSAdaptGetType", _adapt(ts), ctypes.byref(name))
    return name.value.decode()


def never_adapt(ts: PETSc.TS) -> None:
    """Accept every step from now on, and leave the step sizes alone."""
    _call("TSAdaptSetType", _adapt(ts), b"none")


_PreStage = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_double)


def on_pre_stage(ts: PETSc.TS, callback: Callable[[], None]) -> object:
    """Call back before every stage of a step, and of a step that is tried again; what is returned must live as long as the TS."""

    def call(handle, time):
        callback()
        return 0

    function = _PreStage(call)
    _call("TSSetPreStage", ctypes.c_void_p(ts.handle), function)
    return function


def stage_values(ts: PETSc.TS, size: int) -> Iterator[np.ndarray]:
    """The stage values of the step that was just made, one after the other."""
    count, vectors = _Int(), ctypes.POINTER(ctypes.c_void_p)()
    _call("TSGetStages", ctypes.c_void_p(ts.handle), ctypes.byref(count), ctypes.byref(vectors))
    for vector in vectors[: count.value]:
        values = ctypes.POINTER(ctypes.c_double)()
        _call("VecGetArrayRead", ctypes.c_void_p(vector), ctypes.byref(values))
        yield np.ctypeslib.as_array(values, (size,)).copy()
        _call("VecRestoreArrayRead", ctypes.c_void_p(vector), ctypes.byref(values))


def take_function_lower_bound(tao: PETSc.TAO) -> float:
    """The value at which a TAO stops, taken away from it."""
    bound = ctypes.c_double()
    _call("TaoGetFunctionLowerBound", ctypes.c_void_p(tao.handle), ctypes.byref(bound))
    _call("TaoSetFunctionLowerBound", ctypes.c_void_p(tao.handle), ctypes.c_double(-np.inf))
    return bound.value


def shell(context: object, sizes: tuple[int, int], comm: PETSc.Comm | None = None) -> PETSc.Mat:
    """A matrix with these sizes on this rank that does what its context does: `mult`, `multTranspose` and so on."""
    comm = PETSc.COMM_SELF if comm is None else comm
    mat = PETSc.Mat().createPython([(size, PETSc.DETERMINE) for size in sizes], context, comm=comm)
    mat.setUp()
    return mat


def weakly(method: Callable) -> Callable:
    """A bound method as a callback of a PETSc object that its own instance holds.

    PETSc's references to callbacks are unknown to Python's collector: a strong one would keep both alive for ever.
    """
    reference = weakref.WeakMethod(method)
    return lambda *arguments: reference()(*arguments)
