"""Control sets, the Hamiltonian and the maximum principle of section 4.2.

A is a set of pairs (a, b) (`Box`, `Ellipse`, `Polygon`, `Points`, `Sections`); `extremal_controls` solves (4.9), (4.10), and
`pmp_residual` says how far a network is from the maximum principle. `row_controls` has many samples, with rows (a(y), b(y, .))
free at each y.
"""
