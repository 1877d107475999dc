"""Residual networks as solutions of (2.8): `ResidualNetwork` and its `Run`, made of a `Kernel`, a `Bias` and `Layers`.

`settings` says what a network is made of, `network_parameters` what it learns, `starting_values` where that starts. `solver`
says how it is run, and `other_networks` which networks are made of it. A `segment` is one or more consecutive layers, one step
on pyadjoint's tape. Users import `ResidualNetwork`, `Kernel`, `Bias`, `Layers` and `Run`; folders above also use
`layer_segments` of a network.
"""
