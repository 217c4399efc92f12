"""The experiments of conf/experiment: what each one predicts, and the criterion by which it can fail.

One file for each experiment, by its name, holds the judge; ``exploratory`` is those that predict nothing, ``verdict``
the rules, ``best_alpha`` and ``supcon`` what is measured for them.
"""

from judges import balance_grid, bias_ladder, classes, collapse, long_tail, low_alpha, suppression, training_length
from judges.exploratory import QUESTIONS, exploratory
from judges.verdict import Judge

JUDGES: dict[str, Judge] = {
    "balance_grid": balance_grid.JUDGE,
    "collapse": collapse.JUDGE,
    "classes": classes.JUDGE,
    "long_tail": long_tail.JUDGE,
    "bias_ladder": bias_ladder.JUDGE,
    "low_alpha": low_alpha.JUDGE,
    "training_length": training_length.JUDGE,
    "suppression": suppression.JUDGE,
    **{name: exploratory(name) for name in QUESTIONS},
}
