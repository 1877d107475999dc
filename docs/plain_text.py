r"""Docstrings are plain text; this makes reStructuredText of them, before numpydoc reads their sections.

- What is indented below its paragraph is a formula: it becomes a literal block.
- `code` in backticks is code, and a link where it is the name of something documented.
- *Emphasis*, lists, tables, doctests and directives stay; every other ``*``, ``|``, ``_`` or backslash is itself.
"""

import re
from functools import cache
from itertools import groupby

from package import documented, modules

#: Sections of entries in the first column, with their descriptions indented.
_OF_ENTRIES = {
    "Parameters", "Other Parameters", "Attributes", "Methods", "Returns", "Yields", "Receives", "Raises", "Warns",
}  # fmt: skip
#: Sections that are left to numpydoc.
_LEFT = {"See Also", "References"}

_UNDERLINE = re.compile(r"(-{3,}|={3,})$")
_TABLE = re.compile(r"=+( +=+)+$")
_ITEM = re.compile(r" *([-*+]|\d+\.|#\.) +(?=\S)")
_ENUMERATOR = re.compile(r"( *)(?=\(?([A-Za-z]|[ivx]+)[.)] )")
_SIGNATURE = re.compile(r"([\w., ]+=)?\s*[\w.]+\(.*\)$")
_TOKEN = re.compile(
    r"(?P<kept>``.+?``|:[a-z][\w:]*:`[^`]+`|`[^`]+<\w+:[^`]+>`__?|https?://\S+|\[\w+\]_(?!\w)"
    r"|(?<![\w*])(?P<stars>\*\*?)(?=[^\s*])[^*]*(?<!\s)(?P=stars)(?![\w*]))"
    r"|`(?P<code>[^`]+)`"
    r"|(?P<mark>\\|`|\*(?=\S)|\|(?=\S)|^\||(?<=\w)_(?!\w))",
    re.DOTALL | re.MULTILINE,
)


def process(app, what, name, obj, options, lines):
    """Handler of autodoc-process-docstring."""
    lines[:] = to_rst(lines)


def to_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    turn, rst, in_formula = {"prose": _prose, "table": _table}, [], False
    for (kind, column), group in groupby(_kinds(lines), key=lambda line: line[:2]):
        group = [line for _, _, line in group]
        if kind == "formula" and not in_formula:
            rst += ["", " " * column + "::", ""]
        elif in_formula and kind not in ("formula", "blank"):
            rst += [""]
        in_formula = kind == "formula" or (in_formula and kind == "blank")
        rst += turn[kind](group) if kind in turn else group
    if rst and _SIGNATURE.match(rst[0]):
        rst[0] = r"\ " + rst[0]  # numpydoc would take it for a signature, and drop it
    elif rst and rst[0].startswith("- "):
        rst[0] = "\\" + rst[0]  # a minus: no docstring begins with a list
    return rst


def _kinds(lines):
    """Each line as what it is (blank, prose, formula, table, kept), the column of the text around it, and itself."""
    section, base, item, block, whole = "", 0, None, None, None  # whole: what all lines are up to the next blank one
    for line, after in zip(lines, [*lines[1:], ""]):
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if item is not None and text and indent < item:
            item = None
        column = base if item is None else item
        if not text:
            whole = None
            yield "blank", 0, line
        elif whole or (block is not None and indent > block):
            yield whole or "kept", 0, line
        elif indent == 0 and _UNDERLINE.match(after) and not _TABLE.match(text):
            section, base, item, block = text, 4 if text in _OF_ENTRIES else 0, None, None
            yield "kept", 0, line
        elif section in _LEFT or (indent == 0 and (section in _OF_ENTRIES or _UNDERLINE.match(text))):
            yield "kept", 0, line
        elif text.startswith(">>>") or _TABLE.match(text):
            whole = "table" if _TABLE.match(text) else "kept"
            yield whole, 0, line
        elif text.startswith(".. "):
            block = indent
            yield "kept", 0, line
        elif indent <= column or (_ITEM.match(line) and indent < column + 4):
            match = _ITEM.match(line)
            item = match.end() if match else item
            block = indent if text.endswith("::") else None
            yield "prose", 0, line
        else:
            block = None
            yield "formula", column, line


def _prose(lines):
    text = _TOKEN.sub(_token, "\n".join(lines))
    return _ENUMERATOR.sub(r"\1\\", text, count=1).split("\n") if _ENUMERATOR.match(text) else text.split("\n")


def _table(lines):
    """A simple table with its cells as prose; the columns are made wide enough for that."""
    starts = [match.start() for match in re.finditer("=+", lines[0])]
    ends = [*starts[1:], None]
    rows = [[line[start:end].rstrip() for start, end in zip(starts, ends)] for line in lines]
    rows = [row if set("".join(row)) <= {"=", " "} else [_cell(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    margin = " " * starts[0]
    wide = [[width * "=" if cell[:1] == "=" else cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]
    return [(margin + "  ".join(row)).rstrip() for row in wide]


def _cell(text):
    return ("\\" if _ITEM.match(text) else "") + _prose([text])[0]


def _token(match):
    if match["kept"]:
        return match[0]
    if match["mark"]:
        return "\\" + match[0]
    code = match["code"].strip()
    place = _places().get(code)
    before = r"\ " if match.start() and re.match(r"\w", match.string[match.start() - 1]) else ""
    after = r"\ " if re.match(r"\w", match.string[match.end() : match.end() + 1]) else ""
    return before + (f":py:obj:`{code} <{place}>`" if place else f"``{code}``") + after


@cache
def _places():
    """Documented names by what a docstring may call them: `Run`, `Run.state`, `network.Run`, in full."""
    places = {}
    for name in documented():
        module = max((module for module in modules() if f"{name}.".startswith(f"{module}.")), key=len)
        inner = name.removeprefix(module).lstrip(".")
        parts = module.split(".")[1:]  # `network.Run` and `run.Run`, wherever the module stands; `head` may be anything
        shorts = {".".join([*parts[start:], inner]) for start in range(len(parts) + 1)} if inner else set()
        for short in {name, *shorts}:
            places.setdefault(short, set()).add(name)
    return {short: names.pop() for short, names in places.items() if len(names) == 1}
