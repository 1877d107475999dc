"""The conditions of the statements of 3.2 and 3.4, and whether a network meets them.

Some are about the operator, and its singular system decides: B_s >= 0, B = B^T, a in R(B^(1/2)). Others are about the
activation: (3.4), and how |sigma| grows. The last one is that the network is the autonomous problem (3.2a).
"""

from __future__ import annotations

from dataclasses import dataclass

from fem_resnet.activation.activation import Activation
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.spectra.autonomous import AutonomousProblem, autonomous_problem

__all__ = ["EnergyCondition", "energy_conditions", "problem_at_start"]

#: Round-off in eigenvalues, relative to the norm of B.
_ROUND_OFF = 1e-12
#: A part of a outside of R(B) up to this, relative to a, is round-off of the projection.
_OUTSIDE = 1e-10

AUTONOMOUS, NON_NEGATIVE, SYMMETRIC, SIGN, IN_RANGE, LINEAR, BELOW = (
    "a and B do not depend on t", "B_s >= 0", "B = B^T", "s sigma(s) >= 0", "a in R(B^(1/2))",
    "|sigma(s)| >= C |s| for large |s|", "|sigma(s)| >= C > 0 for large |s|",
)  # fmt: skip


@dataclass(frozen=True)
class EnergyCondition:
    """A condition of a statement of 3.2, for one network. Get it from `energy_conditions`.

    Attributes
    ----------
    holds : bool
        Whether the network meets the condition.
    reason : str
        The facts that decide, with the numbers.
    caveat : str
        "sampled, not proved: .." if the condition holds because of properties of sigma that are sampled; else empty.
    """

    holds: bool
    reason: str
    caveat: str = ""


@supports("channels", *HELD, *STEPPED)
def energy_conditions(net: ResidualNetwork) -> dict[str, EnergyCondition]:
    """Check the conditions of the statements of 3.2 for a network. Collective over the ranks of the label domain.

    The matrices whose spectra decide have at most twice the rank. If a or B depends on t, they are taken at t = 0.

    Parameters
    ----------
    net
        The network, at its present coefficients.

    Returns
    -------
    dict of str to EnergyCondition
        The keys are the conditions: "B_s >= 0", "B = B^T", "a in R(B^(1/2))", and so on.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Bias, Kernel, LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 3)
    >>> net = ResidualNetwork(Kernel(phi, in_time="shared"), bias=Bias(in_time="shared"), activation="relu")
    >>> net.kernel.set(0, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -2.0]])
    >>> conditions = energy_conditions(net)
    >>> conditions["B = B^T"].holds, conditions["B_s >= 0"].reason
    (True, 'the smallest eigenvalue of B_s is -2')
    """
    problem, autonomous = problem_at_start(net)
    return {AUTONOMOUS: autonomous} | _of_operator(problem) | _of_activation(net.activation)


def problem_at_start(net: ResidualNetwork) -> tuple[AutonomousProblem, EnergyCondition]:
    """The autonomous problem of a network, else that at t = 0; and whether the network is autonomous. Collective."""
    try:
        return autonomous_problem(net), EnergyCondition(True, "the network has one bias and one kernel")
    except ValueError as error:
        return autonomous_problem(net, at=0.0), EnergyCondition(False, str(error).partition("; ")[0].removeprefix("net: "))


def _of_operator(problem: AutonomousProblem) -> dict[str, EnergyCondition]:
    B = problem.system
    size = B.values.max(initial=0.0)
    smallest = float(B.symmetric_eigenvalues.min(initial=0.0))
    non_negative = smallest >= -_ROUND_OFF * size
    conditions = {
        NON_NEGATIVE: EnergyCondition(non_negative, f"the smallest eigenvalue of B_s is {smallest:.3g}"),
        SYMMETRIC: EnergyCondition(B.is_symmetric, f"B is {'' if B.is_symmetric else 'not '}its own transpose"),
    }
    a = problem.bias[:, None]
    outside, whole = (float(problem.norms(part)[0]) for part in (a - B.left_values(B.left_coefficients(a)), a))
    if not (B.is_symmetric and non_negative):
        conditions[IN_RANGE] = EnergyCondition(False, "B has no root B^(1/2), as it is not symmetric and non-negative")
    else:
        text = f"the part of a outside of R(B) has the norm {outside:.3g}, a has {whole:.3g}"
        conditions[IN_RANGE] = EnergyCondition(outside <= _OUTSIDE * whole, text)
    return conditions


def _of_activation(sigma: Activation) -> dict[str, EnergyCondition]:
    name, keeps_sign = sigma.name, sigma.properties.sign_preserving
    sign = EnergyCondition(
        keeps_sign, f"{name} {'has' if keeps_sign else 'has not'} the sign of its argument",
        sigma.properties.caveat("sign_preserving") if keeps_sign else "",
    )  # fmt: skip
    if not keeps_sign:
        return {SIGN: sign, LINEAR: sign, BELOW: sign}
    ends = {end: abs(float(sigma(end))) for end in (-1e4, 1e4)}
    # For a power s^p the ratio is 2^p.
    linear = all(value > 0 and value / abs(float(sigma(end / 2))) > 2**0.99 for end, value in ends.items())
    says = ", ".join(f"|{name}({end:g})| = {value:.4g}" for end, value in ends.items())
    below = sigma.properties.non_decreasing and min(ends.values()) > 0
    why = says if sigma.properties.non_decreasing else f"{name} is not non-decreasing"
    return {
        SIGN: sign, LINEAR: EnergyCondition(linear, says),
        BELOW: EnergyCondition(below, why, sigma.properties.caveat("non_decreasing") if below else ""),
    }  # fmt: skip
