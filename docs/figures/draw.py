"""Figures of demos whose full runs are long, drawn by the demos from the tables that these runs have left, demos/*.txt.

containers/run python docs/figures/draw.py
"""

import re
import sys
from pathlib import Path

FIGURES = Path(__file__).parent
DEMOS = FIGURES.parents[1] / "demos"
sys.path.append(str(DEMOS))

import burgers_table
import costate_twice
import digits_cross_validation
import digits_table
import few_samples
import mesh_independence
import nearby_inputs
import numpy as np


def table(name: str) -> str:
    """What the full run of a demo has printed."""
    return (DEMOS / f"{name}.txt").read_text()


def rows(name: str, pattern: str) -> list[list[float]]:
    """The numbers of the groups that a pattern finds in a table."""
    found = re.findall(pattern, table(name), re.M)
    return [[float(word.replace(",", "")) for word in row] for row in found]


def cells(text: str) -> list[list[str]]:
    """The rows of a table in Markdown, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if not re.fullmatch(r"[-| ]+", line)]


def draw_mesh_independence(path: Path) -> None:
    mesh_independence.draw(path, rows("mesh_independence", r"^ *(\d+) +(\d+) +(\d+) +(\d+) +(?:> )?(\d+)$"))


def draw_costate_twice(path: Path) -> None:
    by_scheme: dict[str, list[float]] = {}
    pattern = r"^(\w+, .*?) +(\w+) \| +(\S+) +\S+ \|"
    for _, scheme, difference in re.findall(pattern, table("costate_twice"), re.M):
        by_scheme.setdefault(scheme, []).append(float(difference))
    (where,) = re.findall(r"^(.*), scheme 4, all step sizes", table("costate_twice"), re.M)
    found = rows("costate_twice", r"^ +(0\.\d+) +(\S+) +(?:\S+ +)?(\d\.\d+e-\d+) +(?:\d\.\d+ +)?\S+e-16 +\S+e-16$")
    costate_twice.draw(path, by_scheme, where, *zip(*found))


def draw_digits_table(path: Path) -> None:
    head, *found = cells(table("digits_table"))
    splits = [k for k, title in enumerate(head) if title.startswith("split")]
    digits_table.draw(path, {row[0]: [float(row[k]) for k in splits] for row in found})


def draw_burgers_table(path: Path) -> None:
    found = [[row[0], *(float(cell.replace(",", "") or 0) for cell in row[1:4])] for row in cells(table("burgers_table"))[1:]]
    burgers_table.draw(path, found, rows("burgers_on_the_circle", r"^\d+ layers, (?:from )?seed \d +(\d+) +(\S+)%"))


def draw_digits_cross_validation(path: Path) -> None:
    found = re.findall(r"^rank.* accuracy (\S+)$", table("digits_cross_validation"), re.M)
    digits_cross_validation.draw(path, [float(accuracy) for accuracy in found])


def draw_nearby_inputs(path: Path) -> None:
    number = r"(\d\S*e-\d+)"
    pattern = rf"^(0\.\d) +\| +\S+ \| +{number} +\S+ +(?:\S+ +)?\| +{number} +\S+ +(?:\S+ +)?\| +{number}"
    found = np.array(rows("nearby_inputs", pattern))
    at_start, on_the_way = np.split(found[:, 1:], 2)
    tables = {"perturbed inputs": at_start, "perturbed after the first layer": on_the_way}
    nearby_inputs.draw(path, found[: len(at_start), 0], tables)


def draw_few_samples(path: Path) -> None:
    laws: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for first, *others in cells(table("few_samples").split("\n\n", 1)[1]):
        if ", error in %" in first:
            law = laws.setdefault(first.partition(",")[0], {})
            sizes = [float(cell.replace(",", "")) for cell in others]
        else:
            law[first] = [(size, float(cell)) for size, cell in zip(sizes, others) if cell]
    few_samples.draw(path, laws)


if __name__ == "__main__":
    for draw in (
        draw_mesh_independence, draw_costate_twice, draw_digits_table, draw_burgers_table, draw_digits_cross_validation,
        draw_nearby_inputs, draw_few_samples,
    ):  # fmt: skip
        draw(FIGURES / f"{draw.__name__.removeprefix('draw_')}.png")
