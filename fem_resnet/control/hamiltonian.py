"""The Hamiltonian of section 4.2, in both conventions, and controls at one time.

The conventions differ in the sign of the co-state and in what is asked of H:

    "minimise"    section 4.1 and (4.11): r(T) =  f(T) - ftilde     H = int sigma(a - B f) r + int L     smallest
    "maximise"    (4.8), Algorithm 2:     r*(T) = ftilde - f(T)     H = int sigma(a - B f) r* - int L    largest

The least H over (a, b) for r = D_v F is that of Remark 4.4: (4.11) is F_t + min H = 0.

A `Pair` says which one its co-state has, and a `Hamiltonian` takes only those of its own. H sums over the samples, whose
weights are in r.

A layer has one control. f and r are taken at the layer's middle, as means of the values at both its ends, which is right to
second order in the layer's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.arguments import choice, instance, integer, number, real_array
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.fixed import Fixed
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.layers.inputs import LayerCoefficients
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.learning.objective import LearningProblem
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.run import Run
from fem_resnet.ranks import same, together

__all__ = ["Controls", "Hamiltonian", "Pair", "hamiltonian_along", "middle_pairs", "orthonormal_factor"]

_CONVENTIONS = ("minimise", "maximise")


def _checked(convention: str) -> str:
    return choice("convention", convention, _CONVENTIONS)


@dataclass(frozen=True)
class Pair:
    """f and r at one time, shape (nodes, samples), and the convention that r has."""

    f: np.ndarray
    r: np.ndarray
    convention: str

    def __post_init__(self):
        _checked(self.convention)
        for name in ("f", "r"):
            object.__setattr__(self, name, real_array(name, getattr(self, name)))
        if self.f.ndim != 2 or self.f.shape[1] == 0:
            raise ValueError(f"f: expected shape (nodes, samples), at least one sample, got {self.f.shape}")
        if self.r.shape != self.f.shape:
            raise ValueError(f"r: expected the shape of f, {self.f.shape}, got {self.r.shape}")

    def to(self, convention: str) -> Pair:
        """The same in this convention: r* = -r."""
        return self if _checked(convention) == self.convention else Pair(self.f, -self.r, convention)


@dataclass(frozen=True)
class Controls:
    """a and b at one time, b by its factors: b(y, z) = sum_k phi_k(y) psi_k(z), of any rank.

    Attributes
    ----------
    a : numpy.ndarray
        Shape (nodes,).
    phi, psi : numpy.ndarray
        Shape (nodes, rank).

    Raises
    ------
    TypeError, ValueError
        If they are not real and finite, or their shapes do not fit each other; on the rank where it is so.
    """

    a: np.ndarray
    phi: np.ndarray
    psi: np.ndarray

    def __post_init__(self):
        for name in ("a", "phi", "psi"):
            object.__setattr__(self, name, real_array(name, getattr(self, name)))
        if self.phi.ndim != 2:
            raise ValueError(f"phi: expected shape (nodes, rank), got {self.phi.shape}")
        for name, shape in (("a", self.phi.shape[:1]), ("psi", self.phi.shape)):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, as of phi, got {getattr(self, name).shape}")

    def argument(self, Y: LabelSpace, f: np.ndarray) -> np.ndarray:
        """U = a - B f, shape (nodes, samples). Collective."""
        f = self._field(Y, "f", f)
        return self.a[:, None] - self.phi @ Y.sum((Y.weights[:, None] * self.psi).T @ f)

    def transpose(self, Y: LabelSpace, v: np.ndarray) -> np.ndarray:
        """B^T v. Collective."""
        v = self._field(Y, "v", v)
        return self.psi @ Y.sum((Y.weights[:, None] * self.phi).T @ v)

    def _field(self, Y: LabelSpace, name: str, values: np.ndarray) -> np.ndarray:
        check_label_space(Y)
        # Not looked at on all ranks together: it is asked for many times in a search over controls.
        return real_array(name, values, (len(self.a), "samples"), finite=False)

    def towards(self, other: Controls, share: float | np.ndarray) -> Controls:
        """(1 - share) times these plus share times the others; a share a node, shape (nodes,), or one for all."""
        instance("other", other, Controls)
        share = real_array("share", share)
        if share.shape not in ((), self.a.shape):
            raise ValueError(f"share: expected a number, or shape (nodes,) = {self.a.shape}, got shape {share.shape}")
        share = np.broadcast_to(share, self.a.shape)
        mine, theirs = 1 - share, share
        return Controls(
            mine * self.a + theirs * other.a,
            np.hstack([mine[:, None] * self.phi, theirs[:, None] * other.phi]),
            np.hstack([self.psi, other.psi]),
        )

    def in_bases(self, Y: LabelSpace) -> tuple[Basis, Basis, np.ndarray]:
        """Orthonormal phi and psi of least rank, and beta: what a network's layer takes. Collective.

        Parts of b below 1e-13 of its size are round-off and left out; b = 0 is one constant times 0.
        """
        check_label_space(Y)
        phi, R = orthonormal_factor(Y, self.phi)
        psi, S = orthonormal_factor(Y, self.psi)
        U, sizes, V = np.linalg.svd(R @ S.T)
        rank = int(np.count_nonzero(sizes > 1e-13 * max(sizes.max(initial=0.0), 1e-300)))
        if rank == 0:
            constant = Basis(Y, np.full((Y.nodes, 1), Y.measure**-0.5), "given")
            return constant, constant, np.zeros((1, 1))
        return (
            Basis(Y, phi @ U[:, :rank], "given"), Basis(Y, psi @ V[:rank].T, "given"), np.diag(sizes[:rank])
        )  # fmt: skip

    @classmethod
    @supports("gradient_flow", *HELD, *STEPPED)
    def of_layer(cls, net: ResidualNetwork, layer: int, fraction: float = 0.5) -> Controls:
        """Those of a network's layer, at a fraction of its time. Collective.

        Parameters
        ----------
        net
            The network.
        layer
            From 0 to L - 1.
        fraction
            From 0 to 1.
        """
        layer, fraction = integer("layer", layer, least=0, most=net.layers - 1), number("fraction", fraction, least=0, most=1)
        coefficients = LayerCoefficients(net.bias, net.kernel, net.times, range(layer, layer + 1))
        (inputs,) = coefficients.on_layers([s.read(p) for s, p in zip(coefficients.slots, coefficients.functions)])
        factors = net.learned_factors() if net.factors else inputs.factors
        return cls(
            inputs.bias.coefficients(fraction), factors.phi.values @ inputs.beta.coefficients(fraction), factors.psi.values
        )


def orthonormal_factor(Y: LabelSpace, P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q, R with P = Q R and Q^T M Q = 1: a QR on each rank, then one of all their R. Collective."""
    root = np.sqrt(Y.weights)[:, None]
    q, r = np.linalg.qr(root * P)
    stacked = Y.comm.allgather(r)
    first = sum(len(part) for part in stacked[: Y.comm.rank])
    Q, R = np.linalg.qr(np.vstack(stacked))
    return (q @ Q[first : first + len(r)]) / root, R


class Hamiltonian(Fixed):
    """H(f, r, a, b) of (4.8), or of Remark 4.4, summed over the samples, with its derivatives.

    Parameters
    ----------
    Y
        The label domain; everything is collective over its communicator.
    activation
        sigma.
    convention
        "minimise", of section 4.1 and Remark 4.4, or "maximise", of section 4.2.
    running
        L, if there is a running cost.
    weights
        Weights of the samples in L, of which only the proportions matter; equal ones if left out.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind; on all ranks alike.

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
        instance("running", running, (RunningCost, type(None)))
        self.Y, self.activation, self.convention = Y, activation, _checked(convention)
        self._running = running
        self._weights = None if weights is None else real_array("weights", weights, ("samples",), least=0)
        self._sign = 1.0 if convention == "minimise" else -1.0

    @classmethod
    @supports(
        *HELD, *STEPPED, "head", "regulariser", "running", "running_of_controls", "checkpoints", "learned_initial",
        "learned_both", "many_samples", "weights",
    )  # fmt: skip
    def of(cls, problem: LearningProblem, convention: str) -> Hamiltonian:
        """That of a learning problem."""
        net = problem.net
        return cls(net.Y, net.activation, convention, problem.running, problem.batch.weights)

    def _omega(self, f: np.ndarray) -> np.ndarray:
        """Weights of the samples in L, with its sign in H."""
        return self._sign * sample_weights(self._weights, f.shape[1])

    def _argument(self, pair: Pair, controls: Controls) -> np.ndarray:
        """U = a - B f, of a pair that is one of this Hamiltonian's."""
        instance("pair", pair, Pair)
        instance("controls", controls, Controls)
        if pair.convention != self.convention:
            raise ValueError(
                f"pair: its co-state is one to {pair.convention}, this Hamiltonian's is one to {self.convention}; "
                f"say pair.to({self.convention!r})"
            )
        return controls.argument(self.Y, pair.f)

    def density(self, pair: Pair, controls: Controls) -> np.ndarray:
        """What is integrated over y, shape (nodes,)."""
        h = np.sum(self.in_r(pair, controls) * pair.r, axis=1)
        if self._running is None:
            return h
        gram = self.Y.sum((self.Y.weights[:, None] * controls.psi).T @ controls.psi)
        rows = np.einsum("ni,ij,nj->n", controls.phi, gram, controls.phi)  # int b(y, z)^2 dz
        l = self._of_running("integrand", pair, controls)
        return h + l @ self._omega(pair.f) + self._sign * self._running.kernel / 2 * rows

    def __call__(self, pair: Pair, controls: Controls) -> float:
        """H."""
        return float(self.Y.sum(self.Y.weights @ self.density(pair, controls)))

    def in_r(self, pair: Pair, controls: Controls) -> np.ndarray:
        """H_r = sigma(u): f_t of (4.1a), shape (nodes, samples)."""
        return self.activation(self._argument(pair, controls))

    def in_f(self, pair: Pair, controls: Controls) -> np.ndarray:
        """H_f = -B^T(sigma'(u) r) + L_f, or - L_f to maximise: -r_t of (4.2a), shape (nodes, samples)."""
        v = self.slope_times_costate(pair, controls)
        gradient = -controls.transpose(self.Y, v)
        if self._running is None:
            return gradient
        return gradient + self._omega(pair.f) * self._of_running("slopes", pair, controls)[0]

    def in_a(self, pair: Pair, controls: Controls) -> np.ndarray:
        """H_a: the sum of sigma'(u) r over the samples, +- L_a; shape (nodes,)."""
        gradient = np.sum(self.slope_times_costate(pair, controls), axis=1)
        if self._running is None:
            return gradient
        return gradient + self._of_running("slopes", pair, controls)[1] @ self._omega(pair.f)

    def in_b(self, pair: Pair, controls: Controls) -> tuple[np.ndarray, np.ndarray]:
        """H_b(y, z) = - sum_s sigma'(u_s(y)) r_s(y) f_s(z) +- kappa b(y, z), by its factors in y and z."""
        p, q = -self.slope_times_costate(pair, controls), pair.f
        if self._running is None or self._running.kernel == 0.0:
            return p, q
        return np.hstack([p, self._sign * self._running.kernel * controls.phi]), np.hstack([q, controls.psi])

    def _of_running(self, name: str, pair: Pair, controls: Controls) -> np.ndarray | list[np.ndarray]:
        """What the density, which may be a user's, says on all ranks."""
        return together(self.Y.comm, lambda: getattr(self._running, name)(pair.f, controls.a))

    def slope_times_costate(self, pair: Pair, controls: Controls) -> np.ndarray:
        """V = sigma'(u) r, shape (nodes, samples)."""
        return self.activation.derivative(self._argument(pair, controls)) * pair.r


# -- along a network's run -------------------------------------------------------------------------------------------


@supports(*HELD, *STEPPED)
def middle_pairs(run: Run, convention: str) -> list[Pair]:
    """F and r at the middle of each layer, of a run on a tape whose functional has been differentiated. Collective."""
    _checked(convention)
    ends = _end_pairs(run, convention)
    return [Pair((p.f + q.f) / 2, (p.r + q.r) / 2, convention) for p, q in zip(ends, ends[1:])]


def _end_pairs(run: Run, convention: str) -> list[Pair]:
    values = run.net.Y.values
    # `states` goes through each layer once; `state(l)` would go through all before it.
    return [
        Pair(np.array(values(f)), np.array(values(run.costate(l))), "minimise").to(convention)
        for l, f in enumerate(run.states())
    ]


@supports(*HELD, *STEPPED)
def hamiltonian_along(run: Run, H: Hamiltonian) -> np.ndarray:
    """H at both ends of each layer, with the controls there: shape (L, 2). Collective.

    For controls constant in time it is constant, optimal or not, up to the order of the scheme; along an optimal pair max H
    is. The run is on a tape, and its functional has been differentiated.
    """
    instance("H", H, Hamiltonian)
    ends = _end_pairs(run, H.convention)
    return np.array(
        [[H(ends[l + e], Controls.of_layer(run.net, l, float(e))) for e in (0, 1)] for l in range(run.net.layers)]
    ).reshape(-1, 2)
