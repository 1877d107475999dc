"""Runs as time series for ParaView."""

from __future__ import annotations

import os
from pathlib import Path

import firedrake as fd
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import flag, instance
from fem_resnet.network.run import Run
from fem_resnet.plot.canvas import has_vtk
from fem_resnet.plot.fields import column
from fem_resnet.ranks import in_step, on_first, same

__all__ = ["paraview"]


def paraview(path: str | Path, run: Run, sample: int = 0, *, costate: bool = False) -> None:
    """Write the flow of one sample as a time series that ParaView and other programs open. Collective.

    Each rank writes the part of the mesh that it owns. The fields are called "state" and "costate", with channels "state 1",
    "state 2" and so on, and each file of the series has the time of its layer.

    Parameters
    ----------
    path
        The name of the file that lists the series, which ends with .pvd. The others stand in a folder of its name.
    run
        A run of a network.
    sample
        Which sample, from 0.
    costate
        Whether to write the co-states too; the run is then a recorded one, after a derivative.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks, or the label domain is a set of points.
    RuntimeError
        If VTK is not installed; or as of `Run.state` and `Run.costate`.
    OSError
        If a file cannot be written.

    Notes
    -----
    Firedrake writes these files with the package VTK, of the extra `vtk`: ``pip install 'fem_resnet[vtk]'``.
    """
    instance("run", run, Run, "net.run(inputs) gives one")
    Y, net = run.net.Y, run.net
    same(Y.comm, path=path, costate=costate)
    if not isinstance(path, (str, os.PathLike)) or Path(path).suffix != ".pvd":
        raise ValueError(f"path: expected the name of a file that ends with .pvd, got {path!r}")
    flag("costate", costate)
    if Y.numbers is not None:
        raise ValueError("run: expected a network on a mesh, which ParaView shows, got one on a set of points")
    if not has_vtk():
        raise RuntimeError("paraview: VTK is not installed, with which Firedrake writes; pip install 'fem_resnet[vtk]'")
    on_first(Y.comm, lambda: _check_folder(Path(path)))
    one, kinds = Y.one, {"state": run.state} | ({"costate": run.costate} if costate else {})
    with stop_annotating():
        fields = {
            (kind, c): fd.Function(one.V, name=kind if Y.channels == 1 else f"{kind} {c + 1}")
            for kind in kinds
            for c in range(Y.channels)
        }

        def write() -> None:
            file = fd.VTKFile(str(path), comm=Y.comm)
            for layer, t in enumerate(net.times):
                for kind, get in kinds.items():
                    f = get(layer)
                    for c in range(Y.channels):
                        one.write(fields[kind, c], column(Y, f, kind, sample, c))
                file.write(*fields.values(), time=float(t))

        in_step(Y.comm, write)


def _check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"path: the folder {path.absolute().parent} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"path: expected the name of a file, got that of the folder {path}")
