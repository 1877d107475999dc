"""A residual network between its layer times: the function z^tau of (2.2a), (2.2b).

Let a_l, B_l be the coefficients of the steps of a network (2.1), and a^tau, B^tau the functions that are linear between
a^tau(t_l) = a_l, B^tau(t_l) = B_l. Then

    z^tau(t + tau) = z^tau(t) + tau sigma(a^tau(t) - B^tau(t) z^tau(t)),      0 <= t <= T - tau,                (2.2a)
    z^tau(t) = z_0,                                                           0 <= t < tau,                     (2.2b)

so that z^tau(t_l) = z_l. At t = tau (2.2a) has the first step, so that (2.2b), printed with t <= tau, ends before. For each
fraction theta in [0, 1) of a step, the values at t_l + theta tau are the states of a network (2.1) of their own, with the
coefficients a^tau(t_l + theta tau), B^tau(t_l + theta tau). What happens inside of a step is more than an interpolation of
z_l and z_(l+1): where a_l = (-1)^l a, which does not converge, the states z_l tend to one function and those at the middles of
the steps to another one. Theorem 2.1 is about all of them, uniformly in t.

z^tau jumps at the layer times, by O(tau): its limit from the left at tau is z_0. It lies in L-infinity(0, T) and not in
C([0, T]), as is printed. Its limit z does lie there.

Steps of unequal lengths: the point at the fraction theta of a step goes to the one at theta of the next,

    z^tau(t_(l+1) + theta tau_(l+1)) = z^tau(s) + (t_(l+1) + theta tau_(l+1) - s) sigma(..),      s = t_l + theta tau_l,

which is (2.2a) where all lengths are equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import firedrake as fd
import numpy as np

from fem_resnet.arguments import number
from fem_resnet.features import HELD, supports
from fem_resnet.fixed import OnMesh, read_only
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import same
from fem_resnet.theory.limits.residual_network import refuse_other_schemes
from fem_resnet.time_stepping.stepper import StepFailure

__all__ = ["DepthInterpolant"]

#: What counts as a layer time, relative to T: z^tau jumps there, and sums of lengths meet it up to round-off.
_ROUND_OFF = 1e-12


class DepthInterpolant(OnMesh):
    """The function z^tau of (2.2a), (2.2b): a network (2.1) at all times, also between its layer times. Collective.

    It belongs to the coefficients and the input that it was made with, also where these change later. It is on no tape.
    `depth_limit` with `between` compares it with the solution of (2.3), as Theorem 2.1 does.

    Parameters
    ----------
    net
        A network with Euler's method and fixed steps: on any label domain, or of arrays (`from_network`). Each step is a layer
        of (2.1), with the coefficients at its start, as `to_network` has them.
    initial
        z_0, a Function of `Y.V` or a batch.

    Attributes
    ----------
    net : ResidualNetwork
        The network.
    times : numpy.ndarray
        t_0 .. t_L, the ends of all steps, in the unit of t; shape (steps of all layers + 1,).

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, the network has another scheme, or it has no layers.

    Examples
    --------
    >>> from fem_resnet import from_network, point_space
    >>> Y = point_space([2.0])
    >>> net, z_0 = from_network([[0.0], [1.0], [1.0]], [[0.0]], [0.0], Y, tau=1.0, activation="identity")
    >>> z = DepthInterpolant(net, z_0)
    >>> [float(Y.values(z(t))[0, 0]) for t in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)]
    [0.0, 0.0, 0.0, 0.5, 1.0, 1.5, 2.0]
    """

    @supports("channels", *HELD, "single_precision")
    def __init__(self, net: ResidualNetwork, initial: fd.Function):
        refuse_other_schemes(net.solver_parameters)
        net.Y.check_batch(initial, "initial")
        self.net = net
        self._layers, self._steps = net.layer_inputs(), net.steps
        ends = [part.start + part.length * (np.arange(net.steps) + 1) / net.steps for part in self._layers]
        self.times = read_only(np.concatenate([[0.0], *ends]))
        self._initial, self._z_0 = initial, np.array(net.Y.values(initial))

    def __call__(self, t: float) -> fd.Function:
        """z^tau(t), 0 <= t <= T: a new Function. Collective.

        A time that is a layer time up to round-off counts as that. Each call starts from z_0; `at_fraction` gives the values
        in all steps at the cost of one call.

        Raises
        ------
        ValueError
            If t is not in [0, T], or differs between ranks.
        StepFailure
            If the state is not finite.
        """
        same(self.net.Y.comm, t=t)
        T = self.times[-1]
        t = number("t", t, least=0.0, most=float(T))
        step = int(np.searchsorted(self.times, t + _ROUND_OFF * T, side="right")) - 1
        theta = 0.0
        if step < len(self.times) - 1:
            start, end = self.times[step : step + 2]
            theta = max(0.0, (t - start) / (end - start))
        for number_of_step, (_, z) in enumerate(self._states(theta)):
            if number_of_step == step:
                return self.net.Y.like(self._initial, z)
        raise AssertionError("t is in one of the steps")

    def at_fraction(self, theta: float) -> Iterator[tuple[float, fd.Function]]:
        """Pairs of t and z^tau(t) at a fraction of each step, from the first to the last, in one pass. Collective.

        Parameters
        ----------
        theta
            The fraction of each step, in [0, 1]; no unit. 0 gives t_0 .. t_L, and 1 the limits from the left at t_1 .. t_L.

        Returns
        -------
        iterator
            Each Function is a new one. All ranks go on together.

        Raises
        ------
        ValueError
            If theta is not in [0, 1], or differs between ranks.
        StepFailure
            If the state is not finite.
        """
        same(self.net.Y.comm, theta=theta)
        theta = number("theta", theta, least=0.0, most=1.0)
        return ((t, self.net.Y.like(self._initial, z)) for t, z in self._states(theta))

    def _states(self, theta: float) -> Iterator[tuple[float, np.ndarray]]:
        """Times and values at the owned nodes, shape (nodes, samples)."""
        sigma, Y, z = self.net.activation, self.net.Y, self._z_0
        # The jumps of z^tau are at the layer times: there the fraction 0 has one more value, that at T.
        times = self.times[:-1] + theta * np.diff(self.times) if theta else self.times
        yield float(times[0]), z
        for step, (start, end) in enumerate(zip(times[:-1], times[1:])):
            with np.errstate(over="ignore", invalid="ignore"):
                z = z + (end - start) * sigma(self._argument(step, theta, z))
            if Y.sum(not np.isfinite(z).all()):
                raise StepFailure(step // self._steps, float(end), "NOT_FINITE")
            yield float(end), z

    def _argument(self, step: int, theta: float, z: np.ndarray) -> np.ndarray:
        """a^tau(t) - B^tau(t) z at the fraction theta of a step: between those of the starts of this step and the next."""
        weights = {step: 1 - theta, step + 1: theta}
        return sum(weight * self._at_start(k, z) for k, weight in weights.items() if weight)  # type: ignore[return-value]

    def _at_start(self, step: int, z: np.ndarray) -> np.ndarray:
        layer, inside = divmod(step, self._steps)
        part, s = self._layers[layer], inside / self._steps
        return part.bias.coefficients(s)[:, None] - part.factors.apply(part.beta.coefficients(s), z)
