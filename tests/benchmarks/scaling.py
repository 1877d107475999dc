"""Strong and weak scaling of J and its gradient from 1 rank to more, one thread a rank.

    containers/run python tests/benchmarks/scaling.py [--ranks K ...] [--quick] [--json FILE]

Strong scaling has the sizes of `gradient.py`; weak scaling has a fixed number of nodes a rank. Numbers of ranks take turns,
and the best of all turns counts. Times of more ranks than cores mean nothing.
"""

import argparse
import json
from pathlib import Path

import evaluations
from gradient import SIZES

#: (nodes a rank, rank, samples, layers)
WEAK = [(1024, 16, 1, 16), (65536, 16, 1, 16), (4096, 16, 64, 16), (32768, 16, 32, 16), (524288, 32, 4, 8)]
QUICK_STRONG, QUICK_WEAK = [(2048, 8, 4, 2)], [(1024, 8, 4, 2)]


def measure(sizes: dict[int, list[evaluations.Size]], budget: float, rounds: int) -> dict[int, list[float]]:
    """The best times for each number of ranks at its sizes, in seconds."""
    runs = [{ranks: evaluations.best_seconds(each, ranks, budget) for ranks, each in sizes.items()} for _ in range(rounds)]
    return {ranks: [min(times) for times in zip(*(run[ranks] for run in runs))] for ranks in sizes}


def table(kind: str, sizes: list[tuple], seconds: dict[int, list[float]]) -> list[dict]:
    """Print and return one row a size, with the efficiency compared with one rank."""
    rows = []
    columns = "".join(f"{f'{ranks} rank' + 's' * (ranks > 1) + ', s':>14}{'efficiency':>12}" for ranks in seconds)
    print(f"{kind} scaling\n  {'':28}{columns}")
    for k, size in enumerate(sizes):
        times = {ranks: each[k] for ranks, each in seconds.items()}
        shares = {ranks: times[1] / time / (ranks if kind == "strong" else 1) for ranks, time in times.items()}
        cells = "".join(f"{times[ranks]:14.5f}{shares[ranks]:12.2f}" for ranks in times)
        print(f"  {str(size):28}{cells}", flush=True)
        rows.append({"kind": kind, "size": list(size), "seconds": times, "efficiency": shares})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], metavar="K", help="beside 1 (2)")
    parser.add_argument("--quick", action="store_true", help="one small size each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    all_ranks = sorted({1, *given.ranks})
    strong, weak = (QUICK_STRONG, QUICK_WEAK) if given.quick else (SIZES, WEAK)
    budget, rounds = (0.1, 1) if given.quick else (2.0, 2)
    sizes = {ranks: [(*s, 1) for s in strong] + [(s[0] * ranks, *s[1:], 1) for s in weak] for ranks in all_ranks}
    seconds = measure(sizes, budget, rounds)
    print("(N, rank, samples, layers); weak: N a rank")
    rows = table("strong", strong, {ranks: each[: len(strong)] for ranks, each in seconds.items()})
    rows += table("weak", weak, {ranks: each[len(strong) :] for ranks, each in seconds.items()})
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
