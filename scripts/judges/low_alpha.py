"""Whether a small alpha keeps positives apart, and the decoupled loss does not."""

from judges.verdict import ALPHA, UNDECIDED, V_AUG, Judge, Runs, Verdict, above, both, by_seed, split, told
from scclr.report.runs import Run

ONSET, PLAIN = "forecast/alpha_mis", 0.5


def low_alpha(runs: Runs) -> list[Verdict]:
    """scclr train -m experiment=low_alpha; its axes are loss (balanced, decoupled), alpha and seed, at temperature 0.1.

    E6. Prediction: below alpha_mis, which each run forecasts, the best embedding of NT-Xent with a balance keeps
    positives apart: the mean similarity s+ = 1 - V_aug of two views of a training image is below that at alpha = 0.5.
    With the decoupled loss, whose positives are not in the denominator, it is not so. As V_aug falls with alpha for
    either loss, their drops are compared. Criterion, in pairs of seeds at each alpha below alpha_mis: s+ of
    ``balanced`` is below its value at 0.5; and this drop is larger than that of ``decoupled``. It fails if there is no
    difference.
    """
    parts = {loss: split(part, ALPHA) for loss, part in split(runs, "loss").items()}
    onset = min((run.numbers[ONSET] for part in parts.get("balanced", {}).values() for run in part), default=0.0)
    drops, gains = dict[float, list[float]](), dict[float, list[float]]()
    for alpha in parts.get("balanced", {}):
        if alpha < min(onset, PLAIN):
            drop = _drop(parts, "balanced", alpha)
            other = _drop(parts, "decoupled", alpha)
            drops[alpha] = list(drop.values())
            gains[alpha] = [drop[seed] - other[seed] for seed in drop if seed in other]
    return [
        _verdict("E6: below alpha_mis positives are less similar than at alpha = 0.5", "s+ falls by", drops, onset),
        _verdict("E6: with the decoupled loss they are not, or less so", "balanced falls more by", gains, onset),
    ]


def _drop(parts: dict[str, dict[float, list[Run]]], loss: str, alpha: float) -> dict[int, float]:
    """s+ at alpha = 0.5 minus s+ at another alpha, by seed."""
    plain, other = (by_seed(parts.get(loss, {}).get(at, []), V_AUG) for at in (PLAIN, alpha))
    return {seed: other[seed] - plain[seed] for seed in other if seed in plain}


def _verdict(claim: str, words: str, values: dict[float, list[float]], onset: float) -> Verdict:
    texts = [f"{told(part)} at {alpha:g}" for alpha, part in values.items()]
    outcome = both(*map(above, values.values())) if values else UNDECIDED
    none = "no alpha is below it"
    return Verdict(claim, outcome, f"alpha_mis {onset:.3f}; {words} {'; '.join(texts)}" if texts else none)


JUDGE = Judge(low_alpha, axes=("loss", "loss.", ALPHA), needs=(ALPHA, V_AUG, ONSET))
