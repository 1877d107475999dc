"""The stage of a layer: sigma(a - Phi beta g) on all nodes, its derivatives and their transposes; arrays in, arrays out.

The stage is the right-hand side of (2.8), which a layer sees through psi as g = Psi^T M f. `stage` has it in NumPy,
`compiled_stage` the same in C (`stage.c`), `transposed_stage` for the gradient flow f_t = B^T sigma(a - B f),
`discrete_gradient_stage` for a step under which the energy falls. `inputs` has what a layer takes of the parameters, and
`running_cost` is L(f, a, b) of section 4.3. Import classes from these modules.
"""
