"""Run the Python blocks of pages, one page after the other, each in a fresh namespace and an empty folder.

    containers/run python docs/run_pages.py README.md docs/tutorial.md

A block ```text right below a Python block is what that prints: words are compared, and numbers up to a twentieth. A
block marked ```{code-block} python is shown and not run. Prints the name of each page that ran as it says.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```", re.M | re.S)
_NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def run(path: Path) -> None:
    """Run one page; raises where a block fails or prints something else."""
    namespace, printed, end = {"__name__": "__main__"}, "", 0
    text = path.read_text()
    for match in _BLOCK.finditer(text):
        kind, block = match.groups()
        line = text[: match.start()].count("\n") + 1
        if kind == "text" and printed and not text[end : match.start()].strip():
            _compare(printed, block, f"{path.name}:{line}")
        if kind == "python":
            stream = io.StringIO()
            code = compile("\n" * line + block, str(path), "exec")
            with contextlib.redirect_stdout(stream):
                exec(code, namespace)
            printed = stream.getvalue()
        end = match.end()


def _compare(printed, documented, where):
    """The same words, and numbers that differ by no more than a twentieth of the largest in their line."""
    lines = [text.strip().splitlines() for text in (printed, documented)]
    assert len(lines[0]) == len(lines[1]), f"{where}: printed is\n{printed}"
    for got, says in zip(*lines):
        assert _NUMBER.sub("0", got).split() == _NUMBER.sub("0", says).split(), f"{where}: printed is\n{printed}"
        numbers = [np.array([float(number) for number in _NUMBER.findall(text)]) for text in (got, says)]
        scale = max(map(abs, numbers[1]), default=0.0)
        np.testing.assert_allclose(*numbers, rtol=0.05, atol=0.05 * scale, err_msg=where)


if __name__ == "__main__":
    pages, sys.argv = [ROOT / name for name in sys.argv[1:]], sys.argv[:1]  # PETSc would take the names for options
    for page in pages:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            os.symlink(ROOT / "meshes", "meshes")
            run(page)
        print(page.relative_to(ROOT))
