"""Every public door refuses a wrong argument by its name, and all ranks refuse it together.

The doors stand in `doors_of_networks.py`, `doors_of_theory.py`, `doors_of_plot.py` and `doors_of_external.py`. A wrong
argument ends in a TypeError or a ValueError whose message begins with the argument's name; where an argument is taken, no
result is NaN. An argument that must be the same on all ranks, given otherwise on one, is a ValueError of its name on all.
"""

import doors_of_external
import doors_of_networks
import doors_of_plot
import doors_of_theory
import numpy as np
import pytest
from doors import WRONG, fault
from firedrake import COMM_WORLD

import fem_resnet

DOORS = doors_of_networks.DOORS | doors_of_theory.DOORS | doors_of_plot.DOORS | doors_of_external.DOORS
#: Public names that are not called with arguments from outside: what they are.
NO_DOORS = doors_of_networks.NO_DOORS | doors_of_theory.NO_DOORS
#: The kinds of wrong arguments that the default run tries at a door whose calls take seconds.
FEW = ("an object", "a string", "NaN", "an array of another shape")

EVERY = [pytest.param(name, id=name) for name in DOORS]
BUT_DEAR = [pytest.param(name, id=name, marks=[pytest.mark.slow] if door.dear else []) for name, door in DOORS.items()]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Functions that take the name of a file or folder do not make it in the working folder."""
    monkeypatch.chdir(tmp_path)


def test_each_public_name_has_a_door_or_says_why_it_has_none():
    pictures = set(doors_of_plot.DOORS) | set(doors_of_plot.NO_DOORS)
    assert {f"plot.{name}" for name in fem_resnet.plot.__all__} == pictures
    inside = set(doors_of_external.DOORS)
    public = {f"external.{name}" for module in doors_of_external.MODULES for name in module.__all__}
    assert public == {".".join(name.split(".")[:2]) for name in inside} | set(doors_of_external.NO_DOORS)
    doors = {name.split(".")[0] for name in set(DOORS) - pictures - inside}
    assert set(fem_resnet.__all__) == doors | set(NO_DOORS)
    assert not doors & set(NO_DOORS)


@pytest.mark.whole
@pytest.mark.parametrize("name", EVERY)
def test_a_row_gives_every_argument(name):
    door = DOORS[name]
    given, wanted = list(door.sound()), door.signature()
    assert wanted is None or given[: len(wanted)] == wanted
    assert set(door.takes) | set(door.parted) | set(door.another) | set(door.called) | set(door.through) <= set(given)
    assert {kind for kinds in door.takes.values() for kind in kinds} <= set(WRONG)


def faults(name, kinds) -> list[str]:
    door = DOORS[name]
    each = ((argument, kind, fault(door, {argument: kind})) for argument in door.arguments() for kind in kinds)
    return [f"{argument}, {kind}: {amiss}" for argument, kind, amiss in each if amiss is not None]


@pytest.mark.whole
@pytest.mark.parametrize("name", EVERY)
def test_a_sound_call_is_taken(name):
    door = DOORS[name]
    door.call(**door.sound())


@pytest.mark.whole
@pytest.mark.parametrize("name", EVERY)
def test_a_wrong_argument_is_refused_by_name(name):
    amiss = faults(name, FEW if DOORS[name].dear else WRONG)
    assert not amiss, "\n".join(amiss)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, door in DOORS.items() if door.dear])
def test_any_wrong_argument_of_a_dear_door_is_refused_by_name(name):
    amiss = faults(name, WRONG)
    assert not amiss, "\n".join(amiss)


@pytest.mark.slow
def test_of_several_wrong_arguments_one_is_named(calls=3000):
    """Arguments wrong at random, one to three at once."""
    rng = np.random.default_rng(18)
    names, kinds, amiss = list(DOORS), list(WRONG), []
    for _ in range(calls):
        name = names[rng.integers(len(names))]
        arguments = DOORS[name].arguments()
        count = min(len(arguments), rng.integers(1, 4))
        chosen = rng.choice(len(arguments), count, replace=False)
        wrong = {arguments[k]: kinds[rng.integers(len(kinds))] for k in chosen}
        for argument in [argument for argument in wrong if argument in DOORS[name].fitting][1:]:
            del wrong[argument]
        ended = fault(DOORS[name], wrong)
        if ended is not None:
            amiss.append(f"{name}, {wrong}: {ended}")
    assert not amiss, f"{len(amiss)} of {calls}:\n" + "\n".join(amiss)


@pytest.mark.whole
@pytest.mark.parallel(2)
@pytest.mark.parametrize("name", BUT_DEAR)
def test_an_argument_that_one_rank_gives_otherwise_is_refused_on_all(name):
    door = DOORS[name]
    for argument, other in door.differing():
        given = door.sound()
        if COMM_WORLD.rank == COMM_WORLD.size - 1:
            given[argument] = other
        try:
            door.call(**given)
        except ValueError as error:
            assert door.names(argument, error) and "all ranks must give the same" in str(error), f"{argument}: {error}"
        else:
            pytest.fail(f"{argument}: taken")
