"""Newton's method of TAO beside Levenberg and Marquardt: seconds for the same J, on a map from fields to fields.

    containers/run python tests/benchmarks/gauss_newton.py [--modes 61] [--samples 1000] [--steps 20] [--at-most 250] [--dense]

The map is that of `starting_values.py`, which commutes with rotations of the annulus: so do the kernels, unless --dense is
given. The network has one channel, two layers and T = 1; its head is dense. Newton's method ("nls", Hessian actions by
pyadjoint) makes so many steps, or as many as it can in so many seconds; the time of all is then extrapolated from the mean of
those that it made, and said so. Levenberg and Marquardt end where J is no larger than where Newton's method came to. All start
at the same parameters: the kernel minus the identity, the head solved for by least squares.
"""

import argparse
import time

import firedrake as fd
from starting_values import pairs

from fem_resnet import (
    Batch,
    Head,
    Kernel,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    Symmetric,
    laplace_basis,
    least_squares,
    tikhonov,
    train,
    train_levenberg_marquardt,
)  # fmt: skip
from fem_resnet.training.hessian import HessianAtItsPoint


def problem(modes: int, samples: int, weight: float, dense: bool) -> LearningProblem:
    Y = LabelSpace(fd.FunctionSpace(fd.AnnulusMesh(1, 0.4, 8, 48), "CG", 1))
    phi = laplace_basis(Y, modes)
    x, y = fd.SpatialCoordinate(Y.V.mesh())
    kernel = Kernel(phi, among=None if dense else Symmetric(phi, fd.as_vector([-y, x])))
    net, head = ResidualNetwork(kernel, bias=phi, layers=2), Head(phi, phi, "identity")
    net.start("minus identity")
    head.start("identity")
    inputs, targets = (Y.batch(values) for values in pairs(phi, samples, 0))
    made = LearningProblem(net, head, least_squares, tikhonov(weight), Batch(inputs, targets))
    made.record(eliminate="head")[0].give_head()
    return made


def counted(actions: list[int]):
    """Count the Hessian actions of TAO from now on."""
    multiply = HessianAtItsPoint.mult_impl

    def mult_impl(self, A, x):
        actions[0] += 1
        return multiply(self, A, x)

    HessianAtItsPoint.mult_impl = mult_impl


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, value in (("modes", int, 61), ("samples", int, 1000), ("steps", int, 20), ("weight", float, 1e-8)):
        parser.add_argument(f"--{name}", type=kind, default=value)
    parser.add_argument("--at-most", type=float, default=250.0)
    parser.add_argument("--dense", action="store_true")
    given = parser.parse_args()
    p = problem(given.modes, given.samples, given.weight, given.dense)
    start = [function.copy(deepcopy=True) for function in p.functions]
    free, whole = (sum(q.dim for q in parameters) for parameters in (p.net.parameters, p.parameters))
    print(f"{p.net.Y.size} nodes, {given.modes} modes, {given.samples} samples, {whole} parameters, {free} beside the head's")
    actions, history = [0], []
    counted(actions)

    def slow(progress):
        history.append((progress.value, progress.seconds))
        return progress.seconds > given.at_most

    train(p, {"tao_type": "nls", "tao_max_it": given.steps}, monitor=slow)
    made = len(history) - 1
    reached, seconds = history[-1]
    whole_time = seconds * given.steps / made
    said = "" if made == given.steps else f", {whole_time:.0f} s for {given.steps}, extrapolated"
    print(
        f"Newton: J from {history[0][0]:.5f} to {reached:.5f} in {made} steps, {actions[0]} Hessian actions, "
        f"{seconds:.1f} s{said}",
        flush=True,
    )
    for eliminate in ("head", None):
        for function, values in zip(p.functions, start):
            function.assign(values)
        begun = time.perf_counter()
        result = train_levenberg_marquardt(
            p, iterations=200, eliminate=eliminate, monitor=lambda progress: progress.value <= reached
        )
        taken = time.perf_counter() - begun
        print(
            f"Levenberg and Marquardt{', the head eliminated' if eliminate else ''}: J to {result.value:.5f} in "
            f"{result.iterations} steps, {taken:.1f} s: {seconds / taken:.0f} times less",
            flush=True,
        )


if __name__ == "__main__":
    main()
