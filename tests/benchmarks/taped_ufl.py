"""The same network as a Firedrake program on pyadjoint's tape, with a Function a stage and an assembly an inner product."""

import firedrake as fd
import numpy as np
from firedrake.adjoint import Control, ReducedFunctional, continue_annotation, pause_annotation
from pyadjoint import AdjFloat

from fem_resnet import point_space


class TapedUFL:
    def __init__(self, data):
        self._Y = point_space(data.read("weights"))
        self._order = self._Y.numbers
        self._basis = [self._function(column) for column in data.rows("phi", self._order).T]
        self._batch = [[self._function(column) for column in data.rows(name, self._order).T] for name in ("inputs", "targets")]
        self._a = [self._function(data.bias(layer, self._order)) for layer in range(data.layers)]
        self._beta = [[[AdjFloat(x) for x in row] for row in beta] for beta in data.read("beta")]
        self._h = 1 / data.layers

    def _function(self, values=None) -> fd.Function:
        function = fd.Function(self._Y.V)
        if values is not None:
            function.dat.data_wo[...] = values
        return function

    def _slope(self, f, a, beta, constants) -> fd.Function:
        """sigma(a - Phi beta Psi^T M f) for an expression f."""
        g = [fd.assemble(psi * f * fd.dx) for psi in self._basis]
        C = [fd.Function(constants).assign(sum(b * x for b, x in zip(row, g))) for row in beta]
        return self._function().interpolate(fd.tanh(a - sum(phi * c for phi, c in zip(self._basis, C))))

    def prepare(self) -> None:
        constants, h, J = fd.FunctionSpace(self._Y.V.mesh(), "R", 0), self._h, 0.0
        continue_annotation()
        for f, target in zip(*self._batch):
            for a, beta in zip(self._a, self._beta):
                k = [self._slope(f, a, beta, constants)]
                for part in (0.5, 0.5, 1.0):
                    k.append(self._slope(f + part * h * k[-1], a, beta, constants))
                f = self._function().interpolate(f + h / 6 * (k[0] + 2 * k[1] + 2 * k[2] + k[3]))
            J += fd.assemble(0.5 * (f - target) ** 2 * fd.dx) / len(self._batch[0])
        pause_annotation()
        self._values = [*self._a, *(x for beta in self._beta for row in beta for x in row)]
        self._J = ReducedFunctional(J, [Control(value) for value in self._values])

    def scale(self, factor: float) -> None:
        layers = len(self._a)
        for a in self._a:
            a.dat.data_wo[...] = factor * a.dat.data_ro
        self._values[layers:] = [AdjFloat(factor * float(x)) for x in self._values[layers:]]

    def evaluate(self) -> float:
        J = float(self._J(self._values))
        self._derivative = self._J.derivative()
        return J

    def gradient(self):
        layers, rank = len(self._a), len(self._basis)
        a = np.array([functional.dat.data_ro for functional in self._derivative[:layers]])
        return self._order, a, np.array(self._derivative[layers:], dtype=float).reshape(layers, rank, rank)
