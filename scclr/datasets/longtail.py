"""Long-tailed training sets: how many images each class keeps, and which classes have many, some or few.

Dimensions: K classes.
"""

from collections.abc import Sequence

LONG_TAIL = 10  # the mildest ratio of largest to smallest class in the literature (Cui et al. 2019, table 2)
PROFILES = ("exponential", "step")
# Many: more than 100 training images; few: fewer than 20; medium: between (Liu et al. 2019, sec. 4).
MANY, FEW = 100, 20
SHOT_GROUPS = ("many", "medium", "few")


def class_counts(most: int, classes: int, imbalance: float, profile: str) -> list[int]:
    """The number of images of each class: ``most`` of the first, ``most / imbalance`` of the last, rounded down.

    ``exponential``: ``n_c = most mu^(c / (K - 1))`` with ``mu = 1 / imbalance`` (Cui et al. 2019, sec. 5.1; Cao et al.
    2019, sec. 4). ``step``: ``most`` of the first half of the classes, ``most mu`` of the others (Buda et al. 2018,
    sec. 3.1); an odd class in the middle belongs to the first half.
    """
    if profile == "step":
        shares = [1 if 2 * c < classes else 1 / imbalance for c in range(classes)]
    else:
        shares = [imbalance ** (-c / (classes - 1)) for c in range(classes)]
    return [int(most * share + 1e-9) for share in shares]  # 1e-9: in floats 4900 * (1 / 49) is less than 100


def groups(counts: Sequence[int]) -> dict[str, list[int]]:
    """The classes with many, medium and few training images.

    Empty unless the largest class has at least ``LONG_TAIL`` times the images of the smallest.
    """
    if max(counts) < LONG_TAIL * min(counts):
        return {}
    names = ["many" if n > MANY else "few" if n < FEW else "medium" for n in counts]
    members = {group: [c for c, name in enumerate(names) if name == group] for group in SHOT_GROUPS}
    return {group: classes for group, classes in members.items() if classes}
