"""One network and one batch for all sides, as .npy files in a folder."""

from pathlib import Path

import numpy as np

NAMES = ("weights", "phi", "a", "beta", "inputs", "targets")


def write(folder: Path, nodes: int, rank: int, samples: int, layers: int) -> None:
    """A network on a label domain of measure one, with kernels and states of size one.

    The points have the weights 1/2, 3/2, 1/2, .. over N. For N a power of two these and the ends of their cells are exact.
    This matters, since the package computes weights from its mesh, and other sides read them. Phi = Psi are cosines.
    """
    rng = np.random.default_rng(nodes + rank + samples + layers)
    weights = np.tile([0.5, 1.5], (nodes + 1) // 2)[:nodes] / nodes
    x = np.cumsum(weights) - weights / 2
    scale = np.where(np.arange(rank) == 0, 1.0, np.sqrt(2.0))
    arrays = {
        "weights": weights,
        "phi": scale * np.cos(np.pi * x[:, None] * np.arange(rank)),
        "a": rng.normal(scale=0.3, size=(layers, nodes)),
        "beta": rng.normal(scale=0.5 / np.sqrt(rank), size=(layers, rank, rank)),
        "inputs": rng.normal(size=(nodes, samples)),
        "targets": rng.normal(size=(nodes, samples)),
    }
    for name in NAMES:
        np.save(folder / f"{name}.npy", arrays[name])


class Data:
    """The arrays of a folder, read when they are asked for; `rows` reads the rows of some nodes alone."""

    def __init__(self, folder: str):
        self._folder = Path(folder)
        self.layers, self.nodes = self._open("a").shape
        self.rank = self._open("phi").shape[1]
        self.samples = self._open("inputs").shape[1]

    def _open(self, name: str) -> np.ndarray:
        return np.load(self._folder / f"{name}.npy", mmap_mode="r")

    def read(self, name: str) -> np.ndarray:
        return np.load(self._folder / f"{name}.npy")

    def rows(self, name: str, nodes: np.ndarray) -> np.ndarray:
        return self._open(name)[nodes]

    def bias(self, layer: int, nodes: np.ndarray) -> np.ndarray:
        return self._open("a")[layer][nodes]
