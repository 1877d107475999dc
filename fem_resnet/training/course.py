"""A training by TAO on its way, one minimisation after the other, from checkpoint to checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fem_resnet.arguments import number
from fem_resnet.learning.elimination import ReducedToOthers
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.training.checkpoint import Numbers, State, TrainingCheckpoint, read_state, write_state
from fem_resnet.training.progress import Progress, Watch
from fem_resnet.training.tao import Minimiser, Start

__all__ = ["Course", "read_progress", "write_progress"]

_SERIES = ("value", "gradient_norm")


def write_progress(
    problem: LearningProblem, tool: str, checkpoint: TrainingCheckpoint, numbers: Mapping[str, float], history: list[Progress]
) -> None:
    """Write the present coefficients, what the iterations so far came to, and numbers of an algorithm. Collective."""
    seconds = problem.net.Y.comm.bcast(history[-1].seconds)
    series = {name: np.array([getattr(each, name) for each in history]) for name in _SERIES}
    coefficients = [p.read(k) for p in problem.parameters for k in range(len(p.functions))]
    write_state(problem, tool, checkpoint, State({"seconds": seconds, **numbers}, series, {"controls": coefficients}))


def read_progress(
    problem: LearningProblem, tool: str, path: Path, numbers: Numbers
) -> tuple[Mapping[str, Any], list[Progress]]:
    """Take the coefficients of a checkpoint; the numbers of the algorithm, and the iterations that were made. Collective.

    Raises
    ------
    ValueError
        As of `read_state`.
    """
    state = read_state(problem, tool, path, {"seconds": partial(number, least=0), **numbers}, _SERIES, ["controls"])
    values, norms = state.series.values()
    if len(values) != len(norms) or not len(values):
        raise ValueError(
            f"resume: {path} is no checkpoint to go on from: expected as many gradients as values of J, one or more, got "
            f"{len(norms)} and {len(values)}"
        )
    sets = [(p, k) for p in problem.parameters for k in range(len(p.functions))]
    for (p, k), c in zip(sets, state.coefficients["controls"]):
        p.write(k, c)
    seconds, most = state.numbers["seconds"], len(values) - 1
    return state.numbers, [Progress(n, most, float(J), float(g), seconds) for n, (J, g) in enumerate(zip(values, norms))]


class Course:
    """A training on its way from checkpoint to checkpoint. Collective.

    Attributes
    ----------
    history : list of Progress
        One for each iteration, from the first start.
    reason : str or None
        Why the monitor or Ctrl-C has stopped it; None if nothing has.
    """

    _NUMBERS: ClassVar[Numbers] = {
        "scale": partial(number, above=0), "share": partial(number, above=0), "first": partial(number, least=0)
    }  # fmt: skip

    def __init__(self, problem: LearningProblem):
        self._problem, self._clock = problem, time.perf_counter()
        self._begun = 0
        self.history: list[Progress] = []
        self.reason: str | None = None

    @property
    def iteration(self) -> int:
        """The number of iterations that were made."""
        return max(len(self.history) - 1, 0)

    @property
    def seconds(self) -> float:
        """Wall time since the first start, without the time between runs."""
        return time.perf_counter() - self._clock

    def teller(
        self, minimiser: Minimiser, projected: ReducedToOthers | None, watch: Watch
    ) -> Callable[[int, float, float], None]:
        """What a minimisation calls at each iteration."""
        self._begun = self.iteration

        def tell(iteration: int, value: float, gradient_norm: float) -> None:
            if projected is not None:
                projected.give_head()
            if iteration == 0 and self.history:  # the one at which the checkpoint was written
                return
            self.history.append(Progress(self._begun + iteration, minimiser.limit, value, gradient_norm, self.seconds))
            self.reason = watch.reason(self.history[-1])

        return tell

    def moved(self, iterations: int) -> bool:
        """Whether the latest minimisation made so many iterations, and the monitor lets it go on."""
        return self.reason is None and self.iteration - self._begun == iterations

    def write(self, checkpoint: TrainingCheckpoint, since: Start) -> None:
        """Write a checkpoint."""
        write_progress(self._problem, "train", checkpoint, since._asdict(), self.history)

    def go_on(self, path: Path) -> Start:
        """Take everything from a checkpoint."""
        numbers, self.history = read_progress(self._problem, "train", path, self._NUMBERS)
        self._clock -= numbers["seconds"]
        return Start(*(numbers[name] for name in Start._fields))
