"""The pyadjoint tape: the one Block of the package, checkpoint schedules over it, kernels made of other controls.

The tape applies the chain rule between segments, heads and losses; its values at segment ends are the co-state of (4.2).
This is the only folder that uses pyadjoint's internals. Users import `enable_checkpointing`; other folders take
`blocks.Operator` and `blocks.apply`.
"""
