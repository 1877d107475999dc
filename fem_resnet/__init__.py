"""Residual neural networks as evolution equations on a meshed label domain, trained as PDE-constrained optimisation."""

from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec

# Names are imported when they are first asked for (PEP 562), so that parts that need no PETSc work without it.
_MODULES = {
    "activation.activation": ["ACTIVATIONS", "Activation", "get_activation"],
    "activation.properties": ["Properties"],
    "control.sets.control_set": ["ControlSet"],
    "control.sets.box": ["Box"],
    "control.sets.ellipse": ["Ellipse"],
    "control.sets.points": ["Points"],
    "control.sets.polygon": ["Polygon"],
    "control.sets.nodal_set": ["NodalBox", "NodalSets"],
    "control.sets.sections": ["Sections"],
    "label_domain.mesh_file": ["read_mesh"],
    "label_domain.label_space": ["LabelSpace"],
    "label_domain.channels": ["Channels"],
    "label_domain.parts": ["Part"],
    "label_domain.sources": ["label_domain"],
    "label_domain.repeated_basis": ["RepeatedBasis"],
    "label_domain.points": ["class_space", "point_space"],
    "label_domain.basis": ["Basis", "cell_indicators", "given_basis"],
    "label_domain.laplace": ["laplace_basis"],
    "label_domain.sensors": ["SensorFit", "Sensors"],
    "parameters.kernel": ["LowRankKernel"],
    "layers.pair_cost": ["PairDensity"],
    "layers.running_cost": ["Density", "RunningCost"],
    "parameters.parameter": ["Parameter"],
    "time_stepping.stepper": ["StepFailure"],
    "tape.checkpoints": ["enable_checkpointing"],
    "network.run": ["Run"],
    "parameters.kernel_sets": ["DampedAntisymmetric", "NormBounded", "PositiveSemidefinite"],
    "parameters.linear_kernels": ["LaplaceFunctions"],
    "parameters.symmetric_kernels": ["Symmetric"],
    "parameters.equivariant": ["Parity", "invariant_functions"],
    "network.settings": ["Bias", "Kernel", "Layers"],
    "network.network": ["ResidualNetwork"],
    "learning.head": ["Head"],
    "learning.lift": ["Lift"],
    "learning.loss": ["Loss", "binary_cross_entropy", "cross_entropy", "functional_loss", "least_squares"],
    "learning.regulariser": ["Regulariser", "smooth_in_space", "smooth_in_time", "tikhonov"],
    "learning.pointwise_terms": ["huber", "smoothed_l1"],
    "learning.field_terms": ["total_variation", "ufl_functional"],
    "learning.locality": ["locality"],
    "learning.batch": ["Batch", "Derivatives", "Observations"],
    "learning.problem": ["LearningProblem"],
    "costate.trajectory": ["Trajectory", "follow_trajectory", "solve_trajectory"],
    "costate.costate": ["Costate", "solve_costate"],
    "costate.terminal": ["terminal_costate"],
    "costate.comparison": ["CostateCheck", "costate_check"],
    "learning.curvature": ["Spectrum", "hessian_spectrum"],
    "hjb.local_feedback": ["LocalFeedback"],
    "hjb.low_rank_feedback": ["LowRankFeedback"],
    "hjb.local_closed_loop": ["LocalClosedLoop"],
    "control.controls": ["Controls"],
    "control.hamiltonian": ["Hamiltonian", "Pair", "hamiltonian_along", "middle_pairs"],
    "control.costly_controls": ["CostlyControls", "controls_with_cost"],
    "control.extremal_controls": ["Extremal", "extremal_controls"],
    "control.maximum_principle": ["Residual", "pmp_residual"],
    "control.row_sets": ["RowBall", "RowBox", "SpanBox"],
    "control.row_controls": ["raise_controls"],
    "theory.spectra.assumptions": ["EnergyCondition", "energy_conditions"],
    "theory.energy.energy": ["EnergyMonitor", "EnergyStatement"],
    "theory.energy.energy_steps": ["EnergyStepLimit", "convex_energy_radius", "dissipation_ratio", "energy_step_limit"],
    "theory.energy.growth": ["GrowthBound", "GrowthMonitor"],
    "theory.energy.growth_fit": ["GrowthFit", "fit_growth"],
    "hjb.state_grid": ["StateGrid"],
    "hjb.value_function": ["ValueFunction"],
    "hjb.equation": ["solve_value_function"],
    "hjb.feedback": ["ClosedLoop", "closed_loop", "feedback_controls", "feedback_speeds"],
    "training.checkpoint": ["TrainingCheckpoint"],
    "training.gradient": ["Result", "train"],
    "training.levenberg_marquardt": ["train_levenberg_marquardt"],
    "training.rank_continuation": ["train_by_ranks"],
    "training.lambda_choice": ["LambdaChoice", "choose_lambda"],
    "training.proximal": ["ProximalStep"],
    "training.pam_result": ["PAMProgress", "PAMResult"],
    "training.pam": ["train_pam"],
    "training.stochastic_steps": ["SGD", "Adam"],
    "training.stochastic": ["StochasticProgress", "StochasticResult", "train_stochastic"],
    "training.msa": ["MSAProgress", "MSAResult", "msa"],
    "training.open_loop_value": ["OpenLoopValue", "open_loop_value"],
    "training.coupled_system": ["CoupledSolution", "CoupledStage", "solve_maximum_principle"],
    "theory.sensitivity.well_posedness": [
        "StabilityEstimate",
        "WellPosedness",
        "integrated_norms",
        "stability_estimate",
        "well_posedness_constants",
    ],
    "theory.sensitivity.picard_iteration": ["Picard", "PicardPiece", "picard"],
    "theory.spectra.singular_values": ["SingularSystem", "singular_system"],
    "theory.spectra.autonomous": ["AutonomousProblem", "autonomous_problem"],
    "theory.spectra.zero_set": ["zero_set"],
    "theory.spectra.steady_states": ["SteadyStates", "find_steady_states"],
    "theory.spectra.equilibria": ["Equilibria", "Equilibrium", "find_equilibria"],
    "theory.spectra.stability": ["Stability", "stability_verdict"],
    "theory.spectra.eigen_expansion": ["EigenExpansion", "eigen_expansion"],
    "theory.spectra.decay": ["Decay", "observed_decay"],
    "theory.spectra.frozen_spectra": ["FrozenSpectra", "frozen_spectra"],
    "theory.limits.compression": ["Compression", "KernelError"],
    "theory.limits.compress": ["KernelSampling", "compress"],
    "theory.limits.limits": ["Convergence", "depth_limit", "width_limit"],
    "theory.limits.blocks": ["from_blocks"],
    "theory.limits.residual_network": ["NetworkArrays", "StageArrays", "from_network", "state_array", "to_network"],
    "theory.limits.interpolant": ["DepthInterpolant"],
    "theory.sensitivity.propagator": ["Propagator"],
    "theory.sensitivity.conditioning": ["LinearisedFlow"],
    "theory.sensitivity.perturbation": ["WeightedIdentity", "duhamel", "solve_linearised", "weighted_identity"],
    "theory.sensitivity.layer_stability": ["LayerStability"],
    "theory.sensitivity.report": ["StabilityReport", "Suggestion", "stability_report"],
    "theory.sensitivity.contraction": ["LipschitzBound", "circle_radius", "lipschitz_bound"],
    "estimators.domain": ["DomainRecipe"],
    "estimators.classifier": ["LabelFieldClassifier"],
    "estimators.regressor": ["LabelFieldRegressor"],
    "io.reading": ["load", "load_lift"],
    "io.writing": ["save"],
    "export.writing": ["export"],
    "verify.suite": ["verify"],
    "external.network_operator": ["network_operator"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

# Modules that need a package of an extra: `from fem_resnet import *` goes without them where it is not installed.
_EXTRAS = dict.fromkeys(("estimators.classifier", "estimators.regressor"), ("sklearn", "estimators"))

__all__ = sorted(name for name, home in _HOME.items() if home not in _EXTRAS or find_spec(_EXTRAS[home][0]))
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "plot":  # not among the names of a star import: Firedrake has a function of that name
        return import_module(f"{__name__}.plot")
    if name not in _HOME:
        near = "".join(f"; did you mean {each!r}?" for each in get_close_matches(name, _HOME, 1))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{near}")
    package, extra = _EXTRAS.get(_HOME[name], (None, None))
    if package is not None and find_spec(package) is None:
        raise ImportError(f"{name} needs the package {package}, which is not installed: pip install 'fem_resnet[{extra}]'")
    try:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs the package {error.name}, which is not installed; containers/run installs all of them, and what "
            "`export` has written predicts without",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    return __all__
