"""Demos do what they say; the README's example is run by test_docs.py."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import without_mpi

ROOT = Path(__file__).parents[1]
#: Scripts beside the demos that choose their settings and tabulate them; too long to run here.
OTHERS = ["burgers_table.py", "digits_cross_validation.py", "digits_table.py"]
#: Those of the demos' files that Git keeps and that a demo might write, with the time of their last change.
KEPT = {
    path: path.stat().st_mtime_ns
    for folder in ("demos", "demos/atlas", "docs/figures")
    for path in (ROOT / folder).iterdir()
    if path.suffix in (".txt", ".json", ".png")
}
#: Their full runs train baselines too: half an hour or more.
ATLAS = ["heat_on_a_gear.py", "darcy_on_a_plate.py", "waves_on_the_sphere.py", "outlines_on_the_circle.py", "few_samples.py"]
#: Every demo: each runs here in its short form, and asserts at its end what it claims.
DEMOS = sorted(path.name for path in (ROOT / "demos").glob("*.py") if path.name not in OTHERS)


def run(*command, timeout):
    result = subprocess.run(command, env=without_mpi(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout.splitlines()


def accuracy(lines):
    return float(re.fullmatch(r"test accuracy: (0\.\d{4})", lines[-1])[1])


def in_short(demo):
    return pytest.mark.command(sys.executable, f"demos/{demo}", "--short")


@pytest.mark.whole
@pytest.mark.parametrize("demo", [pytest.param(demo, marks=in_short(demo)) for demo in DEMOS])
def test_demos_run_in_their_short_form(demo, printed):
    assert printed
    assert [str(path) for path, changed in KEPT.items() if path.stat().st_mtime_ns != changed] == []


@in_short("digits_cross_validation.py")
def test_the_search_for_settings_has_a_short_form(printed):
    """One step of one search: the start, another value, and what was chosen."""
    assert len(printed) > 2 and printed[-1].startswith("chosen: ")


@pytest.mark.whole
@pytest.mark.parametrize("demo", [*DEMOS, *OTHERS])
def test_demos_know_the_short_form_and_write_below_their_own_folder(demo):
    """Whatever a demo names relative to itself is the folder of what it writes, or something that it reads."""
    text = (ROOT / "demos" / demo).read_text()
    assert "--short" in text
    named = re.findall(r"__file__\)(.*)", text)
    written = [part for part in named if part.startswith('.parent / "output"')]
    read = [part for part in named if re.match(r'\.parent / "atlas"|\.parents\[1\] / "(meshes|tests)"', part)]
    assert written and len(written) + len(read) == len(named), named


@pytest.mark.parametrize("demo", DEMOS)
def test_demos_end_with_an_assertion_of_what_they_claim(demo):
    (main,) = [
        node
        for node in ast.parse((ROOT / "demos" / demo).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    ]
    assert any(isinstance(node, ast.Assert) for node in main.body[-4:])


@pytest.mark.slow
@pytest.mark.parametrize("demo", [demo for demo in DEMOS if demo not in ("digits_on_a_disk.py", "untuned.py", *ATLAS)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_demos_hold_in_full(demo, ranks):
    assert run("mpiexec", "-n", str(ranks), sys.executable, f"demos/{demo}", timeout=900)


def test_the_readme_has_the_errors_of_burgers_that_its_scripts_wrote():
    """Error and seconds of each row of the README's table are those of the two tables."""
    lines = [line.split() for line in (ROOT / "demos" / "burgers_on_the_circle.txt").read_text().splitlines() if "%" in line]
    ours = {" ".join(words[:2]): words for words in lines}
    mean = next(words for words in lines if words[2] == "mean")
    deeper = next(words for words in lines if words[2] == "from")
    start = next(words for words in lines if words[2:4] == ["seed", deeper[4]])
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "demos" / "burgers_table.txt").read_text().splitlines()[2:]]
    runs = {row[0]: (row[2].strip("*"), row[1], row[-1]) for row in rows}  # error, parameters, seconds
    both = [[", ".join(pair) for pair in zip(runs[f"small {name}"], runs[name])] for name in ("DeepONet", "FNO")]
    plain = [(ours[name][2].rstrip("%"), "", ours[name][3]) for name in ("linear map", "kernel ridge")]
    bold = [(f"**{error.rstrip('%')}**", f"{int(count):,}", seconds) for count, error, seconds in (
        (mean[3], mean[4], mean[5]), (deeper[5], deeper[6], str(int(start[-1]) + int(deeper[7]))),
    )]  # fmt: skip
    columns = [*plain, *both, next(run for name, run in runs.items() if "one seed" in name), *bold]
    expected = [
        f"| {what} | {' | '.join(column[k] for column in columns)} |"
        for k, what in enumerate(("relative test error, %", "parameters", "CPU seconds"))
    ]
    readme = (ROOT / "README.md").read_text()
    assert [row for row in expected if row not in readme] == []


@in_short("digits_table.py")
def test_the_readme_has_the_table_of_digits_that_its_script_wrote(printed):
    table = (ROOT / "demos" / "digits_table.txt").read_text()
    assert table in (ROOT / "README.md").read_text()

    def rows(lines):
        return [re.sub(r" \(.*", "", line.split(" | ")[0]) for line in lines if line.startswith("| ")]

    assert rows(printed) == rows(table.splitlines()) and len(rows(printed)) == 9


@pytest.mark.slow
def test_the_table_of_the_costate_is_what_its_demo_prints():
    """Up to the digits of round-off."""

    def numbers(lines):
        rows = [line.split("|")[:3] for line in lines if "|" in line]
        return [row[0] for row in rows], [float(x) for row in rows[1:] for part in row[1:] for x in part.split()]

    printed = numbers(run(sys.executable, "demos/costate_twice.py", timeout=900))
    documented = numbers((ROOT / "demos" / "costate_twice.txt").read_text().splitlines())
    assert printed[0] == documented[0] and len(printed[0]) == 49
    # Two digits of differences; those near 1e-10 have eigenfunctions behind them, which are good to as much.
    np.testing.assert_allclose(printed[1], documented[1], rtol=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("demo, rtol", [("mesh_independence", 0.1), ("same_network_other_mesh", 0.02), ("architectures", 0.1)])
def test_the_tables_of_iterations_and_orders_are_what_their_demos_print(demo, rtol):
    """Up to what round-off does to hundreds of iterations in plain numbers, and to the last of three digits of an error."""

    def words(lines):
        words = re.sub(r"[()]", "", "\n".join(lines)).split()
        numbers = [bool(re.fullmatch(r"[\d.]+(e[+-]\d+)?", word)) for word in words]
        others = [word for word, number in zip(words, numbers) if not number]
        return others, [float(word) for word, number in zip(words, numbers) if number]

    documented = words((ROOT / "demos" / f"{demo}.txt").read_text().splitlines())
    printed = words(run(sys.executable, f"demos/{demo}.py", timeout=900)[:-1])  # its time
    assert printed[0] == documented[0] and len(documented[1]) > 40
    np.testing.assert_allclose(printed[1], documented[1], rtol=rtol)


@pytest.mark.slow
def test_digits_are_read_as_well_in_parallel():
    """J of the short form agrees; in longer runs only what is read does, since relu and Adam amplify round-off."""

    def on_ranks(*options):
        command = [sys.executable, "demos/digits_on_a_disk.py", *options]
        return [run(*launcher, *command, timeout=900) for launcher in ((), ("mpiexec", "-n", "2"))]

    one, two = map(accuracy, on_ranks())
    assert min(one, two) >= 0.98 and abs(one - two) <= 5 / 540 + 1e-4
    pattern = r"J in the first epoch: ([\d.]+), in the last: ([\d.]+)"
    first, last = np.transpose([re.search(pattern, "\n".join(lines)).groups() for lines in on_ranks("--short")]).astype(float)
    np.testing.assert_allclose(*first, rtol=2e-6)
    np.testing.assert_allclose(*last, rtol=1e-3)


def test_the_readme_has_the_values_of_J_that_the_demo_of_ways_printed():
    table = (ROOT / "demos" / "four_ways_to_train.txt").read_text().split("\n\n")[0]
    found = [re.search(rf"^{way} +(\S+) +yes", table, re.M)[1] for way in ("MSA, extended", "L-BFGS in the box")]
    assert "J on an annulus: {}; L-BFGS in the box {} |".format(*found) in (ROOT / "README.md").read_text()


@in_short("burgers_table.py")
def test_the_table_of_operators_has_the_operators_that_its_script_trains(printed):
    """Their names and numbers of parameters; and it shows five seeds."""

    def rows(lines):
        return [line.split(" | ")[:2] for line in lines if line.startswith("| ")]

    table = (ROOT / "demos" / "burgers_table.txt").read_text().splitlines()
    assert len(rows(table)) == 6 and all(re.search(r"\| \*\*\d\.\d\d\*\* \| (\d\.\d\d)? \|", line) for line in table[2:])
    if "PyTorch is not there" in printed[-1]:
        pytest.skip(printed[-1])
    assert rows(printed) == rows(table)
