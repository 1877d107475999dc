"""Steady states of (3.2a): where f stands still.

f is steady if sigma(u) = 0 for u = a - B f. The set of steady states depends on where sigma vanishes. For a non-decreasing
sigma that is an interval [low, high]:

    tanh, arctan, elu, leaky_relu, identity    {0}           B f = a: a in R(B), f in f_inf + N(B)
    relu                                       s <= 0        B f >= a, a convex set
    sigmoid, softplus                          nowhere       no steady state

If no f brings a - B f into that interval, the least distance says how far off it is. Only the r numbers (psi_l, f) matter:
the rest of f, in N(B), is free.

The gradient flow f_t = B^T sigma(a - B f) stands still where sigma(u) is orthogonal to R(B), (phi_l, sigma(u)) = 0. For a
non-decreasing sigma these f are the minimisers of the convex int Sigma(a - B f) dy. If some u has all its values in
[low, high], they are the f of the table. If not, they are other f, unless the integral has no minimiser. For a strictly
increasing sigma the minimiser is unique in the r numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import firedrake as fd
import numpy as np

from fem_resnet.arguments import number
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.spectra.autonomous import AutonomousProblem, autonomous_problem, sampled
from fem_resnet.theory.spectra.least_integral import least_integral
from fem_resnet.theory.spectra.values_in_interval import argument, closest_to_interval, excess, nearest_in_interval, scale
from fem_resnet.theory.spectra.zero_set import zero_set

__all__ = ["SteadyStates", "find_steady_states"]


@dataclass(frozen=True)
class SteadyStates:
    """The set of f with sigma(a - B f) = 0, or for a gradient flow B^T sigma(a - B f) = 0. Get one from `find_steady_states`.

    Attributes
    ----------
    problem : AutonomousProblem
        The problem whose steady states these are.
    zeros : tuple of float or None
        The interval [low, high] on which sigma vanishes; None if it vanishes nowhere.
    exist : bool
        Whether there is a steady state, up to the tolerance.
    reason : str
        Why, with the numbers.
    residual : float
        The least distance in L2(Y) of a - B f from functions with values in [low, high], divided by the maximum of |a| and
        |Y|^(1/2) |low|, |Y|^(1/2) |high|; infinite if sigma vanishes nowhere. For a gradient flow, if that is less, the part
        of |sigma(u)| in R(B) where int Sigma(u) dy is least. No unit.
    tolerance : float
        Steady states exist, and f is one of them, up to this residual; no unit.
    minimiser : numpy.ndarray or None
        (psi_l, f), shape (r,), for those steady states of a gradient flow in which sigma(u) is not 0; None if there are none.
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
        """U = a - B f for the steady states of a gradient flow in which sigma(u) is not 0, shape (nodes, 1)."""
        return argument(self.problem, self.minimiser)

    @cached_property
    def least_norm(self) -> fd.Function:
        """The steady state f_inf of least norm. Collective at the first access; raises as `nearest`."""
        return self.nearest(self.problem.Y.batch(np.zeros((self.problem.Y.nodes, 1))))

    @property
    def null_space_dimension(self) -> int:
        """The dimension of N(B). If sigma vanishes at one point, the steady states are f_inf + N(B)."""
        return self.problem.Y.size - self.problem.system.rank

    def residuals(self, f: fd.Function) -> np.ndarray:
        """The residual, as in `residual`, of each given f, shape (samples,). Collective."""
        return _residuals(self.problem, self.zeros, self.problem.argument(self.problem.read(f, "f")))

    def contain(self, f: fd.Function) -> np.ndarray:
        """Whether each given f is steady, up to the tolerance, shape (samples,), bool. Collective."""
        return self.residuals(f) <= self.tolerance

    def nearest(self, f: fd.Function) -> fd.Function:
        """The steady states nearest to the given f in L2(Y), a new Function. Collective.

        f changes in R(B^T) alone, as its part in N(B) is free. If sigma vanishes at one point, the result is f_inf plus the
        part of f in N(B). If the set of steady states has no interior, so that u is at an end of the interval at many nodes,
        the result is the nearest f that is steady up to the tolerance.

        Parameters
        ----------
        f
            A Function of `Y.V` or a batch.

        Raises
        ------
        ValueError
            If there is no steady state; or if sigma is constant somewhere, and does not vanish at the steady states of a
            gradient flow.
        RuntimeError
            If the iteration for an interval does not converge.
        """
        if not self.exist:
            raise ValueError(f"nearest: there is no steady state: {self.reason}")
        problem, values = self.problem, self.problem.read(f, "f")
        c = problem.system.right_coefficients(values)
        if self.minimiser is None:
            moved = np.column_stack(
                [nearest_in_interval(problem, self.zeros, c[:, s], self.tolerance) for s in range(c.shape[1])]
            )
        elif problem.activation.properties.strictly_increasing:
            moved = self.minimiser[:, None]
        else:
            raise ValueError(
                f"nearest: the nearest steady state is not known, as {problem.activation.name} is constant somewhere and not "
                f"0 at the steady states of this gradient flow; `residuals` tells which f are steady"
            )
        return problem.Y.batch(values + problem.system.right_values(moved - c))

    def distance(self, f: fd.Function) -> np.ndarray:
        """The distance of each given f from the set in L2(Y), shape (samples,). Collective; raises as `nearest`."""
        Y = self.problem.Y
        return self.problem.norms(Y.values(self.nearest(f)) - Y.values(f))


@supports("channels", *HELD, *STEPPED, "gradient_flow")
def find_steady_states(net: ResidualNetwork, at: float | None = None, tolerance: float = 1e-8) -> SteadyStates:
    """The steady states of (3.2a), or of a gradient flow. Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        The network, at its present coefficients. It must be autonomous if `at` is left out.
    at
        A time from 0 to T: the problem with the bias and the kernel at that time. T gives the limits of Remark 3.1.
    tolerance
        Steady states exist up to this residual, relative to |a|; no unit.

    Raises
    ------
    ValueError
        If the network depends on t and no time is given; if sigma vanishes at several places; or if it decreases somewhere
        in a gradient flow.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Bias, Kernel, LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
    >>> net = ResidualNetwork(Kernel(phi, in_time="shared"), bias=Bias(in_time="shared"))
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
            f"net: expected a non-decreasing sigma for a gradient flow, as its steady states are known where int Sigma(u) is "
            f"convex; {sigma.name} decreases somewhere"
        )
    zeros = zero_set(sigma)
    vanishing = _where_sigma_vanishes(problem, zeros, tolerance)
    return vanishing if vanishing.exist or not problem.gradient_flow else _where_the_integral_is_least(vanishing)


def _where_sigma_vanishes(problem: AutonomousProblem, zeros: tuple[float, float] | None, tolerance: float) -> SteadyStates:
    """The steady states with sigma(u) = 0."""
    if zeros is None:
        reason = f"{problem.activation.name} vanishes nowhere"
        return SteadyStates(problem, None, False, reason, np.inf, tolerance)
    c = closest_to_interval(problem, zeros)
    outside = problem.norms(excess(argument(problem, c), zeros))[0]
    residual = float(outside / scale(problem, zeros))
    exist = residual <= tolerance
    numbers = f"{residual:.3g} of |a| is outside, tolerance {tolerance:g}"
    if zeros[0] == zeros[1]:
        what = "a" if zeros[0] == 0 else f"a - {zeros[0]:g}"
        reason = f"{what} is{'' if exist else ' not'} in R(B): {numbers}"
    else:
        reason = f"{'some' if exist else 'no'} a - B f has all its values in [{zeros[0]:g}, {zeros[1]:g}]: {numbers}"
    return SteadyStates(problem, zeros, exist, reason, residual, tolerance)


def _where_the_integral_is_least(vanishing: SteadyStates) -> SteadyStates:
    """The steady states of a gradient flow where sigma(u) does not vanish."""
    problem, zeros, tolerance = vanishing.problem, vanishing.zeros, vanishing.tolerance
    c = least_integral(problem)
    residual = float(_residuals(problem, zeros, argument(problem, c))[0])
    exist = residual <= tolerance
    reason = (
        f"int Sigma(u) {'has a minimum' if exist else 'has no minimum that was found'}: {residual:.3g} of |sigma(u)| is in "
        f"R(B), tolerance {tolerance:g}{sampled(problem.activation, 'non_decreasing')}"
    )
    return SteadyStates(problem, zeros, exist, reason, residual, tolerance, c)


def _residuals(problem: AutonomousProblem, zeros: tuple[float, float] | None, u: np.ndarray) -> np.ndarray:
    """The residuals of `SteadyStates` for u = a - B f at the owned nodes, shape (samples,)."""
    outside = np.full(u.shape[1], np.inf) if zeros is None else problem.norms(excess(u, zeros)) / scale(problem, zeros)
    if not problem.gradient_flow:
        return outside
    s = problem.activation(u)
    part, whole = np.linalg.norm(problem.system.left_coefficients(s), axis=0), problem.norms(s)
    return np.minimum(outside, np.divide(part, whole, out=np.ones_like(part), where=whole > 0))
