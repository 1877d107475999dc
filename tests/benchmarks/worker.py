"""A side in a process of its own: `python worker.py SIDE FOLDER`, or on k ranks below mpiexec.

Reads commands from stdin, one a line, and answers each with a line of JSON on stdout:

    prepare         records or compiles, and evaluates once: seconds, and the seconds of setting up before
    scale FACTOR    multiplies all parameters; a power of two is exact
    evaluate        J and its gradient at these parameters: seconds, J
    gradient PREFIX writes the last gradient to PREFIX.<rank>.npz
    memory          the largest resident memory in bytes above that after the imports, summed over the ranks; and the
                    largest since the first evaluation above that before it
    quit

A side that waits sleeps. The resident memory is VmHWM, since a process inherits ru_maxrss from the process that started it.
"""

import ctypes
import gc
import json
import os
import sys
import time
from importlib import import_module

from data import Data

#: Side -> its module and class.
SIDES = {
    "fem_resnet_1": ("ours", "FemResnet"),
    "fem_resnet_2": ("ours", "FemResnet"),
    "fem_resnet_layers_1": ("ours", "FemResnetLayers"),
    "fem_resnet_layers_2": ("ours", "FemResnetLayers"),
    "numpy": ("blocked", "Blocked"),
    "jax": ("peers_jax", "Jax"),
    "jax_checkpoint": ("peers_jax", "JaxCheckpoint"),
    "diffrax": ("peers_jax", "Diffrax"),
    "torch": ("peers_torch", "Torch"),
    "torch_compile": ("peers_torch", "TorchCompile"),
    "torchdiffeq": ("peers_torch", "Torchdiffeq"),
    "torchdiffeq_adjoint": ("peers_torch", "TorchdiffeqAdjoint"),
    "ufl": ("taped_ufl", "TapedUFL"),
}


def resident(what: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def largest_memory() -> int:
    return resident("VmHWM")


def forget_largest_memory() -> None:
    """Begin anew to record the largest memory."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def memory_in_use() -> int:
    """Resident memory, after glibc has returned all freed memory, which it could hand out again unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


class Alone:
    """A side in one process."""

    rank = 0

    def next_command(self) -> str:
        return sys.stdin.readline()

    def start(self) -> None:
        pass

    def total(self, number):
        return number


class Ranks:
    """A side on ranks of MPI. The first reads the commands; the others sleep, and do not wait in a broadcast."""

    def __init__(self, comm):
        self._comm, self.rank = comm, comm.rank

    def next_command(self) -> str:
        line = bytearray(sys.stdin.readline().encode().ljust(4096) if self.rank == 0 else 4096)
        request = self._comm.Ibcast(line)
        while not request.Test():
            time.sleep(0.001)
        return line.decode().strip()

    def start(self) -> None:
        self._comm.Barrier()

    def total(self, number):
        return self._comm.allreduce(number)


class Worker:
    def __init__(self, make, data: Data, processes):
        self._make, self._data, self._processes = make, data, processes
        self._bare = largest_memory()

    def _timed(self, work) -> tuple[float, object]:
        self._processes.start()
        start = time.perf_counter()
        result = work()
        self._processes.start()
        return time.perf_counter() - start, result

    def prepare(self) -> dict:
        setup, self._side = self._timed(lambda: self._make(self._data))
        prepared, _ = self._timed(self._side.prepare)
        self._before = memory_in_use()
        evaluated, J = self._timed(self._side.evaluate)
        # The memory of compilation is no part of the memory of an evaluation.
        self._largest = largest_memory()
        forget_largest_memory()
        self._evaluations = 0
        return {"setup_seconds": setup, "seconds": prepared + evaluated, "J": J}

    def scale(self, factor: str) -> dict:
        self._side.scale(float(factor))
        return {}

    def evaluate(self) -> dict:
        seconds, J = self._timed(self._side.evaluate)
        return {"seconds": seconds, "J": J}

    def gradient(self, prefix: str) -> dict:
        import numpy as np

        self._evaluations = max(self._evaluations, largest_memory())
        np.savez(f"{prefix}.{self._processes.rank}.npz", **dict(zip(("nodes", "a", "beta"), self._side.gradient())))
        memory_in_use()  # returns what was freed: to look at the gradient is no part of an evaluation
        forget_largest_memory()
        self._processes.start()
        return {}

    def memory(self) -> dict:
        evaluations = max(self._evaluations, largest_memory())
        total, evaluation = max(self._largest, evaluations) - self._bare, max(evaluations - self._before, 0)
        return {"bytes": self._processes.total(total), "evaluation_bytes": self._processes.total(evaluation)}


def main() -> None:
    side, folder = sys.argv[1:]
    del sys.argv[1:]  # PETSc would take them for options
    # If memory runs out, the system ends a side, and nothing else on this machine.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    # Answers go to the stdout of the process; what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, name = SIDES[side]
    module = import_module(module)
    processes = Ranks(module.COMM) if getattr(module, "COMM", None) and module.COMM.size > 1 else Alone()
    worker = Worker(getattr(module, name), Data(folder), processes)
    while words := processes.next_command().split():
        if words[0] == "quit":
            break
        answer = getattr(worker, words[0])(*words[1:])
        if processes.rank == 0:
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
