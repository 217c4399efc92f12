"""Chuang et al. 2020, with one positive: the hard-negative loss with equal weights."""

from references import hard_negative

VARIANTS = [{"temperature": 0.5, "class_prior": 0.2}]


def terms(views, labels, *, temperature, class_prior):
    return hard_negative.terms(views, labels, temperature=temperature, class_prior=class_prior, hardness=0.0)
