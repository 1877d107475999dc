"""`export`: a network, its head and its lift for programs without Firedrake."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from fem_resnet.arguments import choice, instance
from fem_resnet.export.arrays import network_arrays
from fem_resnet.features import HELD, supports
from fem_resnet.files import aside
from fem_resnet.learning.head import Head
from fem_resnet.learning.lift import Lift
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import on_first, same

__all__ = ["export"]


@supports("channels", "no_layers", "gradient_flow", *HELD, "single_precision")
def export(
    net: ResidualNetwork, head: Head | None, path: str | Path, lift: Lift | None = None, *, precision: str = "double"
) -> None:
    """Write a network for NumPy, PyTorch or ONNX. Collective over the communicator of the network.

    What is written takes inputs of shape (samples, nodes), values at the nodes in the order of the coordinates in the file,
    one channel after the other (one field after the other with a lift). It gives O and the prediction h(O) of the head in the
    same form; without a head the final state. Kernels go as their factors, so that the file is as small as the network.

    Parameters
    ----------
    net
        A network with any explicit "ts_type" of PETSc and fixed steps, on a label space whose nodes `node_numbers` can number.
    head
        Its head, with an output anywhere; None for the final state.
    path
        The name of the file, which an old one gives way to at the very end.

        - ``.npz``: arrays of NumPy. The predictor is written into the same folder as ``predict.py``, and needs nothing else:
          ``predict.predict(dict(numpy.load(path)), inputs)``. `fem_resnet.export.torch_module.ExportedNetwork` reads the file
          as a module of PyTorch.
        - ``.onnx``: a graph of ONNX, with the outputs "output" and "prediction". It needs the package onnx. Where that is
          not beside Firedrake, ``python -m fem_resnet.export network.npz network.onnx`` does the same elsewhere.
    lift
        Its lift, if inputs are the fields that it takes.
    precision
        "double" or "single", of a graph of ONNX; arrays of NumPy are always in double precision.

    Raises
    ------
    OSError
        If the file cannot be written; on all ranks alike.
    TypeError, ValueError
        If an argument is of another kind or differs between ranks; if head or lift belong to another label space; if the
        method is implicit or adapts its steps; if the activation has no formula, or one that ONNX lacks; or if the nodes
        cannot be numbered.
    ModuleNotFoundError
        If the package onnx is not there, and is needed.

    Examples
    --------
    >>> export(net, head, "digits.npz")  # doctest: +SKIP
    >>> export(net, head, "digits.onnx", precision="single")  # doctest: +SKIP
    """
    comm = net.Y.comm
    instance("head", head, (Head, NoneType))
    instance("lift", lift, (Lift, NoneType))
    choice("precision", precision, ("double", "single"))
    path = Path(instance("path", path, (str, os.PathLike), "give the name of a file"))
    same(comm, path=path)
    kind = choice("path", path.suffix, (".npz", ".onnx"))
    for name, given in (("head", head and head.psi.Y), ("lift", lift and lift.Y)):
        if given is not None and given is not net.Y:
            raise ValueError(f"{name}: expected one on the network's label space {net.Y!r}, got one on {given!r}")
    arrays = network_arrays(net, head, lift)
    on_first(comm, lambda: _write(path, kind, arrays, precision))


def _write(path: Path, kind: str, arrays: dict[str, np.ndarray], precision: str) -> None:
    """On one rank."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {path.parent} does not exist")
    if kind == ".onnx":
        model: Any = _onnx_graph().onnx_model(arrays, precision)
        with aside(path) as part:
            part.write_bytes(model.SerializeToString())
        return
    with aside(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
    with aside(path.with_name("predict.py")) as part:
        part.write_text((files("fem_resnet.export") / "predict.py").read_text())


def _onnx_graph() -> Any:
    try:
        return import_module("fem_resnet.export.onnx_graph")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "onnx":
            raise
        raise ModuleNotFoundError(
            "path: the package onnx is missing, which writes .onnx; install fem_resnet[onnx], or export to .npz and run "
            "`python -m fem_resnet.export network.npz network.onnx` where onnx is installed",
            name="onnx",
        ) from error
