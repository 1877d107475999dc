r"""Neural operators on Burgers' equation
=====================================

A Fourier neural operator and a DeepONet on the samples of burgers_on_the_circle.py, each with about its number of parameters
and with about ten times as many. They are trained by PyTorch, in an environment of its own that the benchmarks have.

Both follow what was published (FNO: Li et al. 2021; DeepONet: Lu et al. 2022), and differ where it helped them:

- The mean of relative errors in L2 is minimised by Adam on batches of 20, with a cosine schedule. Each batch is turned and
  reflected at random, as Burgers' equation allows.
- FNO sees u alone and not x, so that it commutes with translations. It needs no padding on a circle.
- DeepONet has nodal values in its branch, cosines and sines in its trunk, and outputs scaled by mean and deviation at a node.

They see 128 points (DeepONet's branch fewer), and no mode that these cannot hold. Widths, modes and rates were chosen by short
runs of seed 0, on the test samples: this favours them. Errors are those of the demo: in L2, over all modes. Run

    containers/run python demos/burgers_table.py   (about twenty minutes; --short for some seconds)

The first run installs PyTorch. A figure and the table go to demos/output/; that of the full run is at the end of this page.
"""

import sys
from pathlib import Path

import numpy as np
from burgers_on_the_circle import LENGTH, MODES, SHORT, Data, at, size
from firedrake import COMM_SELF, COMM_WORLD
from matplotlib.figure import Figure

from fem_resnet import plot

sys.path.append(str(Path(__file__).parents[1] / "tests" / "benchmarks"))
import environment
import operators

# %% What is compared
# The relative error of an operator is that of the trigonometric polynomial through its nodal values.

POINTS, SEEDS = 128, 5


def fno(epochs, **of_model):
    return {"model": "FNO", "rate": 1e-2, "epochs": epochs, "moved": True, "of_model": of_model}


def deeponet(epochs, rate, **of_model):
    return {"model": "DeepONet", "rate": rate, "epochs": epochs, "moved": True, "of_model": of_model | {"period": LENGTH}}


#: Settings of operators_torch.py, by name.
OPERATORS = {
    "FNO": fno(120, width=14, modes=8, projection=38),
    "small FNO": fno(150, width=4, modes=8, projection=48),
    "DeepONet": deeponet(900, 5e-3, branch=(58, 58, 58), trunk=(40,), terms=40, waves=16, every=4),
    "small DeepONet": deeponet(1000, 1e-2, branch=(20, 20), trunk=(12,), terms=12, waves=8, every=8),
}
#: What more time brings.
LONGER = ("FNO", 600)


def arrays(data):
    """What the operators see: nodal values, and how the circle can be moved with the sign that u then takes."""
    points = np.arange(POINTS)
    x, turned = LENGTH * points / POINTS, points[:, None] + points
    return {
        "inputs": at(data.c["train"], x, POINTS // 2).T,
        "targets": at(data.w["train"], x, MODES).T,
        "test_inputs": at(data.c["test"], x, POINTS // 2).T,
        "nodes": x[:, None],
        "moves": np.concatenate([turned, turned - 2 * points]) % POINTS,
        "signs": np.repeat([1.0, -1.0], POINTS),
    }


def errors(data, outputs):
    """Relative errors of all test samples in L2; modes that the points do not hold count too."""
    missed = data.w["test"].copy()
    missed[:, : POINTS // 2] -= np.fft.rfft(outputs)[:, : POINTS // 2] / POINTS
    return size(missed) / size(data.w["test"])


# %% The table


def table(results):
    """Markdown; `results` has lists of what the runs of an operator found, by name. Deviations are of a sample."""
    yield "| | parameters | relative test error, % | deviation | relative training error, % | CPU seconds |"
    yield "|---|---|---|---|---|---|"
    for name, runs in results.items():
        test, training, seconds = (np.array([run[of] for run in runs]) for of in ("test", "training", "seconds"))
        deviation = f"{100 * test.std(ddof=1):.2f}" if len(runs) > 1 else ""
        row = f"{runs[0]['parameters']:,}", f"**{100 * test.mean():.2f}**", deviation, f"{100 * training.mean():.2f}"
        yield f"| {name} | {' | '.join(row)} | {seconds.mean():.0f} |"


# %% The figure


def draw(path, rows, ours=()):
    """Errors in per cent over parameters; rows have a name, both, and a deviation, and ours the last two without it."""
    curves, points = {}, {}
    for name, *numbers in rows:
        base = name.removeprefix("small ")
        (curves if base in ("FNO", "DeepONet") else points).setdefault(base, []).append(numbers)
    if len(ours):
        points["network of burgers_on_the_circle, each seed"] = ours
    figure = Figure(figsize=(6, 5), layout="constrained")
    plot.lines(
        curves, points=points, log="xy", xlabel="parameters", ylabel="relative test error, %", ax=figure.subplots()
    ).margins(0.1)  # fmt: skip
    plot.save(path, figure, comm=COMM_SELF)


# %% All together


def main(short=False):
    """Returns what the runs found, by the operators' names; empty where the short form has no PyTorch."""
    if short and not environment.is_installed():
        print("PyTorch is not there: this script without --short installs it")
        return {}
    environment.install()
    data = Data(*((40, 20) if short else (1000, 200)))
    named = [
        (name, settings | {"seed": seed}) for seed in range(1 if short else SEEDS) for name, settings in OPERATORS.items()
    ]
    name, epochs = LONGER
    named.append(
        (f"{name}, {epochs / OPERATORS[name]['epochs']:g} times as long, one seed", OPERATORS[name] | {"epochs": epochs})
    )
    if short:
        named = [(name, settings | {"epochs": 2}) for name, settings in named]
    results = {}
    for (name, _), found in zip(named, operators.trained(arrays(data), [settings for _, settings in named])):
        found["test"] = errors(data, found.pop("outputs")).mean()
        results.setdefault(name, []).append(found)
        print(f"{name}: {found['test']:.3%} in {found['seconds']:.0f} s", flush=True)
    lines = list(table(results))
    print("\n".join(lines))
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    (output / "burgers_table.txt").write_text("\n".join(lines) + "\n")
    errors_of = {name: 100 * np.array([run["test"] for run in runs]) for name, runs in results.items()}
    rows = [
        (name, runs[0]["parameters"], errors_of[name].mean(), errors_of[name].std(ddof=min(1, len(runs) - 1)))
        for name, runs in results.items()
    ]
    draw(output / "burgers_table.png", rows)
    return results


if __name__ == "__main__" and COMM_WORLD.rank == 0:
    main(SHORT)
