"""What the sources say about themselves, read without importing them: modules, names, docstrings."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "fem_resnet"


class Docstring(NamedTuple):
    """A docstring, and the qualified name of the module, class or function that it belongs to."""

    module: str
    name: str
    text: str


@cache
def modules() -> dict[str, ast.Module]:
    """Syntax trees of the modules by name; files `__init__.py` are left out."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
        if path.name != "__init__.py"
    }


@cache
def folders() -> dict[str, str]:
    """First paragraph of each folder's docstring, by the folder's name; a folder may lack one."""
    return {
        ".".join(path.parent.relative_to(ROOT).parts): (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
        for path in sorted((ROOT / PACKAGE).rglob("__init__.py"))
    }


def folder(module: str) -> str:
    """The folder that a module stands in: the package, or one below it."""
    return module.rpartition(".")[0]


def home(name: str) -> str:
    """The module that defines a name at its top level."""
    for module, tree in modules().items():
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            if name in [getattr(target, "id", getattr(target, "name", None)) for target in targets]:
                return module
    raise LookupError(f"{name}: no module of {PACKAGE} defines it")


@cache
def exports() -> dict[str, list[str]]:
    """Public modules and their public names: `_MODULES` of the package, and of the rooms that have one."""
    found = {
        f"{PACKAGE}.{name}": names
        for path in sorted((ROOT / PACKAGE).rglob("__init__.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_MODULES"
        for name, names in ast.literal_eval(node.value).items()
    }
    if not found:
        raise LookupError(f"_MODULES: no such assignment in {PACKAGE}/__init__.py")
    return found


def public_names(tree: ast.Module) -> list[str]:
    """`__all__`, or what has no underscore where there is none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return [node.name for node in tree.body if hasattr(node, "name") and not node.name.startswith("_")]


@cache
def docstrings() -> list[Docstring]:
    """All of them, and the comments `#:` above assignments of modules."""
    found = []

    def visit(module, node, name):
        text = ast.get_docstring(node)
        if text:
            found.append(Docstring(module, name, text))
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                visit(module, child, f"{name}.{child.name}")

    for module, tree in modules().items():
        visit(module, tree, module)
        lines = (ROOT / f"{module.replace('.', '/')}.py").read_text().splitlines()
        for node in tree.body:
            comment = _comment_above(lines, node.lineno) if isinstance(node, (ast.Assign, ast.AnnAssign)) else ""
            if comment:
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                found.append(Docstring(module, f"{module}.{ast.unparse(target)}", comment))
    return found


def _comment_above(lines, line):
    comment = []
    for text in reversed(lines[: line - 1]):
        if not text.startswith("#:"):
            break
        comment.insert(0, text.removeprefix("#:").strip())
    return "\n".join(comment)


@cache
def documented() -> set[str]:
    """Qualified names that have a place on an API page."""
    places = set(modules())
    for module, name, _ in docstrings():
        inner = name.removeprefix(module).lstrip(".").split(".")
        hidden = any(part.startswith("_") and part != "__call__" for part in inner)
        if name != module and not hidden and inner[0] in public_names(modules()[module]):
            places.add(name)
    return places


def role(name: str, module: str, label: str | None = None) -> str:
    """A link to a name of the package in MyST; what has no place of its own leads to its module."""
    label = label or name.removeprefix(f"{PACKAGE}.")
    return f"{{py:obj}}`{label} <{name if name in documented() else module}>`"
