"""Sphinx reads this; the pages are built by

    containers/run python -m sphinx -W --keep-going -b html docs docs/_build/html
"""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

# PETSc would take Sphinx's arguments for its own options, and complain about them at the end.
arguments, sys.argv = sys.argv, sys.argv[:1]
import firedrake  # noqa: E402, F401

sys.argv = arguments

import api_pages  # noqa: E402
import demo_pages  # noqa: E402
import equations  # noqa: E402
import plain_text  # noqa: E402
import tools  # noqa: E402

import fem_resnet  # noqa: E402

project = "fem_resnet"
release = version = fem_resnet.__version__
html_show_copyright = False

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc", "myst_parser"]
exclude_patterns = ["_build"]
highlight_language = "none"  # literal blocks are formulas; Python is marked as such

html_theme = "alabaster"
html_theme_options = {
    "description": "Residual networks on a meshed label domain",
    "page_width": "1180px",
    "body_max_width": "auto",
    "fixed_sidebar": True,
}
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}

myst_enable_extensions = ["dollarmath", "substitution"]
PICTURE = "digits_on_a_disk.png"
CAPTION = "Digits flow through the layers of a network on a disk; the learning curve; what was read"
myst_substitutions = {"picture": f"![{CAPTION}]({PICTURE})" if (DOCS / PICTURE).exists() else ""}

autodoc_default_options = {"members": True, "member-order": "bysource", "special-members": "__call__"}
autodoc_docstring_signature = False  # a docstring that begins with f(T) has no signature
python_maximum_signature_line_length = 100
autosummary_generate = False
numpydoc_show_class_members = False
suppress_warnings = ["ref.python"]  # a bare name in an annotation may be that of two classes


def write_pages(app):
    """Write what is made from the sources: one page a module, one a demo, the tables of equations and tools."""
    generated = DOCS / "generated"
    pages = api_pages.pages() | demo_pages.pages() | equations.pages() | tools.pages()
    for path in [*generated.rglob("*.md"), *generated.rglob("*.rst")]:
        if str(path.relative_to(generated)) not in pages:
            path.unlink()
    for name, text in pages.items():
        path = generated / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def setup(app):
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-skip-member", api_pages.skip_foreign)
    app.connect("autodoc-process-signature", api_pages.shorten)
    # Before numpydoc reads the sections.
    app.connect("autodoc-process-docstring", plain_text.process, priority=100)
