"""What petsc4py lacks: some functions of PETSc, called through ctypes, and small helpers for its matrices and callbacks."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace

import numpy as np
from petsc4py import PETSc

from fem_resnet.compiler import declared

__all__ = [
    "adapt_type", "apply_columns", "check_plex", "converged_reason", "keep_trajectory_in_memory", "never_adapt", "new_ts",
    "on_pre_stage", "register_rk", "rk_tableau", "shell", "stage_values", "take_function_lower_bound", "weakly",
]  # fmt: skip

if (PETSc.ScalarType, PETSc.RealType) != (np.float64, np.float64):
    raise ImportError(
        f"PETSc: expected a build with real numbers of double precision, got {np.dtype(PETSc.ScalarType)}; set PETSC_DIR and "
        f"PETSC_ARCH to another build, and install petsc4py and Firedrake for that build"
    )

_Int = np.ctypeslib.as_ctypes_type(PETSc.IntType)
_PROTOTYPES = (
    "PetscErrorCode TSGetTrajectory(TS, TSTrajectory *)",
    "PetscErrorCode TSTrajectorySetType(TSTrajectory, TS, const char *)",
    "PetscErrorCode TSRKGetTableau(TS, PetscInt *, const PetscReal **, const PetscReal **, const PetscReal **, "
    "const PetscReal **, PetscInt *, const PetscReal **, PetscBool *)",
    "PetscErrorCode TSRKRegister(const char *, PetscInt, PetscInt, const PetscReal *, const PetscReal *, const PetscReal *, "
    "const PetscReal *, PetscInt, const PetscReal *)",
    "PetscErrorCode TSGetAdapt(TS, TSAdapt *)",
    "PetscErrorCode TSAdaptGetType(TSAdapt, const char **)",
    "PetscErrorCode TSAdaptSetType(TSAdapt, const char *)",
    "PetscErrorCode TSSetPreStage(TS, PetscErrorCode (*)(TS, PetscReal))",
    "PetscErrorCode TSGetStages(TS, PetscInt *, Vec **)",
    "PetscErrorCode VecGetArrayRead(Vec, const PetscScalar **)",
    "PetscErrorCode VecRestoreArrayRead(Vec, const PetscScalar **)",
    "PetscErrorCode TaoGetFunctionLowerBound(Tao, PetscReal *)",
    "PetscErrorCode TaoSetFunctionLowerBound(Tao, PetscReal)",
    "PetscErrorCode DMPlexCheckSymmetry(DM)",
    "PetscErrorCode DMPlexCheckSkeleton(DM, PetscInt)",
    "PetscErrorCode DMPlexCheckFaces(DM, PetscInt)",
)


@cache
def _petsc() -> SimpleNamespace:
    # The loader finds the symbols in the libraries to which petsc4py's own library is linked.
    return declared(ctypes.CDLL(PETSc.__file__), _PROTOTYPES)


def _call(name: str, *arguments) -> None:
    if code := getattr(_petsc(), name)(*arguments):
        raise PETSc.Error(code)


def check_plex(plex: PETSc.DMPlex) -> None:
    """Check that the cones of this rank's points fit together to cells.

    Raises
    ------
    petsc4py.PETSc.Error
        If they do not.
    """
    _call("DMPlexCheckSymmetry", plex.handle)
    _call("DMPlexCheckSkeleton", plex.handle, 0)
    _call("DMPlexCheckFaces", plex.handle, 0)


def new_ts(comm: PETSc.Comm, prefix: str | None = None) -> PETSc.TS:
    """A TS that ends its last step exactly at the final time. Collective over the communicator.

    Parameters
    ----------
    comm
        The communicator, PETSc's or mpi4py's.
    prefix
        The prefix of its options, which its SNES inherits when it is made.
    """
    ts = PETSc.TS().create(comm=comm)
    ts.setOptionsPrefix(prefix)
    ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)  # type: ignore[arg-type]  # an int, against petsc4py's stubs
    return ts


def converged_reason(solver: PETSc.TS | PETSc.SNES) -> int:
    """The reason with which the last solve ended; negative for a failure."""
    return solver.getConvergedReason()  # type: ignore[return-value]  # an int, against petsc4py's stubs


def keep_trajectory_in_memory(ts: PETSc.TS) -> None:
    """Keep the trajectory of the next solve in memory.

    The default is one file a step. An option could not change it, as a trajectory does not inherit the prefix of its TS.
    """
    trajectory = ctypes.c_void_p()
    _call("TSGetTrajectory", ts.handle, ctypes.byref(trajectory))
    _call("TSTrajectorySetType", trajectory, ts.handle, b"memory")


def rk_tableau(ts: PETSc.TS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrix A_ij, weights b_i and nodes c_i of the Runge-Kutta method of a TS, shapes (stages, stages) and (stages,)."""
    stages, order, fsal = _Int(), _Int(), ctypes.c_int()
    A, b, c, embedded, dense = (ctypes.POINTER(ctypes.c_double)() for _ in range(5))
    _call(
        "TSRKGetTableau", ts.handle,
        *map(ctypes.byref, (stages, A, b, c, embedded, order, dense, fsal)),
    )  # fmt: skip
    s = stages.value
    return np.array(A[: s * s]).reshape(s, s), np.array(b[:s]), np.array(c[:s])


@cache
def register_rk(name: str, A: tuple[tuple[float, ...], ...], b: tuple[float, ...], c: tuple[float, ...]) -> str:
    """Register an explicit Runge-Kutta method with PETSc under a name, as a `ts_rk_type`.

    Parameters
    ----------
    name
        The name, which is returned.
    A, b, c
        Matrix A_ij, weights b_i and nodes c_i.
    """

    def reals(values):
        values = np.ravel(values).astype(float)
        return (ctypes.c_double * values.size)(*values)

    # The method has neither an embedded method nor an interpolant. PETSc copies all arrays.
    _call("TSRKRegister", name.encode(), 1, len(b), reals(A), reals(b), reals(c), None, 0, None)
    return name


def _adapt(ts: PETSc.TS) -> ctypes.c_void_p:
    adapt = ctypes.c_void_p()
    _call("TSGetAdapt", ts.handle, ctypes.byref(adapt))
    return adapt


def adapt_type(ts: PETSc.TS) -> str:
    """Name of the rule by which a TS adapts its steps."""
    name = ctypes.c_char_p()
    _call("TSAdaptGetType", _adapt(ts), ctypes.byref(name))
    return name.value.decode()


def never_adapt(ts: PETSc.TS) -> None:
    """Accept every step from now on, and leave the step sizes alone."""
    _call("TSAdaptSetType", _adapt(ts), b"none")


_PreStage = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_double)


def on_pre_stage(ts: PETSc.TS, callback: Callable[[], None]) -> None:
    """Have a function called before every stage of a step, and again if the step is tried again."""

    def call(handle, time):
        callback()
        return 0

    function = _PreStage(call)
    _call("TSSetPreStage", ts.handle, function)
    ts.setAttr("fem_resnet_pre_stage", function)  # it must live as long as the TS


def stage_values(ts: PETSc.TS, size: int) -> Iterator[np.ndarray]:
    """The stage values of the step that was just made, one after the other, each of shape (size,)."""
    count, vectors = _Int(), ctypes.POINTER(ctypes.c_void_p)()
    _call("TSGetStages", ts.handle, ctypes.byref(count), ctypes.byref(vectors))
    for vector in vectors[: count.value]:
        values = ctypes.POINTER(ctypes.c_double)()
        _call("VecGetArrayRead", vector, ctypes.byref(values))
        yield np.ctypeslib.as_array(values, (size,)).copy()
        _call("VecRestoreArrayRead", vector, ctypes.byref(values))


def take_function_lower_bound(tao: PETSc.TAO) -> float:
    """The value at which a TAO stops. The TAO has no such value afterwards."""
    bound = ctypes.c_double()
    _call("TaoGetFunctionLowerBound", tao.handle, ctypes.byref(bound))
    _call("TaoSetFunctionLowerBound", tao.handle, -np.inf)
    return bound.value


def shell(context: object, sizes: tuple[int, int], comm: PETSc.Comm | None = None) -> PETSc.Mat:
    """A matrix whose products are methods of a Python object: `mult`, `multTranspose` and so on.

    Parameters
    ----------
    context
        The object.
    sizes
        Numbers of rows and of columns on this rank.
    comm
        The communicator; this rank alone if left out.
    """
    rows, columns = sizes
    comm = PETSc.COMM_SELF if comm is None else comm
    mat = PETSc.Mat().createPython(((rows, PETSc.DETERMINE), (columns, PETSc.DETERMINE)), context, comm=comm)
    mat.setUp()
    return mat


def weakly(method: Callable) -> Callable:
    """A bound method as a callback for a PETSc object that the method's own instance holds.

    Python's garbage collector does not see PETSc's references to callbacks. A strong reference would keep both objects alive
    for ever.
    """
    reference = weakref.WeakMethod(method)
    return lambda *arguments: reference()(*arguments)


def apply_columns(A: PETSc.Mat, values: np.ndarray) -> np.ndarray:
    """`A x` for each column x of some values: the rows that this rank owns, shape (rows, columns). Collective.

    Parameters
    ----------
    A
        An assembled matrix.
    values
        Columns, the rows that this rank owns.
    """
    x, y = A.createVecRight(), A.createVecLeft()
    result = np.empty((y.getLocalSize(), values.shape[1]))
    for k in range(values.shape[1]):
        x.array_w[:] = values[:, k]
        A.mult(x, y)
        result[:, k] = y.array_r
    return result
