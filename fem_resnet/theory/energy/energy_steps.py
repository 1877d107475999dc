r"""How long time steps may be so that the energies of 3.2 fall in the discrete solution too.

Euler's method is u_1 = u_0 - h B sigma(u_0). With L = sup |sigma'|,

    int Sigma(u_1) dy <= int Sigma(u_0) dy - h (B_s sigma, sigma) + (L / 2) h^2 |B sigma|^2,

so int Sigma(u) falls for h <= 2 kappa / L, where kappa = inf (B_s v, v) / |B v|^2. If B = B^T >= 0, kappa is 1 / |B|. If
also s sigma(s) >= 0, then sigma(0) = 0 and s sigma(s) >= sigma(s)^2 / L. With the same steps the energy
1/2 |B^(1/2) f|^2 - (a, f) in (iii) of Theorem 3.2 then falls too. Both limits are sharp. On v = v_1 + v_2 with v_2 in
N(B), (B_s v, v) is linear in v_2. So kappa is -infinity unless R(B) = R(B^T). If these are equal, kappa is the smallest
eigenvalue of the symmetric part of the inverse of B on R(B). For an antisymmetric B it is 0, and no step is short enough.

Other explicit Runge-Kutta methods, for B = B^T >= 0 and a non-decreasing sigma. With u = u_I + B^(1/2) w,

    w_t = -grad G(w),        G(w) = int Sigma(u_I + B^(1/2) w) dy.

G is convex, grad G has the Lipschitz constant L |B|, and Runge-Kutta methods commute with affine maps. Let w_i be the
stages and the end of a step, and p_i = grad G(w_i). Convexity says

    Q_ij = G_j - G_i + (p_j, w_i - w_j) + |p_i - p_j|^2 / (2 L |B|) <= 0.

G falls over a step if there are numbers lambda_ij >= 0 such that sum lambda_ij (G_j - G_i) = G_end - G_start, and such that
the rest of sum lambda_ij Q_ij is a non-negative quadratic form. Whether they exist is a small semidefinite problem. It
depends on the method and on h L |B| alone. `convex_energy_radius` is the largest h L |B| for which it was solved.

Implicit methods, for any h. With the discrete gradient int Sigma(u) falls if B_s >= 0. With the implicit midpoint rule
1/2 (B f, f) - (a, f) falls if B = B^T and s sigma(s) >= 0. Neither method makes the other energy fall. With backward
Euler, of order 1, and a non-decreasing sigma, int Sigma(u) falls if B_s >= 0, and the other energy falls if B = B^T >= 0
and s sigma(s) >= 0, because both energies are convex then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linprog

from fem_resnet.arguments import instance
from fem_resnet.features import STEPPED, supports
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.sensitivity.contraction import tableau
from fem_resnet.theory.spectra.assumptions import NON_NEGATIVE, SIGN, SYMMETRIC, energy_conditions
from fem_resnet.theory.spectra.autonomous import autonomous_problem, sampled
from fem_resnet.theory.spectra.singular_values import SingularSystem

__all__ = ["EnergyStepLimit", "convex_energy_radius", "dissipation_ratio", "energy_step_limit"]

#: R(B) and R(B^T) count as equal if the cosine of the angle between them differs from 1 by at most this.
_SAME_RANGE = 1e-12
#: Round-off in eigenvalues, relative to the norm of the matrix.
_ROUND_OFF = 1e-12
#: The semidefinite problem of a method with more stages takes minutes.
_MOST_STAGES = 8


@dataclass(frozen=True)
class EnergyStepLimit:
    """How long the steps of a network may be so that its energies fall. Get one from `energy_step_limit`.

    Attributes
    ----------
    step : float
        The longest step of the network, in the unit of t; the longest layer if the steps are adapted.
    primitive : float
        int Sigma(u) is known to fall for steps up to this one, in the unit of t; 0 if no step is known, infinite if all are.
    potential : float
        The same for 1/2 (B f, f) - (a, f).
    kappa : float
        inf (B_s v, v) / |B v|^2, in the unit of 1 / B.
    why : dict of str to str
        For "primitive" and for "potential", what the number is derived from, or why there is none.
    """

    step: float
    primitive: float
    potential: float
    kappa: float
    why: dict[str, str]


# Bases that differ between layers are left out: with them a network is not known to be autonomous.
@supports(
    "channels", "learned_factors", "learned_times", "kernel_set", "nodal_bias", "linear_in_time", "shared_in_time", *STEPPED
)
def energy_step_limit(net: ResidualNetwork) -> EnergyStepLimit:
    """The longest time step for which the energies of 3.2 are known to fall in a network's discrete solution.

    Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        An autonomous network, at its present coefficients. The method and the steps are those of the network.

    Raises
    ------
    ValueError
        If the bias or the kernel depends on t, or the network has no layers.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Bias, Kernel, LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 3)
    >>> euler = {"ts_type": "rk", "ts_rk_type": "1fe"}
    >>> net = ResidualNetwork(Kernel(phi, in_time="shared"), bias=Bias(in_time="shared"), solver_parameters=euler)
    >>> net.kernel.set(0, np.diag([1.0, 2.0, 4.0]))
    >>> limit = energy_step_limit(net)
    >>> round(limit.primitive, 12), round(limit.potential, 12)
    (0.5, 0.5)
    """
    conditions = energy_conditions(net)
    system = autonomous_problem(net).system
    met = {what for what in (NON_NEGATIVE, SYMMETRIC, SIGN) if conditions[what].holds}
    kappa = dissipation_ratio(system)
    scale = float(net.activation.properties.lipschitz * system.values.max(initial=0.0))
    (primitive, why), (potential, why_potential) = _limits(net, met, kappa, scale)
    longest = float(np.diff(net.times).max())
    adapted = net.solver_parameters.get("ts_adapt_type", "none") != "none"
    return EnergyStepLimit(
        longest if adapted else longest / net.steps, primitive, potential, kappa,
        {"primitive": why, "potential": why_potential},
    )  # fmt: skip


def dissipation_ratio(system: SingularSystem) -> float:
    """The number kappa = inf (B_s v, v) / |B v|^2, in the unit of 1 / B.

    It is -infinity if R(B) is not R(B^T), and infinity for B = 0.

    Raises
    ------
    TypeError
        If `system` is no SingularSystem.
    """
    instance("system", system, SingularSystem, "singular_system(kernel, beta) makes one")
    if not system.rank:
        return math.inf
    if 1 - system.gram_minimum > _SAME_RANGE:
        return -math.inf
    inverse = np.linalg.inv(system.matrix)
    kappa = float(np.linalg.eigvalsh((inverse + inverse.T) / 2)[0])
    return kappa if abs(kappa) > _ROUND_OFF * np.linalg.norm(inverse, 2) else 0.0


def _limits(net: ResidualNetwork, met: set[str], kappa: float, scale: float) -> list[tuple[float, str]]:
    """For both energies, the limit of the step and what it is derived from."""
    properties = net.activation.properties

    def given(limit: float, text: str, *conditions: str, rising: bool = False):
        missing = [what for what in conditions if what not in met]
        if rising and not properties.non_decreasing:
            missing.append("sigma non-decreasing")
        if missing:
            return 0.0, f"{text}, but the network lacks: {', '.join(missing)}"
        rests_on = ["lipschitz", *(["sign_preserving"] if SIGN in conditions else []), *(["non_decreasing"] if rising else [])]
        return limit, text + sampled(net.activation, *rests_on)

    none = 0.0, "there is no statement about this method"
    if net.solver_parameters["ts_type"] == "discrete_gradient":
        return [given(math.inf, "the discrete gradient allows any step", NON_NEGATIVE), none]
    if net.tableau is None:
        return [none, none]
    A, b = _used_stages(*net.tableau)
    if len(b) == 1 and A[0, 0] == 1.0:
        any_step = "backward Euler allows any step"
        return [
            given(math.inf, any_step, NON_NEGATIVE, rising=True),
            given(math.inf, any_step, NON_NEGATIVE, SYMMETRIC, SIGN, rising=True),
        ]
    if len(b) == 1 and A[0, 0] == 0.5:
        return [none, given(math.inf, "the implicit midpoint rule allows any step", SYMMETRIC, SIGN)]
    if np.triu(A).any():
        return [none, none]
    if len(b) == 1:
        limit = 2 * kappa / properties.lipschitz if kappa > 0 else 0.0
        of_norm = 2 / scale if scale else math.inf
        return [
            given(limit, "2 kappa / sup |sigma'|", NON_NEGATIVE),
            given(of_norm, "2 / (sup |sigma'| |B|)", NON_NEGATIVE, SYMMETRIC, SIGN),
        ]
    if len(b) > _MOST_STAGES:
        return [(0.0, f"the constant of a method of {len(b)} stages is not computed"), none]
    radius = convex_energy_radius(A, b)
    of_norm = radius / scale if scale else math.inf
    return [given(of_norm, f"{radius:.3f} / (sup |sigma'| |B|)", NON_NEGATIVE, SYMMETRIC, rising=True), none]


def _used_stages(A: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The method without the stages that the result of a step does not depend on, such as those of FSAL methods."""
    used = b != 0
    while True:
        more = used | A[used].any(axis=0)
        if (more == used).all():
            return A[np.ix_(used, used)], b[used]
        used = more


def convex_energy_radius(A: ArrayLike, b: ArrayLike) -> float:
    """The largest step, relative to the Lipschitz constant, for which convex energies are known to fall.

    Let w_t = -grad G(w) with a convex G, and let grad G have the Lipschitz constant K. A step of length h of the explicit
    Runge-Kutta method then has G(w_1) <= G(w_0) for h K up to this number, for every such G. The number is computed to three
    digits, from below. For the usual methods it equals the limit for quadratic G, the length of the interval of stability
    on the negative axis: 2 for Euler's method, 2.78 for the classical one.

    Parameters
    ----------
    A, b
        The tableau, shapes (stages, stages) and (stages,); no unit. The first stage is the start of the step.

    Returns
    -------
    float
        The largest h K for which multipliers were found that prove it; 0 if none were found.

    Raises
    ------
    TypeError, ValueError
        If they are no real numbers, the shapes do not fit, or the method is implicit.

    Examples
    --------
    >>> round(convex_energy_radius([[0.0]], [1.0]), 2)
    2.0
    """
    A, b = tableau(A, b)
    if np.triu(A).any():
        raise ValueError("A: expected an explicit method, whose matrix is zero on and above the diagonal")
    return _convex_energy_radius(tuple(map(tuple, A.tolist())), tuple(b.tolist()))


@cache
def _convex_energy_radius(A: tuple[tuple[float, ...], ...], b: tuple[float, ...]) -> float:
    method = np.array(A), np.array(b)
    # Directions in which a form is negative are kept: forms of a neighbouring z are often negative there too.
    directions = [*np.eye(len(b) + 1), np.full(len(b) + 1, (len(b) + 1) ** -0.5)]
    low, high = 0.0, 1.0
    while high < 1e3 and _falls(*method, high, directions):
        low, high = high, 2 * high
    while high - low > 1e-3 * high and high > 1e-2:
        middle = (low + high) / 2
        low, high = (middle, high) if _falls(*method, middle, directions) else (low, middle)
    return low


def _falls(A: np.ndarray, b: np.ndarray, z: float, directions: list[np.ndarray]) -> bool:
    """Whether there are multipliers that prove that G falls for h K = z, by cutting planes.

    The function appends the vectors of the cuts to `directions`. It scales to K = 1. The quadratic form of the multipliers
    lambda is sum lambda_ij ((p_j, w_i - w_j) + |p_i - p_j|^2 / 2).
    """
    points = len(b) + 1
    w = -z * np.hstack([np.vstack([A, b]), np.zeros((points, 1))])
    p = np.eye(points)
    pairs = [(i, j) for i in range(points) for j in range(points) if i != j]
    products, flow = [], np.zeros((points, len(pairs)))
    for k, (i, j) in enumerate(pairs):
        product = np.outer(p[j], w[i] - w[j])
        products.append((product + product.T + np.outer(p[i] - p[j], p[i] - p[j])) / 2)
        flow[j, k], flow[i, k] = 1.0, -1.0
    forms, size = np.array(products), len(pairs)
    balance = np.zeros(points)
    balance[0], balance[-1] = -1.0, 1.0
    for _ in range(100):
        cuts = np.array([np.einsum("a,kab,b->k", v, forms, v) for v in directions])
        found = linprog(
            np.append(np.zeros(size), -1.0), np.column_stack([-cuts, np.ones(len(cuts))]), np.zeros(len(cuts)),
            np.column_stack([flow, np.zeros(points)]), balance, [(0, 20)] * size + [(None, 1)],
        )  # fmt: skip
        if found.status != 0 or found.x[-1] < 1e-9:
            return False
        values, vectors = np.linalg.eigh(np.tensordot(found.x[:size], forms, 1))
        if values[0] > 1e-9:
            return True
        directions.append(vectors[:, 0])
    return False
