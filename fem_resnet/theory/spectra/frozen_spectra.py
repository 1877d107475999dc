"""Spectra of the linearisation along a trajectory, frozen in time: section 3.5.

With coefficients frozen at t_0, perturbations w of a solution f obey

    w_t = -sigma'(u(y, t_0)) int_Y b(y, z, t_0) w(z) dz,        u = a - B f

(The paper prints sigma(u) b, and leaves u out of the argument. As the linearisation (3.6) it is sigma'(u) b.) The operator
has the rank of b. Its spectrum without 0 is the spectrum of the matrix -beta Psi^T M diag(sigma'(u)) Phi, of the size of the
rank. The operator of the gradient flow is -B^T diag(sigma'(u)) B, which is symmetric. With R^T R = Psi^T M Psi its spectrum
without 0 is the spectrum of -R beta^T (Phi^T M diag(sigma'(u)) Phi) beta R^T.

Frozen spectra do not decide about the stability of (3.6), whose coefficients change in time. Solutions may grow although all
eigenvalues have negative real parts at each time, for example with rotating coefficients. They may decay although some
eigenvalues have positive real parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import firedrake as fd
import numpy as np
from matplotlib.axes import Axes

from fem_resnet.arguments import instance, integer
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.spectra.singular_values import weighted_gram

__all__ = ["FrozenSpectra", "frozen_eigenvalues", "frozen_spectra"]

#: The title of the plot.
CAVEAT = "Spectra frozen in time do not decide stability: coefficients that change can make decaying modes grow."


@dataclass(frozen=True)
class FrozenSpectra:
    """Eigenvalues of `w -> -sigma'(u(t_l)) B(t_l) w`, or `w -> -B^T sigma'(u) B w`, along trajectories.

    Get them from `frozen_spectra`.

    Attributes
    ----------
    times : numpy.ndarray
        t_0 .. t_L, shape (L + 1,). At a layer time the bias and the kernel of the layer that starts there count.
    eigenvalues : list of numpy.ndarray
        For each time a complex array, real parts falling, shape (samples, rank), in the unit of 1/t; all other eigenvalues
        are 0. `rank` is the smaller rank of phi and psi. For a gradient flow it is the rank of psi, and the eigenvalues are
        real.
    """

    times: np.ndarray
    eigenvalues: list[np.ndarray]

    @property
    def growth(self) -> np.ndarray:
        """The largest real part at each time, of the fastest growing frozen mode, shape (L + 1, samples); 0 if all decay."""
        return np.array([np.maximum(values.real.max(axis=1, initial=-np.inf), 0.0) for values in self.eigenvalues])

    def plot(self, axes: Axes, sample: int = 0) -> None:
        """Draw the real parts over t, with a title that warns of wrong conclusions. Not collective.

        Parameters
        ----------
        axes
            Axes of matplotlib.
        sample
            The number of the trajectory.

        Raises
        ------
        TypeError, ValueError
            If `axes` is of another class, or there is no such sample.
        """
        instance("axes", axes, Axes)
        sample = integer("sample", sample, least=0, most=len(self.eigenvalues[0]) - 1)
        for t, values in zip(self.times, self.eigenvalues):
            real = values[sample].real
            axes.scatter(np.full(real.size, t), real, s=9, c=np.where(real > 0, "tab:red", "tab:blue"))
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_xlabel("t")
        axes.set_ylabel("real part")
        axes.set_title(CAVEAT, fontsize="small", wrap=True)


@supports("channels", *HELD, *STEPPED, "gradient_flow")
def frozen_spectra(net: ResidualNetwork, initial: fd.Function) -> FrozenSpectra:
    """Spectra of the linearisation frozen at each layer time, along the trajectories from `initial`.

    They do not decide about stability: solutions may grow although all frozen modes decay. Collective over the ranks of the
    label domain.

    Parameters
    ----------
    net
        The network, trained or not, at its present coefficients.
    initial
        f_I, a Function of `Y.V` or a batch. The run is recorded only if annotation is on.

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
    """The eigenvalues of the linearisation frozen inside of a layer, without zeros. Collective.

    Parameters
    ----------
    net
        The network.
    layer
        The inputs of the layer.
    fraction
        The time, as a fraction of the layer from 0 to 1.
    slope
        sigma'(u) at that time at the owned nodes, shape (nodes,).

    Returns
    -------
    numpy.ndarray
        Complex, real parts falling, in the unit of 1/t, shape (rank,); `rank` is the smaller rank of phi and psi, or the
        rank of psi for a gradient flow.
    """
    beta, phi, psi = layer.beta.coefficients(fraction), layer.factors.phi, layer.factors.psi
    if net.gradient_flow:
        turned = beta @ psi.root.T
        K = weighted_gram(phi, slope, phi)
        values = np.linalg.eigvalsh(-turned.T @ ((K + K.T) / 2) @ turned)
    else:
        K = weighted_gram(psi, slope, phi)
        values = np.linalg.eigvals(-(beta @ K if beta.shape[0] <= beta.shape[1] else K @ beta))
    values = values.astype(complex)
    return values[np.lexsort((values.imag, -values.real))]
