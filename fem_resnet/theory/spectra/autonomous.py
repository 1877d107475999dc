"""The autonomous problem of section 3.2: a bias and a kernel that do not depend on t, or a network at one time.

    f_t = sigma(a - B f),    f(0) = f_I,                                                              (3.2a), (3.2b)
    u = a - B f,    u_t = -B sigma(u),    f(t) = f_I + int_0^t sigma(u) ds                                     (3.3)

(A1) of 3.2 supposes that sigma is Lipschitz and non-decreasing, s sigma(s) >= 0 as in (3.4), sigma(0) = 0 and
sigma'(0) > 0. That excludes sigmoid and softplus, where sigma(0) is not 0, and relu, which has no sigma'(0). (A2) of 3.2
supposes a in L2(Y) and b in L2(Y x Y). It holds for every network, whose values at finitely many nodes are finite.

Remark 3.1: if a(t) and b(t) have limits as t -> infinity, statements about the autonomous problem hold with the limits in
place of a and b. For a network these are the bias and the kernel at its last time, ``at=net.times[-1]``. At another time the
problem is the one frozen at that time.

The gradient flow f_t = B^T sigma(a - B f) of 3.5 has the same u = a - B f, and u_t = -B B^T sigma(u). That is (3.3) with the
symmetric B B^T >= 0 in place of B (`AutonomousProblem.generator`). So the statements of 3.2 and 3.3 about u hold for it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import firedrake as fd
import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.arguments import number, text
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.theory.spectra.singular_values import SingularSystem, columns, singular_system

__all__ = ["AutonomousProblem", "autonomous_problem", "sampled"]


@dataclass(frozen=True)
class AutonomousProblem:
    """`f_t = sigma(a - B f)` of (3.2a), or the gradient flow `f_t = B^T sigma(a - B f)`. Get one from `autonomous_problem`.

    f_I of (3.2b) belongs to a solution and not to the problem.

    Attributes
    ----------
    kernel : LowRankKernel
        The bases of b.
    beta : numpy.ndarray
        The coefficients of b, shape (rank of phi, rank of psi).
    bias : numpy.ndarray
        a at the owned nodes, shape (nodes,).
    activation : Activation
        sigma.
    gradient_flow : bool
        Whether the problem is the gradient flow.
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
        """The singular system of B. Collective at the first access."""
        return singular_system(self.kernel, self.beta)

    @cached_property
    def generator(self) -> SingularSystem:
        """The singular system of K in u_t = -K sigma(u): B, or B B^T for a gradient flow. Collective at the first access."""
        return self.system.squared if self.gradient_flow else self.system

    def rate(self, u: np.ndarray) -> np.ndarray:
        """f_t at the owned nodes: sigma(u), or B^T sigma(u) for a gradient flow, shape (nodes, samples). Collective."""
        s = self.activation(columns(self.Y, "u", u))
        return self.kernel.transpose(self.beta, s) if self.gradient_flow else s

    def read(self, function: fd.Function, name: str) -> np.ndarray:
        """Values of a user's Function at the owned nodes, shape (nodes, samples).

        Parameters
        ----------
        function
            A Function of `Y.V` or a batch.
        name
            The name of the argument in messages.

        Raises
        ------
        TypeError, ValueError
            If `function` is no such Function.
        """
        self.Y.check_batch(function, text("name", name))
        return self.Y.values(function)

    def argument(self, f: np.ndarray) -> np.ndarray:
        """u = a - B f at the owned nodes, shape (nodes, samples). Collective."""
        return self.bias[:, None] - self.kernel.apply(self.beta, columns(self.Y, "f", f))

    def norms(self, values: np.ndarray) -> np.ndarray:
        """The norm in L2(Y) of each sample, shape (samples,), from values at the owned nodes. Collective."""
        return np.sqrt(self.Y.sum(self.Y.weights @ columns(self.Y, "values", values) ** 2))

    @property
    def unmet(self) -> tuple[str, ...]:
        """The parts of (A1) of 3.2 that do not hold for sigma; empty if all hold. (A2) of 3.2 always holds."""
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
        """Which of the properties that `unmet` uses are sampled and not proved, in words; empty if all are proved."""
        return sampled(
            self.activation, "lipschitz", "non_decreasing", "sign_preserving", "zero_at_zero", "positive_slope_at_zero"
        )


def sampled(activation: Activation, *names: str) -> str:
    """The caveat of a statement that uses these properties (`Properties.caveat`), in brackets; empty if all are proved."""
    caveat = activation.properties.caveat(*names)
    return f" ({caveat})" if caveat else ""


@supports("channels", *HELD, *STEPPED, "gradient_flow")
def autonomous_problem(net: ResidualNetwork, at: float | None = None) -> AutonomousProblem:
    """The autonomous problem of a network, or the one with its bias and kernel at one time.

    Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        The network, at its present coefficients.
    at
        The time of the bias and the kernel, from 0 to T. At a layer time the layer that starts there counts, at T the
        last layer. None for a network whose bias and kernel do not depend on t.

    Raises
    ------
    ValueError
        If the network has no layers, the time is not in [0, T], or no time is given and the bias or the kernel depends on t.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Bias, Kernel, LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
    >>> net = ResidualNetwork(Kernel(phi, in_time="shared"), bias=Bias(in_time="shared"), activation="relu")
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
            f"net: its {parameter.name} depends on t; give a time `at`, such as T for the limits of Remark 3.1, or make the "
            f"network with {parameter.name}_in_time='shared'",
        )
