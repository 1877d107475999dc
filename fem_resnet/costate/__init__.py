"""The co-state of (4.2) to (4.4), solved on its own and compared with the gradient that the tape gives.

`solve_trajectory` gives f at all times, and `solve_costate` the co-state along it. `costate_check` compares a network's
co-state and gradient with these.
"""
