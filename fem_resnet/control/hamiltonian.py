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
from fem_resnet.arguments import choice, real_array
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.fixed import Fixed
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace, sample_weights
from fem_resnet.layers.inputs import LayerCoefficients
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.learning.objective import LearningProblem
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.run import Run

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
        if self.f.shape != self.r.shape or self.f.ndim != 2:
            raise ValueError(f"f, r: two arrays (nodes, samples) are wanted, {self.f.shape}, {self.r.shape} were given")

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
    """

    a: np.ndarray
    phi: np.ndarray
    psi: np.ndarray

    def argument(self, Y: LabelSpace, f: np.ndarray) -> np.ndarray:
        """u = a - B f, shape (nodes, samples). Collective."""
        return self.a[:, None] - self.phi @ Y.sum((Y.weights[:, None] * self.psi).T @ f)

    def transpose(self, Y: LabelSpace, v: np.ndarray) -> np.ndarray:
        """B^T v. Collective."""
        return self.psi @ Y.sum((Y.weights[:, None] * self.phi).T @ v)

    def towards(self, other: Controls, share: float | np.ndarray) -> Controls:
        """(1 - share) times these plus share times the others; a share a node, shape (nodes,), or one for all."""
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
        """Those of a network's layer, at a fraction of its time. Collective."""
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
        self.Y, self.activation, self.convention = Y, activation, _checked(convention)
        self._running, self._weights = running, weights
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

    def _own(self, pair: Pair) -> Pair:
        if pair.convention != self.convention:
            raise ValueError(
                f"pair: its co-state is one to {pair.convention}, this Hamiltonian's is one to {self.convention}; "
                f"say pair.to({self.convention!r})"
            )
        return pair

    def density(self, pair: Pair, controls: Controls) -> np.ndarray:
        """What is integrated over y, shape (nodes,)."""
        self._own(pair)
        h = np.sum(self.activation(controls.argument(self.Y, pair.f)) * pair.r, axis=1)
        if self._running is None:
            return h
        gram = self.Y.sum((self.Y.weights[:, None] * controls.psi).T @ controls.psi)
        rows = np.einsum("ni,ij,nj->n", controls.phi, gram, controls.phi)  # int b(y, z)^2 dz
        l = self._running.integrand(pair.f, controls.a)
        return h + l @ self._omega(pair.f) + self._sign * self._running.kernel / 2 * rows

    def __call__(self, pair: Pair, controls: Controls) -> float:
        """H."""
        return float(self.Y.sum(self.Y.weights @ self.density(pair, controls)))

    def in_r(self, pair: Pair, controls: Controls) -> np.ndarray:
        """H_r = sigma(u): f_t of (4.1a), shape (nodes, samples)."""
        return self.activation(controls.argument(self.Y, self._own(pair).f))

    def in_f(self, pair: Pair, controls: Controls) -> np.ndarray:
        """H_f = -B^T(sigma'(u) r) + L_f, or - L_f to maximise: -r_t of (4.2a), shape (nodes, samples)."""
        gradient = -controls.transpose(self.Y, self.slope_times_costate(pair, controls))
        if self._running is None:
            return gradient
        return gradient + self._omega(pair.f) * self._running.slopes(pair.f, controls.a)[0]

    def in_a(self, pair: Pair, controls: Controls) -> np.ndarray:
        """H_a: the sum of sigma'(u) r over the samples, +- L_a; shape (nodes,)."""
        gradient = np.sum(self.slope_times_costate(pair, controls), axis=1)
        if self._running is None:
            return gradient
        return gradient + self._running.slopes(pair.f, controls.a)[1] @ self._omega(pair.f)

    def in_b(self, pair: Pair, controls: Controls) -> tuple[np.ndarray, np.ndarray]:
        """H_b(y, z) = - sum_s sigma'(u_s(y)) r_s(y) f_s(z) +- kappa b(y, z), by its factors in y and z."""
        p, q = -self.slope_times_costate(pair, controls), pair.f
        if self._running is None or self._running.kernel == 0.0:
            return p, q
        return np.hstack([p, self._sign * self._running.kernel * controls.phi]), np.hstack([q, controls.psi])

    def slope_times_costate(self, pair: Pair, controls: Controls) -> np.ndarray:
        """v = sigma'(u) r, shape (nodes, samples)."""
        return self.activation.derivative(controls.argument(self.Y, self._own(pair).f)) * pair.r


# -- along a network's run -------------------------------------------------------------------------------------------


@supports(*HELD, *STEPPED)
def middle_pairs(run: Run, convention: str) -> list[Pair]:
    """f and r at the middle of each layer, of a run on a tape whose functional has been differentiated. Collective."""
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
    ends = _end_pairs(run, H.convention)
    return np.array(
        [[H(ends[l + e], Controls.of_layer(run.net, l, float(e))) for e in (0, 1)] for l in range(run.net.layers)]
    ).reshape(-1, 2)
