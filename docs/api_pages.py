"""API pages: one a module, and the list of them; what autodoc is told about members and signatures."""

import ast
import re
import sys

import numpy as np
from numpy.typing import ArrayLike, NDArray
from package import PACKAGE, exports, folder, folders, modules, public_names, role
from sphinx.util.typing import stringify_annotation

_HEAD = """# API

`from fem_resnet import *` brings all public names. Each folder of the package has a section, each module a page.
"""
_INSIDE = """
## Inside

Modules without public names, which the others stand on.
"""


def pages() -> dict[str, str]:
    """Page texts by file name."""
    inside = [name for name in modules() if name not in exports()]
    text = _HEAD
    for name in sorted({folder(module) for module in exports()}, key=lambda name: (name != PACKAGE, name)):
        text += f"\n## {name}\n" + (f"\n{_plain(folders()[name])}\n" if folders().get(name) else "")
        text += _list({module: module.split(".")[-1] for module in exports() if folder(module) == name})
    text += _INSIDE + _list({module: module.removeprefix(f"{PACKAGE}.") for module in inside})
    return {"api.md": text} | {f"api/{name}.rst": _page(name) for name in [*exports(), *inside]}


def _page(module: str) -> str:
    title = module.removeprefix(f"{PACKAGE}.")
    # An orphan: a hundred entries more in the navigation of every page help nobody, and take half of the build.
    return f":orphan:\n\n{title}\n{'=' * len(title)}\n\n:doc:`API </generated/api>`\n\n.. automodule:: {module}\n"


def _list(labels: dict[str, str]) -> str:
    """A table of modules, with the name that each is called there."""
    lines = ["\n| module | what | names |\n|---|---|---|"]
    for module in labels:
        what = (ast.get_docstring(modules()[module]) or "").split("\n")[0]
        public = exports().get(module) or public_names(modules()[module])
        links = ", ".join(role(f"{module}.{name}", module, name) for name in public)
        lines.append(f"| {role(module, module, labels[module])} | {_plain(what)} | {links} |")
    return "\n".join([*lines, ""])


def _plain(text):
    return re.sub(r"([|*<$])", r"\\\1", text)


def skip_foreign(app, what, name, obj, skip, options):
    """Handler of autodoc-skip-member: methods with a docstring from outside of the package."""
    if what == "class" and name.startswith("set_") and name.endswith("_request"):
        return True  # scikit-learn makes these for every estimator, with references to its own pages
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
