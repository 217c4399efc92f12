"""How far a contrastive loss is from the supervised objective it approximates, and what its balance lets in.

Pure functions of z [n, M, d], M >= 2 augmented views of n images as unit rows, and labels [n]. They compute in float64,
give standard errors, and take this process's part of the data where a ``World`` of several is given. README.md has
definitions, proofs, and what is the paper's.
"""

from scclr.theory.bound import Bound, bound
from scclr.theory.collapse import Collapse, collapse
from scclr.theory.moments import Bias, prototype_bias
from scclr.theory.objective import Objective, supervised_objective
from scclr.theory.pairs import nscl_gap, same_class_mass
from scclr.theory.sample import Estimate
from scclr.theory.thresholds import (
    Admission,
    admission_threshold,
    augmentation_correlations,
    class_threshold,
    collapse_threshold,
    misalignment_onset,
)

__all__ = [
    "Admission",
    "Bias",
    "Bound",
    "Collapse",
    "Estimate",
    "Objective",
    "admission_threshold",
    "augmentation_correlations",
    "bound",
    "class_threshold",
    "collapse",
    "collapse_threshold",
    "misalignment_onset",
    "nscl_gap",
    "prototype_bias",
    "same_class_mass",
    "supervised_objective",
]
