"""How solutions depend on data: well-posedness (3.1), the linearised flow (3.6), contraction, the stability report.

`well_posedness_constants`, `stability_estimate` and `picard` are section 3.1; `LinearisedFlow`, `Propagator` and `duhamel`
section 3.5; `lipschitz_bound` bounds a whole network, and `stability_report` puts all on one page.
"""
