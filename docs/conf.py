"""Sphinx reads this; the pages are built by

    containers/run python -m sphinx -W -n --keep-going -b html docs docs/_build/html

and with `-D plot_gallery=1` the demos of the gallery run in their short form too, which takes some minutes. The build
needs no network: formulas become MathML, and the names of other packages are looked up in docs/inventories.
"""

import sys
from functools import cache
from pathlib import Path

from jinja2 import PackageLoader
from jinja2.sandbox import SandboxedEnvironment
from numpydoc import docscrape_sphinx

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

# PETSc would take Sphinx's arguments for its own options, and complain about them at the end.
arguments, sys.argv = sys.argv, sys.argv[:1]
import firedrake  # noqa: E402, F401

sys.argv = arguments

import api_pages  # noqa: E402
import demo_pages  # noqa: E402
import equations  # noqa: E402
import import_map  # noqa: E402
import inventories  # noqa: E402
import mathml  # noqa: E402
import plain_text  # noqa: E402
import tools  # noqa: E402

import fem_resnet  # noqa: E402

project = "fem_resnet"
release = version = fem_resnet.__version__
html_show_copyright = False

extensions = [
    "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx.ext.viewcode", "numpydoc", "myst_parser",
    "sphinx_copybutton", "sphinx_gallery.gen_gallery",
]  # fmt: skip
exclude_patterns = ["_build", "inventories", "generated/demo_sources", "generated/demos/*.ipynb", "generated/demos/*.py"]
highlight_language = "none"  # literal blocks are formulas; Python is marked as such

# -- how pages look --------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = "fem_resnet"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
html_copy_source = False
pygments_style, pygments_dark_style = "a11y-light", "a11y-dark"

# -- pages in Markdown -----------------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath", "deflist", "attrs_block"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# -- pages from docstrings -------------------------------------------------------------------------------------------

autodoc_default_options = {"members": True, "member-order": "bysource", "special-members": "__call__"}
autodoc_mock_imports = ["torch", "jax", "onnx"]  # what fem_resnet.external and fem_resnet.export need for their pages
autodoc_docstring_signature = False  # a docstring that begins with f(T) has no signature
python_maximum_signature_line_length = 100
autosummary_generate = False
numpydoc_show_class_members = False
suppress_warnings = ["ref.python"]  # a bare name in an annotation may be that of two classes


@cache
def _templates():
    return SandboxedEnvironment(loader=PackageLoader("numpydoc"))


# numpydoc compiles its template anew for each docstring, which takes a tenth of the build.
docscrape_sphinx.SandboxedEnvironment = lambda loader: _templates()

intersphinx_mapping = inventories.mapping(DOCS / "inventories", DOCS / "generated" / "inventories")
# Names that no inventory has: private ones, and those of packages without pages of their classes.
nitpick_ignore_regex = [
    ("py:class", r"(fem_resnet\.[\w.]+\.)?_\w+"),
    ("py:class", r"fem_resnet\.[\w.]+\.(At|Part|EndFunctionals)"),
    # Annotations of fields of named tuples are shown as they are written.
    ("py:class", r"(fd\.[\w.]+|AdjFloat|weakref\.ReferenceType)"),
    ("py:class", r"(checkpoint_schedules|h5py|petsctools|pyadjoint|MPI)\.[\w.]+"),
    ("py:class", r"firedrake\.(adjoint|checkpointing|ensemble)\.[\w.]+"),
    ("py:class", r"scipy\.sparse\._\w+\.\w+"),
    ("py:class", r"(ufl\.form|ufl\.core\.expr|numpy\.random\._generator)\.\w+"),
    ("py:class", r"(torch\.Tensor|jax\.Array|onnx\.ModelProto|firedrake\.matrix\.Matrix|ufl\.core\.interpolate\.Interpolate)"),
    ("py:class", r"(numpy\.random\.mtrand\.RandomState|matplotlib\.colorizer\._ScalarMappable|tuple\[float)"),
    ("py:class", r"type\[.*numpy\._typing.*"),
]

# -- demos -----------------------------------------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": "generated/demo_sources",
    "gallery_dirs": "generated/demos",
    "filename_pattern": demo_pages.THAT_RUN,
    "plot_gallery": "False",
    "abort_on_example_error": True,
    "reset_modules": ("matplotlib", "demo_pages.name_the_file"),
    "reset_argv": "demo_pages.short_form",
    "within_subsection_order": "demo_pages.in_order",
    "write_computation_times": False,
    "capture_repr": (),
    "min_reported_time": 1e9,
    "show_signature": False,
    "download_all_examples": False,
    "remove_config_comments": True,
}


def write_pages():
    """Write what is made from the sources: API pages, demos, the tables of equations and tools, the map."""
    generated = DOCS / "generated"
    pages = api_pages.pages() | demo_pages.sources() | equations.pages() | tools.pages()
    for path in [*generated.rglob("*.md"), *generated.rglob("*.rst"), *generated.rglob("*.py")]:
        of_gallery = path.parent.name == "demos" and path.suffix != ".md" and f"demo_sources/{path.stem}.py" in pages
        if str(path.relative_to(generated)) not in pages and not of_gallery:
            path.unlink()
    for name, text in pages.items():
        path = generated / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    demo_pages.draw_thumbnails(generated / "thumbnails")
    import_map.draw(generated / "import_map.svg")


def setup(app):
    write_pages()  # before sphinx-gallery looks for its sources
    mathml.setup(app)
    app.connect("autodoc-skip-member", api_pages.skip_foreign)
    app.connect("autodoc-process-signature", api_pages.shorten)
    app.connect("builder-inited", demo_pages.tidy_downloads, priority=900)  # after sphinx-gallery
    # Before numpydoc reads the sections.
    app.connect("autodoc-process-docstring", plain_text.process, priority=100)
