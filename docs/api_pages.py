"""API pages: one a module, and the list of them; what autodoc is told about members and signatures."""

import ast
import re
import sys

import numpy as np
from numpy.typing import ArrayLike, NDArray
from package import PACKAGE, exports, modules, public_names, role
from sphinx.util.typing import stringify_annotation

_HEAD = """# API

What users import, by module: `from fem_resnet import *` brings all of these names.
"""
_INSIDE = """
## Inside

Modules that the others stand on.
"""


def pages() -> dict[str, str]:
    """Page texts by file name."""
    inside = [name for name in modules() if name not in exports()]
    index = _HEAD + _list(list(exports())) + _INSIDE + _list(inside)
    return {"api.md": index} | {f"api/{name}.rst": _page(name) for name in [*exports(), *inside]}


def _page(module: str) -> str:
    title = module.removeprefix(f"{PACKAGE}.")
    return f"{title}\n{'=' * len(title)}\n\n.. automodule:: {module}\n"


def _list(names: list[str]) -> str:
    lines = ["\n| module | what | names |\n|---|---|---|"]
    for module in names:
        what = (ast.get_docstring(modules()[module]) or "").split("\n")[0]
        public = exports().get(module) or public_names(modules()[module])
        links = ", ".join(role(f"{module}.{name}", module, name) for name in public)
        plain = re.sub(r"([|*<$])", r"\\\1", what)
        lines.append(f"| {role(module, module)} | {plain} | {links} |")
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", *(f"api/{module}" for module in names), "```", ""])


def skip_foreign(app, what, name, obj, skip, options):
    """Handler of autodoc-skip-member: methods with a docstring from outside of the package."""
    module = getattr(obj, "__module__", None) or ""
    if skip or what != "class" or getattr(obj, "__doc__", None) or not module.startswith(PACKAGE):
        return None
    owner = getattr(sys.modules[module], obj.__qualname__.split(".")[0], None)
    says = (cls for cls in getattr(owner, "__mro__", ()) if getattr(vars(cls).get(obj.__name__), "__doc__", None))
    return not next(says, object).__module__.startswith(PACKAGE)


def shorten(app, what, name, obj, options, signature, returns):
    """Handler of autodoc-process-signature: aliases of NumPy by their names."""

    def short(text):
        for alias, label in ((ArrayLike, "ArrayLike"), (NDArray[np.float64], "NDArray[float64]")):
            text = text and text.replace(stringify_annotation(alias, "smart"), label)
            text = text and text.replace(stringify_annotation(alias, "fully-qualified-except-typing"), label)
        return text

    return short(signature), short(returns)
