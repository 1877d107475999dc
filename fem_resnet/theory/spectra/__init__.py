"""Sections 3.2 and 3.3, the autonomous problem: where it rests, whether it is stable there, and how fast it decays.

`autonomous_problem` is (3.2) and `singular_system` has the coefficients of (3.5). `find_steady_states` and `find_equilibria`
find where f, or u, stands still. `stability_verdict` is Theorem 3.4; `observed_decay` measures its rate. `frozen_spectra` are
the spectra of section 3.5 along a trajectory.
"""
