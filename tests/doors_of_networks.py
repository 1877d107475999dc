"""The doors of label domains, parameters, networks, problems and training; see `doors.py`."""

from __future__ import annotations

from functools import cache

import numpy as np
from helpers import label_space

from doors import Door
from fem_resnet import class_space, laplace_basis


@cache
def disk():
    return label_space("disk", "CG1")


DOORS = {
    "class_space": Door(
        class_space,
        lambda: {"classes": 4},
        takes={"classes": set()},
    ),
    "laplace_basis": Door(
        laplace_basis,
        lambda: {"Y": disk(), "rank": 3},
        parted=("Y",),
    ),
}
