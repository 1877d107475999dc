r"""What the data determine
=======================

At a minimum of J = loss + lambda/2 |m|^2 (2.11), in which directions of the parameters m = (a, b) do the data speak, and in
which the regulariser alone? With the loss's second derivative H and the inner product R of the label measure,

    H v = mu R v,       variance left in the direction v:  lambda / (lambda + mu)         (Laplace approximation)

Directions with mu far above lambda are determined by the data. There are few of them: that is what makes Newton's method and
low-rank posteriors cheap, whatever the mesh. The actions of H are exact for the discrete network, and no matrix is made. Run

    containers/run python demos/what_the_data_determine.py            (half a minute; --short for a few seconds)

It draws the leading kernels b(y, z) to demos/output/.
"""

import gc
import logging
import sys
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own

import firedrake as fd
import numpy as np

from fem_resnet import (
    Batch,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    hessian_spectrum,
    laplace_basis,
    least_squares,
    tikhonov,
    train,
)  # fmt: skip

LAMBDA = 0.1
SAMPLES = 6

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


def draw(path, Y, kernel, spectrum, names):
    """The leading directions in the kernel of the first layer, as b(y, z) for z at a few nodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    gc.collect()  # on all ranks, before one of them draws alone
    chosen = [direction[names.index("kernel_0")] for direction in spectrum.directions[:4]]
    parts = [kernel.phi.values @ _coefficients(Y, d, kernel.shape) @ kernel.psi.values.T[:, :1] for d in chosen]
    parts, nodes = Y.comm.gather(np.hstack(parts)), Y.comm.gather(Y.coordinates)
    if Y.comm.rank:
        return
    figure, axes = plt.subplots(1, 5, figsize=(15, 3), layout="constrained")
    axes[0].semilogy(np.arange(1, len(spectrum.values) + 1), np.maximum(spectrum.values, 1e-12), "o")
    axes[0].axhline(LAMBDA, color="k", linewidth=0.5)
    axes[0].set(title="mu, and lambda", xlabel="number")
    x, y = np.concatenate(nodes).T
    for k, values in enumerate(np.concatenate(parts).T):
        axes[k + 1].tricontourf(x, y, values, 20, cmap="RdBu_r")
        axes[k + 1].set(title=f"b(., z) of direction {k + 1}", aspect="equal")
        axes[k + 1].axis("off")
    figure.savefig(path, dpi=110)


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
    draw(output / "what_the_data_determine.png", learning.net.Y, learning.net.kernel.space_basis.kernel, spectrum, names)
    # What this page claims: few directions, and as many on either mesh.
    assert 0 < determined[0] < size / 2 and abs(determined[0] - determined[1]) <= 1
    return determined


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main(SHORT)
