"""A deep network in a process of its own, whose memory is then its own: prints what it measured as one line of JSON.

containers/run python tests/deep_network.py '{"layers": 1000, "checkpoints": 20, "evaluations": 1}'
"""

import json
import sys
import time

# PETSc would take the argument for an option of its own.
arguments, sys.argv = sys.argv[1:], sys.argv[:1]
import checkpoint_schedules  # noqa: E402
import firedrake as fd  # noqa: E402
import numpy as np  # noqa: E402

from fem_resnet import Batch, Bias, Kernel, LabelSpace, Layers, LearningProblem, ResidualNetwork, laplace_basis, least_squares  # noqa: E402

MEGABYTE = 2**20


def memory(what: str) -> float:
    """VmRSS or VmHWM, the present and the largest resident memory of this process, in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(what))


def problem(phi, layers, layers_per_block=1, in_time="shared", samples=64, checkpoints=None) -> LearningProblem:
    """Least squares at the end of layers of Euler's method, with weights of size 1/2."""
    rng, Y = np.random.default_rng(0), phi.Y
    net = ResidualNetwork(
        Kernel(phi, in_time=in_time),
        bias=Bias(phi, in_time=in_time),
        layers=Layers(layers, per_block=layers_per_block),
        solver_parameters={"ts_type": "rk", "ts_rk_type": "1fe", "ts_adapt_type": "none"},
    )
    for parameter in net.parameters:
        for k in range(len(parameter.functions)):
            parameter.set(k, rng.normal(scale=0.5, size=parameter.space_bases[k].shape))
    inputs = np.cos(Y.coordinates @ rng.normal(size=(2, samples)))
    batch = Batch(Y.batch(inputs), Y.batch(np.zeros((Y.nodes, samples))))
    return LearningProblem(net, None, least_squares, None, batch, checkpoints=checkpoints)


def measure(cells=44, samples=64, evaluations=0, groups=None, schedule=None, wait=False, **options) -> dict:
    """Memory and time of a recording and its derivative, then resident memory after each of so many evaluations."""
    Y = LabelSpace(fd.FunctionSpace(fd.UnitSquareMesh(cells, cells), "CG", 1))
    phi = laplace_basis(Y, 6)
    if groups is not None:
        options["in_time"] = [layer * groups // options["layers"] for layer in range(options["layers"])]
    if schedule is not None:
        options["checkpoints"] = lambda steps: getattr(checkpoint_schedules, schedule[0])(*schedule[1:])
    # Everything is compiled and every buffer made that does not depend on the depth.
    warm = problem(phi, 2, samples=samples)
    warm.reduced_functional().derivative()
    del warm
    before, start = memory("VmRSS"), time.perf_counter()
    deep = problem(phi, samples=samples, **options)
    J = deep.reduced_functional()
    recorded = time.perf_counter()
    if wait:
        print("recorded", flush=True)
        time.sleep(600)
    J.derivative()
    found = {
        "fields": options["layers"] * Y.nodes * samples * 8 / MEGABYTE,
        "grown": memory("VmHWM") - before,
        "record": recorded - start,
        "derivative": time.perf_counter() - recorded,
        "resident": [],
    }
    for _ in range(evaluations):
        J(deep.functions)
        J.derivative(apply_riesz=True)
        found["resident"].append(memory("VmRSS"))
    return found


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(arguments[0]))))
