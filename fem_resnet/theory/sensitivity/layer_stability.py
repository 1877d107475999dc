"""What each layer does to perturbations and to gradients: the numbers of `report`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.sensitivity.conditioning import LinearisedFlow
from fem_resnet.time_stepping.evolution import TYPES, FieldStepper
from fem_resnet.time_stepping.tableau import Tableau

__all__ = ["BY_DEPTH", "MORE_STEPS", "LayerStability", "layer_stability", "scheme_of"]

#: A layer amplifies if a network of such layers would by more than this; so for damping.
BY_DEPTH = 10.0
#: Below this part of sup |sigma'|, sigma is flat there.
_FLAT = 1e-3
#: What the steps of a layer may be off, in parts of what the flow does to a mode, or of the mode if that is more.
_STEP_ERROR = 0.1
#: More steps a layer than these times the present ones are not looked for.
MORE_STEPS = 64


@dataclass(frozen=True)
class LayerStability:
    """One layer: the worst of all samples, in the label measure; no units but those of t.

    Attributes
    ----------
    layer : int
    start, end : float
        Its interval of time.
    grows, keeps : float
        Largest and smallest singular value of M(t_(l+1), t_l).
    bound : float
        `exp(int sup |sigma'| norm(b) dt)` over the layer, of a gradient flow with norm(b)^2, which `grows` cannot exceed but by
        errors of the steps.
    grown, kept : float
        Largest and smallest singular value of M(t_(l+1), 0).
    condition : float
        Condition number of M(t_(l+1), 0); infinite, and `kept` only a bound, where that is beyond double precision.
    exponents : tuple of float
        Largest and smallest finite-time Lyapunov exponent, `log(grown) / t_(l+1)` and `log(kept) / t_(l+1)`.
    gradient_grows, gradient_keeps : float
        Largest and smallest singular value of M(T, t_l).
    costate : float
        norm(r(t_l)) / norm(r(T)), of all samples together.
    bias_gradient : float
        norm(sigma'(u) r) / norm(r(T)) at t_l, (4.3); of a gradient flow with B r in place of r.
    slope : float
        Mean of |sigma'(u)| over Y at t_l, in parts of sup |sigma'| where that is finite.
    flat : float
        Part of Y where |sigma'(u)| is below a thousandth of that.
    frozen : float
        Largest real part of the eigenvalues of -sigma'(u) B, or -B^T sigma'(u) B, at t_l, in 1 / t.
    wanted_steps : int or None
        Steps a layer with which the scheme's factor for each of these eigenvalues is right to a tenth: the present
        number, or the first above it. None if 64 times as many are too few, or the steps are adapted, or of no
        Runge-Kutta method that is known.
    verdict : str
        "amplifies", "damps", "both" or "neutral".
    """

    layer: int
    start: float
    end: float
    grows: float
    keeps: float
    bound: float
    grown: float
    kept: float
    condition: float
    exponents: tuple[float, float]
    gradient_grows: float
    gradient_keeps: float
    costate: float
    bias_gradient: float
    slope: float
    flat: float
    frozen: float
    wanted_steps: int | None
    verdict: str


def layer_stability(flow: LinearisedFlow, terminal: np.ndarray) -> list[LayerStability]:
    """All numbers, layer by layer. Collective.

    Parameters
    ----------
    flow
        The linearised flow.
    terminal
        r(T) at the owned nodes, shape (nodes, samples), not zero.
    """
    net, Y = flow.net, flow.net.Y
    shape = (net.layers, terminal.shape[1])
    forward, depth, backward = (np.empty((*shape, 2)) for _ in range(3))
    condition, costate, gradient = (np.empty(shape) for _ in range(3))
    # Two sweeps over the layers rather than one that keeps a field a function of the basis and layer.
    for sample in range(shape[1]):
        so_far = None
        for l in range(net.layers):
            M = flow.propagator(l, l + 1, sample=sample)
            so_far = M if so_far is None else M @ so_far
            forward[l, sample], depth[l, sample] = (M.norm, M.smallest), (so_far.norm, so_far.smallest)
            condition[l, sample] = so_far.condition
        so_far, r = None, Y.batch(terminal[:, sample])
        for l in reversed(range(net.layers)):
            M = flow.propagator(l, l + 1, sample=sample)
            so_far = M if so_far is None else so_far @ M
            backward[l, sample] = so_far.norm, so_far.smallest
            r = M.transpose(r)
            costate[l, sample] = Y.norm(r) ** 2
            gradient[l, sample] = Y.sum(Y.weights @ flow.by_bias(l, Y.values(r))[:, sample] ** 2)
    size = np.sqrt(Y.sum(np.sum(Y.weights @ terminal**2)))
    scheme, lipschitz = scheme_of(net), net.activation.properties.lipschitz
    result = []
    for l in range(net.layers):
        start, end = (float(t) for t in net.times[l : l + 2])
        slope = np.abs(flow.slope(l)) / (lipschitz if np.isfinite(lipschitz) else 1.0)
        eigenvalues = np.concatenate([flow.frozen_eigenvalues(l, sample=s) for s in range(shape[1])])
        grown, kept = depth[l, :, 0].max(), depth[l, :, 1].min()
        grows, keeps = forward[l, :, 0].max(), forward[l, :, 1].min()
        with np.errstate(divide="ignore"):
            exponents = tuple(float(np.log(value) / end) for value in (grown, kept))
        result.append(
            LayerStability(
                l, start, end, float(grows), float(keeps), flow.bound(l, l + 1), float(grown), float(kept),
                float(condition[l].max()),
                exponents, float(backward[l, :, 0].max()), float(backward[l, :, 1].min()),
                float(np.sqrt(costate[l].sum()) / size), float(np.sqrt(gradient[l].sum()) / size),
                _mean(Y, slope), _mean(Y, slope <= _FLAT), float(eigenvalues.real.max()),
                _wanted_steps(scheme, eigenvalues * (end - start), net.steps), _verdict(grows, keeps, net.layers),
            )
        )  # fmt: skip
    return result


def _mean(Y: LabelSpace, values: np.ndarray) -> float:
    return float(Y.sum(np.sum(Y.weights @ values)) / (Y.measure * values.shape[1]))


def _verdict(grows: float, keeps: float, layers: int) -> str:
    amplifies, damps = grows**layers > BY_DEPTH, keeps**layers < 1 / BY_DEPTH
    return {(True, True): "both", (True, False): "amplifies", (False, True): "damps"}.get((amplifies, damps), "neutral")


def scheme_of(net: ResidualNetwork) -> Tableau | None:
    """The Runge-Kutta method that steps layers; None where its coefficients are unknown, or its steps adapted."""
    parameters = net.solver_parameters
    if parameters["ts_type"] not in TYPES or parameters["ts_adapt_type"] != "none":
        return None
    with FieldStepper(net.Y, 1, None, None, None, None, parameters) as stepper:
        return stepper.scheme


def _wanted_steps(scheme: Tableau | None, z: np.ndarray, steps: int) -> int | None:
    """The least number of steps, from the present one, with which all modes grow as by e^z, up to a tenth."""
    if scheme is None:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        flow = np.exp(z)
        for n in range(steps, MORE_STEPS * steps + 1):
            if (np.abs(scheme.factor(z / n) ** n - flow) <= _STEP_ERROR * np.maximum(1.0, np.abs(flow))).all():
                return n
    return None
