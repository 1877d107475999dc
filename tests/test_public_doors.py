"""Every public door refuses what is wrong by the name of the argument, and all ranks refuse together.

The doors stand in `doors_of_networks.py` and `doors_of_theory.py`. A wrong argument ends in a TypeError or a ValueError
whose message begins with the argument's name; where an argument is taken, no result is NaN. An argument that must be the
same on all ranks, given otherwise on one, is a ValueError of its name on all of them.
"""

import dataclasses
import inspect
import re

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD

import doors_of_networks
import doors_of_theory
import fem_resnet
from doors import WRONG, another

DOORS = doors_of_networks.DOORS | doors_of_theory.DOORS
#: Public names that are not called with arguments from outside: what they are.
NO_DOORS: dict[str, str] = {}


CASES = [
    pytest.param(name, argument, id=f"{name}-{argument}", marks=[pytest.mark.slow] if door.dear else [])
    for name, door in DOORS.items()
    for argument in door.sound()
]


def test_each_public_name_has_a_door_or_says_why_it_has_none():
    doors = {name.split(".")[0] for name in DOORS}
    assert set(fem_resnet.__all__) == doors | set(NO_DOORS)
    assert not doors & set(NO_DOORS)


def test_rows_give_every_argument():
    for name, door in DOORS.items():
        given = list(door.sound())
        try:
            wanted = [
                parameter.name
                for parameter in inspect.signature(door.call).parameters.values()
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            ]
        except ValueError:  # no signature to be had
            continue
        assert given == wanted, name
        assert set(door.takes) | set(door.parted) | set(door.another) <= set(given), name


def holds_nan(result, depth=3) -> bool:
    """Whether numbers in a result are NaN."""
    if isinstance(result, (float, complex, np.ndarray, np.generic)):
        array = np.asarray(result)
        return array.dtype.kind in "fc" and bool(np.isnan(array).any())
    if isinstance(result, fd.Function):
        return bool(np.isnan(result.dat.data_ro).any())
    if depth and isinstance(result, (list, tuple)):
        return any(holds_nan(part, depth - 1) for part in result)
    if depth and dataclasses.is_dataclass(result):
        return any(holds_nan(getattr(result, part.name, None), depth - 1) for part in dataclasses.fields(result))
    return False


@pytest.mark.parametrize("name, argument", CASES)
def test_a_wrong_argument_is_refused_by_name(name, argument):
    door = DOORS[name]
    wrong = []
    for kind, make in WRONG.items():
        try:
            result = door.call(**door.sound() | {argument: make()})
        except (TypeError, ValueError) as error:
            if not re.match(rf"{argument}\b", str(error)):
                wrong.append(f"{kind}: {type(error).__name__}: {error}")
        except Exception as error:
            wrong.append(f"{kind}: {type(error).__name__}: {error}")
        else:
            if kind not in door.takes.get(argument, ()):
                wrong.append(f"{kind}: taken")
            elif holds_nan(result):
                wrong.append(f"{kind}: NaN")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("name, argument", CASES)
def test_an_argument_that_one_rank_gives_otherwise_is_refused_on_all(name, argument):
    door = DOORS[name]
    given = door.sound()
    other = door.another[argument] if argument in door.another else another(given[argument])
    if argument in door.parted or other is None:
        pytest.skip("it is not the same on all ranks, or there is nothing else to give")
    if COMM_WORLD.rank == COMM_WORLD.size - 1:
        given[argument] = other
    with pytest.raises(ValueError, match=rf"^{argument}\b.*all ranks must give the same"):
        door.call(**given)
