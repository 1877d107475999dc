r"""What the data determine
=======================

At a minimum of J = loss + lambda/2 |m|^2 (2.11), in which directions of the parameters m = (a, b) do the data speak, and in
which the regulariser alone? With the loss's second derivative H and the inner product R of the label measure,

    H v = mu R v,       variance left in the direction v:  lambda / (lambda + mu)         (Laplace approximation)

Directions with mu far above lambda are determined by the data. There are few of them: that is what makes Newton's method and
low-rank posteriors cheap, whatever the mesh. The actions of H are exact for the discrete network, and no matrix is made. Run

    containers/run python demos/what_the_data_determine.py            (half a minute; --short for a few seconds)

It draws the spectrum and the leading directions, as rows b(y0, z) of the kernel, to demos/output/.
"""

import logging
import sys
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own

import firedrake as fd
import numpy as np
from matplotlib.figure import Figure

from fem_resnet import (
    Batch,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    hessian_spectrum,
    laplace_basis,
    least_squares,
    plot,
    tikhonov,
    train,
)  # fmt: skip

LAMBDA = 0.1
SAMPLES = 6
Y0 = (0.5, 0.0)  # whose rows of the kernel are drawn

# %% The problem
# On a disk, a network of two layers is to carry a few bumps to the same bumps turned by a right angle.


def problem(refinement, rank):
    Y = LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(refinement), "CG", 1))
    basis = laplace_basis(Y, rank)
    net = ResidualNetwork(basis, bias=basis, layers=2, final_time=2.0)
    angles = 2 * np.pi * np.arange(SAMPLES) / SAMPLES
    x, y = Y.coordinates.T[:, :, None]

    def bumps(angles):
        return Y.batch(2 * np.exp(-4 * ((x - 0.6 * np.cos(angles)) ** 2 + (y - 0.6 * np.sin(angles)) ** 2)))

    batch = Batch(bumps(angles), bumps(angles + np.pi / 2))
    return LearningProblem(net, None, least_squares, tikhonov(LAMBDA), batch)


# %% The minimum, by Newton's method


def minimise(learning):
    result = train(
        learning, {"tao_type": "nls", "tao_gatol": 1e-9, "tao_max_it": 60, "tao_nls_ksp_rtol": 1e-6}, monitor=lambda p: None
    )
    assert result.converged, result.reason
    return result


# %% The picture


def draw(path, net, spectrum, names):
    """The spectrum, and the leading directions in the kernel of the first layer: their rows b(y0, z) at one y0."""
    figure = Figure(figsize=(17, 3.4), layout="constrained")
    first, *panels = figure.subplots(1, 5, width_ratios=[1.5, 1, 1, 1, 1])
    plot.spectrum(spectrum, weight=LAMBDA, ax=first)
    rows = net.replace(layers=1)
    for k, (panel, direction) in enumerate(zip(panels, spectrum.directions)):
        kernel = direction[names.index("kernel_0")]
        rows.kernel.set(0, _coefficients(net.Y, kernel, rows.kernel.get(0).shape))
        plot.kernel_row(rows, Y0, ax=panel).set_title(f"direction {k + 1}, $\\mu$ = {spectrum.values[k]:.2g}")
    plot.save(path, figure)


def _coefficients(Y, function, shape):
    owner = Y.comm.allgather(function.dat.data_ro.size > 0).index(True)
    return Y.comm.bcast(np.array(function.dat.data_ro).reshape(shape) if Y.comm.rank == owner else None, root=owner)


# %% All together


def main(short=False):
    """Returns how many directions the data determine, on each mesh."""
    determined = []
    for refinement in (1, 2) if short else (2, 3):
        learning = problem(refinement, 4 if short else 6)
        result = minimise(learning)
        size = sum(parameter.dim for parameter in learning.parameters)
        spectrum = hessian_spectrum(learning, min(24, size - 2), gauss_newton=True)
        variance = spectrum.variance(LAMBDA)
        determined.append(int(np.count_nonzero(variance < 0.5)))
        if fd.COMM_WORLD.rank == 0:
            print(f"{learning.net.Y!r}: {size} coefficients, Newton's gradient norms ... ", end="")
            print(", ".join(f"{norm:.0e}" for norm in result.gradient_norms[-4:]))
            print("   mu: " + ", ".join(f"{mu:.1e}" for mu in spectrum.values[:12]))
            print(f"   the data leave less than half of the variance in {determined[-1]} directions of {size}", flush=True)
    output = Path(__file__).parent / "output"
    if fd.COMM_WORLD.rank == 0:
        output.mkdir(exist_ok=True)
    names = [function.name() for function in learning.functions]
    draw(output / "what_the_data_determine.png", learning.net, spectrum, names)
    # What this page claims: few directions, and as many on either mesh.
    assert 0 < determined[0] < size / 2 and abs(determined[0] - determined[1]) <= 1
    return determined


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main(SHORT)
