"""J and its whole gradient: this package compared with the tools that a user would take instead.

    containers/run python tests/benchmarks/gradient.py [--quick] [--json FILE] [--sizes N,r,S,L ...] [--only SIDE,SIDE ..] \
        [--one-at-a-time]

README.md beside this file says what is measured and how to read the table.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median

import data
import environment
import roofline
import table
from sides import INEXACT, LARGEST, OUR_LAYERS, OURS, Side, SideFailed, is_peer
from worker import SIDES

#: (N nodes, rank, samples, layers).
SIZES = [
    (1024, 16, 1, 16), (65536, 16, 1, 16), (4096, 16, 256, 16), (65536, 16, 32, 16), (512, 32, 1257, 8),
    (1048576, 32, 4, 8),
]  # fmt: skip
#: The reference for all sides; always run and timed.
REFERENCE = "numpy"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the three sizes of least work")
    parser.add_argument("--sizes", nargs="+", metavar="N,r,S,L", help="these sizes instead")
    parser.add_argument("--only", metavar="SIDE,..", help=f"of {', '.join(SIDES)}; fem_resnet for all of ours")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="a side takes its turns alone, as where memory would not last for all"
    )
    parser.add_argument("--repetitions", type=int, default=7, help="turns of each side (7), fewer where they take long")
    parser.add_argument("--budget", type=float, default=60, help="seconds a size that all turns together may take (60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    given = parser.parse_args()
    given.sizes = [tuple(map(int, size.split(","))) for size in given.sizes] if given.sizes else SIZES
    if given.quick:
        given.sizes = sorted(given.sizes, key=lambda size: roofline.work(*size)["flops"])[:3]
    names = given.only.split(",") if given.only else list(SIDES)
    if "fem_resnet" in names:
        names[names.index("fem_resnet") : names.index("fem_resnet") + 1] = OURS + OUR_LAYERS
    if unknown := set(names) - set(SIDES):
        parser.error(f"--only: {', '.join(sorted(unknown))} is no side; there are fem_resnet, {', '.join(SIDES)}")
    given.sides = [REFERENCE, *(name for name in SIDES if name in names and name != REFERENCE)]
    return given


#: Seconds of a turn with short evaluations, and the largest number of these.
TURN, MOST_A_TURN = 0.1, 20


def take_turns(sides: list[Side], repetitions: int, budget: float) -> dict[str, str]:
    """Let the sides take turns, with new parameters for each evaluation; then ask for their memory.

    Where an evaluation is short it is repeated in its turn, as it is in training: else caches are those of the side before.

    Returns why sides ended before their time, as they do where memory does not last for all; they are not among `sides`
    afterwards.
    """
    failed = {}

    def of_each(question) -> list:
        answers = []
        for side in list(sides):
            try:
                answers.append(question(side))
            except SideFailed as error:
                failed[side.name] = str(error)
                sides.remove(side)
                side.end()
        return answers

    def turn(side: Side) -> None:
        for _ in range(max(1, min(MOST_A_TURN, int(TURN / side.expected)))):
            side.ask(f"scale {0.5 if len(side.seconds) % 2 == 0 else 2.0}")
            side.seconds.append(side.ask("evaluate")["seconds"])

    def expect(side: Side) -> float:
        side.expected = side.ask("evaluate")["seconds"]
        return side.expected

    expected = sum(of_each(expect))
    for _ in range(max(3, min(repetitions, int(budget / max(expected, 1e-3))))):
        of_each(turn)
    for side, answer in zip(sides, of_each(lambda side: side.ask("memory"))):
        side.peak_bytes, side.evaluation_bytes = answer["bytes"], answer["evaluation_bytes"]
    return failed


class Measurement:
    """Measure one size: sides are compared with the reference, and timed if they agree."""

    def __init__(self, size: tuple[int, int, int, int], folder: Path, given: argparse.Namespace):
        self._folder, self._given = folder, given
        self.measured: list[Side] = []
        self.failed: dict[str, str] = {}
        nodes, _, samples, layers = size
        data.write(folder, *size)
        self._names = []
        for name in given.sides:
            if nodes * samples * layers > LARGEST.get(name, float("inf")):
                self.failed[name] = "left out: too large for it"
            else:
                self._names.append(name)
        self.one_at_a_time = given.one_at_a_time or not fit_together(size, self._names)

    def run(self) -> None:
        if self.one_at_a_time:
            for name in self._names:
                self._together([name], self._given.budget / len(self._names))
            return
        self._together(self._names, self._given.budget)
        for name in [name for name in self._names if name in self._ended]:
            why = self._ended[name]
            self._together([name], self._given.budget / len(self._names))
            if name in self.failed:
                self.failed[name] += f"; among the others: {why}"

    def _together(self, names: list[str], budget: float) -> None:
        """Start these sides, and let all that agree with the reference take turns."""
        ready: list[Side] = []
        self._ended: dict[str, str] = {}
        try:
            for name in names:
                side = Side.start(name, self._folder)
                ready.append(side)
                self.failed.pop(name, None)
                try:
                    side.first = side.ask("prepare")
                    if name == REFERENCE:
                        self._J, self._gradient = side.first["J"], side.gradient(self._folder)
                    side.compare(self._J, self._gradient, self._folder)
                    if side.agrees:
                        continue
                    self.failed[name] = f"disagrees: {', '.join(f'{k} by {e:.1e}' for k, e in side.errors.items())}"
                except SideFailed as error:
                    if name == REFERENCE:
                        raise
                    self._ended[name] = str(error)
                ready.remove(side)
                side.end()
            self._ended |= take_turns(ready, self._given.repetitions, budget)
            self.failed |= self._ended
            self.measured += ready
        finally:
            for side in ready:
                side.end()


def fit_together(size: tuple[int, int, int, int], names: list[str]) -> bool:
    """Whether memory suffices for all sides at once, as far as one can know.

    Peers keep about five fields a stage, as PyTorch was seen to do, and do not give back all of what they have freed.
    """
    nodes, _, samples, layers = size
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return 5 * 8 * nodes * samples * roofline.STAGES * layers * sum(map(is_peer, names)) < available


def measure(size: tuple[int, int, int, int], given: argparse.Namespace, rates: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        measurement = Measurement(size, Path(folder), given)
        measurement.run()
    order = list(SIDES)
    sides = sorted(measurement.measured, key=lambda side: order.index(side.name))
    return record(size, sides, measurement.failed, rates) | {"one_at_a_time": measurement.one_at_a_time}


def record(size, sides: list[Side], failed: dict[str, str], rates: dict) -> dict:
    """The measurements of one size for --json."""
    found = {
        "size": list(size),
        "seconds": {side.name: min(side.seconds) for side in sides},
        "median_seconds": {side.name: median(side.seconds) for side in sides},
        "turns": {side.name: len(side.seconds) for side in sides},
        "first_call_seconds": {side.name: side.first["seconds"] for side in sides},
        "setup_seconds": {side.name: side.first["setup_seconds"] for side in sides},
        "peak_bytes": {side.name: side.peak_bytes for side in sides},
        "evaluation_bytes": {side.name: side.evaluation_bytes for side in sides},
        "errors": {side.name: side.errors for side in sides},
        "failed": failed,
        "inexact": sorted(INEXACT & {side.name for side in sides}),
    }
    ours = [name for name in OURS if name in found["seconds"]]
    for combined, names in (("fem_resnet", OURS), ("fem_resnet_layers", OUR_LAYERS)):
        there = [name for name in names if name in found["seconds"]]
        if there:
            best = min(there, key=found["seconds"].get)
            for values in ("seconds", "median_seconds", "first_call_seconds", "peak_bytes", "evaluation_bytes"):
                found[values][combined] = found[values][best]
            found[f"{combined}_is"] = best
    asked = roofline.work(*size)
    found["roofline"] = {
        "work": asked,
        "rates": rates,
        "bound_seconds": {cores: roofline.bound(asked, of)["seconds"] for cores, of in rates.items()},
        "parts": {cores: roofline.bound(asked, of) for cores, of in rates.items()},
    }
    found["roofline"]["fraction"] = {
        name: found["roofline"]["bound_seconds"][name.rpartition("_")[2]] / found["seconds"][name] for name in ours
    }
    return found


def main() -> None:
    given = arguments()
    # Each side gets two cores, even if there are more.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    if any(is_peer(name) for name in given.sides):
        environment.install()
    rates = roofline.machine()
    table.print_machine(rates)
    results = []
    for size in given.sizes:
        results.append(measure(size, given, rates))
        table.print_size(results[-1])
        if given.json:
            given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
