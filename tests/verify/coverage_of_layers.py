"""What of compiled stages and layers the built-in problems of `verify` reach: run by test_verify.py, in a process of its own.

    python coverage_of_layers.py FOLDER

C is compiled there with gcov's counters and without optimisation, PETSc's checks of its own errors left out, so that each
branch is one of this package; gcov reads the counters once the process has ended. Lines of Python that ran are noted.
"""

import ast
import ctypes
import gzip
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import petsctools

import fem_resnet.layers.compiled_stage
import fem_resnet.network.segment
import fem_resnet.time_stepping.compiled_layer
from fem_resnet.compiler import declared

MODULES = [
    fem_resnet.layers.compiled_stage,
    fem_resnet.time_stepping.compiled_layer,
    fem_resnet.network.segment,
]
BEGINS = "/* Stage of a layer, compiled"
UNCHECKED = """
#undef PetscCall
#undef PetscCallMPI
#undef PetscCallBLAS
#undef PetscFunctionReturn
#undef PetscFunctionBeginUser
#undef PetscCheck
#define PetscCall(x) (void)(x)
#define PetscCallMPI(x) (void)(x)
#define PetscCallBLAS(name, x) (x)
#define PetscFunctionReturn(x) return x
#define PetscFunctionBeginUser (void)0
#define PetscCheck(x, ...) (void)(x)
"""


def _statements(node: ast.AST, inside: bool = False) -> set[int]:
    """First lines of the statements of functions, but for docstrings, for what raises, and what takes an exception."""
    found = set()
    for part in ast.iter_child_nodes(node):
        if isinstance(part, (ast.Raise, ast.ExceptHandler)):
            continue
        function = isinstance(part, ast.FunctionDef)
        text = isinstance(part, ast.Nonlocal) or isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
        if inside and isinstance(part, ast.stmt) and not (function or text):
            found.add(part.lineno)
        found |= _statements(part, inside or function)
    return found


def _compile_into(folder: Path):
    """In the place of `fem_resnet.compiler.library`."""
    made: dict[str, ctypes.CDLL] = {}

    def library(comm, code, flags, libraries, prototypes):
        text = code()
        if text not in made:
            name = folder / f"code{len(made)}"
            name.with_suffix(".c").write_text(text.replace("#include <petscts.h>", "#include <petscts.h>" + UNCHECKED, 1))
            compiler = petsctools.get_petscvariables()["CC"]
            command = [
                compiler,
                *flags,
                "-O0",
                "-march=native",
                "-std=gnu11",
                "--coverage",
                "-fPIC",
                "-shared",
                "-o",
                f"{name}.so",
                f"{name}.c",
            ]
            subprocess.run([*command, *libraries], check=True, cwd=folder)
            made[text] = ctypes.CDLL(f"{name}.so")
        return declared(made[text], prototypes)

    return library


def run(folder: Path) -> None:
    """Verify the built-in problems, and write down which lines of Python did not run."""
    fem_resnet.layers.compiled_stage.library = _compile_into(folder)
    ran: dict[str, set[int]] = {module.__file__: set() for module in MODULES}

    def trace(frame, event, argument):
        lines = ran.get(frame.f_code.co_filename)
        if lines is None:
            return None
        lines.add(frame.f_lineno)
        return trace

    sys.settrace(trace)
    report = fem_resnet.verify(quick=True)
    sys.settrace(None)
    missed = []
    for module in MODULES:
        text = Path(module.__file__).read_text()
        lines = text.split("\n")
        for line in sorted(_statements(ast.parse(text)) - ran[module.__file__]):
            missed.append(f"{Path(module.__file__).name}: {lines[line - 1].strip()}")
    (folder / "missed.json").write_text(json.dumps({"failures": list(map(str, report.failures)), "python": missed}))


def missed_in_c(folder: Path) -> list[str]:
    """Lines of C that were not reached, and those with a branch that was never taken, from the counters in `folder`."""
    counts: dict[tuple[int, str, str], list[int]] = defaultdict(list)
    for data in folder.glob("*.gcda"):
        subprocess.run(
            ["gcov", "--json-format", "--branch-probabilities", data.name], cwd=folder, capture_output=True, check=True
        )
    for found in folder.glob("*.gcov.json.gz"):
        for file in json.loads(gzip.decompress(found.read_bytes()))["files"]:
            if not file["file"].endswith(".c"):
                continue  # a header
            text = (folder / Path(file["file"]).name).read_text().split("\n")
            first = next(n for n, line in enumerate(text, 1) if line.startswith(BEGINS))
            for line in file["lines"]:
                number = line["line_number"]
                if number > first:
                    new = [line["count"], *(branch["count"] for branch in line["branches"])]
                    key = number - first, line.get("function_name", ""), text[number - 1].strip()
                    old = counts[key]
                    counts[key] = [a + b for a, b in zip(old, new, strict=True)] if old else new
    return [text for (*_, text), found in sorted(counts.items()) if not all(found)]


if __name__ == "__main__":
    run(Path(sys.argv[1]))
