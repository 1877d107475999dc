"""The same network in PyTorch, and in torchdiffeq."""

import numpy as np
import torch
import torchdiffeq
from torchdiffeq._impl.fixed_grid import RK4
from torchdiffeq._impl.misc import Perturb
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import rk4_step_func

torch.set_default_dtype(torch.float64)
torch.set_num_threads(2)


def slope(phi, weighted, f, a, beta):
    return torch.tanh(a[:, None] - phi @ (beta @ (weighted.T @ f)))


def step(phi, weighted, h: float, f, a, beta):
    k1 = slope(phi, weighted, f, a, beta)
    k2 = slope(phi, weighted, f + h / 2 * k1, a, beta)
    k3 = slope(phi, weighted, f + h / 2 * k2, a, beta)
    k4 = slope(phi, weighted, f + h * k3, a, beta)
    return f + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class Torch:
    """The network in eager mode."""

    def __init__(self, data):
        self._phi, self._w, self._inputs, self._targets = (
            torch.from_numpy(data.read(name)) for name in ("phi", "weights", "inputs", "targets")
        )
        self._weighted = self._w[:, None] * self._phi
        self._parameters = [torch.from_numpy(data.read(name)).requires_grad_() for name in ("a", "beta")]
        self._step = step

    def prepare(self) -> None:
        pass

    def final(self, a, beta):
        f = self._inputs
        for layer in range(len(a)):
            f = self._step(self._phi, self._weighted, 1 / len(a), f, a[layer], beta[layer])
        return f

    def scale(self, factor: float) -> None:
        with torch.no_grad():
            for x in self._parameters:
                x.mul_(factor)

    def evaluate(self) -> float:
        J = 0.5 * (self._w[:, None] * (self.final(*self._parameters) - self._targets) ** 2).sum() / self._inputs.shape[1]
        # Not `backward`, which adds to gradients that would have to be cleared.
        self._gradient = torch.autograd.grad(J, self._parameters)
        return float(J)

    def gradient(self):
        return np.arange(len(self._w)), *(x.numpy() for x in self._gradient)


class TorchCompile(Torch):
    """A layer by `torch.compile`, in a loop of Python over the layers."""

    def prepare(self) -> None:
        self._step = torch.compile(step, fullgraph=True)


class ClassicalRK4(RK4):
    """torchdiffeq's "rk4" is the 3/8 rule."""

    def _step_func(self, func, t0, dt, t1, y0):
        f0 = func(t0, y0, perturb=Perturb.NEXT if self.perturb else Perturb.NONE)
        return rk4_step_func(func, t0, dt, t1, y0, f0=f0, perturb=self.perturb), f0


SOLVERS["classical_rk4"] = ClassicalRK4


class Rate(torch.nn.Module):
    """The right-hand side; each layer is an interval of length one."""

    def __init__(self, phi, weighted, a, beta):
        super().__init__()
        self._constants = phi, weighted
        self._a, self._beta = a, beta

    def forward(self, t, f):
        layer = min(max(int(t), 0), len(self._a) - 1)
        return slope(*self._constants, f, self._a[layer], self._beta[layer]) / len(self._a)


class Torchdiffeq(Torch):
    """`odeint` with one step a layer; by its "perturb" the end of a layer differs from the start of the next one."""

    def solve(self, rate, a, beta):
        return torchdiffeq.odeint(rate, self._inputs, self.times(a), **self.options)

    def final(self, a, beta):
        return self.solve(Rate(self._phi, self._weighted, a, beta), a, beta)[-1]

    @staticmethod
    def times(a):
        return torch.tensor([0.0, float(len(a))])

    options = {"method": "classical_rk4", "options": {"step_size": 1.0, "perturb": True}}


class TorchdiffeqAdjoint(Torchdiffeq):
    """`odeint_adjoint`: the co-state is solved on its own, so the gradient has an error of the order of the step."""

    def solve(self, rate, a, beta):
        return torchdiffeq.odeint_adjoint(rate, self._inputs, self.times(a), adjoint_params=(a, beta), **self.options)
