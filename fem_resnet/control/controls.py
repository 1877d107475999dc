"""Controls (a, b) at one time, where they are chosen from a set and need not lie in the bases of a network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fem_resnet.arguments import instance, integer, number, real_array
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.label_domain.orthonormal import orthonormal_factors
from fem_resnet.layers.inputs import LayerCoefficients
from fem_resnet.network.network import ResidualNetwork

__all__ = ["Controls"]


@dataclass(frozen=True)
class Controls:
    """Bias a and kernel b at one time. The kernel has any rank: b(y, z) = sum_k phi_k(y) psi_k(z).

    Each rank has the values at its own nodes.

    Attributes
    ----------
    a : numpy.ndarray
        The bias, shape (nodes,).
    phi, psi : numpy.ndarray
        The factors of b at the nodes, shape (nodes, rank) each.

    Raises
    ------
    TypeError, ValueError
        If the values are not finite real numbers, or their shapes do not fit each other. The error is raised on the rank with
        the fault only.
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
                raise ValueError(f"{name}: expected shape {shape}, which fits phi, got {getattr(self, name).shape}")

    def argument(self, Y: LabelSpace, f: np.ndarray) -> np.ndarray:
        """The preactivation u = a - B f, shape (nodes, samples). Collective over Y's communicator.

        Parameters
        ----------
        Y
            The label domain.
        f
            States at this rank's nodes, shape (nodes, samples).

        Raises
        ------
        TypeError, ValueError
            If Y is no label space, or f does not have this shape; on the rank with the fault only.
        """
        f = self._field(Y, "f", f)
        return self.a[:, None] - self.phi @ Y.sum((Y.weights[:, None] * self.psi).T @ f)

    def transpose(self, Y: LabelSpace, v: np.ndarray) -> np.ndarray:
        """B^T v, shape (nodes, samples). Collective over Y's communicator.

        Parameters
        ----------
        Y
            The label domain.
        v
            Values at this rank's nodes, shape (nodes, samples).

        Raises
        ------
        TypeError, ValueError
            As for `argument`.
        """
        v = self._field(Y, "v", v)
        return self.psi @ Y.sum((Y.weights[:, None] * self.phi).T @ v)

    def _field(self, Y: LabelSpace, name: str, values: np.ndarray) -> np.ndarray:
        check_label_space(Y)
        # The ranks do not agree on a fault here: a search over controls calls this many times.
        return real_array(name, values, (len(self.a), "samples"), finite=False)

    def towards(self, other: Controls, share: float | np.ndarray) -> Controls:
        """The mixture (1 - share) * self + share * other, whose rank is the sum of both ranks.

        Parameters
        ----------
        other
            Controls at the same nodes.
        share
            One number, or one for each node, shape (nodes,).

        Raises
        ------
        TypeError, ValueError
            If `other` is not of this kind, or `share` has another shape; on the rank with the fault only.
        """
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
        """The kernel as a layer of a network takes it: bases of least rank and coefficients. Collective.

        Parts of b below 1e-13 of its size are round-off and are left out. For b = 0 the bases are one constant, with the
        coefficient 0.

        Returns
        -------
        phi, psi
            Orthonormal bases on Y.
        beta
            The coefficients, shape (rank, rank).
        """
        check_label_space(Y)
        phi, R = orthonormal_factors(Y, self.phi)
        psi, S = orthonormal_factors(Y, self.psi)
        U, sizes, V = np.linalg.svd(R @ S.T)
        rank = int(np.count_nonzero(sizes > 1e-13 * max(sizes.max(initial=0.0), 1e-300)))
        if rank == 0:
            constant = Basis(Y, np.full((Y.nodes, 1), Y.measure**-0.5), "given")
            return constant, constant, np.zeros((1, 1))
        return (
            Basis(Y, phi @ U[:, :rank], "given"), Basis(Y, psi @ V[:rank].T, "given"), np.diag(sizes[:rank])
        )  # fmt: skip

    @classmethod
    @supports("channels", "gradient_flow", *HELD, *STEPPED)
    def of_layer(cls, net: ResidualNetwork, layer: int, fraction: float = 0.5) -> Controls:
        """The controls of one layer of a network, at one time in it. Collective over the network's communicator.

        Parameters
        ----------
        net
            The network.
        layer
            From 0 to L - 1.
        fraction
            The time as a fraction of the layer, from 0 to 1.

        Raises
        ------
        TypeError, ValueError
            If `net` is no network, a number is out of its range, or they differ between ranks.
        """
        layer, fraction = integer("layer", layer, least=0, most=net.layers - 1), number("fraction", fraction, least=0, most=1)
        coefficients = LayerCoefficients(net.bias, net.kernel, net.times.tolist(), range(layer, layer + 1))
        (inputs,) = coefficients.on_layers([s.read(p) for s, p in zip(coefficients.slots, coefficients.functions)])
        factors = net.learned_factors() if net.factors else inputs.factors
        return cls(
            inputs.bias.coefficients(fraction), factors.phi.values @ inputs.beta.coefficients(fraction), factors.psi.values
        )
