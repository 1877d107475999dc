"""Steady states of (3.2a): where f stands still.

f is steady if sigma(u) = 0, u = a - B f. What that means depends on where sigma vanishes, an interval [low, high] for a
non-decreasing sigma:

    tanh, arctan, elu, leaky_relu, identity    {0}           B f = a: a in R(B), f in f_inf + N(B)
    relu                                       s <= 0        B f >= a, a convex set
    sigmoid, softplus                          nowhere       no steady state

Where a - B f keeps out of that interval whatever f is, its least distance from it says by how much. Everything happens
in the r numbers (psi_l, f): the rest of f, in N(B), is free.

The gradient flow f_t = B^T sigma(a - B f) stands still where sigma(u) is orthogonal to R(B), (phi_l, sigma(u)) = 0. For a
non-decreasing sigma these f are the minimisers of the convex int Sigma(a - B f) dy: where some u has all its values in
[low, high] the f of the table, else others, unless the integral falls for ever. For a strictly increasing sigma that has one
minimiser in the r numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import firedrake as fd
import numpy as np
import scipy.linalg
import scipy.optimize
from mpi4py import MPI

from fem_resnet.activation.activation import Activation
from fem_resnet.activation.enclosure import Unproved
from fem_resnet.activation.expression_properties import zero_intervals
from fem_resnet.activation.pieces import REACH
from fem_resnet.arguments import instance, number
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.spectra.autonomous import AutonomousProblem, autonomous_problem, sampled

__all__ = ["SteadyStates", "find_steady_states", "zero_set"]

_NEWTON_STEPS = 100


def zero_set(activation: Activation) -> tuple[float, float] | None:
    """The interval [low, high] where sigma vanishes; None if it does nowhere.

    Of a SymPy expression all zeros are isolated by interval arithmetic; where it comes within round-off of 0 without a
    change of sign, that is a zero. Any other activation is taken for what its `properties` say.

    Raises
    ------
    TypeError, ValueError
        If it is no Activation, sigma vanishes at several places that are no interval, or cannot be told where it vanishes.

    Examples
    --------
    >>> from fem_resnet import get_activation
    >>> [zero_set(get_activation(name)) for name in ("tanh", "relu", "sigmoid")]
    [(0.0, 0.0), (-inf, 0.0), None]
    """
    instance("activation", activation, Activation, "get_activation(name) makes one")
    if activation.expression is None:
        return _zeros_of_monotone(activation)
    try:
        found = zero_intervals(activation.expression, at_most=1)
    except Unproved as reason:
        raise ValueError(f"activation: where {activation.name} vanishes is not decided: {reason}") from reason
    if len(found) > 1:
        raise ValueError(
            f"activation: {activation.name} vanishes at several places, about {found[0][0]:.6g} and {found[1][0]:.6g} among them; "
            f"steady states are those of an activation that vanishes on one interval, as non-decreasing ones do"
        )
    if not found:
        return None
    low, high = found[0]
    if np.isfinite(low) and high - low <= 1e-9 * max(1.0, abs(low)):
        low = high = low + (high - low) / 2
    return low, high


def _zeros_of_monotone(activation: Activation) -> tuple[float, float] | None:
    properties = activation.properties
    if not properties.non_decreasing:
        raise ValueError(
            f"activation: where {activation.name} vanishes is not known; give it as a SymPy expression (Activation.from_sympy)"
        )
    if properties.strictly_increasing and properties.zero_at_zero:
        return 0.0, 0.0
    first, last = (float(activation(end)) for end in (-REACH, REACH))
    # A value of 0 at the far end of what increases strictly is one that underflows.
    if first > 0 or last < 0 or properties.strictly_increasing and (first == 0 or last == 0):
        return None
    low = -np.inf if first == 0 else _edge(lambda s: activation(s) >= 0, REACH, -REACH)
    high = np.inf if last == 0 else _edge(lambda s: activation(s) <= 0, -REACH, REACH)
    return low, max(low, high)


def _edge(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where something that holds inside ends on the way outside."""
    while abs(outside - inside) > 1e-15 * max(1.0, abs(inside)):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


@dataclass(frozen=True)
class SteadyStates:
    """The set of f with sigma(a - B f) = 0, or B^T sigma(a - B f) = 0 of a gradient flow. Get one from `find_steady_states`.

    Attributes
    ----------
    problem : AutonomousProblem
    zeros : tuple of float or None
        The interval [low, high] where sigma vanishes.
    exist : bool
        Whether there is a steady state, up to the tolerance.
    reason : str
        Why, with the numbers.
    residual : float
        The least distance of a - B f from the functions with values in [low, high], in L2(Y), over max(|a|, |Y|^(1/2)
        |low| or |high|); infinite if sigma vanishes nowhere. Of a gradient flow, if that is less, the part of |sigma(u)| in
        R(B) where int Sigma(u) dy is least.
    tolerance : float
        Up to which residual steady states exist, and f is one.
    minimiser : numpy.ndarray or None
        (psi_l, f) of the steady states of a gradient flow in which sigma(u) is not 0, shape (r,).
    """

    problem: AutonomousProblem
    zeros: tuple[float, float] | None
    exist: bool
    reason: str
    residual: float
    tolerance: float
    minimiser: np.ndarray | None = None

    @property
    def rest(self) -> np.ndarray:
        """U = a - B f of the steady states of a gradient flow in which sigma(u) is not 0, shape (nodes, 1)."""
        return _argument(self.problem, self.minimiser)

    @cached_property
    def least_norm(self) -> fd.Function:
        """The steady state f_inf of least norm. Collective when first asked for; errors as for `nearest`."""
        return self.nearest(self.problem.Y.batch(np.zeros((self.problem.Y.nodes, 1))))

    @property
    def null_space_dimension(self) -> int:
        """Dimension of N(B): where sigma vanishes at one point, steady states are f_inf + N(B)."""
        return self.problem.Y.size - self.problem.system.rank

    def residuals(self, f: fd.Function) -> np.ndarray:
        """What `residual` is, for these f instead of the best: shape (samples,). Collective."""
        return _residuals(self.problem, self.zeros, self.problem.argument(self.problem.read(f, "f")))

    def contain(self, f: fd.Function) -> np.ndarray:
        """Whether these f are steady, up to the tolerance: shape (samples,), bool. Collective."""
        return self.residuals(f) <= self.tolerance

    def nearest(self, f: fd.Function) -> fd.Function:
        """The steady states nearest to these f in L2(Y), a new Function. Collective.

        f changes in R(B^T) alone: what is in N(B) is free. Where steady states leave no room, so that some u is on an end
        of its interval at many nodes, it is the nearest of those that are steady up to the tolerance. Where sigma vanishes at one point this is f_inf plus the
        part of f in N(B).

        Raises
        ------
        ValueError
            If there is no steady state; or if sigma is constant somewhere, but does not vanish at those of a gradient flow.
        RuntimeError
            If the iteration for an interval does not converge.
        """
        if not self.exist:
            raise ValueError(f"nearest: there is no steady state, {self.reason}")
        problem, values = self.problem, self.problem.read(f, "f")
        c = problem.system.right_coefficients(values)
        if self.minimiser is None:
            moved = np.column_stack([_nearest(problem, self.zeros, c[:, s], self.tolerance) for s in range(c.shape[1])])
        elif problem.activation.properties.strictly_increasing:
            moved = self.minimiser[:, None]
        else:
            raise ValueError(
                f"nearest: {problem.activation.name} is constant somewhere, and not 0 at the steady states of this gradient "
                f"flow: which is nearest is not known; `residuals` tells which f are steady"
            )
        return problem.Y.batch(values + problem.system.right_values(moved - c))

    def distance(self, f: fd.Function) -> np.ndarray:
        """Distance of these f from the set in L2(Y), shape (samples,). Collective; errors as for `nearest`."""
        Y = self.problem.Y
        return self.problem.norms(Y.values(self.nearest(f)) - Y.values(f))


@supports(*HELD, *STEPPED, "gradient_flow")
def find_steady_states(net: ResidualNetwork, at: float | None = None, tolerance: float = 1e-8) -> SteadyStates:
    """Steady states of (3.2a), or of a gradient flow. Collective.

    Parameters
    ----------
    net
        The network, autonomous if `at` is left out.
    at
        A time: the problem frozen there; T for the limits of Remark 3.1.
    tolerance
        Up to which residual, in parts of |a|, a is in R(B); no unit.

    Raises
    ------
    ValueError
        If the network depends on t and no time is given, or sigma vanishes at several places, or decreases somewhere in a
        gradient flow.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
    >>> net = ResidualNetwork(phi, bias_in_time="shared", kernel_in_time="shared")
    >>> net.kernel.set(0, np.diag([2.0, 1.0, 1.0, 0.0]))
    >>> net.bias.set(0, 3 * phi.values[:, 0])
    >>> steady = find_steady_states(net)
    >>> steady.exist, round(net.Y.norm(steady.least_norm), 12), steady.null_space_dimension
    (True, 1.5, 78)
    >>> net.bias.set(0, phi.values[:, 3])
    >>> print(find_steady_states(net).reason)
    a is not in R(B): 1 of |a| is outside, tolerance 1e-08
    """
    problem = autonomous_problem(net, at)
    tolerance = number("tolerance", tolerance, least=0)
    sigma = problem.activation
    if problem.gradient_flow and not sigma.properties.non_decreasing:
        raise ValueError(
            f"net: steady states of a gradient flow are known for a non-decreasing sigma alone, where int Sigma(u) is convex; "
            f"{sigma.name} decreases somewhere"
        )
    zeros = zero_set(sigma)
    vanishing = _where_sigma_vanishes(problem, zeros, tolerance)
    return vanishing if vanishing.exist or not problem.gradient_flow else _where_the_integral_is_least(vanishing)


def _where_sigma_vanishes(problem: AutonomousProblem, zeros: tuple[float, float] | None, tolerance: float) -> SteadyStates:
    if zeros is None:
        reason = f"{problem.activation.name} vanishes nowhere"
        return SteadyStates(problem, None, False, reason, np.inf, tolerance)
    c = _closest(problem, zeros)
    outside = problem.norms(_excess(_argument(problem, c), zeros))[0]
    residual = float(outside / _scale(problem, zeros))
    exist = residual <= tolerance
    numbers = f"{residual:.3g} of |a| is outside, tolerance {tolerance:g}"
    if zeros[0] == zeros[1]:
        what = "a" if zeros[0] == 0 else f"a - {zeros[0]:g}"
        reason = f"{what} is{'' if exist else ' not'} in R(B): {numbers}"
    else:
        reason = f"{'some' if exist else 'no'} a - B f has all its values in [{zeros[0]:g}, {zeros[1]:g}]: {numbers}"
    return SteadyStates(problem, zeros, exist, reason, residual, tolerance)


def _where_the_integral_is_least(vanishing: SteadyStates) -> SteadyStates:
    """Steady states of a gradient flow where sigma(u) does not vanish."""
    problem, zeros, tolerance = vanishing.problem, vanishing.zeros, vanishing.tolerance
    c = _least_integral(problem)
    residual = float(_residuals(problem, zeros, _argument(problem, c))[0])
    exist = residual <= tolerance
    reason = (
        f"int Sigma(u) {'is least' if exist else 'was not found to have a least value'}: {residual:.3g} of |sigma(u)| is in R(B), "
        f"tolerance {tolerance:g}{sampled(problem.activation, 'non_decreasing')}"
    )
    return SteadyStates(problem, zeros, exist, reason, residual, tolerance, c)


def _residuals(problem: AutonomousProblem, zeros: tuple[float, float] | None, u: np.ndarray) -> np.ndarray:
    """`SteadyStates.residuals` of u = a - B f at the owned nodes."""
    outside = np.full(u.shape[1], np.inf) if zeros is None else problem.norms(_excess(u, zeros)) / _scale(problem, zeros)
    if not problem.gradient_flow:
        return outside
    s = problem.activation(u)
    part, whole = np.linalg.norm(problem.system.left_coefficients(s), axis=0), problem.norms(s)
    return np.minimum(outside, np.divide(part, whole, out=np.ones_like(part), where=whole > 0))


def _least_integral(problem: AutonomousProblem) -> np.ndarray:
    """(psi_l, f) where the convex int Sigma(a - B f) dy is least, or of an f far out where there is no such place.

    In the coordinates x = D c of B f, which small singular values do not spoil.
    """
    system, sigma, Y = problem.system, problem.activation, problem.Y

    def u(x):
        return problem.bias[:, None] - system.left_values(x[:, None])

    def slope(x):
        return -system.left_coefficients(sigma(u(x)))[:, 0]

    def curvature(x):
        return system.squared.weighted(sigma.derivative(u(x))[:, 0])

    x = np.zeros(system.rank)
    if not system.rank:
        return x
    size = 1.0 + problem.norms(problem.bias[:, None])[0]
    found = scipy.optimize.minimize(
        lambda x: float(Y.sum(Y.weights @ sigma.primitive(u(x)))[0]), x, jac=slope, hess=curvature, method="trust-exact",
        options={"gtol": 1e-6 * np.linalg.norm(slope(x)), "initial_trust_radius": size, "max_trust_radius": 1e3 * size},
    )  # fmt: skip
    # From there by Newton's method, as the integral itself says no more than half of the digits.
    x, left = found.x, np.linalg.norm(slope(found.x))
    for _ in range(_NEWTON_STEPS):
        new = x - np.linalg.lstsq(curvature(x), slope(x), rcond=1e-14)[0]
        after = np.linalg.norm(slope(new))
        if not after < left:
            break
        x, left = new, after
    return x / system.values


def _scale(problem: AutonomousProblem, zeros: tuple[float, float]) -> float:
    ends = max(abs(end) for end in zeros if np.isfinite(end)) if np.isfinite(zeros).any() else 0.0
    return max(float(problem.norms(problem.bias[:, None])[0]), problem.Y.measure**0.5 * ends) or 1.0


def _excess(u: np.ndarray, zeros: tuple[float, float]) -> np.ndarray:
    """U minus the nearest number in [low, high]."""
    return u - np.clip(u, *zeros)


def _argument(problem: AutonomousProblem, c: np.ndarray) -> np.ndarray:
    """U = a - B f, shape (nodes, 1), for the f with (psi_l, f) = c_l."""
    system = problem.system
    return problem.bias[:, None] - system.left_values((system.values * c)[:, None])


def _closest(problem: AutonomousProblem, zeros: tuple[float, float]) -> np.ndarray:
    """(psi_l, f) of an f for which |excess of a - B f| is least: at once for one point, else by Newton's method.

    The square of that norm is convex and piecewise quadratic in B f, by whose coordinates x = D c it is minimised: that
    small singular values do not spoil.
    """
    system = problem.system
    x = system.left_coefficients(problem.bias[:, None] - min(zeros, key=abs))[:, 0]
    if zeros[0] == zeros[1]:
        return x / system.values

    def parts(x):
        excess = _excess(problem.bias[:, None] - system.left_values(x[:, None]), zeros)
        return problem.norms(excess)[0] ** 2 / 2, excess

    x = min(x, np.zeros_like(x), key=lambda x: parts(x)[0])
    value, excess = parts(x)
    for _ in range(_NEWTON_STEPS):
        slope = -system.left_coefficients(excess)[:, 0]
        H = system.squared.weighted((excess[:, 0] != 0).astype(float))
        step = -np.linalg.lstsq(H, slope, rcond=1e-14)[0]
        length = 1.0
        while length > 1e-8:
            new, new_excess = parts(x + length * step)
            if new <= value + 1e-4 * length * (slope @ step):
                break
            length /= 2
        else:
            break
        x, excess, fallen, value = x + length * step, new_excess, value - new, new
        if fallen <= 1e-15 * value:
            break
    return x / system.values


def _product(problem: AutonomousProblem, weights: np.ndarray) -> np.ndarray:
    """A^T M diag(weights) A, shape (r, r), for A c = sum_l mu_l c_l phi_l, so that u = a - A c."""
    system = problem.system
    return system.values[:, None] * system.squared.weighted(weights) * system.values


class _NearestOfInterval:
    """Least |c - start|^2 / 2 under low <= a - A c <= high at all nodes, by Mehrotra's interior-point method.

    Slacks s and multipliers z at the nodes, a row a finite end of the interval; systems of size r.
    """

    def __init__(self, problem: AutonomousProblem, zeros: tuple[float, float], start: np.ndarray):
        self._problem, self._start = problem, start
        # sign * (end - u) >= 0
        ends = [(sign, end) for sign, end in ((-1.0, zeros[0]), (1.0, zeros[1])) if np.isfinite(end)]
        self._signs, self._ends = np.array(ends).T[:, :, None]
        self._scale = _scale(problem, zeros)
        self._size = max(np.linalg.norm(start), self._scale / problem.system.values[0])
        self.c = start
        g = self._slack(start)
        self._s = np.maximum(np.abs(g), 0.1 * self._scale / problem.Y.measure**0.5)
        self._z = np.full_like(g, self._size / (problem.system.values[0] * problem.Y.measure**0.5))

    def _slack(self, c: np.ndarray) -> np.ndarray:
        return self._signs * (self._ends - _argument(self._problem, c)[:, 0])

    def _transposed(self, x: np.ndarray) -> np.ndarray:
        """Sum over rows of sign A^T M x, shape (r,)."""
        system = self._problem.system
        return system.values * system.left_coefficients((self._signs * x).sum(axis=0)[:, None])[:, 0]

    def _sum(self, x: np.ndarray) -> float:
        return float(self._problem.Y.sum((x @ self._problem.Y.weights).sum()))

    def _longest(self, *pairs: tuple[np.ndarray, np.ndarray]) -> list[float]:
        """The longest steps with which values do not become negative."""
        with np.errstate(divide="ignore", invalid="ignore"):
            own = np.array([np.where(x < 0, -value / x, np.inf).min(initial=np.inf) for value, x in pairs])
        self._problem.Y.comm.Allreduce(MPI.IN_PLACE, own, op=MPI.MIN)
        return own.tolist()

    @np.errstate(over="ignore", invalid="ignore")
    def solve(self) -> bool:
        """Whether it has converged: c is good to 1e-7 or so of its size."""
        for _ in range(_NEWTON_STEPS):
            gap = self._sum(self._s * self._z)
            primal = self._slack(self.c) - self._s
            dual = self.c - self._start - self._transposed(self._z)
            outside = np.sqrt(self._sum(primal**2))
            feasible = outside <= 1e-12 * self._scale and np.linalg.norm(dual) <= 1e-9 * self._size
            if feasible and gap <= 1e-15 * self._size**2:
                return True
            if not self._step(gap, primal, dual):
                break
        return gap <= 1e-9 * self._size**2 and outside <= 1e-9 * self._scale

    @np.errstate(over="ignore", invalid="ignore")
    def _step(self, gap: float, primal: np.ndarray, dual: np.ndarray) -> bool:
        s, z = self._s, self._z
        matrix = np.eye(self.c.size) + _product(self._problem, (z / s).sum(axis=0))
        # Near the end some z / s are huge: equilibrated, the matrix can be factorised for some more steps.
        size = np.sqrt(np.diag(matrix))
        try:
            factor = scipy.linalg.cho_factor(matrix / np.outer(size, size))
        except (scipy.linalg.LinAlgError, ValueError):
            return False

        def direction(complementarity):
            right = self._transposed((-complementarity - z * primal) / s) - dual
            dc = scipy.linalg.cho_solve(factor, right / size) / size
            system = self._problem.system
            ds = self._signs * system.left_values((system.values * dc)[:, None])[:, 0] + primal
            return dc, ds, (-complementarity - z * ds) / s

        _, ds, dz = direction(s * z)
        forth, back = np.minimum(self._longest((s, ds), (z, dz)), 1.0)
        measure = self._problem.Y.measure * len(self._signs)
        centre = (self._sum((s + forth * ds) * (z + back * dz)) / gap) ** 3 * gap / measure
        dc, ds, dz = direction(s * z + ds * dz - centre)
        forth, back = (min(1.0, 0.995 * length) for length in self._longest((s, ds), (z, dz)))
        self.c, self._s, self._z = self.c + forth * dc, s + forth * ds, z + back * dz
        return max(forth, back) > 1e-10


def _nearest(problem: AutonomousProblem, zeros: tuple[float, float], c: np.ndarray, tolerance: float) -> np.ndarray:
    """(psi_l, f) of the steady state nearest to an f that has c."""
    inside = problem.norms(_excess(_argument(problem, c), zeros))[0] == 0
    if inside or zeros[0] == zeros[1] or not c.size:
        return c if inside else _closest(problem, zeros)
    # Where the set has no interior, as where u is on an end of the interval at every node, there may be no multipliers:
    # then the nearest of all that are steady up to the tolerance is near to it.
    room = tolerance * _scale(problem, zeros) / problem.Y.measure**0.5
    for widened in (0.0, 0.1 * room, 0.9 * room):
        solver = _NearestOfInterval(problem, (zeros[0] - widened, zeros[1] + widened), c)
        if solver.solve():
            return solver.c
    outside = problem.norms(_excess(_argument(problem, solver.c), zeros))[0] / _scale(problem, zeros)
    raise RuntimeError(
        f"nearest: the steady state nearest to f was not found in {_NEWTON_STEPS} steps; {outside:.1e} of a - B f is "
        f"still outside of [{zeros[0]:g}, {zeros[1]:g}]; a larger `tolerance` of find_steady_states leaves more room"
    )
