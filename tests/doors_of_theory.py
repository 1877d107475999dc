"""The doors of control, Hamilton-Jacobi-Bellman, the co-state, the theory of section 3 and verify; see `doors.py`."""

from __future__ import annotations

from doors import Door

DOORS: dict[str, Door] = {}
