"""The doors of control, Hamilton-Jacobi-Bellman, the co-state, the theory of section 3 and verify; see `doors.py`."""

from __future__ import annotations

from doors import Door

DOORS: dict[str, Door] = {}

#: Public names that are not called with arguments from outside: what they are.
NO_DOORS: dict[str, str] = {}
