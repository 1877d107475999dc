"""Compiled code: all ranks have it or none, nothing damaged is run, C and Python mean the same structs and functions."""

import ast
import ctypes
import importlib
import logging
import pkgutil
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import petsctools
import pytest
import sanitized
from firedrake import COMM_WORLD
from helpers import label_space, without_mpi
from petsc4py import PETSc
from pyop2.configuration import configuration
from pyop2.exceptions import CompilationError

import fem_resnet
from fem_resnet import compiler, petsc
from fem_resnet.activation.activation import get_activation
from fem_resnet.compiler import layout, library
from fem_resnet.layers import compiled_stage
from fem_resnet.layers.compiled_stage import CompiledStage, new_stage
from fem_resnet.layers.stage import Stage

on_ranks = pytest.mark.parallel([1, 2, 3])
LAST = COMM_WORLD.size - 1
PACKAGE = Path(fem_resnet.__file__).parent
TWICE = "int twice(int x) { return 2 * x; }"
PROTOTYPE = "int twice(int)"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of its own for each rank, which is the only one on its machine."""
    folder = tmp_path / str(COMM_WORLD.rank)
    monkeypatch.setitem(configuration, "cache_dir", str(folder))
    monkeypatch.setattr(compiler, "_machine", lambda comm: comm.Split(comm.rank))
    return folder


@pytest.fixture
def compiled(monkeypatch):
    """How often this rank has compiled."""
    calls, original = [], compiler._compiled

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(compiler, "_compiled", counted)
    return calls


def twice(x=21, code=TWICE, prototypes=(PROTOTYPE,)):
    return library(COMM_WORLD, lambda: code, (), (), prototypes).twice(x)


# -- ranks decide together ---------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("on", [0, LAST], ids=["rank 0", "last rank"])
@pytest.mark.parametrize("value", ["0", "1"])
def test_rank_0_switches_compiled_stages_off_for_all(on, value, monkeypatch):
    monkeypatch.setenv("FEM_RESNET_COMPILED", value if COMM_WORLD.rank == on else "10"[int(value)])
    wanted = value if on == 0 else "10"[int(value)]
    stage = new_stage(label_space("disk", "CG1"), get_activation("relu"), 2)
    assert type(stage) is (CompiledStage if wanted == "1" else Stage)


@on_ranks
def test_a_switch_that_is_neither_on_nor_off_is_refused_on_all_ranks(monkeypatch):
    if COMM_WORLD.rank == 0:
        monkeypatch.setenv("FEM_RESNET_COMPILED", "off")
    with pytest.raises(ValueError, match="^FEM_RESNET_COMPILED: expected one of '0', '1', got 'off'"):
        new_stage(label_space("disk", "CG1"), get_activation("relu"), 2)


@on_ranks
def test_one_rank_a_machine_compiles_and_only_once(tmp_path, compiled, monkeypatch):
    monkeypatch.setitem(configuration, "cache_dir", str(tmp_path))
    assert [twice(), twice(4)] == [42, 8]
    assert len(compiled) == (COMM_WORLD.rank == 0)


def _no_compiler(folder, monkeypatch):
    monkeypatch.setattr(compiler, "get_petscvariables", lambda: {"CC": "no-such-compiler"})


def _compiler_fails(folder, monkeypatch):
    silent = SimpleNamespace(cc="false", cflags=(), ldflags=())
    monkeypatch.setattr(compiler, "sniff_compiler", lambda name, comm: lambda *arguments, **settings: silent)


def _folder_is_a_file(folder, monkeypatch):
    folder.write_text("in the way")


def _cannot_be_loaded(folder, monkeypatch):
    def load(path):
        raise OSError(f"{path}: cannot be mapped")

    monkeypatch.setattr(compiler.ctypes, "CDLL", load)


def _other_settings(folder, monkeypatch):
    monkeypatch.setitem(configuration, "cflags", "--no-such-flag")


FAILURES = {
    _no_compiler: "no-such-compiler",
    _compiler_fails: "ended with code 1: nothing was said",
    _folder_is_a_file: "File exists|Not a directory",
    _cannot_be_loaded: "cannot be mapped",
    _other_settings: "ended with code 1: .*error: .*no-such-flag",
}


@on_ranks
@pytest.mark.parametrize("fail", FAILURES, ids=lambda fail: fail.__name__.strip("_"))
def test_what_one_rank_cannot_have_no_rank_has(fail, folder, monkeypatch):
    with monkeypatch.context() as patch:
        if COMM_WORLD.rank == LAST:
            fail(folder, patch)
        with pytest.raises((CompilationError, OSError), match=FAILURES[fail]):
            twice()
    if fail is not _folder_is_a_file:
        assert twice() == 42


@on_ranks
def test_numpy_takes_over_on_all_ranks_where_one_has_no_compiler(folder, monkeypatch, caplog):
    if COMM_WORLD.rank == LAST:
        _no_compiler(folder, monkeypatch)
    monkeypatch.setattr(compiler, "_compiled", _quickly(compiler._compiled))
    compiled_stage._warned.clear()
    with caplog.at_level(logging.WARNING, "fem_resnet"):
        assert [type(new_stage(label_space("disk", "CG1"), get_activation("relu"), n)) for n in (1, 2)] == [Stage, Stage]
    assert ["no-such-compiler" in record.message for record in caplog.records] == [True] * (COMM_WORLD.rank == 0)


def _quickly(compile):
    """Stages without optimisation, since nobody calls them."""
    return lambda code, flags, libraries: compile(code, (*flags, "-O0"), libraries)


# -- on disk -----------------------------------------------------------------------------------------------------------


def _flip(data):
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


DAMAGE = {
    "missing": None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-1],
    "a bit flipped": _flip,
    "another one": lambda data: b"\x7fELF" + bytes(20000),
}


@on_ranks
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_library_damaged_on_one_rank_is_compiled_again_there(kind, folder, compiled):
    twice()
    del compiled[:]
    (path,) = folder.rglob("*.so")
    if COMM_WORLD.rank == LAST:
        data = path.read_bytes()
        path.unlink()  # this process still has it
        if DAMAGE[kind]:
            path.write_bytes(DAMAGE[kind](data))
    assert twice() == 42
    assert len(compiled) == (COMM_WORLD.rank == LAST)
    assert compiler._is_whole(path) and list(folder.rglob("*.*")) == [path]


def test_a_disk_that_fills_up_leaves_nothing_behind(folder, monkeypatch):
    def write(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compiler.Path, "write_bytes", write)
        with pytest.raises(OSError, match="No space left"):
            twice()
    assert [path for path in folder.rglob("*") if path.is_file()] == []


# -- what C and Python know of each other ------------------------------------------------------------------------------


class Pair(ctypes.Structure):
    _fields_ = [("first", ctypes.c_void_p), ("number", ctypes.c_long), ("size", ctypes.c_double)]


def test_a_struct_that_ctypes_has_alike_compiles(folder):
    assert twice(code=f"struct pair {{ char *first; long number; double size; }};\n{layout(pair=Pair)}\n{TWICE}") == 42


@pytest.mark.parametrize(
    "fields",
    ["char *first; long number; double size, more;", "char *first; double size; long number;",
     "char *first; int number; double size;",
     "long first, number; double size;", "char *first; long number, size;", "char *first; long number; char *size;"],
    ids=["size", "order", "width", "integer for pointer", "integer for number", "pointer for number"],
)  # fmt: skip
def test_a_struct_that_ctypes_has_otherwise_does_not_compile(fields, folder):
    with pytest.raises(CompilationError, match="struct pair has the size and the fields"):
        twice(code=f"struct pair {{ {fields} }};\n{layout(pair=Pair)}\n{TWICE}")


@pytest.mark.parametrize(
    "prototype", ["long twice(int)", "int twice(long)", "int twice(int, int)", "int twice(const double *)"]
)
def test_a_prototype_that_is_another_one_does_not_compile(prototype, folder):
    with pytest.raises(CompilationError, match="conflicting types for .twice."):
        twice(prototypes=[prototype])


def test_arguments_that_are_not_what_c_takes_are_refused(folder):
    for wrong in (2.5, "2", None, b"2"):
        with pytest.raises(ctypes.ArgumentError):
            twice(wrong)
    with pytest.raises(TypeError, match="at least 1 argument"):
        library(COMM_WORLD, lambda: TWICE, (), (), [PROTOTYPE]).twice()


#: Modules that need PyTorch, JAX or ONNX, and have no C.
OF_EXTRAS = [f"fem_resnet.{name}" for name in ("external.torch", "external.jax", "export.torch_module", "export.onnx_graph")]


def _modules():
    for found in pkgutil.walk_packages([str(PACKAGE)], "fem_resnet."):
        if not found.name.endswith("__main__") and found.name not in OF_EXTRAS:
            yield importlib.import_module(found.name)


@cache
def _nodes():
    """Of the syntax trees of all modules, by their paths."""
    return {path: list(ast.walk(ast.parse(path.read_text()))) for path in PACKAGE.rglob("*.py")}


def test_every_struct_of_the_package_is_compared_with_c():
    structs = {
        value for module in _modules() for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ctypes.Structure) and value.__module__.startswith("fem_resnet")
    }  # fmt: skip
    assert structs == set(compiled_stage._STRUCTS.values()) and len(structs) == 4
    source = compiled_stage._source()
    for name, struct in compiled_stage._STRUCTS.items():
        body = re.search(rf"^struct {name} \{{(.*?)^\}};", source, re.DOTALL | re.MULTILINE)[1]
        body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
        fields = re.findall(r"(\w+)\s*[,;]", body)
        assert fields == [field for field, _ in struct._fields_]


def test_every_function_of_c_that_python_calls_is_declared():
    """What is not static in C is what Python calls, and Python calls nothing else."""
    source = compiled_stage._source()
    in_c = set(re.findall(r"^(?!static|ALWAYS)\w+ (\w+)\([^;]*?\) \{", source, re.MULTILINE))
    code = CompiledStage(label_space("disk", "CG1"), get_activation("relu"), 2)._code
    assert set(vars(code)) == in_c and len(in_c) == 7
    for functions in (code, petsc._petsc()):
        for name, function in vars(functions).items():
            assert function.restype is not None and function.argtypes is not None, name
    for path, nodes in _nodes().items():
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ctypes":
                assert node.attr not in ("CDLL", "PyDLL", "cdll") or path.stem in ("compiler", "petsc", "files"), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "_call":
                assert hasattr(petsc._petsc(), node.args[0].value), ast.unparse(node)
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in ("self._call", "stage.call")
                and path.stem.startswith("compiled")
            ):
                assert node.args[0].value in in_c, ast.unparse(node)


def test_petscs_functions_are_declared_as_its_headers_have_them(folder):
    include = petsctools.get_petsc_dirs(prefix="-I", subdir="include")
    headers = ["#include <petscts.h>", "#include <petsctao.h>", "#include <petscdmplex.h>", TWICE]
    for wrong in ([], ["PetscErrorCode TSGetStages(TS, PetscInt *)"]):
        code = "\n".join([*headers, *(f"{prototype};" for prototype in [*petsc._PROTOTYPES, *wrong])])
        with pytest.raises(CompilationError, match="conflicting types for .TSGetStages.") if wrong else nullcontext():
            assert library(COMM_WORLD, lambda: code, include, (), [PROTOTYPE]).twice(4) == 8


@pytest.mark.parametrize("kind, name", [(np.complex128, "ScalarType"), (np.float32, "RealType"), (np.float32, "ScalarType")])
def test_a_petsc_of_other_numbers_is_refused(kind, name, monkeypatch):
    monkeypatch.setattr(PETSc, name, kind)
    with pytest.raises(ImportError, match="^PETSc: expected .*real numbers of double precision"):
        runpy.run_path(petsc.__file__)


def test_headers_of_another_petsc_are_refused_by_the_compiler(monkeypatch, folder):
    Y, relu = label_space("disk", "CG1"), get_activation("relu")
    with monkeypatch.context() as patch:
        patch.setattr(compiled_stage, "_FLAGS", (*compiled_stage._FLAGS, "-O0", "-DPETSC_USE_COMPLEX=1"))
        with pytest.raises(CompilationError, match="PETSc: expected .*real numbers of double precision"):
            CompiledStage(Y, relu, 2)
    loaded = {"Sys": PETSc.Sys, "IntType": PETSc.IntType}
    others = {
        "Sys": SimpleNamespace(getVersion=lambda: (3, 1, 4)),
        "IntType": {np.int32: np.int64, np.int64: np.int32}[PETSc.IntType],
    }
    for name in loaded:
        with monkeypatch.context() as patch:
            patch.setattr(compiled_stage, "_FLAGS", (*compiled_stage._FLAGS, "-O0"))
            patch.setattr(compiled_stage, "PETSc", SimpleNamespace(**loaded | {name: others[name]}))
            with pytest.raises(CompilationError, match="PETSc has the headers of the version that Python has loaded"):
                CompiledStage(Y, relu, 2)


# -- the outside -------------------------------------------------------------------------------------------------------


def test_one_place_asks_for_compilers_and_processes_and_one_for_the_environment():
    """So what stands there on rank 0, or on one rank a machine, is what all ranks learn."""
    names = "subprocess", "pyop2.compilation", "environ", "getenv", "find_library", "popen"
    asked = {name: set() for name in names}
    for path, nodes in _nodes().items():
        for node in nodes:
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            for name in asked.keys() & set(names):
                asked[name].add(path.stem)
    assert asked.pop("subprocess") == asked.pop("pyop2.compilation") == {"compiler"}
    # `info` prints what rank 0 sees, and `ranks` has the mode for debugging, which mpiexec gives to all or none.
    assert asked.pop("environ") == {"compiled_stage", "info", "ranks"}
    assert not any(asked.values()), asked


# -- processes ---------------------------------------------------------------------------------------------------------

STARTED = """
import os, sys, tempfile, traceback
from pathlib import Path
import fem_resnet
OF_EXTRAS = ".torch", ".jax", ".torch_module", ".onnx_graph"
HERE, STANDARD, started = str(Path(fem_resnet.__file__).parent), str(Path(os.__file__).parent), []

def hook(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork", "os.forkpty"):
        files = [frame.filename for frame in traceback.extract_stack() if frame.filename[0] != "<"]
        asked = [file for file in files if not file.startswith(STANDARD + "/") or "site-packages" in file][-1]
        started.append((str(arguments[0]), asked.startswith(HERE)))

sys.addaudithook(hook)
import importlib, pkgutil
for found in pkgutil.walk_packages(fem_resnet.__path__, "fem_resnet."):
    if not found.name.endswith(("__main__", *OF_EXTRAS)):
        importlib.import_module(found.name)
at_import = [program for program, ours in started if ours]
import firedrake
Y = fem_resnet.LabelSpace(firedrake.FunctionSpace(firedrake.UnitIntervalMesh(8), "DG", 0))
basis = fem_resnet.laplace_basis(Y, 2)
counts = []
folder = tempfile.TemporaryDirectory()
fem_resnet.compiler.configuration = fem_resnet.compiler.configuration | {"cache_dir": folder.name}  # for it alone
for repeat in range(2):
    before = len(started)
    net = fem_resnet.ResidualNetwork(fem_resnet.Kernel(basis, basis), layers=2, activation="relu")
    net(Y.batch([[1.0]] * Y.nodes))
    counts.append([program for program, ours in started[before:] if ours])
print(repr((at_import, len(started), counts)))
"""


@pytest.mark.command(sys.executable, "-c", STARTED)
def test_nothing_but_the_compiler_is_started_and_that_only_where_nothing_is_on_disk(printed):
    """Firedrake, PyOP2 and petsctools start others, at import and for kernels of their own."""
    at_import, in_all, (cold, warm) = ast.literal_eval(printed[-1])
    assert in_all > 0 and at_import == warm == []
    assert len(cold) == 1 and Path(cold[0]).name == Path(petsctools.get_petscvariables()["CC"]).name


# -- sanitizers --------------------------------------------------------------------------------------------------------


def _sanitized(machine, extent):
    if (preloaded := sanitized.preloaded()) is None or not sanitized.allowed(machine):
        pytest.skip(f"no sanitizer here, or a processor that does not run {machine}")
    script = Path(__file__).with_name("sanitized.py")
    run = subprocess.run(
        ["env", *preloaded, sys.executable, script, machine, extent], env=without_mpi() | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True, text=True, errors="replace", timeout=3000,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[:6000]
    return run.stdout.splitlines()


def test_compiled_stages_and_layers_are_clean_with_vectors_narrower_than_a_cache_line():
    assert _sanitized("x86-64", "some")[-2:] == ["tanh, double: 25 shapes", "layers, double: 13 samples, ranks (6, 6)"]


@pytest.mark.slow
@pytest.mark.parametrize("machine", sanitized.MACHINES)
def test_every_compiled_path_is_clean_on_every_machine(machine):
    """Both types of numbers, formulas by name and by expression, all shapes, packed fields, both psi, what `verify` runs."""
    lines = _sanitized(machine, "all")
    assert len(lines) == 6 + 8 + 1 and lines[-1].startswith("verify: ")
