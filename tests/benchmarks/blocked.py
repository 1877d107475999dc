"""The same network in plain NumPy, by blocks of nodes: the reference with which all other sides must agree.

It steps f itself and keeps f at the starts of layers. On the way back it computes the stages of a layer again.
"""

import numpy as np

_BLOCK_BYTES = 131072


class Blocked:
    def __init__(self, data):
        self._phi, self._w = data.read("phi"), data.read("weights")
        self._weighted = self._w[:, None] * self._phi
        self._a, self._beta = data.read("a"), data.read("beta")
        self._inputs, self._targets = data.read("inputs"), data.read("targets")
        self._h = 1 / data.layers
        rows = max(64, _BLOCK_BYTES // (8 * data.samples))
        self._blocks = [slice(start, start + rows) for start in range(0, data.nodes, rows)]

    def prepare(self) -> None:
        pass

    def scale(self, factor: float) -> None:
        self._a *= factor
        self._beta *= factor

    def _project(self, f):
        return sum(self._weighted[block].T @ f[block] for block in self._blocks)

    def _stages(self, f, a, beta):
        """The slopes of classical Runge-Kutta, and the coefficients from which each is computed."""
        slopes, seen = [], []
        for part in (0.0, 0.5, 0.5, 1.0):
            g = self._project(f)
            if slopes:
                g += part * self._h * self._project(slopes[-1])
            C, k = beta @ g, np.empty_like(f)
            for block in self._blocks:
                u = self._phi[block] @ C
                np.subtract(a[block, None], u, out=u)
                np.tanh(u, out=k[block])
            slopes.append(k)
            seen.append(g)
        return slopes, seen

    def evaluate(self) -> float:
        h, layers, samples = self._h, len(self._a), self._inputs.shape[1]
        states = [self._inputs]
        for a, beta in zip(self._a, self._beta):
            f = states[-1].copy()
            for part, k in zip((1, 2, 2, 1), self._stages(f, a, beta)[0]):
                for block in self._blocks:
                    f[block] += (part * h / 6) * k[block]
            states.append(f)
        error = states.pop() - self._targets
        J = 0.5 * float(self._w @ np.einsum("is,is->i", error, error)) / samples
        adjoint = error * (self._w[:, None] / samples)
        self._gradient = np.empty_like(self._a), np.empty_like(self._beta)
        for layer in reversed(range(layers)):
            self._gradient[0][layer], self._gradient[1][layer] = self._back(layer, states.pop(), adjoint)
        return J

    def _back(self, layer, f, adjoint):
        """The derivatives in a and beta of a layer; `adjoint` becomes the adjoint at the start of the layer."""
        h, beta = self._h, self._beta[layer]
        slopes, seen = self._stages(f, self._a[layer], beta)
        a_bar, beta_bar, later = np.zeros(len(f)), np.zeros_like(beta), np.zeros_like(seen[0])
        total = np.zeros_like(later)
        # Functionals of stage values are M Psi x; only x is kept.
        for k, g, weight, reach in zip(slopes[::-1], seen[::-1], (1, 2, 2, 1), (0.0, 1.0, 0.5, 0.5)):
            D = np.zeros_like(g)
            for block in self._blocks:
                v = self._weighted[block] @ (reach * h * later)
                v += (weight * h / 6) * adjoint[block]
                v *= 1 - k[block] ** 2
                a_bar[block] += v.sum(axis=1)
                D += self._phi[block].T @ v
            beta_bar -= D @ g.T
            later = -(beta.T @ D)
            total += later
        for block in self._blocks:
            adjoint[block] += self._weighted[block] @ total
        return a_bar, beta_bar

    def gradient(self):
        return np.arange(len(self._w)), *self._gradient
