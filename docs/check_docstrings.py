"""Fails where the docstring of a public function, class or method lacks a part that readers need.

    python docs/check_docstrings.py [FILE ...]

Public are the names that users import from `fem_resnet`, and the public methods of such classes. Asked for are

- a summary;
- "Parameters", each by its name, where there are two or more;
- "Raises", where the body raises, or calls one of the checks of arguments;
- "shape", in the entry of each parameter that is an array, and for an array that is returned.

Other names in the modules' `__all__` need a summary; a method may have that of the method it overrides.

It reads the sources and imports nothing, so that it needs no PETSc.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from numpydoc.docscrape import NumpyDocString

PACKAGE = Path(__file__).resolve().parents[1] / "fem_resnet"

#: Functions of `fem_resnet.arguments` and `fem_resnet.ranks` that raise what the caller documents.
CHECKS = {"choice", "flag", "function", "instance", "integer", "integer_array", "number", "real_array", "same"}

#: Annotations, or parts of them, that stand for arrays.
ARRAYS = ("ndarray", "ArrayLike", "Sequence[float]", "Sequence[int]")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def face() -> set[str]:
    """The names that users import."""
    found = [
        ast.literal_eval(node.value)
        for path in (PACKAGE / "__init__.py", PACKAGE / "plot" / "__init__.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_MODULES"
    ]
    if len(found) != 2:
        raise LookupError("_MODULES is not in fem_resnet/__init__.py, or not in fem_resnet/plot/__init__.py")
    return {name for modules in found for names in modules.values() for name in names}


def exported(tree: ast.Module) -> set[str]:
    """The names in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value)) if isinstance(node.value, ast.List) else set()
    return set()


def public(tree: ast.Module) -> Iterator[tuple[str, Function, str | None]]:
    """Name, definition and docstring of the public functions and methods; a constructor has that of its class."""
    names = exported(tree)
    for node in tree.body:
        if getattr(node, "name", None) not in names:
            continue
        if isinstance(node, Function) and not _is(node, "overload"):
            yield node.name, node, ast.get_docstring(node)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if not isinstance(method, Function) or _is(method, "overload"):
                    continue
                if method.name == "__init__":
                    yield node.name, method, ast.get_docstring(node)
                elif not method.name.startswith("_") and (ast.get_docstring(method) or not node.bases):
                    yield f"{node.name}.{method.name}", method, ast.get_docstring(method)


def faults(function: Function, docstring: str | None, for_users: bool) -> Iterator[str]:
    """What the docstring lacks, in words."""
    if not docstring:
        yield "has no docstring"
        return
    doc = NumpyDocString(docstring)
    if not any(doc["Summary"]):
        yield "has no summary"
    if not for_users:
        return
    property_like = any(_is(function, kind) for kind in ("property", "cached_property", "setter"))
    arguments = _arguments(function)
    if len(arguments) >= 2 and not property_like:
        entries = {one.strip(" *"): entry for entry in doc["Parameters"] for one in entry.name.split(",")}
        for argument in arguments:
            if argument.arg not in entries:
                yield f"does not document its argument {argument.arg}"
            elif _is_array(argument.annotation) and "shape" not in " ".join(entries[argument.arg].desc):
                yield f"does not say the shape of {argument.arg}"
    if not doc["Raises"] and _raises(function):
        yield "does not say what it raises"
    if _is_array(function.returns) and "shape" not in docstring:
        yield "does not say the shape of what it returns"


def _is(function: Function, decorator: str) -> bool:
    return any(ast.unparse(each).split(".")[-1].split("(")[0] == decorator for each in function.decorator_list)


def _arguments(function: Function) -> list[ast.arg]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [argument for argument in every if argument.arg not in ("self", "cls")]


def _is_array(annotation: ast.expr | None) -> bool:
    return annotation is not None and any(kind in ast.unparse(annotation) for kind in ARRAYS)


def _raises(function: Function) -> bool:
    """Whether the body itself raises or checks an argument; functions inside of it do not count."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, Function | ast.Lambda):
            continue
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in CHECKS:
            return True
        todo += ast.iter_child_nodes(node)
    return False


def main(paths: list[Path]) -> int:
    """Print what is missing, and return how much."""
    count, users = 0, face()
    for path in paths or sorted(PACKAGE.rglob("*.py")):
        for name, function, docstring in public(ast.parse(path.read_text())):
            for fault in faults(function, docstring, name.split(".")[0] in users):
                print(f"{path}:{function.lineno}: {name} {fault}")
                count += 1
    return count


if __name__ == "__main__":
    sys.exit(main([Path(path) for path in sys.argv[1:]]) > 0)
