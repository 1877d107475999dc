"""The stage of a layer: sigma(a - Phi beta g) on all nodes, its derivatives and their transposes; arrays in, arrays out.

The stage is the right-hand side of (2.8), seen through psi as g = Psi^T M f. `stage` is NumPy, `compiled_stage` the same
in C (`stage.c`), `transposed_stage` that of the gradient flow f_t = B^T sigma(a - B f). `running_cost` is L(f, a, b) of
section 4.3, and `inputs` what a layer takes of the parameters. Only what compiles C knows a communicator.
"""
