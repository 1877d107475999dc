"""What each tool takes: a table of all tools and features, from the declarations (`fem_resnet.features`).

containers/run python docs/tools.py            prints the page
"""

from importlib import import_module

from package import home

import fem_resnet

_DECLARED = import_module(home("TOOLS"))
FEATURES, TOOLS = _DECLARED.FEATURES, _DECLARED.TOOLS


def pages() -> dict[str, str]:
    """Page texts by file name."""
    for name in fem_resnet.__all__:  # what is imported is declared
        getattr(fem_resnet, name)
    text = f"""# What each tool takes

A feature is what makes a network or a problem more than (2.8) with the loss (2.10). A tool takes the features that are
marked, and raises ValueError at the others, by name, before it does anything. A test runs every tool with every feature.

## Tools that take a learning problem

{_table([name for name in TOOLS if _takes_problem(name)], list(FEATURES))}

## Tools that take a network, a run or a trajectory

{_table([name for name in TOOLS if not _takes_problem(name)], [name for name in FEATURES if FEATURES[name].of == "net"])}
"""
    return {"tools.md": text}


def _takes_problem(tool: str) -> bool:
    return any(FEATURES[name].of == "problem" for name in TOOLS[tool])


def _table(tools: list[str], features: list[str]) -> str:
    """One row a tool, one column a feature, by the name that `supports` takes."""
    head = ["| tool |" + "".join(f" {name.replace('_', ' ')} |" for name in features), "|---|" + "---|" * len(features)]
    marks = ["".join(f" {'x' if name in TOOLS[tool] else ''} |" for name in features) for tool in tools]
    return "\n".join(head + [f"| `{tool}` |{row}" for tool, row in zip(tools, marks)])


if __name__ == "__main__":
    print(pages()["tools.md"])
