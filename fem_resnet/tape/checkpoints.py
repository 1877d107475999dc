"""Schedules of checkpoints: which states a tape keeps, where one time step of the schedule is one segment of layers.

A tape keeps f at every interface between Blocks. Under a schedule of the package `checkpoint_schedules` it keeps a few of
these states, in memory or on disk, and computes the others again on its way back. The schedule and pyadjoint's manager do
this. This module adds what they lack for this package:

- Leaves, the Functions that no Block made (parameters, f_I), are never cleared, so no step stores them. pyadjoint stores a
  leaf in every step up to its first use, so that with own controls in each layer the size of the tape would grow
  quadratically.
- A Block can ask whether an adjoint follows what it computes now (`Manager.adjoint_follows`).
- Checkpoints on disk go to a file without a name, one a rank, in the folder of temporary files (TMPDIR). The operating system
  frees it when the process ends, however that happens.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from typing import BinaryIO, TypeAlias

import firedrake as fd
import numpy as np
from checkpoint_schedules import (
    CheckpointSchedule,
    Forward,
    MultistageCheckpointSchedule,
    NoneCheckpointSchedule,
    StorageType,
)  # fmt: skip
from firedrake.adjoint_utils.checkpointing import CheckpointBase
from pyadjoint import Block, Tape
from pyadjoint.block_variable import BlockVariable
from pyadjoint.checkpointing import CheckpointManager, Mode
from pyadjoint.tape import TapePackageData

from fem_resnet.arguments import instance, integer
from fem_resnet.ranks import together

__all__ = ["Checkpoints", "Manager", "add_leaf", "enable_checkpointing", "is_leaf", "manager_of", "schedule_of"]

#: What users give: a number of states in memory, a schedule that has not begun, or a function from a number of steps to one.
Checkpoints: TypeAlias = int | CheckpointSchedule | Callable[[int], CheckpointSchedule]


def schedule_of(checkpoints: Checkpoints, steps: int) -> CheckpointSchedule:
    """A new schedule for so many time steps.

    Parameters
    ----------
    checkpoints
        A number k >= 1 of states to keep in memory: binomial checkpointing, which computes the fewest layers again. Or a
        schedule, of which a copy is taken; or a function that makes a schedule for a number of steps.
    steps
        The number of time steps, which is the number of Blocks of layers.

    Raises
    ------
    TypeError
        If `checkpoints` is none of these.
    ValueError
        If the number is smaller than 1, or the schedule is in use, is for another number of steps, is for evaluations without
        a derivative, or cannot say whether it uses the disk.
    """
    steps = integer("steps", steps)
    if isinstance(checkpoints, (int, np.integer)) and not isinstance(checkpoints, bool):
        if checkpoints < 1:
            raise ValueError(f"checkpoints: expected at least 1 state in memory, got {checkpoints}")
        return MultistageCheckpointSchedule(steps, integer("checkpoints", checkpoints), 0)
    schedule = checkpoints
    if callable(schedule) and not isinstance(schedule, (CheckpointSchedule, type)):
        schedule = schedule(steps)
    if not isinstance(schedule, CheckpointSchedule):
        raise TypeError(
            f"checkpoints: expected a number, a schedule of checkpoint_schedules, or a function from a number of steps to a "
            f"schedule, got {type(checkpoints).__name__}"
        )
    if isinstance(schedule, NoneCheckpointSchedule):
        raise ValueError(
            "checkpoints: expected a schedule for derivatives, got NoneCheckpointSchedule, which is for evaluations alone; "
            "leave checkpoints out, or give SingleMemoryStorageSchedule, which keeps all states"
        )
    if hasattr(schedule, "iter"):
        raise ValueError(f"checkpoints: expected a new schedule, got a {type(schedule).__name__} that is in use; make another")
    if schedule.max_n not in (None, steps):
        raise ValueError(
            f"checkpoints: expected a schedule for {steps} steps, got a {type(schedule).__name__} for {schedule.max_n}; "
            f"there is one step a Block, and layers / layers_per_block Blocks"
        )
    try:
        schedule.uses_storage_type(StorageType.DISK)
    except TypeError as error:  # (Periodic)DiskRevolve of checkpoint_schedules 1.0.4
        raise ValueError(
            f"checkpoints: expected a schedule that can say whether it uses the disk, got {type(schedule).__name__}; take "
            f"HRevolve, MultistageCheckpointSchedule or SingleDiskStorageSchedule"
        ) from error
    return copy.deepcopy(schedule)


def enable_checkpointing(tape: Tape, checkpoints: Checkpoints, steps: int) -> None:
    """Put a tape that has no Blocks under a schedule of checkpoints.

    Record afterwards: each Block of layers that `ResidualNetwork.run` records is a time step. Use this function in the place
    of ``tape.enable_checkpointing``. A `LearningProblem` with checkpoints calls it itself.

    Parameters
    ----------
    tape
        The tape, without Blocks.
    checkpoints, steps
        See `schedule_of`.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If the schedule does not fit (see `schedule_of`), or the tape has Blocks.
    """
    if instance("tape", tape, Tape, "pyadjoint.Tape() is a new one").get_blocks():
        raise ValueError("tape: expected a tape without Blocks, got one with Blocks; make a new one")
    schedule = schedule_of(checkpoints, steps)
    if schedule.uses_storage_type(StorageType.DISK):
        tape._package_data["fem_resnet"] = _Disk()
    tape._checkpoint_manager = Manager(schedule, tape)


def manager_of(tape: Tape) -> Manager | None:
    """The manager of a tape under a schedule; None for a tape without one.

    Raises
    ------
    RuntimeError
        If the tape has a manager of pyadjoint's own.
    """
    manager = tape._checkpoint_manager
    if not (manager is None or isinstance(manager, Manager)):
        raise RuntimeError(
            "tape: expected a tape under a schedule of fem_resnet, got one of tape.enable_checkpointing, which does not know "
            "what a layer keeps; call fem_resnet.enable_checkpointing(tape, schedule, steps) instead, or give "
            "LearningProblem(checkpoints=schedule)"
        )
    return manager


class Manager(CheckpointManager):
    """pyadjoint's manager, which here takes one time step at a time.

    `_current_action` is an attribute of pyadjoint's class.
    """

    @property
    def adjoint_follows(self) -> bool:
        """Whether the results that a Block computes now stay in memory until its adjoint."""
        action = self._current_action
        return isinstance(action, Forward) and action.write_adj_deps and action.storage == StorageType.WORK

    @property
    def recording(self) -> bool:
        """Whether the tape is being recorded."""
        return self.mode == Mode.RECORD

    @property
    def going_back(self) -> bool:
        """Whether the tape is on its way back, so that Blocks compute what they have computed before."""
        return self.mode not in (Mode.RECORD, Mode.RECOMPUTE)

    @property
    def steps(self) -> int | None:
        """The number of steps of the schedule; None for any number."""
        return self._schedule.max_n

    def process_taping(self, action, timestep):
        going_on = super().process_taping(action, timestep)
        if isinstance(action, Forward) and timestep > action.n0:
            self._tidy(timestep - 1, action)
        return going_on

    def process_operation(self, action, progress_bar, **options):
        if not isinstance(action, Forward):
            super().process_operation(action, progress_bar, **options)
            return
        for step in range(action.n0, min(action.n1, self.total_timesteps)):
            # pyadjoint sets this attribute for the first step alone.
            self._current_action = Forward(
                step, step + 1, action.write_ics and step == action.n0, action.write_adj_deps, action.storage
            )
            super().process_operation(self._current_action, progress_bar, **options)
            self._tidy(step, action)

    def _tidy(self, number: int, action: Forward) -> None:
        """Remove the leaves from the checkpoints of a step, and move the others to disk if the schedule says so."""
        step = self.tape.timesteps[number]
        for variable in [variable for variable in step._checkpoint if is_leaf(variable)]:
            del step._checkpoint[variable]
        if action.storage == StorageType.DISK:
            disk = self.tape._package_data["fem_resnet"]
            moved = {variable: stored for variable, stored in step._checkpoint.items() if isinstance(stored, fd.Function)}
            if moved:
                comm = next(iter(moved.values())).function_space().mesh().comm
                on_disk = together(comm, lambda: [_OnDisk(disk, stored) for stored in moved.values()])
                step._checkpoint |= zip(moved, on_disk)


def is_leaf(variable: BlockVariable) -> bool:
    """Whether no Block has made a variable."""
    return variable.creation_timestep == -1


def add_leaf(block: Block, function: fd.Function, tape: Tape) -> None:
    """Make a leaf a dependency of a Block, such that no schedule stores or clears it."""
    variable = function.block_variable
    if variable.checkpoint is None:
        variable.save_output()
    variable.last_use = tape.latest_timestep  # "stored already", to pyadjoint
    block.add_dependency(function)


class _Disk(TapePackageData):
    """Arrays in a file without a name, with the parts of the file that are free again, by their size."""

    def __init__(self) -> None:
        self._end = 0
        self._free: dict[int, list[int]] = {}

    @cached_property
    def _file(self) -> BinaryIO:
        # It is made when an array is written, where an error of one rank is raised on all.
        return tempfile.TemporaryFile(buffering=0)

    def write(self, array: np.ndarray) -> int:
        """Write an array; returns its place in the file."""
        free = self._free.setdefault(array.nbytes, [])
        if free:
            start = free.pop()
        else:
            start, self._end = self._end, self._end + array.nbytes
        data, written = np.ascontiguousarray(array).data.cast("B"), 0
        while written < len(data):
            try:
                written += os.pwrite(self._file.fileno(), data[written:], start + written)
            except OSError as error:
                text = f"checkpoints: {error.strerror} in {tempfile.gettempdir()}; set TMPDIR to a folder with more room"
                raise OSError(error.errno, text) from error
        return start

    def read(self, start: int, array: np.ndarray) -> None:
        """Read the array at a place of the file."""
        data, done = array.data.cast("B"), 0
        while done < len(data):
            count = os.preadv(self._file.fileno(), [data[done:]], start + done)
            if count == 0:
                raise OSError(
                    f"checkpoints: expected {len(data)} bytes in the file in {tempfile.gettempdir()}, got {done}; keep other "
                    f"programs away from it"
                )
            done += count

    def free(self, start: int, size: int) -> None:
        """Let the place of an array be used again."""
        self._free[size].append(start)

    # pyadjoint calls the following methods of package data. A part of the file is freed with the checkpoint that owns it.

    def clear(self):
        pass

    def reset(self):
        pass

    def checkpoint(self):
        return None

    def restore_from_checkpoint(self, state):
        pass

    def copy(self):
        raise NotImplementedError("a tape with checkpoints on disk cannot be copied; record again")

    def continue_checkpointing(self):
        pass

    def pause_checkpointing(self):
        pass


class _OnDisk(CheckpointBase):
    """A checkpoint on disk: a Function that is read when the tape asks for its value."""

    def __init__(self, disk: _Disk, function: fd.Function):
        self._disk, self._space = disk, function.function_space()
        values = function.dat.data_ro
        self._shape, self._type, self._size = values.shape, values.dtype, values.nbytes
        self._start = disk.write(values) if self._size else None

    def restore(self) -> fd.Function:
        function = fd.Function(self._space)
        values = np.empty(self._shape, self._type)
        together(self._space.mesh().comm, lambda: None if self._start is None else self._disk.read(self._start, values))
        if self._start is not None:
            function.dat.data_wo[...] = values
        return function

    def __del__(self):
        if getattr(self, "_start", None) is not None:
            self._disk.free(self._start, self._size)
