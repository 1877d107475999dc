"""What sections 2.1 and 3 say, as tools: each module has one statement, or one object that statements are about."""

#: Features (`features.FEATURES`) of how a network holds a(t) and b(t): nothing to a tool that reads a(t) and b(t) themselves.
COEFFICIENTS = (
    "no_layers", "learned_factors", "learned_times", "stable_kernel", "nodal_bias", "bases_by_layer", "linear_in_time",
    "shared_in_time",
)  # fmt: skip
#: Features of how it is stepped: nothing to a tool that is about the equation, or that runs the network as it is.
STEPS = ("adapted_steps", "discrete_gradient", "single_precision")
