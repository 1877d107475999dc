"""`python -m fem_resnet demo [NAME] [ARGUMENTS ..]`: run a demo of the source tree; without a name, list them.

Arguments go to the demo: all of them have `--short`, which takes less than a minute.
"""

from __future__ import annotations

import argparse
import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from fem_resnet.arguments import did_you_mean
from fem_resnet.reporting import table

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments
        Its arguments; those of the process if left out.

    Returns
    -------
    int
        The exit code: that of the demo, or 2 if there is none of that name.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fem_resnet demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="the name of the demo")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of the demo")
    given = parser.parse_args(arguments)
    folder = Path(__file__).parents[2] / "demos"
    demos = {path.stem: path for path in sorted(folder.glob("*.py"))}
    if not demos:
        parser.error(f"there is no folder {folder}: demos are in the source tree, not in an installed package; clone it")
    if given.name is None:
        sys.stdout.write("\n".join(table(("demo", "shows"), [(name, _title(path)) for name, path in demos.items()])) + "\n")
        return 0
    name = given.name.removesuffix(".py")
    if name not in demos:
        parser.error(f"there is no demo {name!r}{did_you_mean(name, demos)}")
    sys.argv = [str(demos[name]), *given.rest]
    sys.path.insert(0, str(folder))  # as for a script: demos import their neighbours
    runpy.run_path(str(demos[name]), run_name="__main__")
    return 0


def _title(path: Path) -> str:
    """The first line of a demo's page."""
    lines = [line.strip() for line in (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()]
    return next((line for line in lines if line and set(line) - set("=-~")), "")
