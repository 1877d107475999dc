"""Controls that are chosen from a set: the Hamiltonian and the maximum principle of section 4.2.

The sets A are in `sets/`: `Box`, `Ellipse`, `Polygon`, `Points`, `Sections`. `extremal_controls` solves (4.9), (4.10), and
`pmp_residual` measures how far a network is from the maximum principle. For many samples `raise_controls` enlarges the
Hamiltonian over sets of rows (a(y), b(y, .)): `RowBox`, `RowBall`, `SpanBox`.
"""
