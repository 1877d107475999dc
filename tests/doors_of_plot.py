"""The doors of `fem_resnet.plot`; see `doors.py`."""

from __future__ import annotations

from functools import cache

import numpy as np
from doors import Door
from doors_of_networks import FLAG, PATH, TEXT, shared
from firedrake import COMM_WORLD
from helpers import laplace
from matplotlib.figure import Figure
from problems import learning_problem, network, taping

from fem_resnet import Run, plot
from fem_resnet.plot.canvas import has_vtk

ZERO, NOTHING = {"zero"}, {"None"}
SHOWN = {"sample": ZERO, "channel": ZERO}
SCALED = {"limits": NOTHING}


@cache
def run() -> Run:
    """One sample, with co-states."""
    with taping():
        J, run = learning_problem(network("disk", "CG1", bias="basis"), head=False, weight=None, samples=1).record()
        J.derivative()
    return run


def panels(count: int):
    axes = Figure().subplots(1, count, squeeze=False).ravel()
    return axes[0] if count == 1 else list(axes)


def over_time(call) -> Door:
    return Door(
        call,
        lambda: {
            "run": run(), "sample": 0, "channel": 0, "layers": [0, 3], "axes": panels(2), "limits": (-1.0, 1.0),
        },
        takes=SHOWN | SCALED | {"axes": NOTHING},
        parted=("run", "axes"),
        another={"layers": [1, 2]},
        called={"layers": "layers|axes"},
        fitting=("layers", "axes"),
    )  # fmt: skip


DOORS: dict[str, Door] = {
    "plot.function": Door(
        plot.function,
        lambda: {
            "Y": run().net.Y, "f": run().state(0), "sample": 0, "channel": 0, "ax": panels(1), "limits": (0.0, 1.0),
            "label": "f",
        },
        takes=SHOWN | SCALED | {"ax": NOTHING, "label": TEXT},
        parted=("Y", "f", "ax"),
        another={"label": "g"},
    ),
    "plot.state": over_time(plot.state),
    "plot.costate": over_time(plot.costate),
    "plot.bias": Door(
        plot.bias,
        lambda: {"net": run().net, "channel": 0, "layers": [0, 2], "axes": panels(2), "limits": (-1.0, 1.0)},
        takes=SCALED | {"channel": ZERO, "axes": NOTHING},
        parted=("net", "axes"),
        another={"layers": [0, 1]},
        called={"layers": "layers|axes"},
        fitting=("layers", "axes"),
    ),
    "plot.kernel_row": Door(
        plot.kernel_row,
        lambda: {
            "net": run().net, "y0": (0.2, 0.1), "layer": 0, "channels": (0, 0), "ax": panels(1), "limits": (-1.0, 1.0),
        },
        takes=SCALED | {"layer": ZERO, "ax": NOTHING},
        parted=("net", "ax"),
        another={"channels": (0, 1)},
    ),
    "plot.basis": Door(
        plot.basis,
        lambda: {"phi": laplace("disk", "CG1", 4), "first": 2, "axes": panels(2), "limits": (-1.0, 1.0)},
        takes=SCALED | {"axes": NOTHING},
        parted=("phi", "axes"),
        fitting=("first", "axes"),
        called={"first": "first|axes"},
    ),
    "plot.norms": Door(
        plot.norms,
        lambda: {"run": run(), "of": "state", "ax": panels(1)},
        takes={"ax": NOTHING},
        parted=("run", "ax"),
        another={"of": "costate"},
    ),
    "plot.flow": Door(
        plot.flow,
        lambda: {"path": shared() / "flow.gif", "run": run(), "sample": 0, "channel": 0, "seconds": 1.0},
        takes=SHOWN | {"seconds": {"a fraction"}},
        parted=("run",),
    ),
    "plot.save": Door(
        plot.save,
        lambda: {"path": shared() / "picture.png", "axes": panels(2), "comm": COMM_WORLD},
        takes={"path": PATH},
        parted=("axes", "comm"),
    ),
    "plot.learning_curve": Door(
        plot.learning_curve,
        lambda: {"results": [1.0, 0.5], "ax": panels(1), "xlabel": "iteration", "ylabel": "J"},
        takes={"ax": NOTHING} | dict.fromkeys(("xlabel", "ylabel"), {"a string", "an empty string"}),
        parted=("results", "ax", "xlabel", "ylabel"),
    ),
    "plot.spectrum": Door(
        plot.spectrum,
        lambda: {"found": [1.0, 0.5], "weight": 0.7, "sample": 0, "ax": panels(1)},
        takes={"weight": {"None", "a fraction", "a huge integer"}, "sample": ZERO, "ax": NOTHING},
        parted=("found", "weight", "sample", "ax"),
    ),
    "plot.confusion": Door(
        plot.confusion,
        lambda: {"truth": np.array([0, 1]), "predicted": np.array([1, 1]), "names": ["a", "b"], "ax": panels(1)},
        takes={"names": {"None", "a list of strings"}, "ax": NOTHING},
        parted=("truth", "predicted", "names", "ax"),
    ),
    "plot.lines": Door(
        plot.lines,
        lambda: {
            "curves": {"a": [(1.0, 2.0), (2.0, 1.0)]}, "points": {"b": [(1.0, 2.0, 0.1)]},
            "reference": {"c": [(1.0, 1.0), (2.0, 1.0)]}, "log": "xy", "xlabel": "x", "ylabel": "y", "legend": True,
            "ax": panels(1),
        },
        takes={
            "curves": {"an empty dict"}, "points": {"an empty dict"} | NOTHING, "reference": {"an empty dict"} | NOTHING,
            "legend": FLAG, "ax": NOTHING, "log": {"an empty string"},
        }
        | dict.fromkeys(("xlabel", "ylabel"), {"a string", "an empty string"}),
        parted=("curves", "points", "reference", "log", "xlabel", "ylabel", "legend", "ax"),
    ),
    "plot.comparison": Door(
        plot.comparison,
        lambda: {"runs": {"a": [1.0, 2.0], "b": [3.0]}, "marked": ["a"], "log": True, "xlabel": "error", "ax": panels(1)},
        takes={
            "marked": {"an empty list", "a list of strings"}, "log": FLAG, "ax": NOTHING,
            "xlabel": {"a string", "an empty string"},
        },
        parted=("runs", "marked", "log", "xlabel", "ax"),
    ),
}  # fmt: skip
if has_vtk():
    DOORS["plot.paraview"] = Door(
        plot.paraview,
        lambda: {"path": shared() / "run.pvd", "run": run(), "sample": 0, "costate": False},
        takes={"sample": ZERO, "costate": FLAG},
        parted=("run",),
    )

#: What has no door, and why.
NO_DOORS = {} if has_vtk() else {"plot.paraview": "it needs VTK, which is not installed"}
