"""The map of the package: its rooms, one above the other, and who imports whom, drawn from the imports themselves.

A room is a folder of modules, or a module in the package itself. It stands one floor above the highest room that it
imports. An arrow that other arrows imply is left out.

    containers/run python docs/import_map.py FILE          draws the map
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from package import PACKAGE, modules


def rooms() -> dict[str, set[str]]:
    """Each room and the rooms that it imports."""
    found = {}
    for module, tree in modules().items():
        room = _room(module)
        used = {_room(name) for name in _imports(tree) if name in modules()}
        found.setdefault(room, set()).update(used - {room})
    return found


def _room(module):
    folder = module.rpartition(".")[0].removeprefix(PACKAGE)
    return folder.removeprefix(".") or module.removeprefix(f"{PACKAGE}.")


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floors(rooms: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room; a circle of imports is an error."""
    floor = {}

    def of(room, above=()):
        if room in above:
            raise ValueError(f"imports go in a circle: {' -> '.join([*above, room])}")
        if room not in floor:
            floor[room] = max((of(used, (*above, room)) + 1 for used in rooms[room]), default=0)
        return floor[room]

    for room in rooms:
        of(room)
    return floor


def arrows(rooms: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Importing and imported room, without the pairs that longer ways imply."""
    reached = {}

    def reach(room):
        if room not in reached:
            reached[room] = rooms[room].union(*(reach(used) for used in rooms[room]))
        return reached[room]

    return [
        (room, used) for room in rooms for used in sorted(rooms[room])
        if not any(used in reach(other) for other in rooms[room] - {used})
    ]  # fmt: skip


def draw(path: Path) -> None:
    """Write the map to a file, in the format that its name says."""
    graph = rooms()
    floor, edges = floors(graph), arrows(graph)
    place = _places(floor, edges)
    wide = max(x for x, _ in place.values()) + 1
    high = max(floor.values()) + 1
    figure = Figure(figsize=(max(8, 1.55 * wide), 0.72 * high + 0.4), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.6, wide - 0.4), ylim=(-0.6, high - 0.4))
    axes.axis("off")
    for room, used in edges:
        (x0, y0), (x1, y1) = place[room], place[used]
        arrow = dict(arrowstyle="-|>", color="#7a8ca3", lw=0.7, shrinkA=9, shrinkB=9, mutation_scale=7)
        axes.annotate("", (x1, y1), (x0, y0), arrowprops=arrow, zorder=1)
    for room, (x, y) in place.items():
        box = dict(boxstyle="round,pad=0.35", facecolor="#e8eef7", edgecolor="#3b6ea5", lw=0.8)
        axes.text(x, y, room, ha="center", va="center", fontsize=8, bbox=box, zorder=2, color="#10243e")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def _places(floor, edges):
    """Column and floor of each room: a room stands near those below it that it imports."""
    below = defaultdict(list)
    for room, used in edges:
        below[room].append(used)
    wide = max(list(floor.values()).count(level) for level in floor.values())
    place = {}
    for level in range(max(floor.values()) + 1):
        row = [room for room in floor if floor[room] == level]
        middle = {
            room: sum(place[used][0] for used in below[room]) / len(below[room]) if below[room] else wide / 2 for room in row
        }
        row.sort(key=lambda room: (middle[room], room))
        gap = wide / len(row)
        place |= {room: ((number + 0.5) * gap - 0.5, level) for number, room in enumerate(row)}
    return place


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
