"""The result of a verification: checks, a table with one line for each, JSON, and a picture of the convergence lines."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fem_resnet.reporting import as_html, as_json, picture, table

__all__ = ["Check", "Checks", "Line", "Report"]


@dataclass(frozen=True)
class Check:
    """One number, compared with a bound.

    Attributes
    ----------
    group : str
        The kind of check.
    name : str
        What is checked.
    value : float or None
        The number that was found, mostly a relative difference; None if there is none.
    bound : float or None
        The largest value that passes.
    passed : bool
        Whether the check passed. A check that was left out has passed; `note` says why it was left out.
    note : str
        More numbers, such as observed rates; or a reason.
    problem : str
        The name of the built-in problem, if the built-in problems were verified.
    """

    group: str
    name: str
    value: float | None
    bound: float | None
    passed: bool
    note: str = ""
    problem: str = ""

    @classmethod
    def of(cls, group: str, name: str, value: float, bound: float, note: str = "") -> Check:
        """A check that a value does not exceed its bound; NaN does."""
        return cls(group, name, float(value), float(bound), bool(value <= bound), note)

    @classmethod
    def left_out(cls, group: str, name: str, reason: str) -> Check:
        """A check that does not apply, with the reason."""
        return cls(group, name, None, None, True, f"left out: {reason}")

    @classmethod
    def broken(cls, group: str, name: str, error: Exception) -> Check:
        """A check that ended with an error."""
        return cls(group, name, None, None, False, f"{type(error).__name__}: {error}")

    @property
    def verdict(self) -> str:
        """One of "ok", "FAIL" and "-", which stands for a check that was left out."""
        if not self.passed:
            return "FAIL"
        return "-" if self.value is None else "ok"


#: What a group of checks is: they are made one by one.
Checks = Generator[Check, None, None]


@dataclass(frozen=True)
class Line:
    """A remainder at several steps, from which a convergence line is drawn.

    Attributes
    ----------
    name : str
        What remains.
    order : int
        The rate at which it falls if all is right.
    steps, values : tuple of float
        The steps, and the remainder at each of them.
    problem : str
        As in `Check`.
    """

    name: str
    order: int
    steps: tuple[float, ...]
    values: tuple[float, ...]
    problem: str = ""

    @property
    def rate(self) -> float | None:
        """The observed rate: the median over neighbouring steps with values above round-off; None if there are too few."""
        values, steps = np.array(self.values), np.array(self.steps)
        keep = values > 0
        if keep.sum() < 2:
            return None
        return float(np.median(np.diff(np.log(values[keep])) / np.diff(np.log(steps[keep]))))


@dataclass(repr=False)
class Report:
    """All checks of one verification.

    Attributes
    ----------
    title : str
        What was verified.
    checks : list of Check
        All checks, in the order in which they were made.
    lines : list of Line
        Remainders of the Taylor tests, and differences of co-states.
    seconds : float
        Wall time.
    """

    title: str
    checks: list[Check] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all checks have passed."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that have not passed."""
        return [check for check in self.checks if not check.passed]

    @property
    def _verdict(self) -> str:
        failed = len(self.failures)
        verdict = "all passed" if self.passed else f"{failed} FAILED"
        return f"{len(self.checks)} checks in {self.seconds:.1f} s: {verdict}"

    def __repr__(self) -> str:
        return f"Report({self.title}; {self._verdict})"

    def __str__(self) -> str:
        return "\n".join([self.title, *table(*self._table()), self._verdict])

    def _repr_html_(self) -> str:
        return as_html(self.title, *self._table(), [self._verdict])

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The header and the rows, one a check."""
        several = any(check.problem for check in self.checks)
        rows = [
            (
                *([check.problem] if several else []),
                check.group,
                check.name,
                "" if check.value is None else f"{check.value:.1e}",
                "" if check.bound is None else f"{check.bound:.0e}",
                check.verdict,
                check.note,
            )
            for check in self.checks
        ]
        return (*(["problem"] if several else []), "check", "of", "found", "bound", "", ""), rows

    def to_json(self) -> str:
        """The report as JSON: `title`, `passed`, `seconds`, `checks` and `lines` with their fields."""
        return as_json(
            {
                "title": self.title,
                "passed": self.passed,
                "seconds": self.seconds,
                "checks": [asdict(check) for check in self.checks],
                "lines": [asdict(line) | {"rate": line.rate} for line in self.lines],
            }
        )

    def draw(self, path: str | Path) -> None:
        """Draw the convergence lines, a PNG. Call it on one rank."""
        lines = [line for line in self.lines if any(value > 0 for value in line.values)]
        colours = {order: f"C{n}" for n, order in enumerate(sorted({line.order for line in lines}))}
        with picture(path, 7.5, 5.5) as figure:
            axes = figure.add_subplot()
            for order, colour in colours.items():
                of_order = [line for line in lines if line.order == order]
                for n, line in enumerate(of_order):
                    steps, values = np.array(line.steps), np.array(line.values)
                    label = f"falls at rate {order}: {len(of_order)}" if n == 0 else None
                    axes.loglog(steps[values > 0], values[values > 0], "o-", ms=3, lw=1, color=colour, alpha=0.6, label=label)
            axes.set_xlabel("step")
            axes.set_ylabel("remainder")
            axes.set_title(self.title, fontsize="medium")
            if lines:
                axes.legend()
