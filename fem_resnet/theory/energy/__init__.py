"""Sections 3.2 and 3.4: energies that fall along solutions (Theorem 3.2) and bounds of growth (Proposition 3.5).

`EnergyMonitor` and `GrowthMonitor` measure a trajectory or a run and compare it with the statements. `energy_step_limit`
and `convex_energy_radius` give the longest step for which the discrete solution keeps them. `fit_growth` fits rates.
"""
