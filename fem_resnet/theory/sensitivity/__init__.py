"""Sections 3.1 and 3.5, how solutions depend on data: well-posedness, the linearised flow (3.6), contraction, a report.

`well_posedness_constants`, `stability_estimate` and `picard` are section 3.1. `LinearisedFlow`, `Propagator` and `duhamel` are
section 3.5. `lipschitz_bound` bounds a whole network, and `stability_report` has the numbers of all layers on one page.
"""
