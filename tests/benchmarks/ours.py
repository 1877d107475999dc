"""The package by its public interface, a recorded `ReducedFunctional`; and its layers without the tape."""

import firedrake as fd
import numpy as np
from pyadjoint.enlisting import Enlist

from fem_resnet import Basis, Batch, Bias, Kernel, Layers, LearningProblem, ResidualNetwork, least_squares, point_space
from fem_resnet.tape.operator_block import OperatorBlock

COMM = fd.COMM_WORLD


class FemResnet:
    def __init__(self, data, **settings):
        self._problem = _problem(point_space(data.read("weights")), data, **settings)

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
            for parameter, functionals in zip(net.parameters, (self._derivative[: net.layers], self._derivative[net.layers :]))
        ]
        return net.Y.numbers, np.array(found[0]), np.array(found[1])


class FemResnetLayers(FemResnet):
    """The operators of a recorded J, called without the tape, from arrays to arrays."""

    def prepare(self) -> None:
        super().prepare()
        *self._segments, self._loss = (
            block.operator for block in self._J.tape.get_blocks() if isinstance(block, OperatorBlock)
        )
        self._initial = self._segments[0].inputs[0].read(self._problem.batch.inputs).copy()
        self._arrays = {
            id(function): np.array(slot.read(function))
            for segment in self._segments
            for slot, function in zip(segment.inputs[1:], segment.functions)
        }

    def scale(self, factor: float) -> None:
        for array in self._arrays.values():
            array *= factor

    def evaluate(self) -> float:
        given, f = [], self._initial
        for segment in self._segments:
            given.append([f, *(self._arrays[id(function)] for function in segment.functions)])
            f = segment.forward(given[-1], save=True)
        J = self._loss.forward([f], save=True)
        (dual,), start = self._loss.adjoint([f], 1.0), None
        self._functionals = {}
        for segment, arrays in zip(reversed(self._segments), reversed(given)):
            start, *functionals = segment.adjoint(arrays, dual if start is None else start())
            for function, functional in zip(segment.functions, functionals):
                known = self._functionals.get(id(function))
                self._functionals[id(function)] = functional if known is None else known + functional
        return float(J)

    def gradient(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        net = self._problem.net
        a, beta = (
            np.array([self._functionals[id(function)] for function in parameter.functions]) for parameter in net.parameters
        )
        return net.Y.numbers, a, beta


def _problem(Y, data, *, steps=1, per_block=None, in_time="layers", precision="double") -> LearningProblem:
    net = ResidualNetwork(
        Kernel(Basis(Y, data.rows("phi", Y.numbers), "given"), in_time=in_time), bias=Bias(in_time=in_time),
        layers=Layers(data.layers, steps=steps, per_block=per_block), precision=precision,
    )  # fmt: skip
    beta = data.read("beta")
    for layer in range(len(net.bias.functions)):
        net.bias.set(layer, data.bias(layer, Y.numbers))
    for layer in range(len(net.kernel.functions)):
        net.kernel.set(layer, beta[layer])
    batch = Batch(*(Y.batch(data.rows(name, Y.numbers)) for name in ("inputs", "targets")))
    return LearningProblem(net, None, least_squares, None, batch)
