"""Demo pages: a literate script as Markdown.

The module docstring is the beginning of the page. A line `# %% Title` starts a section; the comment lines right below
it are its text. Other comments become text where they begin in the first column and stand between blank lines. The
rest is code. What the demo prints in full stands at the end, where a file of its name with `.txt` is beside it.
"""

import ast
import re

from package import ROOT

_SECTION = "# %%"


def pages() -> dict[str, str]:
    """Page texts by file name."""
    demos = {path.stem: page(path.read_text(), path.stem) for path in sorted((ROOT / "demos").glob("*.py"))}
    index = "# Demos\n\n```{toctree}\n" + "".join(f"demos/{name}\n" for name in demos) + "```\n"
    return {"demos.md": index} | {f"demos/{name}.md": text for name, text in demos.items()}


def page(source: str, name: str) -> str:
    """The Markdown of a literate script."""
    docstring = ast.parse(source).body[0]
    lines = source.splitlines()[docstring.end_lineno :]
    title, *rest = ast.get_docstring(ast.parse(source)).splitlines()
    text = "\n".join(rest[1:] if rest and set(rest[0]) <= {"=", "-"} else rest)
    link = f"The script: {{download}}`demos/{name}.py <../../../demos/{name}.py>`."
    parts = [f"# {title}", _markdown(text), link]
    for kind, block in _blocks(lines):
        parts.append(f"```python\n{block}\n```" if kind == "code" else block)
    printed = ROOT / "demos" / f"{name}.txt"
    if printed.exists():
        parts.append(f"## What it prints\n\n```text\n{printed.read_text().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


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
        heading = f"## {comment[0].removeprefix(_SECTION).strip()}\n\n"
        comment = comment[1:]
    return (heading + _markdown("\n".join(line.lstrip("#").removeprefix(" ") for line in comment))).strip()


def _code(code):
    text = "\n".join(re.sub(r"  # (fmt|noqa|type)\b.*", "", line) for line in code).strip("\n")
    if text.strip():
        yield "code", text


def _markdown(text):
    """Plain text as Markdown: indented blocks are code there too, and a `<` is no tag."""
    return "\n".join(line if line.startswith("    ") else line.replace("<", r"\<") for line in text.splitlines())
