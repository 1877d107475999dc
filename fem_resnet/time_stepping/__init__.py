"""Layers stepped by PETSc TS: forward, adjoint (TSAdjoint), tangent and second order.

TS solves g_t = Psi^T M sigma(a - Phi beta g) on a layer, (3.5a) for a general kernel, and f follows by (3.3). `stepper`
drives one layer, `sequence` several by one call of C (`compiled_layer`, `layer.c`), `discrete_gradient` steps by a scheme
under which the energy falls. `methods` and `options` say what PETSc's types give and take; `evolution` steps whole fields.
"""
