"""`python -m fem_resnet COMMAND ..`: what the package does without a script.

A command is a module with a function `main(arguments)`, which returns the exit code. It is imported when it is called, so that
the help comes at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from fem_resnet.arguments import did_you_mean

__all__ = ["COMMANDS", "main"]

#: The module and the help of each command.
COMMANDS = {
    "verify": ("verify.__main__", "hold a learning problem against what it says it is"),
    "info": ("commands.info", "versions, ranks and caches: what a report of a fault should have"),
    "report": ("commands.report", "what layers of a saved network do to perturbations and gradients"),
    "demo": ("commands.demo", "run a demo of the source tree, or list them"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments
        Its arguments; those of the process if left out.

    Returns
    -------
    int
        The exit code, the same on all ranks.
    """
    names = "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fem_resnet",
        usage="%(prog)s COMMAND [ARGUMENTS ..]",
        description=f"commands, each with a --help of its own:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.command not in COMMANDS:
        parser.error(f"expected one of {', '.join(COMMANDS)}, got {given.command!r}{did_you_mean(given.command, COMMANDS)}")
    module, _ = COMMANDS[given.command]
    return import_module(f"fem_resnet.{module}").main(given.rest)


if __name__ == "__main__":
    sys.exit(main())
