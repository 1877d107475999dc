"""The environment of the peers: a venv below ${FEM_RESNET_HOME:-$HOME/.fem-resnet}, made if it is missing."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).with_name("peers.txt")


def python() -> Path:
    """The path of its interpreter, which may not exist yet; other pins have another path."""
    home = Path(os.environ.get("FEM_RESNET_HOME", Path.home() / ".fem-resnet"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    mark = hashlib.sha256(PINS.read_bytes() + version.encode()).hexdigest()[:12]
    return home / f"peers-{mark}" / "bin" / "python"


def is_installed() -> bool:
    return (python().parent.parent / "complete").exists()


def install() -> None:
    """Make it; without CUDA, if the index of CPU builds can be reached or pip finds a CPU build elsewhere."""
    if is_installed():
        return
    folder = python().parent.parent
    print(f"installing the peers into {folder}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, stdout=sys.stderr)
    pip = [str(python()), "-m", "pip", "install", "--quiet", "--retries", "1", "-r", str(PINS)]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    (folder / "complete").touch()
