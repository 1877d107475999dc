"""Demo pages: literate scripts as what sphinx-gallery reads.

The module docstring is the beginning of the page. A line `# %% Title` starts a section; the comment lines right below
it are its text. Other comments become text where they begin in the first column and stand between blank lines. The
rest is code. The figure of the full run stands below the first text if docs/figures has one of the demo's name, and is
its picture in the gallery. What the full run prints stands at the end, where a file of its name with `.txt` is beside it.
"""

import ast
import builtins
import json
import re
from pathlib import Path

import plain_text
from package import ROOT
from PIL import Image

_SECTION = "# %%"
_PRINTED = "What the full run prints"
_ORDER = [
    "digits_on_a_disk", "digits_table", "digits_cross_validation", "contractive_classifier", "four_ways_to_train",
    "choice_of_lambda", "what_the_data_determine", "mesh_independence", "same_network_other_mesh", "costate_twice",
    "limits", "architectures", "value_function", "nearby_inputs", "burgers_on_the_circle", "burgers_table",
    "heat_on_a_gear", "darcy_on_a_plate", "waves_on_the_sphere", "outlines_on_the_circle", "few_samples",
    "untuned", "closure",
]  # fmt: skip

#: Which part of a figure's width is the picture in the gallery; all of it where nothing is said.
_CROPS = {
    "contractive_classifier": (0.0, 0.345), "digits_on_a_disk": (0.0, 0.605), "same_network_other_mesh": (0.0, 0.275),
    "heat_on_a_gear": (0.46, 0.72), "value_function": (0.62, 0.9), "what_the_data_determine": (0.21, 0.395),
    "waves_on_the_sphere": (0.0, 0.3), "closure": (0.4, 0.6),
}  # fmt: skip

#: Scripts that run when the gallery does.
THAT_RUN = r".*\.py$"

_HEAD = """Demos
=====

Each demo is a script and ends with an assertion of what it claims. Figures and tables are those of the full run.
In its short form, ``containers/run python demos/NAME.py --short``, a demo takes some seconds.
"""


def short_form(gallery_conf, script_vars) -> list[str]:
    """The arguments that sphinx-gallery runs a demo with."""
    return ["--short"]


def name_the_file(gallery_conf, name) -> None:
    """Give the demo that comes next its `__file__`, which sphinx-gallery does not: modules look for names here last."""
    builtins.__file__ = str(ROOT / "demos" / Path(name).name)


def in_order(name: str) -> tuple[int, str]:
    """Where a demo stands in the gallery; a new one comes last."""
    stem = Path(name).stem
    return (_ORDER.index(stem) if stem in _ORDER else len(_ORDER), stem)


def sources() -> dict[str, str]:
    """Texts of the gallery's sources by file name."""
    demos = sorted((ROOT / "demos").glob("*.py"))
    made = {f"demo_sources/{path.name}": source(path.read_text(), path.stem) for path in demos}
    return {"demo_sources/GALLERY_HEADER.rst": _HEAD} | made


def draw_thumbnails(folder: Path) -> None:
    """Write the pictures of the gallery: a piece of each figure in docs/figures."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "docs" / "figures").glob("*.png")):
        figure = Image.open(path).convert("RGB")
        left, right = (round(part * figure.width) for part in _CROPS.get(path.stem, (0.0, 1.0)))
        figure.crop((left, 0, right, figure.height)).save(folder / path.name)


def source(script: str, name: str) -> str:
    """The demo with its texts in reStructuredText."""
    docstring = ast.parse(script).body[0]
    title, *rest = ast.get_docstring(ast.parse(script)).splitlines()
    text = _rst(rest[1:] if rest and set(rest[0]) <= {"=", "-"} else rest)
    figure = f"figures/{name}.png" if (ROOT / "docs" / "figures" / f"{name}.png").exists() else None
    if figure:
        wide, high = Image.open(ROOT / "docs" / figure).size
        text += f"\n\n.. figure:: /{figure}\n   :alt: {title}\n   :width: {100 if wide > 1.5 * high else 60}%"
    parts = [f'r"""{title}\n{"=" * len(title)}\n\n{text}\n"""']
    for kind, block in _blocks(script.splitlines()[docstring.end_lineno :]):
        parts.append(block if kind == "code" else _commented(block))
    if figure:
        first_code = next(number for number, part in enumerate(parts) if number and not part.startswith(_SECTION))
        parts[first_code] += f"\n\n# sphinx_gallery_thumbnail_path = 'generated/thumbnails/{name}.png'"
    printed = ROOT / "demos" / f"{name}.txt"
    if printed.exists():
        lines = ["    " + line for line in printed.read_text().rstrip().splitlines()]
        parts.append(_commented("\n".join([_PRINTED, "-" * len(_PRINTED), "", ".. code-block:: text", "", *lines])))
    return "\n\n".join(parts) + "\n"


def tidy_downloads(app):
    """Give the original script for download, and notebooks whose texts are Markdown."""
    for path in sorted((Path(app.srcdir) / "generated" / "demos").glob("*.ipynb")):
        script = ROOT / "demos" / f"{path.stem}.py"
        if script.exists():
            path.with_suffix(".py").write_text(script.read_text())
            notebook = json.loads(path.read_text())
            for cell in notebook["cells"]:
                if cell["cell_type"] == "markdown":
                    cell["source"] = [_markdown("".join(cell["source"]), path.stem)]
            path.write_text(json.dumps(notebook, indent=1))


def _markdown(text, name):
    """What sphinx-gallery made of a text, without the marks of reStructuredText that it leaves."""
    if text.startswith(f"## {_PRINTED}"):
        return f"## {_PRINTED}\n\n```text\n{(ROOT / 'demos' / f'{name}.txt').read_text()}```\n"
    text = re.sub(r":py:obj:`([^`<]*?)\s*<[^`>]*>`", r"`\1`", text)
    text = re.sub(r"(?<!`)``(?!`)", "`", text).replace("```none", "```text")
    text = re.sub(r"^\.\. figure::.*\n(   :.*\n?)*", "", text, flags=re.M)
    return re.sub(r"\\ ?([^\w\s])", r"\1", text)


def _blocks(lines):
    """Pairs of `text` or `code` and what is in it, in order."""
    code = []
    while lines:
        comment = _leading_comment(lines)
        alone = not code or not code[-1].strip()
        ends = len(comment) == len(lines) or not lines[len(comment)].strip()
        if comment and (comment[0].startswith(_SECTION) or (alone and ends)):
            yield from _code(code)
            code = []
            yield "text", _comment_text(comment)
            lines = lines[len(comment) :]
        else:
            step = max(len(comment), 1)
            code += lines[:step]
            lines = lines[step:]
    yield from _code(code)


def _leading_comment(lines):
    """The comment lines that these lines begin with, up to the next section."""
    comment = []
    for line in lines:
        if not line.startswith("#") or (comment and line.startswith(_SECTION)):
            break
        comment.append(line)
    return comment


def _comment_text(comment):
    heading = ""
    if comment[0].startswith(_SECTION):
        title = comment[0].removeprefix(_SECTION).strip()
        heading = f"{title}\n{'-' * len(title)}\n\n"
        comment = comment[1:]
    return (heading + _rst([line.lstrip("#").removeprefix(" ") for line in comment])).strip()


def _code(code):
    text = "\n".join(re.sub(r"  # (fmt|noqa|type)\b.*", "", line) for line in code).strip("\n")
    if text.strip():
        yield "code", text


def _commented(text):
    return "\n".join([_SECTION, *(f"# {line}".rstrip() for line in text.splitlines())])


def _rst(lines):
    text = "\n".join(plain_text.to_rst(list(lines))).strip("\n")
    return re.sub(r"^( *)::$", r"\1.. code-block:: none", text, flags=re.M)  # sphinx-gallery would take `::` for Python
