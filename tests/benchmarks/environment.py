"""The peers' environment: a venv of its own below ${FEM_RESNET_HOME:-$HOME/.fem-resnet}, made when it is missing."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).with_name("peers.txt")


def python() -> Path:
    """Its interpreter, whether it is there or not; another one for other pins."""
    home = Path(os.environ.get("FEM_RESNET_HOME", Path.home() / ".fem-resnet"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    mark = hashlib.sha256(PINS.read_bytes() + version.encode()).hexdigest()[:12]
    return home / f"peers-{mark}" / "bin" / "python"


def is_installed() -> bool:
    return (python().parent.parent / "complete").exists()


def install() -> None:
    """Make it; without CUDA where the index of CPU builds can be reached or pip finds one elsewhere."""
    if is_installed():
        return
    folder = python().parent.parent
    print(f"installing the peers into {folder}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, stdout=sys.stderr)
    pip = [str(python()), "-m", "pip", "install", "--quiet", "--retries", "1", "-r", str(PINS)]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    (folder / "complete").touch()
