"""Demos and the README's example do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
#: Every demo: each runs here in its short form, and in full under `slow`.
DEMOS = ["digits_on_a_disk.py"]
#: Scripts beside the demos that choose their settings and tabulate them; too long to run here.
OTHERS = ["digits_cross_validation.py", "digits_table.py"]


def run(*command, timeout):
    # What MPI left in this process's environment must not reach another mpiexec.
    leaked = re.compile(r"(OMPI_(?!MCA_rmaps|ALLOW)|PMIX_|OPAL_|PRTE_)")
    environment = {name: value for name, value in os.environ.items() if not leaked.match(name)}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout.splitlines()


def accuracy(lines):
    return float(re.fullmatch(r"test accuracy: (0\.\d{4})", lines[-1])[1])


def test_no_demo_is_missing_from_the_list():
    assert DEMOS
    assert sorted(path.name for path in (ROOT / "demos").glob("*.py")) == sorted(DEMOS + OTHERS)


@pytest.mark.parametrize("demo", DEMOS)
def test_demos_run_in_their_short_form(demo):
    assert accuracy(run(sys.executable, f"demos/{demo}", "--short", timeout=300)) >= 0.8


def test_the_example_of_the_readme_runs_as_printed(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "example.py").write_text(example)
    lines = run(sys.executable, tmp_path / "example.py", timeout=300)
    assert any("read right: 100%" in line for line in lines)


def test_the_readme_has_the_table_of_digits_that_its_script_wrote():
    table = (ROOT / "demos" / "digits_table.txt").read_text()
    assert table in (ROOT / "README.md").read_text()
    short = run(sys.executable, "demos/digits_table.py", "--short", timeout=300)

    def rows(lines):
        return [re.sub(r" \(.*", "", line.split(" | ")[0]) for line in lines if line.startswith("| ")]

    assert rows(short) == rows(table.splitlines()) and len(rows(short)) == 8


@pytest.mark.slow
def test_digits_are_read_as_well_in_parallel():
    """L-BFGS amplifies round-off: J agrees for 50 iterations, later only what is read does."""
    one = run(sys.executable, "demos/digits_on_a_disk.py", timeout=900)
    two = run("mpiexec", "-n", "2", sys.executable, "demos/digits_on_a_disk.py", timeout=900)
    assert min(accuracy(one), accuracy(two)) >= 0.975
    assert abs(accuracy(one) - accuracy(two)) <= 5 / 540 + 1e-4
    after_50 = [
        float(re.search(r"J after 50 iterations: ([\d.]+)", "\n".join(lines))[1]) for lines in (one, two)
    ]
    np.testing.assert_allclose(*after_50, rtol=1e-9)
