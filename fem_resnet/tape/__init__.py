"""The pyadjoint tape: operators, the Block that records one, schedules of checkpoints, and kernels made of other controls.

The tape applies the chain rule between segments, heads and losses; its adjoint values at segment ends give the co-state of
(4.2). Only this folder uses pyadjoint's internals. Users import `enable_checkpointing`; other folders take `operator.Operator`
and `recording.apply`.
"""
