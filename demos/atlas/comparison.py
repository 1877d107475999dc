"""What the demos of the atlas share: data that are made once, baselines, and tables of what methods came to.

A demo trains its network, asks `ridges` and `operators` for the baselines, and hands all that was found to an `Experiment`.
Its full run writes that to NAME.json, beside this file; page.py makes the atlas, a page of the documentation, of these files.
"""

import hashlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from firedrake import COMM_WORLD
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV

FOLDER = Path(__file__).parent
#: What is made, and can be made again; Git ignores it.
OUTPUT = FOLDER.parent / "output"

sys.path.append(str(FOLDER.parents[1] / "tests" / "benchmarks"))
import environment
import operators as in_pytorch

SEEDS = 5

# -- data ------------------------------------------------------------------------------------------------------------


def made_once(make: Callable[..., dict[str, np.ndarray]], *law) -> dict[str, np.ndarray]:
    """The arrays that `make(*law)` returns, the same on every rank; from a file if a former run has made them.

    Rank 0 makes them, on meshes of its own (COMM_SELF). They are made anew when the law changes, or the module of `make`.
    Collective over COMM_WORLD.
    """
    key = hashlib.sha256((inspect.getsource(sys.modules[make.__module__]) + repr(law)).encode()).hexdigest()[:16]
    path = OUTPUT / "data" / f"{make.__module__.split('.')[-1]}-{make.__name__}-{key}.npz"
    if COMM_WORLD.rank == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, **make(*law))
        part.rename(path)
    COMM_WORLD.barrier()
    with np.load(path) as arrays:
        return dict(arrays)


def relative_errors(found: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Errors in L2 over the norm of the target, one a sample; samples come first, weights are those of the points."""
    axes = tuple(range(1, targets.ndim))
    return np.sqrt((weights * (found - targets) ** 2).sum(axes) / (weights * targets**2).sum(axes))


# -- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a method came to: an error and CPU seconds of training for each seed, one where nothing is drawn.

    `parameters` is the number of real numbers that are learned; None where that says nothing, as for kernel ridge. `seconds`
    is empty for what others have published. `problem` says of which problem it is, where an experiment has several.
    """

    method: str
    errors: list[float]
    seconds: list[float] = field(default_factory=list)
    parameters: int | None = None
    problem: str = ""

    @property
    def mean(self) -> float:
        """Of the errors."""
        return float(np.mean(self.errors))

    @property
    def ours(self) -> bool:
        """Whether the method is the network."""
        return self.method.startswith(("network", "five networks"))

    def short(self) -> str:
        """The error in per cent, and whose."""
        count = "" if self.parameters is None else f", {self.parameters:,} parameters"
        return f"{100 * self.mean:.2f} ({self.method}{count})"

    def cells(self) -> list[str]:
        """A row of the table: method, parameters, error and deviation in per cent, seconds."""
        deviation = f"{100 * np.std(self.errors, ddof=1):.2f}" if len(self.errors) > 1 else ""
        count = "" if self.parameters is None else f"{self.parameters:,}"
        seconds = f"{np.mean(self.seconds):.0f}" if self.seconds else ""
        method = f"{self.problem}: {self.method}" if self.problem else self.method
        return [method, count, f"{100 * self.mean:.2f}", deviation, seconds]


@dataclass(frozen=True)
class Experiment:
    """A problem of the atlas, and all that was tried on it.

    `measure` says what `Result.errors` are, "relative error in L2" if nothing is said. More tables and remarks of the demo
    stand in `lines`.
    """

    problem: str
    domain: str
    law: str
    samples: str
    results: list[Result]
    lines: list[str] = field(default_factory=list)
    measure: str = "relative error in L2"

    def table(self) -> str:
        """Markdown; the smallest mean error of each problem is marked, whosever it is."""
        best = {
            result.problem: min(one.mean for one in self.results if one.problem == result.problem) for result in self.results
        }
        rows = [["", "parameters", f"{self.measure}, %", "deviation", "CPU seconds"], ["---"] * 5]
        for result in self.results:
            cells = result.cells()
            cells[2] = f"**{cells[2]}**" if result.mean == best[result.problem] else cells[2]
            rows.append(cells)
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def write(self, name: str) -> None:
        """NAME.json, for the page."""
        (FOLDER / f"{name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, name: str) -> "Experiment":
        """What `write` has written."""
        found = json.loads((FOLDER / f"{name}.json").read_text())
        return cls(**found | {"results": [Result(**result) for result in found["results"]]})


# -- baselines -------------------------------------------------------------------------------------------------------


def ridges(x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> Iterator[tuple[str, np.ndarray, float]]:
    """Name, predictions and CPU seconds of a linear map and of kernel ridge regression, both tuned by cross-validation.

    Samples are rows. The kernel is Gaussian; its width is sought around the size of the inputs. Multiply values by roots of
    weights, if these are to count.
    """
    middle, size = x.mean(axis=0), np.sqrt(((x - x.mean(axis=0)) ** 2).sum(axis=1).mean())
    u, u_test, offset, scale = (x - middle) / size, (x_test - middle) / size, y.mean(axis=0), y.std()
    searches = {
        "linear map": ("linear", {"alpha": np.logspace(-6, 1, 8)}),
        "kernel ridge": ("rbf", {"gamma": np.logspace(-2.5, 0.5, 13), "alpha": np.logspace(-10, -1, 7)}),
    }
    for name, (kernel, grid) in searches.items():
        start = time.process_time()
        search = GridSearchCV(KernelRidge(kernel=kernel), grid, cv=4, scoring="neg_mean_squared_error")
        model = search.fit(u, (y - offset) / scale)
        yield name, scale * model.predict(u_test) + offset, time.process_time() - start


def operators(
    arrays: dict[str, np.ndarray], settings: dict[str, dict], error: Callable[[np.ndarray], float], short: bool = False
) -> Iterator[Result]:
    """FNO and DeepONet by PyTorch, each with all seeds; on rank 0, and nothing on other ranks.

    `arrays` and `settings` are what tests/benchmarks/operators_torch.py describes, settings by the names of the methods;
    `error` says how wrong outputs for the test inputs are. In short, nothing is installed, and two epochs of one seed show
    that it runs.
    """
    if COMM_WORLD.rank != 0 or (short and not environment.is_installed()):
        return
    environment.install()
    seeds, fewer = (1, {"epochs": 2}) if short else (SEEDS, {})
    runs = [of_method | {"seed": seed} | fewer for of_method in settings.values() for seed in range(seeds)]
    found = in_pytorch.trained(arrays, runs)
    for method in settings:
        of_seeds = [next(found) for _ in range(seeds)]
        errors = [float(error(one["outputs"])) for one in of_seeds]
        yield Result(method, errors, [one["seconds"] for one in of_seeds], of_seeds[0]["parameters"])
