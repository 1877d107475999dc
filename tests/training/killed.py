"""A training with checkpoints, in a process of its own that a test kills: killed.py TOOL FOLDER [resume]."""

import os
import sys
from pathlib import Path

import numpy as np
from firedrake import COMM_WORLD

sys.path.insert(0, str(Path(__file__).parents[1]))

from problems import learning_problem, network, squares  # noqa: E402

from fem_resnet import Adam, TrainingCheckpoint, train, train_levenberg_marquardt, train_pam, train_stochastic  # noqa: E402

TOOL, FOLDER = sys.argv[1], Path(sys.argv[2])


def say(progress):
    if COMM_WORLD.rank == 0:
        print(getattr(progress, "iteration", getattr(progress, "epoch", None)), flush=True)


(FOLDER / f"process {COMM_WORLD.rank}").write_text(str(os.getpid()))
options = {"checkpoint": TrainingCheckpoint(FOLDER / "checkpoint", every=3), "monitor": say}
if "resume" in sys.argv and (FOLDER / "checkpoint").exists():
    options["resume"] = FOLDER / "checkpoint"
problem = learning_problem(network("disk", "CG1"), samples=8)
if TOOL == "train":
    result = train(problem, {"tao_max_it": 20}, **options)
elif TOOL == "train_pam":
    result = train_pam(problem, {"tao_max_it": 1}, iterations=20, gradient_tolerance=0.0, **options)
elif TOOL == "train_levenberg_marquardt":
    result = train_levenberg_marquardt(squares(), iterations=20, tolerance=0.0, rows=0.5, directions=2, **options)
else:
    result = train_stochastic(problem, Adam(0.02), batch_size=3, epochs=20, validation=problem.batch, **options)
parts = COMM_WORLD.gather([c for each in result.controls for c in (each if isinstance(each, list) else [each])])
if COMM_WORLD.rank == 0:
    columns = {f"{rank}_{k}": array for rank, arrays in enumerate(parts) for k, array in enumerate(arrays)}
    np.savez(FOLDER / "result.npz", values=result.values, **columns)
