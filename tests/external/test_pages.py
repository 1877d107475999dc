"""The page on PyTorch and JAX, and the examples in docstrings there, run where these are installed."""

import doctest
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from helpers import without_mpi

pytest.importorskip("torch")
pytest.importorskip("jax")
ROOT = Path(__file__).parents[2]


def test_the_code_on_the_page_runs_and_prints_what_it_says():
    command = [sys.executable, "docs/run_pages.py", "docs/howto/pytorch.md"]
    result = subprocess.run(command, cwd=ROOT, env=without_mpi(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.mark.parametrize("name", ["external.torch", "external.jax"])
def test_examples_in(name, capsys):
    module = import_module(f"fem_resnet.{name}")
    tested = doctest.testmod(module)
    assert tested.attempted and not tested.failed, capsys.readouterr().out
