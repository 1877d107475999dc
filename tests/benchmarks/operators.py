"""FNO and DeepONet beside a demo: `operators_torch.py`, run in the environment of the peers."""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import environment
import numpy as np

SCRIPT = Path(__file__).with_name("operators_torch.py")


def trained(data: dict[str, np.ndarray], runs: list[dict]) -> Iterator[dict]:
    """Train on arrays and with settings that SCRIPT describes, one run after the other, each on one core.

    Yields of each run the number of real `parameters`, CPU `seconds` of training, the mean of what is minimised on the
    `training` samples, and the `outputs` for the test inputs. `environment.install` makes the environment that this needs.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "data.npz", **data)
        command = [str(environment.python()), str(SCRIPT), folder, json.dumps(runs)]
        with subprocess.Popen(command, env={"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True) as process:
            try:
                for number, line in enumerate(process.stdout):
                    yield json.loads(line) | {"outputs": np.load(Path(folder) / f"found{number}.npy")}
                if process.wait():
                    raise subprocess.CalledProcessError(process.returncode, command[:2])
            finally:
                process.kill()
