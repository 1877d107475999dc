"""An exported network as a module of PyTorch. It needs PyTorch and NumPy, and neither Firedrake nor PETSc."""

from __future__ import annotations

import os

import numpy as np
import torch

from fem_resnet.export import predict

__all__ = ["ExportedNetwork"]

#: Arrays that are learned, by the beginning of their names; the others are buffers, or say how the network is made.
_LEARNED = ("beta_", "a_", "times", "W", "mu", "V")
_FIXED = ("basis_", "weights", "output_weights", "coordinates", "output_coordinates")
_TABLES = ("_in_time", "_bases")


class ExportedNetwork(torch.nn.Module):
    """A network that `fem_resnet.export` has written to an ``.npz`` file.

    The module computes what the network does, with the same gradients. Parameters of the module are all coefficients of
    kernel and bias ("beta_0", .., "a_0", ..), the layer times ("times"), and "W", "mu" of a head and "V" of a lift. They are
    in double precision until ``module.float()``. Kernels that are made of fewer controls, as symmetric ones are, have all of
    their coefficients here, and symmetries are not kept in training. Bases are buffers.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    ValueError
        If it holds no network of this format.

    Examples
    --------
    >>> module = ExportedNetwork("network.npz")  # doctest: +SKIP
    >>> scores = module.output(torch.tensor(inputs))  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__()
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if int(arrays.get("format", 0)) != predict.FORMAT:
            raise ValueError(f"path: expected a network of format {predict.FORMAT}, as export writes it, got {path}")
        #: Tables and settings, which no gradient goes through.
        self._settings = {}
        for name, array in arrays.items():
            if name.endswith(_TABLES) or not name.startswith((*_LEARNED, *_FIXED)):
                self._settings[name] = array
            elif name.startswith(_FIXED):
                self.register_buffer(name, torch.tensor(array))
            else:
                self.register_parameter(name, torch.nn.Parameter(torch.tensor(array)))

    def _net(self) -> dict:
        return {**self._settings, **dict(self.named_buffers()), **dict(self.named_parameters())}

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """The prediction h(O), as of `Head.predict`; the final state of a network without a head.

        Parameters
        ----------
        u
            Values at the nodes, shape (samples, nodes): in the order of `coordinates`, one channel after the other, or one
            field of a lift.

        Returns
        -------
        torch.Tensor
            Shape (samples, nodes of the output), for classes (samples, classes).
        """
        return predict.predict(self._net(), u, torch)

    def output(self, u: torch.Tensor) -> torch.Tensor:
        """The output O before h, such as the scores that a cross entropy takes, for inputs as of `forward`."""
        return predict.output(self._net(), u, torch)
