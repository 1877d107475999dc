"""The layers of `msa` dealt to members of an ensemble: the maximisation's share of an iteration, and what a member does.

    containers/run mpiexec -n 2 python tests/benchmarks/msa_members.py [--nodes 1000] [--layers 16] [--iterations 4]

Each rank is a member. Each first runs `msa` alone, and then together with the others, on an annulus: one sample with a box,
or 16 samples with a ball of rows. Seconds are CPU time of one member, as other processes may share the machine, without the
first iteration: of the maximisation, and of all else in an iteration. Waiting for other members is left out, as MPI waits at
full speed. The model is

    t(M) = t_else + t_max ceil(L / M) / L

for M members and L layers. It leaves out what is sent: in each iteration a member gets the new controls of all layers from
others, 8 (1 + 2 rank) bytes a node and layer, twice in the extended variant.
"""

import argparse
import math
import sys
import time

import firedrake as fd
import numpy as np

from fem_resnet import Batch, Box, LabelSpace, LearningProblem, ResidualNetwork, RowBall, laplace_basis, least_squares, msa
from fem_resnet.training.dealt_layers import DealtLayers


def problem(comm, nodes: int, layers: int, samples: int) -> LearningProblem:
    """Smooth inputs and targets on an annulus, by a network whose kernel has 9 modes on both sides."""
    around = round(math.sqrt(4 * nodes))
    Y = LabelSpace(fd.FunctionSpace(fd.AnnulusMesh(1, 0.4, max(1, nodes // around - 1), around, comm=comm), "CG", 1))
    net = ResidualNetwork(laplace_basis(Y, 9), layers=layers, final_time=2.0)
    k = np.arange(samples)
    x, y = Y.coordinates.T[:, :, None]
    return LearningProblem(
        net, None, least_squares, None, Batch(Y.batch(np.cos(2 * x + k)), Y.batch(np.cos(2 * x + k) + np.sin(3 * y + k)))
    )


class Clock:
    """CPU seconds of what is dealt out, on this member, and of all that members do together in between."""

    def __init__(self):
        self.own = self.shared = 0.0
        DealtLayers.each = self._shared(lambda dealt, of_layer, each=DealtLayers.each: each(dealt, self._own(of_layer)))
        DealtLayers.first = self._shared(DealtLayers.first)
        module = sys.modules[msa.__module__]
        module.tell = self._shared(module.tell)

    def _own(self, function):
        def timed(*given):
            start = time.process_time()
            found = function(*given)
            self.own += time.process_time() - start
            return found

        return timed

    def _shared(self, function):
        def timed(*given):
            start = time.process_time()
            found = function(*given)
            self.shared += time.process_time() - start
            return found

        return timed

    def measure(self, start: LearningProblem, A, **options) -> tuple[object, float, float]:
        """The result, and CPU seconds an iteration after the first: of the maximisation here, and of all else."""
        marks = []
        result = msa(start, A, monitor=lambda p: marks.append((time.process_time(), self.own, self.shared)), **options)
        (began, own, shared), (ended, own_at_end, shared_at_end), count = marks[0], marks[-1], result.iterations - 1
        return result, (own_at_end - own) / count, (ended - began - shared_at_end + shared) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=4)
    given = parser.parse_args()
    ensemble, clock = fd.Ensemble(fd.COMM_WORLD, 1), Clock()
    members, layers = ensemble.ensemble_comm, given.layers
    for name, samples in (("one sample, box", 1), ("16 samples, ball of rows", 16)):
        start = problem(ensemble.comm, given.nodes, layers, samples)
        A = Box((-1, 1), (-1, 1)) if samples == 1 else RowBall(start.net.bases["psi"][0], 1.5)
        for variant in ("basic", "extended"):
            found = []
            for together in (None, ensemble):
                options = {"variant": variant, "iterations": given.iterations, "ensemble": together}
                found.append(clock.measure(start, A, **options))
            (alone, own, rest), (dealt, own_of_two, rest_of_two) = found
            apart = max(np.abs(dealt.values - alone.values) / np.abs(alone.values))
            lines = members.gather((own_of_two, rest_of_two, apart))
            if members.rank:
                continue
            share = own / (own + rest)
            print(f"{name}, {start.net.Y.size} nodes, {layers} layers, {variant}: {alone.iterations} iterations")
            print(f"  alone       maximisation {own:.3f} s, all else {rest:.3f} s: {share:.0%} of an iteration")
            for k, (mine, other, difference) in enumerate(lines):
                print(f"  member {k}    maximisation {mine:.3f} s, all else {other:.3f} s, values apart {difference:.1e}")
            slowest = max(mine + other for mine, other, _ in lines)
            print(f"  {members.size} members   {(own + rest) / slowest:.2f} times as fast by CPU time; model:", end="")
            for M in (2, 4, 8, layers):
                print(f"  {1 / (1 - share + share * math.ceil(layers / M) / layers):.2f} on {M}", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
