"""Spectra and stability of the autonomous problem of section 3.2: equilibria, eigenvalues, decay.

`autonomous_problem` is (3.2), `singular_system` the coefficients (3.5); `find_steady_states` and `find_equilibria` solve
for rest, `stability_verdict` is Theorem 3.4 and `frozen_spectra` the spectra of section 3.5 along a trajectory.
"""
