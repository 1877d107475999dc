"""Residual neural networks as evolution equations on a meshed label domain, trained as PDE-constrained optimisation."""

from importlib import import_module

# Names are imported when they are first asked for (PEP 562), so that parts that need no PETSc work without it.
_MODULES = {
    "activation": ["ACTIVATIONS", "Activation", "Properties", "get_activation"],
    "control_set": ["Box", "ControlSet", "Ellipse", "Points", "Polygon", "Sections"],
    "mesh_file": ["read_mesh"],
    "label_space": ["LabelSpace"],
    "points": ["class_space", "point_space"],
    "basis": ["Basis", "cell_indicators", "given_basis"],
    "laplace": ["laplace_basis"],
    "kernel": ["LowRankKernel"],
    "running_cost": ["Density", "RunningCost"],
    "parameter": ["Parameter"],
    "time_stepping": ["StepFailure"],
    "checkpoints": ["enable_checkpointing"],
    "run": ["Run"],
    "stable_kernels": ["DampedAntisymmetric", "NormBounded", "PositiveSemidefinite"],
    "network": ["ResidualNetwork"],
    "head": ["Head"],
    "loss": ["Loss", "binary_cross_entropy", "cross_entropy", "functional_loss", "least_squares"],
    "regulariser": ["Regulariser", "smooth_in_space", "smooth_in_time", "tikhonov"],
    "objective": ["Batch", "Derivatives", "LearningProblem", "Observations"],
    "trajectory": ["Trajectory", "follow_trajectory", "solve_trajectory"],
    "costate": ["Costate", "solve_costate", "terminal_costate"],
    "costate_comparison": ["CostateCheck", "costate_check"],
    "curvature": ["Spectrum", "hessian_spectrum"],
    "local_feedback": ["LocalFeedback"],
    "low_rank_feedback": ["LowRankFeedback"],
    "local_closed_loop": ["LocalClosedLoop"],
    "hamiltonian": ["Controls", "Hamiltonian", "Pair", "hamiltonian_along", "middle_pairs"],
    "maximum_principle": ["Extremal", "Residual", "extremal_controls", "pmp_residual"],
    "row_controls": ["RowBall", "RowBox", "SpanBox", "raise_controls", "raise_rows", "raise_span"],
    "theory.assumptions": ["EnergyCondition", "energy_conditions"],
    "theory.energy": ["EnergyMonitor", "EnergyStatement"],
    "theory.energy_steps": ["EnergyStepLimit", "convex_energy_radius", "dissipation_ratio", "energy_step_limit"],
    "theory.growth": ["GrowthBound", "GrowthFit", "GrowthMonitor", "fit_growth"],
    "value_function": ["ValueFunction", "solve_value_function"],
    "feedback": ["ClosedLoop", "closed_loop", "feedback_controls", "feedback_speeds"],
    "training.gradient": ["Result", "train"],
    "training.pam": ["PAMProgress", "PAMResult", "train_pam"],
    "training.msa": ["MSAProgress", "MSAResult", "msa"],
    "theory.well_posedness": [
        "StabilityEstimate", "WellPosedness", "integrated_norms", "stability_estimate", "well_posedness_constants",
    ],
    "theory.picard_iteration": ["Picard", "PicardPiece", "picard"],
    "theory.singular_values": ["SingularSystem", "singular_system"],
    "theory.autonomous": ["AutonomousProblem", "autonomous_problem"],
    "theory.steady_states": ["SteadyStates", "find_steady_states", "zero_set"],
    "theory.equilibria": ["Equilibria", "Equilibrium", "find_equilibria"],
    "theory.stability": [
        "Decay", "EigenExpansion", "Stability", "eigen_expansion", "observed_decay", "stability_verdict",
    ],
    "theory.frozen_spectra": ["FrozenSpectra", "frozen_spectra"],
    "theory.compression": ["Compression", "KernelError", "compress"],
    "theory.limits": ["Convergence", "depth_limit", "width_limit"],
    "theory.residual_network": ["NetworkArrays", "from_network", "state_array", "to_network"],
    "theory.propagator": ["Propagator"],
    "theory.conditioning": ["LinearisedFlow"],
    "theory.perturbation": ["WeightedIdentity", "duhamel", "solve_linearised", "weighted_identity"],
    "theory.layer_stability": ["LayerStability"],
    "theory.report": ["StabilityReport", "Suggestion", "stability_report"],
    "theory.contraction": ["LipschitzBound", "circle_radius", "lipschitz_bound"],
    "io": ["load", "save"],
    "verify.suite": ["verify"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
