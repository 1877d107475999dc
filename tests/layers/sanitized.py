"""Compiled stages and layers under GCC's sanitizers of undefined behaviour and addresses: run by test_compiler.py.

    python sanitized.py MACHINE some|all

MACHINE is what -march takes: x86-64, x86-64-v3 and v4 have vectors of 16, 32 and 64 bytes. Whatever a sanitizer finds ends
the process. NumPy's arrays then come from a malloc that keeps forbidden ground around each; so must Python's own.
"""

import os
import subprocess
import sys
from pathlib import Path

import firedrake as fd
import numpy as np
import petsctools
import sympy

from fem_resnet.activation.activation import Activation, get_activation
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers import compiled_stage
from fem_resnet.layers.compiled_stage import CompiledStage
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.loss import least_squares
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.settings import Kernel, Layers
from fem_resnet.time_stepping.compiled_layer import CompiledStepper
from fem_resnet.verify import verify
from fem_resnet.verify.activations import _SHAPES, _Points, _stage_errors

#: What of the processor each machine takes, as Linux calls it.
MACHINES = {
    "x86-64": {"sse2"},
    "x86-64-v3": {"avx2", "fma", "bmi2", "movbe"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
VECTOR = dict(zip(MACHINES, (16, 32, 64)))
FLAGS = ("-g", "-fsanitize=undefined,float-cast-overflow", "-fsanitize=address", "-fno-sanitize-recover=all")
#: Packed fields, of more samples than 512 with a part of a chunk behind; the second has psi = phi.
LARGE = ((521, 67, 66, 70), (600, 66, 69, 0))
_S = sympy.Symbol("s")
ACTIVATIONS = {
    "tanh": get_activation("tanh"),
    "elu": get_activation("elu", alpha=0.7),
    "expression": Activation.from_sympy(
        sympy.Piecewise((sympy.sin(_S), _S < 0), (_S**3 + _S, _S < 1), (2 * sympy.log(_S) + 2, True))
    ),
}


def preloaded() -> list[str] | None:
    """What `env` sets for this script, or None without the sanitizer's library; libstdc++ is sought when it starts."""
    compiler = petsctools.get_petscvariables()["CC"]
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan", "libstdc++")
    ]
    if not all(map(os.path.isabs, libraries)):
        return None
    return [f"LD_PRELOAD={' '.join(libraries)}", "ASAN_OPTIONS=detect_leaks=0", "PYTHONMALLOC=malloc", "FEM_RESNET_COMPILED=1"]


def allowed(machine: str) -> bool:
    """Whether this processor runs the code."""
    info = Path("/proc/cpuinfo")
    return info.exists() and MACHINES[machine] <= set(info.read_text().split())


def run_stages(activation: Activation, precision: str) -> int:
    """All shapes of `verify`, held against formulas; how many there were."""
    accuracy = {"double": 1e-12, "single": 1e-5}[precision]
    shapes = (*_SHAPES, *LARGE)
    for samples, nodes, *ranks in shapes:
        stage = CompiledStage(_Points(nodes), activation, samples, precision)
        for name, error in _stage_errors(activation, stage, *ranks):
            assert error < accuracy, f"{name}, {precision}, shape {samples, nodes, *ranks}: {error}"
    return len(shapes)


def run_layers(precision: str, samples: int, ranks: tuple[int, int]) -> None:
    """J and its gradient by compiled layers, and by NumPy; one psi for all layers."""
    Y = LabelSpace(fd.FunctionSpace(fd.IntervalMesh(131, 1.7), "DG", 0))
    x, rng = Y.coordinates[:, 0], np.random.default_rng(2)
    phi = Basis(Y, rng.normal(size=(Y.nodes, ranks[0])) / ranks[0] ** 0.5, "given")
    psi = phi if ranks[0] == ranks[1] else Basis(Y, rng.normal(size=(Y.nodes, ranks[1])) / ranks[1] ** 0.5, "given")
    found = []
    for compiled in ("1", "0"):
        os.environ["FEM_RESNET_COMPILED"] = compiled
        net = ResidualNetwork(Kernel(phi, psi), layers=Layers([0, 0.3, 0.7], steps=2), precision=precision)
        rng = np.random.default_rng(3)
        for k in range(2):
            net.kernel.set(k, rng.normal(size=ranks) / ranks[1] ** 0.5)
            net.bias.set(k, np.sin(3 * x + k))
        start, target = (Y.batch(np.cos(np.outer(x, 1 + np.arange(samples) % 7) + shift)) for shift in (0, 1))
        J, run = LearningProblem(net, None, least_squares, None, Batch(start, target)).record()
        found.append([float(J.functional), *(part.dat.data_ro.copy() for part in J.derivative())])
        assert isinstance(run._pieces[0].segment.steppers[0], CompiledStepper) == (compiled == "1")
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol={"double": 1e-11, "single": 1e-5}[precision])


def main(machine: str, extent: str) -> None:
    """Run, and print what was."""
    compiled_stage._FLAGS += (f"-march={machine}", "-O0", f"-DWANTED={VECTOR[machine]}", *FLAGS)
    source = compiled_stage._source()
    compiled_stage._source = lambda: source + '\n_Static_assert(VECTOR == WANTED, "vectors of this machine");'
    everything = extent == "all"
    for name, activation in ACTIVATIONS.items() if everything else [("tanh", ACTIVATIONS["tanh"])]:
        for precision in ("double", "single") if everything else ("double",):
            print(f"{name}, {precision}: {run_stages(activation, precision)} shapes", flush=True)
    for precision in ("double", "single") if everything else ("double",):
        for samples, ranks in ((1, (5, 9)), (13, (6, 6)), (521, (66, 70)), (600, (69, 69))) if everything else ((13, (6, 6)),):
            run_layers(precision, samples, ranks)
            print(f"layers, {precision}: {samples} samples, ranks {ranks}", flush=True)
    if everything:
        os.environ["FEM_RESNET_COMPILED"] = "1"
        report = verify(quick=True)
        assert report.passed, str(report)
        print(f"verify: {len(report.checks)} checks", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
