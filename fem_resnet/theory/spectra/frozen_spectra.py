"""Spectra of the linearisation frozen in time along a trajectory, 3.5.

Frozen at t_0, perturbations of a solution f obey

    w_t = -sigma'(u(y, t_0)) int_Y b(y, z, t_0) w(z) dz,        u = a - B f

(the paper prints sigma(u) b, and leaves u out of the argument; it is the linearisation (3.6), so sigma'(u) b). Its
operator has the rank of b, and but for 0 the spectrum of -beta Psi^T M diag(sigma'(u)) Phi, a matrix of that size. That of
the gradient flow is -B^T diag(sigma'(u)) B, which is symmetric: with R^T R = Psi^T M Psi its spectrum, but for 0, is that of
-R beta^T (Phi^T M diag(sigma'(u)) Phi) beta R^T.

Frozen spectra do not decide stability of (3.6), where the coefficients go on changing: solutions may grow though at
each time all eigenvalues have negative real parts, as with rotating coefficients, and decay though some have positive
ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import firedrake as fd
import numpy as np
from matplotlib.axes import Axes

from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.spectra.singular_values import weighted_gram

__all__ = ["FrozenSpectra", "frozen_eigenvalues", "frozen_spectra"]

#: What a reader of frozen spectra must know; it stands above their plot.
CAVEAT = "Spectra frozen in time do not decide stability: coefficients that change can make decaying modes grow."


@dataclass(frozen=True)
class FrozenSpectra:
    """Eigenvalues of `w -> -sigma'(u(t_l)) B(t_l) w`, or `w -> -B^T sigma'(u) B w`, along trajectories. Get them from `frozen_spectra`.

    Attributes
    ----------
    times : numpy.ndarray
        t_0 .. t_L, shape (L + 1,); at a layer time bias and kernel are those of the layer that starts there.
    eigenvalues : list of numpy.ndarray
        One a time: complex, shape (samples, rank), real parts falling; all others are 0. The smaller rank of phi and
        psi, or that of psi for a gradient flow, whose eigenvalues are real.
    """

    times: np.ndarray
    eigenvalues: list[np.ndarray]

    @property
    def growth(self) -> np.ndarray:
        """Largest real part at each time, shape (L + 1, samples): that of the fastest frozen mode, 0 if all decay."""
        return np.array([np.maximum(values.real.max(axis=1, initial=-np.inf), 0.0) for values in self.eigenvalues])

    def plot(self, axes: Axes, sample: int = 0) -> None:
        """Draw the real parts over t, with the sentence on what they do not say. On every rank that calls it.

        Parameters
        ----------
        axes
            Of matplotlib.
        sample
            Which trajectory.
        """
        for t, values in zip(self.times, self.eigenvalues):
            real = values[sample].real
            axes.scatter(np.full(real.size, t), real, s=9, c=np.where(real > 0, "tab:red", "tab:blue"))
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_xlabel("t")
        axes.set_ylabel("real part")
        axes.set_title(CAVEAT, fontsize="small", wrap=True)


@supports(*HELD, *STEPPED, "gradient_flow")
def frozen_spectra(net: ResidualNetwork, initial: fd.Function) -> FrozenSpectra:
    """Spectra of the linearisation at the layer times, frozen there, along the trajectories from `initial`. Collective.

    They do not decide stability: see above.

    Parameters
    ----------
    net
        The network, trained or not, at its present coefficients.
    initial
        f_I, a Function of `Y.V` or a batch. It is run without being recorded unless annotation is on.

    Raises
    ------
    ValueError
        If the network has no layers.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 2), layers=1, activation="identity")
    >>> net.kernel.set(0, np.array([[1.0, 2.0], [-2.0, 1.0]]))
    >>> frozen_spectra(net, Y.batch(0 * Y.weights)).eigenvalues[0].round(9).tolist()
    [[(-1-2j), (-1+2j)]]
    """
    inputs = net.layer_inputs()
    found = []
    for layer, state in enumerate(net.run(initial).states()):
        at = inputs[min(layer, net.layers - 1)]
        fraction = 0.0 if layer < net.layers else 1.0
        u = at.bias.coefficients(fraction)[:, None] - at.factors.apply(at.beta.coefficients(fraction), net.Y.values(state))
        slopes = net.activation.derivative(u)
        found.append(np.array([frozen_eigenvalues(net, at, fraction, slope) for slope in slopes.T]))
    return FrozenSpectra(net.times, found)


def frozen_eigenvalues(net: ResidualNetwork, layer: LayerInputs, fraction: float, slope: np.ndarray) -> np.ndarray:
    """Eigenvalues of the linearisation in a layer, frozen at a fraction of it, but for zeros. Collective.

    Parameters
    ----------
    net
        The network.
    layer
        What the layer takes.
    fraction
        From 0 to 1.
    slope
        sigma'(u) there at the owned nodes, shape (nodes,).

    Returns
    -------
    numpy.ndarray
        Complex, real parts falling, in 1 / t; as many as the smaller rank of phi and psi, or that of psi for a gradient flow.
    """
    beta, phi, psi = layer.beta.coefficients(fraction), layer.factors.phi, layer.factors.psi
    if net.gradient_flow:
        turned = beta @ np.linalg.cholesky(psi.gram)
        K = weighted_gram(phi, slope, phi)
        values = np.linalg.eigvalsh(-turned.T @ ((K + K.T) / 2) @ turned)
    else:
        K = weighted_gram(psi, slope, phi)
        values = np.linalg.eigvals(-(beta @ K if beta.shape[0] <= beta.shape[1] else K @ beta))
    values = values.astype(complex)
    return values[np.lexsort((values.imag, -values.real))]
