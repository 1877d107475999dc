"""A training by TAO on its way, one minimisation after the other, from checkpoint to checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from fem_resnet.arguments import integer, number
from fem_resnet.learning.elimination import ReducedToOthers
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.training.checkpoint import Numbers, State, TrainingCheckpoint, read_state, write_state
from fem_resnet.training.progress import Progress, Watch
from fem_resnet.training.tao import Minimiser, Start

__all__ = ["Course"]


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
        "iteration": partial(integer, least=0), "scale": partial(number, above=0), "share": partial(number, above=0),
        "first": partial(number, least=0), "seconds": partial(number, least=0),
    }  # fmt: skip

    def __init__(self, problem: LearningProblem):
        self._problem, self._clock = problem, time.perf_counter()
        self._sets = [(p, k) for p in problem.parameters for k in range(len(p.functions))]
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
        seconds = self._problem.net.Y.comm.bcast(self.seconds)
        numbers = {"iteration": self.iteration, "seconds": seconds, **since._asdict()}
        series = {name: np.array([getattr(each, name) for each in self.history]) for name in ("value", "gradient_norm")}
        state = State(numbers, series, {"controls": [p.read(k) for p, k in self._sets]})
        write_state(self._problem, "train", checkpoint, state)

    def go_on(self, path: Path) -> Start:
        """Take everything from a checkpoint."""
        state = read_state(self._problem, "train", path, self._NUMBERS, ("value", "gradient_norm"), ["controls"])
        iteration, values, norms = state.numbers["iteration"], *state.series.values()
        if not len(values) == len(norms) == iteration + 1:
            raise ValueError(f"resume: {path} is no checkpoint to go on from: expected {iteration + 1} values of J")
        for (p, k), c in zip(self._sets, state.coefficients["controls"]):
            p.write(k, c)
        self.history = [Progress(n, iteration, float(J), float(g), 0.0) for n, (J, g) in enumerate(zip(values, norms))]
        self._clock -= state.numbers["seconds"]
        return Start(*(state.numbers[name] for name in Start._fields))
