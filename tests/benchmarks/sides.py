"""Sides of the benchmark: processes that it starts, asks, checks and ends."""

import json
import os
import re
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import environment
import numpy as np
from worker import SIDES

HERE = Path(__file__).parent
#: Their gradients have an error of the order of the step: they are timed all the same, and marked.
INEXACT = {"torchdiffeq_adjoint"}
#: Bounds of relative errors: of J, and of the gradient in the norm of each kind of parameter.
BOUND_J, BOUND_GRADIENT = 1e-12, 1e-10
#: The largest nodes x samples x layers of a side: above, an evaluation would take minutes.
LARGEST = {"ufl": 2**15}
OURS = ("fem_resnet_1", "fem_resnet_2")
#: The same sides without the tape.
OUR_LAYERS = ("fem_resnet_layers_1", "fem_resnet_layers_2")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_TWO_THREADS = {
    **dict.fromkeys(_ONE_THREAD, "2"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads=2",
    "JAX_PLATFORMS": "cpu",
}


class SideFailed(Exception):
    """A side ended, or did not answer in time."""


def _without_mpi() -> dict:
    """The environment of this process without the variables that MPI left in it: they must not reach another mpiexec."""
    leaked = re.compile(r"(OMPI_(?!MCA_rmaps|ALLOW)|PMIX_|OPAL_|PRTE_)")
    return {key: value for key, value in os.environ.items() if not leaked.match(key)}


def ranks_environment() -> dict:
    """An environment for processes of MPI with one thread each."""
    # A rank that waits gives its core to others.
    return _without_mpi() | _ONE_THREAD | {"OMPI_MCA_mpi_yield_when_idle": "1"}


def on_ranks(ranks: int, command: list[str]) -> list[str]:
    """The command, on a number of ranks."""
    return ["mpiexec", "-n", str(ranks), "--bind-to", "none", *command]


def is_peer(side: str) -> bool:
    return SIDES[side][0].startswith("peers")


@dataclass
class Side:
    """The process of a worker, and its measurements."""

    name: str
    process: subprocess.Popen
    log: Path
    first: dict = field(default_factory=dict)
    errors: dict = field(default_factory=dict)
    seconds: list = field(default_factory=list)
    expected: float = 0.0
    peak_bytes: int = 0
    evaluation_bytes: int = 0

    @classmethod
    def start(cls, name: str, folder: Path) -> "Side":
        ours = name in OURS + OUR_LAYERS
        interpreter = str(environment.python()) if is_peer(name) else sys.executable
        env = ranks_environment() if ours else _without_mpi()
        env |= _ONE_THREAD if ours or name == "ufl" else _TWO_THREADS
        if is_peer(name):
            for key in ("PYTHONPATH", "VIRTUAL_ENV"):
                env.pop(key, None)
        command = [interpreter, str(HERE / "worker.py"), name, str(folder)]
        if ours and (ranks := name.rpartition("_")[2]) != "1":
            command = on_ranks(int(ranks), command)
        log = folder / f"{name}.log"
        with open(log, "w") as stderr:
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
            )
        return cls(name, process, log)

    def ask(self, command: str, limit: float = 900) -> dict:
        try:
            self.process.stdin.write(f"{command}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise SideFailed(self._why("ended")) from None
        if not select.select([self.process.stdout], [], [], limit)[0]:
            raise SideFailed(self._why(f"no answer to '{command}' in {limit:.0f} s"))
        line = self.process.stdout.readline()
        if not line:
            raise SideFailed(self._why("ended"))
        return json.loads(line)

    def _why(self, what: str) -> str:
        lines = [
            line for line in self.log.read_text(errors="replace").splitlines() if re.match(r"\w[\w.]*(Error|Exception)", line)
        ]
        return f"{what}: {lines[-1][:200]}" if lines else what

    def gradient(self, folder: Path) -> dict[str, np.ndarray]:
        """The last gradient: in a, shape (layers, nodes), and in beta, shape (layers, rank, rank)."""
        self.ask(f"gradient {folder / self.name}")
        files = sorted(folder.glob(f"{self.name}.*.npz"))
        parts = [dict(np.load(file)) for file in files]
        for file in files:
            file.unlink()
        order = np.argsort(np.concatenate([part["nodes"] for part in parts]))
        return {"a": np.concatenate([part["a"] for part in parts], axis=1)[:, order], "beta": parts[0]["beta"]}

    def compare(self, J: float, gradient: dict[str, np.ndarray], folder: Path) -> None:
        """Store the errors of J and of the gradient, compared with these."""
        own = self.gradient(folder)
        self.errors = {"J": abs(self.first["J"] - J) / abs(J)}
        for name, wanted in gradient.items():
            self.errors[name] = float(np.linalg.norm(own[name] - wanted) / np.linalg.norm(wanted))

    @property
    def agrees(self) -> bool:
        return self.errors["J"] <= BOUND_J and (
            self.name in INEXACT or max(self.errors["a"], self.errors["beta"]) <= BOUND_GRADIENT
        )

    def end(self) -> None:
        if self.process.poll() is None:
            try:
                self.process.communicate(b"quit\n", timeout=20)
            except (subprocess.TimeoutExpired, BrokenPipeError, ValueError):
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
