"""The supervised objective that contrastive losses approximate: attraction to the own class's prototype."""

import math

import torch
from torch import Tensor

from scclr.losses import Anchors, Loss, LossTerms, balance, check_alpha, check_positive

Prototypes = tuple[Tensor, Tensor]  # class means [C, P], and which classes have one, bool [C]


class PrototypeLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R), the supervised objective of Lee (TMLR 2025, arXiv 2510.10572) over tau.

    A = mean_i -<z_i, mu_y> / tau
    R = mean_i max_{c != y} <z_i, mu_c> / tau    or    mean_i log sum_{c != y} exp(<z_i, mu_c> / tau)

    y is the class of anchor i. Prototypes mu are class means, not normalised: of the batch (momentum = 0), or
    momentum * running mean + (1 - momentum) * mean of the batch. Gradients pass through the batch's means. ``update``
    moves the running mean; a call does not. Classes never seen do not repel; a batch of one class has R = -inf.

    Args:
        classes: their number C; labels are in [0, C).
        repulsion: ``max`` or ``logsumexp``.

    Raises:
        ValueError: alpha outside [0, 1], a temperature that is not positive, a momentum outside [0, 1), fewer than two
            classes, or an unknown repulsion; on call, labels that are missing.
    """

    supervised = True

    def __init__(self, *, alpha: float, temperature: float, repulsion: str, momentum: float, classes: int) -> None:
        super().__init__()
        check_alpha(alpha)
        check_positive(temperature=temperature)
        if repulsion not in ("max", "logsumexp"):
            raise ValueError(f"repulsion={repulsion}: choose one of max, logsumexp")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: give a number in [0, 1); 0 takes the prototypes of the batch")
        if classes < 2:
            raise ValueError(f"classes={classes}: a supervised objective needs two or more")
        self.alpha, self.temperature, self.repulsion = alpha, temperature, repulsion
        self.momentum, self.classes = momentum, classes
        self.running: Prototypes | None = None  # until the first update

    def terms(self, anchors: Anchors) -> LossTerms:
        label = anchors.label  # [VG]
        prototypes, seen = self._prototypes(anchors.pool, label)  # [C, P], [C]
        with_class = anchors.z @ prototypes.T / self.temperature  # [VB, C]
        mine = label[anchors.place].unsqueeze(1)  # [VB, 1]
        attract = -with_class.gather(1, mine).mean()
        others = with_class.masked_fill(~seen, -math.inf).scatter(1, mine, -math.inf)
        repel = others.amax(1) if self.repulsion == "max" else others.logsumexp(1)
        return balance(self.alpha, attract, repel.mean())

    @torch.no_grad()
    def update(self, *views: Tensor, labels: Tensor) -> None:
        """Move the running means towards those of the views [G, P] and labels [G] of all processes."""
        if self.momentum > 0:
            anchors = Anchors(views, labels)
            self.running = self._prototypes(anchors.z, anchors.label)

    def get_extra_state(self) -> Prototypes | None:
        return self.running

    def set_extra_state(self, state: Prototypes | None) -> None:
        self.running = state

    def _prototypes(self, z: Tensor, label: Tensor) -> Prototypes:
        counts = torch.zeros(self.classes, dtype=z.dtype, device=z.device).index_add(0, label, torch.ones_like(z[:, 0]))
        sums = z.new_zeros(self.classes, z.shape[1]).index_add(0, label, z)
        means, here = sums / counts.clamp(min=1).unsqueeze(1), counts > 0
        if self.running is None:
            return means, here
        running, seen = self.running
        mixed = self.momentum * running + (1 - self.momentum) * means
        new, old = here.unsqueeze(1), seen.unsqueeze(1)
        return torch.where(new & old, mixed, torch.where(new, means, running)), here | seen
