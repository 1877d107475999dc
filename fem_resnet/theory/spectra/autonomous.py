"""The autonomous problem of 3.2: bias and kernel that do not depend on t, or those of a network at one time.

    f_t = sigma(a - B f),    f(0) = f_I,                                                              (3.2a), (3.2b)
    u = a - B f,    u_t = -B sigma(u),    f(t) = f_I + int_0^t sigma(u) ds                                     (3.3)

What is supposed of sigma is (A1) of 3.2: Lipschitz, non-decreasing, s sigma(s) >= 0 as in (3.4), sigma(0) = 0 and
sigma'(0) > 0. That leaves out sigmoid and softplus, where sigma(0) is not 0, and relu, which has no sigma'(0). (A2) of
3.2, a in L2(Y) and b in L2(Y x Y), holds for what a network has: finite values at finitely many nodes.

Remark 3.1: where a(t) and b(t) have limits as t -> infinity, statements about the autonomous problem are read with the
limits in place of a and b. Of a network these are bias and kernel at its last time, ``at=net.times[-1]``; at other
times the problem is the one frozen there.

The gradient flow f_t = B^T sigma(a - B f) of 3.5 has the same u = a - B f, and u_t = -B B^T sigma(u): (3.3) with the symmetric
B B^T >= 0 in place of B. What 3.2 and 3.3 say of u is said of it too, with that operator (`AutonomousProblem.generator`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import firedrake as fd
import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.arguments import instance, number
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.theory.spectra.singular_values import SingularSystem, columns, singular_system

__all__ = ["AutonomousProblem", "autonomous_problem", "sampled"]


@dataclass(frozen=True)
class AutonomousProblem:
    """`f_t = sigma(a - B f)` of (3.2a), or the gradient flow `f_t = B^T sigma(a - B f)`. Get one from `autonomous_problem`.

    f_I of (3.2b) comes with a solution.

    Attributes
    ----------
    kernel : LowRankKernel
    beta : numpy.ndarray
        Coefficients of b, shape (rank of phi, rank of psi).
    bias : numpy.ndarray
        a at the owned nodes, shape (nodes,).
    activation : Activation
        sigma.
    gradient_flow : bool
        Which of both it is.
    """

    kernel: LowRankKernel
    beta: np.ndarray
    bias: np.ndarray
    activation: Activation
    gradient_flow: bool = False

    @property
    def Y(self) -> LabelSpace:
        """The label domain."""
        return self.kernel.phi.Y

    @cached_property
    def system(self) -> SingularSystem:
        """The singular system of B. Collective when first asked for."""
        return singular_system(self.kernel, self.beta)

    @cached_property
    def generator(self) -> SingularSystem:
        """That of the operator K in u_t = -K sigma(u): B itself, or B B^T of a gradient flow. Collective when first asked for."""
        return self.system.squared if self.gradient_flow else self.system

    def rate(self, u: np.ndarray) -> np.ndarray:
        """f_t at the owned nodes: sigma(u), or B^T sigma(u) of a gradient flow, shape (nodes, samples). Collective."""
        s = self.activation(columns(self.Y, "u", u))
        return self.kernel.transpose(self.beta, s) if self.gradient_flow else s

    def read(self, function: fd.Function, name: str) -> np.ndarray:
        """Values at the owned nodes, shape (nodes, samples), of a user's Function; refused if it does not fit."""
        self.Y.check_batch(function, instance("name", name, str))
        return self.Y.values(function)

    def argument(self, f: np.ndarray) -> np.ndarray:
        """U = a - B f at the owned nodes, shape (nodes, samples). Collective."""
        return self.bias[:, None] - self.kernel.apply(self.beta, columns(self.Y, "f", f))

    def norms(self, values: np.ndarray) -> np.ndarray:
        """Norm of L2(Y) of each sample, shape (samples,), for values at the owned nodes. Collective."""
        return np.sqrt(self.Y.sum(self.Y.weights @ columns(self.Y, "values", values) ** 2))

    @property
    def unmet(self) -> tuple[str, ...]:
        """What of (A1) of 3.2 does not hold for sigma; empty if all does. (A2) of 3.2 always holds."""
        properties = self.activation.properties
        supposed = {
            "sup |sigma'| is finite": np.isfinite(properties.lipschitz),
            "sigma is non-decreasing": properties.non_decreasing,
            "s sigma(s) >= 0": properties.sign_preserving,
            "sigma(0) = 0": properties.zero_at_zero,
            "sigma'(0) > 0": properties.positive_slope_at_zero and 0.0 not in self.activation.kinks,
        }
        return tuple(what for what, holds in supposed.items() if not holds)

    @property
    def sampled(self) -> str:
        """Which of the properties that `unmet` looks at are sampled, not proved, in words; empty if none is."""
        return sampled(
            self.activation, "lipschitz", "non_decreasing", "sign_preserving", "zero_at_zero", "positive_slope_at_zero"
        )


def sampled(activation: Activation, *names: str) -> str:
    """What a statement that stands on these properties says of them, `Properties.caveat` in brackets; nothing if all are proved."""
    caveat = activation.properties.caveat(*names)
    return f" ({caveat})" if caveat else ""


@supports(*HELD, *STEPPED, "gradient_flow")
def autonomous_problem(net: ResidualNetwork, at: float | None = None) -> AutonomousProblem:
    """The autonomous problem that a network is, or its bias and kernel at one time make. Collective.

    Parameters
    ----------
    net
        The network, at its present coefficients.
    at
        The time, from 0 to T, whose bias and kernel are taken: at a layer time those of the layer that starts there, at
        T those of the last. None for a network whose bias and kernel do not depend on t.

    Raises
    ------
    ValueError
        If the network has no layers, the time is not in [0, T], or none is given and bias or kernel depends on t.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
    >>> net = ResidualNetwork(phi, bias_in_time="shared", kernel_in_time="shared", activation="relu")
    >>> autonomous_problem(net).unmet
    ("sigma'(0) > 0",)
    """
    times, inputs = net.times, net.layer_inputs()
    if at is None:
        _refuse_dependence_on_time(net)
        layer, fraction = inputs[0], 0.0
    else:
        at = number("at", at, least=0, most=float(times[-1]))
        layer = inputs[min(int(np.searchsorted(times, at, side="right")) - 1, net.layers - 1)]
        fraction = (at - layer.start) / layer.length
    return AutonomousProblem(
        layer.factors, layer.beta.coefficients(fraction), layer.bias.coefficients(fraction), net.activation,
        net.gradient_flow,
    )  # fmt: skip


def _refuse_dependence_on_time(net: ResidualNetwork) -> None:
    for parameter in (net.bias, net.kernel):
        first = parameter.get(0)
        same = all(basis is parameter.space_bases[0] for basis in parameter.space_bases) and all(
            np.array_equal(parameter.get(k), first) for k in range(1, len(parameter.functions))
        )
        net.Y.agree(
            same,
            f"net: its {parameter.name} depends on t; give the time `at` which it is to be taken, T for its limit "
            f"(Remark 3.1), or make the network with {parameter.name}_in_time='shared'",
        )
