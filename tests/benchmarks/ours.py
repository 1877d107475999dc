"""The package through its public interface: a recorded `ReducedFunctional`."""

import firedrake as fd
import numpy as np
from pyadjoint.enlisting import Enlist

from fem_resnet import Basis, Batch, LearningProblem, ResidualNetwork, least_squares, point_space

COMM = fd.COMM_WORLD


class FemResnet:
    def __init__(self, data):
        Y = point_space(data.read("weights"))
        self._problem = _problem(Y, data)

    def prepare(self) -> None:
        self._J = self._problem.reduced_functional()

    def scale(self, factor: float) -> None:
        for function in self._problem.functions:
            function.dat.data_wo[...] = factor * function.dat.data_ro

    def evaluate(self) -> float:
        J = float(self._J(self._problem.functions))
        self._derivative = Enlist(self._J.derivative())
        return J

    def gradient(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        net = self._problem.net
        found = [
            [parameter.space_basis.read(functional) for functional in functionals]
            for parameter, functionals in zip(
                net.parameters, (self._derivative[: net.layers], self._derivative[net.layers :])
            )
        ]
        return net.Y.numbers, np.array(found[0]), np.array(found[1])


def _problem(Y, data) -> LearningProblem:
    net = ResidualNetwork(Basis(Y, data.rows("phi", Y.numbers), "given"), layers=data.layers)
    beta = data.read("beta")
    for layer in range(data.layers):
        net.bias.set(layer, data.bias(layer, Y.numbers))
        net.kernel.set(layer, beta[layer])
    batch = Batch(*(Y.batch(data.rows(name, Y.numbers)) for name in ("inputs", "targets")))
    return LearningProblem(net, None, least_squares, None, batch)
