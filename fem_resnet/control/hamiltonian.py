"""The Hamiltonian of section 4.2, in the two conventions that the paper uses.

The conventions differ in the sign of the co-state r and in whether H is made small or large:

    "minimise"    section 4.1 and (4.11): r(T)  = f(T) - ftilde     H = int sigma(a - B f) r + int L     is made small
    "maximise"    (4.8), Algorithm 2:     r*(T) = ftilde - f(T)     H = int sigma(a - B f) r* - int L    is made large

For r = D_v F the least H over (a, b) is the one of Remark 4.4, and (4.11) reads F_t + min H = 0.

A `Pair` of f and r knows the convention of its r. A `Hamiltonian` has one convention and refuses pairs of the other. H is
summed over the samples, and r contains their weights.

A layer has one control. Here f and r in a layer are the means of their values at both its ends, which is right to second order
in the length of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.arguments import choice, instance, real_array
from fem_resnet.control.controls import Controls
from fem_resnet.features import HELD, REGULARISED, STEPPED, supports
from fem_resnet.fixed import Fixed
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.network.run import Run
from fem_resnet.ranks import same, together

__all__ = ["Hamiltonian", "Pair", "hamiltonian_along", "middle_pairs"]

_T = TypeVar("_T")
_CONVENTIONS = ("minimise", "maximise")


def _checked(convention: str) -> str:
    return choice("convention", convention, _CONVENTIONS)


@dataclass(frozen=True)
class Pair:
    """A state f and a co-state r at one time, at the nodes of this rank.

    Attributes
    ----------
    f, r : numpy.ndarray
        Shape (nodes, samples) each.
    convention : str
        "minimise" or "maximise": the sign of r.

    Raises
    ------
    TypeError, ValueError
        If f and r are not finite real numbers of one such shape, or the convention has another name; on the rank with the
        fault only.
    """

    f: np.ndarray
    r: np.ndarray
    convention: str

    def __post_init__(self):
        _checked(self.convention)
        for name in ("f", "r"):
            object.__setattr__(self, name, real_array(name, getattr(self, name)))
        if self.f.ndim != 2 or self.f.shape[1] == 0:
            raise ValueError(f"f: expected shape (nodes, samples) with at least one sample, got {self.f.shape}")
        if self.r.shape != self.f.shape:
            raise ValueError(f"r: expected the shape of f, {self.f.shape}, got {self.r.shape}")

    def to(self, convention: str) -> Pair:
        """The same pair in this convention: r* = -r."""
        return self if _checked(convention) == self.convention else Pair(self.f, -self.r, convention)


class Hamiltonian(Fixed):
    """H(f, r, a, b) of (4.8) or of Remark 4.4, summed over the samples, and its derivatives.

    All methods are collective over the communicator of the label domain. Their arrays hold the values at this rank's nodes.

    Parameters
    ----------
    Y
        The label domain.
    activation
        sigma.
    convention
        "minimise" (section 4.1, Remark 4.4) or "maximise" (section 4.2).
    running
        The running cost L, or None.
    weights
        Weights of the samples in L, shape (samples,), >= 0. Only their proportions matter. If left out, all are equal.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind, or differs between ranks; on all ranks alike.

    Examples
    --------
    >>> H = Hamiltonian(net.Y, net.activation, "maximise")  # doctest: +SKIP
    >>> H(pair.to("maximise"), Controls.of_layer(net, 0))  # doctest: +SKIP
    """

    def __init__(
        self,
        Y: LabelSpace,
        activation: Activation,
        convention: str,
        running: RunningCost | None = None,
        weights: Sequence[float] | None = None,
    ):
        check_label_space(Y)
        same(Y.comm, activation=activation, convention=convention, running=running, weights=weights)
        instance("activation", activation, Activation, "get_activation(name) makes one")
        if instance("running", running, (RunningCost, type(None))) is not None:
            running.refuse_pairs("Hamiltonian")
        self.Y, self.activation, self.convention = Y, activation, _checked(convention)
        self._running = running
        self._weights = None if weights is None else real_array("weights", weights, ("samples",), least=0).tolist()
        self._sign = 1.0 if convention == "minimise" else -1.0

    @classmethod
    @supports(
        "channels", *HELD, *STEPPED, "head", *REGULARISED, "running", "running_of_controls", "checkpoints", "learned_initial",
        "learned_both", "many_samples", "weights",
    )  # fmt: skip
    def of(cls, problem: LearningProblem, convention: str) -> Hamiltonian:
        """The Hamiltonian of a learning problem, with its running cost and the weights of its samples.

        Parameters
        ----------
        problem
            The learning problem. Its regulariser has no part in H.
        convention
            "minimise" or "maximise".
        """
        net = problem.net
        return cls(net.Y, net.activation, convention, problem.running, problem.batch.weights)

    def _omega(self, f: np.ndarray) -> np.ndarray:
        """The weights of the samples in L, with the sign that L has in H."""
        return self._sign * sample_weights(self._weights, f.shape[1])

    def _argument(self, pair: Pair, controls: Controls) -> np.ndarray:
        """The preactivation u = a - B f, after a check of the pair."""
        instance("pair", pair, Pair)
        instance("controls", controls, Controls)
        if pair.convention != self.convention:
            raise ValueError(
                f"pair: expected one of this Hamiltonian's convention, {self.convention!r}, got {pair.convention!r}; "
                f"say pair.to({self.convention!r})"
            )
        return controls.argument(self.Y, pair.f)

    def density(self, pair: Pair, controls: Controls) -> np.ndarray:
        """The function of y whose integral is H, shape (nodes,).

        Parameters
        ----------
        pair
            f and r, in the convention of this Hamiltonian.
        controls
            (a, b).
        """
        h = np.sum(self.in_r(pair, controls) * pair.r, axis=1)
        if self._running is None:
            return h
        gram = self.Y.sum((self.Y.weights[:, None] * controls.psi).T @ controls.psi)
        rows = np.einsum("ni,ij,nj->n", controls.phi, gram, controls.phi)  # int b(y, z)^2 dz
        l = self._of_running(self._running.integrand, pair, controls)
        return h + l @ self._omega(pair.f) + self._sign * self._running.kernel / 2 * rows

    def __call__(self, pair: Pair, controls: Controls) -> float:
        """H."""
        return float(self.Y.sum(self.Y.weights @ self.density(pair, controls)))

    def in_r(self, pair: Pair, controls: Controls) -> np.ndarray:
        """The derivative H_r = sigma(u), which is f_t of (4.1a), shape (nodes, samples).

        Parameters
        ----------
        pair, controls
            As for `density`.
        """
        return self.activation(self._argument(pair, controls))

    def in_f(self, pair: Pair, controls: Controls) -> np.ndarray:
        """The derivative H_f = -B^T(sigma'(u) r) +- L_f, which is -r_t of (4.2a), shape (nodes, samples).

        The sign is + for "minimise" and - for "maximise".

        Parameters
        ----------
        pair, controls
            As for `density`.
        """
        v = self.slope_times_costate(pair, controls)
        gradient = -controls.transpose(self.Y, v)
        if self._running is None:
            return gradient
        return gradient + self._omega(pair.f) * self._of_running(self._running.slopes, pair, controls)[0]

    def in_a(self, pair: Pair, controls: Controls) -> np.ndarray:
        """The derivative H_a = sum_s sigma'(u_s) r_s +- L_a, shape (nodes,), with the sign of `in_f`.

        Parameters
        ----------
        pair, controls
            As for `density`.
        """
        gradient = np.sum(self.slope_times_costate(pair, controls), axis=1)
        if self._running is None:
            return gradient
        return gradient + self._of_running(self._running.slopes, pair, controls)[1] @ self._omega(pair.f)

    def in_b(self, pair: Pair, controls: Controls) -> tuple[np.ndarray, np.ndarray]:
        """The derivative H_b(y, z) = - sum_s sigma'(u_s(y)) r_s(y) f_s(z) +- kappa b(y, z), with the sign of `in_f`.

        Parameters
        ----------
        pair, controls
            As for `density`.

        Returns
        -------
        p, q
            Its factors in y and in z, H_b(y, z) = sum_k p_k(y) q_k(z), shape (nodes, rank) each.
        """
        p, q = -self.slope_times_costate(pair, controls), pair.f
        if self._running is None or self._running.kernel == 0.0:
            return p, q
        return np.hstack([p, self._sign * self._running.kernel * controls.phi]), np.hstack([q, controls.psi])

    def _of_running(self, method: Callable[[np.ndarray, np.ndarray], _T], pair: Pair, controls: Controls) -> _T:
        """A method of the running cost at f and a. A user's density may fail on one rank: then all raise."""
        return together(self.Y.comm, lambda: method(pair.f, controls.a))

    def slope_times_costate(self, pair: Pair, controls: Controls) -> np.ndarray:
        """The product sigma'(u) r, shape (nodes, samples).

        Parameters
        ----------
        pair, controls
            As for `density`.
        """
        return self.activation.derivative(self._argument(pair, controls)) * pair.r


# -- along a network's run -------------------------------------------------------------------------------------------


@supports("channels", *HELD, *STEPPED)
def middle_pairs(run: Run, convention: str) -> list[Pair]:
    """State and co-state in the middle of each layer, one pair for each layer. Collective.

    Parameters
    ----------
    run
        A run on a tape, after the derivative of the tape's functional has been computed.
    convention
        "minimise" or "maximise", of the pairs.
    """
    _checked(convention)
    ends = _end_pairs(run, convention)
    return [Pair((p.f + q.f) / 2, (p.r + q.r) / 2, convention) for p, q in zip(ends, ends[1:])]


def _end_pairs(run: Run, convention: str) -> list[Pair]:
    values = run.net.Y.values
    # `states` goes through each layer once; `state(l)` would go through all layers before l each time.
    return [
        Pair(np.array(values(f)), np.array(values(run.costate(l))), "minimise").to(convention)
        for l, f in enumerate(run.states())
    ]


@supports("channels", *HELD, *STEPPED)
def hamiltonian_along(run: Run, H: Hamiltonian) -> np.ndarray:
    """H along a run, at both ends of each layer with the controls of that layer: shape (L, 2). Collective.

    While the controls do not change in time H is constant, up to the order of the scheme, whether they are optimal or not.
    Along an optimal pair max H is constant.

    Parameters
    ----------
    run
        A run on a tape, after the derivative of the tape's functional has been computed.
    H
        A Hamiltonian of either convention.

    Raises
    ------
    TypeError
        If H is no Hamiltonian.
    """
    instance("H", H, Hamiltonian)
    ends = _end_pairs(run, H.convention)
    return np.array(
        [[H(ends[l + e], Controls.of_layer(run.net, l, float(e))) for e in (0, 1)] for l in range(run.net.layers)]
    ).reshape(-1, 2)
