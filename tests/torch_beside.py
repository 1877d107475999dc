"""A Python with torch, onnx and ONNX Runtime, and without Firedrake: the environment of the benchmarks' peers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python() -> Path:
    """Its interpreter; a test that asks for it is skipped where it is not there."""
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    try:
        import environment
    finally:
        sys.path.pop(0)
    if not environment.is_installed():
        pytest.skip("the peers' environment is not there; demos/burgers_table.py makes it")
    return environment.python()


def run(*arguments, cwd=None) -> str:
    """What a script of it prints; it sees the package, but none of what is installed with Firedrake."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([str(python()), *map(str, arguments)], env=environment, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout
