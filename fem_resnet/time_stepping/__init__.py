"""Layers stepped by PETSc TS: forward, adjoint (TSAdjoint), tangent and second order.

TS solves g_t = Psi^T M sigma(a - Phi beta g) on a layer, (3.5a) for a general kernel, and f follows by (3.3). A `Scheme`
(`scheme`) makes what steps a layer: `ts_stepper` in Python, `compiled_layer` in C (`layer.c`), or `discrete_gradient`, a step
under which the energy falls. `stepper` has their interface, `ts_layer`, `state` and `jacobian` the parts of a TS, `methods`,
`options` and `file_options` say what PETSc's types give and take. `evolution` and `tableau` step whole fields. Import from
these modules.
"""
