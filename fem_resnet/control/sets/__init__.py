"""Control sets A of section 4.2: compact sets of pairs (a, b), in which (a(y), b(y, z)) lies for all y and z.

`ControlSet` has the operations that the maximum principle needs. Its kinds are `Box`, `Polygon`, `Points`, `Ellipse` and
`Sections`, which know nothing of the label domain, and `NodalBox` and `NodalSets`, which are another set at each y.
"""
