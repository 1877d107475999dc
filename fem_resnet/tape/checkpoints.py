"""Checkpoint schedules over the tape's time steps, one a segment of layers.

A tape keeps f at every interface between Blocks. Under a schedule of the package `checkpoint_schedules` it keeps a few,
in memory or on disk, and computes the others again on its way back. The schedule and pyadjoint's manager do that; here
is what they lack for this package:

- leaves, the Functions that no Block made (parameters, f_I), are never cleared, so no step stores them. pyadjoint
  stores a leaf in every step up to its first use: own controls in each layer would make the tape quadratic;
- Blocks may ask whether an adjoint follows what they compute now (`Manager.adjoint_follows`);
- what goes to disk goes to a file without a name, one a rank, in the folder of temporary files (TMPDIR). The operating
  system frees it when the process ends, however that happens.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from typing import BinaryIO

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

#: What users give: a number of states in memory, a schedule that has not begun, or a function of the number of steps.
Checkpoints = int | CheckpointSchedule | Callable[[int], CheckpointSchedule]


def schedule_of(checkpoints: Checkpoints, steps: int) -> CheckpointSchedule:
    """A fresh schedule for so many time steps.

    Parameters
    ----------
    checkpoints
        A number k >= 1 of states to keep in memory: binomial checkpointing, with the least number of layers computed
        again. Or a schedule, of which a copy is taken; or a function that makes one for a number of steps.
    steps
        The number of time steps, which is that of Blocks of layers.

    Raises
    ------
    TypeError, ValueError
        If it is none of these, has begun, is for another number of steps, or for no derivative.
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
            f"checkpoints: expected a number, a schedule of checkpoint_schedules, or a function from a number of steps to one, "
            f"got {type(checkpoints).__name__}"
        )
    if isinstance(schedule, NoneCheckpointSchedule):
        raise ValueError(
            "checkpoints: NoneCheckpointSchedule is for evaluations without a derivative, and a tape is for derivatives; "
            "leave checkpoints out, or give SingleMemoryStorageSchedule, which keeps all states"
        )
    if hasattr(schedule, "iter"):
        raise ValueError(f"checkpoints: this {type(schedule).__name__} is in use; give a new one")
    if schedule.max_n not in (None, steps):
        raise ValueError(
            f"checkpoints: expected a schedule for {steps} steps, got a {type(schedule).__name__} for {schedule.max_n}; steps are the "
            f"number of Blocks, which is that of layers / layers_per_block"
        )
    try:
        schedule.uses_storage_type(StorageType.DISK)
    except TypeError as error:  # (Periodic)DiskRevolve of checkpoint_schedules 1.0.4
        raise ValueError(
            f"checkpoints: {type(schedule).__name__} cannot say whether it uses the disk; HRevolve, "
            f"MultistageCheckpointSchedule and SingleDiskStorageSchedule can"
        ) from error
    return copy.deepcopy(schedule)


def enable_checkpointing(tape: Tape, checkpoints: Checkpoints, steps: int) -> None:
    """Put a tape that has no Blocks under a schedule; `LearningProblem` does so where it is given checkpoints.

    Then record: each Block of layers that `ResidualNetwork.run` records is a time step. This takes the place of
    ``tape.enable_checkpointing``.

    Parameters
    ----------
    tape
        The tape, without Blocks.
    checkpoints, steps
        See `schedule_of`.

    Raises
    ------
    TypeError, ValueError
        If the checkpoints do not fit, or the tape has Blocks.
    """
    if instance("tape", tape, Tape, "pyadjoint.Tape() is a new one").get_blocks():
        raise ValueError("tape: expected an empty one, and it has Blocks; make a new one")
    schedule = schedule_of(checkpoints, steps)
    if schedule.uses_storage_type(StorageType.DISK):
        tape._package_data["fem_resnet"] = _Disk()
    tape._checkpoint_manager = Manager(schedule, tape)


def manager_of(tape: Tape) -> Manager | None:
    """The manager of a tape under a schedule, None without one.

    Raises
    ------
    RuntimeError
        If it is pyadjoint's own.
    """
    manager = tape._checkpoint_manager
    if not (manager is None or isinstance(manager, Manager)):
        raise RuntimeError(
            "tape: tape.enable_checkpointing does not know what a layer keeps; call fem_resnet.enable_checkpointing("
            "tape, schedule, steps) in its place, or give LearningProblem(checkpoints=schedule)"
        )
    return manager


class Manager(CheckpointManager):
    """pyadjoint's, taking one time step at a time."""

    @property
    def adjoint_follows(self) -> bool:
        """Whether what is computed now stays in working memory until its adjoint."""
        action = self._current_action
        return isinstance(action, Forward) and action.write_adj_deps and action.storage == StorageType.WORK

    @property
    def recording(self) -> bool:
        return self.mode == Mode.RECORD

    @property
    def going_back(self) -> bool:
        """Whether the tape is on its way back, and what is computed now was computed before."""
        return self.mode not in (Mode.RECORD, Mode.RECOMPUTE)

    @property
    def steps(self) -> int | None:
        """How many steps the schedule is for; None for as many as come."""
        return self._schedule.max_n

    def process_taping(self, action, timestep):
        going_on = super().process_taping(action, timestep)
        if isinstance(action, Forward) and timestep > action.n0:
            self._tidy(timestep - 1, action)
        return going_on

    def process_operation(self, action, progress_bar, **options):
        if not isinstance(action, Forward):
            return super().process_operation(action, progress_bar, **options)
        for step in range(action.n0, min(action.n1, self.total_timesteps)):
            # pyadjoint notes the action only the first time.
            self._current_action = Forward(
                step, step + 1, action.write_ics and step == action.n0, action.write_adj_deps, action.storage
            )
            super().process_operation(self._current_action, progress_bar, **options)
            self._tidy(step, action)

    def _tidy(self, number: int, action: Forward) -> None:
        """Forget the leaves among what a step stored, and move the rest to disk where it belongs there."""
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
    """Whether no Block made it."""
    return variable.creation_timestep == -1


def add_leaf(block: Block, function: fd.Function, tape: Tape) -> None:
    """Make a leaf a dependency of a Block that no schedule stores or clears."""
    variable = function.block_variable
    if variable.checkpoint is None:
        variable.save_output()
    variable.last_use = tape.latest_timestep  # "stored already", to pyadjoint
    block.add_dependency(function)


class _Disk(TapePackageData):
    """Arrays of one size or several in a file that has no name; a part that is free again is used again."""

    def __init__(self):
        self._end = 0
        self._free: dict[int, list[int]] = {}

    @cached_property
    def _file(self) -> BinaryIO:
        # Made where all ranks hear of it if one cannot.
        return tempfile.TemporaryFile(buffering=0)

    def write(self, array: np.ndarray) -> int:
        """Where it now is."""
        free = self._free.setdefault(array.nbytes, [])
        if free:
            start = free.pop()
        else:
            start, self._end = self._end, self._end + array.nbytes
        data, written = memoryview(np.ascontiguousarray(array)).cast("B"), 0
        while written < len(data):
            try:
                written += os.pwrite(self._file.fileno(), data[written:], start + written)
            except OSError as error:
                text = f"checkpoints: {error.strerror} in {tempfile.gettempdir()}; TMPDIR names another folder for them"
                raise OSError(error.errno, text) from error
        return start

    def read(self, start: int, array: np.ndarray) -> None:
        data, done = memoryview(array).cast("B"), 0
        while done < len(data):
            count = os.preadv(self._file.fileno(), [data[done:]], start + done)
            if count == 0:
                raise OSError("the file of checkpoints is shorter than what was written to it")
            done += count

    def free(self, start: int, size: int) -> None:
        self._free[size].append(start)

    # What pyadjoint asks of package data; parts of the file are freed with the checkpoints that own them.

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
    """A Function on disk, in the place of a checkpoint; read when the tape takes its value."""

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
