"""The Hamiltonian of section 4.2, in the two conventions that the paper uses.

The conventions differ in the sign of the co-state r and in whether H is made small or large:

    "minimise"    section 4.1 and (4.11): r(T)  = f(T) - ftilde     H = int sigma(a - B f) r + int L     is made small
    "maximise"    (4.8), Algorithm 2:     r*(T) = ftilde - f(T)     H = int sigma(a - B f) r* - int L    is made large

For r = D_v F the least H over (a, b) is the one of Remark 4.4, and (4.11) reads F_t + min H = 0.

Tikhonov's terms (2.11), (4.6) in a and b are integrals over t, so they are a running cost too and a part of L here:

    int L = sum_s omega_s int l(f_s, a) dy + lambda_a/2 int |a|^2 dy + (kappa + lambda_b)/2 norm(b)^2.

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
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.fixed import Fixed
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.regulariser import tikhonov_weight
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
    tikhonov
        lambda_a and lambda_b >= 0, which add lambda_a/2 |a|^2 + lambda_b/2 norm(b)^2 to L, shape (2,).

    Attributes
    ----------
    running : RunningCost or None
        The running cost, without Tikhonov's terms.
    tikhonov : tuple of float
        As above.

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
        tikhonov: Sequence[float] = (0.0, 0.0),
    ):
        check_label_space(Y)
        same(Y.comm, activation=activation, convention=convention, running=running, weights=weights, tikhonov=tikhonov)
        instance("activation", activation, Activation, "get_activation(name) makes one")
        if instance("running", running, (RunningCost, type(None))) is not None:
            running.refuse_pairs("Hamiltonian")
        self.Y, self.activation, self.convention = Y, activation, _checked(convention)
        self.running = running
        lambda_a, lambda_b = real_array("tikhonov", tikhonov, (2,), least=0).tolist()
        self.tikhonov = lambda_a, lambda_b
        self._weights = None if weights is None else real_array("weights", weights, ("samples",), least=0).tolist()
        self._sign = 1.0 if convention == "minimise" else -1.0

    @classmethod
    @supports(
        "channels", *HELD, *STEPPED, "head", "regulariser", "running", "running_of_controls", "checkpoints", "learned_initial",
        "learned_both", "many_samples", "weights",
    )  # fmt: skip
    def of(cls, problem: LearningProblem, convention: str) -> Hamiltonian:
        """The Hamiltonian of a learning problem, with its running cost, Tikhonov's terms and the weights of its samples.

        Parameters
        ----------
        problem
            The learning problem. Where its regulariser acts on bias and kernel it is Tikhonov's. The rest has no part in H.
        convention
            "minimise" or "maximise".

        Raises
        ------
        ValueError
            If another regulariser acts on bias or kernel, or one acts on them and the layer times are learned, as the lengths
            of the layers in it are those at first.
        """
        net = problem.net
        # What is not learned the regulariser does not see.
        given = None if problem.learn == "initial" else problem.regulariser
        weights = [tikhonov_weight(given, parameter) for parameter in (net.bias, net.kernel)]
        if None in weights:
            raise ValueError(
                "regulariser: expected tikhonov(..) of bias and kernel, whose density in (a, b) is a part of the Hamiltonian, "
                "got another term too; leave it out: problem.replace(regulariser=..)"
            )
        if any(weights) and net.layer_times is not None:
            raise ValueError(
                "regulariser: expected none of bias and kernel where layer times are learned, got one; make the network of "
                "Layers without learn_times"
            )
        return cls(net.Y, net.activation, convention, problem.running, problem.batch.weights, weights)

    @property
    def kernel_weight(self) -> float:
        """kappa + lambda_b, the weight of norm(b)^2 / 2 in L."""
        return self.tikhonov[1] + (0.0 if self.running is None else self.running.kernel)

    @property
    def charges_controls(self) -> bool:
        """Whether L depends on (a, b), so that (4.10) does not give the controls that maximise H."""
        return any(self.tikhonov) or not (self.running is None or self.running.of_state_alone)

    def _omega(self, f: np.ndarray) -> np.ndarray:
        """The weights of the samples in L."""
        return sample_weights(self._weights, f.shape[1])

    def _argument(self, pair: Pair, controls: Controls) -> np.ndarray:
        """The preactivation u = a - B f, after a check of the pair."""
        self._check(pair, controls)
        return controls.argument(self.Y, pair.f)

    def _check(self, pair: Pair, controls: Controls) -> None:
        instance("pair", pair, Pair)
        instance("controls", controls, Controls)
        if pair.convention != self.convention:
            raise ValueError(
                f"pair: expected one of this Hamiltonian's convention, {self.convention!r}, got {pair.convention!r}; "
                f"say pair.to({self.convention!r})"
            )

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
        if self.running is None and not any(self.tikhonov):
            return h
        return h + self._sign * self.cost(pair, controls)

    def cost(self, pair: Pair, controls: Controls) -> np.ndarray:
        """The function of y whose integral is that of L over the samples, Tikhonov's terms included: shape (nodes,).

        Parameters
        ----------
        pair, controls
            As for `density`.
        """
        self._check(pair, controls)
        cost = self.tikhonov[0] / 2 * controls.a**2
        if self.kernel_weight > 0 and controls.phi.shape[1] > 0:
            gram = self.Y.sum((self.Y.weights[:, None] * controls.psi).T @ controls.psi)
            rows = np.sum(controls.phi @ gram * controls.phi, axis=1)  # int b(y, z)^2 dz
            cost = cost + self.kernel_weight / 2 * rows
        if self.running is not None:
            cost = cost + self._of_running(self.running.integrand, pair, controls) @ self._omega(pair.f)
        return cost

    def cost_in_a(self, pair: Pair, controls: Controls) -> np.ndarray:
        """The derivative of `cost` in a, shape (nodes,).

        Parameters
        ----------
        pair, controls
            As for `density`.
        """
        self._check(pair, controls)
        slope = self.tikhonov[0] * controls.a
        if self.running is None:
            return slope
        return slope + self._of_running(self.running.slopes, pair, controls)[1] @ self._omega(pair.f)

    def cost_in_f(self, pair: Pair, controls: Controls) -> tuple[np.ndarray, np.ndarray]:
        """The derivative of the integral of `cost` in f, and the derivative of that in a, shape (nodes, samples) each.

        Parameters
        ----------
        pair, controls
            As for `density`.

        Raises
        ------
        NotImplementedError
            If L is a user's density of (f, a) without second derivatives.
        """
        self._check(pair, controls)
        if self.running is None:
            return np.zeros(pair.f.shape), np.zeros(pair.f.shape)
        omega, l_f = self._omega(pair.f), self._of_running(self.running.slopes, pair, controls)[0]
        mixed = self.running.in_bias is None  # else l is a sum of a function of f and one of a
        l_fa = self._of_running(self.running.bends, pair, controls)[1] if mixed else np.zeros(pair.f.shape)
        return omega * l_f, omega * l_fa

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
        if self.running is None:
            return gradient
        l_f = self._of_running(self.running.slopes, pair, controls)[0]
        return gradient + self._sign * self._omega(pair.f) * l_f

    def in_a(self, pair: Pair, controls: Controls) -> np.ndarray:
        """The derivative H_a = sum_s sigma'(u_s) r_s +- L_a, shape (nodes,), with the sign of `in_f`.

        Parameters
        ----------
        pair, controls
            As for `density`.
        """
        gradient = np.sum(self.slope_times_costate(pair, controls), axis=1)
        return gradient + self._sign * self.cost_in_a(pair, controls)

    def in_b(self, pair: Pair, controls: Controls) -> tuple[np.ndarray, np.ndarray]:
        """The derivative H_b(y, z) = - sum_s sigma'(u_s(y)) r_s(y) f_s(z) +- (kappa + lambda_b) b(y, z).

        It has the sign of `in_f`.

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
        if self.kernel_weight == 0:
            return p, q
        return np.hstack([p, self._sign * self.kernel_weight * controls.phi]), np.hstack([q, controls.psi])

    def _of_running(self, method: Callable[[np.ndarray, np.ndarray], _T], pair: Pair, controls: Controls) -> _T:
        """A method of the running cost at f and a. A user's density may fail on one rank: then all raise."""
        assert self.running is not None
        return together(None if self.running.is_formula else self.Y.comm, lambda: method(pair.f, controls.a))

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
