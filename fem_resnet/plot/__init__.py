"""Pictures of what a network does: ``from fem_resnet import plot``, then ``plot.state(run)``.

Each function draws on axes of matplotlib and returns them. On several ranks rank 0 gathers the functions that are shown, and
nothing else, and draws; the axes of other ranks stay empty. So a script needs no question about ranks, and `save` writes one
file. Surfaces and bodies in space are drawn by PyVista without a display (extra `vtk`), or by matplotlib's `mplot3d`.

`shown` says what of a mesh is drawn, `canvas` makes axes and colours, `drawing` draws one function on one panel, `fields`,
`curves` and `studies` are what users call, `animation` and `series` write files.
"""

from importlib import import_module

# As in `fem_resnet`: a name is imported when it is first asked for.
_MODULES = {
    "plot.canvas": ["save"],
    "plot.fields": ["basis", "bias", "costate", "function", "kernel_row", "state"],
    "plot.curves": ["confusion", "learning_curve", "norms", "spectrum"],
    "plot.studies": ["comparison", "lines"],
    "plot.animation": ["flow"],
    "plot.series": ["paraview"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"fem_resnet.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
