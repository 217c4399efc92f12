"""Whether the logged threshold r* tells which of two features is learned."""

from matplotlib.figure import Figure

from judges.verdict import (
    ALPHA,
    FAILS,
    HOLDS,
    LEAST_SEEDS,
    NCC,
    TEMPERATURE,
    UNDECIDED,
    Judge,
    Runs,
    Verdict,
    seeds,
    split,
)

R_STAR = "pretrain/admission/r_star"
FEATURES = {"digit": NCC, "texture": f"texture/{NCC}"}
LEARNED = 0.55  # half-way between chance, 1 of 10 classes, and all
LEAST_AUC, MOST_WITHOUT = 0.9, 1 / 3


def suppression(runs: Runs) -> list[Verdict]:
    """scclr train -m experiment=suppression; its axes are loss.temperature, alpha and seed, on digits on textures.

    E10. Prediction: a feature with the correlation r between views is learned iff r > r* (T10), the threshold that the
    training logs last. A feature is learned if the nearest class centre of z is right for more than 55 % of the test
    images, half-way between chance and all. The correlation of a feature with itself is the same in all of these runs,
    since data and augmentation are, so whatever it is, r* has to separate the runs that have learned the feature from
    those that have not. Criterion, for each of the two features: the area under the ROC curve of -r* is at least 0.9.
    Undecided where all runs have learned a feature, or none; and if more than a third of the runs have no r*, which
    has no meaning where positives are repelled (alpha <= (1 - alpha) p+). The alphas, the temperatures and the stride
    of the encoder were chosen on runs of seed 100, which is not judged.
    """
    from sklearn.metrics import roc_auc_score

    having = [run for run in runs if R_STAR in run.numbers]
    found = []
    for feature, metric in FEATURES.items():
        claim = f"E10: the {feature} is learned where r* is small"
        learned = [run.numbers[metric] > LEARNED for run in having]
        counts = f"learned in {sum(learned)} of {len(having)} runs with r*, of {len(runs)}"
        without = len(having) < (1 - MOST_WITHOUT) * len(runs)
        if without or len(set(learned)) < 2 or seeds(runs) < LEAST_SEEDS:
            found.append(Verdict(claim, UNDECIDED, counts))
            continue
        area = float(roc_auc_score(learned, [-run.numbers[R_STAR] for run in having]))
        found.append(Verdict(claim, HOLDS if area >= LEAST_AUC else FAILS, f"area {area:.3f}; {counts}"))
    return found


def draw(runs: Runs) -> Figure:
    """The accuracy of both features against r*; a colour for each temperature."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (feature, metric) in zip(axes, FEATURES.items(), strict=True):
        for number, (temperature, part) in enumerate(split(runs, TEMPERATURE).items()):
            own = [run for run in part if R_STAR in run.numbers]
            x, y = ([run.numbers[name] for run in own] for name in (R_STAR, metric))
            label = f"temperature {temperature:g}"
            axis.plot(x, [100 * value for value in y], "o", markersize=4, color=f"C{number}", label=label)
        axis.axhline(100 * LEARNED, color="grey", lw=0.5)
        axis.set(xlabel="r*", ylabel=f"{metric}, %", title=feature)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


JUDGE = Judge(
    suppression, axes=(ALPHA, TEMPERATURE), needs=(ALPHA, TEMPERATURE, *FEATURES.values()), also=(R_STAR,), draw=draw
)
