"""Contrastive pretraining: the loop, what a step changes, the optimizers, and the metrics of a batch."""
