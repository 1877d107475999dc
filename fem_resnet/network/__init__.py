"""Residual networks as solutions of (2.8): segments of layers on the tape, `ResidualNetwork` and its `Run`.

A segment is one or more consecutive layers, one step on pyadjoint's tape; `coefficient_segment` is one of which all that
follows sees f through psi. Users import `ResidualNetwork` and `Run`.
"""
