"""The co-state of (4.2) to (4.4), solved on its own and held against the one that the tape derives.

`solve_trajectory` gives f at all times, `solve_costate` the co-state along it, and `costate_check` compares a network's
co-state and gradient with these.
"""
