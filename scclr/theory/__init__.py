"""How far a contrastive loss is from the supervised objective that it approximates, and what alpha changes.

Everything exported here is a pure function: of z [n, M, d], M >= 2 augmented views of n images as unit rows, and their
labels [n]; or of a few numbers. Computation is in float64, and estimates have standard errors. README.md has the
definitions and proofs, and says what comes from the paper. ``embed`` computes z for a model, ``report`` all of it.
"""

from scclr.theory.bound import Bound, bound
from scclr.theory.collapse import Collapse, collapse
from scclr.theory.moments import Bias, prototype_bias
from scclr.theory.objective import Objective, supervised_objective
from scclr.theory.sample import Estimate, check_labels
from scclr.theory.thresholds import augmentation_correlations, class_threshold, collapse_threshold, misalignment_onset

__all__ = [
    "Bias", "Bound", "Collapse", "Estimate", "Objective", "augmentation_correlations", "bound", "check_labels",
    "class_threshold", "collapse", "collapse_threshold", "misalignment_onset", "prototype_bias", "supervised_objective",
]  # fmt: skip
