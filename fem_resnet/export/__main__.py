"""Write a graph of ONNX from the arrays of an exported network, where NumPy and onnx are installed and Firedrake is not.

python -m fem_resnet.export network.npz network.onnx [--single]
"""

import argparse
from pathlib import Path

import numpy as np

from fem_resnet.export.onnx_graph import onnx_model


def main() -> None:
    """Read the arrays, and write the graph."""
    parser = argparse.ArgumentParser("python -m fem_resnet.export", description=__doc__.split("\n")[0])
    parser.add_argument("arrays", type=Path, help="the .npz file that export has written")
    parser.add_argument("graph", type=Path, help="the .onnx file")
    parser.add_argument("--single", action="store_true", help="single precision")
    given = parser.parse_args()
    with np.load(given.arrays, allow_pickle=False) as file:
        model = onnx_model(dict(file), "single" if given.single else "double")
    given.graph.write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
