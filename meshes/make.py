#!/usr/bin/env python3
"""Make every mesh of this folder again from its source, and its picture: NAME.geo gives NAME.msh and a PNG for the docs.

    python meshes/make.py              # make all
    python meshes/make.py gear disk    # make these
    python meshes/make.py --check      # make all in a temporary folder, and compare with the files that are here

It needs the Python packages of Gmsh and matplotlib (`pip install gmsh matplotlib`), and no Firedrake. The files here are those
of the version of Gmsh below. Another version may place points otherwise: `--check` then says so, and compares nothing.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gmsh
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.patches import Patch
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection
from PIL import Image

HERE = Path(__file__).resolve().parent
PICTURES = HERE.parent / "docs" / "figures" / "meshes"
VERSION = "4.15.2"

#: Colours of parts that have cells, and of curves.
CELLS = ["#9ecae1", "#fdd0a2", "#c7e9c0"]
CURVES = ["#d62728", "#1f77b4", "#2ca02c"]
FACES_OF_TETRAHEDRON = [(1, 2, 3), (0, 3, 2), (0, 1, 3), (0, 2, 1)]


def make(source: Path, target: Path) -> None:
    """Write the mesh of a source as text, in the format 2.2, which PETSc reads."""
    gmsh.clear()
    gmsh.option.restoreDefaults()  # a source may have set some
    gmsh.option.setNumber("General.Terminal", 0)
    gmsh.option.setNumber("General.NumThreads", 1)
    gmsh.option.setNumber("Mesh.MshFileVersion", 2.2)
    gmsh.open(str(source))
    gmsh.model.mesh.generate(max(dimension for dimension, _ in gmsh.model.getPhysicalGroups()))
    gmsh.write(str(target))
    # PETSc would take copied nodes for the same ones.
    target.write_text(re.sub(r"\$Periodic\n.*?\$EndPeriodic\n", "", target.read_text(), flags=re.DOTALL))


def draw(mesh: Path, picture: Path) -> None:
    """Draw a mesh with its physical groups in colours."""
    gmsh.clear()
    gmsh.open(str(mesh))
    tags, coordinates, _ = gmsh.model.mesh.getNodes()
    places = np.zeros((int(tags.max()) + 1, 3))
    places[tags] = coordinates.reshape(-1, 3)
    flat = bool(np.ptp(places[:, 2]) == 0)
    figure = plt.figure(figsize=(3.6, 3.6), layout="constrained")
    axes = figure.add_subplot() if flat else figure.add_subplot(projection="3d")
    shapes: dict[bool, tuple[list, list]] = {True: ([], []), False: ([], [])}  # of lines, and of faces
    legend = []
    for dimension, number, colour in _coloured(flat):
        polygons, colours = shapes[dimension == 1]
        for corners in _polygons(dimension, number):
            polygons += list(places[corners][:, :, :2] if flat else places[corners])
            colours += [colour] * len(corners)
        legend.append(Patch(facecolor=colour, label=gmsh.model.getPhysicalName(dimension, number)))
    of_lines, of_faces = (LineCollection, PolyCollection) if flat else (Line3DCollection, Poly3DCollection)
    (faces, of_face), (lines, of_line) = shapes[False], shapes[True]
    if faces:
        axes.add_collection(
            of_faces(faces, facecolors=of_face, edgecolors="0.35", linewidths=0.4, **({} if flat else {"shade": True}))
        )
    if lines:
        axes.add_collection(of_lines(lines, colors=of_line, linewidths=1.8))
    low, high = places[tags].min(axis=0), places[tags].max(axis=0)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="$y_1$", ylabel="$y_2$")
    if flat:
        axes.set_aspect("equal")
        axes.margins(0.03)
        axes.autoscale()
    else:
        axes.set_zlim(low[2], high[2])
        axes.set_zlabel("$y_3$", labelpad=-4)
        axes.set_box_aspect(high - low, zoom=0.8)
        axes.tick_params(labelsize=7, pad=-2)
        axes.view_init(elev=28, azim=-60)
        axes.locator_params(nbins=3)
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 3), fontsize=8, frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(128).save(picture, optimize=True)  # a third of the size


def _coloured(flat: bool) -> Iterator[tuple[int, int, str]]:
    """Dimension, number and colour of the physical groups that are drawn: all with cells, and curves that nothing hides."""
    groups = gmsh.model.getPhysicalGroups()
    top = max(dimension for dimension, _ in groups)
    of_cells, curves = ([number for d, number in groups if d == dimension] for dimension in (top, 1))
    if top > 1:
        yield from ((top, number, colour) for number, colour in zip(of_cells, CELLS))
    if flat or top == 1:
        yield from ((1, number, colour) for number, colour in zip(curves, CURVES))


def _polygons(dimension: int, number: int) -> Iterator[np.ndarray]:
    """Nodes of the corners of a group's cells, one array a kind; of tetrahedra the triangles of the group's surface."""
    for entity in gmsh.model.getEntitiesForPhysicalGroup(dimension, number):
        for kind, _, nodes in zip(*gmsh.model.mesh.getElements(dimension, entity)):
            corners = nodes.astype(int).reshape(-1, gmsh.model.mesh.getElementProperties(kind)[3])
            if dimension == 3:
                faces = corners[:, FACES_OF_TETRAHEDRON].reshape(-1, 3)
                _, first, count = np.unique(np.sort(faces, axis=1), axis=0, return_index=True, return_counts=True)
                corners = faces[first[count == 1]]
            yield corners


def check(sources: list[Path]) -> int:
    """Whether the files here are what their sources give: 0 if so, 1 if not."""
    if gmsh.GMSH_API_VERSION != VERSION:
        print(f"made by Gmsh {VERSION}, this is {gmsh.GMSH_API_VERSION}: its meshes may differ, nothing was compared")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        differing = []
        for source in sources:
            again = Path(folder) / source.with_suffix(".msh").name
            make(source, again)
            if again.read_bytes() != source.with_suffix(".msh").read_bytes():
                differing.append(again.name)
    print(f"{len(sources)} meshes made again; different: {', '.join(differing) or 'none'}")
    return len(differing) > 0


def main() -> int:
    """Make, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of meshes; all if left out")
    parser.add_argument("--check", action="store_true", help="write nothing, compare with what is here")
    given = parser.parse_args()
    sources = [HERE / f"{name}.geo" for name in given.names] or sorted(HERE.glob("*.geo"))
    if missing := [source.name for source in sources if not source.is_file()]:
        parser.error(f"there is no {', '.join(missing)}")
    gmsh.initialize()
    gmsh.option.setNumber("General.Terminal", 0)
    try:
        if given.check:
            return check(sources)
        PICTURES.mkdir(parents=True, exist_ok=True)
        for source in sources:
            mesh = source.with_suffix(".msh")
            make(source, mesh)
            draw(mesh, PICTURES / f"{source.stem}.png")
            print(f"{mesh.name}: {mesh.stat().st_size / 1e3:.0f} kB")
    finally:
        gmsh.finalize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
