"""The rooms of docs/explanation/map.md: imports between folders go down only; parts that need no PETSc do not load it."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import firedrake
import pytest

import fem_resnet

#: They list what there is.
pytestmark = pytest.mark.whole

PACKAGE = Path(fem_resnet.__file__).parent
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
each_module = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))


@cache
def _rooms() -> list[str]:
    """The rooms, which are folders and modules outside of folders, from the ground up: the first column of the table."""
    text = (PACKAGE.parent / "docs" / "explanation" / "map.md").read_text()
    table = text.split("## Rooms", 1)[1].split("\n## ", 1)[0]
    return [room.rstrip("/").replace("/", ".") for room in re.findall(r"^\| `([\w/]+)` \|", table, flags=re.MULTILINE)]


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _room(module: str) -> str:
    """The folder of a module, or the module itself if it is in no folder."""
    return module if "." not in module else module.rpartition(".")[0]


def _imports(path: Path) -> list[tuple[int, str, tuple[str, ...]]]:
    """Line, module and names of every import, also those inside of functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = tuple(alias.name for alias in node.names)
            assert "*" not in names, f"{path}:{node.lineno}: no star import here"
            found.append((node.lineno, node.module, names))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, ()) for alias in node.names]
    return found


def _used(path: Path) -> list[tuple[int, str, tuple[str, ...]]]:
    """Line, module and names of the imports from the package; modules without the name of the package."""
    found = []
    modules = {_module(source) for source in SOURCES}
    for line, module, names in _imports(path):
        if module.split(".")[0] == "fem_resnet":
            inside = module.removeprefix("fem_resnet").lstrip(".")
            # `from fem_resnet.verify import suite` imports a module, others import names.
            parts = [f"{inside}.{name}" for name in names if f"{inside}.{name}" in modules]
            found += [(line, part, ()) for part in parts] or [(line, inside, names)]
    return found


def test_the_table_and_the_folders_are_the_same():
    assert len(_rooms()) == len(set(_rooms()))
    assert set(_rooms()) == {_room(_module(path)) for path in SOURCES}


@each_module
def test_imports_go_down_only(path):
    room = _room(_module(path))
    below = _rooms()[: _rooms().index(room)]
    for line, module, names in _used(path):
        assert _room(module) in [*below, room], f"{path}:{line}: {room} imports {module}"
        if _room(module) != room:
            private = [name for name in (*module.split("."), *names) if name.startswith("_")]
            assert not private, f"{path}:{line}: {private} are private to {_room(module)}"


def test_no_module_imports_itself_through_others():
    graph = {_module(path): {module for _, module, _ in _used(path)} for path in SOURCES}
    assert list(TopologicalSorter(graph).static_order())


@each_module
def test_nothing_is_imported_inside_of_a_function(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = [part.lineno for part in ast.walk(node) if isinstance(part, (ast.Import, ast.ImportFrom))]
            assert not inner, f"{path}: {node.name} imports at lines {inner}"


def _loaded_by(code: str) -> set[str]:
    run = f"import sys; {code}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("code", ["import fem_resnet", "from fem_resnet import ACTIVATIONS, get_activation"])
def test_what_needs_no_petsc_does_not_load_it(code):
    assert not _loaded_by(code) & {"firedrake", "petsc4py", "slepc4py", "mpi4py", "pyadjoint"}


def test_every_public_name_is_there_and_shadows_none_of_firedrake():
    for name in fem_resnet.__all__:
        assert getattr(fem_resnet, name) is not None
        assert not hasattr(firedrake, name), f"{name} is a name of firedrake's too"
    with pytest.raises(AttributeError, match="module 'fem_resnet' has no attribute 'Nothing'"):
        fem_resnet.Nothing
