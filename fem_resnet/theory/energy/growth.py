r"""How fast f may grow: section 3.4.

For a bounded sigma and any B, in L2(Y),

    |f(t)| <= |f_I| + sup |sigma| |Y|^(1/2) t.

Let B_s >= 0, let a and b be constant in t, let sigma be non-decreasing with s sigma(s) >= 0, and L = sup |sigma'|. As
int Sigma(u) falls and sigma^2 <= 2 L Sigma, |f_t|^2 <= 2 L int Sigma(u_I) dy. So

    |f(t)| <= C_1 + C_2 t,        C_1 = |f_I|,        C_2 = (2 L int Sigma(u_I) dy)^(1/2).

For relu C_2 is |u_I^+|: that is Proposition 3.5. The bound also holds for leaky relu, elu and the identity.

For any Lipschitz sigma one integrates against sign(f) and applies Gronwall's inequality. In L1(Y), with C_0 = |sigma(0)|,

    int |f(y, t)| dy <= (int |f_I| dy + L |a|_L1((0,t); L1) + C_0 |Y| t) exp(L |Y| |b|_L1((0,t); Linf)).

The exponent has the factor |Y|, because the bound of the kernel is integrated over y. The paper prints it without this
factor, which is right for |Y| = 1 only. The bound is sharp: relu, a = 0, b = -c with a constant c > 0 and f_I = 1 give
f = exp(c |Y| t).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.activation.expression_properties import size
from fem_resnet.arguments import choice
from fem_resnet.costate.trajectory import LayerTrajectory
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.ranks import same
from fem_resnet.theory.energy.step_monitor import StepMonitor
from fem_resnet.theory.spectra.assumptions import AUTONOMOUS, NON_NEGATIVE, SIGN, energy_conditions
from fem_resnet.theory.spectra.autonomous import sampled
from fem_resnet.time_stepping.evolution import Step

__all__ = ["GrowthBound", "GrowthMonitor", "supremum"]

#: A bounded activation that is not monotone is sampled on this range, with this spacing.
_RANGE, _SPACING = 1e3, 1e-2
#: Round-off in norms, relative to their size.
_ROUND_OFF = 1e-13
#: Times that differ by less than this part of a layer are the same time, added up in another order.
_SAME_TIME = 1e-9


@dataclass(frozen=True)
class GrowthBound:
    """A bound of section 3.4 for one solution, at the times that were measured. Get it from `GrowthMonitor.bounds`.

    Attributes
    ----------
    name : str
        "bounded", "Proposition 3.5" or "Gronwall".
    norm : str
        "L2" or "L1": the norm of f that is bounded.
    unmet : tuple of str
        Conditions that fail, each with the reason. The bound applies if the tuple is empty.
    values : numpy.ndarray or None
        The bound, shape (times, samples); None where a condition fails without which there is no number.
    observed : numpy.ndarray
        The norm of f, shape (times, samples).
    sampled : str
        Which properties of sigma the bound uses that are sampled and not proved, in words; empty if all are proved.
    """

    name: str
    norm: str
    unmet: tuple[str, ...]
    values: np.ndarray | None
    observed: np.ndarray
    sampled: str = ""

    @property
    def applies(self) -> bool:
        """Whether all conditions hold."""
        return not self.unmet

    @property
    def ratio(self) -> float | None:
        """The largest ratio of the growth of f to the growth that the bound allows, over later times and samples; no unit.

        That is (norm(f) - norm(f_I)) / (bound - norm(f_I)). It is at most 1 if the bound applies, negative where f only
        falls, and 0 where neither grows, up to round-off. None without a bound.
        """
        if self.values is None:
            return None
        grown, allowed = self.observed[1:] - self.observed[0], self.values[1:] - self.values[0]
        moved = np.maximum(np.abs(grown), allowed) > _ROUND_OFF * self.values[1:]
        with np.errstate(divide="ignore"):
            return float(np.divide(grown, allowed, out=np.zeros_like(grown), where=moved).max())

    def __str__(self) -> str:
        if self.unmet:
            return f"{self.name}, {self.norm}: does not apply: {'; '.join(self.unmet)}"
        return f"{self.name}, {self.norm}: f grows by up to {self.ratio:.4g} of what the bound allows{self.sampled}"


class GrowthMonitor(StepMonitor):
    """The norms of f after each step of a solution, and the bounds of section 3.4.

    As a monitor for `follow_trajectory` it measures after each step of the TS. It can also measure a run of any method at
    the layer times (`watch`).

    Parameters
    ----------
    net
        The network, at its present coefficients. Collective over the ranks of the label domain.

    Attributes
    ----------
    times : list of float
        The times of the measurements so far, in the unit of t.

    Examples
    --------
    The exponential bound is sharp for a kernel of rank one; |Y| is 2.83 on this mesh:

    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Bias, Kernel, LabelSpace, follow_trajectory, given_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(1), "CG", 1))
    >>> kernel, bias = Kernel(given_basis(Y, [1.0]), in_time="shared"), Bias(in_time="shared")
    >>> net = ResidualNetwork(kernel, bias=bias, layers=1, activation="relu")
    >>> net.kernel.set(0, [[-0.5]])
    >>> monitor = GrowthMonitor(net)
    >>> _ = follow_trajectory(net, Y.batch(1 + 0 * Y.weights), monitor, steps=16)
    >>> {bound.name: round(bound.ratio, 6) for bound in monitor.bounds() if bound.applies}
    {'Gronwall': 1.0}
    """

    @supports("channels", *HELD, *STEPPED)
    def __init__(self, net: ResidualNetwork):
        super().__init__(net)
        self._norms: list[np.ndarray] = []
        #: int Sigma(u_I) dy, shape (samples,), once the start was measured.
        self._energy_at_start: np.ndarray = np.empty(0)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _measure_start(self, layer: LayerTrajectory, t: float, f: np.ndarray) -> None:
        self._energy_at_start = self._Y.sum(self._Y.weights @ self._sigma.primitive(layer.argument(t, f)))
        self._keep(t, f)

    def _measure_step(self, layer: LayerTrajectory, end: float, step: Step) -> None:
        self._keep(end, step.last)

    def _measure_layer(self, layer: LayerTrajectory, before: np.ndarray, f: np.ndarray) -> None:
        self._keep(layer.end, f)

    def _keep(self, t: float, f: np.ndarray) -> None:
        self.times.append(t)
        self._norms.append(self._Y.sum(np.array([self._Y.weights @ np.abs(f), self._Y.weights @ f**2])))

    def norms(self, name: str = "L2") -> np.ndarray:
        """Norms of f in L1(Y) or L2(Y), shape (times, samples).

        Parameters
        ----------
        name
            "L1" or "L2".

        Raises
        ------
        ValueError
            If nothing was measured, or `name` is neither "L1" nor "L2".
        """
        same(self._Y.comm, name=name)
        choice("name", name, ("L1", "L2"))
        self._refuse_nothing()
        measured = np.array(self._norms)
        return measured[:, 0] if name == "L1" else np.sqrt(measured[:, 1])

    # -- the bounds of 3.4 --------------------------------------------------------------------------------------------

    def bounds(self) -> list[GrowthBound]:
        """The bounds of section 3.4 at all times that were measured. Collective over the ranks of the label domain.

        No array of nodes x nodes is made: sup |b| is ``kernel.norm(beta, "linf")``. Above some number of nodes that is an
        upper bound, so that the exponential bound is larger than necessary.

        Raises
        ------
        ValueError
            If nothing was measured.
        """
        return [self._bounded(), self._proposition(), self._gronwall()]

    def __str__(self) -> str:
        return "\n".join(map(str, self.bounds()))

    @property
    def _elapsed(self) -> np.ndarray:
        return np.array(self.times)[:, None]

    def _bounded(self) -> GrowthBound:
        norms, values, unmet = self.norms("L2"), None, [f"sup |sigma| is infinite for {self._sigma.name}"]
        if self._sigma.properties.bounded:
            values, unmet = norms[0] + supremum(self._sigma) * self._Y.measure**0.5 * self._elapsed, []
        return GrowthBound(
            "bounded", "L2", tuple(unmet), values, norms, sampled(self._sigma, "bounded", "non_decreasing", "lipschitz")
        )

    def _proposition(self) -> GrowthBound:
        norms, properties = self.norms("L2"), self._sigma.properties
        conditions = energy_conditions(self._net)
        unmet = [
            f"{what} fails: {conditions[what].reason}"
            for what in (AUTONOMOUS, NON_NEGATIVE, SIGN)
            if not conditions[what].holds
        ]
        if not properties.non_decreasing:
            unmet.append(f"{self._sigma.name} is not non-decreasing")
        if not np.isfinite(properties.lipschitz):
            unmet.append(f"sup |sigma'| is infinite for {self._sigma.name}")
        values = None
        if conditions[SIGN].holds and np.isfinite(properties.lipschitz):
            values = norms[0] + np.sqrt(2 * properties.lipschitz * np.maximum(self._energy_at_start, 0.0)) * self._elapsed
        supposed = sampled(self._sigma, "lipschitz", "sign_preserving", "non_decreasing")
        return GrowthBound("Proposition 3.5", "L2", tuple(unmet), values, norms, supposed)

    def _gronwall(self) -> GrowthBound:
        norms, L = self.norms("L1"), self._sigma.properties.lipschitz
        if not np.isfinite(L):
            return GrowthBound("Gronwall", "L1", (f"sup |sigma'| is infinite for {self._sigma.name}",), None, norms)
        of_a, of_b = self._integrated_norms()
        drift = abs(float(self._sigma(0.0))) * self._Y.measure
        with np.errstate(over="ignore"):
            growth = np.exp(L * self._Y.measure * of_b)[:, None]
        values = (norms[0] + L * of_a[:, None] + drift * self._elapsed) * growth
        return GrowthBound("Gronwall", "L1", (), values, norms, sampled(self._sigma, "lipschitz"))

    def _integrated_norms(self) -> tuple[np.ndarray, np.ndarray]:
        """int_0^t |a|_L1 and int_0^t sup |b| at the measured times; by trapezoids where a or b varies within a layer.

        There a and b are affine in t, so that both norms are convex and trapezoids give an upper bound.
        """
        of_a, of_b = np.zeros(len(self.times)), np.zeros(len(self.times))
        known: dict[tuple[LowRankKernel, bytes], float] = {}
        for part in self._net.layer_inputs():
            start, end, same = part.start, part.start + part.length, _SAME_TIME * part.length
            cuts = [start, *(t for t in self.times if start + same < t < end - same), end]
            for left, right in itertools.pairwise(cuts):
                later = np.array(self.times) >= right - same
                a, b = self._norms_between(part, left, right, known)
                of_a[later] += a
                of_b[later] += b
        return of_a, of_b

    def _norms_between(
        self, part: LayerInputs, left: float, right: float, known: dict[tuple[LowRankKernel, bytes], float]
    ) -> np.ndarray:
        """The two integrals between two times of a layer, shape (2,); `known` keeps values of sup |b|."""
        constant = part.bias.is_constant and part.beta.is_constant
        times = [(left + right) / 2] if constant else [left, right]
        total = np.zeros(2)
        for t in times:
            s = (t - part.start) / part.length
            beta = part.beta.coefficients(s)
            key = part.factors, beta.tobytes()
            if key not in known:
                known[key] = part.factors.norm(beta, "linf")
            of_a = float(self._Y.sum(self._Y.weights @ np.abs(part.bias.coefficients(s))))
            total += (right - left) / len(times) * np.array([of_a, known[key]])
        return total


def supremum(activation: Activation) -> float:
    """An upper bound of |sigma| for a bounded activation; no unit.

    A SymPy expression is bounded by interval arithmetic, a non-decreasing function by its limits, any other one by samples
    and its Lipschitz constant.

    Raises
    ------
    ValueError
        If the activation is not bounded.
    """
    properties = activation.properties
    if not properties.bounded:
        raise ValueError(f"activation: expected a bounded activation, got {activation.name}")
    if activation.expression is not None:
        return size(activation.expression)[0]
    if properties.non_decreasing:
        return float(np.abs(activation(np.array([-1e16, 1e16]))).max())
    s = np.arange(-_RANGE, _RANGE, _SPACING)
    return float(np.abs(activation(s)).max() + properties.lipschitz * _SPACING / 2)
