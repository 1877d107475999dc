"""Decisions of all ranks: an error of one is raised on all, rank 0 works for all, arguments are compared."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from firedrake import COMM_SELF, COMM_WORLD
from helpers import without_mpi

from fem_resnet import NormBounded, get_activation
from fem_resnet.arguments import instance
from fem_resnet.ranks import in_step, on_first, same, together
from fem_resnet.time_stepping.stepper import StepFailure

on_ranks = pytest.mark.parallel([1, 2, 3])
LAST = COMM_WORLD.size - 1


class CannotBeSent(Exception):
    """An error whose pickle lacks an argument."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def on_last(error):
    """A function that raises `error` on the last rank alone."""

    def run():
        if COMM_WORLD.rank == LAST:
            raise error
        return COMM_WORLD.rank

    return run


@on_ranks
@pytest.mark.parametrize("error", [TypeError, OSError, KeyboardInterrupt, SystemExit])
def test_what_one_rank_raises_all_raise_with_the_same_words(error):
    with pytest.raises(error) as raised:
        together(COMM_WORLD, on_last(error(f"x: not so on rank {LAST}")))
    assert str(raised.value) == f"x: not so on rank {LAST}"
    if COMM_WORLD.rank != LAST:
        assert str(raised.value.__cause__) == f"raised on rank {LAST}, whose traceback says where"


@pytest.mark.parallel([2, 3])
def test_an_error_that_cannot_be_sent_keeps_its_words():
    with pytest.raises(RuntimeError, match="^CannotBeSent: this and that"):
        together(COMM_WORLD, on_last(CannotBeSent("this", "that")))


@on_ranks
def test_a_failed_step_is_passed_on_whole():
    with pytest.raises(StepFailure) as raised:
        together(COMM_WORLD, on_last(StepFailure(2, 0.5, "no step was found")))
    assert raised.value.layer == 2 and raised.value.time == 0.5 and "no step was found" in str(raised.value)


@pytest.mark.parallel([2, 3])
def test_of_several_errors_that_of_the_first_rank_is_raised():
    def run():
        if COMM_WORLD.rank > 0:
            raise ValueError(f"rank {COMM_WORLD.rank}")

    with pytest.raises(ValueError, match="^rank 1"):
        together(COMM_WORLD, run)


@on_ranks
def test_in_step_an_error_that_leaves_nobody_waiting_is_everyones():
    with pytest.raises(OSError, match="^full"):
        in_step(COMM_WORLD, on_last(OSError("full")))
    assert in_step(COMM_WORLD, lambda: COMM_WORLD.allreduce(1)) == COMM_WORLD.size


WAITS = """
from mpi4py.MPI import COMM_WORLD as comm
import fem_resnet.ranks
fem_resnet.ranks._PATIENCE = 0.5
own = comm.Dup()  # as that of HDF5
def run():
    if comm.rank == 1:
        raise OSError("traceback\\nno room")
    own.barrier()
fem_resnet.ranks.in_step(comm, run)
"""


def on_two_ranks(script, **environment):
    command = ["mpiexec", "-n", "2", sys.executable, "-c", script]
    environment |= without_mpi() | {"OMPI_MCA_mpi_yield_when_idle": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_in_step_a_rank_for_which_others_wait_ends_them_with_a_sentence(alone):
    result = on_two_ranks(WAITS)
    assert result.returncode == 1
    assert "OSError on rank 1, while the others wait for it: no room\n" in result.stderr


#: What rank 1 does while rank 0 calls `allreduce`.
WATCHED = """
import firedrake as fd
from fem_resnet import LabelSpace
from fem_resnet.ranks import on_first, same
Y = LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(2), "DG", 0))

def other_line():
    return Y.comm.allreduce(2)

on_first(Y.comm, lambda: 3)
same(Y.comm, what=4)
if Y.comm.rank == 1:
    {}
else:
    Y.comm.allreduce(1)
"""


def test_watched_ranks_that_make_different_calls_are_told_of_both(alone):
    result = on_two_ranks(WATCHED.format("other_line()"), FEM_RESNET_WATCH="20")
    assert result.returncode != 0
    told = "got\nrank 0: allreduce in <string>, line 15\nrank 1: allreduce in <string>, line 8\n"
    assert result.stderr.count(f"RuntimeError: ranks: expected the same collective call from the same line, {told}") == 2, (
        result.stderr
    )


def test_watched_ranks_that_wait_and_one_that_does_not_come_write_where_they_are(alone):
    result = on_two_ranks(WATCHED.format("fd.COMM_WORLD.recv(source=0)"), FEM_RESNET_WATCH="3")
    assert result.returncode != 0
    waits, misses = result.stderr.split("Current thread", 1)
    assert "rank 0 has waited 3 s for others to call allreduce in <string>, line 15" in waits, result.stderr
    assert re.search(r'File "<string>", line 13 in <module>', misses), result.stderr


@on_ranks
def test_together_returns_what_each_rank_has():
    assert together(COMM_WORLD, lambda: COMM_WORLD.rank) == COMM_WORLD.rank
    assert together(None, lambda: 3) == together(COMM_SELF, lambda: 3) == 3


@on_ranks
def test_rank_0_works_for_all():
    assert on_first(COMM_WORLD, lambda: ("rank", COMM_WORLD.rank)) == ("rank", 0)

    def run():
        raise FileNotFoundError(f"path: nothing on rank {COMM_WORLD.rank}")

    with pytest.raises(FileNotFoundError, match="^path: nothing on rank 0"):
        on_first(COMM_WORLD, run)


#: Pairs that differ, one a kind of value.
DIFFERENT = {
    "numbers": (1, 2),
    "types": (1, 1.0),
    "bools": (True, False),
    "round-off": (0.1 + 0.2, 0.3),
    "strings": ("rk", "cn"),
    "a string and its bytes": ("rk", b"rk"),
    "paths": (Path("a/b"), Path("a/c")),
    "None and 0": (None, 0),
    "arrays": (np.arange(3.0), np.arange(3.0) + 1e-16 + np.array([0, 0, 1e-15])),
    "shapes": (np.zeros((2, 3)), np.zeros((3, 2))),
    "dtypes": (np.zeros(2, "f4"), np.zeros(2, "i4")),
    "masks": (np.ma.array([1.0, 2.0], mask=[0, 1]), np.ma.array([1.0, 2.0], mask=[1, 0])),
    "sparse": (scipy.sparse.csr_array(np.diag([1.0, 2.0])), scipy.sparse.csr_array(np.diag([1.0, 3.0]))),
    "nesting": ([1, [2, 3]], [1, 2, 3]),
    "lengths": ([1], [1, 1]),
    "options": ({"ts_type": "rk"}, {"ts_type": "cn"}),
    "option names": ({"a": 1}, {"b": 1}),
    "sets": ({1, 2}, {1, 3}),
    "functions": (np.sin, np.cos),
    "classes": (NormBounded, dict),
    "kernel sets": (NormBounded(4.0), NormBounded(5.0)),
    "activations": (get_activation("tanh"), get_activation("relu")),
}


@on_ranks
@pytest.mark.parametrize("kind", DIFFERENT)
def test_arguments_that_differ_are_refused_by_name_on_all_ranks(kind):
    one, other = DIFFERENT[kind]
    same(COMM_WORLD, first=one, second=other)
    if LAST == 0:
        return
    with pytest.raises(ValueError, match="^second: all ranks must give the same"):
        same(COMM_WORLD, first=one, second=one if COMM_WORLD.rank < LAST else other, third=3)


@on_ranks
def test_equal_arguments_pass_however_they_are_written():
    mixed = {"a": 1, "b": [2.0, None]} if COMM_WORLD.rank else {"b": [2.0, None], "a": 1}
    columns = np.asfortranarray if COMM_WORLD.rank else np.ascontiguousarray
    same(
        COMM_WORLD, options=mixed, array=columns(np.arange(6.0).reshape(2, 3)), nan=float("nan"), path=Path("x/y"),
        words={"b", "a"} if COMM_WORLD.rank else {"a", "b"}, objects=np.array([None, "a"], dtype=object),
        activation=get_activation("tanh"),
    )  # fmt: skip


def test_instance_names_what_is_wanted():
    assert instance("x", 3, int) == 3 and instance("x", None, (int, type(None))) is None
    with pytest.raises(TypeError, match="^x: expected an int or None, got str; write a number$"):
        instance("x", "3", (int, type(None)), "write a number")
