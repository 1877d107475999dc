"""Energies of section 3.3 and growth of section 3.4: statements of Theorem 3.2 and Proposition 3.5, watched on a run.

`EnergyMonitor` and `GrowthMonitor` are given to a trajectory; `energy_step_limit` and `convex_energy_radius` say up to which
step an energy falls in the discrete solution too; `fit_growth` fits rates.
"""
